// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What a token goes through in a T5's encoder and decoder alike, beside products and attention. Included by their
// kernels once for every instruction set.

#include "token_rows.h"

namespace ISA_NAMESPACE {

ISA_INLINE Vec activated(Vec x, int64_t activation) {
  if (activation == RELU) return larger(Vec{}, x);
  if (activation == GELU_TANH) {  // 1 + tanh(y) = 2 sigmoid(2 y)
    const Vec y = 0.7978845608f * (x + 0.044715f * x * x * x);
    return times_sigmoid(x, 2.0f * y);
  }
  float part[W];
  store(part, x);
  for (int i = 0; i < W; ++i) part[i] *= 0.5f * (1.0f + std::erf(part[i] * 0.7071067812f));
  return load(part);
}

// to = activated(to), times `gate` where there is one: the part of one token's feed-forward row.
ISA_INLINE void activate(const Range& part, int64_t activation, const float* gate, float* to) {
  for (int64_t i = part.first; i < part.last; i += W) {
    const int64_t lanes = part.last - i;
    Vec x = activated(load_part(to + i, lanes), activation);
    if (gate) x *= load_part(gate + i, lanes);
    store_part(to + i, x, lanes);
  }
}

}  // namespace ISA_NAMESPACE
