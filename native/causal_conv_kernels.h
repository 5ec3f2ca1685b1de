// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// The causal convolution of one channel block of one sequence. Included by for_each_isa.h once for every instruction
// set. Weights are kept as [kernel][BLOCK] in the workspace; the last row meets the current time step.

namespace ISA_NAMESPACE {

ISA_INLINE void gather_weight(float* to, const ConvArgs& args, int64_t first, int64_t channels) {
  for (int64_t k = 0; k < args.kernel; ++k)
    for (int64_t c = 0; c < BLOCK; ++c)
      to[k * BLOCK + c] = c < channels ? args.weight[(first + c) * args.kernel + k] : 0.0f;
}

ISA_INLINE void scatter_weight(float* to, const float* from, int64_t channels, int64_t kernel) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < kernel; ++k) to[c * kernel + k] = from[k * BLOCK + c];
}

// The convolution at time t before its activation. `x` points to time t of the first of `lanes` channels.
ISA_INLINE Vec convolve(const ConvArgs& args, const float* weight, const float* x, int64_t t, int64_t channel,
                        int64_t lanes) {
  const int64_t K = args.kernel;
  Vec sum = args.bias ? load_part(args.bias + channel, lanes) : Vec{};
  for (int64_t k = t + 1 < K ? K - 1 - t : 0; k < K; ++k)
    sum += load(weight + k * BLOCK) * load_part(x + (k + 1 - K) * args.x_time, lanes);
  return sum;
}

ISA_TARGET static void silu_in_place(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    const Vec y = load_part(x + i, count - i);
    store_part(x + i, silu(y), count - i);
  }
}

ISA_TARGET static void conv_forward_block(const ConvArgs& args, int64_t b, int64_t first, float* weight) {
  const int64_t channels = args.dim - first < BLOCK ? args.dim - first : BLOCK;
  gather_weight(weight, args, first, channels);
  for (int64_t t = 0; t < args.length; ++t) {
    const float* x = args.x + b * args.x_batch + t * args.x_time + first;
    float* out = args.out + (b * args.length + t) * args.dim + first;
    for (int64_t c = 0; c < channels; c += W) {
      const Vec y = convolve(args, weight + c, x + c, t, first + c, channels - c);
      store_part(out + c, silu(y), channels - c);
    }
  }
}

// The gradient before the activation is kept for the last `kernel` steps, in a ring; as soon as it is known for all
// steps that an input reached, that input's gradient is complete.
ISA_TARGET static void conv_backward_block(const ConvArgs& args, int64_t b, int64_t first, float* workspace,
                                           float* part_weight, float* part_bias) {
  const int64_t channels = args.dim - first < BLOCK ? args.dim - first : BLOCK, K = args.kernel, L = args.length;
  float* weight = workspace;              // [K][BLOCK]
  float* ring = weight + K * BLOCK;       // [K][BLOCK]
  float* grad_weight = ring + K * BLOCK;  // [K][BLOCK]
  float* grad_bias = grad_weight + K * BLOCK;
  gather_weight(weight, args, first, channels);
  std::memset(ring, 0, sizeof(float) * (2 * K + 1) * BLOCK);
  for (int64_t t = 0; t < L + K - 1; ++t) {
    const int64_t x_at = b * args.x_batch + t * args.x_time + first;  // an address only while there is an input
    const int64_t grad_at = b * args.grad_out_batch + t * args.grad_out_time + first;
    float* now = ring + t % K * BLOCK;
    const int64_t done = t - K + 1;
    for (int64_t c = 0; c < channels; c += W) {
      const int64_t lanes = channels - c;
      Vec grad = {};
      if (t < L) {
        const float* x = args.x + x_at + c;
        const Vec y = convolve(args, weight + c, x, t, first + c, lanes), s = sigmoid(y);
        grad = load_part(args.grad_out + grad_at + c, lanes) * s * (1.0f + y * (1.0f - s));
        store(grad_bias + c, load(grad_bias + c) + grad);
        for (int64_t k = t + 1 < K ? K - 1 - t : 0; k < K; ++k) {
          float* sum = grad_weight + k * BLOCK + c;
          store(sum, load(sum) + grad * load_part(x + (k + 1 - K) * args.x_time, lanes));
        }
      }
      store(now + c, grad);
      if (done >= 0) {
        Vec grad_x = {};
        for (int64_t k = 0; k < K; ++k)
          grad_x += load(weight + (K - 1 - k) * BLOCK + c) * load(ring + (done + k) % K * BLOCK + c);
        store_part(args.grad_x + (b * L + done) * args.dim + first + c, grad_x, lanes);
      }
    }
  }
  scatter_weight(part_weight + first * K, grad_weight, channels, K);
  std::memcpy(part_bias + first, grad_bias, sizeof(float) * channels);
}

}  // namespace ISA_NAMESPACE
