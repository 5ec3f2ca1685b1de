// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The recurrence of the selective scan over a chunk of time, for one block of channels. Included by the kernels that
// scan, once for every instruction set.

namespace ISA_NAMESPACE {

// (dim, state) in memory <-> [state][BLOCK] in the workspace, for the channels of one block.
ISA_INLINE void gather_states(float* to, const float* from, int64_t channels, int64_t states, float factor) {
  for (int64_t n = 0; n < states; ++n)
    for (int64_t c = 0; c < BLOCK; ++c) to[n * BLOCK + c] = c < channels ? from[c * states + n] * factor : 0.0f;
}
ISA_INLINE void scatter_states(float* to, const float* from, int64_t channels, int64_t states) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t n = 0; n < states; ++n) to[c * states + n] = from[n * BLOCK + c];
}

// h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t += C_t h_t over one chunk, for W channels and G states.
template <int G, bool Clamp>
ISA_INLINE void forward_group(int64_t steps, const float* delta, const float* input, const float* A2, const float* B,
                               int64_t B_time, const float* C, int64_t C_time, float* h, float* y) {
  Vec a[G], s[G];
  for (int g = 0; g < G; ++g) a[g] = load(A2 + g * BLOCK), s[g] = load(h + g * BLOCK);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec d = load(delta + t * BLOCK), x = load(input + t * BLOCK);
    Vec sum = load(y + t * BLOCK);
    for (int g = 0; g < G; ++g) {
      s[g] = exp2<Clamp>(d * a[g]) * s[g] + x * B[t * B_time + g];
      sum += s[g] * C[t * C_time + g];
    }
    store(y + t * BLOCK, sum);
  }
  for (int g = 0; g < G; ++g) store(h + g * BLOCK, s[g]);
}

template <bool Clamp>
ISA_INLINE void forward_chunk(int64_t steps, int64_t channels, int64_t N, const float* delta, const float* input,
                               const float* A2, const float* B, int64_t B_time, const float* C, int64_t C_time,
                               float* h, float* y) {
  for (int64_t c = 0; c < channels; c += W) {
    int64_t n = 0;
    if (W == 16)
      for (; n + 4 <= N; n += 4)
        forward_group<4, Clamp>(steps, delta + c, input + c, A2 + n * BLOCK + c, B + n, B_time, C + n, C_time,
                                h + n * BLOCK + c, y + c);
    for (; n + 2 <= N; n += 2)
      forward_group<2, Clamp>(steps, delta + c, input + c, A2 + n * BLOCK + c, B + n, B_time, C + n, C_time,
                              h + n * BLOCK + c, y + c);
    for (; n < N; ++n)
      forward_group<1, Clamp>(steps, delta + c, input + c, A2 + n * BLOCK + c, B + n, B_time, C + n, C_time,
                              h + n * BLOCK + c, y + c);
  }
}

}  // namespace ISA_NAMESPACE
