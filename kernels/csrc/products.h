// The products of info_nce.h: a tile of ROWS x COLS sums stays in registers, the right operand comes packed [unit][COLS].
// A unit is what one lane takes at a time: a number, or a pair of bf16 whose products are summed in float. No include
// guard: see every_instruction_set.h.

#include "vectors.h"

#if BF16
typedef uint32_t unit;
typedef uint16_t number;
constexpr int UNIT = 2;
#else
typedef SCALAR unit, number;
constexpr int UNIT = 1;
#endif
#if AMX
constexpr int ROWS = 32, VECS = 2, PANEL = 64, STEP = 16;  // STEP: units of the sum that are taken at a time
#elif VECTOR_BYTES == 64
constexpr int ROWS = 8, VECS = 2, PANEL = 64, STEP = 1;  // PANEL: candidates whose scores lie side by side
#else
constexpr int ROWS = 6, VECS = 2, PANEL = 48, STEP = 1;
#endif
constexpr int COLS = VECS * W;
static_assert(PANEL % ROWS == 0 && PANEL % COLS == 0, "panels are made of whole tiles");

#if BF16

static INLINE SCALAR widen(number x) {
  const uint32_t bits = uint32_t(x) << 16;
  SCALAR y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

static INLINE __m256i narrow(vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

static INLINE vec every(unit x) { return (vec)_mm512_set1_epi32(int32_t(x)); }

static INLINE vec product(vec sum, vec a, vec b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

// Lane by lane, a pair of the two: low half, high half.
static INLINE vec pair_up(vec low, vec high) {
  const __m512i a = _mm512_cvtepu16_epi32(narrow(low)), b = _mm512_cvtepu16_epi32(narrow(high));
  return (vec)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

static INLINE vec load_numbers(const number* from) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}

static INLINE void store_numbers(number* to, vec x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }

#else

static INLINE SCALAR widen(number x) { return x; }
static INLINE vec every(unit x) { return splat(x); }
static INLINE vec product(vec sum, vec a, vec b) { return sum + a * b; }
static INLINE vec load_numbers(const number* from) { return load(from); }
static INLINE void store_numbers(number* to, vec x) { store(to, x); }

#endif

static INLINE vec load_units(const unit* from) {
  vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// Where the left operand's unit k of row r lies: anchors as packed; P along the candidates; P along the anchors.
// In bf16 two rows of a panel become [2][PANEL] numbers, for the sum along candidates, and PANEL pairs, along anchors.
// Tiles take both packed, as [step][ROWS][STEP], and P along the candidates as rows of PANEL numbers.
enum Left { PACKED, ALONG_CANDIDATES, ALONG_ANCHORS };

#if AMX

static INLINE int64_t place_of(Left, int64_t r, int64_t k) { return (k / STEP * ROWS + r) * STEP + k % STEP; }

// Between these, the thread has eight tiles of 16 rows of 64 bytes; torch's products configure their own.
static INLINE void begin_products() {
  alignas(64) static const struct {
    uint8_t palette = 1, unused[15] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } tiles;
  _tile_loadconfig(&tiles);
}

static INLINE void end_products() { _tile_release(); }

// A tile of sums to where rows lie `stride` apart.
static INLINE void multiply_to(SCALAR* to, int64_t stride, Left left, const unit* a, const unit* b, int64_t count,
                               int64_t blocks = 1, int64_t step = 0) {
  const bool loose = left == ALONG_CANDIDATES;
  const int64_t row = loose ? PANEL / UNIT : STEP, next = loose ? STEP : ROWS * STEP;
  __asm__ volatile("" ::: "memory");  // GCC does not know that a tile's load reads what was stored
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (; blocks > 0; blocks--, a += step, b += count * COLS)
    for (int64_t k = 0; k < count; k += STEP) {
      const unit *x = a + k / STEP * next, *y = b + k * COLS;
      _tile_loadd(4, x, row * sizeof(unit));
      _tile_loadd(6, y, COLS * sizeof(unit));
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, y + W, COLS * sizeof(unit));
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, x + ROWS / 2 * row, row * sizeof(unit));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  _tile_stored(0, to, stride * sizeof(SCALAR));
  _tile_stored(1, to + W, stride * sizeof(SCALAR));
  _tile_stored(2, to + ROWS / 2 * stride, stride * sizeof(SCALAR));
  _tile_stored(3, to + ROWS / 2 * stride + W, stride * sizeof(SCALAR));
}

static INLINE void multiply(Left left, const unit* a, const unit* b, int64_t count, vec (*sum)[VECS],
                            int64_t blocks = 1, int64_t step = 0) {
  multiply_to((SCALAR*)sum, COLS, left, a, b, count, blocks, step);
}

#else

static INLINE void begin_products() {}
static INLINE void end_products() {}

static INLINE int64_t place_of(Left left, int64_t r, int64_t k) {
  if (left == PACKED) return k * ROWS + r;
  if (left == ALONG_ANCHORS) return k * (UNIT * PANEL) + (UNIT - 1) * PANEL + r;
  return UNIT == 1 ? r * PANEL + k : r / 2 * (2 * PANEL) + r % 2 * (PANEL / 2) + k;
}

// sum[r][c] = sum of a[r] b[c] over `count` units of each of `blocks`, which on the left lie `step` apart
static INLINE void multiply(Left left, const unit* a, const unit* b, int64_t count, vec (*sum)[VECS], int64_t blocks = 1,
                            int64_t step = 0) {
  vec s[ROWS][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < VECS; c++) s[r][c] = (vec){};
  for (; blocks > 0; blocks--, a += step, b += count * COLS)
    for (int64_t k = 0; k < count; k++) {
      vec y[VECS];
#pragma GCC unroll 4
      for (int c = 0; c < VECS; c++) y[c] = load_units(b + k * COLS + c * W);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const vec x = every(a[place_of(left, r, k)]);
#pragma GCC unroll 4
        for (int c = 0; c < VECS; c++) s[r][c] = product(s[r][c], x, y[c]);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < VECS; c++) sum[r][c] = s[r][c];
}

#endif

// Added at the end, not begun with: a sum of sums is more accurate than one long sum.
static INLINE void add_tile(const SCALAR* from, int64_t stride, vec (*sum)[VECS]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < VECS; c++) sum[r][c] += load(from + r * stride + c * W);
}

static INLINE void store_tile(SCALAR* to, int64_t stride, vec (*sum)[VECS]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < VECS; c++) store(to + r * stride + c * W, sum[r][c]);
}

// Unit u of a row of d numbers; what lies past the end is 0.
static INLINE unit unit_of(const number* row, int64_t u, int64_t d) {
#if BF16
  const uint32_t low = row[2 * u], high = 2 * u + 1 < d ? row[2 * u + 1] : 0;
  return low | high << 16;
#else
  (void)d;
  return row[u];
#endif
}
