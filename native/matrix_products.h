// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Products of a few vectors with a matrix that is read once, in any format. Included by prefill_products.h once for every
// instruction set.
//
// Each part of a row meets up to three vectors. Four rows are taken together, a quarter of all rows apart from each
// other: memory answers four streams faster than one, and much faster than four neighbouring rows. Each sum is made in
// the same order however the work is cut, so a vector's result does not depend on its neighbours.

namespace ISA_NAMESPACE {

typedef uint32_t UintVec __attribute__((vector_size(W * 4)));
typedef uint32_t UnalignedUintVec __attribute__((vector_size(W * 4), aligned(2), may_alias));
typedef int8_t ByteVec __attribute__((vector_size(W)));
typedef int8_t UnalignedByteVec __attribute__((vector_size(W), aligned(1), may_alias));

constexpr int ROWS = 4;          // of the matrix, taken together
constexpr int64_t SHORT = 32;    // columns that are few
constexpr int64_t AHEAD = 256;   // bytes to ask memory for in advance; what lies behind the matrix is not touched by it
constexpr int LIFT = ISA_VNNI ? 128 : 0;  // on top of all rounded vectors: VNNI wants one factor without sign

// The lane sums of four vectors, each in the same order.
#if ISA_WIDTH == 16
template <class V, class T>  // of Vec and float, or IntVec and int32_t
ISA_INLINE void lane_sums(const V (&x)[ROWS], T* to) {
  V pairs[ROWS / 2];
  for (int i = 0; i < ROWS / 2; ++i) {
    const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    pairs[i] = (V)_mm512_unpacklo_ps(a, b) + (V)_mm512_unpackhi_ps(a, b);
  }
  const __m512 a = (__m512)pairs[0], b = (__m512)pairs[1];
  V sum = (V)_mm512_shuffle_ps(a, b, 0x44) + (V)_mm512_shuffle_ps(a, b, 0xEE);  // by quarters
  sum += (V)_mm512_shuffle_f32x4((__m512)sum, (__m512)sum, 0xEE);
  sum += (V)_mm512_shuffle_f32x4((__m512)sum, (__m512)sum, 0x55);
  std::memcpy(to, &sum, ROWS * sizeof(T));
}
#else
ISA_INLINE void lane_sums(const Vec (&x)[ROWS], float* to) {
#if ISA_WIDTH == 8
  const __m256 low = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), high = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
  const __m256 sums = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int r = 0; r < ROWS; ++r) to[r] = lane_sum(x[r]);
#endif
}
#if ISA_WIDTH == 8
ISA_INLINE void lane_sums(const IntVec (&x)[ROWS], int32_t* to) {
  const __m256i low = _mm256_hadd_epi32((__m256i)x[0], (__m256i)x[1]);
  const __m256i sums = _mm256_hadd_epi32(low, _mm256_hadd_epi32((__m256i)x[2], (__m256i)x[3]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
}
#endif
#endif

}  // namespace ISA_NAMESPACE

#include "group_products.h"
#include "panel_products.h"

namespace ISA_NAMESPACE {

// Columns of a row that are taken at once, from one line of memory where vectors have eight lanes.
template <class T>
constexpr int64_t BITE = 8 * W / sizeof(T);

// Half of 2 W columns. Of bfloat16, the first half is every other column, which makes it wide in one instruction: the
// vectors that such a matrix meets are laid out alike, as far as whole bites go.
ISA_INLINE Vec widen(const float* p, int half) { return load(p + half * W); }
ISA_INLINE Vec widen(const uint16_t* p, int half) {
  const UintVec pairs = *reinterpret_cast<const UnalignedUintVec*>(p);
  return (Vec)(half ? pairs & 0xFFFF0000u : pairs << 16);
}
ISA_INLINE Vec widen_part(const float* p, int64_t lanes) { return load_part(p, lanes); }
ISA_INLINE Vec widen_part(const uint16_t* p, int64_t lanes) {
  float part[W] = {};
  for (int64_t i = 0; i < W && i < lanes; ++i) part[i] = as_float(p[i]);
  return load(part);
}
ISA_INLINE void lay_out_pairs(const float* x, int64_t columns, float* to) {
  const int64_t whole = columns / BITE<uint16_t> * BITE<uint16_t>;
  for (int64_t i = 0; i < whole; i += 2 * W)
    for (int64_t lane = 0; lane < W; ++lane) to[i + lane] = x[i + 2 * lane], to[i + W + lane] = x[i + 2 * lane + 1];
  for (int64_t i = whole; i < columns; ++i) to[i] = x[i];
}

// Sums of `rows`, float32 or bfloat16, with N vectors. A line of one row follows that of another. Two vectors' columns are
// read once for all rows; one leaves time for little but reading the rows, and of three there is no place for them.
template <int N, class T>
ISA_INLINE void multiply_tile(const T* weights, int64_t columns, const Apart& rows, const float* x, int64_t x_row,
                              float (&to)[N][ROWS]) {
  const T* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = weights + rows[r] * columns;
  Vec sum[N][ROWS] = {};
  int64_t i = 0;
  for (; i + BITE<T> <= columns; i += BITE<T>) {
    if (sizeof(T) < sizeof(float))  // float32 is foreseen without
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(row[r] + i + AHEAD / sizeof(T));
    if constexpr (N != 2) {
      for (int r = 0; r < ROWS; ++r)
        for (int64_t k = i; k < i + BITE<T>; k += 2 * W)
          for (int half = 0; half < 2; ++half) {
            const Vec w = widen(row[r] + k, half);
            for (int b = 0; b < N; ++b) sum[b][r] = multiply_add(w, load(x + b * x_row + k + half * W), sum[b][r]);
          }
    } else {
      for (int64_t k = i; k < i + BITE<T>; k += 2 * W)
        for (int half = 0; half < 2; ++half) {
          Vec v[N];
          for (int b = 0; b < N; ++b) v[b] = load(x + b * x_row + k + half * W);
          for (int r = 0; r < ROWS; ++r) {
            const Vec w = widen(row[r] + k, half);
            for (int b = 0; b < N; ++b) sum[b][r] = multiply_add(w, v[b], sum[b][r]);
          }
        }
    }
  }
  for (; i < columns; i += W)
    for (int b = 0; b < N; ++b) {
      const Vec v = load_part(x + b * x_row + i, columns - i);
      for (int r = 0; r < ROWS; ++r) sum[b][r] = multiply_add(widen_part(row[r] + i, columns - i), v, sum[b][r]);
    }
  for (int b = 0; b < N; ++b) lane_sums(sum[b], to[b]);
}

// The same for int8 rows of `columns` (filled) with int8 vectors; what LIFT adds is still in the sums.
#if ISA_VNNI
// sum + the products of the four bytes of each lane, the first without sign.
ISA_INLINE IntVec add_fours(IntVec sum, IntVec lifted, IntVec w) {
#if ISA_WIDTH == 16
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)lifted, (__m512i)w);
#else
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)lifted, (__m256i)w);
#endif
}
ISA_INLINE IntVec load_bytes(const void* p) { return (IntVec)load(static_cast<const float*>(p)); }

template <int N>
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, const Apart& rows, const int8_t* x, int64_t x_row,
                              int32_t (&to)[N][ROWS]) {
  const int8_t* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = weights + rows[r] * columns;
  IntVec sum[N][ROWS] = {};
  for (int64_t i = 0; i < columns; i += BYTES) {
    constexpr int PARTS = BYTES / (4 * W);
    IntVec v[N][PARTS];
    for (int b = 0; b < N; ++b)
      for (int p = 0; p < PARTS; ++p) v[b][p] = load_bytes(x + b * x_row + i + p * 4 * W);
    for (int r = 0; r < ROWS; ++r) {
      if (W < 16) __builtin_prefetch(row[r] + i + AHEAD);  // whole lines at once are foreseen without
      for (int p = 0; p < PARTS; ++p) {
        const IntVec w = load_bytes(row[r] + i + p * 4 * W);
        for (int b = 0; b < N; ++b) sum[b][r] = add_fours(sum[b][r], v[b][p], w);
      }
    }
  }
  for (int b = 0; b < N; ++b) lane_sums(sum[b], to[b]);
}
#elif ISA_WIDTH == 8
// |x| (w sign(x)) in pairs: both factors are at most 127, so that two products fit into 16 bits.
ISA_INLINE __m256i byte_products(const int8_t* w, __m256i v, __m256i size) {
  const __m256i turned = _mm256_sign_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), v);
  return _mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), _mm256_set1_epi16(1));
}
template <int N>
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, const Apart& rows, const int8_t* x, int64_t x_row,
                              int32_t (&to)[N][ROWS]) {
  const int8_t* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = weights + rows[r] * columns;
  IntVec sum[N][ROWS] = {};
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
        sum[b][r] += (IntVec)first + (IntVec)second;
      }
    }
  }
  for (int b = 0; b < N; ++b) lane_sums(sum[b], to[b]);
}
#else
template <int N>
ISA_INLINE void multiply_tile(const int8_t* weights, int64_t columns, const Apart& rows, const int8_t* x, int64_t x_row,
                              int32_t (&to)[N][ROWS]) {
  for (int b = 0; b < N; ++b)
    for (int r = 0; r < ROWS; ++r) {
      const int8_t* row = weights + rows[r] * columns;
      int32_t sum = 0;
      for (int64_t i = 0; i < columns; ++i) sum += row[i] * x[b * x_row + i];
      to[b][r] = sum;
    }
}
#endif

// x * factor to bytes, filled up with zeros to `columns`, plus LIFT.
ISA_INLINE void write_bytes(const float* x, int64_t count, int64_t columns, float factor, int8_t* to) {
  int64_t i = 0;
#if ISA_WIDTH == 8
  for (; i + 32 <= count; i += 32) {
    __m256i whole[4];
    for (int k = 0; k < 4; ++k)
      whole[k] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * k), _mm256_set1_ps(factor)));
    const __m256i low = _mm256_packs_epi32(whole[0], whole[1]), high = _mm256_packs_epi32(whole[2], whole[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_add_epi8(bytes, _mm256_set1_epi8(-LIFT)));
  }
#endif
  for (; i < columns; i += W) {
    const Vec v = i < count ? load_part(x + i, count - i) * factor : Vec{};
    const IntVec whole = (IntVec)(v + (12582912.0f + LIFT));  // 1.5 * 2^23: its lowest byte holds the integer
#if ISA_WIDTH == 16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8((__m512i)whole));
#else
    *reinterpret_cast<UnalignedByteVec*>(to + i) = __builtin_convertvector(whole, ByteVec);
#endif
  }
}

// What numbers up to `bound` are divided by to become bytes; NaN where they are not finite.
ISA_INLINE float byte_scale(float bound) { return bound / 127.0f + bound * 0.0f; }
ISA_INLINE float byte_factor(float bound) { return bound > 0.0f ? 127.0f / bound : 0.0f; }

// x to int8 with one scale, as `write_bytes` does; returns the scale.
ISA_INLINE float round_to_bytes(const float* x, int64_t count, int64_t columns, int8_t* to) {
  constexpr int CHAINS = 4;  // so that none waits for itself
  IntVec most[CHAINS] = {};
  int64_t i = 0;
  for (; i + CHAINS * W <= count; i += CHAINS * W)
    for (int k = 0; k < CHAINS; ++k) most[k] = larger(magnitude_bits(load(x + i + k * W)), most[k]);
  for (; i < count; i += W) most[0] = larger(magnitude_bits(load_part(x + i, count - i)), most[0]);
  const float bound = largest_lane((Vec)larger(larger(most[0], most[1]), larger(most[2], most[3])));
  write_bytes(x, count, columns, byte_factor(bound), to);
  return byte_scale(bound);
}

// Rounds some rows of x where the matrix is rounded; bytes and scales are counted as those of x are.
ISA_INLINE void round_rows(const Matrix& matrix, const float* x, int64_t x_row, const Range& rows, int8_t* bytes,
                           int64_t byte_row, float* scales) {
  if (!takes_bytes(matrix.format)) return;
  for (int64_t r = rows.first; r < rows.last; ++r)
    scales[r] = round_to_bytes(x + r * x_row, matrix.columns, filled(matrix.columns), bytes + r * byte_row);
}

// What a matrix is multiplied with: `batch` vectors, rounded too where the matrix is int8 or INT4, and laid out as its
// columns are where it is bfloat16.
struct Input {
  const float* x;
  const int8_t* bytes;
  const float* scales;
  int64_t row, byte_row, batch;
};

ISA_INLINE Input prepare(const Matrix& matrix, const float* x, int64_t row, int64_t batch, const Own& own) {
  const int64_t columns = filled(matrix.columns);
  if (matrix.format == BFLOAT16) {
    for (int64_t b = 0; b < batch; ++b) lay_out_pairs(x + b * row, matrix.columns, own.pairs + b * columns);
    return {own.pairs, nullptr, nullptr, columns, 0, batch};
  }
  round_rows(matrix, x, row, {0, batch}, own.bytes, columns, own.scales);
  return {x, own.bytes, own.scales, row, columns, batch};
}

// What the products with a matrix are summed in.
template <int64_t Kind>
using Sum = std::conditional_t<Kind == INT8, int32_t, float>;

// Sums of `rows`, counted from `first`, with N vectors from the b-th on.
template <int64_t Kind, int N>
ISA_INLINE void sum_tile(const Matrix& matrix, int64_t first, const Apart& rows, const Input& in, int64_t b,
                         Sum<Kind> (&to)[N][ROWS]) {
  if constexpr (Kind == INT8) {
    const int8_t* weights = static_cast<const int8_t*>(matrix.data) + first * in.byte_row;
    multiply_tile<N>(weights, in.byte_row, rows, in.bytes + b * in.byte_row, in.byte_row, to);
  } else if constexpr (Kind == INT4) {
    const int64_t groups = (matrix.columns + GROUP - 1) / GROUP;
    multiply_groups<N>(static_cast<const uint8_t*>(matrix.data) + first * groups * GROUP_BYTES,
                       static_cast<const uint16_t*>(matrix.scale) + first * groups, groups, rows,
                       in.bytes + b * in.byte_row, in.byte_row, to);
  } else {
    using T = std::conditional_t<Kind == BFLOAT16, uint16_t, float>;
    const T* weights = static_cast<const T*>(matrix.data) + first * matrix.columns;
    multiply_tile(weights, matrix.columns, rows, in.x + b * in.row, in.row, to);
  }
}

// The i-th rows of the quarters of `all` rows, a quarter being `step`.
ISA_INLINE Apart apart(int64_t all, int64_t i, int64_t step) {
  return {1 + (i + step < all) + (i + 2 * step < all) + (i + 3 * step < all), step};
}

// A few neighbours of floats or integers: four, or fewer, the others being zero.
typedef float FewFloats __attribute__((vector_size(ROWS * 4)));
typedef int32_t FewIntegers __attribute__((vector_size(ROWS * 4)));
template <class T>
using Few = std::conditional_t<std::is_same_v<T, float>, FewFloats, FewIntegers>;
template <class T>
ISA_INLINE Few<T> load_few(const T* p, int64_t count) {
  Few<T> x = {};
  std::memcpy(&x, p, count * sizeof(T));
  return x;
}

// From the sums of neighbouring rows, from the `at`-th on, to their products with the b-th vector.
template <int64_t Kind>
ISA_INLINE void store_few(const Matrix& matrix, int64_t at, int64_t count, const Input& in, int64_t b,
                          Few<Sum<Kind>> sums, float* to, bool add) {
  FewFloats value;
  if constexpr (Kind == INT8) {
    if (LIFT) sums -= load_few(matrix.sums + at, count) * LIFT;
    const FewFloats scales = load_few(static_cast<const float*>(matrix.scale) + at, count) * in.scales[b];
    value = __builtin_convertvector(sums, FewFloats) * scales;
  } else {
    value = Kind == INT4 ? sums * in.scales[b] : sums;
  }
  if (matrix.bias) value = value + load_few(matrix.bias + at, count);
  if (add) value = load_few(to + at, count) + value;
  std::memcpy(to + at, &value, count * sizeof(float));
}

// The rows i to i + 3 of each quarter of `range`, whose quarters are `step` rows, with N vectors from the b-th on; `Whole`
// where all these rows are there. Their four tiles are summed before any is stored: what lies beside the weights is then
// read, and the products are written, four rows at a time, which leaves more of the time for memory.
template <int64_t Kind, int N, bool Whole>
ISA_INLINE void multiply_bunch(const Matrix& matrix, const Range& range, int64_t i, int64_t step, const Input& in,
                               int64_t b, float* to, int64_t to_row, bool add) {
  const int64_t all = range.last - range.first, tiles = Whole || step - i > ROWS ? ROWS : step - i;
  Sum<Kind> sums[ROWS][N][ROWS];
  for (int64_t j = 0; j < tiles; ++j) {
    const Apart rows = Whole ? Apart{ROWS, step} : apart(all, i + j, step);
    sum_tile<Kind, N>(matrix, range.first + i + j, rows, in, b, sums[j]);
  }
  for (int64_t j = tiles; j < ROWS; ++j) std::memset(sums[j], 0, sizeof sums[j]);
  for (int v = 0; v < N; ++v)
    for (int64_t r = 0; r < ROWS; ++r) {
      const int64_t first = i + r * step, there = all - first < tiles ? all - first : tiles;
      const Few<Sum<Kind>> some = {sums[0][v][r], sums[1][v][r], sums[2][v][r], sums[3][v][r]};
      if (Whole || there > 0)
        store_few<Kind>(matrix, range.first + first, Whole ? ROWS : there, in, b + v, some, to + (b + v) * to_row, add);
    }
}

template <int64_t Kind, bool Whole>
ISA_INLINE void multiply_bunches(const Matrix& matrix, const Range& range, int64_t begin, int64_t end, int64_t step,
                                 const Input& in, float* to, int64_t to_row, bool add) {
  for (int64_t i = begin; i < end; i += ROWS) {
    int64_t b = 0;
    for (; b + 2 <= in.batch; b += 2) multiply_bunch<Kind, 2, Whole>(matrix, range, i, step, in, b, to, to_row, add);
    if (b < in.batch) multiply_bunch<Kind, 1, Whole>(matrix, range, i, step, in, b, to, to_row, add);
  }
}

template <int64_t Kind, int N>
ISA_INLINE void multiply_floats(const Matrix& matrix, int64_t first, const Apart& rows, const Input& in, int64_t b,
                                float* to, int64_t to_row, bool add) {
  float sums[N][ROWS];
  sum_tile<Kind, N>(matrix, first, rows, in, b, sums);
  for (int v = 0; v < N; ++v)
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t at = first + rows[r];
      const float value = sums[v][r] + (matrix.bias ? matrix.bias[at] : 0.0f);
      float* out = to + (b + v) * to_row + at;
      *out = add ? *out + value : value;
    }
}

template <int64_t Kind>
ISA_INLINE void multiply_rows(const Matrix& matrix, const Range& range, const Input& in, float* to, int64_t to_row,
                              bool add) {
  static_assert(ROWS == 4, "four rows");
  const int64_t all = range.last - range.first, step = (all + ROWS - 1) / ROWS;
  if constexpr (takes_bytes(Kind)) {
    const int64_t last = all - (ROWS - 1) * step, whole = last > 0 ? last / ROWS * ROWS : 0;
    multiply_bunches<Kind, true>(matrix, range, 0, whole, step, in, to, to_row, add);
    multiply_bunches<Kind, false>(matrix, range, whole, step, step, in, to, to_row, add);
  } else {
    for (int64_t i = 0; i < step; ++i) {
      const Apart rows = apart(all, i, step);
      const int64_t r = range.first + i;
      int64_t b = 0;
      if (in.batch > 2 && in.batch % 2) multiply_floats<Kind, 3>(matrix, r, rows, in, b, to, to_row, add), b = 3;
      for (; b + 2 <= in.batch; b += 2) multiply_floats<Kind, 2>(matrix, r, rows, in, b, to, to_row, add);
      if (b < in.batch) multiply_floats<Kind, 1>(matrix, r, rows, in, b, to, to_row, add);
    }
  }
}

// The same for all rows `range` of a matrix of few columns, a vector after another: there, all but the sums is overhead.
ISA_INLINE void multiply_short(const Matrix& matrix, const Range& range, const Input& in, float* to, int64_t to_row) {
  const int64_t columns = matrix.columns;
  for (int64_t b = 0; b < in.batch; ++b) {
    const float *x = in.x + b * in.row, *row = static_cast<const float*>(matrix.data) + range.first * columns;
    float* out = to + b * to_row;
    int64_t r = range.first;
    for (; r + ROWS <= range.last; r += ROWS, row += ROWS * columns) {
      Vec sum[ROWS] = {};
      float sums[ROWS];
      for (int64_t k = 0; k < columns; k += W)
        for (int i = 0; i < ROWS; ++i) sum[i] = multiply_add(load(row + i * columns + k), load(x + k), sum[i]);
      lane_sums(sum, sums);
      for (int i = 0; i < ROWS; ++i) out[r + i] = sums[i] + (matrix.bias ? matrix.bias[r + i] : 0.0f);
    }
    for (; r < range.last; ++r, row += columns) out[r] = dot(row, x, columns) + (matrix.bias ? matrix.bias[r] : 0.0f);
  }
}

// The rows `range` of matrix * x + bias, into or onto `to` (batch, to_row).
[[maybe_unused]] ISA_TARGET static void multiply(const Matrix& matrix, const Range& range, const Input& in, float* to,
                                                 int64_t to_row, bool add) {
  if (matrix.format == INT8)
    multiply_rows<INT8>(matrix, range, in, to, to_row, add);
  else if (matrix.format == INT4)
    multiply_rows<INT4>(matrix, range, in, to, to_row, add);
  else if (matrix.format == BFLOAT16)
    multiply_rows<BFLOAT16>(matrix, range, in, to, to_row, add);
  else if (matrix.format == PANELS)
    multiply_panels(matrix, range, in.x, in.row, in.batch, to, to_row, add);
  else if (matrix.columns <= SHORT && matrix.columns % W == 0 && !add)
    multiply_short(matrix, range, in, to, to_row);
  else
    multiply_rows<FLOAT32>(matrix, range, in, to, to_row, add);
}

}  // namespace ISA_NAMESPACE
