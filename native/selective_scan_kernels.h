// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The arithmetic of the selective scan for one block of channels of one sequence. Included by for_each_isa.h once for
// every instruction set.

#include "scan_chunk.h"

namespace ISA_NAMESPACE {

static_assert(W <= WIDEST && BLOCK % W == 0, "the workspace holds sums of every lane");

// One block of channels of one sequence, all time steps.
ISA_TARGET static void forward_block(const ScanArgs& args, int64_t b, int64_t first, float* workspace) {
  const int64_t channels = args.dim - first < BLOCK ? args.dim - first : BLOCK, N = args.state, L = args.length;
  float* delta = workspace;             // [CHUNK][BLOCK]
  float* input = delta + CHUNK * BLOCK;  // [CHUNK][BLOCK], delta * u
  float* y = input + CHUNK * BLOCK;      // [CHUNK][BLOCK]
  float* A2 = y + CHUNK * BLOCK;         // [N][BLOCK], A * log2(e)
  float* h = A2 + N * BLOCK;             // [N][BLOCK]
  gather_states(A2, args.A + first * N, channels, N, 1.442695041f);
  const float largest_A2 = largest_magnitude(A2, N * BLOCK);
  if (args.initial_state)
    gather_states(h, args.initial_state + (b * args.dim + first) * N, channels, N, 1.0f);
  else
    std::memset(h, 0, sizeof(float) * N * BLOCK);

  for (int64_t start = 0; start < L; start += CHUNK) {
    const int64_t steps = L - start < CHUNK ? L - start : CHUNK;
    if (args.checkpoints) {
      float* row = args.checkpoints + ((b * chunk_count(L) + start / CHUNK) * N) * args.dim + first;
      for (int64_t n = 0; n < N; ++n) std::memcpy(row + n * args.dim, h + n * BLOCK, sizeof(float) * channels);
    }
    Vec largest_delta = {};
    for (int64_t t = 0; t < steps; ++t) {
      const float* u_row = args.u + b * args.u_batch + (start + t) * args.u_time + first;
      const float* delta_row = args.delta + b * args.delta_batch + (start + t) * args.delta_time + first;
      for (int64_t c = 0; c < channels; c += W) {
        const int64_t lanes = channels - c;
        Vec d = load_part(delta_row + c, lanes);
        const Vec u = load_part(u_row + c, lanes);
        if (args.delta_bias) d += load_part(args.delta_bias + first + c, lanes);
        if (args.delta_softplus) d = softplus(d);
        largest_delta = larger(magnitude(d), largest_delta);
        store(delta + t * BLOCK + c, d);
        store(input + t * BLOCK + c, d * u);
        store(y + t * BLOCK + c, args.D ? load_part(args.D + first + c, lanes) * u : Vec{});
      }
    }
    const float* B = N ? args.B + b * args.B_batch + start * args.B_time : nullptr;
    const float* C = N ? args.C + b * args.C_batch + start * args.C_time : nullptr;
    if (largest_A2 * largest_lane(largest_delta) <= -LEAST)
      forward_chunk<false>(steps, channels, N, delta, input, A2, B, args.B_time, C, args.C_time, h, y);
    else
      forward_chunk<true>(steps, channels, N, delta, input, A2, B, args.B_time, C, args.C_time, h, y);
    for (int64_t t = 0; t < steps; ++t) {
      float* out_row = args.out + (b * L + start + t) * args.dim + first;
      const float* z_row = args.z ? args.z + b * args.z_batch + (start + t) * args.z_time + first : nullptr;
      for (int64_t c = 0; c < channels; c += W) {
        Vec value = load(y + t * BLOCK + c);
        if (z_row) {
          const Vec z = load_part(z_row + c, channels - c);
          value *= silu(z);
        }
        store_part(out_row + c, value, channels - c);
      }
    }
  }
  if (args.last_state) scatter_states(args.last_state + (b * args.dim + first) * N, h, channels, N);
}

// The arrays of the backward pass inside a workspace.
struct Backward {
  float *delta, *u, *slope, *grad_y, *grad_z, *y, *grad_input, *grad_delta;  // [CHUNK][BLOCK]
  float *A, *h, *grad_h, *grad_A;                                            // [N][BLOCK]
  float *grad_B, *grad_C;                                                    // [CHUNK][N][W], summed over lanes later
  float *grad_D, *grad_bias;                                                 // [BLOCK]
};

// One chunk of W channels and G states: the states are computed again from the chunk's first one and kept, then time
// runs backwards. `grad_h` holds dL/dh after the chunk and, at the end, before it.
template <int G, bool Clamp>
ISA_INLINE void backward_group(int64_t steps, int64_t N, int64_t c, int64_t n, const Backward& w, const float* B,
                                int64_t B_time, const float* C, int64_t C_time, bool need_y) {
  Vec decay[CHUNK][G], h[CHUNK + 1][G], A[G], g[G], grad_A[G];
  for (int i = 0; i < G; ++i) {
    A[i] = load(w.A + (n + i) * BLOCK + c);
    h[0][i] = load(w.h + (n + i) * BLOCK + c);
  }
  for (int64_t t = 0; t < steps; ++t) {
    const Vec d = load(w.delta + t * BLOCK + c), x = d * load(w.u + t * BLOCK + c), d2 = d * 1.442695041f;
    for (int i = 0; i < G; ++i) {
      decay[t][i] = exp2<Clamp>(d2 * A[i]);
      h[t + 1][i] = decay[t][i] * h[t][i] + x * B[t * B_time + n + i];
    }
    if (need_y) {
      Vec y = load(w.y + t * BLOCK + c);
      for (int i = 0; i < G; ++i) y += h[t + 1][i] * C[t * C_time + n + i];
      store(w.y + t * BLOCK + c, y);
    }
  }
  for (int i = 0; i < G; ++i) {
    g[i] = load(w.grad_h + (n + i) * BLOCK + c);
    grad_A[i] = load(w.grad_A + (n + i) * BLOCK + c);
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const Vec d = load(w.delta + t * BLOCK + c), x = d * load(w.u + t * BLOCK + c);
    const Vec grad_y = load(w.grad_y + t * BLOCK + c);
    Vec grad_input = load(w.grad_input + t * BLOCK + c), grad_delta = load(w.grad_delta + t * BLOCK + c);
    float* sum_B = w.grad_B + (t * N + n) * W;
    float* sum_C = w.grad_C + (t * N + n) * W;
    for (int i = 0; i < G; ++i) {
      g[i] += grad_y * C[t * C_time + n + i];
      store(sum_C + i * W, load(sum_C + i * W) + grad_y * h[t + 1][i]);
      store(sum_B + i * W, load(sum_B + i * W) + g[i] * x);
      grad_input += g[i] * B[t * B_time + n + i];
      g[i] *= decay[t][i];
      const Vec through_decay = g[i] * h[t][i];
      grad_delta += A[i] * through_decay;
      grad_A[i] += d * through_decay;
    }
    store(w.grad_input + t * BLOCK + c, grad_input);
    store(w.grad_delta + t * BLOCK + c, grad_delta);
  }
  for (int i = 0; i < G; ++i) {
    store(w.grad_h + (n + i) * BLOCK + c, g[i]);
    store(w.grad_A + (n + i) * BLOCK + c, grad_A[i]);
  }
}

template <bool Clamp>
ISA_INLINE void backward_chunk(int64_t steps, int64_t channels, int64_t N, const Backward& w, const float* B,
                                int64_t B_time, const float* C, int64_t C_time, bool need_y) {
  for (int64_t c = 0; c < channels; c += W) {
    int64_t n = 0;
    for (; n + 2 <= N; n += 2) backward_group<2, Clamp>(steps, N, c, n, w, B, B_time, C, C_time, need_y);
    for (; n < N; ++n) backward_group<1, Clamp>(steps, N, c, n, w, B, B_time, C, C_time, need_y);
  }
}

// Inputs of one chunk into the workspace: delta after bias and softplus, its slope, dL/dy before the gate, dL/dz / y.
// Returns the largest magnitude of delta.
ISA_INLINE float load_chunk(const ScanArgs& args, int64_t b, int64_t first, int64_t channels, int64_t start,
                            int64_t steps, const Backward& w) {
  Vec largest_delta = {};
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t time = start + t;
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t lanes = channels - c, at = t * BLOCK + c;
      const Vec u = load_part(args.u + b * args.u_batch + time * args.u_time + first + c, lanes);
      Vec d = load_part(args.delta + b * args.delta_batch + time * args.delta_time + first + c, lanes);
      Vec grad_y = load_part(args.grad_out + b * args.grad_out_batch + time * args.grad_out_time + first + c, lanes);
      if (args.delta_bias) d += load_part(args.delta_bias + first + c, lanes);
      store(w.slope + at, args.delta_softplus ? sigmoid(d) : splat(1.0f));
      if (args.delta_softplus) d = softplus(d);
      largest_delta = larger(magnitude(d), largest_delta);
      store(w.delta + at, d);
      store(w.u + at, u);
      if (args.z) {
        const Vec z = load_part(args.z + b * args.z_batch + time * args.z_time + first + c, lanes), s = sigmoid(z);
        store(w.grad_z + at, grad_y * s * (1.0f + z * (1.0f - s)));
        store(w.y + at, args.D ? load_part(args.D + first + c, lanes) * u : Vec{});
        grad_y *= z * s;
      }
      store(w.grad_y + at, grad_y);
      store(w.grad_input + at, Vec{});
      store(w.grad_delta + at, Vec{});
    }
  }
  return largest_lane(largest_delta);
}

// Gradients of one chunk out of the workspace.
ISA_INLINE void store_chunk(const ScanArgs& args, int64_t b, int64_t first, int64_t channels, int64_t start,
                             int64_t steps, const Backward& w) {
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t row = (b * args.length + start + t) * args.dim + first;
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t lanes = channels - c, at = t * BLOCK + c;
      const Vec u = load(w.u + at), d = load(w.delta + at), grad_y = load(w.grad_y + at), gi = load(w.grad_input + at);
      const Vec grad_delta = (load(w.grad_delta + at) + gi * u) * load(w.slope + at);
      Vec grad_u = gi * d;
      if (args.D) {
        grad_u += grad_y * load_part(args.D + first + c, lanes);
        store(w.grad_D + c, load(w.grad_D + c) + grad_y * u);
      }
      store(w.grad_bias + c, load(w.grad_bias + c) + grad_delta);
      store_part(args.grad_u + row + c, grad_u, lanes);
      store_part(args.grad_delta + row + c, grad_delta, lanes);
      if (args.z) store_part(args.grad_z + row + c, load(w.grad_z + at) * load(w.y + at), lanes);
    }
  }
}

// Backward pass of one block of channels of one sequence. `part` receives what is summed over other work items later.
ISA_TARGET static void backward_block(const ScanArgs& args, int64_t b, int64_t first, float* workspace,
                                       const Partial& part) {
  const int64_t channels = args.dim - first < BLOCK ? args.dim - first : BLOCK, N = args.state, L = args.length;
  Backward w;
  float* next = workspace;
  for (float** array : {&w.delta, &w.u, &w.slope, &w.grad_y, &w.grad_z, &w.y, &w.grad_input, &w.grad_delta})
    *array = next, next += CHUNK * BLOCK;
  for (float** array : {&w.A, &w.h, &w.grad_h, &w.grad_A}) *array = next, next += N * BLOCK;
  for (float** array : {&w.grad_D, &w.grad_bias}) *array = next, next += BLOCK;
  w.grad_B = next, w.grad_C = w.grad_B + CHUNK * N * W;

  gather_states(w.A, args.A + first * N, channels, N, 1.0f);
  const float largest_A = largest_magnitude(w.A, N * BLOCK) * 1.442695041f;
  std::memset(w.grad_A, 0, sizeof(float) * N * BLOCK);
  std::memset(w.grad_D, 0, sizeof(float) * 2 * BLOCK);  // grad_D and grad_bias are neighbours
  if (args.grad_last_state)
    gather_states(w.grad_h, args.grad_last_state + (b * args.dim + first) * N, channels, N, 1.0f);
  else
    std::memset(w.grad_h, 0, sizeof(float) * N * BLOCK);
  std::memset(w.h, 0, sizeof(float) * N * BLOCK);

  for (int64_t chunk = chunk_count(L) - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * CHUNK, steps = L - start < CHUNK ? L - start : CHUNK;
    const float* row = args.checkpoints + ((b * chunk_count(L) + chunk) * N) * args.dim + first;
    for (int64_t n = 0; n < N; ++n) std::memcpy(w.h + n * BLOCK, row + n * args.dim, sizeof(float) * channels);
    const float largest_delta = load_chunk(args, b, first, channels, start, steps, w);
    std::memset(w.grad_B, 0, sizeof(float) * 2 * CHUNK * N * W);  // grad_B and grad_C are neighbours

    const float* B = N ? args.B + b * args.B_batch + start * args.B_time : nullptr;
    const float* C = N ? args.C + b * args.C_batch + start * args.C_time : nullptr;
    if (largest_A * largest_delta <= -LEAST)
      backward_chunk<false>(steps, channels, N, w, B, args.B_time, C, args.C_time, args.z);
    else
      backward_chunk<true>(steps, channels, N, w, B, args.B_time, C, args.C_time, args.z);
    store_chunk(args, b, first, channels, start, steps, w);
    for (int64_t i = 0; i < steps * N; ++i) {
      part.grad_B[start * N + i] = lane_sum(load(w.grad_B + i * W));
      part.grad_C[start * N + i] = lane_sum(load(w.grad_C + i * W));
    }
  }
  scatter_states(part.grad_A + first * N, w.grad_A, channels, N);
  std::memcpy(part.grad_bias + first, w.grad_bias, sizeof(float) * channels);
  std::memcpy(part.grad_D + first, w.grad_D, sizeof(float) * channels);
  scatter_states(args.grad_initial_state + (b * args.dim + first) * N, w.grad_h, channels, N);
}

}  // namespace ISA_NAMESPACE
