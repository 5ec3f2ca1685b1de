// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The small network that proposes tokens, as the compiled code sees it.

#pragma once

#include "mamba_model.h"

// in_proj is (hidden, 2 hidden), out_proj (hidden, hidden), rows (candidates, hidden), whose ids are `tokens`. Mirrored
// field by field in modeling_mambaformer/draft_weights.py.
struct DraftArgs {
  const StepArgs* model;  // whose embeddings it reads
  Matrix in_proj, out_proj, rows;
  const int64_t* tokens;
  double likely;  // nothing is proposed that is less likely right, by the network's own probabilities
  int64_t most, threads;
};
