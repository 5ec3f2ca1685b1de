// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What a text may go on with, by what it said before (prompt lookup).

#pragma once

#include <cstdint>

// How many tokens must, and may, agree with an earlier place before something is proposed; and how many do in a passage
// that is being copied and will go on: where fewer agree, one token is proposed. Mirrored in
// modeling_mambaformer/look_ahead.py.
struct LookupRules {
  int64_t shortest, longest, copied;
};

namespace {

// A text in two pieces.
struct Text {
  const int64_t *said, *answer;
  int64_t said_count, answer_count;
  int64_t count() const { return said_count + answer_count; }
  int64_t operator[](int64_t at) const { return at < said_count ? said[at] : answer[at - said_count]; }
};

// Puts up to `width` tokens worth proposing into `to`, what followed where `text` last was as it ends; returns how many.
[[maybe_unused]] int64_t continuation(const Text& text, const LookupRules& rules, int64_t width, int64_t* to) {
  const int64_t count = text.count();
  int64_t agreed = 0, after = count;
  for (int64_t end = count - 1; end >= rules.shortest && agreed < rules.longest; --end) {
    const int64_t most = end < rules.longest ? end : rules.longest;
    int64_t same = 0;
    while (same < most && text[end - 1 - same] == text[count - 1 - same]) ++same;
    if (same > agreed) agreed = same, after = end;
  }
  if (agreed < rules.shortest) return 0;
  const int64_t most = agreed < rules.copied && width > 1 ? 1 : width;
  int64_t proposed = 0;
  while (proposed < most && after + proposed < count) to[proposed] = text[after + proposed], ++proposed;
  return proposed;
}

}  // namespace
