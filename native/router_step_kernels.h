// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The router for one row, position after position. Included by for_each_isa.h once for every instruction set.

namespace ISA_NAMESPACE {

constexpr int64_t STRETCH = 1024;  // so many terms are summed in float32, and their sums in double

struct Distribution {
  float entropy, log_top;  // in nats
  int64_t top;
};

// The first of the largest logits, or the first that is NaN, as torch.argmax has it.
ISA_INLINE int64_t index_of(float largest, bool any_nan, const float* logits, int64_t count) {
  for (int64_t i = 0; any_nan && i < count; ++i)
    if (logits[i] != logits[i]) return i;
  for (int64_t i = 0; i < count; ++i)
    if (logits[i] == largest) return i;
  return 0;
}

// Entropy and the largest log-probability of softmax(logits), and whose that is. NaN where a logit is.
ISA_INLINE Distribution distribution_of(const float* logits, int64_t count) {
  const float lowest = -3.402823466e38f, least = -80.0f;  // exp(-80) * 80 is nothing beside the largest term, 1
  Vec largest = splat(lowest);
  int64_t i = 0;
  for (; i + W <= count; i += W) largest = larger(load(logits + i), largest);
  float top = lowest, part[W];
  store(part, largest);
  for (int k = 0; k < W; ++k) top = part[k] > top ? part[k] : top;
  for (; i < count; ++i) top = logits[i] > top ? logits[i] : top;
  double mass = 0.0, moment = 0.0;  // sums of exp(x) and x exp(x), x = logit - top
  for (int64_t begin = 0; begin < count; begin += STRETCH) {
    const int64_t end = begin + STRETCH < count ? begin + STRETCH : count;
    Vec sum = {}, weighted = {};
    for (i = begin; i + W <= end; i += W) {
      const Vec x = load(logits + i) - top, p = exp(x);
      sum += p;
      weighted += larger(splat(least), x) * p;
    }
    if (i < end) {
      float rest[W];
      for (int k = 0; k < W; ++k) rest[k] = i + k < end ? logits[i + k] - top : least;
      const Vec x = load(rest), p = exp(x);
      sum += p;
      weighted += larger(splat(least), x) * p;
    }
    mass += lane_sum(sum);
    moment += lane_sum(weighted);
  }
  const double log_mass = std::log(mass);
  return {static_cast<float>(log_mass - moment / mass), static_cast<float>(-log_mass),
          index_of(top, mass != mass, logits, count)};
}

ISA_TARGET static void likeliest_of(const float* logits, int64_t count, int64_t* top, float* log_top) {
  const Distribution said = distribution_of(logits, count);
  *top = said.top;
  *log_top = said.log_top;
}

// One minus the cosine of two vectors, as torch.cosine_similarity has it.
ISA_INLINE float distance(const float* x, const float* y, int64_t count) {
  const float least = 1e-8f, xx = std::sqrt(dot(x, x, count)), yy = std::sqrt(dot(y, y, count));
  return 1.0f - dot(x, y, count) / ((xx > least ? xx : least) * (yy > least ? yy : least));
}

ISA_TARGET static void route_row(const RouterArgs& args, int64_t b, const RowSpace& space) {
  const int64_t dim = args.dim;
  float* sum = args.embedding_sum + b * dim;
  float previous = args.previous[b], domain_sum = args.domain_sum[b];
  int64_t since = args.since[b], spent = args.spent[b], seen = args.seen[b];
  for (int64_t t = 0; t < args.length; ++t) {
    const int64_t at = b * args.length + t, position = args.position + t, gap = since + 1;
    const float* embedding = args.embeddings + at * dim;
    const float weight = args.domain_weight[args.ids[at]];
    const Distribution said = distribution_of(args.logits + at * args.vocab, args.vocab);
    domain_sum += weight;
    float* feature = space.features;
    for (int64_t g = 0; g < args.group_count; ++g) {
      if (args.groups[g] == COMPLEXITY) {
        for (int64_t r = 0; r < args.rank; ++r)
          *feature++ = dot(args.hidden_proj + r * dim, args.states + at * dim, dim);
        for (int64_t i = 0; i < dim; ++i) space.mean[i] = sum[i] / static_cast<float>(seen);
        *feature++ = said.entropy / std::log(static_cast<float>(args.vocab));
        *feature++ = std::exp(said.log_top);
        *feature++ = distance(embedding, space.mean, dim);
      } else if (args.groups[g] == LENGTH) {
        *feature++ = args.source_length[b];
        *feature++ = static_cast<float>(position) / static_cast<float>(args.max_target_length);
      } else if (args.groups[g] == DOMAIN_GROUP) {
        *feature++ = weight;
        *feature++ = args.source_domain[b];
        *feature++ = domain_sum / static_cast<float>(position + 1);
      }
    }
    const float far = std::log1p(static_cast<float>(gap)) / std::log1p(static_cast<float>(args.max_target_length));
    float margin = *args.score_bias;
    for (int64_t h = 0; h < args.width; ++h) {
      float x = args.feature_bias[h] + dot(args.feature_weight + h * args.features, space.features, args.features);
      if (args.past_weight) x += args.past_weight[2 * h] * previous + args.past_weight[2 * h + 1] * far;
      margin += args.score_weight[h] * 0.5f * x * (1.0f + std::erf(x * 0.7071067812f));
    }
    const bool ended = args.ended[at], free = args.cap < 0 || spent < args.cap;
    const bool routed = margin > static_cast<float>(args.threshold) && args.allowed[b] && !ended && free;
    previous = routed;
    since = routed ? 0 : gap;
    if (position >= args.first_new) spent += routed;
    args.margin[at] = ended ? NAN : margin;
    args.log_top[at] = ended ? NAN : said.log_top;
    args.top[at] = said.top;
    args.expert[at] = ended ? -1 : routed;
    args.gap[at] = gap;
    for (int64_t i = 0; i < dim; ++i) sum[i] += embedding[i];
    ++seen;
  }
  args.previous[b] = previous;
  args.domain_sum[b] = domain_sum;
  args.since[b] = since;
  args.spent[b] = spent;
  args.seen[b] = seen;
}

}  // namespace ISA_NAMESPACE
