// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The encoder of a T5 (Raffel et al. 2020, arXiv 1910.10683) on a CPU: sources of any length, all layers in one call.
//
//   r = embedding[id]
//   for each layer:  r = r + o attend(q, k, v of norm(r); distances)        over the whole source
//                    r = r + wo (gelu(wi_0 norm(r)) (wi_1 norm(r)))         or wo relu(wi norm(r))
//   states = norm(r)
//
// The sources' tokens follow each other without padding. Products take them in blocks, so that what lies between two
// products stays in the cache. Attention takes some keys at a time and keeps running sums (Milakov and Gimelshein 2018,
// arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135), so that neither scores nor the bias of pairs of positions are
// ever whole: memory grows with the length, not with its square. The bias is read by distance.
//
// One team of threads runs through all layers. Neither their number nor a source's neighbours change its states.

#include <cmath>

#include "et5_model.h"
#include "team.h"
#include "token_blocks.h"

namespace {

constexpr int64_t QUERIES = 192;  // that look at the same keys one after another: whole tiles of prefill_products.h
constexpr int64_t KEYS = 256;     // that are looked at together

static_assert(KEYS <= UNITS, "a panel holds the keys' values");

// The structure is mirrored field by field in modeling_mambaformer/et5_encoder.py.
struct EncoderArgs {
  Et5Model model;
  const int64_t *ids, *lengths;  // of all sources, one after another; (sources)
  const float* distance_bias;    // (heads, 2 * longest - 1): from the key longest - 1 positions before to that after
  float* states;                 // (tokens, hidden)
  int64_t sources, longest, threads;
};

// Floats between neighbouring rows; `bytes` are bytes.
struct Layout {
  int64_t inner, hidden, ff, bytes;
  explicit Layout(const Et5Model& model)
      : inner(spread(model.heads * model.width)), hidden(spread(model.hidden)), ff(spread(model.ff)) {
    int64_t widest = model.hidden > model.ff ? model.hidden : model.ff;
    widest = widest > model.heads * model.width ? widest : model.heads * model.width;
    bytes = 4 * spread(filled(widest) / 4);
  }
};

// What the threads share. `q` holds what attention makes of it in the end.
struct Stage {
  float *q, *k, *v;                    // [tokens]
  float *normed, *ff, *gate, *scales;  // [block]
  int8_t* bytes;                       // [block]
};

// What each thread has for itself. Its attention needs [QUERIES][spread(KEYS)] scores, the keys' values in panels, and
// for each query the sum of the values so far, the highest score, and the sum of the weights.
struct Bench {
  Desk desk;
  float *scores, *values, *sums, *tops, *weights;
};

constexpr int64_t padded(int64_t width) { return (width + WIDEST_PANEL - 1) / WIDEST_PANEL * WIDEST_PANEL; }

int64_t bench_size(const Et5Model& model, int64_t block) {
  const int64_t width = padded(model.width);
  return desk_size(block) + QUERIES * (spread(KEYS) + width) + KEYS * width + 2 * whole_lines(QUERIES);
}

Bench make_bench(const Et5Model& model, int64_t block, float* memory) {
  Arena arena(memory);
  Bench bench;
  bench.desk = take_desk(arena, block);
  bench.scores = arena.take(QUERIES * spread(KEYS));
  bench.values = arena.take(KEYS * padded(model.width));
  bench.sums = arena.take(QUERIES * padded(model.width));
  bench.tops = arena.take(QUERIES);
  bench.weights = arena.take(QUERIES);
  return bench;
}

}  // namespace

#define ISA_KERNELS "et5_encoder_kernels.h"
#define ISA_WITH_BYTES
#include "for_each_isa.h"

extern "C" {

// Returns 0; 1 when memory for the workspace is missing; 2, with nothing done, for an id outside the vocabulary; 3, with
// nothing done, for a length outside [0, longest].
int mambaformer_et5_encode(const EncoderArgs* args) {
  const Et5Model& model = args->model;
  int64_t tokens = 0;
  for (int64_t s = 0; s < args->sources; ++s) {
    if (args->lengths[s] < 0 || args->lengths[s] > args->longest) return 3;
    tokens += args->lengths[s];
  }
  for (int64_t i = 0; i < tokens; ++i)
    if (args->ids[i] < 0 || args->ids[i] >= model.vocab) return 2;
  if (tokens == 0) return 0;

  const Layout layout(model);
  const int64_t block = tokens < TOKENS ? tokens : TOKENS;
  const int64_t layer = model.hidden * (4 * model.heads * model.width + 3 * model.ff);
  const int64_t threads = thread_count(args->threads, (model.hidden + SPAN - 1) / SPAN, tokens * layer);
  const int64_t own = bench_size(model, block);
  const int64_t block_row = layout.hidden + 2 * layout.ff + layout.bytes / 4;
  Buffer workspace(tokens * 3 * layout.inner + block * block_row + whole_lines(block) + threads * own + LINE);
  if (!workspace.data) return 1;
  Arena arena(workspace);
  Stage stage;
  for (float** rows : {&stage.q, &stage.k, &stage.v}) *rows = arena.take(tokens * layout.inner);
  stage.normed = arena.take(block * layout.hidden);
  stage.ff = arena.take(block * layout.ff);
  stage.gate = arena.take(block * layout.ff);
  stage.bytes = reinterpret_cast<int8_t*>(arena.take(block * layout.bytes / 4));
  stage.scales = arena.take(block);
  float* benches = arena.next;
  const auto run = CHOOSE_ISA(encode);
  run_team(threads, [&](int64_t thread, int64_t team) {
    run(*args, tokens, layout, stage, make_bench(model, block, benches + thread * own), thread, team);
  });
  return 0;
}

}  // extern "C"
