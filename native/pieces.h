// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Work that threads take piece by piece: nobody waits long for a slower one, and what a thread wrote is mostly read by
// the same thread, whose cache has it.

#pragma once

#include <atomic>

#include "matrices.h"

namespace {

// What has been taken of a thread's share.
struct alignas(64) Pieces {
  std::atomic<int64_t> taken{0};
};

// A thread's share of `count` channels or rows: whole blocks.
[[maybe_unused]] Range share_of(int64_t count, int64_t thread, int64_t threads) {
  const int64_t blocks = (count + BLOCK - 1) / BLOCK;
  const int64_t first = blocks * thread / threads * BLOCK, last = blocks * (thread + 1) / threads * BLOCK;
  return {first < count ? first : count, last < count ? last : count};
}

// Takes the next piece of `count` channels or rows, if any is left, from the thread's own share while that lasts, then
// from the others'. A piece is a block, and less towards the end, where the others would have to wait for whoever took
// the last one, but at least `least`, a divisor of BLOCK. `backwards` begins with the last of a share: what was done last
// is what the cache still has. `pieces` are the threads'.
[[maybe_unused]] bool take_piece(Pieces* pieces, int64_t count, int64_t thread, int64_t threads, int64_t least,
                                 bool backwards, Range& piece) {
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t owner = (thread + i) % threads;
    const Range share = share_of(count, owner, threads);
    const int64_t size = (share.last - share.first + BLOCK - 1) / BLOCK * BLOCK;
    int64_t taken = pieces[owner].taken.load(std::memory_order_relaxed);
    while (taken < size) {
      const int64_t left = size - taken;
      const int64_t step = threads == 1 || left >= 2 * BLOCK ? BLOCK : left == BLOCK ? BLOCK / 2 : least;
      if (!pieces[owner].taken.compare_exchange_weak(taken, taken + step)) continue;
      piece.first = backwards ? share.first + left - step : share.first + taken;
      piece.last = piece.first + step < share.last ? piece.first + step : share.last;
      if (piece.first < piece.last) return true;
      taken += step;  // nothing but what would fill the last block up
    }
  }
  return false;
}

}  // namespace
