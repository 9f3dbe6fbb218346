// info_nce on the CPU: every candidate is a negative, one chunk of anchors at a time.
//
//   s = scale <q, k>     lse = log sum of exp s over the negatives     O = sum of exp(s - lse) k
//   dq = w (O - k_p)     dk_j = sum of w P q over the anchors, minus w q where j is the positive
//
// A chunk's scores lie in panels of candidates, [panel][row][PANEL], so that all three products read them in lines:
// made once, exponentiated in place, summed over candidates into O and over anchors into dk. Operands are packed as
// they are needed, into scratch that stays in the second-level cache. A row, a panel or a slice of the features has one
// owner and one order of additions: the same bits for any number of threads. Memory beyond inputs and gradients: the
// scores, the chunk's anchors packed twice, its O. With tiles P instead of scores, and the candidates packed twice.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "arrays.h"
#include "levels.h"

namespace {

// Inputs in their own type (T, or bf16), results in T.
template <typename T>
struct Dense {
  const void *anchors, *candidates, *vectors;           // (N, D), (M, D), (N, D) or null
  const int64_t *positives, *anchor_ids, *candidate_ids;  // (N) or null; (N), (M) or null
  T scale;
  int64_t n, m, d;
  const T *given_lse, *given_weight;  // (N) or null: dk alone, w includes scale
  bool keep;                          // whether P is needed
  T *loss, *lse, *positive;           // (N)
  int64_t* rank;                      // (N) or null
  T* expectation;                     // (N, D) or null
  void *dq, *dv;                      // (N, D) in the inputs' type, or null
  T* dk;                              // (M, D) or null
};

template <typename T>
struct Chunk {
  int64_t first, rows, padded, panels;  // anchors; padded to whole tiles
  T *scores, *own, *top;                // (panels, padded, PANEL), (padded), (panels, padded)
  T *weight, *inverse, *scale_parts;    // (padded)
  T* expectation;                       // (padded, D padded)
  void *q, *pull;                       // anchors packed as the left, and, weighed, as the right operand
  T* reference;                         // (padded) what exponents are less; this and the rest: null without tiles
  void *k, *k_pairs;                    // candidates packed for the scores, and for O
};

template <typename T>
struct DenseLoops {
  int64_t unit, rows, cols, panel, candidates_bytes, expectations_bytes, forward_bytes, pulls_bytes;
  void (*pack_anchors)(const Dense<T>&, const Chunk<T>&, int64_t, int64_t);
  void (*scores)(const Dense<T>&, const Chunk<T>&, int64_t, int64_t, int64_t, void*);
  void (*rows_of)(const Dense<T>&, const Chunk<T>&, int64_t, int64_t);
  void (*expectations)(const Dense<T>&, const Chunk<T>&, int64_t, int64_t, void*);
  void (*pack_all)(const Dense<T>&, const Chunk<T>&, int64_t, int64_t);  // this and forward, or the three above, else null
  void (*forward)(const Dense<T>&, const Chunk<T>&, int64_t, int64_t, void*);
  void (*pulls)(const Dense<T>&, const Chunk<T>&, int64_t, int64_t, int64_t, void*);
};

#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define LOOPS_HAVE_BF16
#endif
#define LOOPS "info_nce.h"
#include "every_instruction_set.h"

bool has_bf16() {
#if defined(LOOPS_HAVE_BF16) && defined(__x86_64__)
  return level >= AVX512_BF16;
#else
  return false;
#endif
}

const DenseLoops<float>& loops_for(float, bool bf16) {
#if defined(__x86_64__)
#ifdef LOOPS_HAVE_BF16
  if (bf16) return level == AMX_BF16 ? amx_bf16::dense_loops : avx512_bf16::dense_loops;
#endif
  if (level >= AVX512) return avx512_float::dense_loops;
  if (level == AVX2) return avx2_float::dense_loops;
#endif
  return baseline_float::dense_loops;
}

const DenseLoops<double>& loops_for(double, bool) {
#if defined(__x86_64__)
  if (level != BASELINE) return avx2_double::dense_loops;
#endif
  return baseline_double::dense_loops;
}

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const int64_t* integers(const OptionalTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

// All chunks; the gradient of the scale.
template <typename T>
double run(const Dense<T>& p, bool bf16, int64_t at_once) {
  const auto& loops = loops_for(T(), bf16);
  const auto up = [](int64_t x, int64_t to) { return (x + to - 1) / to * to; };
  const int64_t most = std::min(up(p.n, loops.rows), up(at_once, loops.rows)), panels = up(p.m, loops.panel) / loops.panel;
  const int64_t slices = up(p.d, loops.cols) / loops.cols, units = up(p.d, 32) / loops.unit;
  const bool products = p.expectation || p.dq;
  const auto make = [](bool needed, int64_t count) { return needed ? array<T>(count) : Array<T>(); };
  const bool whole = loops.forward;
  const auto scores = make(!whole || p.keep, panels * most * loops.panel / (whole ? loops.unit : 1));
  const auto reference = make(whole, most), k = make(whole, panels * loops.panel * units);
  const auto k_pairs = make(whole && products, panels * loops.panel / loops.unit * slices * loops.cols);
  const auto top = make(true, panels * most), own = make(true, most);
  const auto weight = make(true, most), inverse = make(true, most), parts = make(true, most);
  const auto expectation = make(products, most * slices * loops.cols);
  const auto q = make(true, most * units), pull = make(p.dk, slices * most / loops.unit * loops.cols);
  double dscale = 0;
  for (int64_t first = 0; first < p.n; first += most) {
    const int64_t now = std::min(most, p.n - first), padded = up(now, loops.rows), tiles = padded / loops.rows;
    const Chunk<T> c = {first, now, padded, panels, scores.get(), own.get(), top.get(), weight.get(), inverse.get(),
                        parts.get(), expectation.get(), q.get(), pull.get(), reference.get(), k.get(), k_pairs.get()};
    const bool heavy = now * p.m * std::max<int64_t>(p.d, 16) > (1 << 17);
    const auto share = [&](int64_t count, const auto& task) { at::parallel_for(0, count, heavy ? 1 : count, task); };
    if (whole) {
      RECORD_USER_SCOPE("cpc_kernels/info_nce/forward");
      if (first == 0) share(panels, [&](int64_t begin, int64_t end) { loops.pack_all(p, c, begin, end); });
      share(tiles, [&](int64_t begin, int64_t end) {
        const auto scratch = array<char>(loops.forward_bytes);
        loops.pack_anchors(p, c, begin, end);
        loops.forward(p, c, begin, end, scratch.get());
      });
    } else {
      RECORD_USER_SCOPE("cpc_kernels/info_nce/scores");
      share(tiles, [&](int64_t begin, int64_t end) { loops.pack_anchors(p, c, begin, end); });
      const int64_t blocks = std::min<int64_t>(tiles, 8);  // a panel and a block of its rows is a task
      share(panels * blocks, [&](int64_t begin, int64_t end) {
        const auto scratch = array<char>(loops.candidates_bytes);
        for (int64_t task = begin; task < end;) {
          const int64_t panel = task / blocks, last = std::min(end, (panel + 1) * blocks) - panel * blocks;
          loops.scores(p, c, panel, tiles * (task - panel * blocks) / blocks, tiles * last / blocks, scratch.get());
          task = panel * blocks + last;
        }
      });
    }
    if (!whole) {
      RECORD_USER_SCOPE("cpc_kernels/info_nce/loss");
      share(tiles, [&](int64_t begin, int64_t end) { loops.rows_of(p, c, begin, end); });
    }
    if (products && !whole) {
      RECORD_USER_SCOPE("cpc_kernels/info_nce/expectation");
      share(tiles, [&](int64_t begin, int64_t end) {
        const auto scratch = array<char>(loops.expectations_bytes);
        loops.expectations(p, c, begin, end, scratch.get());
      });
    }
    if (p.dq)
      for (int64_t r = 0; r < now; r++) dscale += parts.get()[r];
    if (p.dk) {
      RECORD_USER_SCOPE("cpc_kernels/info_nce/gradients");
      share(panels * slices, [&](int64_t begin, int64_t end) {
        const auto scratch = array<char>(loops.pulls_bytes);
        for (int64_t task = begin; task < end;) {
          const int64_t panel = task / slices, last = std::min(end, (panel + 1) * slices);
          loops.pulls(p, c, panel, task - panel * slices, last - panel * slices, scratch.get());
          task = last;
        }
      });
    }
  }
  return dscale;
}

template <typename T>
Dense<T> describe(const Tensor& anchors, const Tensor& candidates, const Tensor& positives, double scale,
                  const OptionalTensor& anchor_ids, const OptionalTensor& candidate_ids) {
  const bool indexed = positives.scalar_type() == at::kLong;
  Dense<T> p = {};
  p.anchors = anchors.const_data_ptr(), p.candidates = candidates.const_data_ptr();
  p.vectors = indexed ? nullptr : positives.const_data_ptr();
  p.positives = indexed ? positives.const_data_ptr<int64_t>() : nullptr;
  p.anchor_ids = integers(anchor_ids), p.candidate_ids = integers(candidate_ids);
  p.scale = T(scale), p.n = anchors.size(0), p.m = candidates.size(0), p.d = anchors.size(1);
  return p;
}

template <typename F>
void with_type(const Tensor& anchors, const F& run_it) {
  if (anchors.scalar_type() == at::kDouble) run_it(double());
  else run_it(float());
}

// Contiguous inputs of one type: float, double, or bf16 where the loops have it; ids and indices int64. fold: loss, dq,
// dk, dv (empty: none), dscale (empty: none) are those of the sum of losses; dk and dscale are added to.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dense_forward(
    const Tensor& anchors, const Tensor& candidates, const Tensor& positives, double scale, const OptionalTensor& anchor_ids,
    const OptionalTensor& candidate_ids, bool need_expectation, bool need_rank, const std::optional<at::TensorList>& fold,
    int64_t at_once) {
  const bool bf16 = anchors.scalar_type() == at::kBFloat16;
  const auto options = anchors.options().dtype(anchors.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const int64_t n = anchors.size(0);
  Tensor loss = at::empty({n}, options), lse = at::empty({n}, options), positive = at::empty({n}, options);
  Tensor rank = at::empty({need_rank ? n : 0}, options.dtype(at::kLong));
  const bool keep = need_expectation && !fold;
  Tensor expectation = at::empty(keep ? anchors.sizes() : at::IntArrayRef{0}, options);
  with_type(anchors, [&](auto type) {
    using T = decltype(type);
    Dense<T> p = describe<T>(anchors, candidates, positives, scale, anchor_ids, candidate_ids);
    p.loss = loss.data_ptr<T>(), p.lse = lse.data_ptr<T>(), p.positive = positive.data_ptr<T>();
    p.rank = need_rank ? rank.data_ptr<int64_t>() : nullptr;
    p.expectation = keep ? expectation.data_ptr<T>() : nullptr;
    p.keep = need_expectation;
    if (fold) {
      const Tensor &dq = (*fold)[0], &dk = (*fold)[1], &dv = (*fold)[2];
      p.dq = dq.data_ptr();
      p.dk = dk.numel() ? dk.data_ptr<T>() : nullptr;
      p.dv = dv.numel() ? dv.data_ptr() : nullptr;
    }
    const double sum = run(p, bf16, at_once);
    if (fold && (*fold)[3].numel()) (*fold)[3].data_ptr<T>()[0] += T(sum);
  });
  return {loss, lse, positive, rank, expectation};
}

Tensor dense_backward(const Tensor& weight, const Tensor& lse, const Tensor& anchors, const Tensor& candidates,
                      const Tensor& positives, double scale, const OptionalTensor& anchor_ids,
                      const OptionalTensor& candidate_ids, int64_t at_once) {
  Tensor dk = at::zeros(candidates.sizes(), lse.options());
  with_type(anchors, [&](auto type) {
    using T = decltype(type);
    Dense<T> p = describe<T>(anchors, candidates, positives, scale, anchor_ids, candidate_ids);
    p.given_lse = lse.const_data_ptr<T>(), p.given_weight = weight.const_data_ptr<T>();
    p.keep = true;
    p.dk = dk.data_ptr<T>();
    run(p, anchors.scalar_type() == at::kBFloat16, at_once);
  });
  return dk;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cpc_kernels_cpu, m) {
  m.def("dense_has_bf16", &has_bf16);
  m.def("dense_forward(Tensor anchors, Tensor candidates, Tensor positives, float scale, Tensor? anchor_ids, "
        "Tensor? candidate_ids, bool need_expectation, bool need_rank, Tensor(a!)[]? fold, int at_once) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("dense_backward", &dense_backward);
}

TORCH_LIBRARY_IMPL(cpc_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("dense_forward", &dense_forward); }
