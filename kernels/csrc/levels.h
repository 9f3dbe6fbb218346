// Which instruction set the loops use: the best of this CPU, or a lower one in tests.
#pragma once

#include <ATen/Parallel.h>

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int quad_mask __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (quad_mask){__VA_ARGS__})
#endif

enum Level { BASELINE, AVX2, AVX512, AVX512_BF16 };

inline Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return BASELINE;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (!wide) return AVX2;
  return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
#else
  return BASELINE;
#endif
}

inline Level level = best_level();
