// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What the decoder of a T5 (Raffel et al. 2020, arXiv 1910.10683) looks at in sources: each layer's keys and values of
// the encoder's states, all layers in one call. Padding is left out.
//
// Tokens are taken in blocks, across sources. A token's result depends neither on the number of threads nor on the
// other tokens.

#include <cmath>

#include "pieces.h"
#include "team.h"
#include "token_blocks.h"

namespace {

// Mirrored field by field in modeling_mambaformer/et5_source.py.
struct SourceArgs {
  const Matrix* matrices;  // (matrix_count) of (heads * width, hidden)
  float* const* to;        // (matrix_count) of (all sources, heads, length, width)
  const float* states;     // (all sources, length, hidden)
  const uint8_t* mask;     // (all sources, length)
  const int64_t* sources;  // (count): those that are wanted
  int64_t matrix_count, count, length, heads, width, hidden, threads;
};

// What the threads share: where each token stands among all sources' positions; a block of tokens, rounded too where a
// matrix is.
struct SourceStage {
  int64_t* places;  // [tokens]
  float *x, *scales;
  int8_t* bytes;
  int64_t tokens, row, byte_row;
  Pieces* pieces;  // [threads]
};

// What each thread has for itself: sums of a block of tokens with a piece of a matrix, [block][BLOCK].
struct SourceBench {
  Desk desk;
  float* sums;
};

int64_t source_bench_size(int64_t block) { return desk_size(block) + block * BLOCK; }

SourceBench make_source_bench(int64_t block, float* memory) {
  Arena arena(memory);
  SourceBench bench;
  bench.desk = take_desk(arena, block);
  bench.sums = arena.take(block * BLOCK);
  return bench;
}

}  // namespace

#define ISA_KERNELS "et5_source_kernels.h"
#define ISA_WITH_BYTES
#include "for_each_isa.h"

extern "C" {

// Returns 0; 1 when memory for the workspace is missing.
int mambaformer_et5_source(const SourceArgs* args) {
  int64_t tokens = 0;
  for (int64_t s = 0; s < args->count; ++s)
    for (int64_t i = 0; i < args->length; ++i) tokens += args->mask[args->sources[s] * args->length + i] != 0;
  if (tokens == 0 || args->matrix_count == 0) return 0;

  const int64_t block = tokens < TOKENS ? tokens : TOKENS, rows = args->matrix_count * args->heads * args->width;
  const int64_t threads = thread_count(args->threads, (rows + SPAN - 1) / SPAN, tokens * rows * args->hidden);
  SourceStage stage;
  stage.tokens = tokens;
  stage.row = spread(args->hidden);
  stage.byte_row = 4 * spread(filled(args->hidden) / 4);
  const int64_t own = source_bench_size(block), rounded = block * stage.byte_row / 4;
  Buffer workspace(whole_lines(2 * tokens) + block * stage.row + rounded + whole_lines(block) +
                   threads * (own + LINE) + LINE);
  if (!workspace.data) return 1;
  Arena arena(workspace);
  stage.places = reinterpret_cast<int64_t*>(arena.take(2 * tokens));
  stage.x = arena.take(block * stage.row);
  stage.bytes = reinterpret_cast<int8_t*>(arena.take(rounded));
  stage.scales = arena.take(block);
  stage.pieces = take_pieces(arena, threads);
  float* benches = arena.next;
  int64_t* place = stage.places;
  for (int64_t s = 0; s < args->count; ++s)
    for (int64_t i = 0; i < args->length; ++i)
      if (const int64_t at = args->sources[s] * args->length + i; args->mask[at]) *place++ = at;
  const auto run = CHOOSE_ISA(read_sources);
  run_team(threads, [&](int64_t thread, int64_t team) {
    run(*args, stage, make_source_bench(block, benches + thread * own), thread, team);
  });
  return 0;
}

}  // extern "C"
