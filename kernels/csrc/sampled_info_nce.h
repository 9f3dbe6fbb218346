// The inner loops of sampled_info_nce, once per scalar type and instruction set: see every_instruction_set.h.

#include "vectors.h"

constexpr int TILE = 8;
constexpr int LANES = 4 * W;      // features that backward sums in registers at a time
constexpr int64_t LONGEST = 512;  // features added in a row, before the sum joins a larger one: keeps long sums accurate
constexpr int64_t CHAIN = 64;     // the same for the pairs of a candidate

// out[a * TILE + c] = <q + a step, k_c> for `anchors` times `candidates`, eight products at a time. Every product of the
// file runs through the same order of additions, so equal rows tie exactly.
static INLINE void dots(int anchors, int candidates, const SCALAR* q, int64_t step, const SCALAR* const* k, int64_t d,
                        SCALAR* out) {
  vec sum[8] = {};
  int64_t i = 0;
  for (; i + W <= d; i += W)
#pragma GCC unroll 8
    for (int c = 0; c < candidates; c++) {
      const vec z = load(k[c] + i);
#pragma GCC unroll 2
      for (int a = 0; a < anchors; a++)
        sum[a * candidates + c] = multiply_add(load(q + a * step + i), z, sum[a * candidates + c]);
    }
  if (i < d)
#pragma GCC unroll 8
    for (int c = 0; c < candidates; c++) {
      const vec z = tail(k[c] + i, d - i);
#pragma GCC unroll 2
      for (int a = 0; a < anchors; a++)
        sum[a * candidates + c] = multiply_add(tail(q + a * step + i, d - i), z, sum[a * candidates + c]);
    }
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++)
    sum_lanes(sum[4 * h], sum[4 * h + 1], sum[4 * h + 2], sum[4 * h + 3], out + (anchors == 2 ? h * TILE : 4 * h));
}

// out[t] = <q_t, k_t>, TILE of them
static INLINE void dots_of_pairs(const SCALAR* const* q, const SCALAR* const* k, int64_t d, SCALAR* out) {
  vec sum[TILE] = {};
  int64_t i = 0;
  for (; i + W <= d; i += W)
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++) sum[t] = multiply_add(load(q[t] + i), load(k[t] + i), sum[t]);
  if (i < d)
#pragma GCC unroll 8
    for (int t = 0; t < TILE; t++) sum[t] = multiply_add(tail(q[t] + i, d - i), tail(k[t] + i, d - i), sum[t]);
  for (int t = 0; t < TILE; t += 4) sum_lanes(sum[t], sum[t + 1], sum[t + 2], sum[t + 3], out + t);
}

// LANES features of one row, of which `width` exist: the others are zero.
static INLINE void load_lanes(const SCALAR* from, int64_t width, vec* v) {
#pragma GCC unroll 4
  for (int u = 0; u < 4; u++) {
    const int64_t left = width - u * W;
    v[u] = left >= W ? load(from + u * W) : left > 0 ? tail(from + u * W, left) : (vec){};
  }
}

// v[0..3] += sum_s c_s x_{index s}, LANES features (`width` of them exist) of rows that lie `stride` apart; two sums,
// even and odd.
static INLINE void mix(const Pair<SCALAR>* from, const Pair<SCALAR>* to, const SCALAR* x, int64_t stride, int64_t width,
                       vec* v) {
  vec even[4] = {}, odd[4] = {}, y[4], z[4];
  for (; from + 2 <= to; from += 2) {
    const vec c = splat(from[0].coefficient), e = splat(from[1].coefficient);
    load_lanes(x + from[0].row * stride, width, y);
    load_lanes(x + from[1].row * stride, width, z);
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) even[u] = multiply_add(c, y[u], even[u]), odd[u] = multiply_add(e, z[u], odd[u]);
  }
  if (from != to) {
    const vec c = splat(from->coefficient);
    load_lanes(x + from->row * stride, width, y);
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) even[u] = multiply_add(c, y[u], even[u]);
  }
#pragma GCC unroll 4
  for (int u = 0; u < 4; u++) v[u] += even[u] + odd[u];
}

static INLINE void store_lanes(SCALAR* to, int64_t width, const vec* v) {
  SCALAR x[LANES];
  SCALAR* into = width < LANES ? x : to;
  for (int u = 0; u < 4; u++) store(into + u * W, v[u]);
  if (width < LANES) std::memcpy(to, x, width * sizeof(SCALAR));
}

// `count` rows of one slice side by side: rows of a large power of two apart would share few lines of the cache.
static void pack(const SCALAR* from, int64_t count, int64_t stride, int64_t width, SCALAR* to) {
  for (int64_t r = 0; r < count; r++) {
    vec v[4];
    load_lanes(from + r * stride, width, v);
    for (int u = 0; u < 4; u++) store(to + r * LANES + u * W, v[u]);
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

// The negatives of row n (step k when each has its own): index[S], -1 where skipped. False if one is out of range.
static bool list(const Problem<SCALAR>& p, int64_t n, int64_t k, int32_t* index) {
  if (p.drawn) {
    draw(p, n, k, index);
  } else {
    const int64_t* from = p.negatives + (p.per_step ? n * p.steps + k : n) * p.s;
    bool wrong = false;
    for (int64_t s = 0; s < p.s; s++) {
      wrong |= uint64_t(from[s] + 1) > uint64_t(p.m);
      index[s] = int32_t(from[s]);
    }
    if (wrong) return false;
  }
  if (p.anchor_ids)
    for (int64_t s = 0; s < p.s; s++)
      if (index[s] >= 0 && p.pool_ids[index[s]] == p.anchor_ids[n]) index[s] = -1;
  return true;
}

// Where a sum of exponentials is measured from: its maximum, unless that is infinite.
static INLINE SCALAR reference_point(SCALAR top) { return std::isinf(top) ? SCALAR(0) : top; }

// scores[g, s] = <q_g, z_s> for the `group` anchors that share a list
static void score_row(const Problem<SCALAR>& p, const SCALAR* q, int64_t group, const int32_t* index, int64_t padded,
                      SCALAR* scores) {
  const int64_t d = p.d;
  for (int64_t c = 0; c < p.s; c += TILE) {
    const SCALAR* k[TILE];
    for (int64_t t = 0; t < TILE; t++) k[t] = p.pool + int64_t(index[c + t] < 0 ? 0 : index[c + t]) * d;
    for (int64_t g = 0; g < group; g++) std::fill_n(scores + g * padded + c, TILE, SCALAR(0));
    for (int64_t i = 0; i < d; i += LONGEST) {
      const int64_t width = d - i < LONGEST ? d - i : LONGEST;
      SCALAR part[2 * TILE];
      for (int64_t g = 0; g < group; g += 2) {
        const int64_t pair = group - g < 2 ? 1 : 2;
        const SCALAR* x = q + g * d + i;
        if (pair == 2) {
          dots(2, 4, x, d, k, width, part);  // six loads for eight products
          dots(2, 4, x, d, k + 4, width, part + 4);
        } else {
          dots(1, 8, x, d, k, width, part);
        }
        for (int64_t h = 0; h < pair; h++)
          for (int64_t t = 0; t < TILE; t++) scores[(g + h) * padded + c + t] += part[h * TILE + t];
      }
      for (int64_t t = 0; t < TILE; t++) k[t] += width;
    }
  }
}

// own[t] = <q_t, its positive> of the anchors [a, a + count), at most TILE, added in the order of score_row: a negative
// equal to the positive ties. False if a positive is out of range.
static bool score_own(const Problem<SCALAR>& p, int64_t a, int64_t count, SCALAR* own) {
  const SCALAR *q[TILE], *z[TILE];
  for (int64_t t = 0; t < TILE; t++) {
    const int64_t b = t < count ? a + t : a, j = p.positives ? p.positives[b] : 0;
    if (p.positives && (j < -1 || j >= p.m)) return false;
    q[t] = p.anchors + b * p.d;
    z[t] = p.positives ? p.pool + (j < 0 ? 0 : j) * p.d : p.vectors + b * p.d;
  }
  std::fill_n(own, TILE, SCALAR(0));
  if (!p.m && !p.vectors) return true;
  for (int64_t i = 0; i < p.d; i += LONGEST) {
    const int64_t width = p.d - i < LONGEST ? p.d - i : LONGEST;
    SCALAR part[TILE];
    dots_of_pairs(q, z, width, part);
    for (int64_t t = 0; t < TILE; t++) own[t] += part[t], q[t] += width, z[t] += width;
  }
  return true;
}

// From raw scores (in place: they become P) to the row's results; of the loss lse - s_p, whose softplus comes later.
static void finish_row(const Problem<SCALAR>& p, const Outputs<SCALAR>& out, int64_t a, const int32_t* index,
                       int64_t padded, SCALAR own, SCALAR* s) {
  const SCALAR infinity = std::numeric_limits<SCALAR>::infinity();
  const int64_t own_index = p.positives ? p.positives[a] : -1;
  const int64_t excluded = p.drawn ? own_index : -1;
  const bool active = !p.positives || own_index >= 0;
  own = active ? own * p.scale : 0;
  int64_t rank = 0;
  for (int64_t t = 0; t < padded; t++) s[t] = index[t] < 0 || index[t] == excluded ? -infinity : s[t] * p.scale;
  vec top = splat(-infinity);
  for (int64_t t = 0; t < padded; t += W) {
    const vec x = load(s + t);
    top = x > top ? x : top;
  }
  if (out.rank) {
    for (int64_t t = 0; t < padded; t++) rank += s[t] > own;
    out.rank[a] = active ? rank : 0;
  }
  const SCALAR from = reference_point(largest_lane(top));
  vec sum = {};
  for (int64_t t = 0; t < padded; t += W) {
    const vec e = exponential(load(s + t) - splat(from));
    store(s + t, e);
    sum += e;  // a NaN that hides from the maximum shows here
  }
  SCALAR total[4];
  sum_lanes(sum, sum, sum, sum, total);
  const SCALAR lse = active ? from + std::log(total[0]) : -infinity;
  const bool live = lse != -infinity;
  out.lse[a] = lse;
  out.positive[a] = own;
  out.loss[a] = live ? lse - own : -infinity;
  if (!out.probabilities) return;
  const vec inverse = splat(1 / total[0]);
  for (int64_t t = 0; t < padded; t += W) store(s + t, live ? load(s + t) * inverse : (vec){});
  std::copy_n(s, p.s, out.probabilities + a * p.s);
}

static bool forward_rows(const Problem<SCALAR>& p, const Outputs<SCALAR>& out, int64_t begin, int64_t end) {
  const int64_t group = p.per_step ? 1 : p.steps, lists = p.per_step ? p.steps : 1;  // anchors per list, lists per row
  const int64_t padded = (p.s + PAD - 1) / PAD * PAD;
  std::vector<int32_t> index(padded, -1);
  std::vector<SCALAR> scores(group * padded);
  const int64_t from = begin * p.steps, to = end * p.steps;
  SCALAR own[TILE];
  for (int64_t n = begin; n < end; n++)
    for (int64_t k = 0; k < lists; k++) {
      const int64_t first = n * p.steps + k;
      if (!list(p, n, k, index.data())) return false;
      if (p.m) score_row(p, p.anchors + first * p.d, group, index.data(), padded, scores.data());
      for (int64_t g = 0; g < group; g++) {
        const int64_t a = first + g, t = (a - from) % TILE;
        if (t == 0 && !score_own(p, a, to - a, own)) return false;
        finish_row(p, out, a, index.data(), padded, own[t], scores.data() + g * padded);
      }
    }
  for (int64_t a = from; a < to; a += W) {
    SCALAR x[W];
    const int64_t count = to - a < W ? to - a : W;
    store(x, softplus(count < W ? tail(out.loss + a, count) : load(out.loss + a)));
    std::copy_n(x, count, out.loss + a);
  }
  return true;
}

// What each anchor of [begin, end) reads: pairs (candidate, P), and (positive, -1), those that count, from
// b.reads[(a - b.first) * (S + 1)] on. counts[j]: how often candidate j is read.
static bool prepare(const Problem<SCALAR>& p, const Upstream<SCALAR>& up, const Block<SCALAR>& b, int64_t begin,
                    int64_t end, int32_t* counts) {
  std::vector<int32_t> index(p.s);
  if (counts) std::fill_n(counts, p.m, 0);
  int64_t listed = -1;
  for (int64_t a = begin; a < end; a++) {
    const int64_t r = a - b.first, own = p.positives ? p.positives[a] : 0;
    if (p.positives && (own < -1 || own >= p.m)) return false;  // changed since forward, through NumPy for one
    const bool live = own >= 0 && up.lse[a] != -std::numeric_limits<SCALAR>::infinity();
    // d loss / d lse = sigmoid(lse - s_p); NaN counts
    const SCALAR weight = live ? up.grad[a * up.stride] / (1 + std::exp(up.positive[a] - up.lse[a])) : 0;
    b.weight[r] = weight;
    b.count[r] = -1;
    if (up.dv)
      for (int64_t i = 0; i < p.d; i++) up.dv[a * p.d + i] = weight != 0 ? -weight * p.scale * p.anchors[a * p.d + i] : 0;
    if (weight == 0 || !b.reads) continue;
    const int64_t n = a / p.steps, k = p.per_step ? a % p.steps : 0;
    if (listed != n * p.steps + k && !list(p, n, k, index.data())) return false;
    listed = n * p.steps + k;
    const SCALAR* probabilities = up.probabilities + a * p.s;
    Pair<SCALAR>* to = b.reads + r * (p.s + 1);
    int32_t count = 0;
    for (int64_t s = 0; s < p.s; s++) {  // without a branch: a skipped pair is overwritten
      to[count] = {index[s], probabilities[s]};
      count += index[s] >= 0 && probabilities[s] != 0;
    }
    if (p.positives) to[count++] = {int32_t(own), SCALAR(-1)};
    b.count[r] = count;
    if (counts)
      for (int32_t e = 0; e < count; e++) counts[to[e].row]++;
  }
  return true;
}

// The same pairs, turned round: (anchor of the block, w P), sorted by candidate, in anchor order within one.
static void place(const Problem<SCALAR>& p, const Block<SCALAR>& b, int64_t begin, int64_t end, int32_t* next) {
  for (int64_t r = begin - b.first; r < end - b.first; r++) {
    const Pair<SCALAR>* from = b.reads + r * (p.s + 1);
    const SCALAR w = b.weight[r] * p.scale;
    for (int32_t e = 0; e < b.count[r]; e++) b.adds[next[from[e].row]++] = {int32_t(r), w * from[e].coefficient};
  }
}

// dq = w (O - z_p) for the block's anchors [begin, end), features [i, i + LANES). buffer: where the pool is packed, or
// null where that would not pay.
static void add_anchors(const Problem<SCALAR>& p, const Block<SCALAR>& b, int64_t i, int64_t begin, int64_t end,
                        SCALAR* dq, SCALAR* dscale, SCALAR* buffer) {
  const int64_t d = p.d, width = d - i < LANES ? d - i : LANES;
  const SCALAR* z = p.pool + i;
  int64_t stride = d;
  if (buffer) {
    pack(z, p.m, d, width, buffer);
    z = buffer, stride = LANES;
  }
  for (int64_t r = begin; r < end; r++) {
    const int64_t at = (b.first + r) * d + i;
    vec v[4] = {}, x[4];
    if (dscale) dscale[r] = 0;
    if (b.count[r] >= 0) {
      const Pair<SCALAR>* from = b.reads + r * (p.s + 1);
      if (buffer || width == LANES) mix(from, from + b.count[r], z, stride, LANES, v);
      else mix(from, from + b.count[r], z, stride, width, v);
      if (p.vectors) {
        load_lanes(p.vectors + at, width, x);
        for (int u = 0; u < 4; u++) v[u] -= x[u];
      }
      if (dscale) {
        load_lanes(p.anchors + at, width, x);
        SCALAR sum[4];
        const vec each = (x[0] * v[0] + x[1] * v[1]) + (x[2] * v[2] + x[3] * v[3]);
        sum_lanes(each, each, each, each, sum);
        dscale[r] = b.weight[r] * sum[0];
      }
      const vec w = splat(b.weight[r] * p.scale);
      for (int u = 0; u < 4; u++) v[u] *= w;
    }
    if (!dq) continue;
    store_lanes(dq + at, width, v);
  }
}

// dz_j += sum of w P q over the block's pairs of j, for candidates [begin, end), features [i, i + LANES), which the first
// block writes.
static void add_candidates(const Problem<SCALAR>& p, const Block<SCALAR>& b, int64_t i, int64_t begin, int64_t end,
                           SCALAR* dz, SCALAR* buffer) {
  const int64_t d = p.d, width = d - i < LANES ? d - i : LANES;
  pack(p.anchors + b.first * d + i, b.rows, d, width, buffer);
  for (int64_t j = begin; j < end; j++) {
    const Pair<SCALAR>*from = b.adds + b.offsets[j], *to = b.adds + b.offsets[j + 1];
    if (from == to && b.begun) continue;
    vec v[4] = {};
    SCALAR* row = dz + j * d + i;
    if (b.begun) load_lanes(row, width, v);
    for (; from < to; from += CHAIN) mix(from, to - from < CHAIN ? to : from + CHAIN, buffer, LANES, LANES, v);
    store_lanes(row, width, v);
  }
}

static const Loops<SCALAR> loops = {LANES, forward_rows, prepare, place, add_anchors, add_candidates};
