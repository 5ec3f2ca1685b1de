// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// One step of the network that proposes. Included by for_each_isa.h once for every instruction set.

#include "matrix_products.h"
#include "token_rows.h"

namespace ISA_NAMESPACE {

// This thread's rows of the state after one more token, and of its logits.
ISA_TARGET static void draft_step(const DraftArgs& args, const DraftStage& stage, const Own& own, int64_t thread,
                                  int64_t threads) {
  const int64_t D = args.model->hidden;
  const Range mine = part_of(D, thread, threads);
  float* embedding = stage.input + D;
  const float factor = std::sqrt(static_cast<float>(D));
  embed(*args.model, stage.token, mine, embedding);
  for (int64_t i = mine.first; i < mine.last; ++i) embedding[i] *= factor;
  meet();
  multiply(args.in_proj, mine, prepare(args.in_proj, stage.input, 2 * D, 1, own), stage.inner, D, false);
  for (int64_t i = mine.first; i < mine.last; i += W) {
    const Vec x = load_part(stage.inner + i, mine.last - i);
    store_part(stage.inner + i, silu(x), mine.last - i);
  }
  meet();
  multiply(args.out_proj, mine, prepare(args.out_proj, stage.inner, D, 1, own), stage.input, D, true);
  meet();
  multiply(args.rows, part_of(args.rows.rows, thread, threads), prepare(args.rows, stage.input, D, 1, own),
           stage.logits, args.rows.rows, false);
}

}  // namespace ISA_NAMESPACE
