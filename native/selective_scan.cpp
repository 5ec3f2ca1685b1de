// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3.2 and algorithm 2) on a CPU, forward and
// backward, float32, behind a plain C interface: no PyTorch and no Python headers, loaded by ctypes.
//
//   delta' = softplus(delta + delta_bias)          h_t = exp(delta'_t A) h_{t-1} + delta'_t u_t B_t
//   y_t    = sum_n C_t[n] h_t[n] + D u_t           out_t = y_t silu(z_t)
//
// States are (batch, dim, state) in memory. The forward pass saves the state at the start of every chunk of time
// steps; the backward pass computes a chunk's states again from there.

#include "common.h"

namespace {

constexpr int64_t CHUNK = 32;  // time steps between two saved states
constexpr int64_t WIDEST = 16;  // lanes of a vector

// Mirrored field by field in modeling_mambaformer/selective_scan_native.py. Strides are counted in floats.
struct ScanArgs {
  const float *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial_state;
  float *out, *last_state, *checkpoints;
  const float *grad_out, *grad_last_state;
  float *grad_u, *grad_delta, *grad_A, *grad_B, *grad_C, *grad_D, *grad_z, *grad_delta_bias, *grad_initial_state;
  int64_t batch, length, dim, state;
  int64_t u_batch, u_time, delta_batch, delta_time, B_batch, B_time, C_batch, C_time, z_batch, z_time;
  int64_t grad_out_batch, grad_out_time;
  int64_t delta_softplus, threads;
};

// Where one work item leaves its share of the gradients that several work items add to.
struct Partial {
  float *grad_A, *grad_B, *grad_C, *grad_D, *grad_bias;
};

constexpr int64_t chunk_count(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

}  // namespace

#define ISA_KERNELS "selective_scan_kernels.h"
#include "for_each_isa.h"

// The functions below return 0, or 1 when memory for their workspace is missing.
extern "C" {

// Raised with every change of an interface: of ScanArgs, of ConvArgs or of what they mean.
int64_t mambaformer_abi() { return 2; }
int64_t mambaformer_scan_chunk() { return CHUNK; }
const char* mambaformer_isa() { return isa_name(); }

int mambaformer_scan_forward(const ScanArgs* pointer) {
  const ScanArgs& args = *pointer;
  const int64_t blocks = (args.dim + BLOCK - 1) / BLOCK, items = args.batch * blocks;
  const int64_t threads = thread_count(args.threads, items, args.batch * args.length * args.dim * args.state);
  const int64_t size = (3 * CHUNK + 2 * args.state) * BLOCK;
  const auto forward = CHOOSE_ISA(forward_block);
  Buffer workspace(threads * size);
  if (!workspace.data) return 1;
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    const FlushDenormals flush;
    float* own = workspace.data + thread_index() * size;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) forward(args, item / blocks, item % blocks * BLOCK, own);
  }
  return 0;
}

int mambaformer_scan_backward(const ScanArgs* pointer) {
  const ScanArgs& args = *pointer;
  const int64_t blocks = (args.dim + BLOCK - 1) / BLOCK, items = args.batch * blocks;
  const int64_t threads = thread_count(args.threads, items, args.batch * args.length * args.dim * args.state);
  const int64_t size = (8 * CHUNK + 4 * args.state + 2) * BLOCK + 2 * CHUNK * args.state * WIDEST;
  const int64_t matrix = args.dim * args.state, sequence = args.length * args.state, all = args.batch * sequence;
  const auto backward = CHOOSE_ISA(backward_block);
  Buffer workspace(threads * size), parts(args.batch * (matrix + 2 * args.dim) + 2 * blocks * all);
  if (!workspace.data || !parts.data) return 1;
  float* part_A = parts.data;  // [batch][dim][state]
  float* part_D = part_A + args.batch * matrix;  // [batch][dim]
  float* part_bias = part_D + args.batch * args.dim;  // [batch][dim]
  float* part_B = part_bias + args.batch * args.dim;  // [blocks][batch][length][state]
  float* part_C = part_B + blocks * all;  // [blocks][batch][length][state]
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    const FlushDenormals flush;
    float* own = workspace.data + thread_index() * size;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t b = item / blocks, block = item % blocks, at = block * all + b * sequence;
      const Partial part = {part_A + b * matrix, part_B + at, part_C + at, part_D + b * args.dim,
                            part_bias + b * args.dim};
      backward(args, b, block * BLOCK, own, part);
    }
  }
  add_up(args.grad_A, part_A, matrix, args.batch, matrix, threads);
  add_up(args.grad_B, part_B, all, blocks, all, threads);
  add_up(args.grad_C, part_C, all, blocks, all, threads);
  if (args.grad_D) add_up(args.grad_D, part_D, args.dim, args.batch, args.dim, 1);
  if (args.grad_delta_bias) add_up(args.grad_delta_bias, part_bias, args.dim, args.batch, args.dim, 1);
  return 0;
}

}  // extern "C"
