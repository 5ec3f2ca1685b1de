// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Vectors of float32 and the elementary functions that the kernels need. This header has no include guard on purpose:
// for_each_isa.h includes it once for every instruction set, each time with its own
//   ISA_NAMESPACE  where the functions go,
//   ISA_TARGET     the function attribute that selects the instruction set,
//   ISA_WIDTH      the number of float32 lanes of a vector.
// Lanes are channels: they are neighbours in memory and never depend on each other.

namespace ISA_NAMESPACE {

constexpr int W = ISA_WIDTH;
typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));
typedef float UnalignedVec __attribute__((vector_size(W * 4), aligned(4), may_alias));

ISA_INLINE float as_float(uint16_t x) {  // bfloat16
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ISA_INLINE Vec splat(float x) { return Vec{} + x; }
ISA_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
ISA_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }

// Rows end where the channels end: the last vector of a row may be a part of one. Missing lanes read as zero.
ISA_INLINE Vec load_part(const float* p, int64_t lanes) {
  if (lanes >= W) return load(p);
  float part[W] = {};
  for (int64_t i = 0; i < lanes; ++i) part[i] = p[i];
  return load(part);
}
ISA_INLINE void store_part(float* p, Vec x, int64_t lanes) {
  if (lanes >= W) return store(p, x);
  float part[W];
  store(part, x);
  for (int64_t i = 0; i < lanes; ++i) p[i] = part[i];
}

// Maximum and minimum with the processor's own rule: the second operand where either is NaN.
ISA_INLINE Vec larger(Vec x, Vec y) {
#if ISA_WIDTH == 16
  return (Vec)_mm512_max_ps((__m512)x, (__m512)y);
#elif ISA_WIDTH == 8
  return __builtin_ia32_maxps256(x, y);
#else
  return x > y ? x : y;
#endif
}
ISA_INLINE Vec smaller(Vec x, Vec y) {
#if ISA_WIDTH == 16
  return (Vec)_mm512_min_ps((__m512)x, (__m512)y);
#elif ISA_WIDTH == 8
  return __builtin_ia32_minps256(x, y);
#else
  return x < y ? x : y;
#endif
}

// x * y + sum, rounded once where the instruction set can: in every loop alike, as no compiler promises for x * y + sum.
ISA_INLINE Vec multiply_add(Vec x, Vec y, Vec sum) {
#if ISA_WIDTH == 16
  return (Vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif ISA_WIDTH == 8
  return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
  return sum + x * y;
#endif
}

// Every lane's partner, `Step` lanes away: a power of two.
template <int Step, class V>
ISA_INLINE V partners(V x) {
#if ISA_WIDTH == 16
  return V{x[0 ^ Step], x[1 ^ Step], x[2 ^ Step],  x[3 ^ Step],  x[4 ^ Step],  x[5 ^ Step],  x[6 ^ Step],  x[7 ^ Step],
           x[8 ^ Step], x[9 ^ Step], x[10 ^ Step], x[11 ^ Step], x[12 ^ Step], x[13 ^ Step], x[14 ^ Step], x[15 ^ Step]};
#elif ISA_WIDTH == 8
  return V{x[0 ^ Step], x[1 ^ Step], x[2 ^ Step], x[3 ^ Step], x[4 ^ Step], x[5 ^ Step], x[6 ^ Step], x[7 ^ Step]};
#else
  return V{x[0 ^ Step], x[1 ^ Step], x[2 ^ Step], x[3 ^ Step]};
#endif
}

#if ISA_WIDTH >= 8
ISA_INLINE void transpose(__m256 (&x)[8]) {
  __m256 y[8], z[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      z[i + 2 * k] = _mm256_shuffle_ps(y[i + k], y[i + 2 + k], 0x44);
      z[i + 2 * k + 1] = _mm256_shuffle_ps(y[i + k], y[i + 2 + k], 0xEE);
    }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(z[i], z[i + 4], 0x31);
  }
}
#endif

ISA_INLINE float lane_sum(Vec x) {
  if constexpr (W > 8) x += partners<8>(x);
  if constexpr (W > 4) x += partners<4>(x);
  x += partners<2>(x);
  x += partners<1>(x);
  return x[0];
}

ISA_INLINE float dot(const float* x, const float* y, int64_t count) {
  Vec sum = {};
  for (int64_t i = 0; i < count; i += W) sum += load_part(x + i, count - i) * load_part(y + i, count - i);
  return lane_sum(sum);
}

// Magnitudes order as their bits do, with what is infinite and then NaN above all others.
ISA_INLINE IntVec magnitude_bits(Vec x) { return (IntVec)x & 0x7fffffff; }
ISA_INLINE IntVec larger(IntVec x, IntVec y) { return x > y ? x : y; }
ISA_INLINE Vec magnitude(Vec x) { return (Vec)magnitude_bits(x); }
ISA_INLINE int32_t lane_max(IntVec x) {
  if constexpr (W > 8) x = larger(partners<8>(x), x);
  if constexpr (W > 4) x = larger(partners<4>(x), x);
  x = larger(partners<2>(x), x);
  x = larger(partners<1>(x), x);
  return x[0];
}
ISA_INLINE float largest_lane(Vec magnitudes) {
  const int32_t most = lane_max((IntVec)magnitudes);
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  return largest;
}
ISA_INLINE float largest_magnitude(const float* p, int64_t count) {
  Vec largest = {};
  for (int64_t i = 0; i < count; i += W) largest = larger(magnitude(load(p + i)), largest);
  return largest_lane(largest);
}

constexpr float LEAST = -123.0f;  // the smallest power of two that exp2 gives

#if ISA_WIDTH == 16
// 2^x of x between LEAST and 126, or NaN: x = n + k / 32 + f. 2^(k / 32) comes from a table that two registers hold, from
// whose bits k has been taken off, so that what is added to the exponent need not be separated from it. 2^f is a
// parabola in its vertex form, (f + 46 / 32)^2 + c: f and the vertex come in one subtraction, and the parabola's factor
// stands in the table. Exactly 1 at 0. Sums have units of their own; products are what the scan waits for.
ISA_INLINE Vec exp2_by_table(Vec x) {
  const Vec shifted = x + 393216.0f;  // 1.5 * 2^18: the 32nds land in the low mantissa bits
  const Vec f = x - (shifted - (393216.0f + 1.4375f));
  const __m512i low = _mm512_setr_epi32(
      0x3e76e2c7, 0x3e784abc, 0x3e78e880, 0x3e77bb1e, 0x3e769d8f, 0x3e75902b, 0x3e74934d, 0x3e73a752,
      0x3e72cc98, 0x3e720381, 0x3e714c6e, 0x3e70a7c5, 0x3e7015ee, 0x3e6f9751, 0x3e6f2c5b, 0x3e6ed579);
  const __m512i high = _mm512_setr_epi32(
      0x3e6e931c, 0x3e6e65b8, 0x3e6e4dc1, 0x3e6e4bb0, 0x3e6e6000, 0x3e6e8b2e, 0x3e6ecdba, 0x3e6f2828,
      0x3e6f9afd, 0x3e7026c1, 0x3e70cc01, 0x3e718b4c, 0x3e726533, 0x3e735a4c, 0x3e746b2f, 0x3e759878);
  const IntVec power = (IntVec)_mm512_permutex2var_epi32(low, (__m512i)shifted, high) + ((IntVec)shifted << 18);
  return (Vec)power * multiply_add(f, f, splat(2.0812594891f));
}
#endif

// 2^x: x = n + f with n the nearest integer, a polynomial for 2^f that is exactly 1 at f = 0, and n added to the
// exponent bits. Relative error below 2e-7, of the table's below 4e-7. Below LEAST the result stays that of LEAST, above
// 128 it is infinite, and a NaN stays one. `Clamp` may be false where x is known to lie between LEAST and 126.
template <bool Clamp = true>
ISA_INLINE Vec exp2(Vec x) {
  if (Clamp) x = smaller(splat(128.0f), larger(splat(LEAST), x));
#if ISA_WIDTH == 16
  return exp2_by_table(x);
#else
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
  const Vec f = x - (shifted - 12582912.0f);
  Vec p = splat(1.326472021e-3f);
  p = p * f + 9.671513138e-3f;
  p = p * f + 5.550733766e-2f;
  p = p * f + 2.402224207e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return (Vec)((IntVec)p + ((IntVec)shifted << 23));
#endif
}
ISA_INLINE Vec exp2_below(Vec x) { return exp2<false>(larger(splat(LEAST), x)); }  // where x is at most 126
ISA_INLINE Vec exp(Vec x) { return exp2<>(x * 1.442695041f); }
ISA_INLINE Vec times_sigmoid(Vec x, Vec y) { return x / (1.0f + exp2<>(y * -1.442695041f)); }
ISA_INLINE Vec sigmoid(Vec x) { return times_sigmoid(splat(1.0f), x); }
ISA_INLINE Vec silu(Vec x) { return times_sigmoid(x, x); }

// log(1 + exp(x)) = max(x, 0) + log(1 + y) with y = exp(-|x|) in (0, 1], and log(1 + y) = 2 artanh(z), z = y / (2 + y)
// in (0, 1/3]: a polynomial in z^2, times z, so that small results keep their relative accuracy.
ISA_INLINE Vec softplus(Vec x) {
  const Vec y = exp2_below(magnitude(x) * -1.442695041f), z = y / (y + 2.0f), w = z * z;
  Vec p = splat(2.802763957e-1f);
  p = p * w + 2.799817326e-1f;
  p = p * w + 4.002179085e-1f;
  p = p * w + 6.666641047e-1f;
  return z * p * w + (z * 2.0f + larger(splat(0.0f), x));
}

}  // namespace ISA_NAMESPACE
