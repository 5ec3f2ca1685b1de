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
#if ISA_WIDTH == 8
  return __builtin_ia32_maxps256(x, y);
#else
  return x > y ? x : y;
#endif
}
ISA_INLINE Vec smaller(Vec x, Vec y) {
#if ISA_WIDTH == 8
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

ISA_INLINE float lane_sum(Vec x) {
  float part[W], total = 0.0f;
  store(part, x);
  for (int i = 0; i < W; ++i) total += part[i];
  return total;
}

ISA_INLINE float dot(const float* x, const float* y, int64_t count) {
  Vec sum = {};
  for (int64_t i = 0; i < count; i += W) sum += load_part(x + i, count - i) * load_part(y + i, count - i);
  return lane_sum(sum);
}

ISA_INLINE float lane_max(Vec x) {
  float part[W], largest = 0.0f;
  store(part, x);
  for (int i = 0; i < W; ++i) largest = part[i] > largest ? part[i] : largest;
  return largest;
}
ISA_INLINE Vec magnitude(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }
ISA_INLINE float largest_magnitude(const float* p, int64_t count) {
  Vec largest = {};
  for (int64_t i = 0; i < count; i += W) largest = larger(magnitude(load(p + i)), largest);
  return lane_max(largest);
}

#if ISA_WIDTH == 16
// 2^x of x between -126 and 126, or NaN: x = n + k / 32 + f, and 2^(k / 32) from a table that two registers hold, from
// whose bits k has been taken off, so that what is added to the exponent need not be separated from it.
ISA_INLINE Vec exp2_by_table(Vec x) {
  const Vec shifted = x + 393216.0f;  // 1.5 * 2^18: the 32nds land in the low mantissa bits
  const Vec f = x - (shifted - 393216.0f);
  const __m512i low = _mm512_setr_epi32(
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
      0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6);
  const __m512i high = _mm512_setr_epi32(
      0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
      0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3);
  const IntVec power = (IntVec)_mm512_permutex2var_epi32(low, (__m512i)shifted, high) + ((IntVec)shifted << 18);
  const Vec p = (splat(2.40226763e-1f) * f + 6.931573341e-1f) * f;
  return (Vec)power * p + (Vec)power;
}
#endif

// 2^x: x = n + f with n the nearest integer, a polynomial for 2^f that is exactly 1 at f = 0, and n added to the
// exponent bits. Relative error below 2e-7. Below 2^-126 the result stays 2^-126, above 2^128 it is infinite, and a
// NaN stays one. `Clamp` may be false where x is known to lie between -126 and 126.
template <bool Clamp = true>
ISA_INLINE Vec exp2(Vec x) {
#if ISA_WIDTH == 16
  if (!Clamp) return exp2_by_table(x);
#endif
  if (Clamp) x = smaller(splat(128.0f), larger(splat(-126.0f), x));
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
  const Vec f = x - (shifted - 12582912.0f);
  Vec p = splat(1.326472021e-3f);
  p = p * f + 9.671513138e-3f;
  p = p * f + 5.550733766e-2f;
  p = p * f + 2.402224207e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}
ISA_INLINE Vec exp2_below(Vec x) { return exp2<false>(larger(splat(-126.0f), x)); }  // where x is at most 126
ISA_INLINE Vec exp(Vec x) { return exp2<>(x * 1.442695041f); }
ISA_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

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
