// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What one thread does in a pass of ET5's decoder. Included by for_each_isa.h once for every instruction set.

#include "et5_rows.h"
#include "prefill_products.h"

namespace ISA_NAMESPACE {

// scores (count) to softmax, in place. Scores of minus infinity become 0; if all are, so does everything.
ISA_INLINE void softmax(float* scores, int64_t count) {
  float top = scores[0], sum = 0.0f;
  for (int64_t j = 1; j < count; ++j) top = scores[j] > top ? scores[j] : top;
  for (int64_t j = 0; j < count; j += W) {
    const Vec x = load_part(scores + j, count - j);
    store_part(scores + j, x == splat(-INFINITY) ? Vec{} : exp(x - top), count - j);
  }
  for (int64_t j = 0; j < count; ++j) sum += scores[j];
  const float factor = sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f;
  for (int64_t j = 0; j < count; ++j) scores[j] *= factor;
}

// to (width) = sum of values (count, width) weighted by scores.
ISA_INLINE void blend(const float* scores, const float* values, int64_t count, int64_t width, float* to) {
  for (int64_t i = 0; i < width; i += W) {
    Vec sum = {};
    for (int64_t j = 0; j < count; ++j) sum += scores[j] * load_part(values + j * width + i, width - i);
    store_part(to + i, sum, width - i);
  }
}

// The new positions of one head of one row look at those up to themselves.
ISA_INLINE void attend_own(const Et5Args& args, const Et5Layer& layer, int64_t b, int64_t h, const Et5Shared& shared,
                           float* scores) {
  const int64_t heads = args.model.heads, width = args.model.width, inner = heads * width;
  const int64_t first = b * args.length * inner + h * width;
  const int64_t at = (args.rows[b] * heads + h) * args.capacity * width, end = args.start + args.length;
  float *keys = layer.keys + at, *values = layer.values + at;
  const float* bias = args.distance_bias + h * end;
  for (int64_t t = 0; t < args.length; ++t) {
    std::memcpy(keys + (args.start + t) * width, shared.k + first + t * inner, sizeof(float) * width);
    std::memcpy(values + (args.start + t) * width, shared.v + first + t * inner, sizeof(float) * width);
  }
  for (int64_t t = 0; t < args.length; ++t) {
    const int64_t seen = args.start + t + 1;
    const float* near = bias + args.length - 1 - t;
    for (int64_t j = 0; j < seen; ++j)
      scores[j] = dot(shared.q + first + t * inner, keys + j * width, width) + near[j];
    softmax(scores, seen);
    blend(scores, values, seen, width, shared.context + first + t * inner);
  }
}

// They look at the source.
ISA_INLINE void attend_source(const Et5Args& args, const Et5Layer& layer, int64_t b, int64_t h,
                              const Et5Shared& shared, float* scores) {
  const int64_t heads = args.model.heads, width = args.model.width, inner = heads * width;
  const int64_t first = b * args.length * inner + h * width;
  const int64_t at = (args.sources[b] * heads + h) * args.source_length * width;
  const uint8_t* mask = args.mask + args.sources[b] * args.source_length;
  for (int64_t t = 0; t < args.length; ++t) {
    for (int64_t j = 0; j < args.source_length; ++j)
      scores[j] = mask[j] ? dot(shared.q + first + t * inner, layer.cross_keys + at + j * width, width) : -INFINITY;
    softmax(scores, args.source_length);
    blend(scores, layer.cross_values + at, args.source_length, width, shared.context + first + t * inner);
  }
}

ISA_TARGET static void run_pass(const Et5Args& args, const Et5Shared& shared, const Own& own, float* scores,
                                int64_t thread, int64_t threads) {
  const Et5Model& model = args.model;
  const int64_t tokens = args.batch * args.length, hidden = model.hidden, inner = model.heads * model.width;
  const int64_t ff = model.ff, pairs = args.batch * model.heads;
  const Range outputs = part_of(hidden, thread, threads), inners = part_of(inner, thread, threads);
  const Range ffs = part_of(ff, thread, threads);
  const Range heads = {pairs * thread / threads, pairs * (thread + 1) / threads};
  for (int64_t n = 0; n < tokens; ++n) embed(model, args.ids[n], outputs, shared.residual + n * hidden);
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
      attend_own(args, layer, i / model.heads, i % model.heads, shared, scores);
    meet();
    multiply(layer.o, outputs, prepare(layer.o, shared.context, inner, tokens, own), shared.residual, hidden, true, own.desk);
    meet();
    rms_norm(shared.residual, layer.cross_norm, hidden, tokens, model.epsilon, own.x);
    multiply(layer.cross_q, inners, prepare(layer.cross_q, own.x, hidden, tokens, own), shared.q, inner, false, own.desk);
    meet();
    for (int64_t i = heads.first; i < heads.last; ++i)
      attend_source(args, layer, i / model.heads, i % model.heads, shared, scores);
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
