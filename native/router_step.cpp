// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The router at a few decoder positions of every row of a batch (arXiv 2601.01260, token-level guided routing): the
// features of modeling_mambaformer/router_features.py, the network of router.py and the choice, in one call.
//
//   f_t = [P h_t, entropy and top probability of softmax(logits_t), 1 - cos(e_t, mean of the context's embeddings),
//          lengths, domain weights]
//   m_t = w . gelu(F f_t + b + G [choice_t-1, log(1 + gap_t)]) + c        routed where m_t > threshold
//
// As PyTorch operations, some sixty a position, this costs as much as a small EMamba's own step.

#include <cmath>

#include "common.h"
#include "router_model.h"

namespace {

enum Group : int64_t { COMPLEXITY = 0, LENGTH = 1, DOMAIN_GROUP = 2 };

// What a row needs for itself: the mean of its context's embeddings, and the features.
struct RowSpace {
  float *mean, *features;
};

}  // namespace

#define ISA_KERNELS "router_step_kernels.h"
#include "for_each_isa.h"

extern "C" {

// Returns 0; 1 when memory for the workspace is missing; 2, with nothing done, for an id outside the vocabulary.
int mambaformer_router_step(const RouterArgs* args) {
  const int64_t batch = args->batch, tokens = batch * args->length;
  if (tokens <= 0) return 0;
  for (int64_t i = 0; i < tokens; ++i)
    if (args->ids[i] < 0 || args->ids[i] >= args->vocab) return 2;
  const int64_t size = args->dim + args->features;
  Buffer workspace(batch * size);
  if (!workspace.data) return 1;
  const int64_t work = args->vocab * 16 + (args->rank + 4) * args->dim + args->width * args->features;
  const int64_t threads = thread_count(args->threads, batch, tokens * work);
  const auto route = CHOOSE_ISA(route_row);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < batch; ++b) {
    float* at = workspace.data + b * size;
    route(*args, b, {at, at + args->dim});
  }
  return 0;
}

// The likeliest tokens of logits (rows, vocab) and their log-probabilities: (rows) each.
void mambaformer_likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t* top, float* log_top) {
  const auto likeliest = CHOOSE_ISA(likeliest_of);
  for (int64_t b = 0; b < rows; ++b) likeliest(logits + b * vocab, vocab, top + b, log_top + b);
}

}  // extern "C"
