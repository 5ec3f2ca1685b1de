// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Causal depthwise convolution followed by silu, as Mamba applies it before its selective scan: forward, backward and
// one step at a time. float32, channels last, behind the same plain C interface as the scan.
//
//   out_t = silu(bias + sum_k weight[k] x_{t - kernel + 1 + k}),  x before the first step being zero

#include "common.h"

namespace {

// Mirrored field by field in modeling_mambaformer/causal_conv.py. Strides are counted in floats.
struct ConvArgs {
  const float *x, *weight, *bias, *grad_out;
  float *window, *out, *grad_x, *grad_weight, *grad_bias;
  int64_t batch, length, dim, kernel, x_batch, x_time, grad_out_batch, grad_out_time, threads;
};

}  // namespace

#define ISA_KERNELS "causal_conv_kernels.h"
#include "for_each_isa.h"

// The functions below return 0, or 1 when memory for their workspace is missing.
extern "C" {

int mambaformer_conv_forward(const ConvArgs* pointer) {
  const ConvArgs& args = *pointer;
  const int64_t blocks = (args.dim + BLOCK - 1) / BLOCK, items = args.batch * blocks, size = args.kernel * BLOCK;
  const int64_t threads = thread_count(args.threads, items, args.batch * args.length * args.dim * args.kernel);
  const auto forward = CHOOSE_ISA(conv_forward_block);
  Buffer workspace(threads * size);
  if (!workspace.data) return 1;
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    float* own = workspace.data + thread_index() * size;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) forward(args, item / blocks, item % blocks * BLOCK, own);
  }
  return 0;
}

int mambaformer_conv_backward(const ConvArgs* pointer) {
  const ConvArgs& args = *pointer;
  const int64_t blocks = (args.dim + BLOCK - 1) / BLOCK, items = args.batch * blocks;
  const int64_t size = (3 * args.kernel + 1) * BLOCK, matrix = args.dim * args.kernel;
  const int64_t threads = thread_count(args.threads, items, args.batch * args.length * args.dim * args.kernel);
  const auto backward = CHOOSE_ISA(conv_backward_block);
  Buffer workspace(threads * size), parts(args.batch * (matrix + args.dim));
  if (!workspace.data || !parts.data) return 1;
  float* part_weight = parts.data;                       // [batch][dim][kernel]
  float* part_bias = part_weight + args.batch * matrix;  // [batch][dim]
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  {
    float* own = workspace.data + thread_index() * size;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t b = item / blocks;
      backward(args, b, item % blocks * BLOCK, own, part_weight + b * matrix, part_bias + b * args.dim);
    }
  }
  add_up(args.grad_weight, part_weight, matrix, args.batch, matrix, 1);
  if (args.grad_bias) add_up(args.grad_bias, part_bias, args.dim, args.batch, args.dim, 1);
  return 0;
}

// One time step: `x` (batch, dim) enters `window` (batch, dim, kernel), whose oldest entry leaves it.
int mambaformer_conv_step(const ConvArgs* pointer) {
  const ConvArgs& args = *pointer;
  const int64_t K = args.kernel;
  for (int64_t b = 0; b < args.batch; ++b)
    for (int64_t c = 0; c < args.dim; ++c) {
      float* window = args.window + (b * args.dim + c) * K;
      float sum = args.bias ? args.bias[c] : 0.0f;
      for (int64_t k = 0; k + 1 < K; ++k) {
        window[k] = window[k + 1];
        sum += window[k] * args.weight[c * K + k];
      }
      window[K - 1] = args.x[b * args.x_batch + c];
      args.out[b * args.dim + c] = sum + window[K - 1] * args.weight[c * K + K - 1];
    }
  CHOOSE_ISA(silu_in_place)(args.out, args.batch * args.dim);
  return 0;
}

}  // extern "C"
