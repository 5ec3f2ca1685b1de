// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Products of many vectors, the tokens of a source, with a matrix. Included by the kernels once for every instruction
// set.
//
// Some rows of the matrix, as many as two vectors have lanes, are laid side by side, and so each of their columns meets
// a token's value in one instruction. float32 and bfloat16 are multiplied as float32; int8 and 4-bit weights four columns
// at a time, summed in 32 bits, which makes the very sums of the decoding step. A token's result does not depend on its
// neighbours, nor on the number of threads.

#include "matrix_products.h"

namespace ISA_NAMESPACE {

constexpr int PANEL = 2 * W;             // rows of the matrix, side by side
constexpr int TILE = W == 16 ? 12 : 6;   // tokens, whose sums with a panel fit into the registers
constexpr int BYTE_TILE = ISA_VNNI ? TILE : 4;              // the same, rounded to int8
constexpr int GROUP_TILE = W == 16 ? TILE / 2 : BYTE_TILE;  // the same, with sums in float32 beside those of a group
constexpr int64_t DEPTH = 256;           // columns of floats that are laid out at a time; of bytes UNITS of four columns
constexpr int64_t GROUP_UNITS = GROUP / 4;

constexpr int64_t LEAST_PIECE = PANEL > SPAN ? PANEL : SPAN;  // of rows: parts of a panel cost as much as a whole one

static_assert(PANEL <= WIDEST_PANEL && DEPTH <= UNITS, "the workspace holds a panel");
static_assert(UNITS % GROUP_UNITS == 0 && DEPTH % BLOCK == 0, "whole groups and blocks are laid out");

struct Nibbles {
  uint8_t pair;
};

// Units `at` to `at + 8` of a row, or one of them: columns of floats, or four columns of bytes.
#if ISA_WIDTH >= 8
ISA_INLINE __m256 eight_units(const float* row, int64_t at) { return _mm256_loadu_ps(row + at); }
ISA_INLINE __m256 eight_units(const uint16_t* row, int64_t at) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
ISA_INLINE __m256 eight_units(const int8_t* row, int64_t at) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(row + 4 * at));
}
ISA_INLINE __m256 eight_units(const Nibbles* row, int64_t at) {  // a group
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at / GROUP_UNITS * GROUP_BYTES));
  const __m256i halves = _mm256_set_m128i(_mm_srli_epi16(pairs, 4), pairs);
  return _mm256_castsi256_ps(_mm256_sub_epi8(_mm256_and_si256(halves, _mm256_set1_epi8(15)), _mm256_set1_epi8(8)));
}

// Asks memory for the same units of the next panel: neighbouring rows in turn are an order that it does not foresee.
ISA_INLINE void ask_for(const float* row, int64_t at) { __builtin_prefetch(row + at); }
ISA_INLINE void ask_for(const uint16_t* row, int64_t at) { __builtin_prefetch(row + at); }
ISA_INLINE void ask_for(const int8_t* row, int64_t at) { __builtin_prefetch(row + 4 * at); }
ISA_INLINE void ask_for(const Nibbles* row, int64_t at) { __builtin_prefetch(row + at / GROUP_UNITS * GROUP_BYTES); }
#endif

ISA_INLINE void one_unit(const float* row, int64_t at, float* to) { *to = row[at]; }
ISA_INLINE void one_unit(const uint16_t* row, int64_t at, float* to) { *to = as_float(row[at]); }
ISA_INLINE void one_unit(const int8_t* row, int64_t at, float* to) { std::memcpy(to, row + 4 * at, 4); }
ISA_INLINE void one_unit(const Nibbles* row, int64_t at, float* to) {
  const int64_t column = at % GROUP_UNITS * 4;
  const Nibbles* bytes = row + at / GROUP_UNITS * GROUP_BYTES + column % GROUP_BYTES;
  const int shift = column < GROUP_BYTES ? 0 : 4;
  int8_t four[4];
  for (int i = 0; i < 4; ++i) four[i] = static_cast<int8_t>((bytes[i].pair >> shift & 15) - 8);
  std::memcpy(to, four, sizeof four);
}

// Units `first` to `first + depth` of `rows` rows, side by side: panel is [depth][PANEL]. Missing rows repeat the first.
template <class T>
ISA_INLINE void lay_out(const T* matrix, int64_t row, int64_t rows, int64_t first, int64_t depth, float* panel) {
  int64_t u = 0;
#if ISA_WIDTH >= 8
  for (; u + 8 <= depth; u += 8)
    for (int64_t r = 0; r < PANEL; r += 8) {
      __m256 x[8];
      for (int64_t i = 0; i < 8; ++i) {
        const T* from = matrix + (r + i < rows ? r + i : 0) * row;
        x[i] = eight_units(from, first + u);
        ask_for(from + PANEL * row, first + u);
      }
      transpose(x);
      for (int64_t i = 0; i < 8; ++i) _mm256_storeu_ps(panel + (u + i) * PANEL + r, x[i]);
    }
#endif
  for (; u < depth; ++u)
    for (int64_t r = 0; r < PANEL; ++r)
      one_unit(matrix + (r < rows ? r : 0) * row, first + u, panel + u * PANEL + r);
}

// The same of a matrix in PANELS, r being the first row of eight of a panel.
ISA_INLINE void lay_out_panels(const Matrix& matrix, int64_t r, int64_t rows, int64_t first, int64_t depth,
                               float* panel) {
  for (int64_t i = 0; i < PANEL; i += 8) {
    const int64_t row = i < rows ? r + i : r;
    widen_rows(static_cast<const uint16_t*>(matrix.data) + row / PANEL_ROWS * matrix.columns * PANEL_ROWS, first, depth,
               row % PANEL_ROWS > 0, panel + i, PANEL);
  }
}

// sum + the products of the four bytes of each lane of `w` with those at `x`, which carry LIFT; without it as
// |w| (x sign(w)): the instructions want one factor without sign. Of both at most 127, two products fit into 16 bits.
ISA_INLINE IntVec add_fours(IntVec sum, const float* w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
#if ISA_VNNI
  return add_fours(sum, IntVec{} + four, load_bytes(w));
#elif ISA_WIDTH == 8
  const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(four), weights);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), turned);
  return (IntVec)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  int8_t bytes[4 * W];
  std::memcpy(bytes, w, sizeof bytes);
  for (int i = 0; i < W; ++i)
    for (int k = 0; k < 4; ++k) sum[i] += bytes[4 * i + k] * x[k];
  return sum;
#endif
}

// What LIFT adds to the products of any token with each row of a panel, in every `run` of its units: [runs][PANEL].
ISA_INLINE void add_lifts(const float* panel, int64_t depth, int64_t run, float* lifts) {
  if (!LIFT) return;
  int8_t four[4];
  std::memset(four, LIFT, sizeof four);
  for (int64_t u = 0; u < depth; u += run, lifts += PANEL) {
    IntVec sum[2] = {};
    for (int64_t i = u; i < u + run; ++i, panel += PANEL)
      for (int v = 0; v < 2; ++v) sum[v] = add_fours(sum[v], panel + v * W, four);
    for (int v = 0; v < 2; ++v) store(lifts + v * W, (Vec)sum[v]);
  }
}
ISA_INLINE IntVec without_lift(IntVec sum, const float* lifts) { return LIFT ? sum - (IntVec)load(lifts) : sum; }

// What a matrix is multiplied with: `count` tokens, in int8 with a scale each where the matrix is rounded. Of floats,
// BLOCK columns are neighbours, and `apart` floats lie between the first of them and those of the next block.
struct Tokens {
  const float* x;
  const int8_t* bytes;
  const float* scales;
  int64_t row, byte_row, count;
  int64_t apart = BLOCK;
};

// Where the products with a panel's rows go, into or onto `to` (tokens, row); its rows' bias and, of int8, scales.
struct Goal {
  float* to;
  int64_t row, rows;
  bool add;
  float bias[PANEL] = {}, scale[PANEL] = {};
};
ISA_INLINE void reach(const Goal& goal, int64_t t, int v, Vec value) {
  const int64_t lanes = goal.rows - v * W;
  if (lanes <= 0) return;
  float* out = goal.to + t * goal.row + v * W;
  value += load(goal.bias + v * W);
  store_part(out, goal.add ? load_part(out, lanes) + value : value, lanes);
}
ISA_INLINE void reach(const Goal& goal, const Tokens& in, int64_t t, int v, IntVec sum) {
  reach(goal, t, v, __builtin_convertvector(sum, Vec) * (load(goal.scale + v * W) * in.scales[t]));
}

// Adds the products of N tokens with a panel to their sums [N][sums_row]: floats.
template <int N>
ISA_INLINE void float_tile(const float* panel, int64_t depth, const float* x, int64_t x_row, float* sums,
                           int64_t sums_row) {
  Vec sum[N][2];
  for (int b = 0; b < N; ++b)
    for (int v = 0; v < 2; ++v) sum[b][v] = load(sums + b * sums_row + v * W);
  for (int64_t u = 0; u < depth; ++u, panel += PANEL, ++x) {
    const Vec first = load(panel), second = load(panel + W);
    for (int b = 0; b < N; ++b) {
      sum[b][0] += first * x[b * x_row];
      sum[b][1] += second * x[b * x_row];
    }
  }
  for (int b = 0; b < N; ++b)
    for (int v = 0; v < 2; ++v) store(sums + b * sums_row + v * W, sum[b][v]);
}

// The same for any number of tokens.
ISA_INLINE void float_tiles(const float* panel, int64_t depth, const float* x, int64_t x_row, int64_t count,
                            float* sums, int64_t sums_row) {
  int64_t t = 0;
  for (; t + TILE <= count; t += TILE)
    float_tile<TILE>(panel, depth, x + t * x_row, x_row, sums + t * sums_row, sums_row);
  for (; t + 2 <= count; t += 2) float_tile<2>(panel, depth, x + t * x_row, x_row, sums + t * sums_row, sums_row);
  if (t < count) float_tile<1>(panel, depth, x + t * x_row, x_row, sums + t * sums_row, sums_row);
}

// The same for bytes: 32-bit sums [N][PANEL], kept where floats would be; or neither read nor kept, where these products
// are `whole` and reach their goal.
template <int N>
ISA_INLINE void byte_tile(const float* panel, int64_t depth, const Desk& desk, const Tokens& in, int64_t t,
                          int64_t first, const Goal* whole) {
  const int8_t* x = in.bytes + t * in.byte_row + 4 * first;
  float* sums = desk.sums + t * PANEL;
  IntVec sum[N][2];
  for (int b = 0; b < N; ++b)
    for (int v = 0; v < 2; ++v)
      sum[b][v] = without_lift(whole ? IntVec{} : (IntVec)load(sums + b * PANEL + v * W), desk.lifts + v * W);
  for (int64_t u = 0; u < depth; ++u, panel += PANEL, x += 4)
    for (int b = 0; b < N; ++b)
      for (int v = 0; v < 2; ++v) sum[b][v] = add_fours(sum[b][v], panel + v * W, x + b * in.byte_row);
  for (int b = 0; b < N; ++b)
    for (int v = 0; v < 2; ++v)
      if (whole)
        reach(*whole, in, t + b, v, sum[b][v]);
      else
        store(sums + b * PANEL + v * W, (Vec)sum[b][v]);
}

// The same where every GROUP columns have scales of their own, [groups][PANEL]: float sums.
template <int N>
ISA_INLINE void group_tile(const float* panel, int64_t depth, const float* factors, const float* lifts,
                           const int8_t* x, int64_t x_row, float* sums) {
  Vec total[N][2];
  for (int b = 0; b < N; ++b)
    for (int v = 0; v < 2; ++v) total[b][v] = load(sums + b * PANEL + v * W);
  for (int64_t u = 0; u < depth; u += GROUP_UNITS, factors += PANEL, lifts += PANEL) {
    IntVec sum[N][2];
    for (int b = 0; b < N; ++b)
      for (int v = 0; v < 2; ++v) sum[b][v] = without_lift(IntVec{}, lifts + v * W);
    for (int64_t i = 0; i < GROUP_UNITS; ++i, panel += PANEL, x += 4)
      for (int b = 0; b < N; ++b)
        for (int v = 0; v < 2; ++v) sum[b][v] = add_fours(sum[b][v], panel + v * W, x + b * x_row);
    for (int b = 0; b < N; ++b)
      for (int v = 0; v < 2; ++v)
        total[b][v] += __builtin_convertvector(sum[b][v], Vec) * load(factors + v * W);
  }
  for (int b = 0; b < N; ++b)
    for (int v = 0; v < 2; ++v) store(sums + b * PANEL + v * W, total[b][v]);
}

// Adds the products of N tokens' units `first` to `first + depth` with a panel of them.
template <int64_t Kind, int N>
ISA_INLINE void add_tile(const Desk& desk, const float* panel, int64_t depth, const Tokens& in, int64_t t,
                         int64_t first, const Goal* whole) {
  float* sums = desk.sums + t * PANEL;
  if constexpr (Kind == INT8)
    byte_tile<N>(panel, depth, desk, in, t, first, whole);
  else if constexpr (Kind == INT4)
    group_tile<N>(panel, depth, desk.factors, desk.lifts, in.bytes + t * in.byte_row + 4 * first, in.byte_row, sums);
  else
    float_tile<N>(panel, depth, in.x + t * in.row + first / BLOCK * in.apart + first % BLOCK, in.row, sums, PANEL);
}

// The same for all tokens.
template <int64_t Kind>
ISA_INLINE void add_tiles(const Desk& desk, const float* panel, int64_t depth, const Tokens& in, int64_t first,
                          const Goal* whole) {
  constexpr int MOST = Kind == INT4 ? GROUP_TILE : Kind == INT8 ? BYTE_TILE : TILE;
  int64_t t = 0;
  for (; t + MOST <= in.count; t += MOST) add_tile<Kind, MOST>(desk, panel, depth, in, t, first, whole);
  for (; t + 4 <= in.count; t += 4) add_tile<Kind, 4>(desk, panel, depth, in, t, first, whole);
  for (; t + 2 <= in.count; t += 2) add_tile<Kind, 2>(desk, panel, depth, in, t, first, whole);
  for (; t < in.count; ++t) add_tile<Kind, 1>(desk, panel, depth, in, t, first, whole);
}

// The products of all tokens with rows r and those after it. T is how the matrix is stored.
template <int64_t Kind, class T>
ISA_INLINE void multiply_panel(const Matrix& matrix, int64_t row, int64_t units, int64_t r, const Tokens& in,
                               const Desk& desk, const Goal& goal) {
  constexpr int64_t MOST = takes_bytes(Kind) ? UNITS : DEPTH;
  const int64_t rows = goal.rows;
  const bool whole = Kind == INT8 && units <= MOST;
  if (!whole) std::memset(desk.sums, 0, sizeof(float) * in.count * PANEL);
  for (int64_t first = 0; first < units; first += MOST) {
    const int64_t depth = units - first < MOST ? units - first : MOST;
    if constexpr (Kind == PANELS)
      lay_out_panels(matrix, r, rows, first, depth, desk.panel);
    else
      lay_out(static_cast<const T*>(matrix.data) + r * row, row, rows, first, depth, desk.panel);
    if constexpr (Kind == INT4) {
      const int64_t groups = units / GROUP_UNITS;
      const uint16_t* scale = static_cast<const uint16_t*>(matrix.scale) + r * groups + first / GROUP_UNITS;
      for (int64_t g = 0; g < depth / GROUP_UNITS; ++g)
        for (int64_t i = 0; i < PANEL; ++i)
          desk.factors[g * PANEL + i] = as_float(scale[(i < rows ? i : 0) * groups + g]);
    }
    if constexpr (takes_bytes(Kind)) add_lifts(desk.panel, depth, Kind == INT4 ? GROUP_UNITS : depth, desk.lifts);
    const int64_t run = takes_bytes(Kind) || in.apart == BLOCK ? depth : BLOCK;  // of neighbouring columns
    for (int64_t u = 0; u < depth; u += run)
      add_tiles<Kind>(desk, desk.panel + u * PANEL, depth - u < run ? depth - u : run, in, first + u,
                      whole ? &goal : nullptr);
  }
  if (whole) return;
  for (int64_t t = 0; t < in.count; ++t)
    for (int v = 0; v < 2; ++v) {
      const Vec sum = load(desk.sums + t * PANEL + v * W);
      if (Kind == INT8)
        reach(goal, in, t, v, (IntVec)sum);
      else
        reach(goal, t, v, Kind == INT4 ? sum * in.scales[t] : sum);
    }
}

// The rows `range` of matrix * tokens + bias, into or onto `to` (tokens, to_row).
[[maybe_unused]] ISA_TARGET static void multiply_tokens(const Matrix& matrix, const Range& range, const Tokens& in,
                                                        float* to, int64_t to_row, bool add, const Desk& desk) {
  const int64_t columns = matrix.columns, groups = (columns + GROUP - 1) / GROUP;
  for (int64_t r = range.first; r < range.last; r += PANEL) {
    Goal goal = {to + r, to_row, range.last - r < PANEL ? range.last - r : PANEL, add};
    for (int64_t i = 0; i < goal.rows; ++i) {
      goal.bias[i] = matrix.bias ? matrix.bias[r + i] : 0.0f;
      goal.scale[i] = matrix.format == INT8 ? static_cast<const float*>(matrix.scale)[r + i] : 0.0f;
    }
    if (matrix.format == INT8)
      multiply_panel<INT8, int8_t>(matrix, filled(columns), filled(columns) / 4, r, in, desk, goal);
    else if (matrix.format == INT4)
      multiply_panel<INT4, Nibbles>(matrix, groups * GROUP_BYTES, groups * GROUP_UNITS, r, in, desk, goal);
    else if (matrix.format == BFLOAT16)
      multiply_panel<BFLOAT16, uint16_t>(matrix, columns, columns, r, in, desk, goal);
    else if (matrix.format == PANELS)
      multiply_panel<PANELS, uint16_t>(matrix, columns, columns, r, in, desk, goal);
    else
      multiply_panel<FLOAT32, float>(matrix, columns, columns, r, in, desk, goal);
  }
}

// `multiply` for any number of vectors: of int8, whose sums are exact in any order, many of them are taken as tokens.
ISA_INLINE void multiply(const Matrix& matrix, const Range& range, const Input& in, float* to, int64_t to_row, bool add,
                         const Desk& desk) {
  if (matrix.format == INT8 && in.batch >= MANY)
    multiply_tokens(matrix, range, {nullptr, in.bytes, in.scales, 0, in.byte_row, in.batch}, to, to_row, add, desk);
  else
    multiply(matrix, range, in, to, to_row, add);
}

}  // namespace ISA_NAMESPACE
