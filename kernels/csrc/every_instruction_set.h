// Includes LOOPS, a file of loops, once per instruction set and scalar type, each time in a namespace of its own, with
// SCALAR, INTEGER (as wide), VECTOR_BYTES, IS_FLOAT, BF16 (inputs are pairs of bf16) and AMX (and multiplied in tiles)
// defined. Include it after all standard headers, so that only the loops are affected. Such a file holds plain
// functions only: a template or a lambda would not reliably be compiled for the instruction set of its region.

#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(set) PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(set) PRAGMA(GCC push_options) PRAGMA(GCC target(set))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

// float: all of them

#define SCALAR float
#define INTEGER int32_t
#define IS_FLOAT 1
#define BF16 0
#define AMX 0

#define VECTOR_BYTES 16
namespace baseline_float {
#include LOOPS
}
#undef VECTOR_BYTES

#if defined(__x86_64__)
#define VECTOR_BYTES 32
BEGIN_TARGET("avx2,fma")
namespace avx2_float {
#include LOOPS
}
END_TARGET
#undef VECTOR_BYTES

#define VECTOR_BYTES 64
BEGIN_TARGET("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
namespace avx512_float {
#include LOOPS
}
END_TARGET

#ifdef LOOPS_HAVE_BF16
#undef BF16
#define BF16 1
BEGIN_TARGET("avx512bf16,avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
namespace avx512_bf16 {
#include LOOPS
}
END_TARGET
#undef AMX
#define AMX 1
BEGIN_TARGET("amx-tile,amx-bf16,avx512bf16,avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
namespace amx_bf16 {
#include LOOPS
}
END_TARGET
#undef AMX
#define AMX 0
#undef BF16
#define BF16 0
#endif
#undef VECTOR_BYTES
#endif  // __x86_64__

#undef SCALAR
#undef INTEGER
#undef IS_FLOAT

// double: what it gains from AVX-512 is not worth another copy

#define SCALAR double
#define INTEGER int64_t
#define IS_FLOAT 0

#define VECTOR_BYTES 16
namespace baseline_double {
#include LOOPS
}
#undef VECTOR_BYTES

#if defined(__x86_64__)
#define VECTOR_BYTES 32
BEGIN_TARGET("avx2,fma")
namespace avx2_double {
#include LOOPS
}
END_TARGET
#undef VECTOR_BYTES
#endif  // __x86_64__

#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#undef BF16
#undef AMX
