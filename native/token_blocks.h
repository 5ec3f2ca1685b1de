// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// How memory is laid out where many tokens are taken in blocks, for the products of prefill_products.h.

#pragma once

#include <new>

#include "matrices.h"
#include "pieces.h"

namespace {

constexpr int64_t TOKENS = 504;       // of a block, unless asked otherwise: whole tiles of prefill_products.h
constexpr int64_t MANY = 16;          // vectors for which laying out an int8 matrix pays
constexpr int64_t LINE = 16;          // floats that the processor fetches together
constexpr int64_t UNITS = 512;        // of a row of a matrix, laid out at a time: at most
constexpr int64_t WIDEST_PANEL = 32;  // rows of a matrix, laid out side by side

// Distance of neighbouring rows in floats: whole lines, an odd number of them, so that a column's values do not all
// compete for the same few places of the cache.
constexpr int64_t spread(int64_t columns) { return ((columns + LINE - 1) / LINE | 1) * LINE; }
constexpr int64_t whole_lines(int64_t floats) { return (floats + LINE - 1) / LINE * LINE; }

// Hands out parts of one piece of memory, each beginning with a line where the whole does. Of a workspace, up to LINE
// floats are left out for that.
struct Arena {
  float* next;
  explicit Arena(float* memory) : next(memory) {}
  explicit Arena(const Buffer& workspace)
      : next(workspace.data + (64 - reinterpret_cast<std::uintptr_t>(workspace.data) % 64) % 64 / sizeof(float)) {}
  float* take(int64_t floats) {
    float* part = next;
    next += whole_lines(floats);
    return part;
  }
};

// What has been taken of each thread's share.
[[maybe_unused]] Pieces* take_pieces(Arena& arena, int64_t threads) {
  static_assert(sizeof(Pieces) == LINE * sizeof(float), "a line for each thread");
  float* memory = arena.take(threads * LINE);
  for (int64_t i = 0; i < threads; ++i) new (memory + i * LINE) Pieces;
  return reinterpret_cast<Pieces*>(memory);
}

// What one thread needs for a product of a block of tokens: a panel of the matrix, [UNITS][panel]; the sums of all tokens
// with it, [tokens][panel]; the scales of its groups, [UNITS / (GROUP / 4)][panel], and what they give too much, alike. A
// panel is that of the instruction set, at most WIDEST_PANEL.
struct Desk {
  float *panel, *sums, *factors, *lifts;
};
constexpr int64_t desk_size(int64_t tokens) {
  return whole_lines(UNITS * WIDEST_PANEL) + whole_lines(tokens * WIDEST_PANEL) +
         2 * whole_lines(UNITS / (GROUP / 4) * WIDEST_PANEL);
}
[[maybe_unused]] Desk take_desk(Arena& arena, int64_t tokens) {
  Desk desk;
  desk.panel = arena.take(UNITS * WIDEST_PANEL);
  desk.sums = arena.take(tokens * WIDEST_PANEL);
  for (float** part : {&desk.factors, &desk.lifts}) *part = arena.take(UNITS / (GROUP / 4) * WIDEST_PANEL);
  return desk;
}

// What each thread has for itself where few tokens are taken: the input of a product, in float32, and laid out or rounded
// as the matrix is, and a desk if they are MANY.
struct Own {
  float *x, *scales;  // [batch][hidden], [batch]
  int8_t* bytes;      // [batch][filled(widest input)]
  float* pairs;       // the same of floats, for matrices of bfloat16
  Desk desk;
};
constexpr int64_t own_size(int64_t batch, int64_t hidden, int64_t widest) {
  return whole_lines(batch * hidden) + whole_lines(batch) + whole_lines(batch * filled(widest)) +
         (batch < MANY ? 0 : desk_size(batch));
}
[[maybe_unused]] Own take_own(Arena& arena, int64_t batch, int64_t hidden, int64_t widest) {
  Own own;
  own.x = arena.take(batch * hidden);
  own.scales = arena.take(batch);
  own.pairs = arena.take(batch * filled(widest));
  own.bytes = reinterpret_cast<int8_t*>(own.pairs);
  own.desk = batch < MANY ? Desk{} : take_desk(arena, batch);
  return own;
}

}  // namespace
