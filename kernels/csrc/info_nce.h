// The inner loops of info_nce, once per scalar type and instruction set: see every_instruction_set.h.
//
// In the order they run: anchors and candidates are packed, scores, rows (P and what each row knows), expectations (O
// and dq), pulls (dk). What they multiply with is in products.h; info_nce_tiles.h does all but the last in its own way.
//
// This file argues for its length: its loops share one layout of panels and one tile size.

#include "products.h"

constexpr int64_t DEPTH = AMX ? 128 : 64;  // units added in a row, before the sum joins a larger one
constexpr int64_t PANELS_AT_ONCE = 4;  // the same for candidates, in O
constexpr int64_t ANCHORS_AT_ONCE = AMX ? 512 : 32 * ROWS;  // and for anchors, in dk

// Units of a row as packed: whole steps, the last filled up with zeros.
static INLINE int64_t units_of(int64_t d) { return (d + UNIT * STEP - 1) / (UNIT * STEP) * STEP; }

// Tiles [begin, end) of the chunk's anchors: [tile][unit][ROWS], 0 where ignored.
static void pack_anchors(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t begin, int64_t end) {
  const int64_t units = units_of(p.d), whole = (p.d + UNIT - 1) / UNIT;
  const number* q = (const number*)p.anchors + c.first * p.d;
  for (int64_t r = begin * ROWS; r < end * ROWS; r++) {
    unit* to = (unit*)c.q + r / ROWS * ROWS * units;
    const bool active = r < c.rows && !(p.positives && p.positives[c.first + r] < 0);
    const int64_t filled = active ? whole : 0;
    for (int64_t u = 0; u < filled; u++) to[place_of(PACKED, r % ROWS, u)] = unit_of(q + r * p.d, u, p.d);
    for (int64_t u = filled; u < units; u++) to[place_of(PACKED, r % ROWS, u)] = 0;
  }
}

// What is prefetched may lie past the end: its address is made of numbers, as a pointer must stay inside.
static INLINE const void* line(const void* from, int64_t bytes) { return (const void*)((uintptr_t)from + bytes); }

// -inf over those of row r's scores of candidates [from, from + here), padded to `wide`, that are no negatives'.
static INLINE void mask(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t r, int64_t from, int64_t here,
                        int64_t wide, SCALAR* row) {
  const SCALAR infinity = std::numeric_limits<SCALAR>::infinity();
  const int64_t a = c.first + r;
  const bool active = r < c.rows && !(p.positives && p.positives[a] < 0);
  // Of a row that does not count, all: its zeros times an infinite candidate are NaN, which no weight of 0 removes.
  for (int64_t j = active ? here : 0; j < wide; j++) row[j] = -infinity;
  if (!active) return;
  if (p.positives && p.positives[a] >= from && p.positives[a] < from + here) {
    c.own[r] = row[p.positives[a] - from];
    row[p.positives[a] - from] = -infinity;
  }
  if (p.anchor_ids)
    for (int64_t j = 0; j < here; j++)
      if (p.candidate_ids[from + j] == p.anchor_ids[a]) row[j] = -infinity;
}

// <x, y>, in four sums of vectors that meet in double.
static double inner(const number* x, const number* y, int64_t d) {
  vec sum[4] = {};
  int64_t i = 0;
  for (; i + W <= d; i += W) sum[i / W % 4] += load_numbers(x + i) * load_numbers(y + i);
  double total = 0;
  for (; i < d; i++) total += double(widen(x[i])) * widen(y[i]);
  for (int v = 0; v < 4; v++)
    for (int t = 0; t < W; t++) total += sum[v][t];
  return total;
}

// What a row knows in the end; its weight in dk. kept: the total of P as rounded, by which its weights add up to 1.
static SCALAR finish_row(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t r, SCALAR top, SCALAR total,
                         SCALAR kept, SCALAR own, int64_t rank) {
  const SCALAR infinity = std::numeric_limits<SCALAR>::infinity();
  const int64_t a = c.first + r;
  const bool inside = r < c.rows, active = inside && !(p.positives && p.positives[a] < 0);
  if (p.given_lse) return c.weight[r] = active ? p.given_weight[a] : 0;
  const SCALAR lse = active ? top + std::log(total) : -infinity;
  const bool live = lse != -infinity;
  const SCALAR gap = lse - own;
  const SCALAR w = live ? 1 / (1 + std::exp(-gap)) : 0;
  c.inverse[r] = kept > 0 ? 1 / kept : 1;
  c.weight[r] = w;
  if (inside) {
    p.lse[a] = lse;
    p.positive[a] = active ? own : 0;
    p.loss[a] = live ? (gap > 0 ? gap : 0) + std::log1p(std::exp(-std::fabs(gap))) : 0;
    if (p.rank) p.rank[a] = active ? rank : 0;
  }
  return w == 0 ? 0 : w * p.scale * c.inverse[r];  // 0 whatever the scale: rows past the last have no anchor to read
}

// w q / total of rows [r0, r0 + UNIT), for dk: [slice][unit][COLS]
static void weigh(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t r0, const SCALAR* weight) {
  const int64_t slices = (p.d + COLS - 1) / COLS;
  for (int64_t slice = 0; slice < slices; slice++) {
    const int64_t i = slice * COLS;
    unit* to = (unit*)c.pull + (slice * (c.padded / UNIT) + r0 / UNIT) * COLS;
    SCALAR x[UNIT][COLS] = {};
    for (int h = 0; h < UNIT; h++) {
      const number* q = (const number*)p.anchors + (c.first + r0 + h) * p.d + i;
      if (weight[h] != 0)
        for (int64_t j = 0; j < COLS && i + j < p.d; j++) x[h][j] = widen(q[j]) * weight[h];
    }
#if BF16
    for (int v = 0; v < VECS; v++) store((SCALAR*)to + v * W, pair_up(load(x[0] + v * W), load(x[1] + v * W)));
#else
    for (int v = 0; v < VECS; v++) store(to + v * W, load(x[0] + v * W));
#endif
  }
}

// From O, dq and its relatives, for the anchors of the tiles [begin, end).
static void differences(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t begin, int64_t end) {
  const int64_t wide = (p.d + COLS - 1) / COLS * COLS;
  const number* k = (const number*)p.candidates;
  for (int64_t r = begin * ROWS; r < end * ROWS && r < c.rows; r++) {
    const int64_t a = c.first + r;
    const SCALAR *o = c.expectation + r * wide, inverse = c.inverse[r];
    if (p.expectation) {
      for (int64_t i = 0; i < p.d; i++) p.expectation[a * p.d + i] = o[i] * inverse;
      continue;
    }
    const SCALAR w = c.weight[r], pull = w * p.scale;
    const number *q = (const number*)p.anchors + a * p.d, *own = nullptr;
    if (p.vectors) own = (const number*)p.vectors + a * p.d;
    else if (p.positives[a] >= 0) own = k + p.positives[a] * p.d;
    const int64_t whole = p.d / W * W;
    number *dq = (number*)p.dq + a * p.d, *dv = p.dv ? (number*)p.dv + a * p.d : nullptr;
    c.scale_parts[r] = 0;
    if (w == 0 || !own) {
      for (int64_t i = 0; i < p.d; i++) dq[i] = 0;
      for (int64_t i = 0; dv && i < p.d; i++) dv[i] = 0;
      continue;
    }
    vec dots = {};
    for (int64_t i = 0; i < p.d; i += W) {
      SCALAR x[W] = {}, y[W] = {};
      vec anchor, positive;
      if (i < whole) {
        anchor = load_numbers(q + i), positive = load_numbers(own + i);
      } else {
        for (int64_t t = i; t < p.d; t++) x[t - i] = widen(q[t]), y[t - i] = widen(own[t]);
        anchor = load(x), positive = load(y);
      }
      const vec difference = load(o + i) * splat(inverse) - positive;  // o is padded with zeros
      dots += anchor * difference;
      const vec out = difference * splat(pull), back = anchor * splat(-pull);
      if (i < whole) {
        store_numbers(dq + i, out);
        if (dv) store_numbers(dv + i, back);
      } else {
        number last[W], turned[W];
        store_numbers(last, out);
        store_numbers(turned, back);
        for (int64_t t = i; t < p.d; t++) {
          dq[t] = last[t - i];
          if (dv) dv[t] = turned[t - i];
        }
      }
    }
    SCALAR sum = 0;
    for (int t = 0; t < W; t++) sum += dots[t];
    c.scale_parts[r] = w * sum;
  }
}

#if AMX
#include "info_nce_tiles.h"
#else

// Asks for UNIT candidates' numbers [i, i + count), which are packed next: rows apart are no stream that a CPU foresees.
static INLINE void ahead(const Dense<SCALAR>& p, int64_t j, int64_t i, int64_t count) {
  for (int64_t h = 0; h < UNIT; h++)
    for (int64_t t = 0; t < count; t += 64 / sizeof(number))
      __builtin_prefetch(line(p.candidates, ((j + h) * p.d + i + t) * sizeof(number)));
}

// Units [first, first + count) of one panel's candidates, turned round: [PANEL / COLS][unit][COLS]
static void pack_candidates(const Dense<SCALAR>& p, int64_t panel, int64_t first, int64_t count, unit* to) {
  const number* k = (const number*)p.candidates;
  for (int64_t half = 0; half < PANEL / COLS; half++)
    for (int64_t c = 0; c < COLS; c += 4) {
      const int64_t j = panel * PANEL + half * COLS + c;
      unit* out = to + half * count * COLS + c;
      if (j + 4 <= p.m && p.d % UNIT == 0) {  // four at a time, so that a line is written by few
        const number *a = k + j * p.d + first * UNIT, *b = a + p.d, *e = b + p.d, *f = e + p.d;
        for (int64_t u = 0; u < count; u++) {
          unit x[4];
          __builtin_memcpy(x, a + u * UNIT, sizeof(unit));
          __builtin_memcpy(x + 1, b + u * UNIT, sizeof(unit));
          __builtin_memcpy(x + 2, e + u * UNIT, sizeof(unit));
          __builtin_memcpy(x + 3, f + u * UNIT, sizeof(unit));
          __builtin_memcpy(out + u * COLS, x, sizeof x);
        }
      } else {
        for (int64_t t = 0; t < 4; t++)
          for (int64_t u = 0; u < count; u++)
            out[u * COLS + t] = j + t < p.m ? unit_of(k + (j + t) * p.d, first + u, p.d) : 0;
      }
    }
}

// s = scale <q, k>, -inf where no negative, for one panel and the tiles [begin, end) of anchors; each row's maximum.
static void scores(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t panel, int64_t begin, int64_t end, void* scratch) {
  const SCALAR infinity = std::numeric_limits<SCALAR>::infinity();
  const int64_t units = (p.d + UNIT - 1) / UNIT, from = panel * PANEL;
  SCALAR* s = c.scores + panel * c.padded * PANEL;
  unit* packed = (unit*)scratch;
  const vec scale = splat(p.scale);
  for (int64_t first = 0; first < units || first == 0; first += DEPTH) {
    const int64_t count = units - first < DEPTH ? units - first : DEPTH;
    const bool last = first + DEPTH >= units;
    pack_candidates(p, panel, first, count, packed);
    for (int64_t tile = begin; tile < end; tile++)
      for (int64_t half = 0; half < PANEL / COLS; half++) {
        SCALAR* to = s + tile * ROWS * PANEL + half * COLS;
        vec sum[ROWS][VECS];
        multiply(PACKED, (const unit*)c.q + (tile * units + first) * ROWS, packed + half * count * COLS, count, sum);
        if (first) add_tile(to, PANEL, sum);
        if (last)
          for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECS; v++) sum[r][v] *= scale;
        store_tile(to, PANEL, sum);
      }
  }
  const int64_t here = p.m - from < PANEL ? p.m - from : PANEL;
  for (int64_t r = begin * ROWS; r < end * ROWS; r++) {
    SCALAR* row = s + r * PANEL;
    mask(p, c, r, from, here, PANEL, row);
    vec top = splat(-infinity);
    for (int64_t j = 0; j < PANEL; j += W) {
      const vec x = load(row + j);
      top = x > top ? x : top;
    }
    SCALAR most = -infinity;
    for (int t = 0; t < W; t++) most = top[t] > most ? top[t] : most;
    c.top[panel * c.padded + r] = most;
  }
}

// From scores to P times its row's sum (in place), and everything that a row knows; rows of the tiles [begin, end).
static void rows(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t begin, int64_t end) {
  const SCALAR infinity = std::numeric_limits<SCALAR>::infinity();
  for (int64_t r0 = begin * ROWS; r0 < end * ROWS; r0 += UNIT) {
    SCALAR top[UNIT], own[UNIT], weight[UNIT];
    vec sums[UNIT];
    int64_t rank[UNIT];
    for (int h = 0; h < UNIT; h++) {
      const int64_t r = r0 + h, a = c.first + r;
      const bool inside = r < c.rows;
      sums[h] = (vec){};
      rank[h] = 0;
      own[h] = 0;
      top[h] = -infinity;
      if (inside && p.vectors) {
        own[h] = SCALAR(p.scale * inner((const number*)p.anchors + a * p.d, (const number*)p.vectors + a * p.d, p.d));
      } else if (inside && p.positives[a] >= 0 && p.positives[a] < p.m) {
        own[h] = c.own[r];
      }
      if (p.given_lse)
        top[h] = inside && p.given_lse[a] != -infinity ? p.given_lse[a] : 0;
      else
        for (int64_t panel = 0; panel < c.panels; panel++) {
          const SCALAR most = c.top[panel * c.padded + r];
          top[h] = most > top[h] ? most : top[h];
        }
      if (!p.given_lse && std::isinf(top[h])) top[h] = 0;  // infinity is no reference
    }
    for (int64_t panel = 0; panel < c.panels; panel++) {
      SCALAR* s = c.scores + (panel * c.padded + r0) * PANEL;
      if (p.rank)
        for (int h = 0; h < UNIT; h++)
          for (int64_t j = 0; j < PANEL; j++) rank[h] += s[h * PANEL + j] > own[h];
      vec e[UNIT][PANEL / W];
      for (int h = 0; h < UNIT; h++) {
        vec part = {};
        for (int64_t v = 0; v < PANEL / W; v++) {
          e[h][v] = exponential(load(s + h * PANEL + v * W) - splat(top[h]));
          part += e[h][v];
        }
        sums[h] += part;
      }
      if (!p.keep) continue;
#if BF16
      for (int h = 0; h < UNIT; h++)
        for (int64_t v = 0; v < PANEL / W; v++) store_numbers((number*)s + h * PANEL + v * W, e[h][v]);
      for (int64_t v = 0; v < PANEL / W; v++) store(s + PANEL + v * W, pair_up(e[0][v], e[1][v]));
#else
      for (int64_t v = 0; v < PANEL / W; v++) store(s + v * W, e[0][v]);
#endif
    }
    for (int h = 0; h < UNIT; h++) {
      const int64_t r = r0 + h;
      SCALAR total = 0;
      for (int t = 0; t < W; t++) total += sums[h][t];
      weight[h] = finish_row(p, c, r, top[h], total, total, own[h], rank[h]);
    }
    if (p.dk) weigh(p, c, r0, weight);
  }
}

// O, and what is made of it, for the anchors of the tiles [begin, end).
static void expectations(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t begin, int64_t end, void* scratch) {
  const int64_t slices = (p.d + COLS - 1) / COLS, wide = slices * COLS;
  const number* k = (const number*)p.candidates;
  unit* packed = (unit*)scratch;
  for (int64_t panel = 0; panel < c.panels; panel += PANELS_AT_ONCE) {
    const int64_t now = c.panels - panel < PANELS_AT_ONCE ? c.panels - panel : PANELS_AT_ONCE;
    for (int64_t slice = 0; slice < slices; slice++) {
      const int64_t i = slice * COLS;
      const bool full = i + COLS <= p.d;
      for (int64_t u = 0; u < now * PANEL / UNIT; u++) {  // [unit][COLS]
        const int64_t j = panel * PANEL + u * UNIT;
        ahead(p, slice + 1 < slices ? j : j + PANELS_AT_ONCE * PANEL, slice + 1 < slices ? i + COLS : 0, COLS);
#if BF16
        const number none[COLS] = {};
        number ragged[2][COLS] = {};
        const number* x[2];
        for (int h = 0; h < 2; h++) {
          x[h] = j + h < p.m ? k + (j + h) * p.d + i : none;
          if (!full && j + h < p.m) {
            for (int64_t t = 0; i + t < p.d; t++) ragged[h][t] = x[h][t];
            x[h] = ragged[h];
          }
        }
        for (int v = 0; v < VECS; v++) {
          const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x[0] + v * W)));
          const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x[1] + v * W)));
          store((SCALAR*)packed + u * COLS + v * W, (vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
#else
        for (int v = 0; v < VECS; v++)
          if (full && j < p.m)
            store(packed + u * COLS + v * W, load(k + j * p.d + i + v * W));
          else
            for (int t = v * W; t < (v + 1) * W; t++) packed[u * COLS + t] = j < p.m && i + t < p.d ? k[j * p.d + i + t] : 0;
#endif
      }
      for (int64_t tile = begin; tile < end; tile++) {
        SCALAR* to = c.expectation + tile * ROWS * wide + i;
        vec sum[ROWS][VECS];
        multiply(ALONG_CANDIDATES, (const unit*)c.scores + (panel * c.padded + tile * ROWS) * PANEL, packed, PANEL / UNIT,
                 sum, now, c.padded * PANEL);
        if (panel) add_tile(to, wide, sum);
        store_tile(to, wide, sum);
      }
    }
  }
  differences(p, c, begin, end);
}

#endif  // AMX

// dk += sum of P w q for one panel's candidates and the slices [begin, end) of the features, minus w q where they are
// positives.
static void pulls(const Dense<SCALAR>& p, const Chunk<SCALAR>& c, int64_t panel, int64_t begin, int64_t end,
                  void* scratch) {
  const int64_t from = panel * PANEL;
  begin_products();
  for (int64_t first = 0; first < c.padded; first += ANCHORS_AT_ONCE) {
    const int64_t count = c.padded - first < ANCHORS_AT_ONCE ? c.padded - first : ANCHORS_AT_ONCE;
#if AMX
    const int64_t apart = count / UNIT;  // candidates in s
    turn_panel(c, panel, first, count, (unit*)scratch);
    const unit* s = (const unit*)scratch;
#else
    (void)scratch;
    const int64_t apart = 1;
    const unit* s = (const unit*)c.scores + (panel * c.padded + first) * PANEL;
#endif
    for (int64_t slice = begin; slice < end; slice++) {
      const int64_t i = slice * COLS, width = p.d - i < COLS ? p.d - i : COLS;
      const unit* pull = (const unit*)c.pull + (slice * c.padded + first) / UNIT * COLS;
      for (int64_t tile = 0; tile < PANEL && from + tile < p.m; tile += ROWS) {
        const int64_t j = from + tile;
        SCALAR* to = p.dk + j * p.d + i;
        for (int64_t r = 0; r < ROWS; r++)
          for (int64_t t = 0; t < COLS; t += 64 / sizeof(SCALAR))
            __builtin_prefetch(line(to, (r * p.d + t) * sizeof(SCALAR)), 1);
        vec sum[ROWS][VECS];
        multiply(ALONG_ANCHORS, s + tile * apart, pull, count / UNIT, sum);
        if (j + ROWS <= p.m && width == COLS) {
          add_tile(to, p.d, sum);
          store_tile(to, p.d, sum);
          continue;
        }
        SCALAR x[ROWS * COLS];
        store_tile(x, COLS, sum);
        for (int64_t r = 0; r < ROWS && j + r < p.m; r++)
          for (int64_t t = 0; t < width; t++) to[r * p.d + t] += x[r * COLS + t];
      }
    }
  }
  end_products();
  if (!p.positives) return;
  const int64_t i = begin * COLS, last = end * COLS < p.d ? end * COLS : p.d;
  for (int64_t r = 0; r < c.rows; r++) {
    const int64_t own = p.positives[c.first + r];
    if (own < from || own >= from + PANEL || own >= p.m) continue;
    const SCALAR w = p.given_lse || c.weight[r] == 0 ? c.weight[r] : c.weight[r] * p.scale;
    const number* q = (const number*)p.anchors + (c.first + r) * p.d;
    SCALAR* to = p.dk + own * p.d;
    if (w != 0)
      for (int64_t t = i; t < last; t++) to[t] -= w * widen(q[t]);
  }
}

#if AMX
static const DenseLoops<SCALAR> dense_loops = {UNIT, ROWS, COLS, PANEL, 0, 0, FORWARD_BYTES, PULLS_BYTES, pack_anchors,
                                               nullptr, nullptr, nullptr, pack_all, forward, pulls};
#else
static const DenseLoops<SCALAR> dense_loops = {UNIT, ROWS, COLS, PANEL, DEPTH * PANEL * sizeof(unit),
                                               PANELS_AT_ONCE * PANEL / UNIT * COLS * sizeof(unit), 0, 0, pack_anchors,
                                               scores, rows, expectations, nullptr, nullptr, pulls};
#endif
