// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What one thread does in a pass of ET5's decoder. Included by for_each_isa.h once for every instruction set.

#include "et5_rows.h"
#include "prefill_products.h"

namespace ISA_NAMESPACE {

// scores (count) to softmax, in place. Scores of minus infinity become 0; if all are, so does everything.
ISA_INLINE void softmax(float* scores, int64_t count) {
  Vec most = splat(-INFINITY), total = {};
  int64_t j = 0;
  for (; j + W <= count; j += W) most = larger(load(scores + j), most);
  float lanes[W], top = -INFINITY, sum = 0.0f;
  store(lanes, most);
  for (int i = 0; i < W; ++i) top = lanes[i] > top ? lanes[i] : top;
  for (; j < count; ++j) top = scores[j] > top ? scores[j] : top;
  for (j = 0; j < count; j += W) {
    const Vec x = load_part(scores + j, count - j), weight = x == splat(-INFINITY) ? Vec{} : exp(x - top);
    store_part(scores + j, weight, count - j);
    if (j + W <= count) total += weight;
  }
  for (j = count / W * W; j < count; ++j) sum += scores[j];
  sum += lane_sum(total);
  const float factor = sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f;
  for (j = 0; j < count; j += W) store_part(scores + j, load_part(scores + j, count - j) * factor, count - j);
}

// C vectors of the columns of N positions' results, to which values (count, width), weighted by their scores, are added.
template <int N, int C>
ISA_INLINE void blend_tile(const float* scores, int64_t score_row, const float* values, int64_t count, int64_t width,
                           float* to, int64_t to_row) {
  Vec sum[N][C];
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) sum[n][c] = load(to + n * to_row + c * W);
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < C; ++c) {
      const Vec value = load(values + j * width + c * W);
      for (int n = 0; n < N; ++n) sum[n][c] += scores[n * score_row + j] * value;
    }
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) store(to + n * to_row + c * W, sum[n][c]);
}
template <int N>
ISA_INLINE void blend(const float* scores, int64_t score_row, const float* values, int64_t count, int64_t width,
                      float* to, int64_t to_row) {
  constexpr int MOST = N == 1 ? 8 : 4;  // vectors whose sums stay in registers
  int64_t i = 0;
  for (; i + MOST * W <= width; i += MOST * W)
    blend_tile<N, MOST>(scores, score_row, values + i, count, width, to + i, to_row);
  for (; i + W <= width; i += W) blend_tile<N, 1>(scores, score_row, values + i, count, width, to + i, to_row);
  for (int n = 0; n < N && i < width; ++n) {
    Vec sum = load_part(to + n * to_row + i, width - i);
    for (int64_t j = 0; j < count; ++j) sum += scores[n * score_row + j] * load_part(values + j * width + i, width - i);
    store_part(to + n * to_row + i, sum, width - i);
  }
}

// What the new positions of one row see with one head: keys and values (count, width) at the first of them, and one more
// at each that follows if `grows`. `bias` is that of the first position, `mask` says which keys there are; or null.
struct View {
  const float *keys, *values, *bias;
  const uint8_t* mask;
  int64_t count;
  bool grows;
};

// N positions' scores of some keys (count, width), their queries being `row` floats apart.
template <int N>
ISA_INLINE void score(const float* keys, int64_t count, int64_t width, const float* queries, int64_t row, float* scores,
                      int64_t score_row) {
  const Matrix matrix = {keys, nullptr, nullptr, nullptr, count, width, FLOAT32};
  multiply_rows<FLOAT32>(matrix, {0, count}, {queries, nullptr, nullptr, row, 0, N}, scores, score_row, false);
}

// Up to TOGETHER positions from the t-th on look, their queries and what comes of them being `row` floats apart. More than
// two take keys and values NEAR at a time, so that memory brings each only once.
ISA_INLINE void look(const View& view, int64_t t, int64_t positions, int64_t width, int64_t row, const float* queries,
                     float* to, float* scores, int64_t score_row) {
  const int64_t most = view.grows ? view.count + t + positions - 1 : view.count, pairs = positions / 2 * 2;
  const int64_t near = positions > 2 ? NEAR : most;
  for (int64_t j = 0; j < most; j += near) {
    const float* keys = view.keys + j * width;
    const int64_t count = most - j < near ? most - j : near;
    for (int64_t n = 0; n < pairs; n += 2)
      score<2>(keys, count, width, queries + (t + n) * row, row, scores + n * score_row + j, score_row);
    if (pairs < positions)
      score<1>(keys, count, width, queries + (t + pairs) * row, row, scores + pairs * score_row + j, score_row);
  }
  for (int64_t n = 0; n < positions; ++n) {
    float* mine = scores + n * score_row;
    const int64_t seen = view.grows ? view.count + t + n : view.count;
    for (int64_t j = 0; view.bias && j < seen; ++j) mine[j] += view.bias[j - t - n];
    for (int64_t j = 0; view.mask && j < seen; ++j) mine[j] = view.mask[j] ? mine[j] : -INFINITY;
    softmax(mine, seen);
    for (int64_t j = seen; j < most; ++j) mine[j] = 0.0f;
    std::memset(to + (t + n) * row, 0, sizeof(float) * width);
  }
  for (int64_t j = 0; j < most; j += near) {
    const float* values = view.values + j * width;
    const int64_t count = most - j < near ? most - j : near;
    for (int64_t n = 0; n < pairs; n += 2)
      blend<2>(scores + n * score_row + j, score_row, values, count, width, to + (t + n) * row, row);
    if (pairs < positions)
      blend<1>(scores + pairs * score_row + j, score_row, values, count, width, to + (t + pairs) * row, row);
  }
}

ISA_INLINE void look_all(const View& view, const Et5Args& args, int64_t b, int64_t h, const Et5Shared& shared,
                         float* scores, int64_t score_row) {
  const int64_t width = args.model.width, row = args.model.heads * width, first = b * args.length * row + h * width;
  for (int64_t t = 0; t < args.length; t += TOGETHER) {
    const int64_t positions = args.length - t < TOGETHER ? args.length - t : TOGETHER;
    look(view, t, positions, width, row, shared.q + first, shared.context + first, scores, score_row);
  }
}

// The new positions of one head of one row look at those up to themselves.
ISA_INLINE void attend_own(const Et5Args& args, const Et5Layer& layer, int64_t b, int64_t h, const Et5Shared& shared,
                           float* scores, int64_t score_row) {
  const int64_t heads = args.model.heads, width = args.model.width, inner = heads * width;
  const int64_t first = b * args.length * inner + h * width;
  const int64_t at = (args.rows[b] * heads + h) * args.capacity * width;
  float *keys = layer.keys + at, *values = layer.values + at;
  for (int64_t t = 0; t < args.length; ++t) {
    std::memcpy(keys + (args.start + t) * width, shared.k + first + t * inner, sizeof(float) * width);
    std::memcpy(values + (args.start + t) * width, shared.v + first + t * inner, sizeof(float) * width);
  }
  const float* bias = args.distance_bias + h * args.bias_row + args.length - 1;
  look_all({keys, values, bias, nullptr, args.start + 1, true}, args, b, h, shared, scores, score_row);
}

// They look at the source.
ISA_INLINE void attend_source(const Et5Args& args, const Et5Layer& layer, int64_t b, int64_t h,
                              const Et5Shared& shared, float* scores, int64_t score_row) {
  const int64_t source = args.sources[b];
  const int64_t at = (source * args.model.heads + h) * args.source_length * args.model.width;
  const View view = {layer.cross_keys + at, layer.cross_values + at, nullptr, args.mask + source * args.source_length,
                     args.source_length, false};
  look_all(view, args, b, h, shared, scores, score_row);
}

ISA_TARGET static void run_pass(const Et5Args& args, const Et5Shared& shared, const Own& own, float* scores,
                                int64_t score_row, int64_t thread, int64_t threads) {
  const Et5Model& model = args.model;
  const int64_t tokens = args.batch * args.length, hidden = model.hidden, inner = model.heads * model.width;
  const int64_t ff = model.ff, pairs = args.batch * model.heads;
  const Range outputs = part_of(hidden, thread, threads), inners = part_of(inner, thread, threads);
  const Range ffs = part_of(ff, thread, threads);
  const Range heads = {pairs * thread / threads, pairs * (thread + 1) / threads};
  for (int64_t n = 0; n < tokens; ++n) embed(model, args.id(n), outputs, shared.residual + n * hidden);
  meet();
  for (int64_t l = 0; l < model.layer_count; ++l) {
    const Et5Layer& layer = model.layers[l];
    rms_norm(shared.residual, layer.norm, hidden, tokens, model.epsilon, own.x);
    const Input normed = prepare(layer.q, own.x, hidden, tokens, own);
    multiply(layer.q, inners, normed, shared.q, inner, false, own.desk);
    multiply(layer.k, inners, normed, shared.k, inner, false, own.desk);
    multiply(layer.v, inners, normed, shared.v, inner, false, own.desk);
    meet();
    for (int64_t i = heads.first; i < heads.last; ++i)
      attend_own(args, layer, i / model.heads, i % model.heads, shared, scores, score_row);
    meet();
    multiply(layer.o, outputs, prepare(layer.o, shared.context, inner, tokens, own), shared.residual, hidden, true, own.desk);
    meet();
    rms_norm(shared.residual, layer.cross_norm, hidden, tokens, model.epsilon, own.x);
    multiply(layer.cross_q, inners, prepare(layer.cross_q, own.x, hidden, tokens, own), shared.q, inner, false, own.desk);
    meet();
    for (int64_t i = heads.first; i < heads.last; ++i)
      attend_source(args, layer, i / model.heads, i % model.heads, shared, scores, score_row);
    meet();
    multiply(layer.cross_o, outputs, prepare(layer.cross_o, shared.context, inner, tokens, own), shared.residual,
             hidden, true, own.desk);
    meet();
    rms_norm(shared.residual, layer.ff_norm, hidden, tokens, model.epsilon, own.x);
    const Input fed = prepare(layer.wi, own.x, hidden, tokens, own);
    multiply(layer.wi, ffs, fed, shared.ff, ff, false, own.desk);
    if (layer.gate.data) multiply(layer.gate, ffs, fed, shared.gate, ff, false, own.desk);
    for (int64_t n = 0; n < tokens; ++n)
      activate(ffs, model.activation, layer.gate.data ? shared.gate + n * ff : nullptr, shared.ff + n * ff);
    meet();
    multiply(layer.wo, outputs, prepare(layer.wo, shared.ff, ff, tokens, own), shared.residual, hidden, true, own.desk);
    meet();
  }
  const int64_t skipped = args.length - args.kept, kept = args.batch * args.kept;
  for (int64_t b = 0; b < args.batch; ++b)
    rms_norm(shared.residual + (b * args.length + skipped) * hidden, model.norm, hidden, args.kept, model.epsilon,
             own.x + b * args.kept * hidden);
  for (int64_t i = 0; i < kept * hidden; ++i) own.x[i] *= static_cast<float>(args.scale);
  multiply(args.head, part_of(model.vocab, thread, threads), prepare(args.head, own.x, hidden, kept, own), args.logits,
           model.vocab, false, own.desk);
}

}  // namespace ISA_NAMESPACE
