// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Products of a few int8 vectors with a matrix of 4-bit weights in groups of 32, each with a scale of its own. Included
// by matrix_products.h once for every instruction set.
//
// A group is 16 bytes: the lower half of byte i is column i of the group plus 8, the upper half column 16 + i plus 8.
// Each group is summed in integers and enters its row's float sum with its bfloat16 scale. The last group of a row is
// filled up with zeros, and so is the vector. AVX2 takes two groups at once, one in each half of its registers, and
// AVX-512 four.

namespace ISA_NAMESPACE {

// Sums of `rows` with N vectors, still without the vectors' scales.
template <int N>
ISA_INLINE void multiply_groups(const uint8_t* weights, const uint16_t* scales, int64_t groups,
                                const Apart& rows, const int8_t* x, int64_t x_row, float (&to)[N][ROWS]) {
  const uint8_t* row[ROWS];
  const uint16_t* scale[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    row[r] = weights + rows[r] * groups * GROUP_BYTES;
    scale[r] = scales + rows[r] * groups;
  }
#if ISA_WIDTH == 16
  constexpr int64_t SOME = 4;  // groups at once
  Vec sum[N][ROWS] = {};
  const __m512i half = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), lift = _mm512_set1_epi8(-LIFT);
  const __m512i lower = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
  const __m512i upper = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
  // In each quarter, which holds all scales, the one of its group: two bytes, above two zeros.
  const __m512i own = _mm512_setr_epi32(0x01008080, 0x01008080, 0x01008080, 0x01008080, 0x03028080, 0x03028080,
                                        0x03028080, 0x03028080, 0x05048080, 0x05048080, 0x05048080, 0x05048080,
                                        0x07068080, 0x07068080, 0x07068080, 0x07068080);
  for (int64_t g = 0; g < groups; g += SOME) {
    const int64_t there = groups - g < SOME ? groups - g : SOME;
    __m512i low[N], high[N], excess[N];  // columns of either half, and 8 times their sum: the weights carry 8 too much
    for (int b = 0; b < N; ++b) {
      const int8_t* v = x + b * x_row + g * GROUP;
      const __m512i first = _mm512_sub_epi8(_mm512_loadu_si512(v), lift);
      const __m512i second =
          there > SOME / 2 ? _mm512_sub_epi8(_mm512_loadu_si512(v + BYTES), lift) : _mm512_setzero_si512();
      low[b] = _mm512_permutex2var_epi64(first, lower, second);
      high[b] = _mm512_permutex2var_epi64(first, upper, second);
      excess[b] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), eight, low[b]);
      excess[b] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(excess[b], eight, high[b]));
    }
    for (int r = 0; r < ROWS; ++r) {
      const uint8_t* bytes = row[r] + g * GROUP_BYTES;
      __builtin_prefetch(bytes + AHEAD);
      uint8_t part[SOME * GROUP_BYTES] = {};
      uint64_t factors = 0;
      if (there < SOME) {
        std::memcpy(part, bytes, there * GROUP_BYTES);
        std::memcpy(&factors, scale[r] + g, there * sizeof(uint16_t));
        bytes = part;
      } else {
        std::memcpy(&factors, scale[r] + g, sizeof factors);
      }
      const __m512i w = _mm512_loadu_si512(bytes);
      const __m512i lower_half = _mm512_and_si512(w, half);
      const __m512i upper_half = _mm512_and_si512(_mm512_srli_epi16(w, 4), half);
      const Vec factor = (Vec)_mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(factors)), own);
      for (int b = 0; b < N; ++b) {
        const __m512i some = _mm512_dpbusd_epi32(excess[b], lower_half, low[b]);
        const __m512i whole = _mm512_dpbusd_epi32(some, upper_half, high[b]);
        sum[b][r] = multiply_add(__builtin_convertvector((IntVec)whole, Vec), factor, sum[b][r]);
      }
    }
  }
  for (int b = 0; b < N; ++b) lane_sums(sum[b], to[b]);
#elif ISA_WIDTH == 8
  Vec sum[N][ROWS] = {};
  const __m256i ones = _mm256_set1_epi16(1), eight = _mm256_set1_epi8(8), half = _mm256_set1_epi8(15);
  const __m256i lift = _mm256_set1_epi8(-LIFT);
  const __m256i up = _mm256_setr_epi32(16, 16, 16, 16, 0, 0, 0, 0), upper = _mm256_set1_epi32(-65536);
  for (int64_t g = 0; g < groups; g += 2) {
    const bool both = g + 1 < groups;
    __m256i low[N], high[N], excess[N];  // columns of either half, and 8 times their sum: the weights carry 8 too much
    for (int b = 0; b < N; ++b) {
      const int8_t* v = x + b * x_row + g * GROUP;
      const __m256i first = _mm256_sub_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)), lift);
      const __m256i second =
          both ? _mm256_sub_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + GROUP)), lift)
               : _mm256_setzero_si256();
      low[b] = _mm256_permute2x128_si256(first, second, 0x20);
      high[b] = _mm256_permute2x128_si256(first, second, 0x31);
      excess[b] = _mm256_add_epi16(_mm256_maddubs_epi16(eight, low[b]), _mm256_maddubs_epi16(eight, high[b]));
    }
    for (int r = 0; r < ROWS; ++r) {
      const uint8_t* bytes = row[r] + g * GROUP_BYTES;
      __builtin_prefetch(bytes + AHEAD);
      const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
      const __m256i w =
          both ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)) : _mm256_zextsi128_si256(one);
      uint32_t factors = scale[r][g];
      if (both) factors |= uint32_t{scale[r][g + 1]} << 16;
      const __m256i spread = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int32_t>(factors)), up);
      const Vec factor = (Vec)_mm256_and_si256(spread, upper);
      const __m256i lower_half = _mm256_and_si256(w, half);
      const __m256i upper_half = _mm256_and_si256(_mm256_srli_epi16(w, 4), half);
      for (int b = 0; b < N; ++b) {
        // Four products of at most 15 times 127 fit into 16 bits.
        const __m256i pairs =
            _mm256_add_epi16(_mm256_maddubs_epi16(lower_half, low[b]), _mm256_maddubs_epi16(upper_half, high[b]));
        const __m256i whole = _mm256_madd_epi16(_mm256_sub_epi16(pairs, excess[b]), ones);
        sum[b][r] = multiply_add((Vec)_mm256_cvtepi32_ps(whole), factor, sum[b][r]);
      }
    }
  }
  for (int b = 0; b < N; ++b) lane_sums(sum[b], to[b]);
#else
  for (int b = 0; b < N; ++b)
    for (int r = 0; r < ROWS; ++r) {
      to[b][r] = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* bytes = row[r] + g * GROUP_BYTES;
        const int8_t* v = x + b * x_row + g * GROUP;
        int32_t whole = 0;
        for (int i = 0; i < GROUP_BYTES; ++i)
          whole += ((bytes[i] & 15) - 8) * v[i] + ((bytes[i] >> 4) - 8) * v[GROUP_BYTES + i];
        to[b][r] += as_float(scale[r][g]) * static_cast<float>(whole);
      }
    }
#endif
}

}  // namespace ISA_NAMESPACE
