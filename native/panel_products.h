// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Products of a few vectors with a matrix in PANELS, a bfloat16 copy made for them. Included by matrix_products.h once
// for every instruction set.
//
// Rows lie side by side, so that lanes are rows, and a sum is made in the order of its columns, whatever else is summed
// beside it: a vector's result does not depend on its neighbours. There are so many sums at once that none waits for
// itself.

namespace ISA_NAMESPACE {

#if ISA_WIDTH == 16
typedef float Lanes __attribute__((vector_size(32)));
typedef uint32_t LaneBits __attribute__((vector_size(32)));
typedef float UnalignedLanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t UnalignedLaneBits __attribute__((vector_size(32), aligned(2), may_alias));
#else
typedef Vec Lanes;
typedef UintVec LaneBits;
typedef UnalignedVec UnalignedLanes;
typedef UnalignedUintVec UnalignedLaneBits;
#endif
constexpr int LANES = sizeof(Lanes) / sizeof(float);
constexpr int LOADS = PANEL_ROWS / 2 / LANES;  // a column of a panel

ISA_INLINE Lanes add_products(Lanes w, float x, Lanes sum) {
#if ISA_WIDTH >= 8
  return (Lanes)_mm256_fmadd_ps((__m256)w, _mm256_set1_ps(x), (__m256)sum);
#else
  return sum + w * x;
#endif
}

// Puts eight rows of a panel, its first or its second ones, of `count` columns from `first` on into to[column * row].
ISA_INLINE void widen_rows(const uint16_t* panel, int64_t first, int64_t count, bool second, float* to, int64_t row) {
  const uint16_t* from = panel + first * PANEL_ROWS;
  for (int64_t u = 0; u < count; ++u, from += PANEL_ROWS, to += row)
    for (int l = 0; l < LOADS; ++l) {
      const LaneBits pairs = *reinterpret_cast<const UnalignedLaneBits*>(from + 2 * l * LANES);
      *reinterpret_cast<UnalignedLanes*>(to + l * LANES) = (Lanes)(second ? pairs & 0xFFFF0000u : pairs << 16);
    }
}

// P panels of a matrix, `step` panels between one and the next, with N vectors, into or onto `to`.
template <int N, int P>
ISA_INLINE void panel_tile(const Matrix& matrix, int64_t first, int64_t step, const float* x, int64_t x_row, float* to,
                           int64_t to_row, bool add) {
  const int64_t columns = matrix.columns;
  const uint16_t* panel[P];
  for (int p = 0; p < P; ++p)
    panel[p] = static_cast<const uint16_t*>(matrix.data) + (first + p * step) * columns * PANEL_ROWS;
  Lanes sum[N][P][2 * LOADS] = {};
  for (int64_t k = 0; k < columns; ++k)
    for (int p = 0; p < P; ++p) {
      const uint16_t* column = panel[p] + k * PANEL_ROWS;
      __builtin_prefetch(column + AHEAD / sizeof(uint16_t));
      for (int l = 0; l < LOADS; ++l) {
        const LaneBits pairs = *reinterpret_cast<const UnalignedLaneBits*>(column + 2 * l * LANES);
        const Lanes low = (Lanes)(pairs << 16), high = (Lanes)(pairs & 0xFFFF0000u);
        for (int b = 0; b < N; ++b) {
          sum[b][p][l] = add_products(low, x[b * x_row + k], sum[b][p][l]);
          sum[b][p][LOADS + l] = add_products(high, x[b * x_row + k], sum[b][p][LOADS + l]);
        }
      }
    }
  for (int b = 0; b < N; ++b)
    for (int p = 0; p < P; ++p)
      for (int l = 0; l < 2 * LOADS; ++l) {
        const int64_t at = (first + p * step) * PANEL_ROWS + l * LANES;
        Lanes value = sum[b][p][l];
        if (matrix.bias) value += *reinterpret_cast<const UnalignedLanes*>(matrix.bias + at);
        UnalignedLanes* out = reinterpret_cast<UnalignedLanes*>(to + b * to_row + at);
        *out = add ? *out + value : value;
      }
}

// N vectors with the panels `range`, P at a time, of places as far apart as the range allows.
template <int N, int P>
ISA_INLINE void panel_tiles(const Matrix& matrix, const Range& range, const float* x, int64_t x_row, float* to,
                            int64_t to_row, bool add) {
  const int64_t step = (range.last - range.first) / P, rest = range.first + P * step;
  for (int64_t i = range.first; i < range.first + step; ++i)
    panel_tile<N, P>(matrix, i, step, x, x_row, to, to_row, add);
  for (int64_t i = rest; i < range.last; ++i) panel_tile<N, 1>(matrix, i, 1, x, x_row, to, to_row, add);
}

// The rows `range`, whole panels, of matrix * x + bias, into or onto `to` (batch, to_row).
ISA_INLINE void multiply_panels(const Matrix& matrix, const Range& range, const float* x, int64_t x_row, int64_t batch,
                                float* to, int64_t to_row, bool add) {
  constexpr int64_t MOST = 6;  // vectors, whose sums with a panel fit into the registers
  const Range panels = {range.first / PANEL_ROWS, range.last / PANEL_ROWS};
  const int64_t turns = (batch + MOST - 1) / MOST, each = turns ? (batch + turns - 1) / turns : 0;
  for (int64_t b = 0; b < batch; b += each, x += each * x_row, to += each * to_row) {
    const int64_t count = batch - b < each ? batch - b : each;
    if (count == 1)
      panel_tiles<1, 4>(matrix, panels, x, x_row, to, to_row, add);
    else if (count == 2)
      panel_tiles<2, 2>(matrix, panels, x, x_row, to, to_row, add);
    else if (count == 3)
      panel_tiles<3, 1>(matrix, panels, x, x_row, to, to_row, add);
    else if (count == 4)
      panel_tiles<4, 1>(matrix, panels, x, x_row, to, to_row, add);
    else if (count == 5)
      panel_tiles<5, 1>(matrix, panels, x, x_row, to, to_row, add);
    else
      panel_tiles<6, 1>(matrix, panels, x, x_row, to, to_row, add);
  }
}

}  // namespace ISA_NAMESPACE
