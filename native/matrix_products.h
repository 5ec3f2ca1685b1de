// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Products of a few vectors with a matrix that is read once: float32, bfloat16, int8 and 4-bit weights. Included by
// prefill_products.h once for every instruction set.
//
// Each part of a row meets up to three vectors. Four rows are taken together, a quarter of all rows apart from each
// other: memory answers four streams faster than one, and much faster than four neighbouring rows. Each sum is made in
// the same order however the work is cut, so a vector's result does not depend on its neighbours.

namespace ISA_NAMESPACE {

typedef uint32_t UintVec __attribute__((vector_size(W * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(W * 2)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int8_t ByteVec __attribute__((vector_size(W)));
typedef int8_t UnalignedByteVec __attribute__((vector_size(W), aligned(1), may_alias));

constexpr int ROWS = 4;          // of the matrix, taken together
constexpr int VECTORS = 3;       // taken together, float32; as many as the processor's registers hold
constexpr int BYTE_VECTORS = 2;  // the same, int8
constexpr int64_t AHEAD = 256;   // bytes to ask memory for in advance; what lies behind the matrix is not touched by it

}  // namespace ISA_NAMESPACE

#include "group_products.h"

namespace ISA_NAMESPACE {

// A vector of bfloat16, made wide. For AVX2, GCC would widen halves of it one by one.
ISA_INLINE Vec widen(const uint16_t* p) {
#if ISA_WIDTH == 8
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  const HalfVec bits = *reinterpret_cast<const UnalignedHalfVec*>(p);
  return (Vec)(__builtin_convertvector(bits, UintVec) << 16);
#endif
}
ISA_INLINE Vec widen(const float* p) { return load(p); }
ISA_INLINE Vec widen_part(const float* p, int64_t lanes) { return load_part(p, lanes); }
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

// Sums of `rows`, float32 or bfloat16, with N vectors. A line of one row follows that of another.
template <int N, class T>
ISA_INLINE void multiply_tile(const T* weights, int64_t columns, const Apart& rows, const float* x, int64_t x_row,
                              float (&to)[N][ROWS]) {
  constexpr int64_t SIZE = sizeof(T), BITE = 8 * W / SIZE;
  const T* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = weights + rows[r] * columns;
  Vec sum[N][ROWS] = {};
  int64_t i = 0;
  for (; i + BITE <= columns; i += BITE)
    for (int r = 0; r < ROWS; ++r) {
      if (SIZE < 4) __builtin_prefetch(row[r] + i + AHEAD / SIZE);  // float32 is foreseen without
      for (int64_t k = i; k < i + BITE; k += W) {
        const Vec w = widen(row[r] + k);
        for (int b = 0; b < N; ++b) sum[b][r] = multiply_add(w, load(x + b * x_row + k), sum[b][r]);
      }
    }
  for (; i < columns; i += W)
    for (int b = 0; b < N; ++b) {
      const Vec v = load_part(x + b * x_row + i, columns - i);
      for (int r = 0; r < ROWS; ++r) sum[b][r] = multiply_add(widen_part(row[r] + i, columns - i), v, sum[b][r]);
    }
  for (int b = 0; b < N; ++b) lane_sums(sum[b], to[b]);
}

// The same for int8 rows of `columns` (filled) with int8 vectors. `sums` are the rows' own sums.
#if ISA_WIDTH == 16
template <int N>
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, const Apart& rows, const int32_t* sums,
                              const int8_t* x, int64_t x_row, int32_t (&to)[N][ROWS]) {
  const __m512i sign = _mm512_set1_epi8(-128);
  const int8_t* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = weights + rows[r] * columns;
  __m512i sum[N][ROWS];
  for (int b = 0; b < N; ++b)
    for (int r = 0; r < ROWS; ++r) sum[b][r] = _mm512_setzero_si512();
  for (int64_t i = 0; i < columns; i += 64) {
    __m512i v[N];  // The instruction wants one factor without sign: x + 128, and 128 times the row's sum is taken off.
    for (int b = 0; b < N; ++b) v[b] = _mm512_xor_si512(_mm512_loadu_si512(x + b * x_row + i), sign);
    for (int r = 0; r < ROWS; ++r) {
      __builtin_prefetch(row[r] + i + AHEAD);
      const __m512i w = _mm512_loadu_si512(row[r] + i);
      for (int b = 0; b < N; ++b) sum[b][r] = _mm512_dpbusd_epi32(sum[b][r], v[b], w);
    }
  }
  for (int b = 0; b < N; ++b)
    for (int r = 0; r < ROWS; ++r) {
      const IntVec lanes = (IntVec)sum[b][r];
      to[b][r] = -128 * sums[rows[r]];
      for (int i = 0; i < W; ++i) to[b][r] += lanes[i];
    }
}
#elif ISA_WIDTH == 8
// |x| (w sign(x)) in pairs: both factors are at most 127, so that two products fit into 16 bits.
ISA_INLINE __m256i byte_products(const int8_t* w, __m256i v, __m256i size) {
  const __m256i turned = _mm256_sign_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), v);
  return _mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), _mm256_set1_epi16(1));
}
template <int N>
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, const Apart& rows, const int32_t*,
                              const int8_t* x, int64_t x_row, int32_t (&to)[N][ROWS]) {
  const int8_t* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = weights + rows[r] * columns;
  __m256i sum[N][ROWS];
  for (int b = 0; b < N; ++b)
    for (int r = 0; r < ROWS; ++r) sum[b][r] = _mm256_setzero_si256();
  for (int64_t i = 0; i < columns; i += 64) {
    __m256i v[N][2], size[N][2];
    for (int b = 0; b < N; ++b)
      for (int k = 0; k < 2; ++k) {
        v[b][k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + b * x_row + i) + k);
        size[b][k] = _mm256_abs_epi8(v[b][k]);
      }
    for (int r = 0; r < ROWS; ++r) {
      __builtin_prefetch(row[r] + i + AHEAD);
      for (int b = 0; b < N; ++b) {
        const __m256i first = byte_products(row[r] + i, v[b][0], size[b][0]);
        const __m256i second = byte_products(row[r] + i + 32, v[b][1], size[b][1]);
        sum[b][r] = _mm256_add_epi32(sum[b][r], _mm256_add_epi32(first, second));
      }
    }
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
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, const Apart& rows, const int32_t*,
                              const int8_t* x, int64_t x_row, int32_t (&to)[N][ROWS]) {
  for (int b = 0; b < N; ++b)
    for (int r = 0; r < ROWS; ++r) {
      const int8_t* row = weights + rows[r] * columns;
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
  int64_t i = 0;
#if ISA_WIDTH >= 8
  for (; i + 32 <= count; i += 32) {
    __m256i whole[4];
    for (int k = 0; k < 4; ++k)
      whole[k] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * k), _mm256_set1_ps(factor)));
    const __m256i low = _mm256_packs_epi32(whole[0], whole[1]), high = _mm256_packs_epi32(whole[2], whole[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
  }
#endif
  for (; i < columns; i += W) {
    const Vec v = i < count ? load_part(x + i, count - i) * factor : Vec{};
    const IntVec whole = (IntVec)(v + 12582912.0f) - 0x4B400000;  // 1.5 * 2^23: the low mantissa bits hold the integer
    *reinterpret_cast<UnalignedByteVec*>(to + i) = __builtin_convertvector(whole, ByteVec);
  }
  return bound / 127.0f + lane_sum(poison);
}

// Rounds some rows of x where the matrix is rounded; bytes and scales are counted as those of x are.
ISA_INLINE void round_rows(const Matrix& matrix, const float* x, int64_t x_row, const Range& rows, int8_t* bytes,
                           int64_t byte_row, float* scales) {
  if (matrix.format != INT8 && matrix.format != INT4) return;
  for (int64_t r = rows.first; r < rows.last; ++r)
    scales[r] = round_to_bytes(x + r * x_row, matrix.columns, filled(matrix.columns), bytes + r * byte_row);
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
  round_rows(matrix, x, row, {0, batch}, own.bytes, columns, own.scales);
  return {x, own.bytes, own.scales, row, columns, batch};
}

template <int N>
ISA_INLINE void store_tile(const Matrix& matrix, int64_t first, const Apart& rows, const float (&sums)[N][ROWS],
                           float* to, int64_t to_row, bool add) {
  for (int b = 0; b < N; ++b)
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t at = first + rows[r];
      const float value = sums[b][r] + (matrix.bias ? matrix.bias[at] : 0.0f);
      float* out = to + b * to_row + at;
      *out = add ? *out + value : value;
    }
}

template <class T, int N>
ISA_INLINE void multiply_some(const Matrix& matrix, int64_t first, const Apart& rows, const Input& in, int64_t b,
                              float* to, int64_t to_row, bool add) {
  float sums[N][ROWS];
  multiply_tile<N>(static_cast<const T*>(matrix.data) + first * matrix.columns, matrix.columns, rows,
                   in.x + b * in.row, in.row, sums);
  store_tile<N>(matrix, first, rows, sums, to + b * to_row, to_row, add);
}
// All vectors of floats.
template <class T>
ISA_INLINE void multiply_vectors(const Matrix& matrix, int64_t first, const Apart& rows, const Input& in, float* to,
                                 int64_t to_row, bool add) {
  int64_t b = 0;
  for (; b + VECTORS <= in.batch; b += VECTORS)
    multiply_some<T, VECTORS>(matrix, first, rows, in, b, to, to_row, add);
  static_assert(VECTORS == 3, "two or one are left");
  if (in.batch - b == 2)
    multiply_some<T, 2>(matrix, first, rows, in, b, to, to_row, add);
  else if (in.batch - b == 1)
    multiply_some<T, 1>(matrix, first, rows, in, b, to, to_row, add);
}
template <int N>
ISA_INLINE void multiply_bytes(const Matrix& matrix, int64_t first, const Apart& rows, const Input& in, int64_t b,
                               float* to, int64_t to_row, bool add) {
  int32_t whole[N][ROWS];
  float sums[N][ROWS];
  multiply_tile<N>(static_cast<const int8_t*>(matrix.data) + first * in.byte_row, in.byte_row, rows,
                   matrix.sums + first, in.bytes + b * in.byte_row, in.byte_row, whole);
  const float* scale = static_cast<const float*>(matrix.scale) + first;
  for (int v = 0; v < N; ++v)
    for (int64_t r = 0; r < ROWS; ++r)
      sums[v][r] = static_cast<float>(whole[v][r]) * (scale[rows[r]] * in.scales[b + v]);
  store_tile<N>(matrix, first, rows, sums, to + b * to_row, to_row, add);
}
template <int N>
ISA_INLINE void multiply_nibbles(const Matrix& matrix, int64_t first, const Apart& rows, const Input& in, int64_t b,
                                 float* to, int64_t to_row, bool add) {
  const int64_t groups = (matrix.columns + GROUP - 1) / GROUP;
  float sums[N][ROWS];
  multiply_groups<N>(static_cast<const uint8_t*>(matrix.data) + first * groups * GROUP_BYTES,
                     static_cast<const uint16_t*>(matrix.scale) + first * groups, groups, rows,
                     in.bytes + b * in.byte_row, in.byte_row, sums);
  for (int v = 0; v < N; ++v)
    for (int64_t r = 0; r < ROWS; ++r) sums[v][r] *= in.scales[b + v];
  store_tile<N>(matrix, first, rows, sums, to + b * to_row, to_row, add);
}

// The rows `range` of matrix * x + bias, into or onto `to` (batch, to_row).
[[maybe_unused]] ISA_TARGET static void multiply(const Matrix& matrix, const Range& range, const Input& in, float* to,
                                                 int64_t to_row, bool add) {
  const int64_t all = range.last - range.first, step = (all + ROWS - 1) / ROWS;
  for (int64_t i = 0; i < step; ++i) {
    const int64_t r = range.first + i;
    const Apart rows = {(all - i + step - 1) / step, step};
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
      multiply_vectors<uint16_t>(matrix, r, rows, in, to, to_row, add);
    } else {
      multiply_vectors<float>(matrix, r, rows, in, to, to_row, add);
    }
  }
}

}  // namespace ISA_NAMESPACE
