// The patch encoder on CPUs with bfloat16 products: a ResNet-18 v2 up to its third stage, forward and backward.
//
//   h = stem(x)      h = shortcut(h) + conv2(relu(norm2(conv1(relu(norm1(h))))))  six times      latent = mean relu(h)
//
// A few patches at a time go through the whole network in the second-level cache; what backward needs (h and the output
// of conv1 of every block) is all that goes to memory. Maps are bfloat16, pixels in rows and the channels of a pixel
// side by side, with a border of zeros where a 3 x 3 convolution reads them; sums are float32. Products are taken two
// at a time (vdpbf16ps): of neighbouring channels in a convolution, of neighbouring pixels in a weight's gradient.
//
// A weight's gradient is summed over chunks of the patches, whose number depends on that of the patches alone, so
// nothing depends on the number of threads, and a latent on its own patch alone.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>
#define CAN_COMPILE 1
#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace {

using at::Tensor;

bool encoder_runs_here() {
#if CAN_COMPILE
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if CAN_COMPILE

using bf16 = uint16_t;
constexpr int64_t LANES = 16;

// --- loops ----------------------------------------------------------------------------------------------------------

FAST inline __m512 load(const bf16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

FAST inline void store(bf16* to, __m512 v) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(v)); }

FAST inline bf16 round_one(float v) { return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(v)), 0); }

struct Taps {
  int64_t count;
  int64_t at[9];      // where each reads, in elements from the pixel
  int64_t weight[9];  // which of the weights it takes
};

// RY x RX neighbouring pixels of the output, NV x 16 channels of it. Pixels of the input lie `PIXEL` elements apart.
template <int NV, int RX, int RY, int PIXEL>
FAST void convolve_tile(const bf16* in, int64_t in_row, const Taps& taps, const bf16* weights, int64_t tap_size,
                        int64_t pairs, const float* bias, const bf16* add, bf16* out, int64_t out_row, int64_t out_pixel) {
  __m512 sums[RY][RX][NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; v++) {
    const __m512 start = bias ? _mm512_loadu_ps(bias + v * LANES) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int y = 0; y < RY; y++)
#pragma GCC unroll 8
      for (int x = 0; x < RX; x++) sums[y][x][v] = start;
  }
  for (int64_t t = 0; t < taps.count; t++) {
    const bf16* from = in + taps.at[t];
    const bf16* weight = weights + taps.weight[t] * tap_size;
    for (int64_t pair = 0; pair < pairs; pair++, from += 2, weight += NV * 2 * LANES) {
      __m512bh w[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) w[v] = (__m512bh)_mm512_loadu_si512(weight + v * 2 * LANES);
#pragma GCC unroll 8
      for (int y = 0; y < RY; y++)
#pragma GCC unroll 8
        for (int x = 0; x < RX; x++) {
          int32_t both;
          std::memcpy(&both, from + y * in_row + x * PIXEL, 4);
          const __m512bh pixel = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
          for (int v = 0; v < NV; v++) sums[y][x][v] = _mm512_dpbf16_ps(sums[y][x][v], pixel, w[v]);
        }
    }
  }
#pragma GCC unroll 8
  for (int y = 0; y < RY; y++)
#pragma GCC unroll 8
    for (int x = 0; x < RX; x++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) {
        const int64_t place = y * out_row + x * out_pixel + v * LANES;
        store(out + place, add ? _mm512_add_ps(sums[y][x][v], load(add + place)) : sums[y][x][v]);
      }
}

struct Tile {
  void (*run)(const bf16*, int64_t, const Taps&, const bf16*, int64_t, int64_t, const float*, const bf16*, bf16*, int64_t,
              int64_t);
  int64_t height, width, channels;
};

template <int NV, int RX, int RY>
Tile tile_of(int64_t pixel) {
  switch (pixel) {
    case 16: return {convolve_tile<NV, RX, RY, 16>, RY, RX, NV * LANES};
    case 32: return {convolve_tile<NV, RX, RY, 32>, RY, RX, NV * LANES};
    case 64: return {convolve_tile<NV, RX, RY, 64>, RY, RX, NV * LANES};
    case 128: return {convolve_tile<NV, RX, RY, 128>, RY, RX, NV * LANES};
    case 256: return {convolve_tile<NV, RX, RY, 256>, RY, RX, NV * LANES};
    case 512: return {convolve_tile<NV, RX, RY, 512>, RY, RX, NV * LANES};
    default: TORCH_CHECK(false, "patch encoder: no loop for pixels ", pixel, " elements apart");
  }
}

// For a map of side x side pixels.
Tile choose_tile(int64_t side, int64_t channels, int64_t pixel) {
  const bool two = channels % (2 * LANES) == 0;
  if (side % 8 == 0) return two ? tile_of<2, 8, 1>(pixel) : tile_of<1, 8, 2>(pixel);
  if (side % 4 == 0) return two ? tile_of<2, 4, 2>(pixel) : tile_of<1, 4, 4>(pixel);
  return two ? tile_of<2, 2, 2>(pixel) : tile_of<1, 2, 2>(pixel);
}

int64_t weight_block(int64_t channels) { return channels % (2 * LANES) == 0 ? 2 * LANES : LANES; }

struct View {
  bf16* at;
  int64_t patch, row, pixel;  // elements from one to the next
};

// out = bias + add + in * weights for `patches` maps of side x side pixels; in.pixel and in.row are steps between the
// pixels that neighbouring pixels of the output read.
void convolve(const View& in, const Taps& taps, int64_t inputs, const bf16* weights, int64_t all_taps, const float* bias,
              const bf16* add, const View& out, int64_t outputs, int64_t side, int64_t patches) {
  const Tile tile = choose_tile(side, outputs, in.pixel);
  const int64_t pairs = inputs / 2, tap_size = inputs * tile.channels;
  for (int64_t c = 0; c < outputs; c += tile.channels, weights += all_taps * tap_size)
    for (int64_t i = 0; i < patches; i++)
      for (int64_t y = 0; y < side; y += tile.height)
        for (int64_t x = 0; x < side; x += tile.width) {
          const int64_t place = i * out.patch + y * out.row + x * out.pixel + c;
          tile.run(in.at + i * in.patch + y * in.row + x * in.pixel, in.row, taps, weights, tap_size, pairs,
                   bias ? bias + c : nullptr, add ? add + place : nullptr, out.at + place, out.row, out.pixel);
        }
}

// Each pixel beside the one `step` pixels on, channel by channel: what two rows of a product over pixels look like.
FAST void pair_up(const bf16* map, int64_t rows, int64_t row_pixels, int64_t channels, int64_t step, int64_t every,
                  int64_t row, uint32_t* out, int64_t out_row) {
  for (int64_t y = 0; y < rows; y++) {
    uint32_t* to = out + y * out_row;
    for (int64_t x = 0; x + step < row_pixels; x += every, to += channels)
      for (int64_t c = 0; c < channels; c += LANES) {
        const bf16* from = map + y * row + x * channels + c;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + step * channels)));
        _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
  }
}

// grad (inputs, outputs) of one tap, a block of it: += sum over pixels of in^T out.
template <int NV, int IN>
FAST void weigh_tile(const uint32_t* in, int64_t in_patch, int64_t in_row, int64_t in_pair, const uint32_t* out,
                     int64_t outputs, int64_t side, int64_t patches, float* grad) {
  __m512 sums[IN][NV];
#pragma GCC unroll 16
  for (int i = 0; i < IN; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) sums[i][v] = _mm512_loadu_ps(grad + i * outputs + v * LANES);
  for (int64_t p = 0; p < patches; p++)
    for (int64_t y = 0; y < side; y++) {
      const uint32_t* from = in + p * in_patch + y * in_row;
      for (int64_t x = 0; x < side; x += 2, from += in_pair, out += outputs) {
        __m512bh o[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) o[v] = (__m512bh)_mm512_loadu_si512(out + v * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < IN; i++) {
          const __m512bh both = (__m512bh)_mm512_set1_epi32((int32_t)from[i]);
#pragma GCC unroll 8
          for (int v = 0; v < NV; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], both, o[v]);
        }
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < IN; i++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(grad + i * outputs + v * LANES, sums[i][v]);
}

// grad (taps, inputs, outputs) += for each tap the product over pixels of what it reads and the gradient of the output.
void weigh(const uint32_t* in, int64_t in_patch, int64_t in_row, int64_t in_pair, const Taps& taps, int64_t inputs,
           const uint32_t* out, int64_t outputs, int64_t side, int64_t patches, float* grad) {
  const bool two = outputs % (2 * LANES) == 0;
  for (int64_t t = 0; t < taps.count; t++)
    for (int64_t i = 0; i < inputs; i += two ? 8 : 16)
      for (int64_t c = 0; c < outputs; c += two ? 2 * LANES : LANES)
        (two ? weigh_tile<2, 8> : weigh_tile<1, 16>)(in + taps.at[t] + i, in_patch, in_row, in_pair, out + c, outputs, side,
                                                     patches, grad + (taps.weight[t] * inputs + i) * outputs + c);
}

// relu(norm(x)) of one patch; norm over groups of 16 channels, whose mean and 1 / spread are written to stats, or none.
FAST void activate(const bf16* x, int64_t side, int64_t channels, const float* gain, const float* offset, float eps,
                   float* stats, bf16* out, int64_t out_row) {
  const int64_t pixels = side * side;
  const __m512 zero = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += LANES) {
    __m512 scale = _mm512_set1_ps(1), shift = zero;
    if (gain) {
      __m512 sum = zero, square = zero;
      for (int64_t i = 0; i < pixels; i++) sum = _mm512_add_ps(sum, load(x + i * channels + c));
      const float mean = _mm512_reduce_add_ps(sum) / float(pixels * LANES);
      const __m512 center = _mm512_set1_ps(mean);
      for (int64_t i = 0; i < pixels; i++) {
        const __m512 d = _mm512_sub_ps(load(x + i * channels + c), center);
        square = _mm512_fmadd_ps(d, d, square);
      }
      const float rate = 1 / std::sqrt(_mm512_reduce_add_ps(square) / float(pixels * LANES) + eps);
      stats[c / LANES * 2] = mean;
      stats[c / LANES * 2 + 1] = rate;
      scale = _mm512_mul_ps(_mm512_loadu_ps(gain + c), _mm512_set1_ps(rate));
      shift = _mm512_fnmadd_ps(center, scale, _mm512_loadu_ps(offset + c));
    }
    const bf16* from = x + c;
    for (int64_t y = 0; y < side; y++)
      for (int64_t i = 0; i < side; i++, from += channels)
        store(out + y * out_row + i * channels + c, _mm512_max_ps(zero, _mm512_fmadd_ps(load(from), scale, shift)));
  }
}

// The same from the stats that are known.
FAST void activate_again(const bf16* x, int64_t side, int64_t channels, const float* gain, const float* offset,
                         const float* stats, bf16* out, int64_t out_row) {
  const __m512 zero = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += LANES) {
    __m512 scale = _mm512_set1_ps(1), shift = zero;
    if (gain) {
      scale = _mm512_mul_ps(_mm512_loadu_ps(gain + c), _mm512_set1_ps(stats[c / LANES * 2 + 1]));
      shift = _mm512_fnmadd_ps(_mm512_set1_ps(stats[c / LANES * 2]), scale, _mm512_loadu_ps(offset + c));
    }
    const bf16* from = x + c;
    for (int64_t y = 0; y < side; y++)
      for (int64_t i = 0; i < side; i++, from += channels)
        store(out + y * out_row + i * channels + c, _mm512_max_ps(zero, _mm512_fmadd_ps(load(from), scale, shift)));
  }
}

// out = add + the gradient of x, from that of relu(norm(x)); the gradients of gain and offset are added to theirs.
FAST void activate_backward(const bf16* x, int64_t side, int64_t channels, const float* gain, const float* offset,
                            const float* stats, const bf16* grad, const bf16* add, int64_t add_row, bf16* out,
                            int64_t out_row, float* gain_grad, float* offset_grad) {
  const int64_t pixels = side * side;
  const __m512 zero = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += LANES) {
    __m512 rate = _mm512_set1_ps(1), center = zero, g = rate, o = zero, scale = rate, shift = zero, one = zero, two = zero;
    if (gain) {
      center = _mm512_set1_ps(stats[c / LANES * 2]);
      rate = _mm512_set1_ps(stats[c / LANES * 2 + 1]);
      g = _mm512_loadu_ps(gain + c), o = _mm512_loadu_ps(offset + c);
      scale = _mm512_mul_ps(g, rate), shift = _mm512_fnmadd_ps(center, scale, o);
      __m512 sum = zero, dot = zero;
      for (int64_t i = 0; i < pixels; i++) {
        const __m512 v = load(x + i * channels + c);
        const __mmask16 alive = _mm512_cmp_ps_mask(_mm512_fmadd_ps(v, scale, shift), zero, _CMP_GT_OQ);
        const __m512 d = _mm512_maskz_mov_ps(alive, load(grad + i * channels + c));
        sum = _mm512_add_ps(sum, d);
        dot = _mm512_fmadd_ps(d, _mm512_sub_ps(v, center), dot);
      }
      dot = _mm512_mul_ps(dot, rate);
      _mm512_storeu_ps(gain_grad + c, _mm512_add_ps(_mm512_loadu_ps(gain_grad + c), dot));
      _mm512_storeu_ps(offset_grad + c, _mm512_add_ps(_mm512_loadu_ps(offset_grad + c), sum));
      const float count = float(pixels * LANES);
      one = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_mul_ps(sum, g)) / count);
      two = _mm512_mul_ps(rate, _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_mul_ps(dot, g)) / count));
    }
    // dx = rate (g d - one - (x - center) rate two)
    const __m512 slope = _mm512_mul_ps(rate, two), level = _mm512_fmsub_ps(center, slope, _mm512_mul_ps(rate, one));
    const bf16 *from = x + c, *of = grad + c;
    for (int64_t y = 0; y < side; y++)
      for (int64_t i = 0; i < side; i++, from += channels, of += channels) {
        const __m512 v = load(from);
        const __mmask16 alive = _mm512_cmp_ps_mask(_mm512_fmadd_ps(v, scale, shift), zero, _CMP_GT_OQ);
        __m512 d = _mm512_maskz_mul_ps(alive, load(of), scale);
        if (gain) d = _mm512_add_ps(d, _mm512_fnmadd_ps(v, slope, level));
        if (add) d = _mm512_add_ps(d, load(add + y * add_row + i * channels + c));
        store(out + y * out_row + i * channels + c, d);
      }
  }
}

FAST void add_pixels(const bf16* map, int64_t side, int64_t channels, int64_t row, float* sums) {
  for (int64_t c = 0; c < channels; c += LANES) {
    __m512 sum = _mm512_loadu_ps(sums + c);
    for (int64_t y = 0; y < side; y++)
      for (int64_t x = 0; x < side; x++) sum = _mm512_add_ps(sum, load(map + y * row + x * channels + c));
    _mm512_storeu_ps(sums + c, sum);
  }
}

FAST void pool(const bf16* map, int64_t pixels, int64_t channels, bf16* out) {
  const __m512 zero = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += LANES) {
    __m512 sum = zero;
    for (int64_t i = 0; i < pixels; i++) sum = _mm512_add_ps(sum, _mm512_max_ps(zero, load(map + i * channels + c)));
    store(out + c, _mm512_mul_ps(sum, _mm512_set1_ps(1 / float(pixels))));
  }
}

FAST void pool_backward(const bf16* map, int64_t side, int64_t channels, const bf16* grad, bf16* out, int64_t row) {
  const __m512 zero = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += LANES) {
    const __m512 d = _mm512_mul_ps(load(grad + c), _mm512_set1_ps(1 / float(side * side)));
    for (int64_t y = 0; y < side; y++)
      for (int64_t x = 0; x < side; x++) {
        const __mmask16 alive = _mm512_cmp_ps_mask(load(map + (y * side + x) * channels + c), zero, _CMP_GT_OQ);
        store(out + y * row + x * channels + c, _mm512_maskz_mov_ps(alive, d));
      }
  }
}

FAST void round_row(const float* from, int64_t count, bf16* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, _mm512_loadu_ps(from + i));
  for (; i < count; i++) to[i] = round_one(from[i]);
}

FAST void pack(const float* weights, int64_t outputs, int64_t inputs, int64_t taps, int64_t out_step, int64_t in_step,
               int64_t tap_step, bf16* to) {  // -> (outputs / block, taps, inputs / 2, block, 2)
  const int64_t block = weight_block(outputs);
  for (int64_t o = 0; o < outputs; o += block)
    for (int64_t t = 0; t < taps; t++)
      for (int64_t i = 0; i < inputs; i += 2)
        for (int64_t c = 0; c < block; c++)
          for (int64_t half = 0; half < 2; half++)
            *to++ = round_one(weights[(o + c) * out_step + (i + half) * in_step + t * tap_step]);
}

// --- the network ----------------------------------------------------------------------------------------------------

struct Conv {
  int64_t inputs, outputs, kernel, stride, side;  // side of its output
  int64_t weight, bias;                           // where among the parameters; bias may be -1
  int64_t taps() const { return kernel * kernel; }
};

struct Block {
  int64_t norm1, norm2;  // where their gains are among the parameters, or -1
  Conv conv1, conv2, shortcut;
  bool straight;     // no convolution in the shortcut
  int64_t stage_in, stage, side_in;
  int64_t middle, out;  // where their maps are among what is saved of a patch
  int64_t stats1, stats2;
};

struct Net {
  int64_t channels, size, stem, kernel, line, columns, pixel;  // of the stem: elements a line of the kernel, of all, apart
  int64_t width, side;
  float eps;
  std::vector<Block> blocks;
  int64_t saved = 0, stats = 0;  // elements for a patch
  std::vector<Tensor> values;    // parameters, float32, contiguous
  std::vector<int64_t> grads;    // where the gradient of each is in a chunk
  int64_t grad_size = 0;

  const float* at(int64_t i) const { return i < 0 ? nullptr : values[i].data_ptr<float>(); }
  int64_t side_of(int64_t stage) const { return side >> stage; }
  int64_t width_of(int64_t stage) const { return width << stage; }
  int64_t row_of(int64_t stage) const { return (side_of(stage) + 2) * width_of(stage); }  // of a map with its border
  int64_t padded(int64_t stage) const { return row_of(stage) * (side_of(stage) + 2); }
  int64_t inside(int64_t stage) const { return row_of(stage) + width_of(stage); }         // its first pixel
  int64_t flat(int64_t stage) const { return side_of(stage) * side_of(stage) * width_of(stage); }
};

Net make_net(const Tensor& patches, at::TensorList parameters, int64_t stem, bool norm, double eps) {
  Net net;
  net.channels = patches.size(3), net.size = patches.size(4), net.stem = stem, net.eps = float(eps);
  net.width = parameters[0].size(0), net.kernel = parameters[0].size(2), net.side = net.size / stem;
  net.line = net.kernel <= 8 ? 8 : 16;
  net.columns = net.channels * net.kernel * net.line;
  for (net.pixel = LANES; net.pixel < net.columns;) net.pixel *= 2;
  TORCH_CHECK(net.size % stem == 0 && net.side % 8 == 0 && net.pixel <= 512 && (net.width == 16 || net.width == 32 || net.width == 64),
              "patch encoder: no loops for patches ", patches.sizes(), " and ", net.width, " channels");
  for (const Tensor& p : parameters) {
    net.values.push_back(p.detach().to(at::kFloat).contiguous());
    net.grads.push_back(net.grad_size);
    net.grad_size += net.values.size() == 1 ? net.pixel * net.width : (p.numel() + LANES - 1) / LANES * LANES;
  }
  int64_t next = 2;
  net.saved = net.flat(0);
  for (int64_t i = 0; i < 6; i++) {
    Block b;
    b.stage = i / 2, b.stage_in = std::max<int64_t>(i - 1, 0) / 2;
    const int64_t stride = b.stage == b.stage_in ? 1 : 2, in = net.width_of(b.stage_in), out = net.width_of(b.stage);
    const int64_t side = net.side_of(b.stage);
    b.side_in = net.side_of(b.stage_in);
    const auto take = [&](int64_t count) { next += count; return next - count; };
    b.norm1 = norm ? take(2) : -1;
    b.conv1 = {in, out, 3, stride, side, take(1), -1};
    if (!norm) b.conv1.bias = take(1);
    b.norm2 = norm ? take(2) : -1;
    b.conv2 = {out, out, 3, 1, side, take(1), -1};
    if (!norm) b.conv2.bias = take(1);
    b.straight = stride == 1;
    if (!b.straight) b.shortcut = {in, out, 1, stride, side, take(1), -1};
    b.middle = net.saved, b.out = b.middle + net.flat(b.stage);
    net.saved = b.out + net.flat(b.stage);
    b.stats1 = net.stats, b.stats2 = b.stats1 + in / LANES * 2;
    net.stats = b.stats2 + out / LANES * 2;
    net.blocks.push_back(b);
  }
  TORCH_CHECK(next == (int64_t)parameters.size(), "patch encoder: expected ", next, " parameters, got ", parameters.size());
  return net;
}

// Weights as the loops read them.
struct Packed {
  std::vector<bf16> forward, backward;
  std::vector<int64_t> forward_at, backward_at;
};

Packed pack_all(const Net& net, bool backward) {
  Packed packed;
  packed.forward_at.resize(net.values.size());
  packed.backward_at.resize(net.values.size());
  int64_t total = 0;
  std::vector<const Conv*> convs;
  for (const Block& b : net.blocks) {
    convs.push_back(&b.conv1), convs.push_back(&b.conv2);
    if (!b.straight) convs.push_back(&b.shortcut);
  }
  for (const Conv* c : convs) packed.forward_at[c->weight] = packed.backward_at[c->weight] = total, total += net.values[c->weight].numel();
  packed.forward_at[0] = total;
  (backward ? packed.backward : packed.forward).resize(total + net.width * net.pixel);
  at::parallel_for(0, convs.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Conv& c = *convs[i];
      const int64_t out_step = c.inputs * c.taps(), in_step = c.taps();
      if (backward)
        pack(net.at(c.weight), c.inputs, c.outputs, c.taps(), in_step, out_step, 1, packed.backward.data() + packed.backward_at[c.weight]);
      else
        pack(net.at(c.weight), c.outputs, c.inputs, c.taps(), out_step, in_step, 1, packed.forward.data() + packed.forward_at[c.weight]);
    }
  });
  if (!backward) {  // the stem's, each line of its kernel padded with zeros
    std::vector<float> wide(net.width * net.pixel, 0);
    const float* weight = net.at(0);
    for (int64_t o = 0; o < net.width; o++)
      for (int64_t l = 0; l < net.channels * net.kernel; l++)
        for (int64_t x = 0; x < net.kernel; x++)
          wide[o * net.pixel + l * net.line + x] = weight[(o * net.channels * net.kernel + l) * net.kernel + x];
    pack(wide.data(), net.width, net.columns, 1, net.pixel, 1, 0, packed.forward.data() + total);
  }
  return packed;
}

// What a thread works in.
struct Desk {
  std::unique_ptr<bf16[]> memory;
  bf16 *active[3], *grad[3], *inner[3], *flat, *skip[3], *lines, *columns;
  std::unique_ptr<uint32_t[]> pairs;
  uint32_t *in_pairs, *out_pairs;
  int64_t padded_side;

  Desk(const Net& net, int64_t patches, bool backward) {
    padded_side = net.size + net.kernel - 1;
    const int64_t line_row = padded_side + net.line, line_size = net.channels * padded_side * line_row;
    const int64_t column_size = net.side * net.side * net.pixel;
    int64_t total = line_size + patches * column_size;
    for (int64_t s = 0; s < 3; s++) total += patches * (net.padded(s) * (backward ? 3 : 1) + (backward ? net.flat(s) : 0));
    if (backward) total += patches * net.flat(0);
    memory.reset(new bf16[total + 64]());
    bf16* next = memory.get();
    const auto take = [&](int64_t count) { next += count; return next - count; };
    lines = take(line_size), columns = take(patches * column_size);
    for (int64_t s = 0; s < 3; s++) {
      active[s] = take(patches * net.padded(s));
      if (!backward) continue;
      grad[s] = take(patches * net.padded(s)), inner[s] = take(patches * net.padded(s));
      skip[s] = take(patches * net.flat(s));
    }
    if (!backward) return;
    flat = take(patches * net.flat(0));
    const int64_t most = std::max(net.padded(0), column_size);
    pairs.reset(new uint32_t[patches * (most + net.flat(0) / 2)]());
    in_pairs = pairs.get(), out_pairs = in_pairs + patches * most;
  }
};

// The pixels that the stem sums, side by side for each pixel of its output.
void spread_stem(const Net& net, const Tensor& patches, int64_t first, int64_t count, Desk& desk) {
  const int64_t row = desk.padded_side + net.line, border = net.kernel / 2;
  for (int64_t i = 0; i < count; i++) {
    const int64_t column = (first + i) % patches.size(2), line = (first + i) / patches.size(2);
    const float* patch = patches.data_ptr<float>() + column * patches.stride(2) + line % patches.size(1) * patches.stride(1) +
                         line / patches.size(1) * patches.stride(0);
    for (int64_t c = 0; c < net.channels; c++)
      for (int64_t y = 0; y < net.size; y++)
        round_row(patch + c * patches.stride(3) + y * patches.stride(4), net.size,
                  desk.lines + (c * desk.padded_side + y + border) * row + border);
    bf16* to = desk.columns + i * net.side * net.side * net.pixel;
    for (int64_t y = 0; y < net.side; y++)
      for (int64_t x = 0; x < net.side; x++, to += net.pixel)
        for (int64_t c = 0; c < net.channels; c++)
          for (int64_t l = 0; l < net.kernel; l++)
            std::memcpy(to + (c * net.kernel + l) * net.line,
                        desk.lines + (c * desk.padded_side + y * net.stem + l) * row + x * net.stem, 2 * net.line);
  }
}

Taps one_tap() { return {1, {0}, {0}}; }

Taps square_taps(int64_t row, int64_t pixel) {
  Taps taps{9, {}, {}};
  for (int64_t t = 0; t < 9; t++) taps.at[t] = t / 3 * row + t % 3 * pixel, taps.weight[t] = t;
  return taps;
}

void forward_patches(const Net& net, const Packed& packed, const Tensor& patches, int64_t first, int64_t count, Desk& desk,
                     bf16* maps, float* stats, bf16* latents) {
  spread_stem(net, patches, first, count, desk);
  const int64_t w = net.width, side = net.side;
  convolve({desk.columns, side * side * net.pixel, side * net.pixel, net.pixel}, one_tap(), net.columns,
           packed.forward.data() + packed.forward_at[0], 1, net.at(1), nullptr, {maps, net.saved, side * w, w}, w, side, count);
  int64_t h = 0;  // where the block's input is
  for (const Block& b : net.blocks) {
    const int64_t in = b.conv1.inputs, out = b.conv1.outputs, n = b.conv1.side;
    const auto active = [&](int64_t norm, int64_t stage, int64_t map, int64_t stat) {
      for (int64_t i = 0; i < count; i++)
        activate(maps + i * net.saved + map, net.side_of(stage), net.width_of(stage), net.at(norm),
                 norm < 0 ? nullptr : net.at(norm + 1), net.eps, stats + i * net.stats + stat,
                 desk.active[stage] + i * net.padded(stage) + net.inside(stage), net.row_of(stage));
    };
    active(b.norm1, b.stage_in, h, b.stats1);
    convolve({desk.active[b.stage_in], net.padded(b.stage_in), b.conv1.stride * net.row_of(b.stage_in), b.conv1.stride * in},
             square_taps(net.row_of(b.stage_in), in), in, packed.forward.data() + packed.forward_at[b.conv1.weight], 9,
             net.at(b.conv1.bias), nullptr, {maps + b.middle, net.saved, n * out, out}, out, n, count);
    active(b.norm2, b.stage, b.middle, b.stats2);
    const View result = {maps + b.out, net.saved, n * out, out};
    const bf16* add = maps + h;
    if (!b.straight) {
      convolve({maps + h, net.saved, 2 * b.side_in * in, 2 * in}, one_tap(), in,
               packed.forward.data() + packed.forward_at[b.shortcut.weight], 1, nullptr, nullptr, result, out, n, count);
      add = maps + b.out;
    }
    convolve({desk.active[b.stage], net.padded(b.stage), net.row_of(b.stage), out}, square_taps(net.row_of(b.stage), out), out,
             packed.forward.data() + packed.forward_at[b.conv2.weight], 9, net.at(b.conv2.bias), add, result, out, n, count);
    h = b.out;
  }
  const int64_t last = net.side_of(2);
  for (int64_t i = 0; i < count; i++) pool(maps + i * net.saved + h, last * last, 4 * w, latents + i * 4 * w);
}

// The gradient of a 3 x 3 convolution's input, from that of its output with its border.
void convolve_backward(const Conv& c, const bf16* weights, bf16* grad, int64_t grad_patch, bf16* out, int64_t out_patch,
                       int64_t patches) {
  const int64_t row = (c.side + 2) * c.outputs, inside = row + c.outputs;
  if (c.stride == 1) {
    Taps taps{9, {}, {}};
    for (int64_t t = 0; t < 9; t++) taps.at[t] = (2 - t / 3) * row + (2 - t % 3) * c.outputs, taps.weight[t] = t;
    convolve({grad, grad_patch, row, c.outputs}, taps, c.outputs, weights, 9, nullptr, nullptr,
             {out, out_patch, c.side * c.inputs, c.inputs}, c.inputs, c.side, patches);
    return;
  }
  for (int64_t odd_y = 0; odd_y < 2; odd_y++)
    for (int64_t odd_x = 0; odd_x < 2; odd_x++) {
      Taps taps{0, {}, {}};
      for (int64_t ky = 0; ky < 3; ky++)
        for (int64_t kx = 0; kx < 3; kx++) {
          if ((ky == 1) == odd_y || (kx == 1) == odd_x) continue;  // an even pixel is read by the middle, an odd one by both ends
          taps.at[taps.count] = inside + (ky == 0 ? row : 0) + (kx == 0 ? c.outputs : 0);
          taps.weight[taps.count++] = ky * 3 + kx;
        }
      const int64_t out_row = 2 * c.side * c.inputs;
      convolve({grad, grad_patch, row, c.outputs}, taps, c.outputs, weights, 9, nullptr, nullptr,
               {out + odd_y * out_row + odd_x * c.inputs, out_patch, 2 * out_row, 2 * c.inputs}, c.inputs, c.side, patches);
    }
}

void backward_patches(const Net& net, const Packed& packed, const Tensor& patches, int64_t first, int64_t count, Desk& desk,
                      const bf16* maps, const float* stats, const bf16* upstream, float* grads) {
  const auto grad_of = [&](int64_t parameter) { return parameter < 0 ? nullptr : grads + net.grads[parameter]; };
  const int64_t last = net.side_of(2);
  for (int64_t i = 0; i < count; i++)
    pool_backward(maps + i * net.saved + net.blocks.back().out, last, 4 * net.width, upstream + i * 4 * net.width,
                  desk.grad[2] + i * net.padded(2) + net.inside(2), net.row_of(2));
  for (int64_t which = 5; which >= 0; which--) {
    const Block& b = net.blocks[which];
    const int64_t h = which ? net.blocks[which - 1].out : 0;
    const auto again = [&](int64_t norm, int64_t stage, int64_t map, int64_t stat) {  // and paired up for `weigh`
      const int64_t row = net.row_of(stage), side = net.side_of(stage), width = net.width_of(stage);
      for (int64_t i = 0; i < count; i++) {
        bf16* active = desk.active[stage] + i * net.padded(stage);
        activate_again(maps + i * net.saved + map, side, width, net.at(norm), norm < 0 ? nullptr : net.at(norm + 1),
                       stats + i * net.stats + stat, active + net.inside(stage), row);
      }
    };
    const auto pair_in = [&](int64_t stage, int64_t step) {
      const int64_t side = net.side_of(stage) + 2, row = net.row_of(stage);
      for (int64_t i = 0; i < count; i++)
        pair_up(desk.active[stage] + i * net.padded(stage), side, side, net.width_of(stage), step, 1, row,
                desk.in_pairs + i * net.padded(stage), row);
    };
    const auto pair_out = [&](const bf16* grad) {  // of the block's stage, with its border
      const int64_t side = net.side_of(b.stage), width = net.width_of(b.stage);
      for (int64_t i = 0; i < count; i++)
        pair_up(grad + i * net.padded(b.stage) + net.inside(b.stage), side, side, width, 1, 2, net.row_of(b.stage),
                desk.out_pairs + i * net.flat(b.stage) / 2, side / 2 * width);
    };
    const auto weigh_square = [&](const Conv& c, int64_t stage) {
      const int64_t row = net.row_of(stage);
      weigh(desk.in_pairs, net.padded(stage), c.stride * row, 2 * c.stride * c.inputs, square_taps(row, c.inputs), c.inputs,
            desk.out_pairs, c.outputs, c.side, count, grad_of(c.weight));
    };
    const auto back = [&](int64_t norm, int64_t stage, int64_t map, int64_t stat, const bf16* add, int64_t add_patch,
                          int64_t add_row, bf16* out) {
      for (int64_t i = 0; i < count; i++)
        activate_backward(maps + i * net.saved + map, net.side_of(stage), net.width_of(stage), net.at(norm),
                          norm < 0 ? nullptr : net.at(norm + 1), stats + i * net.stats + stat,
                          desk.flat + i * net.flat(stage), add ? add + i * add_patch : nullptr, add_row,
                          out + i * net.padded(stage) + net.inside(stage), net.row_of(stage), grad_of(norm),
                          norm < 0 ? nullptr : grad_of(norm + 1));
    };
    const auto add_bias = [&](int64_t bias, const bf16* grad) {
      if (bias < 0) return;
      for (int64_t i = 0; i < count; i++)
        add_pixels(grad + i * net.padded(b.stage) + net.inside(b.stage), net.side_of(b.stage), net.width_of(b.stage),
                   net.row_of(b.stage), grad_of(bias));
    };
    const int64_t in = b.conv1.inputs, out = b.conv1.outputs;
    pair_out(desk.grad[b.stage]);
    again(b.norm2, b.stage, b.middle, b.stats2);
    pair_in(b.stage, 1);
    weigh_square(b.conv2, b.stage);
    add_bias(b.conv2.bias, desk.grad[b.stage]);
    const bf16* add = desk.grad[b.stage] + net.inside(b.stage);
    int64_t add_patch = net.padded(b.stage), add_row = net.row_of(b.stage);
    if (!b.straight) {
      const int64_t row = b.side_in * in;
      for (int64_t i = 0; i < count; i++)  // every second pixel of every second row
        pair_up(maps + i * net.saved + h, b.side_in / 2, b.side_in, in, 2, 4, 2 * row,
                desk.in_pairs + i * net.flat(b.stage_in), b.side_in / 4 * in);
      weigh(desk.in_pairs, net.flat(b.stage_in), b.side_in / 4 * in, in, one_tap(), in, desk.out_pairs, out, b.conv1.side,
            count, grad_of(b.shortcut.weight));
      bf16* skip = desk.skip[b.stage_in];
      convolve({desk.grad[b.stage] + net.inside(b.stage), net.padded(b.stage), net.row_of(b.stage), out}, one_tap(), out,
               packed.backward.data() + packed.backward_at[b.shortcut.weight], 1, nullptr, nullptr,
               {skip, net.flat(b.stage_in), 2 * row, 2 * in}, in, b.conv1.side, count);
      add = skip, add_patch = net.flat(b.stage_in), add_row = row;
    }
    convolve_backward(b.conv2, packed.backward.data() + packed.backward_at[b.conv2.weight], desk.grad[b.stage],
                      net.padded(b.stage), desk.flat, net.flat(b.stage), count);
    back(b.norm2, b.stage, b.middle, b.stats2, nullptr, 0, 0, desk.inner[b.stage]);
    pair_out(desk.inner[b.stage]);
    again(b.norm1, b.stage_in, h, b.stats1);
    pair_in(b.stage_in, b.conv1.stride);
    weigh_square(b.conv1, b.stage_in);
    add_bias(b.conv1.bias, desk.inner[b.stage]);
    convolve_backward(b.conv1, packed.backward.data() + packed.backward_at[b.conv1.weight], desk.inner[b.stage],
                      net.padded(b.stage), desk.flat, net.flat(b.stage_in), count);
    back(b.norm1, b.stage_in, h, b.stats1, add, add_patch, add_row, desk.grad[b.stage_in]);
  }
  spread_stem(net, patches, first, count, desk);
  const int64_t side = net.side, w = net.width, columns = side * side * net.pixel;
  for (int64_t i = 0; i < count; i++) {
    const bf16* grad = desk.grad[0] + i * net.padded(0) + net.inside(0);
    pair_up(desk.columns + i * columns, side, side, net.pixel, 1, 2, side * net.pixel, desk.in_pairs + i * columns,
            side * net.pixel);
    pair_up(grad, side, side, w, 1, 2, net.row_of(0), desk.out_pairs + i * net.flat(0) / 2, side / 2 * w);
    add_pixels(grad, side, w, net.row_of(0), grad_of(1));
  }
  weigh(desk.in_pairs, columns, side * net.pixel, net.pixel, one_tap(), net.pixel, desk.out_pairs, w, side, count, grad_of(0));
}

Tensor readable(const Tensor& patches) {  // (b, gy, gx, c, p, p): windows of an image are read where they lie
  TORCH_CHECK(patches.dim() == 6 && patches.size(4) == patches.size(5), "patch encoder: expected patches (b, gy, gx, c, p, p), got ",
              patches.sizes());
  return patches.stride(5) == 1 && patches.scalar_type() == at::kFloat ? patches : patches.to(at::kFloat).contiguous();
}

int64_t patches_at_once(const Net& net) { return std::clamp<int64_t>((48 << 10) / (2 * net.flat(0)), 1, 8); }

std::tuple<Tensor, Tensor, Tensor> encode_forward(const Tensor& patches, at::TensorList parameters, int64_t stem, bool norm,
                                                  double eps, bool keep) {
  const Tensor x = readable(patches);
  const Net net = make_net(x, parameters, stem, norm, eps);
  const Packed packed = pack_all(net, false);
  const int64_t n = x.size(0) * x.size(1) * x.size(2), most = patches_at_once(net);
  Tensor latents = at::empty({x.size(0), x.size(1), x.size(2), 4 * net.width}, x.options().dtype(at::kBFloat16));
  Tensor maps = at::empty({keep ? n : 0, net.saved}, latents.options());
  Tensor stats = at::empty({keep ? n : 0, net.stats}, x.options());
  auto* to = reinterpret_cast<bf16*>(latents.data_ptr());
  auto* saved = reinterpret_cast<bf16*>(maps.data_ptr());
  float* measured = stats.data_ptr<float>();
  at::parallel_for(0, (n + most - 1) / most, 1, [&](int64_t begin, int64_t end) {
    Desk desk(net, most, false);
    std::vector<bf16> own(keep ? 0 : most * net.saved);
    std::vector<float> own_stats(keep ? 0 : most * net.stats);
    for (int64_t first = begin * most; first < std::min(n, end * most); first += most)
      forward_patches(net, packed, x, first, std::min(most, n - first), desk, keep ? saved + first * net.saved : own.data(),
                      keep ? measured + first * net.stats : own_stats.data(), to + first * 4 * net.width);
  });
  return {latents, maps, stats};
}

std::vector<Tensor> encode_backward(const Tensor& upstream, const Tensor& patches, at::TensorList parameters, const Tensor& maps,
                                    const Tensor& stats, int64_t stem, bool norm, double eps) {
  const Tensor x = readable(patches);
  const Tensor grad = upstream.to(at::kBFloat16).contiguous();
  const Net net = make_net(x, parameters, stem, norm, eps);
  const Packed packed = pack_all(net, true);
  const int64_t n = x.size(0) * x.size(1) * x.size(2), most = patches_at_once(net);
  const int64_t chunks = std::clamp<int64_t>(std::min(n / 48, (64 << 20) / (4 * net.grad_size)), 1, 16);
  Tensor grads = at::zeros({chunks, net.grad_size}, x.options());
  const auto* from = reinterpret_cast<const bf16*>(grad.data_ptr());
  const auto* saved = reinterpret_cast<const bf16*>(maps.data_ptr());
  const float* measured = stats.data_ptr<float>();
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Desk desk(net, most, true);
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t stop = n * (chunk + 1) / chunks;
      for (int64_t first = n * chunk / chunks; first < stop; first += most)
        backward_patches(net, packed, x, first, std::min(most, stop - first), desk, saved + first * net.saved,
                         measured + first * net.stats, from + first * 4 * net.width, grads.data_ptr<float>() + chunk * net.grad_size);
    }
  });
  const Tensor sums = grads.sum(0);
  std::vector<Tensor> found;
  for (size_t i = 0; i < net.values.size(); i++) {
    const Tensor& p = net.values[i];
    Tensor part = sums.narrow(0, net.grads[i], i ? p.numel() : net.pixel * net.width);
    if (i == 0)
      part = part.view({net.pixel, net.width}).narrow(0, 0, net.columns).view({net.channels, net.kernel, net.line, net.width})
                 .narrow(2, 0, net.kernel).permute({3, 0, 1, 2});
    else if (p.dim() == 4)
      part = part.view({p.size(2), p.size(3), p.size(1), p.size(0)}).permute({3, 2, 0, 1});
    found.push_back(part.to(parameters[i].scalar_type()));
  }
  return found;
}

#else

std::tuple<Tensor, Tensor, Tensor> encode_forward(const Tensor&, at::TensorList, int64_t, bool, double, bool) {
  TORCH_CHECK(false, "patch encoder: not compiled for this processor");
}

std::vector<Tensor> encode_backward(const Tensor&, const Tensor&, at::TensorList, const Tensor&, const Tensor&, int64_t, bool,
                                    double) {
  TORCH_CHECK(false, "patch encoder: not compiled for this processor");
}

#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(cpc_kernels_cpu, m) {
  m.def("encoder_runs_here", &encoder_runs_here);
  m.def("encode_forward", &encode_forward);
  m.def("encode_backward", &encode_backward);
}
