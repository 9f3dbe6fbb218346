// sampled_info_nce on the CPU: InfoNCE against listed or drawn negatives, without gathering them.
//
//   lse = log sum_s exp(scale <q, z_s>)      P_s = exp(scale <q, z_s> - lse)      O = sum_s P_s z_s
//   dq = w (O - z_p)     dz_j = sum of w P q over the pairs of j, minus w q where j is the positive
//   w = weight * scale, where weight = upstream * sigmoid(lse - s_p)
//
// Forward scores a row's negatives and keeps P, nothing else: O is never stored. Backward takes a block of anchors at a
// time, lists what each reads (candidate, P), and sorts the same pairs by candidate. Then, one slice of the features
// after another, it sums P z for each anchor into dq and w P q for each candidate into dz, from copies of the slice that
// lie side by side and stay in the second-level cache (of a pool with more rows than are read, from the pool). A sum has
// one owner and one order, the anchors': nothing is atomic, nothing depends on the number of threads. Memory: P, the
// gradients, 2 MB of pairs (4 in float64), one slice per thread, 4 bytes for each candidate and thread.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "arrays.h"
#include "levels.h"

namespace {

constexpr uint64_t LOW = 0xFFFFFFFFull;
constexpr int64_t PAIRS_AT_ONCE = 128 << 10;  // in a block of anchors in backward, listed twice: 2 MB
constexpr int64_t ROWS_AT_ONCE = 4 << 10;
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
  T* probabilities;          // (N, K, S) or null
};

template <typename T>
struct Upstream {
  const T* grad;  // (N, K), elements `stride` apart: 0 when all rows share one
  int64_t stride;
  const T *lse, *positive, *probabilities;
  T* dv;  // (N, K, D) or null
};

template <typename T>
struct Pair {
  int32_t row;
  T coefficient;
};

template <typename T>
struct Block {
  int64_t first, rows;     // anchors
  bool begun;              // dz holds sums or zeros: what nobody reads stays as it is
  T* weight;               // (rows)
  int32_t* count;          // (rows): pairs that the anchor reads, -1 if it has no gradient
  Pair<T>*reads, *adds;    // (rows, S + 1), (offsets[M])
  const int32_t* offsets;  // (M + 1)
};

template <typename T>
struct Loops {
  int64_t lanes;
  bool (*forward_rows)(const Problem<T>&, const Outputs<T>&, int64_t, int64_t);
  bool (*prepare)(const Problem<T>&, const Upstream<T>&, const Block<T>&, int64_t, int64_t, int32_t*);
  void (*place)(const Problem<T>&, const Block<T>&, int64_t, int64_t, int32_t*);
  void (*add_anchors)(const Problem<T>&, const Block<T>&, int64_t, int64_t, int64_t, T*, T*, T*);
  void (*add_candidates)(const Problem<T>&, const Block<T>&, int64_t, int64_t, int64_t, T*, T*);
};

#define LOOPS "sampled_info_nce.h"
#include "every_instruction_set.h"

const Loops<float>& loops_for(float) {
#if defined(__x86_64__)
  if (level >= AVX512) return avx512_float::loops;
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

constexpr std::string_view LEVEL_NAMES[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// Raised with every change of an op's arguments or results, here and in capabilities.py, which refuses another.
int64_t interface() { return 1; }

std::string instruction_set() { return std::string(LEVEL_NAMES[level]); }

// Whether at::parallel_for hands work to threads: without OpenMP at compile time it is a plain loop.
bool threaded() {
#ifdef INTRA_OP_PARALLEL
  return true;
#else
  return false;
#endif
}

// For tests: run the loops of a lower level than this CPU's, of both ops.
void use_instruction_set(const std::string& name) {
  const auto found = std::find(std::begin(LEVEL_NAMES), std::end(LEVEL_NAMES), name);
  TORCH_CHECK(found != std::end(LEVEL_NAMES),
              "use_instruction_set: must be baseline, avx2, avx512, avx512_bf16 or amx_bf16. Got '", name, "'.");
  const Level wanted = Level(found - std::begin(LEVEL_NAMES));
  TORCH_CHECK(wanted <= best_level(), "use_instruction_set: this CPU cannot run ", name, " instructions.");
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

void check_range(const char* what, const Tensor& indices, int64_t size) {
  if (indices.scalar_type() != at::kLong || indices.numel() == 0) return;
  const auto [low, high] = at::aminmax(indices);
  const int64_t from = low.item<int64_t>(), to = high.item<int64_t>();
  TORCH_CHECK_INDEX(from >= -1 && to < size, "sampled_info_nce: ", what, " must lie between -1 and ", size - 1,
                    " (the pool has ", size, " rows; -1 is ignored). Got values from ", from, " to ", to, ".");
}

void refuse(const Tensor& positives, const OptionalTensor& negatives, int64_t size) {
  check_range("positives", positives, size);
  if (negatives) check_range("negatives", *negatives, size);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sampled_forward(
    const Tensor& anchors, const Tensor& pool, const Tensor& positives, const OptionalTensor& negatives,
    std::optional<int64_t> seed, int64_t count, bool per_step, double scale, const OptionalTensor& anchor_ids,
    const OptionalTensor& pool_ids, bool need_probabilities, bool need_rank) {
  RECORD_USER_SCOPE("cpc_kernels/sampled_info_nce/forward");
  const int64_t n = anchors.size(0), steps = anchors.size(1), s = seed ? count : negatives->size(-1);
  const auto options = anchors.options();
  Tensor loss = at::empty({n, steps}, options), lse = at::empty({n, steps}, options);
  Tensor positive = at::empty({n, steps}, options);
  Tensor rank = need_rank ? at::empty({n, steps}, options.dtype(at::kLong)) : at::empty({0}, options.dtype(at::kLong));
  Tensor probabilities = need_probabilities ? at::empty({n, steps, s}, options) : at::empty({0}, options);
  std::atomic<bool> right{true};
  AT_DISPATCH_FLOATING_TYPES(anchors.scalar_type(), "sampled_forward", [&] {
    const auto p = describe<scalar_t>(anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids);
    const Outputs<scalar_t> out = {
        loss.data_ptr<scalar_t>(),
        lse.data_ptr<scalar_t>(),
        positive.data_ptr<scalar_t>(),
        need_rank ? rank.data_ptr<int64_t>() : nullptr,
        need_probabilities ? probabilities.data_ptr<scalar_t>() : nullptr,
    };
    const auto& loops = loops_for(scalar_t());
    at::parallel_for(0, n, grain(steps * (s + 1) * p.d), [&](int64_t begin, int64_t end) {
      if (!loops.forward_rows(p, out, begin, end)) right = false;
    });
  });
  if (!right) refuse(positives, negatives, pool.size(0));
  return {loss, lse, positive, rank, probabilities};
}

template <typename T>
bool backward(const Problem<T>& p, const Upstream<T>& up, T* dq, T* dz, bool zeroed, double* dscale) {
  const auto& loops = loops_for(T());
  const int64_t total = p.n * p.steps, width = p.s + 1, slices = (p.d + loops.lanes - 1) / loops.lanes;
  const int64_t rows = std::max<int64_t>(1, std::min({total, ROWS_AT_ONCE, PAIRS_AT_ONCE / width}));
  const int64_t threads = at::get_num_threads();
  const bool read = dq || dz || dscale;
  std::vector<T> weight(rows), each(dscale ? slices * rows : 0);
  std::vector<int32_t> count(rows), offsets(dz ? p.m + 1 : 0), next;
  const auto reads = array<Pair<T>>(read ? rows * width : 0), adds = array<Pair<T>>(dz ? rows * width : 0);
  std::atomic<bool> right{true};
  for (int64_t first = 0; first < total; first += rows) {
    const int64_t now = std::min(rows, total - first), work = now * width * p.d;
    const Block<T> b = {first, now, zeroed || first > 0, weight.data(), count.data(), read ? reads.get() : nullptr, adds.get(), offsets.data()};
    // Parts of the block, each counted and placed by one thread, if counters are fewer than pairs
    const int64_t parts = work < (1 << 16) ? 1 : std::max<int64_t>(1, std::min({threads, now, now * width / std::max<int64_t>(p.m, 1)}));
    const auto start = [&](int64_t part) { return first + now * part / parts; };
    const int64_t apart = p.m + 16;  // a line more: counters of a candidate a power of two apart would share few
    next.resize(dz ? parts * apart : 0);
    std::optional<at::RecordFunction> stage(std::in_place, at::RecordScope::USER_SCOPE);
    if (stage->isActive()) stage->before("cpc_kernels/sampled_info_nce/sort");
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++)
        if (!loops.prepare(p, up, b, start(part), start(part + 1), dz ? &next[part * apart] : nullptr)) right = false;
    });
    if (!right) return false;
    if (dz) {
      int32_t sum = 0;
      for (int64_t j = 0; j < p.m; j++) {
        offsets[j] = sum;
        for (int64_t part = 0; part < parts; part++) {
          const int32_t here = next[part * apart + j];
          next[part * apart + j] = sum;
          sum += here;
        }
      }
      offsets[p.m] = sum;
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; part++) loops.place(p, b, start(part), start(part + 1), &next[part * apart]);
      });
    }
    stage.reset();
    if (!read) continue;
    RECORD_USER_SCOPE("cpc_kernels/sampled_info_nce/sums");
    // A task: one slice of the features, and a share of the anchors and of the candidates where slices are few
    const int64_t shares = work < (1 << 16) ? 1 : (threads + slices - 1) / std::max<int64_t>(slices, 1);
    const bool packs = (dq || dscale) && now * p.s > p.m * shares;  // the pool, if a row is read more than once
    at::parallel_for(0, slices * shares, work < (1 << 16) ? slices * shares : 1, [&](int64_t begin, int64_t end) {
      const auto buffer = array<T>(std::max(packs ? p.m : 0, dz ? now : 0) * loops.lanes);
      for (int64_t task = begin; task < end; task++) {
        const int64_t slice = task / shares, share = task % shares, i = slice * loops.lanes;
        if (dq || dscale)
          loops.add_anchors(p, b, i, now * share / shares, now * (share + 1) / shares, dq,
                            dscale ? &each[slice * rows] : nullptr, packs ? buffer.get() : nullptr);
        if (dz) loops.add_candidates(p, b, i, p.m * share / shares, p.m * (share + 1) / shares, dz, buffer.get());
      }
    });
    if (dscale)
      for (int64_t slice = 0; slice < slices; slice++)
        for (int64_t r = 0; r < now; r++) *dscale += each[slice * rows + r];
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_backward(
    const Tensor& anchors, const Tensor& pool, const Tensor& positives, const OptionalTensor& negatives,
    std::optional<int64_t> seed, int64_t count, bool per_step, double scale, const OptionalTensor& anchor_ids,
    const OptionalTensor& pool_ids, const Tensor& grad_, const Tensor& lse, const Tensor& positive,
    const Tensor& probabilities, bool need_anchors, bool need_pool, bool need_positives, bool need_scale) {
  RECORD_USER_SCOPE("cpc_kernels/sampled_info_nce/backward");
  const auto options = anchors.options();
  const bool shared = grad_.numel() > 0 && grad_.stride(0) == 0 && grad_.stride(1) == 0;  // from a sum or a mean
  const Tensor grad = shared ? grad_ : grad_.contiguous();
  Tensor dq = at::empty(need_anchors ? anchors.sizes() : at::IntArrayRef{0}, options);
  Tensor dz = at::empty(need_pool ? pool.sizes() : at::IntArrayRef{0}, options);
  const bool zeroed = lse.numel() * (probabilities.size(-1) + 1) < pool.size(0);  // few of its rows are read
  if (zeroed || lse.numel() == 0) dz.zero_();
  Tensor dv = at::empty(need_positives ? anchors.sizes() : at::IntArrayRef{0}, options);
  Tensor dscale = at::zeros({need_scale ? 1 : 0}, options);
  bool right = true;
  AT_DISPATCH_FLOATING_TYPES(anchors.scalar_type(), "sampled_backward", [&] {
    const auto p = describe<scalar_t>(anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids);
    const Upstream<scalar_t> up = {
        grad.const_data_ptr<scalar_t>(),
        shared ? 0 : 1,
        lse.const_data_ptr<scalar_t>(),
        positive.const_data_ptr<scalar_t>(),
        probabilities.const_data_ptr<scalar_t>(),
        need_positives ? dv.data_ptr<scalar_t>() : nullptr,
    };
    double sum = 0;
    right = backward(p, up, need_anchors ? dq.data_ptr<scalar_t>() : nullptr,
                     need_pool ? dz.data_ptr<scalar_t>() : nullptr, zeroed, need_scale ? &sum : nullptr);
    if (need_scale) dscale.data_ptr<scalar_t>()[0] = scalar_t(sum);
  });
  if (!right) refuse(positives, negatives, pool.size(0));
  return {dq, dz, dv, dscale};
}

// --- the op with its gradients, in eager mode: no Python between them -------------------------------------------------

struct Options {
  int64_t count;
  bool per_step;
  double scale;  // where no tensor holds it
  int64_t reduction;
};

enum Reduction { NONE, SUM, MEAN };

// Gradients leave through this when a graph of them is asked for: a second derivative is an error, not a wrong number.
struct Once : torch::autograd::Function<Once> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, at::TensorList grads, at::TensorList) {
    torch::autograd::variable_list out;
    for (const Tensor& grad : grads) out.push_back(grad.view_as(grad));
    return out;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
    TORCH_CHECK(false, "sampled_info_nce: second derivatives are not implemented by this implementation; "
                "impl=\"reference\" has them.");
  }
};

// In double, in one order whatever the number of threads; eight sums, as one would wait for itself.
double add_up(const Tensor& loss) {
  double part[8] = {};
  AT_DISPATCH_FLOATING_TYPES(loss.scalar_type(), "sampled_loss", [&] {
    const scalar_t* x = loss.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < loss.numel(); i++) part[i % 8] += double(x[i]);
  });
  for (int h = 4; h > 0; h /= 2)
    for (int i = 0; i < h; i++) part[i] += part[i + h];
  return part[0];
}

struct Differentiable : torch::autograd::Function<Differentiable> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& anchors, const Tensor& pool,
                        const Tensor& positives, const OptionalTensor& scale, const OptionalTensor& negatives,
                        const std::optional<int64_t>& seed, const OptionalTensor& anchor_ids,
                        const OptionalTensor& pool_ids, const Options& options, bool learning) {
    const auto dtype = anchors.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto compute = [&](const Tensor& t) { return (t.is_floating_point() ? t.to(dtype) : t).contiguous(); };
    const auto whole = [](const OptionalTensor& t) { return t ? OptionalTensor(t->to(at::kLong).contiguous()) : t; };
    const bool flat = anchors.dim() == 2;
    const auto steps = [&](const Tensor& t) { return flat ? t.unsqueeze(1) : t; };
    const Tensor q = compute(steps(anchors)), z = compute(pool);
    const Tensor p = positives.is_floating_point() ? compute(steps(positives)) : *whole(steps(positives));
    const OptionalTensor listed = whole(negatives), a = whole(anchor_ids), c = whole(pool_ids);
    const double factor = scale ? scale->item<double>() : options.scale;
    auto [loss, lse, positive, rank, probabilities] =
        sampled_forward(q, z, p, listed, seed, options.count, options.per_step, factor, a, c, learning, false);
    int64_t rows = std::max<int64_t>(loss.numel(), 1);
    if (options.reduction == MEAN && !p.is_floating_point()) {
      const int64_t* index = p.const_data_ptr<int64_t>();
      rows = std::max<int64_t>(std::count_if(index, index + p.numel(), [](int64_t i) { return i >= 0; }), 1);
    }
    if (learning) {
      const auto kept = [](const OptionalTensor& t) { return t ? *t : Tensor(); };
      ctx->save_for_backward({anchors, pool, positives, kept(scale), kept(listed), kept(a), kept(c), lse, positive, probabilities});
      ctx->set_materialize_grads(false);
      auto& saved = ctx->saved_data;
      if (seed) saved["seed"] = *seed;
      saved["count"] = options.count;
      saved["per_step"] = options.per_step;
      saved["scale"] = factor;
      saved["rows"] = options.reduction == MEAN ? rows : 1;
    }
    if (options.reduction == NONE) return flat ? loss.squeeze_(1) : loss;  // a view could not be changed in place
    return at::scalar_tensor(add_up(loss) / (options.reduction == MEAN ? double(rows) : 1.0), loss.options());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list upstream) {
    torch::autograd::variable_list grads(10);
    Tensor grad = upstream[0];
    if (!grad.defined()) return grads;
    const auto kept = ctx->get_saved_variables();  // once: checkpointing allows no more
    const Tensor &anchors = kept[0], &pool = kept[1], &positives = kept[2], &scale = kept[3];
    const bool need[4] = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                          scale.defined() && ctx->needs_input_grad(3)};
    {
      const at::AutoGradMode off(false);
      const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
      const auto& saved = ctx->saved_data;
      const auto dtype = kept[7].scalar_type();
      const auto compute = [&](const Tensor& t) { return (t.is_floating_point() ? t.to(dtype) : t.to(at::kLong)).contiguous(); };
      const bool flat = anchors.dim() == 2;
      const auto steps = [&](const Tensor& t) { return flat ? t.unsqueeze(1) : t; };
      const Tensor& lse = kept[7];
      if (grad.dim() == 0) {
        const int64_t rows = saved.at("rows").toInt();
        grad = (rows == 1 ? grad : grad.div(double(rows))).expand(lse.sizes());
      }
      std::optional<int64_t> seed;
      if (saved.count("seed")) seed = saved.at("seed").toInt();
      // Through the dispatcher, which takes a batch of upstream gradients (is_grads_batched) apart
      static const auto registered = c10::Dispatcher::singleton()
          .findSchemaOrThrow("cpc_kernels_cpu::sampled_backward", "").typed<decltype(sampled_backward)>();
      auto [dq, dz, dv, dscale] = registered.call(
          compute(steps(anchors)), compute(pool), compute(steps(positives)), optional(kept[4]), seed,
          saved.at("count").toInt(), saved.at("per_step").toBool(), saved.at("scale").toDouble(), optional(kept[5]),
          optional(kept[6]), grad.view(lse.sizes()), lse, kept[8], kept[9], need[0], need[1], need[2], need[3]);
      const Tensor each[4] = {dq, dz, dv, dscale};
      for (int i = 0; i < 4; i++)
        if (need[i]) grads[i] = each[i].to(kept[i].scalar_type()).view(kept[i].sizes());
    }
    if (at::GradMode::is_enabled()) {
      torch::autograd::variable_list asked, of = {upstream[0], anchors, pool};
      for (const Tensor& t : {positives, scale})
        if (t.defined() && t.is_floating_point()) of.push_back(t);
      for (const Tensor& t : grads)
        if (t.defined()) asked.push_back(t);
      asked = Once::apply(at::TensorList(asked), at::TensorList(of));
      auto next = asked.begin();
      for (Tensor& t : grads)
        if (t.defined()) t = *next++;
    }
    return grads;
  }
};

Tensor sampled_loss(const Tensor& anchors, const Tensor& pool, const Tensor& positives, const OptionalTensor& scale_tensor,
                    double scale, const OptionalTensor& negatives, std::optional<int64_t> seed, int64_t count, bool per_step,
                    const OptionalTensor& anchor_ids, const OptionalTensor& pool_ids, int64_t reduction) {
  const bool learning = at::GradMode::is_enabled() && (anchors.requires_grad() || pool.requires_grad() ||
                        positives.requires_grad() || (scale_tensor && scale_tensor->requires_grad()));
  const Options options = {count, per_step, scale, reduction};
  if (learning)
    return Differentiable::apply(anchors, pool, positives, scale_tensor, negatives, seed, anchor_ids, pool_ids, options, true);
  const at::AutoGradMode off(false);
  return Differentiable::forward(nullptr, anchors, pool, positives, scale_tensor, negatives, seed, anchor_ids, pool_ids, options, false);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cpc_kernels_cpu, m) {
  m.def("interface", &interface);
  m.def("instruction_set", &instruction_set);
  m.def("threaded", &threaded);
  m.def("use_instruction_set", &use_instruction_set);
  m.def("sampled_forward", &sampled_forward);
  m.def("sampled_backward", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(sampled_backward)));
  m.def("sampled_loss", &sampled_loss);
}
