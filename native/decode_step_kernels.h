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

#if ISA_WIDTH >= 8
// The convolution of eight channels with kernels of four, in place; their values enter the windows.
ISA_INLINE void convolve_eight(float* x, const float* weight, const float* old, float* window) {
  const __m256 values = _mm256_loadu_ps(x);
  __m256 products[4];  // two channels each
  for (int i = 0; i < 4; ++i) {
    const __m256i places = _mm256_setr_epi32(0, 0, 0, 2 * i, 0, 0, 0, 2 * i + 1);
    const __m256 moved = _mm256_permute_ps(_mm256_loadu_ps(old + 8 * i), 0x39);  // every window by one place
    const __m256 next = _mm256_blend_ps(moved, _mm256_permutevar8x32_ps(values, places), 0x88);
    _mm256_storeu_ps(window + 8 * i, next);
    products[i] = _mm256_mul_ps(next, _mm256_loadu_ps(weight + 8 * i));
  }
  const __m256 low = _mm256_hadd_ps(products[0], products[1]), high = _mm256_hadd_ps(products[2], products[3]);
  const __m256 sums = _mm256_hadd_ps(low, high);  // channels 0, 2, 4, 6, 1, 3, 5, 7
  _mm256_storeu_ps(x, _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
#endif

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
    T* window = to + b * size;
    const T* old = before(from, to, b, run.length, size);
    int64_t first = own.first;
#if ISA_WIDTH >= 8
    if constexpr (KNOWN == 4 && std::is_same_v<T, float>)
      for (; first + 8 <= own.last; first += 8)
        convolve_eight(x + first, layer.conv_weight + first * K, old + first * K, window + first * K);
#endif
    for (int64_t c = first; c < own.last; ++c) {
      float sum = 0.0f;
      for (int64_t k = 0; k + 1 < K; ++k) window[c * K + k] = old[c * K + k + 1];  // they may be the same memory
      from_float(x[c], window + c * K + K - 1);
      for (int64_t k = 0; k < K; ++k) sum += as_float(window[c * K + k]) * layer.conv_weight[c * K + k];
      x[c] = sum;
    }
    for (int64_t c = own.first; c < own.last; c += W) {
      const int64_t lanes = own.last - c;
      const Vec v = load_part(x + c, lanes) + (layer.conv_bias ? load_part(layer.conv_bias + c, lanes) : Vec{});
      store_part(x + c, silu(v), lanes);
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

// h = exp(d A) h + d u B and y = C h + D u of a token's channels. A state, (state) a channel as its rates A2 and as B and
// C are, is N vectors. Lanes are states here.
template <int N>
ISA_INLINE void scan_channels(int64_t channels, const float* delta, const float* u, const float* A2, const float* D,
                              const float* B, const float* C, const float* old, float* h, float* y) {
  Vec b[N], c[N];
  for (int i = 0; i < N; ++i) b[i] = load(B + i * W), c[i] = load(C + i * W);
  for (int64_t first = 0; first + ROWS <= channels; first += ROWS) {
    Vec sum[ROWS] = {};
    for (int k = 0; k < ROWS; ++k) {
      const float d = delta[first + k], x = d * u[first + k];
      for (int i = 0; i < N; ++i, A2 += W, old += W, h += W) {
        const Vec next = exp2_below(d * load(A2)) * load(old) + x * b[i];
        store(h, next);
        sum[k] += next * c[i];
      }
    }
    float sums[ROWS];
    lane_sums(sum, sums);
    for (int k = 0; k < ROWS; ++k) y[first + k] = sums[k] + D[first + k] * u[first + k];
  }
}

// The same for any number of channels and states.
ISA_INLINE void scan_any_channels(int64_t state, int64_t channels, const float* delta, const float* u, const float* A2,
                                  const float* D, const float* B, const float* C, const float* old, float* h,
                                  float* y) {
  for (int64_t k = 0; k < channels; ++k, A2 += state, old += state, h += state) {
    const float d = delta[k], x = d * u[k];
    Vec sum = {};
    for (int64_t n = 0; n < state; n += W) {
      const int64_t lanes = state - n;
      const Vec decay = exp2_below(d * load_part(A2 + n, lanes));
      const Vec next = decay * load_part(old + n, lanes) + x * load_part(B + n, lanes);
      store_part(h + n, next, lanes);
      sum += next * load_part(C + n, lanes);
    }
    y[k] = lane_sum(sum) + D[k] * u[k];
  }
}

// One step of the recurrence for this thread's channels, gated: y = (C h + D u) silu(z).
ISA_INLINE void scan_step(const RunArgs& run, const Layer& layer, const float* states, float* log, const Range& own,
                          const Shared& shared) {
  constexpr int64_t USUAL = 16;  // states, as in all published models
  const StepArgs& args = run.step;
  const int64_t N = args.state, dim = args.dim, projections = args.rank + 2 * N, size = dim * N;
  const int64_t channels = own.last - own.first, whole = N == USUAL ? channels / ROWS * ROWS : 0;
  states += run.begin * size, log += run.log_begin * size;
  for (int64_t b = 0; b < args.batch; ++b) {
    const float* B = shared.projected + b * projections + args.rank;
    const float* u = shared.xz + b * 2 * dim + own.first;
    const float* z = u + dim;
    float *delta = shared.delta + b * dim + own.first, *y = shared.y + b * dim + own.first;
    for (int64_t c = 0; c < channels; c += W)
      store_part(delta + c, softplus(load_part(delta + c, channels - c)), channels - c);
    const float *A2 = layer.A2 + own.first * N, *D = layer.D + own.first;
    const float* old = before<float>(states, log, b, run.length, size) + own.first * N;
    float* h = log + b * size + own.first * N;
    if (N == USUAL) scan_channels<USUAL / W>(whole, delta, u, A2, D, B, B + N, old, h, y);
    scan_any_channels(N, channels - whole, delta + whole, u + whole, A2 + whole * N, D + whole, B, B + N,
                      old + whole * N, h + whole * N, y + whole);
    for (int64_t c = 0; c < channels; c += W) {
      const Vec gate = load_part(z + c, channels - c);
      store_part(y + c, load_part(y + c, channels - c) * silu(gate), channels - c);
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
