// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Greedy decoding for as long as EMamba speaks: one token after another through decode_step.cpp and router_step.cpp,
// without a return to the caller in between. A step reads more memory than the processor's caches hold, so that whatever
// else is run between two steps begins cold, and costs a multiple of what it costs elsewhere.

#include <cmath>

#include "mamba_model.h"
#include "router_model.h"

namespace {

// Mirrored field by field in modeling_mambaformer/greedy_run.py.
struct GreedyArgs {
  const RunArgs* run;           // of one token a row, whose states are their own log
  const RouterArgs* router;     // of that token; null where EMamba writes every token
  int64_t* ids;                 // (batch), where both read the token
  int64_t* answers;             // (batch, room), of which `length` tokens are there, the last one not read yet
  const int64_t* said;          // (said_count), what was said before the one answer; null where nobody looks ahead
  const int64_t* ends;          // (end_count), tokens that end an answer
  const uint8_t* ended;         // (batch)
  const double* thresholds;     // (most)
  // The record, a position after another: margin and log-probability, expert and gap, (most, 2, batch) each; EMamba's
  // likeliest tokens, (most, batch).
  float* levels;
  int64_t *choices, *top;
  int64_t room, length, said_count, end_count, pad, most;
  int64_t read, asked;  // results: positions read, and whether ET5 is asked at the last
};

bool is_end(const GreedyArgs& args, int64_t token) {
  for (int64_t i = 0; i < args.end_count; ++i)
    if (args.ends[i] == token) return true;
  return false;
}

// Whether `first` and then `second` stand somewhere in `tokens`.
bool has_pair(const int64_t* tokens, int64_t count, int64_t first, int64_t second) {
  for (int64_t i = 0; i + 1 < count; ++i)
    if (tokens[i] == first && tokens[i + 1] == second) return true;
  return false;
}

}  // namespace

extern "C" {

int mambaformer_decode_run(const RunArgs* args);
int mambaformer_router_step(const RouterArgs* args);
void mambaformer_likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t* top, float* log_top);

// Reads the last token of each answer and puts the likeliest after it, until ET5 is asked, an answer ends, `most`
// positions have been read, or, for who looks ahead, the text ends as it did before. The tokens that follow the last
// position are the caller's to choose. Returns 0, or an error of the two steps, with `read` positions read before.
int mambaformer_greedy_run(GreedyArgs* pointer) {
  GreedyArgs& args = *pointer;
  const StepArgs& step = args.run->step;
  const int64_t batch = step.batch;
  args.read = args.asked = 0;
  while (args.read < args.most) {
    int64_t* last = args.answers + args.length + args.read - 1;  // of the first row
    for (int64_t b = 0; b < batch; ++b) args.ids[b] = last[b * args.room];
    if (const int error = mambaformer_decode_run(args.run)) return error;
    float *margin = args.levels + args.read * 2 * batch, *log_top = margin + batch;
    int64_t *expert = args.choices + args.read * 2 * batch, *gap = expert + batch, *top = args.top + args.read * batch;
    if (args.router) {
      RouterArgs router = *args.router;
      router.margin = margin, router.log_top = log_top;
      router.expert = expert, router.gap = gap, router.top = top;
      router.position += args.read;
      router.threshold = args.thresholds[args.read];
      if (const int error = mambaformer_router_step(&router)) return error;
    } else {
      mambaformer_likeliest(step.logits, batch, step.vocab, top, log_top);
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
    if (args.said) {
      const int64_t written = args.length + args.read - 1;
      stop = stop || has_pair(args.said, args.said_count, *last, *top) || has_pair(args.answers, written, *last, *top);
    }
    if (stop || args.asked) break;
    for (int64_t b = 0; b < batch; ++b) last[b * args.room + 1] = args.ended[b] ? args.pad : top[b];
  }
  return 0;
}

}  // extern "C"
