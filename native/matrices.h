// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Matrices of weights in the formats that matrix_products.h multiplies, and how threads share their rows.

#pragma once

#include "common.h"

// Mirrored field by field in modeling_mambaformer/packed_weights.py.
// (rows, columns), row after row. INT8: the float32 scale and the sum of each row. INT4: the bfloat16 scales of each
// row's groups. `columns` is without the filling. PANELS: bfloat16, (rows / 16, columns, 8, 2), a panel's rows i and i + 8
// in the two halves of 32 bits.
struct Matrix {
  const void *data, *scale;
  const float* bias;
  const int32_t* sums;
  int64_t rows, columns, format;
};

namespace {

enum Format : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, PANELS = 4 };

constexpr int64_t SPAN = 16;  // a thread's first row or channel is a multiple of this
constexpr int64_t BYTES = 64;  // columns of an int8 matrix are filled up with zeros to a multiple of this
constexpr int64_t GROUP = 32;  // columns of an INT4 matrix that share a scale; rows are filled up to a multiple of this
constexpr int64_t GROUP_BYTES = GROUP / 2;
constexpr int64_t PANEL_ROWS = 16;  // of PANELS; what a thread takes is whole panels

static_assert(SPAN % PANEL_ROWS == 0, "whole panels");

constexpr int64_t filled(int64_t columns) { return (columns + BYTES - 1) / BYTES * BYTES; }

struct Range {
  int64_t first, last;
};

// Some rows of a matrix that are taken together: `step` rows between one and the next, the first `count` of them there;
// the first stands in for those that are not.
struct Apart {
  int64_t count, step;
  constexpr int64_t operator[](int64_t r) const { return r < count ? r * step : 0; }
};

// Whether a matrix is multiplied with vectors rounded to int8. Its own format may be a template's argument.
constexpr bool takes_bytes(int64_t format) { return format == INT8 || format == INT4; }

// This thread's part of `count` rows or channels.
[[maybe_unused]] Range part_of(int64_t count, int64_t thread, int64_t threads) {
  const int64_t spans = (count + SPAN - 1) / SPAN;
  const int64_t first = spans * thread / threads * SPAN, last = spans * (thread + 1) / threads * SPAN;
  return {first < count ? first : count, last < count ? last : count};
}

}  // namespace
