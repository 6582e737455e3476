// Runs the patch_gather core of one instruction set without PyTorch (sanitize.h): against plain
// loops, 1 thread equal to 4, every output written.
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const PatchGatherKernels& kKernels = ENCFAST_ISA::kPatchGather;

bool report(const char* name, bool ok) {
  std::printf("%-28s %s\n", name, ok ? "" : "wrong");
  return ok;
}

template <class T>
std::vector<T> values_of(const std::vector<char>& bytes) {
  std::vector<T> out(bytes.size() / sizeof(T));
  std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
  return out;
}

// ---- select_patches ----

struct Selected {
  std::vector<int64_t> visible, hidden, restore;
  bool operator==(const Selected& other) const {
    return visible == other.visible && hidden == other.hidden && restore == other.restore;
  }
};

struct Sequences {
  std::vector<int32_t> ends{0}, kept{0};
  std::vector<float> noise;
};

// Lengths around the width of every vector; noise with ties, NaN, infinities and zeros of both
// signs.
Sequences make_sequences() {
  constexpr float kSpecial[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 0.5f, 0.25f};
  Sequences s;
  Values values;
  for (const int32_t n : {0, 1, 3, 4, 15, 16, 17, 63, 64, 65, 700, 0, 196}) {
    s.ends.push_back(s.ends.back() + n);
    s.kept.push_back(s.kept.back() + (n + 2) / 4);
  }
  s.noise = values_of<float>(values.make(DType::kFloat32, s.ends.back()));
  for (size_t i = 0; i < s.noise.size(); ++i) {
    if (i * 2654435761u % 5 < 2) s.noise[i] = kSpecial[i * 40503u % 8];
  }
  return s;
}

Selected select(const Sequences& s, bool ordered, int threads) {
  const auto n = static_cast<size_t>(s.ends.back()), k = static_cast<size_t>(s.kept.back());
  Selected out{std::vector<int64_t>(k, -7), std::vector<int64_t>(n - k, -7),
               std::vector<int64_t>(n, -7)};
  constexpr int64_t kLongest = 700;
  const int64_t stride = (kLongest * kSelectBytes + kSelectPad + 63) / 64 * 64;
  const Block workspace(static_cast<size_t>(stride * threads));
  ThreadPool pool{threads};
  kKernels.select_patches(
      {s.noise.data(), s.ends.data(), s.kept.data(), out.visible.data(), out.hidden.data(),
       out.restore.data(), static_cast<int64_t>(s.ends.size()) - 1, ordered,
       static_cast<char*>(workspace.data), stride},
      pool.pool());
  return out;
}

Selected plain_select(const Sequences& s, bool ordered) {
  Selected out;
  out.restore.assign(s.noise.size(), -1);
  const auto less = [&](int64_t a, int64_t b) {
    const float x = s.noise[static_cast<size_t>(a)], y = s.noise[static_cast<size_t>(b)];
    return x < y || (!std::isnan(x) && std::isnan(y));
  };
  for (size_t b = 0; b + 1 < s.ends.size(); ++b) {
    std::vector<int64_t> ids;
    for (int64_t i = s.ends[b]; i < s.ends[b + 1]; ++i) ids.push_back(i);
    std::stable_sort(ids.begin(), ids.end(), less);
    const auto middle = ids.begin() + (s.kept[b + 1] - s.kept[b]);
    if (ordered) {
      std::sort(ids.begin(), middle);
      std::sort(middle, ids.end());
    }
    for (auto id = ids.begin(); id != middle; ++id) {
      out.restore[static_cast<size_t>(*id)] = static_cast<int64_t>(out.visible.size());
      out.visible.push_back(*id);
    }
    out.hidden.insert(out.hidden.end(), middle, ids.end());
  }
  return out;
}

bool check_select() {
  const Sequences s = make_sequences();
  bool ok = true;
  for (const bool ordered : {true, false}) {
    const Selected want = plain_select(s, ordered);
    ok &= select(s, ordered, 1) == want && select(s, ordered, 4) == want;
  }
  return report("select_patches", ok);
}

// ---- gather_patches ----

// A 2 x 3 x 5 grid of patches of 2 x 3 x `width` pixels, 3 channels, 2 images, densely packed.
PatchGrid make_grid(int64_t width, bool channels_last) {
  PatchGrid g{2, 3, {2, 3, 5}, {2, 3, width}, 0, 0, {}, 30, 18 * width, channels_last};
  g.stride[2] = 1;
  g.stride[1] = 5 * width;
  g.stride[0] = 9 * g.stride[1];
  g.channel_stride = 4 * g.stride[0];
  g.image_stride = 3 * g.channel_stride;
  return g;
}

// The pixel of place j of the row of patch `id`, and its channel.
int64_t pixel_at(const PatchGrid& g, int64_t id, int64_t j, int64_t& channel) {
  const int64_t inner = g.pixels / g.channels;
  channel = g.channels_last ? j % g.channels : j / inner;
  int64_t place = g.channels_last ? j / g.channels : j % inner, p = id % g.patches;
  int64_t at = id / g.patches * g.image_stride + channel * g.channel_stride;
  for (int i = kPatchAxes - 1; i >= 0; --i) {
    at += (p % g.grid[i] * g.patch[i] + place % g.patch[i]) * g.stride[i];
    p /= g.grid[i];
    place /= g.patch[i];
  }
  return at;
}

std::vector<char> gather(const PatchGrid& g, PixelType pixels, DType dtype,
                         const std::vector<char>& image, const std::vector<int64_t>& ids,
                         const float* scale, const float* shift, int threads) {
  const auto n = static_cast<int64_t>(ids.size());
  std::vector<char> rows = nan_filled(n * g.pixels, size_of(dtype));
  const int64_t row_floats = (g.pixels + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  const Block workspace(static_cast<size_t>((2 + threads) * row_floats) * sizeof(float));
  std::memset(workspace.data, 0, workspace.bytes);
  auto* factors = static_cast<float*>(workspace.data);
  ThreadPool pool{threads};
  kKernels.gather_patches({g, pixels, dtype, image.data(), ids.data(), scale, shift, rows.data(), n,
                           factors, factors + 2 * row_floats, row_floats},
                          pool.pool());
  return rows;
}

bool check_gather_of(const PatchGrid& g) {
  const int64_t total = g.batch * g.image_stride;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 500; ++i) ids.push_back(i * 17 % (g.batch * g.patches));
  const float scale[] = {0.5f, 2.0f, -1.0f}, shift[] = {1.0f, -3.0f, 0.25f};
  std::vector<char> bytes(static_cast<size_t>(total));
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 31 % 251);
  const auto rows = gather(g, PixelType::kUint8, DType::kFloat32, bytes, ids, scale, shift, 4);
  bool ok = rows == gather(g, PixelType::kUint8, DType::kFloat32, bytes, ids, scale, shift, 1);
  const std::vector<float> found = values_of<float>(rows);
  for (size_t i = 0; i < found.size(); ++i) {
    int64_t c = 0;
    const int64_t pixels = g.pixels, j = static_cast<int64_t>(i) % pixels;
    const int64_t at = pixel_at(g, ids[i / static_cast<size_t>(pixels)], j, c);
    const auto byte = static_cast<unsigned char>(bytes[static_cast<size_t>(at)]);
    ok &= found[i] == static_cast<float>(byte) * scale[c] + shift[c];  // exact in float32
  }
  Values values;
  const std::vector<char> image = values.make(DType::kBFloat16, total);
  const auto moved = values_of<uint16_t>(
      gather(g, PixelType::kBFloat16, DType::kBFloat16, image, ids, nullptr, nullptr, 4));
  const auto source = values_of<uint16_t>(image);
  for (size_t i = 0; i < moved.size(); ++i) {
    int64_t c = 0;
    const int64_t pixels = g.pixels, j = static_cast<int64_t>(i) % pixels;
    const int64_t at = pixel_at(g, ids[i / static_cast<size_t>(pixels)], j, c);
    ok &= moved[i] == source[static_cast<size_t>(at)];
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
    ok &= all_written(dtype, gather(g, PixelType::kBFloat16, dtype, image, ids, scale, shift, 4));
  }
  return ok;
}

bool check_gather() {
  bool ok = true;
  for (const int64_t width : {1, 3, 7, 16}) {
    for (const bool channels_last : {false, true}) {
      ok &= check_gather_of(make_grid(width, channels_last));
    }
  }
  return report("gather_patches", ok);
}

// ---- restore_rows ----

constexpr int64_t kM = 600, kRows = 200, kAdded = 60;

std::vector<int64_t> make_index() {
  std::vector<int64_t> index;
  for (int64_t i = 0; i < kM; ++i) index.push_back(i * 7 % 3 ? -1 : i * 11 % kRows);
  return index;
}

std::vector<char> restore(DType dtype, const std::vector<char>& x, const std::vector<float>& fill,
                          const std::vector<float>* add, int64_t C, int threads) {
  const std::vector<int64_t> index = make_index();
  std::vector<char> out = nan_filled(kM * C, size_of(dtype));
  std::vector<char> fill_row(static_cast<size_t>(C * size_of(dtype)));
  ThreadPool pool{threads};
  kKernels.restore_rows({{x.data(), C, dtype},
                         index.data(),
                         fill.data(),
                         {add ? add->data() : nullptr, C, DType::kFloat32},
                         nullptr,
                         kAdded,
                         {out.data(), C, dtype},
                         kM,
                         C,
                         16,
                         fill_row.data()},
                        pool.pool());
  return out;
}

bool check_restore() {
  bool ok = true;
  const std::vector<int64_t> index = make_index();
  for (const int64_t C : {1, 5, 16, 37, 128}) {
    Values values;
    const auto fill = values_of<float>(values.make(DType::kFloat32, C));
    const auto add = values_of<float>(values.make(DType::kFloat32, kAdded * C));
    const std::vector<char> x = values.make(DType::kFloat32, kRows * C);
    const auto rows = values_of<float>(x);
    for (const bool added : {false, true}) {
      const std::vector<char> out = restore(DType::kFloat32, x, fill, added ? &add : nullptr, C, 4);
      ok &= out == restore(DType::kFloat32, x, fill, added ? &add : nullptr, C, 1);
      const auto found = values_of<float>(out);
      for (int64_t i = 0; i < kM * C; ++i) {
        const int64_t from = index[static_cast<size_t>(i / C)], c = i % C;
        float want =
            from < 0 ? fill[static_cast<size_t>(c)] : rows[static_cast<size_t>(from * C + c)];
        if (added) want += add[static_cast<size_t>(i / C % kAdded * C + c)];
        ok &= found[static_cast<size_t>(i)] == want;
      }
      const std::vector<char> half = values.make(DType::kFloat16, kRows * C);
      ok &= all_written(DType::kFloat16,
                        restore(DType::kFloat16, half, fill, added ? &add : nullptr, C, 4));
    }
  }
  return report("restore_rows", ok);
}

// ---- restore_rows_bwd ----

struct Grads {
  std::vector<float> dadd, sums;
  bool operator==(const Grads& other) const { return dadd == other.dadd && sums == other.sums; }
};

// `grouped`: the rows of dadd by an explicit grouping instead of i % kAdded.
Grads backward(const std::vector<char>& dout, int64_t C, bool want_dadd, bool grouped,
               int threads) {
  const std::vector<int64_t> index = make_index();
  std::vector<int64_t> begin{0}, order;
  for (int64_t a = 0; a < kAdded; ++a) {
    for (int64_t i = a; i < kM; i += kAdded) order.push_back(i);
    begin.push_back(static_cast<int64_t>(order.size()));
  }
  const int64_t rows = want_dadd ? kAdded : kM, per_task = 16;
  const int64_t width = (C + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  const int64_t tasks = (rows + per_task - 1) / per_task;
  Grads out{std::vector<float>(static_cast<size_t>(want_dadd ? kAdded * C : 0), NAN),
            std::vector<float>(static_cast<size_t>(width), NAN)};
  const Block partials(static_cast<size_t>(tasks * width) * sizeof(float));
  ThreadPool pool{threads};
  kKernels.restore_rows_bwd({{dout.data(), C, DType::kFloat32},
                             index.data(),
                             grouped ? begin.data() : nullptr,
                             order.data(),
                             kAdded,
                             kM,
                             C,
                             want_dadd ? out.dadd.data() : nullptr,
                             per_task,
                             static_cast<float*>(partials.data),
                             out.sums.data(),
                             width},
                            pool.pool());
  out.sums.resize(static_cast<size_t>(C));
  return out;
}

bool close(const std::vector<float>& found, const std::vector<double>& want) {
  for (size_t i = 0; i < found.size(); ++i) {
    if (!(std::abs(found[i] - want[i]) < 1e-4)) return false;
  }
  return true;
}

bool check_backward() {
  bool ok = true;
  const std::vector<int64_t> index = make_index();
  for (const int64_t C : {1, 5, 16, 37, 128}) {
    Values values;
    const std::vector<char> dout = values.make(DType::kFloat32, kM * C);
    const auto rows = values_of<float>(dout);
    std::vector<double> dfill(static_cast<size_t>(C)), dadd(static_cast<size_t>(kAdded * C));
    for (int64_t i = 0; i < kM * C; ++i) {
      const double g = rows[static_cast<size_t>(i)];
      if (index[static_cast<size_t>(i / C)] < 0) dfill[static_cast<size_t>(i % C)] += g;
      dadd[static_cast<size_t>(i / C % kAdded * C + i % C)] += g;
    }
    const Grads both = backward(dout, C, true, false, 4);
    ok &= both == backward(dout, C, true, false, 1) && both == backward(dout, C, true, true, 4);
    ok &= close(both.dadd, dadd) && close(both.sums, dfill);
    const Grads fill = backward(dout, C, false, false, 4);
    ok &= fill == backward(dout, C, false, false, 1) && close(fill.sums, dfill);
  }
  return report("restore_rows_bwd", ok);
}

}  // namespace

int main() {
  const bool ok[] = {check_select(), check_gather(), check_restore(), check_backward()};
  return ok[0] && ok[1] && ok[2] && ok[3] ? 0 : 1;
}
