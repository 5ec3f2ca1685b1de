// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// A stack of a T5 (Raffel et al. 2020, arXiv 1910.10683), encoder or decoder, as the compiled code sees it.

#pragma once

#include "matrices.h"

namespace {

enum Activation : int64_t { RELU = 0, GELU = 1, GELU_TANH = 2 };

// The structures are mirrored field by field in modeling_mambaformer/et5_pass.py.

// `gate` has no data where the layer is not gated. keys, values: (all rows, heads, capacity, width), written at the new
// positions. cross_keys, cross_values: (sources, heads, source_length, width). An encoder has norms and matrices only,
// and nothing named cross.
struct Et5Layer {
  const float *norm, *cross_norm, *ff_norm;
  Matrix q, k, v, o, cross_q, cross_o, wi, gate, wo;
  float *keys, *values;
  const float *cross_keys, *cross_values;
};

struct Et5Model {
  const Et5Layer* layers;
  const void* embedding;  // (vocab, embedding_row): float32, bfloat16, or INT8 with a scale a row
  const float *embedding_scale, *norm;
  double epsilon;
  int64_t layer_count, hidden, heads, width, ff, vocab, embedding_format, embedding_row, activation;
};

}  // namespace
