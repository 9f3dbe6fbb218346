// The inner loops of sampled_info_nce. No include guard: sampled_info_nce.cpp includes this once per scalar type and
// instruction set, inside a namespace, with SCALAR, INTEGER (as wide), VECTOR_BYTES and IS_FLOAT defined. Plain
// functions only: a template or a lambda would not reliably be compiled for the instruction set of its region.

typedef SCALAR vec __attribute__((vector_size(VECTOR_BYTES)));
typedef INTEGER ivec __attribute__((vector_size(VECTOR_BYTES)));
constexpr int W = VECTOR_BYTES / sizeof(SCALAR), TILE = 8;
constexpr int UNROLL = 8;  // vectors summed in registers
constexpr int CHAIN = 32;  // terms added in a row, before the sum joins a larger one: keeps long sums accurate

static INLINE vec load(const SCALAR* from) {
  vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

static INLINE void store(SCALAR* to, vec v) { __builtin_memcpy(to, &v, sizeof v); }

static INLINE vec splat(SCALAR x) { return x - (vec){}; }  // x - 0, lane by lane

#if IS_FLOAT

// exp to about 1 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. NaN stays NaN, below -87.3 is 0, above 88.7 inf.
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

static INLINE void sum_lanes(vec a, vec b, vec c, vec d, SCALAR* out) {
  out[0] = out[1] = out[2] = out[3] = 0;
  for (int i = 0; i < W; i++) out[0] += a[i], out[1] += b[i], out[2] += c[i], out[3] += d[i];
}

#endif

// out[0..7] = <q, k_c>: every product of the file runs through the same order of additions, so equal rows tie exactly.
static INLINE void dots_8x1(const SCALAR* q, const SCALAR* const* k, int64_t d, SCALAR* out) {
  const SCALAR *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3], *k4 = k[4], *k5 = k[5], *k6 = k[6], *k7 = k[7];
  vec a0 = {}, a1 = {}, a2 = {}, a3 = {}, a4 = {}, a5 = {}, a6 = {}, a7 = {};
  int64_t i = 0;
  for (; i + W <= d; i += W) {
    const vec x = load(q + i);
    a0 += x * load(k0 + i);
    a1 += x * load(k1 + i);
    a2 += x * load(k2 + i);
    a3 += x * load(k3 + i);
    a4 += x * load(k4 + i);
    a5 += x * load(k5 + i);
    a6 += x * load(k6 + i);
    a7 += x * load(k7 + i);
  }
  sum_lanes(a0, a1, a2, a3, out);
  sum_lanes(a4, a5, a6, a7, out + 4);
  for (; i < d; i++)
    for (int c = 0; c < 8; c++) out[c] += q[i] * k[c][i];
}

// Two anchors against four candidates: six loads for eight products.
static INLINE void dots_4x2(const SCALAR* q, const SCALAR* r, const SCALAR* const* k, int64_t d, SCALAR* out_q,
                            SCALAR* out_r) {
  const SCALAR *k0 = k[0], *k1 = k[1], *k2 = k[2], *k3 = k[3];
  vec a0 = {}, a1 = {}, a2 = {}, a3 = {}, b0 = {}, b1 = {}, b2 = {}, b3 = {};
  int64_t i = 0;
  for (; i + W <= d; i += W) {
    const vec x = load(q + i), y = load(r + i);
    const vec z0 = load(k0 + i), z1 = load(k1 + i), z2 = load(k2 + i), z3 = load(k3 + i);
    a0 += x * z0;
    b0 += y * z0;
    a1 += x * z1;
    b1 += y * z1;
    a2 += x * z2;
    b2 += y * z2;
    a3 += x * z3;
    b3 += y * z3;
  }
  sum_lanes(a0, a1, a2, a3, out_q);
  sum_lanes(b0, b1, b2, b3, out_r);
  for (; i < d; i++)
    for (int c = 0; c < 4; c++) out_q[c] += q[i] * k[c][i], out_r[c] += r[i] * k[c][i];
}

static INLINE SCALAR dot(const SCALAR* q, const SCALAR* k, int64_t d) {
  vec a = {};
  int64_t i = 0;
  for (; i + W <= d; i += W) a += load(q + i) * load(k + i);
  SCALAR out[4];
  sum_lanes(a, a, a, a, out);
  for (; i < d; i++) out[0] += q[i] * k[i];
  return out[0];
}

// o[0..width) = sum_s p_s z_s, the sum in registers; what has no probability is not even read.
static INLINE void mix(SCALAR* o, const SCALAR* p, const int32_t* index, int64_t count, const SCALAR* z, int64_t d,
                       int64_t width) {
  int64_t i = 0;
  for (; i + UNROLL * W <= width; i += UNROLL * W) {
    vec v[UNROLL] = {};
    for (int64_t s = 0; s < count; s++) {
      if (p[s] == 0) continue;
      const vec c = splat(p[s]);
      const SCALAR* x = z + int64_t(index[s]) * d + i;
      for (int u = 0; u < UNROLL; u++) v[u] += c * load(x + u * W);
    }
    for (int u = 0; u < UNROLL; u++) store(o + i + u * W, v[u]);
  }
  for (; i < width; i++) {
    SCALAR v = 0;
    for (int64_t s = 0; s < count; s++)
      if (p[s] != 0) v += p[s] * z[int64_t(index[s]) * d + i];
    o[i] = v;
  }
}

// Philox4x32-10 for sixteen counters at a time (64 draws), as loops that vectorise.
static void draw(const Problem<SCALAR>& p, int64_t n, int64_t k, int32_t* out) {
  constexpr int B = 16;
  const int64_t choices = p.positives ? p.m - 1 : p.m;
  if (choices <= 0) {
    for (int64_t s = 0; s < p.s; s++) out[s] = -1;
    return;
  }
  int64_t base = 0;
  if (p.positives) {
    base = p.positives[n * p.steps + k];
    if (base < 0) base = 0;
  }
  const double inverse = 1.0 / double(choices);
  const int32_t size = int32_t(choices), m = int32_t(p.m);
  const int32_t shift = p.positives ? int32_t((base + 1) % p.m) : 0;
  for (int64_t first = 0; first < p.s; first += 4 * B) {
    uint64_t c0[B], c1[B], c2[B], c3[B];
    for (int i = 0; i < B; i++) c0[i] = uint64_t(first / 4 + i) & LOW, c1[i] = uint64_t(n) & LOW, c2[i] = k, c3[i] = 0;
    uint64_t key0 = p.seed & LOW, key1 = p.seed >> 32;
    for (int round = 0; round < 10; round++) {
      for (int i = 0; i < B; i++) {
        const uint64_t x = 0xD2511F53ull * c0[i], y = 0xCD9E8D57ull * c2[i];
        c0[i] = (y >> 32) ^ c1[i] ^ key0;
        c1[i] = y & LOW;
        c2[i] = (x >> 32) ^ c3[i] ^ key1;
        c3[i] = x & LOW;
      }
      key0 = (key0 + 0x9E3779B9u) & LOW;
      key1 = (key1 + 0xBB67AE85u) & LOW;
    }
    uint32_t u[4 * B];
    for (int i = 0; i < B; i++)
      u[4 * i] = uint32_t(c0[i]), u[4 * i + 1] = uint32_t(c1[i]), u[4 * i + 2] = uint32_t(c2[i]), u[4 * i + 3] = uint32_t(c3[i]);
    int32_t drawn[4 * B];
    for (int i = 0; i < 4 * B; i++) {
      // u mod size by a product in double; the quotient is off by one at most
      const double value = double(int32_t(u[i] ^ 0x80000000u)) + 2147483648.0;
      double rest = value - double(int64_t(value * inverse)) * double(size);
      rest = rest < 0 ? rest + size : rest;
      rest = rest >= size ? rest - size : rest;
      const double index = rest + shift;  // (shift + rest) mod m, both below m
      drawn[i] = int32_t(index >= m ? index - m : index);
    }
    const int64_t left = p.s - first < 4 * B ? p.s - first : 4 * B;
    for (int64_t i = 0; i < left; i++) out[first + i] = drawn[i];
  }
}

// The negatives of row n (step k when each has its own): index[S], -1 where skipped.
static void list(const Problem<SCALAR>& p, int64_t n, int64_t k, int32_t* index) {
  if (p.drawn) {
    draw(p, n, k, index);
  } else {
    const int64_t* from = p.negatives + (p.per_step ? n * p.steps + k : n) * p.s;
    for (int64_t s = 0; s < p.s; s++) index[s] = int32_t(from[s]);
  }
  if (p.anchor_ids)
    for (int64_t s = 0; s < p.s; s++)
      if (index[s] >= 0 && p.pool_ids[index[s]] == p.anchor_ids[n]) index[s] = -1;
}

// Where a sum of exponentials is measured from: its maximum, unless that is infinite.
static INLINE SCALAR reference_point(SCALAR top) { return std::isinf(top) ? SCALAR(0) : top; }

// scores[g, 0..padded) += <q_g, z_s> over the features of one slice, for the `group` anchors that share a list
static void score_slice(const SCALAR* q, int64_t group, const SCALAR* z, const int32_t* index, int64_t padded, int64_t d,
                        int64_t width, bool first, SCALAR* scores) {
  for (int64_t c = 0; c < padded; c += TILE) {
    const SCALAR* k[TILE];
    for (int64_t t = 0; t < TILE; t++) k[t] = z + int64_t(index[c + t] < 0 ? 0 : index[c + t]) * d;
    SCALAR part[2 * TILE];
    for (int64_t g = 0; g < group; g += 2) {
      const int64_t pair = group - g < 2 ? 1 : 2;
      if (pair == 2) {
        dots_4x2(q + g * d, q + (g + 1) * d, k, width, part, part + TILE);
        dots_4x2(q + g * d, q + (g + 1) * d, k + 4, width, part + 4, part + TILE + 4);
      } else {
        dots_8x1(q + g * d, k, width, part);
      }
      for (int64_t h = 0; h < pair; h++) {
        SCALAR* to = scores + (g + h) * padded + c;
        for (int64_t t = 0; t < TILE; t++) to[t] = first ? part[h * TILE + t] : to[t] + part[h * TILE + t];
      }
    }
  }
}

// From raw scores (in place: they become P) to the row's results.
static void finish_row(const Problem<SCALAR>& p, const Outputs<SCALAR>& out, int64_t a, const int32_t* index,
                       int64_t padded, SCALAR own, SCALAR* s) {
  const SCALAR infinity = std::numeric_limits<SCALAR>::infinity();
  const int64_t own_index = p.positives ? p.positives[a] : -1;
  const int64_t excluded = p.drawn ? own_index : -1;
  const bool active = !p.positives || own_index >= 0;
  own = active ? own * p.scale : 0;
  SCALAR top = -infinity;
  int64_t rank = 0;
  for (int64_t t = 0; t < padded; t++) s[t] = index[t] < 0 || index[t] == excluded ? -infinity : s[t] * p.scale;
  for (int64_t t = 0; t < padded; t++) top = s[t] > top ? s[t] : top;
  if (out.rank) {
    for (int64_t t = 0; t < padded; t++) rank += s[t] > own;
    out.rank[a] = active ? rank : 0;
  }
  const vec from = splat(reference_point(top));
  vec sums = {};
  for (int64_t t = 0; t < padded; t += W) sums += exponential(load(s + t) - from);  // a NaN that hides from the maximum shows here
  SCALAR total = 0;
  for (int t = 0; t < W; t++) total += sums[t];
  const SCALAR lse = active ? from[0] + std::log(total) : -infinity;
  const bool live = lse != -infinity;
  const SCALAR gap = lse - own;
  out.lse[a] = lse;
  out.positive[a] = own;
  out.loss[a] = live ? (gap > 0 ? gap : 0) + std::log1p(std::exp(-std::fabs(gap))) : 0;
  if (!out.expectation && !out.probabilities) return;
  if (live)
    for (int64_t t = 0; t < padded; t += W) store(s + t, exponential(load(s + t) - splat(lse)));
  else
    std::fill_n(s, padded, SCALAR(0));
  if (out.probabilities) std::copy_n(s, p.s, out.probabilities + a * p.s);
}

// Blocks of anchors, so that a slice of the pool's features stays in the second-level cache while the block passes.
static void forward_rows(const Problem<SCALAR>& p, const Outputs<SCALAR>& out, int64_t begin, int64_t end) {
  const int64_t d = p.d, steps = p.steps;
  const int64_t group = p.per_step ? 1 : steps, lists = p.per_step ? steps : 1;  // anchors per list, lists per row
  const int64_t padded = (p.s + PAD - 1) / PAD * PAD;
  const int64_t fitting = SLICE_BYTES / std::max<int64_t>(p.m * sizeof(SCALAR), 1) / 64 * 64;
  const int64_t longest = 512;  // also keeps the chains of additions short, for accuracy
  const int64_t slice = std::min({fitting >= 64 ? fitting : longest, longest, d});
  const int64_t narrow = UNROLL * W < d ? UNROLL * W : d;  // features of O summed at a time
  const int64_t block = std::max<int64_t>(1, std::min(end - begin, BLOCK_SCORES / std::max<int64_t>(padded * steps, 1)));
  std::vector<int32_t> index(block * lists * padded);
  std::vector<SCALAR> scores(block * steps * padded), own(block * steps);  // zero, should d be
  for (int64_t n0 = begin; n0 < end; n0 += block) {
    const int64_t rows = std::min(block, end - n0) * lists;  // one list each
    const int64_t a0 = n0 * steps;
    for (int64_t r = 0; r < rows; r++) {
      int32_t* row = index.data() + r * padded;
      list(p, n0 + r / lists, r % lists, row);
      for (int64_t s = p.s; s < padded; s++) row[s] = -1;
    }
    for (int64_t i = 0; i < d; i += slice) {
      const int64_t width = std::min(slice, d - i);
      for (int64_t r = 0; r < rows; r++) {
        if (p.m)
          score_slice(p.anchors + (a0 + r * group) * d + i, group, p.pool + i, index.data() + r * padded, padded, d,
                      width, i == 0, scores.data() + r * group * padded);
        for (int64_t g = 0; g < group; g++) {  // in the same slices: a negative equal to the positive ties
          const int64_t a = a0 + r * group + g;
          const int64_t j = p.positives ? p.positives[a] : 0;
          const SCALAR* z = p.positives ? p.pool + (j < 0 ? 0 : j) * d : p.vectors + a * d;
          const SCALAR part = p.m || p.vectors ? dot(p.anchors + a * d + i, z + i, width) : 0;
          own[r * group + g] = i == 0 ? part : own[r * group + g] + part;
        }
      }
    }
    for (int64_t a = 0; a < rows * group; a++)
      finish_row(p, out, a0 + a, index.data() + a / group * padded, padded, own[a], scores.data() + a * padded);
    if (!out.expectation) continue;
    for (int64_t i = 0; i < d; i += narrow)
      for (int64_t a = 0; a < rows * group; a++)
        mix(out.expectation + (a0 + a) * d + i, scores.data() + a * padded, index.data() + a / group * padded, p.s,
            p.pool + i, d, std::min(narrow, d - i));
  }
}

// dq = w (O - z_p), dv = -w q, each = g sigmoid <q, O - z_p>; w = weight * scale
static void backward_anchors(const Problem<SCALAR>& p, const SCALAR* weight, const SCALAR* expectation, SCALAR* dq,
                             SCALAR* dv, SCALAR* dscale_rows, int64_t begin, int64_t end) {
  const int64_t d = p.d;
  for (int64_t a = begin; a < end; a++) {
    const bool active = weight[a] != 0;  // NaN counts
    const SCALAR w = weight[a] * p.scale;
    const SCALAR* q = p.anchors + a * d;
    if (dv)
      for (int64_t i = 0; i < d; i++) dv[a * d + i] = active ? -w * q[i] : 0;
    if (dscale_rows) dscale_rows[a] = 0;
    if (!active) {
      if (dq) std::fill_n(dq + a * d, d, SCALAR(0));
      continue;
    }
    if (!dq && !dscale_rows) continue;
    const int64_t own = p.positives ? p.positives[a] : 0;
    const SCALAR* z = p.positives ? p.pool + (own < 0 ? 0 : own) * d : p.vectors + a * d;
    const SCALAR* o = expectation + a * d;
    if (dscale_rows) {
      vec sums = {};
      int64_t i = 0;
      for (; i + W <= d; i += W) sums += load(q + i) * (load(o + i) - load(z + i));
      SCALAR out[4];
      sum_lanes(sums, sums, sums, sums, out);
      for (; i < d; i++) out[0] += q[i] * (o[i] - z[i]);
      dscale_rows[a] = weight[a] * out[0];
    }
    if (dq)
      for (int64_t i = 0; i < d; i++) dq[a * d + i] = w * (o[i] - z[i]);
  }
}

// The pairs (anchor, coefficient) of anchors [begin, end), sorted by candidate, in anchor order within one:
// offsets[M + 1] into items.
static void sort_pairs(const Problem<SCALAR>& p, const SCALAR* weight, const SCALAR* probabilities, int64_t begin,
                       int64_t end, int32_t* offsets, Pair<SCALAR>* items) {
  std::vector<int32_t> index(p.s);
  std::vector<int32_t> where((end - begin) * (p.s + 1), -1);
  std::fill_n(offsets, p.m + 1, 0);
  int64_t listed = -1;
  for (int64_t a = begin; a < end; a++) {
    if (weight[a] == 0) continue;
    const int64_t n = a / p.steps, k = p.per_step ? a % p.steps : 0;
    if (listed != n * p.steps + k) list(p, n, k, index.data());
    listed = n * p.steps + k;
    int32_t* row = where.data() + (a - begin) * (p.s + 1);
    for (int64_t s = 0; s < p.s; s++)
      if (probabilities[a * p.s + s] != 0 && index[s] >= 0) {
        row[s] = index[s];
        offsets[index[s] + 1]++;
      }
    if (p.positives && p.positives[a] >= 0) {
      row[p.s] = int32_t(p.positives[a]);
      offsets[row[p.s] + 1]++;
    }
  }
  for (int64_t j = 0; j < p.m; j++) offsets[j + 1] += offsets[j];
  std::vector<int32_t> next(offsets, offsets + p.m);
  for (int64_t a = begin; a < end; a++) {
    const int32_t* row = where.data() + (a - begin) * (p.s + 1);
    const SCALAR w = weight[a] * p.scale;
    for (int64_t s = 0; s < p.s; s++)
      if (row[s] >= 0) items[next[row[s]]++] = {int32_t(a - begin), w * probabilities[a * p.s + s]};
    if (row[p.s] >= 0) items[next[row[p.s]]++] = {int32_t(a - begin), -w};
  }
}

// dz_j += sum over the pairs of j, for candidates [begin, end) and one block of anchors that starts at q.
static void add_pairs(const Problem<SCALAR>& p, const SCALAR* q, const int32_t* offsets, const Pair<SCALAR>* items,
                      SCALAR* dz, int64_t begin, int64_t end) {
  const int64_t d = p.d;
  for (int64_t j = begin; j < end; j++) {
    const Pair<SCALAR>*from = items + offsets[j], *to = items + offsets[j + 1];
    if (from == to) continue;
    SCALAR* row = dz + j * d;
    int64_t i = 0;
    for (; i + UNROLL * W <= d; i += UNROLL * W) {
      for (const Pair<SCALAR>* it = from; it != to;) {
        const Pair<SCALAR>* stop = to - it > CHAIN ? it + CHAIN : to;
        vec v[UNROLL] = {};
        for (; it != stop; it++) {
          const vec c = splat(it->coefficient);
          const SCALAR* x = q + it->anchor * d + i;
          for (int u = 0; u < UNROLL; u++) v[u] += c * load(x + u * W);
        }
        for (int u = 0; u < UNROLL; u++) store(row + i + u * W, load(row + i + u * W) + v[u]);
      }
    }
    for (; i < d; i++)
      for (const Pair<SCALAR>* it = from; it != to;) {
        const Pair<SCALAR>* stop = to - it > CHAIN ? it + CHAIN : to;
        SCALAR v = 0;
        for (; it != stop; it++) v += it->coefficient * q[it->anchor * d + i];
        row[i] += v;
      }
  }
}

static const Loops<SCALAR> loops = {forward_rows, backward_anchors, sort_pairs, add_pairs};
