// A vector of SCALAR and what the loops do with it. No include guard: see every_instruction_set.h.

typedef SCALAR vec __attribute__((vector_size(VECTOR_BYTES)));
typedef INTEGER ivec __attribute__((vector_size(VECTOR_BYTES)));
constexpr int W = VECTOR_BYTES / sizeof(SCALAR);

static INLINE vec load(const SCALAR* from) {
  vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

static INLINE void store(SCALAR* to, vec v) { __builtin_memcpy(to, &v, sizeof v); }

static INLINE vec splat(SCALAR x) { return x - (vec){}; }  // x - 0, lane by lane

// a b + c, rounded once where the CPU can: said, not left to the compiler, where equal numbers must give equal sums.
static INLINE vec multiply_add(vec a, vec b, vec c) {
#if VECTOR_BYTES == 64
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VECTOR_BYTES == 32 && IS_FLOAT
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif VECTOR_BYTES == 32
  return (vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;  // SSE has none; on ARM it is left to the compiler, which -ffp-contract=fast lets fuse
#endif
}

#if IS_FLOAT

// exp to about 1 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. NaN stays NaN, below -87.3 is 0, from 88.376 on
// inf, a little before exp itself is.
static INLINE vec exponential(vec x) {
  const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  vec y = x > splat(89.0f) ? splat(89.0f) : x;
  y = y < splat(-88.0f) ? splat(-88.0f) : y;
  const vec t = y * splat(1.44269504f) + magic;
  const vec n = t - magic;
  const vec r = (y - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  ivec bits;
  __builtin_memcpy(&bits, &t, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  vec power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return x < splat(-87.3f) ? splat(0.0f) : p * power;
}

// log(1 + exp(x)) with its digits, down to 1.2e-38: log(1 + e) = 2 artanh(e / (2 + e)), as a series up to the 13th.
static INLINE vec softplus(vec x) {
  const vec e = exponential(x > splat(0) ? -x : x), y = e / (splat(2) + e), z = y * y;
  vec sum = splat(1.0f / 13);
  for (int n = 11; n > 0; n -= 2) sum = sum * z + splat(1.0f / n);
  return (x > splat(0) ? x : splat(0)) + splat(2) * y * sum;
}

// The sums over the lanes of four vectors, always added in the same order.
static INLINE void sum_lanes(vec a, vec b, vec c, vec d, SCALAR* out) {
  typedef float quad __attribute__((vector_size(16)));
  quad q[4];
  const vec v[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) {
    quad part[VECTOR_BYTES / 16];
    __builtin_memcpy(part, &v[i], sizeof v[i]);
#if VECTOR_BYTES == 64
    q[i] = (part[0] + part[2]) + (part[1] + part[3]);
#elif VECTOR_BYTES == 32
    q[i] = part[0] + part[1];
#else
    q[i] = part[0];
#endif
  }
  const quad ab = SHUFFLE(q[0], q[1], 0, 4, 2, 6) + SHUFFLE(q[0], q[1], 1, 5, 3, 7);
  const quad cd = SHUFFLE(q[2], q[3], 0, 4, 2, 6) + SHUFFLE(q[2], q[3], 1, 5, 3, 7);
  const quad sum = SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
  __builtin_memcpy(out, &sum, sizeof sum);
}

#else

static INLINE vec exponential(vec x) {
  for (int i = 0; i < W; i++) x[i] = std::exp(x[i]);
  return x;
}

static INLINE vec softplus(vec x) {
  for (int i = 0; i < W; i++) x[i] = (x[i] > 0 ? x[i] : 0) + std::log1p(std::exp(-std::fabs(x[i])));
  return x;
}

static INLINE void sum_lanes(vec a, vec b, vec c, vec d, SCALAR* out) {
  out[0] = out[1] = out[2] = out[3] = 0;
  for (int i = 0; i < W; i++) out[0] += a[i], out[1] += b[i], out[2] += c[i], out[3] += d[i];
}

#endif

static INLINE SCALAR largest_lane(vec v) {
  SCALAR x[W];
  store(x, v);
#pragma GCC unroll 4
  for (int h = W / 2; h > 0; h /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < h; i++) x[i] = x[i] > x[i + h] ? x[i] : x[i + h];
  return x[0];
}

// The last `count` < W of a row, and zeros.
static INLINE vec tail(const SCALAR* from, int64_t count) {
#if VECTOR_BYTES == 64
  return (vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#else
  SCALAR x[W] = {};
  for (int64_t i = 0; i < count; i++) x[i] = from[i];
  return load(x);
#endif
}
