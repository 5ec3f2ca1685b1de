// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What a token's row of numbers goes through beside the products, in either expert. Included by their kernels once for
// every instruction set.

namespace ISA_NAMESPACE {

// to = x / rms(x) * weight for every row.
ISA_INLINE void rms_norm(const float* x, const float* weight, int64_t count, int64_t batch, double epsilon,
                         float* to) {
  for (int64_t b = 0; b < batch; ++b, x += count, to += count) {
    constexpr int CHAINS = 4;  // so that none waits for itself
    Vec squares[CHAINS] = {};
    int64_t j = 0;
    for (; j + CHAINS * W <= count; j += CHAINS * W)
      for (int k = 0; k < CHAINS; ++k) squares[k] = multiply_add(load(x + j + k * W), load(x + j + k * W), squares[k]);
    for (; j < count; j += W) squares[0] += load_part(x + j, count - j) * load_part(x + j, count - j);
    const float mean = lane_sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(count);
    const float factor = 1.0f / std::sqrt(mean + static_cast<float>(epsilon));
    for (int64_t i = 0; i < count; i += W)
      store_part(to + i, load_part(x + i, count - i) * factor * load_part(weight + i, count - i), count - i);
  }
}

ISA_INLINE float as_float(float x) { return x; }
ISA_INLINE float as_float(int8_t x) { return x; }
ISA_INLINE void from_float(float x, float* to) { *to = x; }
ISA_INLINE void from_float(float x, uint16_t* to) { *to = nearest_bfloat16(x); }

// to = the part of a token's embedding, whose format the model tells.
template <class T, class Model>
ISA_INLINE void embed_row(const Model& model, int64_t id, const Range& part, float* to) {
  const T* row = static_cast<const T*>(model.embedding) + id * model.embedding_row;
  const float scale = model.embedding_scale ? model.embedding_scale[id] : 1.0f;
  for (int64_t i = part.first; i < part.last; ++i) to[i] = as_float(row[i]) * scale;
}
template <class Model>
ISA_INLINE void embed(const Model& model, int64_t id, const Range& part, float* to) {
  if (model.embedding_format == BFLOAT16)
    embed_row<uint16_t>(model, id, part, to);
  else if (model.embedding_format == INT8)
    embed_row<int8_t>(model, id, part, to);
  else
    embed_row<float>(model, id, part, to);
}

}  // namespace ISA_NAMESPACE
