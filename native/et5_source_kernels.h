// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What one thread does for the keys and values of sources. Included by for_each_isa.h once for every instruction set.

#include "prefill_products.h"

namespace ISA_NAMESPACE {

// Some rows of one matrix: multiplied with a block of tokens, and each head's part put where its tokens stand.
ISA_INLINE void source_rows(const SourceArgs& args, int64_t m, const Range& rows, const Tokens& in,
                            const int64_t* places, const SourceBench& own) {
  const int64_t heads = args.heads, width = args.width, length = args.length;
  multiply_tokens(args.matrices[m], rows, in, own.sums - rows.first, BLOCK, false, own.desk);
  for (int64_t r = rows.first, some; r < rows.last; r += some) {
    const int64_t head = r / width, left = width - r % width;
    some = left < rows.last - r ? left : rows.last - r;
    for (int64_t t = 0; t < in.count; ++t) {
      const int64_t source = places[t] / length, at = places[t] % length;
      std::memcpy(args.to[m] + ((source * heads + head) * length + at) * width + r % width,
                  own.sums + t * BLOCK + r - rows.first, sizeof(float) * some);
    }
  }
}

ISA_TARGET static void read_sources(const SourceArgs& args, const SourceStage& stage, const SourceBench& own,
                                    int64_t thread, int64_t threads) {
  const int64_t hidden = args.hidden, inner = args.heads * args.width;
  bool rounded = false;
  for (int64_t m = 0; m < args.matrix_count; ++m) rounded = rounded || takes_bytes(args.matrices[m].format);
  for (int64_t first = 0; first < stage.tokens; first += TOKENS) {
    const int64_t count = stage.tokens - first < TOKENS ? stage.tokens - first : TOKENS;
    const int64_t* places = stage.places + first;
    stage.pieces[thread].taken = 0;
    for (int64_t t = thread; t < count; t += threads) {
      const float* x = args.states + places[t] * hidden;
      std::memcpy(stage.x + t * stage.row, x, sizeof(float) * hidden);
      if (rounded) stage.scales[t] = round_to_bytes(x, hidden, filled(hidden), stage.bytes + t * stage.byte_row);
    }
    meet();
    const Tokens in = {stage.x, stage.bytes, stage.scales, stage.row, stage.byte_row, count};
    const int64_t rows = args.matrix_count * inner;
    for (Range piece; take_piece(stage.pieces, rows, thread, threads, LEAST_PIECE, false, piece);)
      for (int64_t at = piece.first, m; at < piece.last; at = (m + 1) * inner) {
        m = at / inner;
        const int64_t end = piece.last < (m + 1) * inner ? piece.last : (m + 1) * inner;
        source_rows(args, m, {at - m * inner, end - m * inner}, in, places, own);
      }
    meet();
  }
}

}  // namespace ISA_NAMESPACE
