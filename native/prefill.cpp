// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Reading sources with a Mamba language model on a CPU: what decode_step.cpp does for one token, for all tokens of a
// batch, in one call that leaves each source's state and the hidden state at its last token.
//
// Tokens are taken in blocks, source after source without the padding; a block passes through all layers before the
// next begins, so that what lies between two products stays in the cache and the memory needed does not depend on the
// length. Between the projections nothing is copied: the convolution works in place, step sizes are made for some
// channels at a time, and the scan writes over them. The last layer is asked for each source's last token alone.
//
// One team of threads runs through a block of tokens. Every thread owns some, and takes channels and rows of a matrix
// piece by piece. Neither their number nor the neighbours of a source change its result.

#include <algorithm>
#include <chrono>
#include <cmath>

#include "mamba_model.h"
#include "pieces.h"
#include "team.h"
#include "token_blocks.h"

namespace {

constexpr int64_t CHUNK = 16;  // time steps that the scan takes together
constexpr int64_t MOST_TOKENS = 4096;

// `model.ids` are (batch, width), each row's last lengths[row] being its source. `model.windows` and `model.states` are
// written only, and so is `model.hidden_out`, (batch, hidden), at the last tokens. `product_seconds` receives the time
// that one thread spends in products with matrices, or is null. `block` may be 0. Mirrored field by field in
// modeling_mambaformer/emamba_prefill.py.
struct PrefillArgs {
  StepArgs model;
  const int64_t* lengths;
  double* product_seconds;
  int64_t width, block;
};

// Neighbouring tokens of one source within a block: tokens `first` to `first + count` of the block.
struct Segment {
  int64_t row, first, count;
  bool begins, ends;
};

// What is read at a time.
struct TokenBlock {
  Segment* segments;  // [tokens]
  int64_t *ids, *ends, *end_rows;  // [tokens] each: ids; the last tokens of sources, and their rows
  int64_t segment_count, count, end_count;
};

// Floats between neighbouring rows, `bytes` in bytes; and between blocks of channels, which lie one behind another with
// rows of BLOCK, so that what is done to some channels through time reads memory in its order. `dim` has room for whole
// blocks.
struct Layout {
  int64_t blocks, hidden, projected, dim, bytes, apart;
  Layout(const StepArgs& model, int64_t tokens)
      : blocks((model.dim + BLOCK - 1) / BLOCK),
        hidden(spread(model.hidden)),
        projected(spread(model.rank + 2 * model.state)),
        dim(spread(blocks * BLOCK)),
        bytes(4 * spread(filled(model.hidden > model.dim ? model.hidden : model.dim) / 4)),
        apart(spread(tokens * BLOCK)) {}
  int64_t at(int64_t channel) const { return channel / BLOCK * apart + channel % BLOCK; }
};

// What the threads share. `y` holds step sizes first. `carry` are the last inputs of the convolution where a source goes
// on in the next block, `most` the largest magnitudes that each thread has seen in the rows to be rounded next, as bits.
struct Stage {
  float *residual, *normed, *projected, *scales;  // [tokens] rows
  float *x, *z, *y;                               // [blocks][tokens][BLOCK]
  float *last, *gate;                             // [sources that end in a block] rows
  float* carry;                                   // [layers][kernel][dim]
  int32_t* most;                                  // [threads][tokens]
  int8_t* bytes;                                  // [tokens] rows
  Pieces *inputs, *scans, *outputs;               // [threads], of a layer
  TokenBlock block;
};

// What each thread has for itself. `most` are [tokens][WIDEST_PANEL / 2] magnitudes, as bits, and then [tokens] factors.
struct Bench {
  Desk desk;
  float *scan, *conv, *most;
  double* seconds;
};

int64_t bench_size(const StepArgs& model, int64_t tokens) {
  return desk_size(tokens) + whole_lines((3 * CHUNK + 2 * model.state + 1) * BLOCK) +
         whole_lines((3 * model.kernel + 1) * BLOCK) + whole_lines(tokens * WIDEST_PANEL / 2);
}

Bench make_bench(const StepArgs& model, int64_t tokens, float* memory, double* seconds) {
  Arena arena(memory);
  Bench bench;
  bench.desk = take_desk(arena, tokens);
  bench.scan = arena.take((3 * CHUNK + 2 * model.state + 1) * BLOCK);
  bench.conv = arena.take((3 * model.kernel + 1) * BLOCK);
  bench.most = arena.take(tokens * WIDEST_PANEL / 2);
  bench.seconds = seconds;
  return bench;
}

// Fills `block` with the next tokens; `row` and `at` say how far the batch has been read.
void cut(const PrefillArgs& args, int64_t tokens, int64_t& row, int64_t& at, TokenBlock& block) {
  block.segment_count = block.count = block.end_count = 0;
  while (block.count < tokens && row < args.model.batch) {
    const int64_t length = args.lengths[row], left = length - at, room = tokens - block.count;
    const int64_t count = left < room ? left : room;
    block.segments[block.segment_count++] = {row, block.count, count, at == 0, count == left};
    std::memcpy(block.ids + block.count, args.model.ids + row * args.width + args.width - left,
                sizeof(int64_t) * count);
    block.count += count;
    at += count;
    if (count == left) {
      block.ends[block.end_count] = block.count - 1;
      block.end_rows[block.end_count++] = row++;
      at = 0;
    }
  }
}

// Tokens of a block, unless asked otherwise: `total` in blocks of nearly equal size, whole tiles, of about TOKENS.
int64_t even_block(int64_t total) {
  constexpr int64_t WHOLE = 12;
  const int64_t blocks = (total + TOKENS / 2) / TOKENS, even = blocks > 1 ? (total + blocks - 1) / blocks : total;
  return (even + WHOLE - 1) / WHOLE * WHOLE;
}

// Adds the time of its life to `*seconds`, unless that is null.
struct Stopwatch {
  double* seconds;
  std::chrono::steady_clock::time_point begin;
  explicit Stopwatch(double* to) : seconds(to) {
    if (seconds) begin = std::chrono::steady_clock::now();
  }
  ~Stopwatch() {
    if (seconds) *seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
};

}  // namespace

#define ISA_KERNELS "prefill_kernels.h"
#define ISA_WITH_BYTES
#include "for_each_isa.h"

extern "C" {

// Raised with every change of PrefillArgs or of what it means.
int64_t mambaformer_prefill_abi() { return 1; }

// Returns 0; 1 when memory for the workspace is missing; 2, with nothing done, for an id outside the vocabulary; 3, with
// nothing done, for a length outside [1, width].
int mambaformer_prefill_run(const PrefillArgs* pointer) {
  const PrefillArgs& args = *pointer;
  const StepArgs& model = args.model;
  if (args.product_seconds) *args.product_seconds = 0.0;
  int64_t total = 0;
  for (int64_t b = 0; b < model.batch; ++b) {
    const int64_t length = args.lengths[b];
    if (length < 1 || length > args.width) return 3;
    for (int64_t i = args.width - length; i < args.width; ++i)
      if (model.ids[b * args.width + i] < 0 || model.ids[b * args.width + i] >= model.vocab) return 2;
    total += length;
  }
  if (total == 0) return 0;

  const int64_t wish = args.block > 0 ? args.block : even_block(total), most = wish < MOST_TOKENS ? wish : MOST_TOKENS;
  const int64_t tokens = total < most ? total : most, lasts = model.batch < tokens ? model.batch : tokens;
  const int64_t layer = model.dim * (3 * model.hidden + 2 * model.rank + 10 * model.state);
  const int64_t threads = thread_count(args.model.threads, (model.dim + SPAN - 1) / SPAN, tokens * layer);
  const Layout layout(model, tokens);
  const int64_t own = bench_size(model, tokens), carry = model.layer_count * model.kernel * model.dim;
  const int64_t rows = 2 * layout.hidden + layout.projected + layout.bytes / 4;
  const int64_t block_size = whole_lines(tokens * static_cast<int64_t>(sizeof(Segment) / sizeof(float))) +
                             3 * whole_lines(2 * tokens);
  const int64_t channels = 3 * layout.blocks * layout.apart, ends = lasts * (layout.hidden + layout.dim);
  Buffer workspace(tokens * rows + channels + ends + whole_lines(tokens) + whole_lines(carry) + block_size +
                   whole_lines(threads * tokens) + threads * (own + 3 * LINE) + LINE);
  if (!workspace.data) return 1;
  Arena arena(workspace);
  Stage stage;
  stage.residual = arena.take(tokens * layout.hidden);
  stage.normed = arena.take(tokens * layout.hidden);
  stage.projected = arena.take(tokens * layout.projected);
  for (float** part : {&stage.x, &stage.z, &stage.y}) *part = arena.take(layout.blocks * layout.apart);
  stage.bytes = reinterpret_cast<int8_t*>(arena.take(tokens * layout.bytes / 4));
  stage.last = arena.take(lasts * layout.hidden);
  stage.gate = arena.take(lasts * layout.dim);
  stage.scales = arena.take(tokens);
  stage.carry = arena.take(carry);
  stage.most = reinterpret_cast<int32_t*>(arena.take(threads * tokens));
  stage.block.segments = reinterpret_cast<Segment*>(arena.take(tokens * sizeof(Segment) / sizeof(float)));
  for (int64_t** list : {&stage.block.ids, &stage.block.ends, &stage.block.end_rows})
    *list = reinterpret_cast<int64_t*>(arena.take(2 * tokens));
  for (Pieces** pieces : {&stage.inputs, &stage.scans, &stage.outputs}) *pieces = take_pieces(arena, threads);
  float* benches = arena.next;
  const int64_t block_count = (total + tokens - 1) / tokens;
  const auto read = CHOOSE_ISA(read_block);
  int64_t row = 0, at = 0;
  for (int64_t i = 0; i < block_count; ++i) {
    cut(args, tokens, row, at, stage.block);
    run_team(threads, [&](int64_t thread, int64_t team) {
      double* seconds = thread == 0 ? args.product_seconds : nullptr;
      read(model, layout, stage, make_bench(model, tokens, benches + thread * own, seconds), thread, team);
    });
  }
  return 0;
}

}  // extern "C"
