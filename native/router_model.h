// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The router as the compiled code sees it, and what is asked of it.

#pragma once

#include <cstdint>

// The structure is mirrored field by field in modeling_mambaformer/router_step.py. All float data is float32.
struct RouterArgs {
  const int64_t* ids;                            // (batch, length)
  const float *embeddings, *states, *logits;     // (batch, length, dim) twice, (batch, length, vocab)
  const float *source_length, *source_domain;    // (batch)
  const float *hidden_proj, *feature_weight, *feature_bias, *past_weight;  // (rank, dim), (width, features), (width),
                                                                           // (width, 2) or null
  const float *score_weight, *score_bias, *domain_weight;                  // (width), (1), (vocab)
  const int64_t* groups;                         // (group_count), in the order of the features
  const uint8_t *allowed, *ended;                // (batch), (batch, length)
  // The router's state, updated: (batch), embedding_sum (batch, dim).
  float *previous, *domain_sum, *embedding_sum;
  int64_t *since, *spent, *seen;
  // Results, (batch, length). EMamba's likeliest token is `top`, and its log-probability `log_top`.
  float *margin, *log_top;
  int64_t *expert, *gap, *top;
  double threshold;
  // `cap`: the most tokens that ET5 may write, below 0 for no limit.
  int64_t batch, length, dim, vocab, rank, width, features, group_count, position, first_new, cap, max_target_length,
      threads;
};
