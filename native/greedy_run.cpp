// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Greedy decoding for as long as EMamba speaks: one token after another through decode_step.cpp and router_step.cpp,
// without a return to the caller in between. A step reads more memory than the processor's caches hold, so that whatever
// else is run between two steps begins cold, and costs a multiple of what it costs elsewhere.
//
// For who looks ahead, a step reads the next token of the one answer and those proposed to follow it, and keeps the
// state after each. As long as the answer goes on with what was read, nothing is left to read; where it does not, the
// next step begins with the state before that place.

#include <cmath>
#include <cstring>

#include "draft.h"
#include "look_ahead.h"
#include "router_model.h"

namespace {

// Look-ahead in one answer. Mirrored field by field in modeling_mambaformer/greedy_run.py.
struct AheadArgs {
  const int64_t* said;          // (said_count), what was said before the answer
  void* const* window_logs[2];  // two logs of 1 + width tokens, a layer each; or null until they are needed
  float* const* state_logs[2];
  const int64_t* threads;       // (1 + width), for a step of one token, of two, ...
  const DraftArgs* draft;       // proposes where the text does not; or null
  LookupRules rules;
  int64_t said_count, width, longest_answer;
  // The last step: how many tokens it read, none if there was no step yet; which of them was taken last; and in which
  // log their states are, below 0 for none yet.
  int64_t held, at, log;
  int64_t passes, proposed, accepted;  // done so far: steps with a proposal, tokens of these, tokens accepted
};

// Mirrored field by field in modeling_mambaformer/greedy_run.py.
struct GreedyArgs {
  RunArgs* run;                 // of one token a row, whose states are their own log; or of one row's 1 + width tokens
  const RouterArgs* router;     // of the first token; null where EMamba writes every token
  AheadArgs* ahead;             // null where nobody looks ahead
  int64_t* ids;                 // where both read the tokens
  int64_t* answers;             // (batch, room), of which `length` tokens are there, the last one not read yet
  const int64_t* ends;          // (end_count), tokens that end an answer
  const uint8_t* ended;         // (batch)
  const double* thresholds;     // (most)
  // The record, a position after another: margin and log-probability, expert and gap, (most, 2, batch) each; EMamba's
  // likeliest tokens, (most, batch).
  float* levels;
  int64_t *choices, *top;
  int64_t room, length, end_count, pad, most, round_hidden;  // the latter: the hidden states are those of bfloat16
  int64_t read, asked;  // results: positions read, and whether ET5 is asked at the last
};

enum Error : int { NO_MEMORY = 1, NEEDS_LOGS = 4 };  // the first is one of decode_step.cpp's

bool is_end(const GreedyArgs& args, int64_t token) {
  for (int64_t i = 0; i < args.end_count; ++i)
    if (args.ends[i] == token) return true;
  return false;
}

}  // namespace

extern "C" {

int mambaformer_decode_run(const RunArgs* args);
int mambaformer_router_step(const RouterArgs* args);
int64_t mambaformer_draft(const DraftArgs* args, const float* hidden, int64_t token, int64_t most, int64_t* to);
void mambaformer_likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t* top, float* log_top);

}  // extern "C"

namespace {

int run_step(const GreedyArgs& args) {
  const StepArgs& step = args.run->step;
  if (const int error = mambaformer_decode_run(args.run)) return error;
  if (args.round_hidden)
    for (int64_t i = 0; i < step.batch * args.run->length * step.hidden; ++i) {
      const uint32_t bits = static_cast<uint32_t>(nearest_bfloat16(step.hidden_out[i])) << 16;
      std::memcpy(step.hidden_out + i, &bits, sizeof bits);
    }
  return 0;
}

// Puts what may follow `length` tokens of the answer into `to`; returns how many tokens, below 0 for want of memory.
int64_t propose(const GreedyArgs& args, const AheadArgs& ahead, int64_t length, int64_t* to) {
  const int64_t left = ahead.longest_answer - length - 1, room = left < ahead.width ? left : ahead.width;
  if (room <= 0) return 0;
  int64_t count = continuation({ahead.said, args.answers, ahead.said_count, length}, ahead.rules, room, to);
  if (count == 0 && ahead.draft && ahead.held) {
    const StepArgs& step = args.run->step;
    count = mambaformer_draft(ahead.draft, step.hidden_out + ahead.at * step.hidden, args.answers[length - 1], room, to);
  }
  int64_t before_end = count < 0 ? count : 0;
  while (before_end < count && !is_end(args, to[before_end])) ++before_end;
  return before_end;
}

// Sees to it that the last of `length` tokens of the answer is read, as the `ahead.at`-th of the last step.
int read_ahead(const GreedyArgs& args, AheadArgs& ahead, int64_t length) {
  RunArgs& run = *args.run;
  const int64_t token = args.answers[length - 1];
  if (ahead.at + 1 < ahead.held && args.ids[ahead.at + 1] == token) {
    ++ahead.at;
    ++ahead.accepted;
    return 0;
  }
  const int64_t proposed = propose(args, ahead, length, args.ids + 1);
  if (proposed < 0) return NO_MEMORY;
  if (proposed && !ahead.window_logs[0]) return NEEDS_LOGS;
  if (ahead.held > 1) run.begin = ahead.at;
  args.ids[0] = token;
  const int64_t next = proposed ? ahead.log == 0 : ahead.log;
  run.length = 1 + proposed;
  run.step.threads = ahead.threads[proposed];
  run.log_begin = proposed ? 0 : run.begin;
  run.window_log = proposed ? ahead.window_logs[next] : run.step.windows;
  run.state_log = proposed ? ahead.state_logs[next] : run.step.states;
  if (const int error = run_step(args)) return error;
  run.step.windows = run.window_log, run.step.states = run.state_log;
  ahead.held = run.length, ahead.at = 0, ahead.log = next;
  ahead.passes += proposed > 0;
  ahead.proposed += proposed;
  return 0;
}

}  // namespace

extern "C" {

// As `continuation` of a text in one piece.
int64_t mambaformer_continuation(const int64_t* text, int64_t count, const LookupRules* rules, int64_t width,
                                 int64_t* to) {
  return continuation({text, nullptr, count, 0}, *rules, width, to);
}

// Reads the last token of each answer and puts the likeliest after it, until ET5 is asked, an answer ends, or `most`
// positions have been read. The tokens that follow the last position are the caller's to choose. Returns 0; an error of the two
// steps, with `read` positions read before; or, likewise, NEEDS_LOGS: those of `ahead`, to go on from there.
int mambaformer_greedy_run(GreedyArgs* pointer) {
  GreedyArgs& args = *pointer;
  const StepArgs& step = args.run->step;
  const int64_t batch = step.batch;
  args.read = args.asked = 0;
  while (args.read < args.most) {
    const int64_t length = args.length + args.read;
    int64_t *last = args.answers + length - 1, at = 0;  // of the first row
    if (args.ahead) {
      if (const int error = read_ahead(args, *args.ahead, length)) return error;
      at = args.ahead->at;
    } else {
      for (int64_t b = 0; b < batch; ++b) args.ids[b] = last[b * args.room];
      if (const int error = run_step(args)) return error;
    }
    float *margin = args.levels + args.read * 2 * batch, *log_top = margin + batch;
    int64_t *expert = args.choices + args.read * 2 * batch, *gap = expert + batch, *top = args.top + args.read * batch;
    if (args.router) {
      RouterArgs router = *args.router;
      router.ids += at, router.embeddings += at * router.dim, router.states += at * router.dim;
      router.logits += at * router.vocab;
      router.margin = margin, router.log_top = log_top;
      router.expert = expert, router.gap = gap, router.top = top;
      router.position += args.read;
      router.threshold = args.thresholds[args.read];
      if (const int error = mambaformer_router_step(&router)) return error;
    } else {
      mambaformer_likeliest(step.logits + at * step.vocab, batch, step.vocab, top, log_top);
      for (int64_t b = 0; b < batch; ++b) {
        margin[b] = NAN, expert[b] = gap[b] = 0;
        if (args.ended[b]) log_top[b] = NAN, expert[b] = -1;
      }
    }
    ++args.read;
    bool stop = args.read == args.most;
    for (int64_t b = 0; b < batch; ++b) {
      if (expert[b] == 1) args.asked = 1;
      if (!args.ended[b] && is_end(args, top[b])) stop = true;
    }
    if (stop || args.asked) break;
    for (int64_t b = 0; b < batch; ++b) last[b * args.room + 1] = args.ended[b] ? args.pad : top[b];
  }
  return 0;
}

}  // extern "C"
