// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What one thread does for a linear layer. Included by for_each_isa.h once for every instruction set.

#include "prefill_products.h"

namespace ISA_NAMESPACE {

// Rows `first` to `first + rows` as a matrix of their own, as the products want them, those with `few` vectors wanting
// the rows' sums; the bias is added afterwards.
ISA_INLINE Matrix take_strip(const Matrix& matrix, int64_t first, int64_t rows, bool few, const LinearBench& own) {
  const int64_t columns = matrix.columns, groups = (columns + GROUP - 1) / GROUP, width = filled(columns);
  Matrix strip = {nullptr, nullptr, nullptr, nullptr, rows, columns, matrix.format};
  if (matrix.format == INT4) {
    strip.data = static_cast<const uint8_t*>(matrix.data) + first * groups * GROUP_BYTES;
    strip.scale = static_cast<const uint16_t*>(matrix.scale) + first * groups;
    return strip;
  }
  const int8_t* weights = static_cast<const int8_t*>(matrix.data) + first * columns;
  strip.scale = static_cast<const float*>(matrix.scale) + first;
  if (width != columns) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(own.strip + r * width, weights + r * columns, columns);
      std::memset(own.strip + r * width + columns, 0, width - columns);
    }
    weights = own.strip;
  }
  strip.data = weights;
  strip.sums = own.strip_sums;
  if (LIFT > 0 && few) {
    for (int64_t r = 0; r < rows; ++r) {
      int32_t sum = 0;
      for (int64_t i = 0; i < width; ++i) sum += weights[r * width + i];
      own.strip_sums[r] = sum;
    }
  }
  return strip;
}

ISA_TARGET static void run_linear(const LinearArgs& args, const LinearStage& stage, const LinearBench& own,
                                  int64_t thread, int64_t threads) {
  const Matrix& matrix = args.matrix;
  const int64_t columns = matrix.columns, outputs = matrix.rows;
  const Range mine = part_of(outputs, thread, threads);
  for (int64_t start = 0; start < args.tokens; start += TOKENS) {
    const int64_t count = args.tokens - start < TOKENS ? args.tokens - start : TOKENS;
    const bool few = count < MANY && matrix.format == INT8;  // 4-bit groups: one order of float sums for any number
    const float* x = args.x + start * columns;
    const int64_t byte_row = few ? filled(columns) : stage.byte_row;
    for (int64_t t = thread; t < count; t += threads)
      stage.scales[t] = round_to_bytes(x + t * columns, columns, filled(columns), stage.bytes + t * byte_row);
    meet();
    for (int64_t r = mine.first; r < mine.last; r += STRIP) {
      const int64_t rows = mine.last - r < STRIP ? mine.last - r : STRIP;
      const Matrix strip = take_strip(matrix, r, rows, few, own);
      float* y = args.y + start * outputs + r;
      if (few)
        multiply(strip, {0, rows}, {nullptr, stage.bytes, stage.scales, 0, byte_row, count}, y, outputs, false);
      else
        multiply_tokens(strip, {0, rows}, {nullptr, stage.bytes, stage.scales, 0, byte_row, count}, y, outputs,
                        false, own.desk);
      if (matrix.bias)
        for (int64_t t = 0; t < count; ++t)
          for (int64_t i = 0; i < rows; ++i) y[t * outputs + i] += matrix.bias[r + i];
    }
    meet();
  }
}

}  // namespace ISA_NAMESPACE
