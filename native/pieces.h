// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Work that threads take piece by piece, so that nobody waits long for a slower one.

#pragma once

#include <atomic>

#include "matrices.h"

namespace {

// What has been taken.
struct Pieces {
  std::atomic<int64_t> taken{0};
};

// Takes the next piece of `count` channels or rows, if any is left: a block, and less towards the end, where the others
// would have to wait for whoever took the last one.
[[maybe_unused]] bool take_piece(Pieces& pieces, int64_t count, int64_t threads, Range& piece) {
  piece.first = pieces.taken.load(std::memory_order_relaxed);
  do {
    const int64_t left = count - piece.first, many = left / threads / BLOCK;  // blocks for each
    const int64_t size = threads == 1 || many >= 2 ? BLOCK : many == 1 ? BLOCK / 2 : SPAN;
    piece.last = piece.first + (size < left ? size : left);
  } while (piece.first < piece.last && !pieces.taken.compare_exchange_weak(piece.first, piece.last));
  return piece.first < piece.last;
}

}  // namespace
