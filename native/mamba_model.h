// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// A Mamba language model as the compiled code sees it, and what is asked of it.

#pragma once

#include "matrices.h"

// The structures are mirrored field by field in modeling_mambaformer/packed_weights.py.

// One layer. A2 is A * log2(e). in_proj is (2 dim, hidden), x_proj (rank + 2 state, dim), dt_proj (dim, rank) and
// float32, out_proj (hidden, dim). conv_bias may be null.
struct Layer {
  const float *norm, *conv_weight, *conv_bias, *A2, *D;
  Matrix in_proj, x_proj, dt_proj, out_proj;
};

// windows: (batch, dim, kernel) a layer, float32 or bfloat16; states: (batch, dim, state) a layer. Both are updated.
struct StepArgs {
  const Layer* layers;
  const int64_t* ids;     // (batch)
  const void* embedding;  // (vocab, hidden), float32, bfloat16 or INT8
  const float *embedding_scale, *norm;  // the former (vocab) for INT8, else null
  void* const* windows;
  float* const* states;
  float *hidden_out, *logits, *embedded;  // (batch, hidden), (batch, vocab) or null, (batch, hidden) or null
  Matrix head;
  double epsilon;
  int64_t layer_count, batch, hidden, dim, state, kernel, rank, vocab, embedding_format, embedding_row, window_format,
      threads;
};

// `length` tokens of each row: ids, hidden_out and logits are (batch, length, ...). The states are read only, the first
// row's being the `begin`-th of theirs; the logs receive those after each token, (batch, length, ...) a layer, from their
// `log_begin`-th place on. `step.batch` counts rows.
struct RunArgs {
  StepArgs step;
  int64_t length, begin, log_begin;
  void* const* window_log;
  float* const* state_log;
};
