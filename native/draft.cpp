// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Proposals of a small network for look-ahead decoding (modeling_mambaformer/look_ahead_heads.py):
//
//   s_i = s_{i-1} + out_proj silu(in_proj [s_{i-1}, sqrt(D) e_i])       logits_i = rows s_i
//
// from the hidden state s_0 and the embedding e_1 of the token after it; e_2 is that of the first token proposed. It goes
// on for as long as all proposed so far is likely enough to be right.

#include <cmath>

#include "draft.h"
#include "team.h"
#include "token_blocks.h"

namespace {

// What the threads share: the network's input, state first; its inner values; logits; and what has been settled.
struct DraftStage {
  float *input, *inner, *logits;
  int64_t token, proposed;
  double chance;
  bool goes_on;
};

}  // namespace

#define ISA_KERNELS "draft_kernels.h"
#define ISA_WITH_BYTES
#include "for_each_isa.h"

extern "C" {

void mambaformer_likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t* top, float* log_top);

// Puts up to `most` tokens that may follow `token`, which follows `hidden`, into `to`; returns how many, or -1 when memory
// for the workspace is missing.
int64_t mambaformer_draft(const DraftArgs* pointer, const float* hidden, int64_t token, int64_t most, int64_t* to) {
  const DraftArgs& args = *pointer;
  const int64_t D = args.model->hidden, R = args.rows.rows, wanted = most < args.most ? most : args.most;
  if (wanted <= 0 || R <= 0 || token < 0 || token >= args.model->vocab) return 0;
  const int64_t threads = thread_count(args.threads, (D + SPAN - 1) / SPAN, D * (3 * D + R));
  const int64_t own = own_size(1, D, 2 * D);
  Buffer workspace(whole_lines(2 * D) + whole_lines(D) + whole_lines(R) + threads * own + LINE);
  if (!workspace.data) return -1;
  Arena arena(workspace);
  DraftStage stage;
  stage.input = arena.take(2 * D);
  stage.inner = arena.take(D);
  stage.logits = arena.take(R);
  stage.token = token, stage.proposed = 0, stage.chance = 1.0, stage.goes_on = true;
  std::memcpy(stage.input, hidden, sizeof(float) * D);
  float* owns = arena.next;
  const auto step = CHOOSE_ISA(draft_step);
  run_team(threads, [&](int64_t thread, int64_t team) {
    Arena mine(owns + thread * own);
    const Own bench = take_own(mine, 1, D, 2 * D);
    while (stage.goes_on) {
      step(args, stage, bench, thread, team);
      meet();
      if (thread == 0) {
        int64_t top;
        float log_top;
        mambaformer_likeliest(stage.logits, 1, R, &top, &log_top);
        stage.chance *= std::exp(static_cast<double>(log_top));
        const int64_t said = top >= 0 && top < R ? args.tokens[top] : -1;
        const bool right = stage.chance >= args.likely && said >= 0 && said < args.model->vocab;
        if (right) to[stage.proposed++] = stage.token = said;
        stage.goes_on = right && stage.proposed < wanted;
      }
      meet();
    }
  });
  return stage.proposed;
}

}  // extern "C"
