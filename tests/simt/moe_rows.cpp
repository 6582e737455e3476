// The kernels of csrc/cuda/moe_rows.cu on the CPU: rows of every type and alignment, against plain
// loops.
#include "cuda/moe_rows.cu"

#include <cmath>
#include <string>

#include "check.h"

namespace {

using namespace encfast;
using check::Array;
using check::Draw;
using check::element_of;

constexpr int64_t kSeed[2] = {(int64_t{9} << 32) | 5, 77};

struct Rows {
  int64_t n, k, channels;
  int64_t gap = 0;    // elements between two rows
  size_t offset = 0;  // bytes from an address aligned to 64
  bool gated = true;

  int64_t stride() const { return channels + gap; }
  int64_t choices() const { return n * k; }
};

// Some choices dropped, the others shuffled.
struct Places {
  Array<int32_t> rows, slots;

  Places(Draw& draw, const Rows& r) : rows(r.choices()), slots(r.choices()) {
    std::vector<int32_t> kept;
    for (int64_t c = 0; c < r.choices(); ++c) {
      rows[c] = slots[c] = -1;
      if (draw(0, 4) != 0) kept.push_back(static_cast<int32_t>(c));
    }
    for (size_t i = kept.size(); i > 1; --i) {
      std::swap(kept[i - 1], kept[static_cast<size_t>(draw(0, static_cast<int64_t>(i) - 1))]);
    }
    for (size_t i = 0; i < kept.size(); ++i) {
      rows[static_cast<int64_t>(i)] = kept[i];
      slots[kept[i]] = static_cast<int32_t>(i);
    }
  }
};

// Small integers: every product and sum is exact.
template <class T>
void fill(Draw& draw, Array<T>& x) {
  for (int64_t i = 0; i < x.size(); ++i) x[i] = element_of<T>(static_cast<double>(draw(-3, 3)));
}

template <class T>
bool check_rows(Draw& draw, DType type, const Rows& r) {
  const Places places(draw, r);
  const int64_t m = r.choices(), C = r.channels;
  Array<T> x(r.n * r.stride(), r.offset), y(m * r.stride(), r.offset);
  Array<float> gates(m);
  fill(draw, x);
  fill(draw, y);
  fill(draw, gates);
  std::vector<T> moved, sums, dy;
  std::vector<float> dgates(static_cast<size_t>(m), 0.0f);
  const auto token = [&](int64_t choice, int64_t c) {
    return static_cast<float>(x[choice / r.k * r.stride() + c]);
  };
  for (int64_t s = 0; s < m; ++s) {
    const int64_t choice = places.rows[s];
    for (int64_t c = 0; c < C; ++c) {
      const float value = choice < 0 ? 0 : token(choice, c);
      moved.push_back(element_of<T>(value));
      dy.push_back(element_of<T>(choice < 0 ? 0 : value * gates[choice]));
      if (choice < 0) continue;
      dgates[static_cast<size_t>(choice)] += value * static_cast<float>(y[s * r.stride() + c]);
    }
  }
  for (int64_t t = 0; t < r.n; ++t) {
    for (int64_t c = 0; c < C; ++c) {
      float sum = 0;
      for (int64_t j = 0; j < r.k; ++j) {
        const int64_t choice = t * r.k + j, slot = places.slots[choice];
        if (slot < 0) continue;
        sum += (r.gated ? gates[choice] : 1) * static_cast<float>(y[slot * r.stride() + c]);
      }
      sums.push_back(element_of<T>(sum));
    }
  }
  Array<T> got_moved(m * C, r.offset), got_sums(r.n * C, r.offset), got_dy(m * C, r.offset);
  Array<float> got_dgates(m);
  moe_permute_cuda({type, x.data(), places.rows.data(), got_moved.data(), r.n, r.k, C, r.stride()},
                   nullptr);
  moe_unpermute_cuda({type, y.data(), r.gated ? gates.data() : nullptr, places.slots.data(),
                      got_sums.data(), r.n, r.k, C, r.stride()},
                     nullptr);
  moe_unpermute_bwd_cuda(
      {type, x.data(), y.data(), gates.data(), places.rows.data(), places.slots.data(),
       got_dy.data(), got_dgates.data(), r.n, r.k, C, r.stride(), r.stride()},
      nullptr);
  return check::equal("permute", got_moved, moved) && check::equal("unpermute", got_sums, sums) &&
         check::equal("dy", got_dy, dy) && check::equal("dgates", got_dgates, dgates);
}

template <class T>
bool check_jitter(Draw& draw, DType type, int64_t channels) {
  constexpr int64_t kRows = 5;
  const int64_t stride = channels + 2;
  Array<T> x(kRows * stride), out(kRows * channels);
  fill(draw, x);
  std::vector<T> want;
  for (int64_t t = 0; t < kRows; ++t) {
    for (int64_t c = 0; c < channels; ++c) {
      const uint32_t word = draw_word(key_from(kSeed), t, c, kJitterDraws);
      const double u = (2.0 * (word >> 9) + 1) * 0x1p-24;  // exact, and so is 2 u - 1
      const float centred = static_cast<float>(2 * u - 1), step = centred * 0.25f;
      want.push_back(element_of<T>(static_cast<float>(x[t * stride + c]) * (1.0f + step)));
    }
  }
  moe_jitter_cuda({type, x.data(), kSeed, 0.25f, out.data(), kRows, channels, stride}, nullptr);
  return check::equal("jitter", out, want);
}

template <class T>
bool check_type(Draw& draw, DType type) {
  bool ok = check_rows<T>(draw, type, {13, 2, 16});
  ok &= check_rows<T>(draw, type, {9, 3, 16, 0, 0, false});
  ok &= check_rows<T>(draw, type, {9, 1, 24, 8});
  ok &= check_rows<T>(draw, type, {9, 2, 24, 3});     // rows aligned to an element
  ok &= check_rows<T>(draw, type, {9, 2, 16, 0, 4});  // an address that is
  ok &= check_rows<T>(draw, type, {5, 4, 1});
  ok &= check_rows<T>(draw, type, {4, 2, 1040});  // longer than a block's vectors
  return ok && check_jitter<T>(draw, type, 1) && check_jitter<T>(draw, type, 37) &&
         check_jitter<T>(draw, type, 1100);
}

// Two tokens of one choice each.
void move_with(int32_t place, bool back, bool gradient) {
  Array<float> x(8), y(8), out(8), dgates(2), gates(2);
  Array<int32_t> rows(2), slots(2);
  rows[0] = slots[0] = place;
  rows[1] = slots[1] = -1;
  if (gradient) {
    moe_unpermute_bwd_cuda({DType::kFloat32, x.data(), y.data(), gates.data(), rows.data(),
                            slots.data(), out.data(), dgates.data(), 2, 1, 4, 4, 4},
                           nullptr);
  } else if (back) {
    moe_unpermute_cuda({DType::kFloat32, y.data(), nullptr, slots.data(), out.data(), 2, 1, 4, 4},
                       nullptr);
  } else {
    moe_permute_cuda({DType::kFloat32, x.data(), rows.data(), out.data(), 2, 1, 4, 4}, nullptr);
  }
}

}  // namespace

int main(int, char** args) {
  const std::string call = args[1];
  if (call == "bad_row") move_with(2, false, false);
  if (call == "negative_row") move_with(-2, false, false);
  if (call == "bad_slot") move_with(2, true, false);
  if (call == "bad_gradient_row") move_with(2, false, true);
  return check::under_seeds(args, [](Draw& draw) {
    return check_type<float>(draw, DType::kFloat32) &&
           check_type<__nv_bfloat16>(draw, DType::kBFloat16) &&
           check_type<__half>(draw, DType::kFloat16);
  });
}
