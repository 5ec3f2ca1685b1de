// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// One linear layer of int8 or 4-bit weights on a CPU, for any number of tokens: y = W x + bias, each token being
// rounded to int8 as in the decoding step, whose sums these are.
//
// The weights are read where the model keeps them. Rows that have to be filled up are copied a few at a time, which
// only matrices of odd sizes need. Tokens are taken in blocks, so that the memory needed does not depend on their
// number. Neither that nor the number of threads changes a token's result.

#include <cmath>

#include "team.h"
#include "token_blocks.h"

namespace {

constexpr int64_t STRIP = 32;  // rows of the matrix that are made ready together: whole panels
constexpr int64_t WIDEST = 65536;  // columns, whose products still add up in 32 bits

static_assert(STRIP % WIDEST_PANEL == 0 && STRIP % SPAN == 0, "a strip is whole panels");

// x is (tokens, columns) and y (tokens, rows), both without gaps. INT8 rows of `matrix` are as long as its columns, not
// filled up, and its sums are not read. Mirrored field by field in modeling_mambaformer/native_linear.py.
struct LinearArgs {
  Matrix matrix;
  const float* x;
  float* y;
  int64_t tokens, threads;
};

// What the threads share: a block of tokens, rounded. Rows are byte_row apart, or filled(columns) if they are not MANY.
struct LinearStage {
  int8_t* bytes;
  float* scales;
  int64_t byte_row;
};

// What each thread has for itself.
struct LinearBench {
  Desk desk;
  int8_t* strip;  // [STRIP][filled(columns)]
  int32_t* strip_sums;
};

bool needs_filling(const Matrix& matrix) { return matrix.format == INT8 && filled(matrix.columns) != matrix.columns; }

int64_t linear_bench_size(const Matrix& matrix, int64_t block) {
  const int64_t width = filled(matrix.columns);
  return desk_size(block) + whole_lines(STRIP) +
         (needs_filling(matrix) ? whole_lines(STRIP * width / 4) : 0);
}

LinearBench make_linear_bench(const Matrix& matrix, int64_t block, float* memory) {
  Arena arena(memory);
  const int64_t width = filled(matrix.columns);
  LinearBench bench;
  bench.desk = take_desk(arena, block);
  bench.strip_sums = reinterpret_cast<int32_t*>(arena.take(STRIP));
  bench.strip = needs_filling(matrix) ? reinterpret_cast<int8_t*>(arena.take(STRIP * width / 4)) : nullptr;
  return bench;
}

}  // namespace

#define ISA_KERNELS "linear_kernels.h"
#define ISA_WITH_BYTES
#include "for_each_isa.h"

extern "C" {

// Raised with every change of LinearArgs or of what it means.
int64_t mambaformer_linear_abi() { return 1; }

// Returns 0; 1 when memory for the workspace is missing; 2, with nothing done, for a format or size that is not served.
int mambaformer_linear(const LinearArgs* pointer) {
  const LinearArgs& args = *pointer;
  const Matrix& matrix = args.matrix;
  if (!takes_bytes(matrix.format)) return 2;
  if (matrix.rows < 0 || matrix.columns < 1 || matrix.columns > WIDEST || args.tokens < 0) return 2;
  if (args.tokens == 0 || matrix.rows == 0) return 0;

  const int64_t block = args.tokens < TOKENS ? args.tokens : TOKENS;
  const int64_t threads = thread_count(args.threads, (matrix.rows + SPAN - 1) / SPAN,
                                       args.tokens * matrix.rows * matrix.columns);
  const int64_t own = linear_bench_size(matrix, block);
  LinearStage stage;
  stage.byte_row = 4 * spread(filled(matrix.columns) / 4);
  const int64_t rounded = block * stage.byte_row / 4;
  Buffer workspace(whole_lines(rounded) + whole_lines(block) + threads * own + LINE);
  if (!workspace.data) return 1;
  Arena arena(workspace);
  stage.bytes = reinterpret_cast<int8_t*>(arena.take(rounded));
  stage.scales = arena.take(block);
  float* benches = arena.next;
  const auto run = CHOOSE_ISA(run_linear);
  run_team(threads, [&](int64_t thread, int64_t team) {
    run(args, stage, make_linear_bench(matrix, block, benches + thread * own), thread, team);
  });
  return 0;
}

}  // extern "C"
