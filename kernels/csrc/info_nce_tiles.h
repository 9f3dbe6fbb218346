// What info_nce.h does before dk, with AMX's tiles: a block of scores becomes P and a part of O while it is in the
// nearest caches, as tiles multiply so fast that reading scores back from further away would take longer. No include
// guard: see every_instruction_set.h.
//
// Exponents are less a reference that grows with the row's maximum, in steps of 8 ln 2: what was made with an earlier
// one is too large by a power of two, and P in bf16 loses nothing when it is put right.

constexpr int64_t BLOCK = PANELS_AT_ONCE * PANEL;  // candidates
constexpr SCALAR GRAIN = 8 * 0.693147181f;  // of references
constexpr int64_t FORWARD_BYTES = ROWS * BLOCK * sizeof(SCALAR) + DEPTH * COLS * sizeof(unit);
constexpr int64_t PULLS_BYTES = ANCHORS_AT_ONCE / UNIT * PANEL * sizeof(unit);

// W vectors of W lanes, turned round: squares of 1, 2, 4 and 8 lanes change places.
static INLINE void transpose(vec* x) {
  const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (int h = 1; h < W; h *= 2) {
    const ivec other = ((lane & h) != 0) & (W - h);
    const __m512i first = (__m512i)(lane + other), second = (__m512i)(lane + other + h);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      if (i & h) continue;
      const __m512 a = (__m512)x[i], b = (__m512)x[i + h];
      x[i] = (vec)_mm512_permutex2var_ps(a, first, b);
      x[i + h] = (vec)_mm512_permutex2var_ps(a, second, b);
    }
  }
}

// Lane by lane, a pair of the two.
static INLINE vec interleave(__m256i low, __m256i high) {
  return (vec)_mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

static INLINE __m256i load_bits(const number* from) { return _mm256_loadu_si256((const __m256i*)from); }

// Units [first, first + count) of W rows of d numbers (or null: zeros), turned round: [unit][COLS]
static void pack_rows(const number* const* rows, int64_t d, int64_t first, int64_t count, unit* to) {
  for (int64_t u = first; u < first + count; u += W) {
    const int64_t left = d - u * UNIT;
    const __mmask32 some = left >= UNIT * W ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    vec x[W];
#pragma GCC unroll 16
    for (int t = 0; t < W; t++) x[t] = rows[t] ? (vec)_mm512_maskz_loadu_epi16(some, rows[t] + u * UNIT) : (vec){};
    transpose(x);
#pragma GCC unroll 16
    for (int t = 0; t < W; t++) store((SCALAR*)to + (u - first + t) * COLS, x[t]);
  }
}

// Panels [begin, end) of candidates, for the scores: [COLS of them][unit][COLS], and for O: [block][slice][unit][COLS].
static void pack_all(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t begin, int64_t end) {
  const int64_t units = units_of(p.d), slices = (p.d + COLS - 1) / COLS;
  for (int64_t j = begin * PANEL; j < end * PANEL; j += W) {
    const number* rows[W];
    for (int64_t t = 0; t < W; t++) rows[t] = j + t < p.m ? (const number*)p.candidates + (j + t) * p.d : nullptr;
    const int64_t block = j / BLOCK * BLOCK, all = c.panels * PANEL, now = all - block < BLOCK ? all - block : BLOCK;
    pack_rows(rows, p.d, 0, units, (unit*)c.k + j / COLS * COLS * units + j % COLS);
    for (int64_t i = 0; c.k_pairs && i < slices * COLS; i += W) {
      const __mmask16 some = i + W <= p.d ? 0xffff : i < p.d ? (1u << (p.d - i)) - 1 : 0;
      unit* to = (unit*)c.k_pairs + (block * slices + i / COLS * now + j - block) / UNIT * COLS + i % COLS;
      for (int64_t t = 0; t < W; t += UNIT) {
        __m256i x[UNIT];
        for (int h = 0; h < UNIT; h++)
          x[h] = rows[t + h] && some ? _mm256_maskz_loadu_epi16(some, rows[t + h] + i) : _mm256_setzero_si256();
        store((SCALAR*)to + t / UNIT * COLS, interleave(x[0], x[1]));
      }
    }
  }
}

// Units of one step of the sum (DEPTH) of a tile of scores: made, or added.
static INLINE void add_scores(const unit* q, const unit* k, int64_t count, bool begins, SCALAR* to, int64_t stride) {
  if (begins) return multiply_to(to, stride, PACKED, q, k, count);
  vec sum[ROWS][VECS];
  multiply(PACKED, q, k, count, sum);
  add_tile(to, stride, sum);
  store_tile(to, stride, sum);
}

// The scores of one tile's positives, before the row: with the very sums of its scores, so that equal candidates tie.
static void own_scores(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t tile, SCALAR* s, unit* packed) {
  const int64_t units = units_of(p.d);
  const number* rows[ROWS];
  for (int64_t r = 0; r < ROWS; r++) {
    const int64_t inside = tile * ROWS + r < c.rows, own = inside ? p.positives[c.first + tile * ROWS + r] : -1;
    rows[r] = own >= 0 && own < p.m ? (const number*)p.candidates + own * p.d : nullptr;
  }
  for (int64_t first = 0; first < units || first == 0; first += DEPTH) {
    const int64_t count = units - first < DEPTH ? units - first : DEPTH;
    for (int64_t t = 0; t < COLS; t += W) pack_rows(rows + t, p.d, first, count, packed + t);
    add_scores((const unit*)c.q + (tile * units + first) * ROWS, packed, count, first == 0, s, COLS);
  }
  for (int64_t r = 0; r < ROWS; r++)
    if (rows[r]) c.own[tile * ROWS + r] = s[r * COLS + r] * p.scale;
}

static INLINE SCALAR finite(SCALAR x) { return std::isinf(x) ? 0 : x; }  // infinity is no reference

// What exponentials that were made with an earlier reference are multiplied with; finite, as zeros must stay 0.
static INLINE SCALAR shrink(SCALAR before, SCALAR now) {
  if (before == now) return 1;
  return std::fmin(std::exp(finite(before) - finite(now)), std::numeric_limits<SCALAR>::max());
}

// From a block of row r's scores to P times its sum so far; what O has of it so far shrinks along.
static INLINE void exponentiate(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t r, int64_t from, SCALAR* s,
                                SCALAR* o, int64_t wide) {
  const int64_t a = c.first + r, here = p.m - from < BLOCK ? p.m - from : BLOCK;
  const int64_t padded = (here + PANEL - 1) / PANEL * PANEL;
  for (int64_t j = 0; j < padded; j += W) store(s + j, load(s + j) * splat(p.scale));
  mask(p, c, r, from, here, padded, s);
  if (p.rank && r < c.rows)
    for (int64_t j = 0; j < padded; j += W)
      p.rank[a] += __builtin_popcount(_mm512_cmp_ps_mask((__m512)load(s + j), (__m512)splat(c.own[r]), _CMP_GT_OQ));
  if (!p.given_lse) {
    vec top = splat(-std::numeric_limits<SCALAR>::infinity());
    for (int64_t j = 0; j < padded; j += W) {
      const vec x = load(s + j);
      top = x > top ? x : top;
    }
    const SCALAR most = _mm512_reduce_max_ps((__m512)top), before = c.reference[r];
    if (most > before) {
      const bool small = std::fabs(most) < 16384;  // of larger ones, a multiple of ln 2 may be too far
      const SCALAR now = c.reference[r] = small ? std::ceil(most / GRAIN) * GRAIN : most;
      const SCALAR factor = shrink(before, now);
      if (from) c.inverse[r] *= factor, c.weight[r] *= factor;
      for (int64_t i = 0; from && o && factor != 1 && i < wide; i += W) store(o + i, load(o + i) * splat(factor));
    }
  }
  c.top[from / PANEL * c.padded + r] = c.reference[r];
  const vec reference = splat(p.given_lse ? c.reference[r] : finite(c.reference[r]));
  vec sum = {}, rounded = {};
  for (int64_t j = 0; j < padded; j += PANEL) {
    number* to = p.keep ? (number*)c.scores + ((from + j) / PANEL * c.padded + r) * PANEL : nullptr;
    for (int64_t v = 0; v < PANEL; v += W) {
      const vec e = exponential(load(s + j + v) - reference);
      sum += e;
      if (!to) continue;
      store_numbers(to + v, e);
      rounded += load_numbers(to + v);
    }
  }
  c.inverse[r] += _mm512_reduce_add_ps((__m512)sum);
  c.weight[r] += _mm512_reduce_add_ps((__m512)rounded);
}

// Everything of the tiles [begin, end) but dk.
static void forward(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t begin, int64_t end, void* scratch) {
  const int64_t units = units_of(p.d), slices = (p.d + COLS - 1) / COLS, wide = slices * COLS;
  const SCALAR infinity = std::numeric_limits<SCALAR>::infinity();
  SCALAR* s = (SCALAR*)scratch;
  begin_products();
  for (int64_t r = begin * ROWS; r < end * ROWS; r++) {
    const int64_t a = c.first + r;
    const bool inside = r < c.rows;
    c.own[r] = 0;
    if (inside && p.vectors && !p.given_lse)
      c.own[r] = SCALAR(p.scale * inner((const number*)p.anchors + a * p.d, (const number*)p.vectors + a * p.d, p.d));
    c.reference[r] = -infinity;
    if (p.given_lse) c.reference[r] = inside && p.given_lse[a] != -infinity ? p.given_lse[a] : 0;
    c.inverse[r] = c.weight[r] = 0;  // the total, and that of P as rounded, until the row ends
    if (inside && p.rank) p.rank[a] = 0;
  }
  for (int64_t tile = begin; p.rank && p.positives && tile < end; tile++)
    own_scores(p, c, tile, s, (unit*)(s + ROWS * BLOCK));
  for (int64_t from = 0; from < p.m; from += BLOCK) {
    const int64_t here = p.m - from < BLOCK ? p.m - from : BLOCK, now = (here + PANEL - 1) / PANEL;
    for (int64_t tile = begin; tile < end; tile++) {
      const unit* q = (const unit*)c.q + tile * units * ROWS;
      for (int64_t j = 0; j < now * PANEL; j += COLS)
        for (int64_t first = 0; first < units || first == 0; first += DEPTH)
          add_scores(q + first * ROWS, (const unit*)c.k + (from + j) * units + first * COLS,
                     units - first < DEPTH ? units - first : DEPTH, first == 0, s + j, BLOCK);
      SCALAR* o = c.expectation ? c.expectation + tile * ROWS * wide : nullptr;
      for (int64_t r = 0; r < ROWS; r++)
        exponentiate(p, c, tile * ROWS + r, from, s + r * BLOCK, o ? o + r * wide : nullptr, wide);
      for (int64_t slice = 0; o && slice < slices; slice++) {
        const unit* weights = (const unit*)c.scores + (from / PANEL * c.padded + tile * ROWS) * (PANEL / UNIT);
        const unit* pairs = (const unit*)c.k_pairs + (from * slices + slice * now * PANEL) / UNIT * COLS;
        vec sum[ROWS][VECS];
        multiply(ALONG_CANDIDATES, weights, pairs, PANEL / UNIT, sum, now, c.padded * (PANEL / UNIT));
        if (from) add_tile(o + slice * COLS, wide, sum);
        store_tile(o + slice * COLS, wide, sum);
      }
    }
  }
  end_products();
  for (int64_t r0 = begin * ROWS; r0 < end * ROWS; r0 += UNIT) {
    SCALAR weight[UNIT];
    for (int64_t r = r0; r < r0 + UNIT; r++) {
      const int64_t rank = r < c.rows && p.rank ? p.rank[c.first + r] : 0;
      const SCALAR total = c.inverse[r], kept = p.keep ? c.weight[r] : total;
      weight[r - r0] = finish_row(p, c, r, finite(c.reference[r]), total, kept, c.own[r], rank);
    }
    if (p.dk) weigh(p, c, r0, weight);
  }
  if (c.expectation) differences(p, c, begin, end);
}

// P of one panel and anchors [first, first + count): tiles of candidates by pairs of anchors.
static void turn_panel(const Chunk<SCALAR>& c, int64_t panel, int64_t first, int64_t count, unit* to) {
  const SCALAR* before = c.top + panel / PANELS_AT_ONCE * PANELS_AT_ONCE * c.padded;
  for (int64_t u = 0; u < count / UNIT; u += W) {
    const int64_t r = first + u * UNIT;
    SCALAR factor[UNIT * W];
    bool same = true;
    for (int64_t t = 0; t < UNIT * W; t++) {
      factor[t] = shrink(before[r + t], c.reference[r + t]);
      same &= factor[t] == 1;
    }
    for (int64_t j = 0; j < PANEL; j += W) {
      const number* row = (const number*)c.scores + (panel * c.padded + r) * PANEL + j;
      constexpr int64_t two = UNIT * PANEL;
      vec x[W];
      if (same)
#pragma GCC unroll 16
        for (int t = 0; t < W; t++) x[t] = interleave(load_bits(row + t * two), load_bits(row + t * two + PANEL));
      else
        for (int t = 0; t < W; t++)
          x[t] = pair_up(load_numbers(row + t * two) * splat(factor[2 * t]),
                         load_numbers(row + t * two + PANEL) * splat(factor[2 * t + 1]));
      transpose(x);
      unit* out = to + j / ROWS * ROWS * (count / UNIT) + place_of(PACKED, j % ROWS, u);
#pragma GCC unroll 16
      for (int t = 0; t < W; t++) store((SCALAR*)out + t * STEP, x[t]);
    }
  }
}
