// The kernels of csrc/cuda/patch_gather.cu on the CPU: noise of every kind, images of every layout
// and type, against plain loops.
#include "cuda/patch_gather.cu"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "check.h"

namespace {

using namespace encfast;
using check::Array;
using check::Draw;
using check::element_of;

bool check_divider() {
  constexpr int64_t kMost = INT32_MAX;
  for (int64_t d : {1, 2, 3, 5, 7, 14, 16, 641, 65535, 65536, 1 << 30, INT32_MAX - 1, INT32_MAX}) {
    const Divider by(d);
    for (int64_t multiple : {int64_t{0}, d, 2 * d, kMost / d / 2 * d, kMost / d * d, kMost}) {
      for (int64_t n = multiple - 2; n <= multiple + 2; ++n) {
        if (n < 0 || n > kMost || by.quotient(static_cast<uint32_t>(n)) == n / d) continue;
        std::fprintf(stderr, "%lld / %lld is wrong\n", static_cast<long long>(n),
                     static_cast<long long>(d));
        return false;
      }
    }
  }
  return true;
}

enum class Noise { kAny, kTies, kSpecial };

float draw_noise(Draw& draw, Noise kind) {
  const float special[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, -1e-45f, 1, -1};
  if (kind == Noise::kSpecial) return special[draw(0, 9)];
  return kind == Noise::kTies ? static_cast<float>(draw(0, 3))
                              : static_cast<float>(draw(-1000000, 1000000)) * 1e-6f;
}

// As argsort(stable=True) has it.
bool comes_first(float a, float b) { return std::isnan(b) ? !std::isnan(a) : a < b; }

struct Lengths {
  int64_t length, keep;
};

bool check_select(Draw& draw, const std::vector<Lengths>& sequences, Noise kind, bool ordered) {
  int64_t n = 0, keep = 0;
  const auto batch = static_cast<int64_t>(sequences.size());
  Array<int32_t> cu_seqlens(batch + 1), cu_keep(batch + 1);
  for (int64_t b = 0; b <= batch; ++b) {
    cu_seqlens[b] = static_cast<int32_t>(n);
    cu_keep[b] = static_cast<int32_t>(keep);
    if (b == batch) break;
    n += sequences[static_cast<size_t>(b)].length;
    keep += sequences[static_cast<size_t>(b)].keep;
  }
  Array<float> noise(n);
  for (int64_t i = 0; i < n; ++i) noise[i] = draw_noise(draw, kind);
  std::vector<int64_t> visible, hidden, restore(static_cast<size_t>(n), -1);
  for (int64_t b = 0; b < batch; ++b) {
    const Lengths& s = sequences[static_cast<size_t>(b)];
    std::vector<int64_t> order;
    for (int64_t i = 0; i < s.length; ++i) order.push_back(cu_seqlens[b] + i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return comes_first(noise[i], noise[j]); });
    const auto middle = order.begin() + s.keep;
    if (ordered) {
      std::sort(order.begin(), middle);
      std::sort(middle, order.end());
    }
    for (auto id = order.begin(); id != middle; ++id) {
      restore[static_cast<size_t>(*id)] = static_cast<int64_t>(visible.size());
      visible.push_back(*id);
    }
    hidden.insert(hidden.end(), middle, order.end());
  }
  Array<int64_t> got_visible(keep), got_hidden(n - keep), got_restore(n);
  select_patches_cuda({noise.data(), cu_seqlens.data(), cu_keep.data(), got_visible.data(),
                       got_hidden.data(), got_restore.data(), n, keep, batch, ordered},
                      nullptr);
  return check::equal("visible", got_visible, visible) &&
         check::equal("hidden", got_hidden, hidden) &&
         check::equal("restore", got_restore, restore);
}

bool check_selects(Draw& draw) {
  bool ok = check_select(draw, {}, Noise::kAny, true);
  for (bool ordered : {false, true}) {
    ok &= check_select(draw, {{49, 12}, {0, 0}, {1, 1}, {1, 0}, {2, 1}}, Noise::kAny, ordered);
    ok &= check_select(draw, {{30, 0}, {33, 33}, {64, 16}}, Noise::kTies, ordered);
    ok &= check_select(draw, {{40, 10}, {40, 30}}, Noise::kSpecial, ordered);
    // Nothing around a block's border; sequences across it.
    ok &= check_select(draw, {{0, 0}, {kThreads, 9}, {0, 0}, {5, 5}, {0, 0}}, Noise::kAny, ordered);
    ok &= check_select(draw, {{0, 0}, {300, 7}, {300, 290}, {0, 0}}, Noise::kTies, ordered);
    // More patches than threads; tiles that end with a sequence, and within one.
    ok &= check_select(draw, {{kThreads + 1, 100}}, Noise::kTies, ordered);
    ok &= check_select(draw, {{kTileKeys, 5}, {kTileKeys + 3, 700}}, Noise::kTies, ordered);
  }
  return ok;
}

template <class T>
constexpr DType kTypeOf = DType::kFloat32;
template <>
constexpr DType kTypeOf<__nv_bfloat16> = DType::kBFloat16;
template <>
constexpr DType kTypeOf<__half> = DType::kFloat16;

template <class T>
constexpr PixelType kPixelsOf = static_cast<PixelType>(kTypeOf<T>);
template <>
constexpr PixelType kPixelsOf<uint8_t> = PixelType::kUint8;

struct Image {
  int64_t batch, channels, grid[3], patch[3];
  bool channels_last = false;
  bool channels_innermost = false;  // in memory
  int64_t gap = 0;                  // elements between two lines of pixels
  size_t offset = 0;                // bytes from an address aligned to 64
  bool expanded = false;            // one image for the whole batch

  PatchGrid layout() const {
    PatchGrid g{};
    g.batch = batch;
    g.channels = channels;
    g.channels_last = channels_last;
    g.patches = 1;
    g.pixels = channels;
    int64_t step = 1;
    const auto take = [&](int64_t n) { return std::exchange(step, step * n); };
    if (channels_innermost) g.channel_stride = take(channels);
    for (int a = 2; a >= 0; --a) {
      g.grid[a] = grid[a];
      g.patch[a] = patch[a];
      g.patches *= grid[a];
      g.pixels *= patch[a];
      g.stride[a] = take(grid[a] * patch[a]);
      if (a == 2) step += gap;
    }
    if (!channels_innermost) g.channel_stride = take(channels);
    g.image_stride = expanded ? 0 : step;
    return g;
  }
};

// Element e of the row of patch `id`: where it lies in the image, and its channel.
std::pair<int64_t, int64_t> element_at(const PatchGrid& g, int64_t id, int64_t e) {
  int64_t patch = id % g.patches, offset = id / g.patches * g.image_stride, channel = 0;
  if (g.channels_last) {
    channel = e % g.channels;
    e /= g.channels;
  }
  for (int a = 2; a >= 0; --a) {
    offset += (patch % g.grid[a] * g.patch[a] + e % g.patch[a]) * g.stride[a];
    patch /= g.grid[a];
    e /= g.patch[a];
  }
  if (!g.channels_last) channel = e;
  return {offset + channel * g.channel_stride, channel};
}

template <class Pixel, class T>
bool check_gather(Draw& draw, const Image& image) {
  const PatchGrid g = image.layout();
  int64_t size = 1;  // up to the last pixel
  if (!image.expanded) size += (g.batch - 1) * g.image_stride;
  size += (g.channels - 1) * g.channel_stride;
  for (int a = 0; a < 3; ++a) size += (g.grid[a] * g.patch[a] - 1) * g.stride[a];
  Array<Pixel> pixels(size, image.offset);
  for (int64_t i = 0; i < size; ++i) pixels[i] = element_of<Pixel>(static_cast<double>(draw(0, 9)));
  const int64_t m = 2 * g.patches + 3;
  Array<int64_t> ids(m);
  Array<float> scale(g.channels), shift(g.channels);
  for (int64_t c = 0; c < g.channels; ++c) {
    scale[c] = static_cast<float>(draw(1, 4));
    shift[c] = static_cast<float>(draw(-9, 9));
  }
  const bool scaled = draw(0, 2) != 0, shifted = draw(0, 2) != 0;
  std::vector<T> want;
  for (int64_t i = 0; i < m; ++i) {
    ids[i] = draw(0, g.batch * g.patches - 1);
    for (int64_t e = 0; e < g.pixels; ++e) {
      const auto [at, channel] = element_at(g, ids[i], e);
      auto x = static_cast<float>(pixels[at]);
      if (scaled) x *= scale[channel];
      if (shifted) x += shift[channel];
      want.push_back(element_of<T>(x));
    }
  }
  Array<T> rows(m * g.pixels, image.offset);
  gather_patches_cuda(
      {g, kPixelsOf<Pixel>, kTypeOf<T>, pixels.data(), ids.data(), scaled ? scale.data() : nullptr,
       shifted ? shift.data() : nullptr, rows.data(), m},
      nullptr);
  return check::equal("gather_patches", rows, want);
}

template <class Pixel, class T>
bool check_gathers_of(Draw& draw) {
  bool ok = true;
  // In turn: an image and a clip, both orders of a row, both orders of memory.
  for (bool last : {false, true}) {
    for (bool innermost : {false, true}) {
      ok &= check_gather<Pixel, T>(draw, {2, 3, {1, 2, 3}, {1, 8, 16}, last, innermost});
      ok &= check_gather<Pixel, T>(draw, {2, 3, {2, 1, 2}, {2, 3, 5}, last, innermost});
    }
    // Lines and addresses that are aligned to less than a vector, or to one; a single channel.
    ok &= check_gather<Pixel, T>(draw, {1, 2, {1, 1, 2}, {1, 4, 8}, last, last, 1});
    ok &= check_gather<Pixel, T>(draw, {1, 2, {1, 1, 2}, {1, 4, 8}, last, last, 16});
    ok &= check_gather<Pixel, T>(draw, {1, 2, {1, 1, 2}, {1, 4, 8}, last, last, 0, 4});
    ok &= check_gather<Pixel, T>(draw, {2, 1, {1, 1, 3}, {1, 2, 8}, last, last});
    ok &= check_gather<Pixel, T>(draw, {2, 1, {1, 1, 3}, {1, 2, 4}, last, last});
  }
  return ok && check_gather<Pixel, T>(draw, {3, 2, {1, 1, 2}, {1, 1, 8}, false, false, 0, 0, true});
}

bool check_gathers(Draw& draw) {
  bool ok = check_gathers_of<uint8_t, float>(draw) && check_gathers_of<float, float>(draw) &&
            check_gathers_of<float, __nv_bfloat16>(draw) &&
            check_gathers_of<__nv_bfloat16, __nv_bfloat16>(draw);
  // The other pairs of types; a row longer than a block; one pixel a patch.
  const Image image{2, 3, {1, 2, 2}, {1, 4, 8}};
  ok &= check_gather<uint8_t, __half>(draw, image) && check_gather<__half, float>(draw, image) &&
        check_gather<uint8_t, __nv_bfloat16>(draw, image) &&
        check_gather<__half, __half>(draw, image) && check_gather<float, __half>(draw, image) &&
        check_gather<__nv_bfloat16, float>(draw, image) &&
        check_gather<__half, __nv_bfloat16>(draw, image) &&
        check_gather<__nv_bfloat16, __half>(draw, image);
  ok &= check_gather<uint8_t, float>(draw, {1, 3, {1, 1, 1}, {3, 37, 41}});
  return ok && check_gather<float, float>(draw, {2, 1, {2, 3, 2}, {1, 1, 1}});
}

// 2^-8 + 2^-16 added to 1 in bfloat16: a shift rounded first would leave a tie, and 1.
bool check_one_rounding() {
  Array<__nv_bfloat16> pixels(1), rows(1);
  Array<int64_t> ids(1);
  Array<float> shift(1);
  pixels[0] = element_of<__nv_bfloat16>(1);
  ids[0] = 0;
  shift[0] = 0x1.01p-8f;
  gather_patches_cuda(
      {Image{1, 1, {1, 1, 1}, {1, 1, 1}}.layout(), PixelType::kBFloat16, DType::kBFloat16,
       pixels.data(), ids.data(), nullptr, shift.data(), rows.data(), 1},
      nullptr);
  return check::equal("one rounding", rows, {element_of<__nv_bfloat16>(1.0078125)});
}

// Patch 2 of 2 does not exist.
void gather_out_of_range(int64_t id) {
  Array<float> image(8), rows(4);
  Array<int64_t> ids(1);
  ids[0] = id;
  gather_patches_cuda({Image{1, 1, {1, 1, 2}, {1, 1, 4}}.layout(), PixelType::kFloat32,
                       DType::kFloat32, image.data(), ids.data(), nullptr, nullptr, rows.data(), 1},
                      nullptr);
}

// Two sequences of 4 rows in all, of which 2 are kept.
void select_with(std::vector<int32_t> ends, std::vector<int32_t> kept) {
  Array<float> noise(4);
  Array<int64_t> visible(2), hidden(2), restore(4);
  select_patches_cuda({noise.data(), ends.data(), kept.data(), visible.data(), hidden.data(),
                       restore.data(), 4, 2, 2, false},
                      nullptr);
}

}  // namespace

int main(int, char** args) {
  const std::string call = args[1];
  if (call == "bad_id") gather_out_of_range(2);
  if (call == "negative_id") gather_out_of_range(-1);
  if (call == "bad_start") select_with({1, 2, 4}, {0, 1, 2});
  if (call == "bad_end") select_with({0, 2, 3}, {0, 1, 2});
  if (call == "negative_length") select_with({0, 5, 4}, {0, 1, 2});
  if (call == "keep_too_long") select_with({0, 1, 4}, {0, 2, 2});
  if (call == "negative_keep") select_with({0, 2, 4}, {0, -1, 2});
  return check::under_seeds(args, [](Draw& draw) {
    return check_divider() && check_selects(draw) && check_gathers(draw) && check_one_rounding();
  });
}
