// Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
//
// Includes the file named by ISA_KERNELS once for every instruction set that this compiler's target may offer, so that
// one library serves processors with and without AVX2. `choose_isa` picks at run time.

#define ISA_INLINE ISA_TARGET [[maybe_unused]] static inline __attribute__((always_inline))

#define ISA_NAMESPACE portable
#define ISA_TARGET
#define ISA_WIDTH 4
#include "vector_math.h"
#include ISA_KERNELS
#undef ISA_NAMESPACE
#undef ISA_TARGET
#undef ISA_WIDTH

#if defined(__x86_64__)
#define ISA_NAMESPACE avx2
#define ISA_TARGET __attribute__((target("avx2,fma")))
#define ISA_WIDTH 8
#include "vector_math.h"
#include ISA_KERNELS
#undef ISA_NAMESPACE
#undef ISA_TARGET
#undef ISA_WIDTH
#endif

#undef ISA_INLINE

#if defined(__x86_64__)
#define CHOOSE_ISA(function) (has_avx2() ? avx2::function : portable::function)
#else
#define CHOOSE_ISA(function) portable::function
#endif
