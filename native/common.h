// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// What the compiled operators share: the split of work, threads, workspaces and the choice of instruction set.
//
// Sequences are (batch, length, dim) with neighbouring channels. Work is split into (sequence, block of channels); a
// block runs through time on its own, so threads share nothing. Sums over blocks and sequences are made in a fixed
// order: results do not depend on the number of threads.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <utility>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // of values that gcc 12's own AVX-512 functions leave open and never read
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#if __has_include(<avxvnniintrin.h>)  // since gcc 11 and clang 12
#include <cpuid.h>
#define KNOWS_AVXVNNI
#endif
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t BLOCK = 64;  // channels of one work item

// What MAMBAFORMER_ISA asks for: 0 portable, 1 avx2, 2 avxvnni, 3 the best there is.
[[maybe_unused]] int wished_isa() {
  const char* wish = std::getenv("MAMBAFORMER_ISA");
  const char* names[] = {"portable", "avx2", "avxvnni"};
  for (int i = 0; wish && i < 3; ++i)
    if (std::strcmp(wish, names[i]) == 0) return i;
  return 3;
}

// Whether the AVX2 kernels may run here.
[[maybe_unused]] bool has_avx2() {
#if defined(__x86_64__)
  return wished_isa() > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

// Whether those with its int8 products may. Not every compiler that has them knows their name at run time; and a virtual
// machine takes long to say what its processor has, so that it is asked once.
[[maybe_unused]] bool has_avxvnni() {
#ifdef KNOWS_AVXVNNI
  static const bool there = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  }();
  return there && wished_isa() > 1 && has_avx2();
#else
  return false;
#endif
}

// Whether the AVX-512 kernels with their int8 products may.
[[maybe_unused]] bool has_avx512() {
#if defined(__x86_64__)
  return wished_isa() > 2 && has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// The best of them.
[[maybe_unused]] const char* isa_name() {
  return has_avx512() ? "avx512vnni" : has_avxvnni() ? "avxvnni" : has_avx2() ? "avx2" : "portable";
}

// States that fade away end as denormal numbers, which some processors handle very slowly: treat them as zero here.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace

#ifdef MADV_HUGEPAGE
// Pages that the last call with much memory left, for the next: the system hands none out before it has cleared them.
struct KeptPages {
  static constexpr int64_t MOST = int64_t{1} << 25;  // bytes that are kept
  std::mutex one_at_a_time;
  void* pages = nullptr;
  int64_t bytes = 0;

  void* take(int64_t& wish) {  // `wish` becomes the size of what is taken
    if (const std::unique_lock<std::mutex> lock(one_at_a_time, std::try_to_lock); lock && bytes >= wish) {
      wish = std::exchange(bytes, 0);
      return std::exchange(pages, nullptr);
    }
    void* fresh = mmap(nullptr, wish, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) return nullptr;
    madvise(fresh, wish, MADV_HUGEPAGE);
    return fresh;
  }
  void give_back(void* what, int64_t size) {  // the larger ones are kept
    if (const std::unique_lock<std::mutex> lock(one_at_a_time, std::try_to_lock);
        lock && size > bytes && size <= MOST) {
      std::swap(pages, what);
      std::swap(bytes, size);
    }
    if (what) munmap(what, size);
  }
};
inline KeptPages kept_pages;
#endif

namespace {

// Memory for `count` floats, or none. Much of it comes in large pages where the system has them.
struct Buffer {
  float* data = nullptr;
  explicit Buffer(int64_t count) {
    [[maybe_unused]] constexpr int64_t MUCH = int64_t{1} << 22;
    int64_t bytes = static_cast<int64_t>(sizeof(float)) * (count > 0 ? count : 1);
#ifdef MADV_HUGEPAGE
    if (bytes >= MUCH) {
      data = static_cast<float*>(kept_pages.take(bytes));
      mapped = data ? bytes : 0;
      return;
    }
#endif
    data = static_cast<float*>(std::malloc(bytes));
  }
  ~Buffer() {
#ifdef MADV_HUGEPAGE
    if (mapped) kept_pages.give_back(data, mapped);
#endif
    if (!mapped) std::free(data);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

 private:
  int64_t mapped = 0;
};

[[maybe_unused]] int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The nearest bfloat16, ties to even.
[[maybe_unused]] uint16_t nearest_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>(x == x ? (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16 : quiet);
}

// Threads of the running team.
[[maybe_unused]] int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Waits until every thread of the team is here.
[[maybe_unused]] void meet() {
#pragma omp barrier
}

// As many threads as asked for, as there are work items, and as the work is worth.
[[maybe_unused]] int64_t thread_count(int64_t wish, int64_t items, int64_t operations) {
  const int64_t worth = operations / (1 << 17) + 1;
  int64_t threads = wish < items ? wish : items;
  threads = threads < worth ? threads : worth;
  return threads > 0 ? threads : 1;
}

// to[i] = sum over k of from[k * stride + i], always in the order of k.
[[maybe_unused]] void add_up(float* to, const float* from, int64_t count, int64_t terms, int64_t stride,
                             int64_t threads) {
  constexpr int64_t SPAN = 1024;
  const int64_t spans = (count + SPAN - 1) / SPAN;
  (void)threads;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static) if (threads > 1)
  for (int64_t span = 0; span < spans; ++span) {
    const int64_t begin = span * SPAN, end = begin + SPAN < count ? begin + SPAN : count;
    if (terms > 0)
      std::memcpy(to + begin, from + begin, sizeof(float) * (end - begin));
    else
      std::memset(to + begin, 0, sizeof(float) * (end - begin));
    for (int64_t k = 1; k < terms; ++k)
      for (int64_t i = begin; i < end; ++i) to[i] += from[k * stride + i];
  }
}

}  // namespace
