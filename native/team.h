// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// A team of threads that meet often, smaller while others want its processors.
//
// Threads that meet every few microseconds are as slow as the one whose processor another process holds: a time slice
// is some milliseconds, a decoding step less than one. So the team watches how long its threads were kept from running.
// Where that is nearly half of the time, again and again, half of them do as well alone: the team halves itself for a
// while, twice as long if it happens again, and then tries with more. Results do not depend on its size.

#pragma once

#include <atomic>
#include <ctime>

#include "common.h"

// One for the whole library, as its threads are.
struct Crowd {
  static constexpr int64_t WINDOW = 20'000'000;  // nanoseconds of team work that are judged together
  static constexpr int64_t SHORTEST = 20'000'000, LONGEST = 500'000'000;  // nanoseconds until more threads are tried
  static constexpr int64_t MOST_HALVINGS = 6;

  std::atomic<int64_t> halvings{0}, until{0}, wait{0}, worked{0}, kept{0}, late{0};

  int64_t admitted(int64_t threads, int64_t now) {
    int64_t times = halvings;
    if (times > 0 && now >= until && halvings.compare_exchange_strong(times, times - 1)) {
      until = now + 2 * WINDOW;  // one step up at a time
      --times;
    }
    const int64_t some = threads >> times;
    return some > 0 ? some : 1;
  }

  // A team worked for some nanoseconds, of which one of its threads was kept from running for `longest`.
  void learn(int64_t nanoseconds, int64_t longest, int64_t now) {
    kept += longest;
    if ((worked += nanoseconds) < WINDOW) return;
    const bool crowded = 20 * kept > 9 * worked;
    worked = kept = 0;
    if (!crowded) {
      late = 0;
      wait = wait / 2;
      return;
    }
    if (++late < 2) return;  // once is an accident
    wait = wait < SHORTEST ? SHORTEST : 2 * wait < LONGEST ? 2 * wait : LONGEST;
    until = now + wait;
    if (halvings < MOST_HALVINGS) ++halvings;
  }
};
inline Crowd crowd;

namespace {

[[maybe_unused]] int64_t nanoseconds([[maybe_unused]] bool of_thread) {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec time;
  clock_gettime(of_thread ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
#else
  return 0;
#endif
}

// work(thread, threads) in each thread of a team.
template <class Work>
void run_team(int64_t wish, const Work& work) {
  const int64_t start = wish > 1 ? nanoseconds(false) : 0, threads = wish > 1 ? crowd.admitted(wish, start) : 1;
  if (threads < 2) {
    const FlushDenormals flush;
    work(0, 1);
    return;
  }
  std::atomic<int64_t> least{INT64_MAX};  // nanoseconds that a thread ran
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const FlushDenormals flush;
    const int64_t before = nanoseconds(true);
    work(thread_index(), team_size());
    const int64_t ran = nanoseconds(true) - before;
    int64_t known = least;
    while (ran < known && !least.compare_exchange_weak(known, ran)) {
    }
  }
  const int64_t now = nanoseconds(false);
  crowd.learn(now - start, now - start - least, now);
}

}  // namespace
