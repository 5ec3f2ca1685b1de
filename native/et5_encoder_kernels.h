// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What one thread does in ET5's encoder. Included by for_each_isa.h once for every instruction set.

#include "et5_rows.h"
#include "prefill_products.h"

namespace ISA_NAMESPACE {

// Lays the values of `keys` keys in panels: to is [panels][keys][PANEL], zero beyond the width.
ISA_INLINE void lay_out_values(const float* values, int64_t row, int64_t keys, int64_t width, float* to) {
  for (int64_t c = 0; c < width; c += PANEL)
    for (int64_t j = 0; j < keys; ++j, to += PANEL)
      for (int64_t i = 0; i < PANEL; i += W)
        store(to + i, c + i < width ? load_part(values + j * row + c + i, width - c - i) : Vec{});
}

// Turns one query's scores (keys) into weights relative to the highest score so far, and what it has summed alike.
ISA_INLINE void weigh(float* scores, int64_t keys, int64_t width, float* sums, float& top, float& weights) {
  float highest = top;
  int64_t j = 0;
  Vec most = splat(top);
  for (; j + W <= keys; j += W) most = larger(load(scores + j), most);
  for (; j < keys; ++j) highest = scores[j] > highest ? scores[j] : highest;
  float lanes[W];
  store(lanes, most);
  for (int i = 0; i < W; ++i) highest = lanes[i] > highest ? lanes[i] : highest;
  if (highest > top) {
    const Vec factor = exp(splat(top - highest));
    for (int64_t i = 0; i < width; i += W) store(sums + i, load(sums + i) * factor);
    weights *= factor[0];
    top = highest;
  }
  Vec total = {};
  for (j = 0; j + W <= keys; j += W) {
    const Vec weight = exp(load(scores + j) - top);
    store(scores + j, weight);
    total += weight;
  }
  if (j < keys) {
    float part[W] = {};
    store(part, exp(load_part(scores + j, keys - j) - top));
    for (int64_t i = 0; i < keys - j; ++i) scores[j + i] = part[i], weights += part[i];
  }
  weights += lane_sum(total);
}

// Queries `first` to `first + count` of one head of a source look at all its `length` keys; q, k and v are the source's
// and the head's. The result takes the place of the queries.
ISA_INLINE void attend(const EncoderArgs& args, const Layout& layout, int64_t head, int64_t length, int64_t first,
                       int64_t count, float* q, const float* k, const float* v, const Bench& own) {
  const int64_t width = args.model.width, wide = padded(width), row = layout.inner, score_row = spread(KEYS);
  const float* bias = args.distance_bias + head * (2 * args.longest - 1) + args.longest - 1;
  float* query = q + first * row;
  std::memset(own.sums, 0, sizeof(float) * count * wide);
  for (int64_t t = 0; t < count; ++t) own.tops[t] = -INFINITY, own.weights[t] = 0.0f;
  for (int64_t start = 0; start < length; start += KEYS) {
    const int64_t keys = length - start < KEYS ? length - start : KEYS;
    for (int64_t t = 0; t < count; ++t)
      std::memcpy(own.scores + t * score_row, bias + start - first - t, sizeof(float) * keys);
    for (int64_t j = 0; j < keys; j += PANEL)
      for (int64_t c = 0; c < width; c += DEPTH) {
        const int64_t depth = width - c < DEPTH ? width - c : DEPTH, rows = keys - j < PANEL ? keys - j : PANEL;
        lay_out(k + (start + j) * row + c, row, rows, 0, depth, own.desk.panel);
        float_tiles(own.desk.panel, depth, query + c, row, count, own.scores + j, score_row);
      }
    for (int64_t t = 0; t < count; ++t)
      weigh(own.scores + t * score_row, keys, wide, own.sums + t * wide, own.tops[t], own.weights[t]);
    lay_out_values(v + start * row, row, keys, width, own.values);
    for (int64_t c = 0; c < width; c += PANEL)
      float_tiles(own.values + c * keys, keys, own.scores, score_row, count, own.sums + c, wide);
  }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < width; i += W)
      store_part(query + t * row + i, load(own.sums + t * wide + i) / own.weights[t], width - i);
}

// Rounds this thread's rows of the block where the matrix is rounded.
ISA_INLINE void round_block(const Matrix& matrix, const float* x, int64_t row, const Layout& layout, const Stage& stage,
                            const Range& mine) {
  round_rows(matrix, x, row, mine, stage.bytes, layout.bytes, stage.scales);
}

// Norm, and rounding, of the block's tokens.
ISA_INLINE void prepare_block(const Et5Model& model, const float* norm, const Matrix& matrix, const float* residual,
                              const Layout& layout, const Stage& stage, const Range& mine) {
  for (int64_t t = mine.first; t < mine.last; ++t)
    rms_norm(residual + t * model.hidden, norm, model.hidden, 1, model.epsilon, stage.normed + t * layout.hidden);
  round_block(matrix, stage.normed, layout.hidden, layout, stage, mine);
}

// Everything of a layer but attention itself, for tokens `first` to `first + count`: what follows attention in layer
// `before`, if there is one, and what precedes it in layer `after`, or else the final norm.
ISA_INLINE void pass_block(const EncoderArgs& args, const Et5Layer* before, const Et5Layer* after, int64_t first,
                           int64_t count, const Layout& layout, const Stage& stage, const Bench& own, int64_t thread,
                           int64_t threads) {
  const Et5Model& model = args.model;
  const int64_t hidden = model.hidden, inner = model.heads * model.width, ff = model.ff, at = first * layout.inner;
  const Range outputs = part_of(hidden, thread, threads), inners = part_of(inner, thread, threads);
  const Range ffs = part_of(ff, thread, threads), mine = part_of(count, thread, threads);
  float* residual = args.states + first * hidden;
  const auto tokens = [&](const float* x, int64_t row) {
    return Tokens{x, stage.bytes, stage.scales, row, layout.bytes, count};
  };
  if (before) {
    round_block(before->o, stage.q + at, layout.inner, layout, stage, mine);
    meet();
    multiply_tokens(before->o, outputs, tokens(stage.q + at, layout.inner), residual, hidden, true, own.desk);
    meet();
    prepare_block(model, before->ff_norm, before->wi, residual, layout, stage, mine);
    meet();
    for (int64_t i = ffs.first; i < ffs.last; i += BLOCK) {
      const Range part = {i, i + BLOCK < ffs.last ? i + BLOCK : ffs.last};
      multiply_tokens(before->wi, part, tokens(stage.normed, layout.hidden), stage.ff, layout.ff, false, own.desk);
      if (before->gate.data)
        multiply_tokens(before->gate, part, tokens(stage.normed, layout.hidden), stage.gate, layout.ff, false, own.desk);
      for (int64_t t = 0; t < count; ++t)
        activate(part, model.activation, before->gate.data ? stage.gate + t * layout.ff : nullptr,
                 stage.ff + t * layout.ff);
    }
    meet();
    round_block(before->wo, stage.ff, layout.ff, layout, stage, mine);
    meet();
    multiply_tokens(before->wo, outputs, tokens(stage.ff, layout.ff), residual, hidden, true, own.desk);
    meet();
  } else {
    for (int64_t t = mine.first; t < mine.last; ++t)
      embed(model, args.ids[first + t], {0, hidden}, residual + t * hidden);
  }
  if (!after) {
    for (int64_t t = mine.first; t < mine.last; ++t)
      rms_norm(residual + t * hidden, model.norm, hidden, 1, model.epsilon, residual + t * hidden);
    return;
  }
  prepare_block(model, after->norm, after->q, residual, layout, stage, mine);
  meet();
  const Tokens normed = tokens(stage.normed, layout.hidden);
  multiply_tokens(after->q, inners, normed, stage.q + at, layout.inner, false, own.desk);
  multiply_tokens(after->k, inners, normed, stage.k + at, layout.inner, false, own.desk);
  multiply_tokens(after->v, inners, normed, stage.v + at, layout.inner, false, own.desk);
  meet();
}

ISA_TARGET static void encode(const EncoderArgs& args, int64_t tokens, const Layout& layout, const Stage& stage,
                              const Bench& own, int64_t thread, int64_t threads) {
  const Et5Model& model = args.model;
  for (int64_t l = 0; l <= model.layer_count; ++l) {
    const Et5Layer *before = l > 0 ? model.layers + l - 1 : nullptr;
    const Et5Layer *after = l < model.layer_count ? model.layers + l : nullptr;
    for (int64_t t = 0; t < tokens; t += TOKENS)
      pass_block(args, before, after, t, tokens - t < TOKENS ? tokens - t : TOKENS, layout, stage, own, thread, threads);
    if (!after) return;
    int64_t at = 0, item = 0;
    for (int64_t s = 0; s < args.sources; at += args.lengths[s++])
      for (int64_t head = 0; head < model.heads; ++head)
        for (int64_t first = 0; first < args.lengths[s]; first += QUERIES, ++item) {
          if (item % threads != thread) continue;
          const int64_t left = args.lengths[s] - first, begin = at * layout.inner + head * model.width;
          attend(args, layout, head, args.lengths[s], first, left < QUERIES ? left : QUERIES, stage.q + begin,
                 stage.k + begin, stage.v + begin, own);
        }
    meet();
  }
}

}  // namespace ISA_NAMESPACE
