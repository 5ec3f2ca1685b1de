// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The recurrence of the selective scan over a chunk of time, for one block of channels. Included by the kernels that
// scan, once for every instruction set.

namespace ISA_NAMESPACE {

// to (columns, to_row) = from (rows, from_row) transposed, times `factor`.
ISA_INLINE void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float factor, float* to,
                          int64_t to_row) {
  int64_t whole_rows = 0, whole_columns = 0;
#if ISA_WIDTH >= 8
  whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t r = 0; r < whole_rows; r += 8)
    for (int64_t c = 0; c < whole_columns; c += 8) {
      __m256 x[8];
      for (int i = 0; i < 8; ++i) x[i] = _mm256_loadu_ps(from + (r + i) * from_row + c) * factor;
      transpose(x);
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (c + i) * to_row + r, x[i]);
    }
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_row + r] = from[r * from_row + c] * factor;
}

// (dim, state) in memory <-> [state][BLOCK] in the workspace, for the channels of one block.
ISA_INLINE void gather_states(float* to, const float* from, int64_t channels, int64_t states, float factor) {
  transpose(from, states, channels, states, factor, to, BLOCK);
  for (int64_t n = 0; n < states && channels < BLOCK; ++n)
    std::memset(to + n * BLOCK + channels, 0, sizeof(float) * (BLOCK - channels));
}
ISA_INLINE void scatter_states(float* to, const float* from, int64_t channels, int64_t states) {
  transpose(from, BLOCK, states, channels, 1.0f, to, states);
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
