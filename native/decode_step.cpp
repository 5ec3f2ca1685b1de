// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// One decoding step of a Mamba language model (Gu and Dao 2023, arXiv 2312.00752, figure 3 and section 3.4) on a CPU:
// all layers of one token, or of a few, for every row of a batch in one call, behind the same plain C interface as the
// scan.
//
//   r = embedding[id]
//   for each layer:  x, z = in_proj norm(r)               u = silu(conv(window, x))
//                    t, B, C = x_proj u                   d = softplus(dt_proj t + bias)
//                    h = exp(d A) h + d u B               r = r + out_proj((C h + D u) silu(z))
//   hidden = norm(r)                                      logits = head hidden
//
// A token costs one reading of the weights, so their format decides the speed: float32, bfloat16, int8 with one scale a
// row, or 4 bits with one scale for 32 columns. The input of the last two is rounded to int8 with one scale a token, and
// their products are summed in int32. Norms, convolution, step sizes, A, D and the recurrent state are float32 in every
// format.
//
// One team of threads runs through all layers. Every thread owns some channels and some rows of each matrix, and they
// meet four times a layer. A row's result depends neither on the number of threads nor on the other rows.

#include <cmath>
#include <type_traits>

#include "mamba_model.h"
#include "team.h"
#include "token_blocks.h"

namespace {

// What the threads share: floats of [batch] rows.
struct Shared {
  float *residual, *xz, *projected, *delta, *y;  // hidden, 2 dim, rank + 2 state, dim, dim
};

}  // namespace

#define ISA_KERNELS "decode_step_kernels.h"
#define ISA_WITH_BYTES
#include "for_each_isa.h"

extern "C" {

// Raised with every change of the structures or of what they mean.
int64_t mambaformer_decode_abi() { return 13; }
const char* mambaformer_decode_isa() { return isa_name(); }

// How often teams have been halved for want of processors; 0 where as many threads work as were asked for.
int64_t mambaformer_team_halvings() { return crowd.halvings; }

// Returns 0; 1 when memory for the workspace is missing; 2, with nothing done, for an id outside the vocabulary.
int mambaformer_decode_run(const RunArgs* pointer) {
  RunArgs whole = *pointer;
  StepArgs& args = whole.step;
  args.batch *= whole.length;
  const int64_t batch = args.batch, dim = args.dim, projections = args.rank + 2 * args.state;
  if (batch <= 0) return 0;
  for (int64_t b = 0; b < batch; ++b)
    if (args.ids[b] < 0 || args.ids[b] >= args.vocab) return 2;

  const int64_t layer = dim * (3 * args.hidden + projections + args.rank + 8 * args.state);
  const int64_t threads = thread_count(args.threads, (dim + SPAN - 1) / SPAN, batch * args.layer_count * layer);
  const int64_t widest = args.hidden > dim ? args.hidden : dim, own = own_size(batch, args.hidden, widest);
  Buffer workspace(whole_lines(batch * (args.hidden + 4 * dim + projections)) + threads * own + LINE);
  if (!workspace.data) return 1;
  Arena arena(workspace);
  Shared shared;
  shared.residual = arena.take(batch * (args.hidden + 4 * dim + projections));
  shared.xz = shared.residual + batch * args.hidden;
  shared.projected = shared.xz + batch * 2 * dim;
  shared.delta = shared.projected + batch * projections;
  shared.y = shared.delta + batch * dim;
  float* owns = arena.next;
  const auto run = CHOOSE_ISA(run_layers);
  run_team(threads, [&](int64_t thread, int64_t team) {
    Arena mine(owns + thread * own);
    run(whole, shared, take_own(mine, batch, args.hidden, widest), thread, team);
  });
  return 0;
}

}  // extern "C"
