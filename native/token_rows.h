// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What a token's row of numbers goes through beside the products. Included by the kernels of decoding step and prefill
// once for every instruction set.

namespace ISA_NAMESPACE {

// to = x / rms(x) * weight for every row.
ISA_INLINE void rms_norm(const float* x, const float* weight, int64_t count, int64_t batch, double epsilon,
                         float* to) {
  for (int64_t b = 0; b < batch; ++b, x += count, to += count) {
    Vec squares = {};
    for (int64_t i = 0; i < count; i += W) {
      const Vec v = load_part(x + i, count - i);
      squares += v * v;
    }
    const float mean = lane_sum(squares) / static_cast<float>(count);
    const float factor = 1.0f / std::sqrt(mean + static_cast<float>(epsilon));
    for (int64_t i = 0; i < count; i += W)
      store_part(to + i, load_part(x + i, count - i) * factor * load_part(weight + i, count - i), count - i);
  }
}

ISA_INLINE float as_float(float x) { return x; }
ISA_INLINE float as_float(int8_t x) { return x; }
ISA_INLINE void from_float(float x, float* to) { *to = x; }
ISA_INLINE void from_float(float x, uint16_t* to) {  // to the nearest bfloat16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t quiet = (bits >> 16) | 0x40u;
  *to = static_cast<uint16_t>(x == x ? (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16 : quiet);
}

}  // namespace ISA_NAMESPACE
