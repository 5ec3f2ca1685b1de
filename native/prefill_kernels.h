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

// Magnitudes of a token's channels, as bits; and what each thread remembers of them.
ISA_INLINE IntVec seen(Vec x, const float* stored, int64_t lanes) {  // those of the first lanes of x, stored just now
  return magnitude_bits(lanes < W ? load_part(stored, lanes) : x);
}
ISA_INLINE void note(const Bench& own, int64_t t, IntVec seen) {
  static_assert(W <= WIDEST_PANEL / 2, "every lane has its place");
  store(own.most + t * W, (Vec)larger(seen, (IntVec)load(own.most + t * W)));
}

// What a thread notes of rows to be multiplied with this matrix, after what it may have noted before; or nothing.
ISA_INLINE const Bench* note_for(const Matrix& matrix, const Stage& stage, const Bench& own) {
  if (!takes_bytes(matrix.format)) return nullptr;
  std::memset(own.most, 0, sizeof(float) * stage.block.count * W);
  return &own;
}

// Rounds all tokens' channels as the decoding step does a row, where the matrix is rounded: the threads tell each other
// what they noted, and each rounds its share.
ISA_INLINE void round_channels(const Matrix& matrix, const float* x, const Layout& layout, const Stage& stage,
                               int64_t thread, int64_t threads, const Bench& own) {
  if (!takes_bytes(matrix.format)) return;
  const int64_t columns = matrix.columns, count = stage.block.count;
  const Range channels = share_of(columns, thread, threads);
  for (int64_t t = 0; t < count; ++t) stage.most[thread * count + t] = lane_max((IntVec)load(own.most + t * W));
  meet();
  for (int64_t t = 0; t < count; ++t) {
    int32_t most = 0;
    for (int64_t i = 0; i < threads; ++i) most = std::max(most, stage.most[i * count + t]);
    float bound;
    std::memcpy(&bound, &most, sizeof bound);
    own.most[t] = byte_factor(bound);
    if (channels.first == 0 && channels.last > 0) stage.scales[t] = byte_scale(bound);
  }
  for (int64_t c = channels.first; c < channels.last; c += BLOCK) {
    const int64_t some = columns - c < BLOCK ? columns - c : BLOCK;
    const int64_t room = c + BLOCK < columns ? BLOCK : filled(columns) - c;
    for (int64_t t = 0; t < count; ++t)
      write_bytes(x + layout.at(c) + t * BLOCK, some, room, own.most[t], stage.bytes + t * layout.bytes + c);
  }
}

// A token's numbers for a product: floats from one row to the next, and from a block of columns to the next.
struct Rows {
  const float* x;
  int64_t row, apart = BLOCK;
};

// The rows `rows` of matrix * tokens + bias, into or onto `to`; the tokens have been rounded where that is due.
ISA_INLINE void multiply_block(const Matrix& matrix, const Range& rows, const Rows& from, const Range& tokens,
                               const Layout& layout, const Stage& stage, float* to, int64_t to_row, bool add,
                               const Bench& own) {
  const Stopwatch stopwatch(own.seconds);
  const int64_t first = tokens.first;
  const Tokens in = {from.x + first * from.row, stage.bytes + first * layout.bytes, stage.scales + first,
                     from.row, layout.bytes, tokens.last - first, from.apart};
  multiply_tokens(matrix, rows, in, to + tokens.first * to_row, to_row, add, own.desk);
}

// The activated convolution of W channels through a segment, in place: time runs backwards, since later steps read
// earlier inputs. `weight` and `before` are [kernel][BLOCK], the bias follows the weights. KNOWN is the kernel, or 0.
template <int KNOWN>
ISA_INLINE void convolve_lanes(int64_t kernel, const Segment& segment, int64_t lanes, const float* weight,
                               const float* before, float* x, const Bench* noting) {
  const int64_t K = KNOWN ? KNOWN : kernel;
  Vec factor[KNOWN + 1], recent[KNOWN + 1];
  const auto input = [&](int64_t at) { return at < 0 ? before + (K + at) * BLOCK : x + at * BLOCK; };
  for (int k = 0; k < KNOWN; ++k) {
    factor[k] = load(weight + k * BLOCK);
    recent[k] = load(input(segment.count - K + k));
  }
  const Vec bias = load(weight + K * BLOCK);
  for (int64_t t = segment.count - 1; t >= 0; --t) {
    Vec sum = bias;
    if (KNOWN) {
      for (int k = 0; k < KNOWN; ++k) sum += factor[k] * recent[k];
      for (int k = KNOWN - 1; k > 0; --k) recent[k] = recent[k - 1];
      recent[0] = load(input(t - K));
    } else {
      for (int64_t k = 0; k < K; ++k) sum += load(weight + k * BLOCK) * load(input(t - K + 1 + k));
    }
    const Vec y = silu(sum);
    store(x + t * BLOCK, y);
    if (noting) note(*noting, segment.first + t, seen(y, x + t * BLOCK, lanes));
  }
}

// Keeps the last inputs of a segment: for the next block, or in the source's window if it ends here.
template <class T>
ISA_INLINE void keep_window(int64_t K, int64_t channels, const float* window, T* to) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < K; ++k) from_float(window[k * BLOCK + c], to + c * K + k);
}

// x of some channels of one block becomes its activated convolution.
ISA_INLINE void convolve_channels(const StepArgs& model, int64_t l, const Layout& layout, const Stage& stage,
                                  int64_t first, int64_t channels, const Bench* noting, const Bench& own) {
  const Layer& layer = model.layers[l];
  const int64_t K = model.kernel;
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
    float* x = stage.x + layout.at(first) + segment.first * BLOCK;
    for (int64_t k = 0; k < K; ++k)
      if (segment.begins)
        std::memset(before + k * BLOCK, 0, sizeof(float) * channels);
      else
        std::memcpy(before + k * BLOCK, carry + k * model.dim, sizeof(float) * channels);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = segment.count - K + k;
      const float* from = at < 0 ? before + (K + at) * BLOCK : x + at * BLOCK;
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
    for (int64_t c = 0; c < channels; c += W)
      K == 4 ? convolve_lanes<4>(K, segment, channels - c, weight + c, before + c, x + c, noting)
             : convolve_lanes<0>(K, segment, channels - c, weight + c, before + c, x + c, noting);
  }
}

// Time steps `t` to `t + steps` of some channels into the workspace; returns the largest step size. D is [BLOCK]. What
// stands beside the last block's channels may be anything, and must not be taken for a step size.
ISA_INLINE float load_steps(const Layout& layout, const Stage& stage, int64_t t, int64_t steps, int64_t first,
                            int64_t channels, const float* D, float* delta, float* input, float* y) {
  Vec largest = {};
  for (int64_t i = 0; i < steps; ++i) {
    const float* u_row = stage.x + layout.at(first) + (t + i) * BLOCK;
    const float* delta_row = stage.y + layout.at(first) + (t + i) * BLOCK;
    for (int64_t c = 0; c < channels; c += W) {
      if (c % LINE == 0) __builtin_prefetch(u_row + CHUNK * BLOCK + c);
      const int64_t at = i * BLOCK + c;
      const Vec d = softplus(load_part(delta_row + c, channels - c)), u = load(u_row + c);
      largest = larger(d, largest);
      store(delta + at, d);
      store(input + at, d * u);
      store(y + at, load(D + c) * u);
    }
  }
  return largest_lane(largest);
}

// y = C h + D u of some channels, times silu(z) where `gated`, from the step sizes in its place.
ISA_INLINE void scan_channels(const StepArgs& model, int64_t l, const Layout& layout, const Stage& stage,
                              int64_t first, int64_t channels, bool gated, const Bench* noting, const Bench& own) {
  const Layer& layer = model.layers[l];
  const int64_t N = model.state;
  float* delta = own.scan;               // [CHUNK][BLOCK]
  float* input = delta + CHUNK * BLOCK;  // [CHUNK][BLOCK]
  float* y = input + CHUNK * BLOCK;      // [CHUNK][BLOCK]
  float* A2 = y + CHUNK * BLOCK;         // [state][BLOCK]
  float* h = A2 + N * BLOCK;             // [state][BLOCK]
  float* D = h + N * BLOCK;              // [BLOCK]
  for (int64_t c = 0; c < BLOCK; ++c) D[c] = c < channels ? layer.D[first + c] : 0.0f;
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
      const float largest = load_steps(layout, stage, t, steps, first, channels, D, delta, input, y);
      const float* B = stage.projected + t * layout.projected + model.rank;
      if (largest_A2 * largest <= -LEAST)
        forward_chunk<false>(steps, channels, N, delta, input, A2, B, layout.projected, B + N, layout.projected, h, y);
      else
        forward_chunk<true>(steps, channels, N, delta, input, A2, B, layout.projected, B + N, layout.projected, h, y);
      for (int64_t i = 0; i < steps; ++i) {
        const float* z_row = stage.z + layout.at(first) + (t + i) * BLOCK;
        float* to = stage.y + layout.at(first) + (t + i) * BLOCK;
        IntVec most = {};
        for (int64_t c = 0; c < channels; c += W) {
          Vec value = load(y + i * BLOCK + c);
          if (gated) {
            const Vec z = load(z_row + c);
            value *= silu(z);
          }
          store(to + c, value);
          most = larger(seen(value, to + c, channels - c), most);
        }
        if (noting) note(*noting, t + i, most);
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
  for (int64_t e = mine.first; e < mine.last; ++e) {
    float* residual = stage.last + e * layout.hidden;
    std::memcpy(residual, stage.residual + block.ends[e] * layout.hidden, sizeof(float) * hidden);
    rms_norm(residual, layer.norm, hidden, 1, model.epsilon, stage.normed + e * layout.hidden);
  }
  round_tokens(layer.in_proj, stage.normed, layout.hidden, layout, stage, mine);
  meet();
  const Range gates = {dim + channels.first, dim + channels.last};
  multiply_block(layer.in_proj, gates, {stage.normed, layout.hidden}, all, layout, stage, stage.gate - dim,
                 layout.dim, false, own);
  for (int64_t e = 0; e < block.end_count; ++e) {
    const float* y = stage.y + block.ends[e] * BLOCK;
    float* z = stage.gate + e * layout.dim;
    for (int64_t c = channels.first; c < channels.last; c += W) {
      const int64_t lanes = channels.last - c;
      const Vec v = load_part(z + c, lanes);
      store_part(z + c, load_part(y + layout.at(c), lanes) * silu(v), lanes);
    }
  }
  meet();
  round_tokens(layer.out_proj, stage.gate, layout.dim, layout, stage, mine);
  meet();
  multiply_block(layer.out_proj, outputs, {stage.gate, layout.dim}, all, layout, stage, stage.last,
                 layout.hidden, true, own);
  meet();
  for (int64_t e = mine.first; e < mine.last; ++e)
    rms_norm(stage.last + e * layout.hidden, model.norm, hidden, 1, model.epsilon,
             model.hidden_out + block.end_rows[e] * hidden);
}

ISA_TARGET static void read_block(const StepArgs& model, const Layout& layout, const Stage& stage, const Bench& own,
                                  int64_t thread, int64_t threads) {
  const int64_t hidden = model.hidden, dim = model.dim, projections = model.rank + 2 * model.state;
  const Range mine = part_of(stage.block.count, thread, threads), all = {0, stage.block.count};
  for (int64_t t = mine.first; t < mine.last; ++t)
    embed(model, stage.block.ids[t], {0, hidden}, stage.residual + t * layout.hidden);
  for (int64_t l = 0; l < model.layer_count; ++l) {
    const Layer& layer = model.layers[l];
    const bool last = l + 1 == model.layer_count;
    for (Pieces* pieces : {stage.inputs, stage.scans, stage.outputs}) pieces[thread].taken = 0;
    for (int64_t t = mine.first; t < mine.last; ++t) {
      rms_norm(stage.residual + t * layout.hidden, layer.norm, hidden, 1, model.epsilon,
               stage.normed + t * layout.hidden);
      round_tokens(layer.in_proj, stage.normed, layout.hidden, layout, stage, {t, t + 1});
    }
    meet();
    const Bench* noting = note_for(layer.x_proj, stage, own);
    for (Range c; take_piece(stage.inputs, dim, thread, threads, LEAST_PIECE, false, c);) {
      const int64_t to = layout.at(c.first) - c.first;
      multiply_block(layer.in_proj, c, {stage.normed, layout.hidden}, all, layout, stage, stage.x + to, BLOCK,
                     false, own);
      convolve_channels(model, l, layout, stage, c.first, c.last - c.first, noting, own);
      if (!last)
        multiply_block(layer.in_proj, {dim + c.first, dim + c.last}, {stage.normed, layout.hidden}, all, layout,
                       stage, stage.z + to - dim, BLOCK, false, own);
    }
    round_channels(layer.x_proj, stage.x, layout, stage, thread, threads, own);
    meet();
    multiply_block(layer.x_proj, {0, projections}, {stage.x, BLOCK, layout.apart}, mine, layout, stage, stage.projected,
                   layout.projected, false, own);
    meet();
    noting = last ? nullptr : note_for(layer.out_proj, stage, own);
    for (Range c; take_piece(stage.scans, dim, thread, threads, LEAST_PIECE, true, c);) {
      multiply_block(layer.dt_proj, c, {stage.projected, layout.projected}, all, layout, stage,
                     stage.y + layout.at(c.first) - c.first, BLOCK, false, own);
      scan_channels(model, l, layout, stage, c.first, c.last - c.first, !last, noting, own);
    }
    if (!last) round_channels(layer.out_proj, stage.y, layout, stage, thread, threads, own);
    meet();
    if (last) break;
    for (Range r; take_piece(stage.outputs, hidden, thread, threads, LEAST_PIECE, false, r);)
      multiply_block(layer.out_proj, r, {stage.y, BLOCK, layout.apart}, all, layout, stage, stage.residual, layout.hidden,
                     true, own);
    meet();
  }
  if (stage.block.end_count) finish_sources(model, layout, stage, own, thread, threads);
}

}  // namespace ISA_NAMESPACE
