// Which instruction set the loops use: the best of this CPU, or a lower one in tests.
#pragma once

#include <ATen/Parallel.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int quad_mask __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (quad_mask){__VA_ARGS__})
#endif

enum Level { BASELINE, AVX2, AVX512, AVX512_BF16, AMX_BF16 };

// Whether this CPU multiplies tiles of bf16 and Linux lets this process use them: it must be asked, once is enough.
inline bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tiles) &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return BASELINE;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (!wide) return AVX2;
  if (!__builtin_cpu_supports("avx512bf16")) return AVX512;
  static const bool tiles = has_tiles();
  return tiles ? AMX_BF16 : AVX512_BF16;
#else
  return BASELINE;
#endif
}

inline Level level = best_level();
