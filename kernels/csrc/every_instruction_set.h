// Includes LOOPS, a file of loops, once per instruction set and scalar type, each time in a namespace of its own, with
// SCALAR, INTEGER (as wide), VECTOR_BYTES, IS_FLOAT and BF16 (inputs are pairs of bf16) defined. Include it after all
// standard headers, so that only the loops are affected. Such a file holds plain functions only: a template or a lambda
// would not reliably be compiled for the instruction set of its region.

#define BF16 0
#define VECTOR_BYTES 16
#define SCALAR float
#define INTEGER int32_t
#define IS_FLOAT 1
namespace baseline_float {
#include LOOPS
}
#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#define SCALAR double
#define INTEGER int64_t
#define IS_FLOAT 0
namespace baseline_double {
#include LOOPS
}
#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#undef VECTOR_BYTES

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define VECTOR_BYTES 32
#define SCALAR float
#define INTEGER int32_t
#define IS_FLOAT 1
namespace avx2_float {
#include LOOPS
}
#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#define SCALAR double
#define INTEGER int64_t
#define IS_FLOAT 0
namespace avx2_double {
#include LOOPS
}
#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#undef VECTOR_BYTES
#define VECTOR_BYTES 64
#define SCALAR float
#define INTEGER int32_t
#define IS_FLOAT 1
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
namespace avx512_float {
#include LOOPS
}
#ifdef LOOPS_HAVE_BF16
#undef BF16
#define BF16 1
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
namespace avx512_bf16 {
#include LOOPS
}
#endif
#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#undef VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
#undef BF16
