// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// One pass of a T5 decoder (Raffel et al. 2020, arXiv 1910.10683) on a CPU: a few positions of some rows of a batch, all
// layers in one call. The rows catch up on what they skipped, and the logits of the last positions come back.
//
//   r = embedding[id]
//   for each layer:  r = r + o attend(q, k, v of norm(r); distances)        over the row's own positions so far
//                    r = r + o' attend(q' norm(r), the source's k', v')
//                    r = r + wo (gelu(wi_0 norm(r)) (wi_1 norm(r)))         or wo relu(wi norm(r))
//   logits = head (scale norm(r))
//
// T5 does not scale its scores; the bias of a distance is the same in all layers. Weights are float32, bfloat16 or int8
// as in decode_step.cpp, whose products are used; everything else is float32. One team of threads runs through all
// layers; each owns some rows of every matrix, and some (row, head) pairs of the attention. A row's result depends
// neither on the number of threads nor on the other rows.

#include <cmath>

#include "et5_model.h"
#include "team.h"
#include "token_blocks.h"

namespace {

// Mirrored field by field in modeling_mambaformer/et5_pass.py.
struct Et5Args {
  Et5Model model;
  const int64_t *ids, *rows, *sources;  // (all rows, ids_row) of what they have been given, (batch), (batch)
  const uint8_t* mask;                  // (sources, source_length)
  const float* distance_bias;           // (heads, bias_row): of start + length keys, as the last position sees them
  float* logits;                        // (batch, kept, vocab)
  Matrix head;
  double scale;
  int64_t batch, length, start, kept, capacity, source_length, bias_row, ids_row, threads;

  int64_t id(int64_t token) const { return ids[rows[token / length] * ids_row + start + token % length]; }
};

constexpr int64_t TOGETHER = 8;  // positions that look at the same keys, an even number of them
constexpr int64_t NEAR = 64;     // keys that all of them look at before the next

// What the threads share: floats of [batch * length] tokens.
struct Et5Shared {
  float *residual, *q, *k, *v, *context, *ff, *gate;  // hidden, heads * width four times, ff twice
};

}  // namespace

#define ISA_KERNELS "et5_pass_kernels.h"
#define ISA_WITH_BYTES
#include "for_each_isa.h"

extern "C" {

// Returns 0; 1 when memory for the workspace is missing; 2, with nothing done, for an id outside the vocabulary.
int mambaformer_et5_pass(const Et5Args* args) {
  const Et5Model& model = args->model;
  const int64_t tokens = args->batch * args->length, hidden = model.hidden, inner = model.heads * model.width;
  if (tokens <= 0) return 0;
  for (int64_t i = 0; i < tokens; ++i)
    if (args->id(i) < 0 || args->id(i) >= model.vocab) return 2;

  const int64_t layer = hidden * (6 * inner + 3 * model.ff);
  const int64_t threads = thread_count(args->threads, (hidden + SPAN - 1) / SPAN,
                                       tokens * (model.layer_count * layer + model.vocab * hidden));
  const int64_t end = args->start + args->length, keys = end > args->source_length ? end : args->source_length;
  const int64_t inputs = inner > model.ff ? inner : model.ff, widest = inputs > hidden ? inputs : hidden;
  const int64_t own = own_size(tokens, hidden, widest) + TOGETHER * spread(keys);
  const int64_t shared_size = tokens * (hidden + 4 * inner + 2 * model.ff);
  Buffer workspace(whole_lines(shared_size) + threads * own + LINE);
  if (!workspace.data) return 1;
  Arena arena(workspace);
  Et5Shared shared;
  shared.residual = arena.take(shared_size);
  shared.q = shared.residual + tokens * hidden;
  shared.k = shared.q + tokens * inner;
  shared.v = shared.k + tokens * inner;
  shared.context = shared.v + tokens * inner;
  shared.ff = shared.context + tokens * inner;
  shared.gate = shared.ff + tokens * model.ff;
  float* owns = arena.next;
  const auto run = CHOOSE_ISA(run_pass);
  run_team(threads, [&](int64_t thread, int64_t team) {
    Arena mine(owns + thread * own);
    float* scores = mine.take(TOGETHER * spread(keys));
    run(*args, shared, take_own(mine, tokens, hidden, widest), scores, spread(keys), thread, team);
  });
  return 0;
}

}  // extern "C"
