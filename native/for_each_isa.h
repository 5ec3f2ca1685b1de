// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Includes the file named by ISA_KERNELS once for every instruction set that this compiler's target may offer, so that
// one library serves processors without AVX2, with it, with its int8 products besides (AVX-VNNI), and with AVX-512 and
// its int8 products. CHOOSE_ISA picks at run time. Whoever multiplies no bytes and does not define ISA_WITH_BYTES goes
// without the third.

#define ISA_INLINE [[maybe_unused]] ISA_TARGET static inline __attribute__((always_inline))

#define ISA_NAMESPACE portable
#define ISA_TARGET
#define ISA_WIDTH 4
#define ISA_VNNI 0
#include "vector_math.h"
#include ISA_KERNELS
#undef ISA_NAMESPACE
#undef ISA_TARGET
#undef ISA_WIDTH
#undef ISA_VNNI

#if defined(__x86_64__)
#define ISA_NAMESPACE avx2
#define ISA_TARGET __attribute__((target("avx2,fma")))
#define ISA_WIDTH 8
#define ISA_VNNI 0
#include "vector_math.h"
#include ISA_KERNELS
#undef ISA_NAMESPACE
#undef ISA_TARGET
#undef ISA_VNNI

#if defined(ISA_WITH_BYTES) && defined(KNOWS_AVXVNNI)
#define ISA_NAMESPACE avxvnni
#define ISA_TARGET __attribute__((target("avx2,fma,avxvnni")))
#define ISA_VNNI 1
#include "vector_math.h"
#include ISA_KERNELS
#undef ISA_NAMESPACE
#undef ISA_TARGET
#undef ISA_VNNI
#endif
#undef ISA_WIDTH

#define ISA_NAMESPACE avx512
#define ISA_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")))
#define ISA_WIDTH 16
#define ISA_VNNI 1
#include "vector_math.h"
#include ISA_KERNELS
#undef ISA_NAMESPACE
#undef ISA_TARGET
#undef ISA_WIDTH
#undef ISA_VNNI
#endif

#undef ISA_INLINE

#if defined(__x86_64__) && defined(ISA_WITH_BYTES) && defined(KNOWS_AVXVNNI)
#define CHOOSE_ISA(function)                                                                              \
  (has_avx512() ? avx512::function : has_avxvnni() ? avxvnni::function : has_avx2() ? avx2::function      \
                                                                                    : portable::function)
#elif defined(__x86_64__)
#define CHOOSE_ISA(function) (has_avx512() ? avx512::function : has_avx2() ? avx2::function : portable::function)
#else
#define CHOOSE_ISA(function) portable::function
#endif
