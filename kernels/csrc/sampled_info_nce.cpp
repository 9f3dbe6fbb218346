// sampled_info_nce on the CPU: InfoNCE against listed or drawn negatives, without gathering them.
//
//   lse = log sum_s exp(scale <q, z_s>)      P_s = exp(scale <q, z_s> - lse)      O = sum_s P_s z_s
//   dq = w (O - z_p)     dz_j = sum of w P q over the pairs of j, minus w q where j is the positive
//   w = weight * scale, where weight = upstream * sigmoid(lse - s_p)
//
// Forward takes a block of anchors past one slice of the pool's features at a time, which stays in the second-level
// cache: first for the scores, then, when P is known, for O, whose sums stay in registers. Backward sorts the pairs (anchor, candidate) of a block of anchors
// by candidate; a thread owns candidates, adds their pairs in anchor order, and keeps the sum in registers. Nothing is
// atomic and no order depends on the number of threads. Memory: P, O, the gradients, and 16 MB of pairs.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

constexpr uint64_t LOW = 0xFFFFFFFFull;
constexpr int64_t PAIRS_AT_ONCE = 2 << 20;  // bounds the memory of the sort
constexpr int64_t BLOCK_BYTES = 256 << 10;  // of anchors in backward: half of a second-level cache
constexpr int64_t SLICE_BYTES = 416 << 10;  // of the pool in forward: most of one
constexpr int64_t BLOCK_SCORES = 8 << 10;   // of anchors in forward, counted in scores: 32 KB
constexpr int64_t PAD = 16;                 // lists are padded to whole vectors of every width

template <typename T>
struct Problem {
  const T *anchors, *pool, *vectors;                          // (N, K, D), (M, D), (N, K, D) or null
  const int64_t *positives, *negatives;                       // (N, K) or null; (N, S) or (N, K, S) or null
  const int64_t *anchor_ids, *pool_ids;                       // (N), (M) or null
  bool drawn, per_step;
  uint64_t seed;
  T scale;
  int64_t n, steps, d, m, s;
};

template <typename T>
struct Outputs {
  T *loss, *lse, *positive;  // (N, K)
  int64_t* rank;             // (N, K) or null
  T *expectation, *probabilities;  // (N, K, D), (N, K, S) or null
};

template <typename T>
struct Pair {
  int32_t anchor;  // counted from the block's first
  T coefficient;
};

template <typename T>
struct Loops {
  void (*forward_rows)(const Problem<T>&, const Outputs<T>&, int64_t, int64_t);
  void (*backward_anchors)(const Problem<T>&, const T*, const T*, T*, T*, T*, int64_t, int64_t);
  void (*sort_pairs)(const Problem<T>&, const T*, const T*, int64_t, int64_t, int32_t*, Pair<T>*);
  void (*add_pairs)(const Problem<T>&, const T*, const int32_t*, const Pair<T>*, T*, int64_t, int64_t);
};

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int quad_mask __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (quad_mask){__VA_ARGS__})
#endif

// The same loops for each instruction set; all standard headers are in by now, so only these loops are affected.
#define SCALAR float
#define INTEGER int32_t
#define IS_FLOAT 1
#define VECTOR_BYTES 16
namespace baseline_float {
#include "sampled_info_nce.h"
}
#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#define SCALAR double
#define INTEGER int64_t
#define IS_FLOAT 0
namespace baseline_double {
#include "sampled_info_nce.h"
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
#include "sampled_info_nce.h"
}
#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#define SCALAR double
#define INTEGER int64_t
#define IS_FLOAT 0
namespace avx2_double {
#include "sampled_info_nce.h"
}
#undef SCALAR
#undef INTEGER
#undef IS_FLOAT
#undef VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#define VECTOR_BYTES 64
#define SCALAR float
#define INTEGER int32_t
#define IS_FLOAT 1
namespace avx512_float {
#include "sampled_info_nce.h"
}
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

enum Level { BASELINE, AVX2, AVX512 };

Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return BASELINE;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return wide ? AVX512 : AVX2;
#else
  return BASELINE;
#endif
}

Level level = best_level();

const Loops<float>& loops_for(float) {
#if defined(__x86_64__)
  if (level == AVX512) return avx512_float::loops;
  if (level == AVX2) return avx2_float::loops;
#endif
  return baseline_float::loops;
}

const Loops<double>& loops_for(double) {
#if defined(__x86_64__)
  if (level != BASELINE) return avx2_double::loops;
#endif
  return baseline_double::loops;
}

std::string instruction_set() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[level];
}

// For tests: run the loops of a lower level than this CPU's.
void use_instruction_set(const std::string& name) {
  const Level wanted = name == "baseline" ? BASELINE : name == "avx2" ? AVX2 : AVX512;
  TORCH_CHECK(wanted <= best_level(), "sampled_info_nce: this CPU cannot run ", name, " instructions.");
  level = wanted;
}

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const int64_t* integers(const OptionalTensor& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; }

template <typename T>
Problem<T> describe(const Tensor& anchors, const Tensor& pool, const Tensor& positives, const OptionalTensor& negatives,
                    std::optional<int64_t> seed, int64_t count, bool per_step, double scale,
                    const OptionalTensor& anchor_ids, const OptionalTensor& pool_ids) {
  const bool indexed = positives.scalar_type() == at::kLong;
  TORCH_CHECK(pool.size(0) < (1ll << 31), "sampled_info_nce: the pool has ", pool.size(0), " rows; at most 2^31 - 1.");
  return {
      anchors.const_data_ptr<T>(),
      pool.const_data_ptr<T>(),
      indexed ? nullptr : positives.const_data_ptr<T>(),
      indexed ? positives.const_data_ptr<int64_t>() : nullptr,
      integers(negatives),
      integers(anchor_ids),
      integers(pool_ids),
      seed.has_value(),
      seed ? per_step : negatives->dim() == 3,
      uint64_t(seed.value_or(0)),
      T(scale),
      anchors.size(0),
      anchors.size(1),
      anchors.size(2),
      pool.size(0),
      seed ? count : negatives->size(-1),
  };
}

// Rows that make a task worth handing out: about 64k products.
int64_t grain(int64_t products_per_row) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(products_per_row, 1)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sampled_forward(
    const Tensor& anchors, const Tensor& pool, const Tensor& positives, const OptionalTensor& negatives,
    std::optional<int64_t> seed, int64_t count, bool per_step, double scale, const OptionalTensor& anchor_ids,
    const OptionalTensor& pool_ids, bool need_expectation, bool need_probabilities, bool need_rank) {
  const int64_t n = anchors.size(0), steps = anchors.size(1), s = seed ? count : negatives->size(-1);
  const auto options = anchors.options();
  Tensor loss = at::empty({n, steps}, options), lse = at::empty({n, steps}, options);
  Tensor positive = at::empty({n, steps}, options);
  Tensor rank = need_rank ? at::empty({n, steps}, options.dtype(at::kLong)) : at::empty({0}, options.dtype(at::kLong));
  Tensor expectation = need_expectation ? at::empty_like(anchors) : at::empty({0}, options);
  Tensor probabilities = need_probabilities ? at::empty({n, steps, s}, options) : at::empty({0}, options);
  AT_DISPATCH_FLOATING_TYPES(anchors.scalar_type(), "sampled_forward", [&] {
    const auto p = describe<scalar_t>(anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids);
    const Outputs<scalar_t> out = {
        loss.data_ptr<scalar_t>(),
        lse.data_ptr<scalar_t>(),
        positive.data_ptr<scalar_t>(),
        need_rank ? rank.data_ptr<int64_t>() : nullptr,
        need_expectation ? expectation.data_ptr<scalar_t>() : nullptr,
        need_probabilities ? probabilities.data_ptr<scalar_t>() : nullptr,
    };
    const auto& loops = loops_for(scalar_t());
    at::parallel_for(0, n, grain(steps * (s + 1) * p.d), [&](int64_t begin, int64_t end) {
      loops.forward_rows(p, out, begin, end);
    });
  });
  return {loss, lse, positive, rank, expectation, probabilities};
}

template <typename T>
void backward_pool(const Problem<T>& p, const T* weight, const T* probabilities, T* dz) {
  const auto& loops = loops_for(T());
  const int64_t anchors = p.n * p.steps, pairs = p.s + 1;
  int64_t block = std::max<int64_t>(16, BLOCK_BYTES / std::max<int64_t>(p.d * sizeof(T), 1));
  block = std::max<int64_t>(1, std::min({block, anchors, PAIRS_AT_ONCE / pairs}));
  const int64_t blocks = (anchors + block - 1) / block;
  const int64_t at_once = std::max<int64_t>(1, std::min(blocks, PAIRS_AT_ONCE / (block * pairs)));
  std::vector<int32_t> offsets(at_once * (p.m + 1));
  std::vector<Pair<T>> items(at_once * block * pairs);
  for (int64_t first = 0; first < blocks; first += at_once) {
    const int64_t now = std::min(at_once, blocks - first);
    at::parallel_for(0, now, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        const int64_t from = (first + b) * block;
        loops.sort_pairs(p, weight, probabilities, from, std::min(from + block, anchors), &offsets[b * (p.m + 1)],
                         &items[b * block * pairs]);
      }
    });
    at::parallel_for(0, p.m, grain(now * block * pairs / std::max<int64_t>(p.m, 1) * p.d), [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < now; b++)
        loops.add_pairs(p, p.anchors + (first + b) * block * p.d, &offsets[b * (p.m + 1)], &items[b * block * pairs], dz,
                        begin, end);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_backward(
    const Tensor& anchors, const Tensor& pool, const Tensor& positives, const OptionalTensor& negatives,
    std::optional<int64_t> seed, int64_t count, bool per_step, double scale, const OptionalTensor& anchor_ids,
    const OptionalTensor& pool_ids, const Tensor& weight_, const Tensor& expectation, const Tensor& probabilities,
    bool need_anchors, bool need_pool, bool need_positives, bool need_scale) {
  const auto options = anchors.options();
  const Tensor none = at::empty({0}, options), weight = weight_.contiguous();
  Tensor dq = need_anchors ? at::empty_like(anchors) : at::empty({0}, options);
  Tensor dz = need_pool ? at::zeros_like(pool) : at::empty({0}, options);
  Tensor dv = need_positives ? at::empty_like(anchors) : at::empty({0}, options);
  Tensor dscale = need_scale ? at::zeros({1}, options) : at::empty({0}, options);
  AT_DISPATCH_FLOATING_TYPES(anchors.scalar_type(), "sampled_backward", [&] {
    const auto p = describe<scalar_t>(anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids);
    const auto& loops = loops_for(scalar_t());
    const int64_t total = p.n * p.steps;
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    if (need_anchors || need_positives || need_scale) {
      std::vector<scalar_t> rows(need_scale ? total : 0);
      at::parallel_for(0, total, grain(3 * p.d), [&](int64_t begin, int64_t end) {
        loops.backward_anchors(p, w, expectation.numel() ? expectation.const_data_ptr<scalar_t>() : nullptr,
                               need_anchors ? dq.data_ptr<scalar_t>() : nullptr,
                               need_positives ? dv.data_ptr<scalar_t>() : nullptr, need_scale ? rows.data() : nullptr,
                               begin, end);
      });
      double sum = 0;
      for (const scalar_t each : rows) sum += each;
      if (need_scale) dscale.data_ptr<scalar_t>()[0] = scalar_t(sum);
    }
    if (need_pool && total && p.m && p.d) backward_pool(p, w, probabilities.const_data_ptr<scalar_t>(), dz.data_ptr<scalar_t>());
  });
  return {dq, dz, dv, dscale};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cpc_kernels_cpu, m) {
  m.def("instruction_set", &instruction_set);
  m.def("use_instruction_set", &use_instruction_set);
  m.def("sampled_forward", &sampled_forward);
  m.def("sampled_backward", &sampled_backward);
}
