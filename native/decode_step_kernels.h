// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What one thread does in a decoding step. Included by for_each_isa.h once for every instruction set.

#include "prefill_products.h"
#include "token_rows.h"

namespace ISA_NAMESPACE {

// What a layer knows before token b of all rows' tokens: what its row began with, or the log of the token before.
template <class T>
ISA_INLINE const T* before(const T* states, const T* log, int64_t b, int64_t length, int64_t size) {
  return b % length ? log + (b - 1) * size : states + b / length * size;
}

// x enters the window and becomes the activated convolution, in place. The kernel has KNOWN weights, or if 0 any number.
template <class T, int KNOWN>
ISA_INLINE void convolve_windows(const RunArgs& run, const Layer& layer, const void* windows, void* log,
                                 const Range& own, float* xz) {
  const StepArgs& args = run.step;
  const int64_t K = KNOWN ? KNOWN : args.kernel, size = args.dim * K;
  const T* from = static_cast<const T*>(windows) + run.begin * size;
  T* to = static_cast<T*>(log) + run.log_begin * size;
  for (int64_t b = 0; b < args.batch; ++b) {
    float* x = xz + b * 2 * args.dim;
    T* window = to + b * size + own.first * K;
    const T* old = before(from, to, b, run.length, size) + own.first * K;
    for (int64_t c = own.first; c < own.last; ++c, window += K, old += K) {
      const float* weight = layer.conv_weight + c * K;
      float sum = layer.conv_bias ? layer.conv_bias[c] : 0.0f;
      for (int64_t k = 0; k + 1 < K; ++k) window[k] = old[k + 1];  // they may be the same memory
      from_float(x[c], window + K - 1);
      for (int64_t k = 0; k < K; ++k) sum += as_float(window[k]) * weight[k];
      x[c] = sum;
    }
    for (int64_t c = own.first; c < own.last; c += W) {
      const Vec v = load_part(x + c, own.last - c);
      store_part(x + c, v * sigmoid(v), own.last - c);
    }
  }
}

template <class T>
ISA_INLINE void convolve(const RunArgs& run, const Layer& layer, const void* windows, void* log, const Range& own,
                         float* xz) {
  if (run.step.kernel == 4)  // as in all published models
    convolve_windows<T, 4>(run, layer, windows, log, own, xz);
  else
    convolve_windows<T, 0>(run, layer, windows, log, own, xz);
}

// h = exp(d A) h + d u B of ROWS channels or fewer; `sums` receives C h of each. B and C are (state), and N of their
// vectors make a state; N = 0: as many as it takes. Lanes are states here.
template <int N>
ISA_INLINE void step_channels(int64_t state, int64_t channels, const float* delta, const float* u, const float* A2,
                              const float* B, const float* C, const float* old, float* h, float (&sums)[ROWS]) {
  Vec sum[ROWS] = {}, b[N ? N : 1], c[N ? N : 1];
  for (int i = 0; i < N; ++i) b[i] = load(B + i * W), c[i] = load(C + i * W);
  for (int64_t k = 0; k < channels; ++k, A2 += state, old += state, h += state) {
    const float d = delta[k], x = d * u[k];
    if constexpr (N > 0) {
      for (int i = 0; i < N; ++i) {
        const Vec next = exp2<>(d * load(A2 + i * W)) * load(old + i * W) + x * b[i];
        store(h + i * W, next);
        sum[k] += next * c[i];
      }
    } else {
      for (int64_t n = 0; n < state; n += W) {
        const int64_t lanes = state - n;
        const Vec decay = exp2<>(d * load_part(A2 + n, lanes));
        const Vec next = decay * load_part(old + n, lanes) + x * load_part(B + n, lanes);
        store_part(h + n, next, lanes);
        sum[k] += next * load_part(C + n, lanes);
      }
    }
  }
  lane_sums(sum, sums);
}

// One step of the recurrence for this thread's channels. y = (C h + D u) silu(z).
ISA_INLINE void scan_step(const RunArgs& run, const Layer& layer, const float* states, float* log, const Range& own,
                          const Shared& shared) {
  constexpr int64_t USUAL = 16;  // states, as in all published models
  const StepArgs& args = run.step;
  const int64_t N = args.state, projections = args.rank + 2 * N, size = args.dim * N;
  states += run.begin * size, log += run.log_begin * size;
  for (int64_t b = 0; b < args.batch; ++b) {
    const float* B = shared.projected + b * projections + args.rank;
    const float* u = shared.xz + b * 2 * args.dim;
    const float* z = u + args.dim;
    float* delta = shared.delta + b * args.dim;
    float* y = shared.y + b * args.dim;
    const float* old = before<float>(states, log, b, run.length, size);
    for (int64_t c = own.first; c < own.last; c += W)
      store_part(delta + c, softplus(load_part(delta + c, own.last - c)), own.last - c);
    for (int64_t c = own.first; c < own.last; c += ROWS) {
      const int64_t channels = own.last - c < ROWS ? own.last - c : ROWS;
      const float* A2 = layer.A2 + c * N;
      float* h = log + b * size + c * N;
      float sums[ROWS];
      if (N == USUAL)
        step_channels<USUAL / W>(N, channels, delta + c, u + c, A2, B, B + N, old + c * N, h, sums);
      else
        step_channels<0>(N, channels, delta + c, u + c, A2, B, B + N, old + c * N, h, sums);
      for (int64_t k = 0; k < channels; ++k) y[c + k] = sums[k] + layer.D[c + k] * u[c + k];
    }
    for (int64_t c = own.first; c < own.last; c += W) {
      const Vec gate = load_part(z + c, own.last - c);
      store_part(y + c, load_part(y + c, own.last - c) * gate * sigmoid(gate), own.last - c);
    }
  }
}

ISA_TARGET static void run_layers(const RunArgs& run, const Shared& shared, const Own& own, int64_t thread,
                                  int64_t threads) {
  const StepArgs& args = run.step;
  const int64_t batch = args.batch, hidden = args.hidden, dim = args.dim, projections = args.rank + 2 * args.state;
  const Range channels = part_of(dim, thread, threads), outputs = part_of(hidden, thread, threads);
  const Range gates = {dim + channels.first, dim + channels.last}, parts = part_of(projections, thread, threads);
  for (int64_t b = 0; b < batch; ++b) embed(args, args.ids[b], outputs, shared.residual + b * hidden);
  for (int64_t b = 0; args.embedded && b < batch; ++b)
    for (int64_t i = outputs.first; i < outputs.last; ++i)
      args.embedded[b * hidden + i] = shared.residual[b * hidden + i];
  meet();
  for (int64_t l = 0; l < args.layer_count; ++l) {
    const Layer& layer = args.layers[l];
    rms_norm(shared.residual, layer.norm, hidden, batch, args.epsilon, own.x);
    const Input normed = prepare(layer.in_proj, own.x, hidden, batch, own);
    multiply(layer.in_proj, channels, normed, shared.xz, 2 * dim, false, own.desk);
    multiply(layer.in_proj, gates, normed, shared.xz, 2 * dim, false, own.desk);
    if (args.window_format == BFLOAT16)
      convolve<uint16_t>(run, layer, args.windows[l], run.window_log[l], channels, shared.xz);
    else
      convolve<float>(run, layer, args.windows[l], run.window_log[l], channels, shared.xz);
    meet();
    const Input convolved = prepare(layer.x_proj, shared.xz, 2 * dim, batch, own);
    multiply(layer.x_proj, parts, convolved, shared.projected, projections, false, own.desk);
    meet();
    const Input step = prepare(layer.dt_proj, shared.projected, projections, batch, own);
    multiply(layer.dt_proj, channels, step, shared.delta, dim, false, own.desk);
    scan_step(run, layer, args.states[l], run.state_log[l], channels, shared);
    meet();
    const Input gated = prepare(layer.out_proj, shared.y, dim, batch, own);
    multiply(layer.out_proj, outputs, gated, shared.residual, hidden, true, own.desk);
    meet();
  }
  rms_norm(shared.residual, args.norm, hidden, batch, args.epsilon, own.x);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = outputs.first; i < outputs.last; ++i) args.hidden_out[b * hidden + i] = own.x[b * hidden + i];
  if (args.logits) {
    const Input last = prepare(args.head, own.x, hidden, batch, own);
    multiply(args.head, part_of(args.vocab, thread, threads), last, args.logits, args.vocab, false, own.desk);
  }
}

}  // namespace ISA_NAMESPACE
