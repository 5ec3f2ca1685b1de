// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Products of a few vectors with a matrix that is read once: float32, bfloat16, int8 and 4-bit weights. Included by
// decode_step_kernels.h once for every instruction set.
//
// Each part of a row meets up to three vectors. float32 takes four rows together; bfloat16 and whole numbers one row
// after another, which reads memory in its order. Each sum is made in the same order however the work is cut, so a
// vector's result does not depend on its neighbours.

namespace ISA_NAMESPACE {

typedef uint32_t UintVec __attribute__((vector_size(W * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(W * 2)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int8_t ByteVec __attribute__((vector_size(W)));
typedef int8_t UnalignedByteVec __attribute__((vector_size(W), aligned(1), may_alias));

constexpr int ROWS = 4;     // of the matrix, taken together
constexpr int VECTORS = 3;  // taken together, float32; as many as the processor's registers hold
constexpr int BYTE_VECTORS = 2;  // the same, int8
constexpr int64_t AHEAD = 1024;  // bytes to ask memory for in advance; what lies behind the matrix is not touched by it

}  // namespace ISA_NAMESPACE

#include "group_products.h"

namespace ISA_NAMESPACE {

// A vector of bfloat16, made wide.
ISA_INLINE Vec widen(const uint16_t* p) {
  const HalfVec bits = *reinterpret_cast<const UnalignedHalfVec*>(p);
  return (Vec)(__builtin_convertvector(bits, UintVec) << 16);
}
ISA_INLINE Vec widen_part(const uint16_t* p, int64_t lanes) {
  if (lanes >= W) return widen(p);
  uint16_t part[W] = {};
  for (int64_t i = 0; i < lanes; ++i) part[i] = p[i];
  return widen(part);
}

// The lane sums of four vectors, each in the same order.
ISA_INLINE void lane_sums(const Vec (&x)[ROWS], float* to) {
#if ISA_WIDTH == 8
  const __m256 low = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), high = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
  const __m256 sums = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int r = 0; r < ROWS; ++r) to[r] = lane_sum(x[r]);
#endif
}

// Sums of ROWS rows, of which the first `rows` are there, with N vectors.
template <int N>
ISA_INLINE void multiply_tile(const float* weights, int64_t columns, int64_t rows, const float* x, int64_t x_row,
                              float (&to)[N][ROWS]) {
  const float* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = weights + (r < rows ? r : 0) * columns;
  Vec sum[N][ROWS] = {};
  int64_t i = 0;
  for (; i + W <= columns; i += W) {
    Vec w[ROWS];
    for (int r = 0; r < ROWS; ++r) w[r] = load(row[r] + i);
    for (int b = 0; b < N; ++b) {
      const Vec v = load(x + b * x_row + i);
      for (int r = 0; r < ROWS; ++r) sum[b][r] = multiply_add(w[r], v, sum[b][r]);
    }
  }
  if (i < columns) {
    for (int b = 0; b < N; ++b) {
      const Vec v = load_part(x + b * x_row + i, columns - i);
      for (int r = 0; r < ROWS; ++r)
        sum[b][r] = multiply_add(load_part(row[r] + i, columns - i), v, sum[b][r]);
    }
  }
  for (int b = 0; b < N; ++b) lane_sums(sum[b], to[b]);
}

// The same for rows of bfloat16: one row after another for a single vector, which memory holds up, and two together for
// more, which share what they load. Each row has two sums, so that fewer products wait for the one before.
template <int N>
ISA_INLINE void multiply_tile(const uint16_t* weights, int64_t columns, int64_t rows, const float* x, int64_t x_row,
                              float (&to)[N][ROWS]) {
  constexpr int TOGETHER = N == 1 ? 1 : 2;
  constexpr int64_t BITE = 2 * W;
  Vec sum[N][ROWS];
  for (int r = 0; r < ROWS; r += TOGETHER) {
    const uint16_t* row[TOGETHER];
    for (int q = 0; q < TOGETHER; ++q) row[q] = weights + (r + q < rows ? r + q : 0) * columns;
    Vec even[N][TOGETHER] = {}, odd[N][TOGETHER] = {};
    int64_t i = 0;
    for (; i + BITE <= columns; i += BITE) {
      Vec first[TOGETHER], second[TOGETHER];
      for (int q = 0; q < TOGETHER; ++q) {
        __builtin_prefetch(row[q] + i + AHEAD / 2);
        first[q] = widen(row[q] + i);
        second[q] = widen(row[q] + i + W);
      }
      for (int b = 0; b < N; ++b) {
        const Vec v = load(x + b * x_row + i), w = load(x + b * x_row + i + W);
        for (int q = 0; q < TOGETHER; ++q) {
          even[b][q] = multiply_add(first[q], v, even[b][q]);
          odd[b][q] = multiply_add(second[q], w, odd[b][q]);
        }
      }
    }
    for (; i < columns; i += W)
      for (int b = 0; b < N; ++b) {
        const Vec v = load_part(x + b * x_row + i, columns - i);
        for (int q = 0; q < TOGETHER; ++q)
          even[b][q] = multiply_add(widen_part(row[q] + i, columns - i), v, even[b][q]);
      }
    for (int b = 0; b < N; ++b)
      for (int q = 0; q < TOGETHER; ++q) sum[b][r + q] = even[b][q] + odd[b][q];
  }
  for (int b = 0; b < N; ++b) lane_sums(sum[b], to[b]);
}

// The same for int8 rows of `columns` (filled) with int8 vectors. `sums` are the rows' own sums.
#if ISA_WIDTH == 16
template <int N>
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, int64_t rows, const int32_t* sums,
                              const int8_t* x, int64_t x_row, int32_t (&to)[N][ROWS]) {
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* row = weights + r * columns;
    __m512i sum[N];
    for (int b = 0; b < N; ++b) sum[b] = _mm512_setzero_si512();
    for (int64_t i = 0; i < columns; i += 64) {
      __builtin_prefetch(row + i + AHEAD);
      const __m512i w = _mm512_loadu_si512(row + i);
      // The instruction wants one factor without sign: x + 128, and 128 times the row's sum is taken off at the end.
      for (int b = 0; b < N; ++b)
        sum[b] = _mm512_dpbusd_epi32(sum[b], _mm512_xor_si512(_mm512_loadu_si512(x + b * x_row + i), sign), w);
    }
    for (int b = 0; b < N; ++b) {
      const IntVec lanes = (IntVec)sum[b];
      to[b][r] = -128 * sums[r];
      for (int i = 0; i < W; ++i) to[b][r] += lanes[i];
    }
  }
}
#elif ISA_WIDTH == 8
// |x| (w sign(x)) in pairs: both factors are at most 127, so that two products fit into 16 bits.
ISA_INLINE __m256i byte_products(const int8_t* w, const int8_t* x) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i turned = _mm256_sign_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), v);
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(v), turned), _mm256_set1_epi16(1));
}
template <int N>
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, int64_t rows, const int32_t*, const int8_t* x,
                              int64_t x_row, int32_t (&to)[N][ROWS]) {
  __m256i sum[N][ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int8_t* row = weights + (r < rows ? r : 0) * columns;
    __m256i even[N], odd[N];
    for (int b = 0; b < N; ++b) even[b] = odd[b] = _mm256_setzero_si256();
    for (int64_t i = 0; i < columns; i += 64) {
      __builtin_prefetch(row + i + AHEAD);
      for (int b = 0; b < N; ++b) {
        even[b] = _mm256_add_epi32(even[b], byte_products(row + i, x + b * x_row + i));
        odd[b] = _mm256_add_epi32(odd[b], byte_products(row + i + 32, x + b * x_row + i + 32));
      }
    }
    for (int b = 0; b < N; ++b) sum[b][r] = _mm256_add_epi32(even[b], odd[b]);
  }
  for (int b = 0; b < N; ++b) {
    const __m256i low = _mm256_hadd_epi32(sum[b][0], sum[b][1]), high = _mm256_hadd_epi32(sum[b][2], sum[b][3]);
    const __m256i all = _mm256_hadd_epi32(low, high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[b]),
                     _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  }
}
#else
template <int N>
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, int64_t rows, const int32_t*, const int8_t* x,
                              int64_t x_row, int32_t (&to)[N][ROWS]) {
  for (int b = 0; b < N; ++b)
    for (int r = 0; r < ROWS; ++r) {
      const int8_t* row = weights + (r < rows ? r : 0) * columns;
      int32_t sum = 0;
      for (int64_t i = 0; i < columns; ++i) sum += row[i] * x[b * x_row + i];
      to[b][r] = sum;
    }
}
#endif

// x to int8 with one scale, filled up with zeros to `columns`; returns the scale, NaN where x is not finite.
ISA_INLINE float round_to_bytes(const float* x, int64_t count, int64_t columns, int8_t* to) {
  Vec largest = {}, poison = {};
  for (int64_t i = 0; i < count; i += W) {
    const Vec v = load_part(x + i, count - i);
    largest = larger(magnitude(v), largest);
    poison += v * 0.0f;
  }
  const float bound = lane_max(largest), factor = bound > 0.0f ? 127.0f / bound : 0.0f;
  for (int64_t i = 0; i < columns; i += W) {
    const Vec v = i < count ? load_part(x + i, count - i) * factor : Vec{};
    const IntVec whole = (IntVec)(v + 12582912.0f) - 0x4B400000;  // 1.5 * 2^23: the low mantissa bits hold the integer
    *reinterpret_cast<UnalignedByteVec*>(to + i) = __builtin_convertvector(whole, ByteVec);
  }
  return bound / 127.0f + lane_sum(poison);
}

// What a matrix is multiplied with: `batch` vectors, rounded too where the matrix is int8 or INT4.
struct Input {
  const float* x;
  const int8_t* bytes;
  const float* scales;
  int64_t row, byte_row, batch;
};

ISA_INLINE Input prepare(const Matrix& matrix, const float* x, int64_t row, int64_t batch, const Own& own) {
  const int64_t columns = filled(matrix.columns);
  if (matrix.format == INT8 || matrix.format == INT4)
    for (int64_t b = 0; b < batch; ++b)
      own.scales[b] = round_to_bytes(x + b * row, matrix.columns, columns, own.bytes + b * columns);
  return {x, own.bytes, own.scales, row, columns, batch};
}

template <int N>
ISA_INLINE void store_tile(const Matrix& matrix, int64_t first, int64_t rows, const float (&sums)[N][ROWS], float* to,
                           int64_t to_row, bool add) {
  for (int b = 0; b < N; ++b)
    for (int64_t r = 0; r < rows; ++r) {
      const float value = sums[b][r] + (matrix.bias ? matrix.bias[first + r] : 0.0f);
      float* out = to + b * to_row + first + r;
      *out = add ? *out + value : value;
    }
}

template <class T, int N>
ISA_INLINE void multiply_some(const Matrix& matrix, int64_t first, int64_t rows, const Input& in, int64_t b, float* to,
                              int64_t to_row, bool add) {
  float sums[N][ROWS];
  multiply_tile<N>(static_cast<const T*>(matrix.data) + first * matrix.columns, matrix.columns, rows,
                      in.x + b * in.row, in.row, sums);
  store_tile<N>(matrix, first, rows, sums, to + b * to_row, to_row, add);
}
template <int N>
ISA_INLINE void multiply_bytes(const Matrix& matrix, int64_t first, int64_t rows, const Input& in, int64_t b,
                               float* to, int64_t to_row, bool add) {
  int32_t whole[N][ROWS];
  float sums[N][ROWS] = {};
  multiply_tile<N>(static_cast<const int8_t*>(matrix.data) + first * in.byte_row, in.byte_row, rows,
                   matrix.sums + first, in.bytes + b * in.byte_row, in.byte_row, whole);
  for (int v = 0; v < N; ++v)
    for (int64_t r = 0; r < rows; ++r)
      sums[v][r] = static_cast<float>(whole[v][r]) * (static_cast<const float*>(matrix.scale)[first + r] * in.scales[b + v]);
  store_tile<N>(matrix, first, rows, sums, to + b * to_row, to_row, add);
}
template <int N>
ISA_INLINE void multiply_nibbles(const Matrix& matrix, int64_t first, int64_t rows, const Input& in, int64_t b,
                                 float* to, int64_t to_row, bool add) {
  const int64_t groups = (matrix.columns + GROUP - 1) / GROUP;
  float sums[N][ROWS];
  multiply_groups<N>(static_cast<const uint8_t*>(matrix.data) + first * groups * GROUP_BYTES,
                     static_cast<const uint16_t*>(matrix.scale) + first * groups, groups, rows,
                     in.bytes + b * in.byte_row, in.byte_row, sums);
  for (int v = 0; v < N; ++v)
    for (int64_t r = 0; r < rows; ++r) sums[v][r] *= in.scales[b + v];
  store_tile<N>(matrix, first, rows, sums, to + b * to_row, to_row, add);
}

// The rows `range` of matrix * x + bias, into or onto `to` (batch, to_row).
[[maybe_unused]] ISA_TARGET static void multiply(const Matrix& matrix, const Range& range, const Input& in, float* to,
                                                 int64_t to_row, bool add) {
  for (int64_t r = range.first; r < range.last; r += ROWS) {
    const int64_t rows = range.last - r < ROWS ? range.last - r : ROWS;
    int64_t b = 0;
    if (matrix.format == INT8) {
      for (; b + BYTE_VECTORS <= in.batch; b += BYTE_VECTORS)
        multiply_bytes<BYTE_VECTORS>(matrix, r, rows, in, b, to, to_row, add);
      for (; b < in.batch; ++b) multiply_bytes<1>(matrix, r, rows, in, b, to, to_row, add);
    } else if (matrix.format == INT4) {
      for (; b + BYTE_VECTORS <= in.batch; b += BYTE_VECTORS)
        multiply_nibbles<BYTE_VECTORS>(matrix, r, rows, in, b, to, to_row, add);
      for (; b < in.batch; ++b) multiply_nibbles<1>(matrix, r, rows, in, b, to, to_row, add);
    } else if (matrix.format == BFLOAT16) {
      for (; b + VECTORS <= in.batch; b += VECTORS)
        multiply_some<uint16_t, VECTORS>(matrix, r, rows, in, b, to, to_row, add);
      for (; b < in.batch; ++b) multiply_some<uint16_t, 1>(matrix, r, rows, in, b, to, to_row, add);
    } else {
      for (; b + VECTORS <= in.batch; b += VECTORS)
        multiply_some<float, VECTORS>(matrix, r, rows, in, b, to, to_row, add);
      for (; b < in.batch; ++b) multiply_some<float, 1>(matrix, r, rows, in, b, to, to_row, add);
    }
  }
}

}  // namespace ISA_NAMESPACE
