// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What one thread does with a block of tokens. Included by for_each_isa.h once for every instruction set.

#include "prefill_products.h"
#include "scan_chunk.h"
#include "token_rows.h"

namespace ISA_NAMESPACE {

// Rounds the tokens' rows as the decoding step does, where the matrix is rounded.
ISA_INLINE void round_tokens(const Matrix& matrix, const float* x, int64_t row, const Layout& layout,
                             const Stage& stage, const Range& tokens) {
  round_rows(matrix, x, row, tokens, stage.bytes, layout.bytes, stage.scales);
}

// The rows `rows` of matrix * tokens + bias, into or onto `to`; the tokens have been rounded where that is due.
ISA_INLINE void multiply_block(const Matrix& matrix, const Range& rows, const float* x, int64_t x_row,
                               const Range& tokens, const Layout& layout, const Stage& stage, float* to,
                               int64_t to_row, bool add, const Bench& own) {
  const Stopwatch stopwatch(own.seconds);
  const Tokens in = {x + tokens.first * x_row, stage.bytes + tokens.first * layout.bytes, stage.scales + tokens.first,
                     x_row, layout.bytes, tokens.last - tokens.first};
  multiply_tokens(matrix, rows, in, to + tokens.first * to_row, to_row, add, own.desk);
}

// The convolution of one segment and block of channels at time t, activated. `weight` and `before` are [kernel][BLOCK].
ISA_INLINE Vec convolved(int64_t K, int64_t t, const float* x, int64_t x_row, const float* weight,
                         const float* before) {
  Vec sum = load(weight + K * BLOCK);  // the bias
  for (int64_t k = 0; k < K; ++k) {
    const int64_t at = t - K + 1 + k;
    sum += load(weight + k * BLOCK) * (at < 0 ? load(before + (K + at) * BLOCK) : load(x + at * x_row));
  }
  return sum * sigmoid(sum);
}

// Keeps the last inputs of a segment: for the next block, or in the source's window if it ends here.
template <class T>
ISA_INLINE void keep_window(int64_t K, int64_t channels, const float* window, T* to) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < K; ++k) from_float(window[k * BLOCK + c], to + c * K + k);
}

// x of some channels becomes its activated convolution, in place: time runs backwards, since later steps read earlier
// inputs.
ISA_INLINE void convolve_channels(const StepArgs& model, int64_t l, const Layout& layout, const Stage& stage,
                                  int64_t first, int64_t channels, const Bench& own) {
  const Layer& layer = model.layers[l];
  const int64_t K = model.kernel, row = layout.xz;
  float* weight = own.conv;                   // [kernel][BLOCK], then the bias
  float* before = weight + (K + 1) * BLOCK;   // [kernel][BLOCK], the inputs before the segment
  float* window = before + K * BLOCK;         // [kernel][BLOCK], the last inputs of the segment
  float* carry = stage.carry + l * K * model.dim + first;
  std::memset(weight, 0, sizeof(float) * (3 * K + 1) * BLOCK);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < K; ++k) weight[k * BLOCK + c] = layer.conv_weight[(first + c) * K + k];
    weight[K * BLOCK + c] = layer.conv_bias ? layer.conv_bias[first + c] : 0.0f;
  }
  for (int64_t s = 0; s < stage.block.segment_count; ++s) {
    const Segment& segment = stage.block.segments[s];
    float* x = stage.xz + segment.first * row + first;
    for (int64_t k = 0; k < K; ++k)
      if (segment.begins)
        std::memset(before + k * BLOCK, 0, sizeof(float) * channels);
      else
        std::memcpy(before + k * BLOCK, carry + k * model.dim, sizeof(float) * channels);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = segment.count - K + k;
      const float* from = at < 0 ? before + (K + at) * BLOCK : x + at * row;
      std::memcpy(window + k * BLOCK, from, sizeof(float) * channels);
    }
    const int64_t at = (segment.row * model.dim + first) * K;
    if (!segment.ends)
      for (int64_t k = 0; k < K; ++k)
        std::memcpy(carry + k * model.dim, window + k * BLOCK, sizeof(float) * channels);
    else if (model.window_format == BFLOAT16)
      keep_window(K, channels, window, static_cast<uint16_t*>(model.windows[l]) + at);
    else
      keep_window(K, channels, window, static_cast<float*>(model.windows[l]) + at);
    for (int64_t t = segment.count - 1; t >= 0; --t)
      for (int64_t c = 0; c < channels; c += W) {
        const Vec y = K == 4 && t >= 3 ? convolved(4, t, x + c, row, weight + c, before + c)
                                       : convolved(K, t, x + c, row, weight + c, before + c);
        store_part(x + t * row + c, y, channels - c);
      }
  }
}

// Time steps `t` to `t + steps` of some channels into the workspace; returns the largest step size.
ISA_INLINE float load_steps(const Layer& layer, const Layout& layout, const Stage& stage, int64_t t, int64_t steps,
                            int64_t first, int64_t channels, float* delta, float* input, float* y) {
  Vec largest = {};
  for (int64_t i = 0; i < steps; ++i) {
    const float* u_row = stage.xz + (t + i) * layout.xz + first;
    const float* delta_row = stage.y + (t + i) * layout.dim + first;
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t lanes = channels - c, at = i * BLOCK + c;
      const Vec d = softplus(load_part(delta_row + c, lanes)), u = load_part(u_row + c, lanes);
      largest = larger(d, largest);
      store(delta + at, d);
      store(input + at, d * u);
      store(y + at, load_part(layer.D + first + c, lanes) * u);
    }
  }
  return lane_max(largest);
}

// y = C h + D u of some channels, times silu(z) where `gated`, from the step sizes in its place.
ISA_INLINE void scan_channels(const StepArgs& model, int64_t l, const Layout& layout, const Stage& stage,
                              int64_t first, int64_t channels, bool gated, const Bench& own) {
  const Layer& layer = model.layers[l];
  const int64_t N = model.state;
  float* delta = own.scan;               // [CHUNK][BLOCK]
  float* input = delta + CHUNK * BLOCK;  // [CHUNK][BLOCK]
  float* y = input + CHUNK * BLOCK;      // [CHUNK][BLOCK]
  float* A2 = y + CHUNK * BLOCK;         // [state][BLOCK]
  float* h = A2 + N * BLOCK;             // [state][BLOCK]
  gather_states(A2, layer.A2 + first * N, channels, N, 1.0f);
  const float largest_A2 = largest_magnitude(A2, N * BLOCK);
  for (int64_t s = 0; s < stage.block.segment_count; ++s) {
    const Segment& segment = stage.block.segments[s];
    float* states = model.states[l] + (segment.row * model.dim + first) * N;
    if (segment.begins)
      std::memset(h, 0, sizeof(float) * N * BLOCK);
    else
      gather_states(h, states, channels, N, 1.0f);
    for (int64_t t = segment.first, end = t + segment.count; t < end; t += CHUNK) {
      const int64_t steps = end - t < CHUNK ? end - t : CHUNK;
      const float largest = load_steps(layer, layout, stage, t, steps, first, channels, delta, input, y);
      const float* B = stage.projected + t * layout.projected + model.rank;
      if (largest_A2 * largest <= 126.0f)
        forward_chunk<false>(steps, channels, N, delta, input, A2, B, layout.projected, B + N, layout.projected, h, y);
      else
        forward_chunk<true>(steps, channels, N, delta, input, A2, B, layout.projected, B + N, layout.projected, h, y);
      for (int64_t i = 0; i < steps; ++i) {
        const float* z_row = stage.xz + (t + i) * layout.xz + layout.z + first;
        float* to = stage.y + (t + i) * layout.dim + first;
        for (int64_t c = 0; c < channels; c += W) {
          Vec value = load(y + i * BLOCK + c);
          if (gated) {
            const Vec z = load_part(z_row + c, channels - c);
            value *= z * sigmoid(z);
          }
          store_part(to + c, value, channels - c);
        }
      }
    }
    scatter_states(states, h, channels, N);
  }
}

// The last layer's gate, projection and norm for the last tokens of sources that end in this block.
ISA_INLINE void finish_sources(const StepArgs& model, const Layout& layout, const Stage& stage, const Bench& own,
                               int64_t thread, int64_t threads) {
  const Layer& layer = model.layers[model.layer_count - 1];
  const TokenBlock& block = stage.block;
  const int64_t hidden = model.hidden, dim = model.dim;
  const Range channels = part_of(dim, thread, threads), outputs = part_of(hidden, thread, threads);
  const Range mine = part_of(block.end_count, thread, threads), all = {0, block.end_count};
  float* gate = stage.xz + layout.z;
  for (int64_t e = mine.first; e < mine.last; ++e) {
    float* residual = stage.last + e * layout.hidden;
    std::memcpy(residual, stage.residual + block.ends[e] * layout.hidden, sizeof(float) * hidden);
    rms_norm(residual, layer.norm, hidden, 1, model.epsilon, stage.normed + e * layout.hidden);
  }
  round_tokens(layer.in_proj, stage.normed, layout.hidden, layout, stage, mine);
  meet();
  const Range gates = {dim + channels.first, dim + channels.last};
  multiply_block(layer.in_proj, gates, stage.normed, layout.hidden, all, layout, stage, gate - dim, layout.xz, false,
                 own);
  for (int64_t e = 0; e < block.end_count; ++e) {
    const float* y = stage.y + block.ends[e] * layout.dim;
    float* z = gate + e * layout.xz;
    for (int64_t c = channels.first; c < channels.last; c += W) {
      const int64_t lanes = channels.last - c;
      const Vec v = load_part(z + c, lanes);
      store_part(z + c, load_part(y + c, lanes) * (v * sigmoid(v)), lanes);
    }
  }
  meet();
  round_tokens(layer.out_proj, gate, layout.xz, layout, stage, mine);
  meet();
  multiply_block(layer.out_proj, outputs, gate, layout.xz, all, layout, stage, stage.last, layout.hidden, true, own);
  meet();
  for (int64_t e = mine.first; e < mine.last; ++e)
    rms_norm(stage.last + e * layout.hidden, model.norm, hidden, 1, model.epsilon,
             model.hidden_out + block.end_rows[e] * hidden);
}

ISA_TARGET static void read_block(const StepArgs& model, const Layout& layout, const Stage& stage, const Bench& own,
                                  int64_t thread, int64_t threads) {
  const int64_t hidden = model.hidden, dim = model.dim, projections = model.rank + 2 * model.state;
  const Range channels = part_of(dim, thread, threads), outputs = part_of(hidden, thread, threads);
  const Range mine = part_of(stage.block.count, thread, threads), all = {0, stage.block.count};
  for (int64_t t = mine.first; t < mine.last; ++t)
    embed(model, stage.block.ids[t], {0, hidden}, stage.residual + t * layout.hidden);
  for (int64_t l = 0; l < model.layer_count; ++l) {
    const Layer& layer = model.layers[l];
    const bool last = l + 1 == model.layer_count;
    for (int64_t t = mine.first; t < mine.last; ++t)
      rms_norm(stage.residual + t * layout.hidden, layer.norm, hidden, 1, model.epsilon,
               stage.normed + t * layout.hidden);
    round_tokens(layer.in_proj, stage.normed, layout.hidden, layout, stage, mine);
    meet();
    for (int64_t c = channels.first; c < channels.last; c += BLOCK) {
      const int64_t end = c + BLOCK < channels.last ? c + BLOCK : channels.last;
      multiply_block(layer.in_proj, {c, end}, stage.normed, layout.hidden, all, layout, stage, stage.xz, layout.xz,
                     false, own);
      convolve_channels(model, l, layout, stage, c, end - c, own);
      if (!last)
        multiply_block(layer.in_proj, {dim + c, dim + end}, stage.normed, layout.hidden, all, layout, stage,
                       stage.xz + layout.z - dim, layout.xz, false, own);
    }
    meet();
    round_tokens(layer.x_proj, stage.xz, layout.xz, layout, stage, mine);
    multiply_block(layer.x_proj, {0, projections}, stage.xz, layout.xz, mine, layout, stage, stage.projected,
                   layout.projected, false, own);
    meet();
    for (int64_t c = channels.first; c < channels.last; c += BLOCK) {
      const int64_t end = c + BLOCK < channels.last ? c + BLOCK : channels.last;
      multiply_block(layer.dt_proj, {c, end}, stage.projected, layout.projected, all, layout, stage, stage.y,
                     layout.dim, false, own);
      scan_channels(model, l, layout, stage, c, end - c, !last, own);
    }
    meet();
    if (last) break;
    round_tokens(layer.out_proj, stage.y, layout.dim, layout, stage, mine);
    meet();
    multiply_block(layer.out_proj, outputs, stage.y, layout.dim, all, layout, stage, stage.residual, layout.hidden,
                   true, own);
    meet();
  }
  if (stage.block.end_count) finish_sources(model, layout, stage, own, thread, threads);
}

}  // namespace ISA_NAMESPACE
