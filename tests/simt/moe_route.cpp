// The kernels of csrc/cuda/moe_route.cu on the CPU: routers of every size and rule, and sorts whose
// choices lie in one tile or several, against plain loops.
#include "cuda/moe_route.cu"

#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"

namespace {

using namespace encfast;
using check::Array;
using check::Draw;
using check::element_of;

constexpr int64_t kSeed[2] = {(int64_t{9} << 32) | 5, 77};

uint32_t word_of(int64_t row, int64_t column, uint32_t purpose) {
  return draw_word(key_from(kSeed), row, column, purpose);
}

bool near(const char* what, const Array<float>& got, const std::vector<double>& want) {
  for (int64_t i = 0; i < got.size(); ++i) {
    const double right = want[static_cast<size_t>(i)];
    if (std::isnan(right) ? std::isnan(got[i]) : std::abs(got[i] - right) < 1e-6) continue;
    std::fprintf(stderr, "%s: element %lld is %g, not %g\n", what, static_cast<long long>(i),
                 static_cast<double>(got[i]), right);
    return false;
  }
  return true;
}

struct Router {
  int64_t n, experts, k;
  MoeScoring scoring;
  MoeNoise noise;
  bool masked, special;  // NaN, infinities and ties among the logits
};

float draw_logit(Draw& draw, bool special) {
  const float odd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1, -1};
  return special && draw(0, 2) == 0 ? odd[draw(0, 6)] : static_cast<float>(draw(-8, 8)) * 0.25f;
}

// Whether expert a comes before b: larger logits first, NaN last, equals by id.
bool comes_first(const std::vector<float>& x, int64_t a, int64_t b) {
  const float u = x[static_cast<size_t>(a)], v = x[static_cast<size_t>(b)];
  if (std::isnan(u) != std::isnan(v)) return std::isnan(v);
  if (!std::isnan(u) && u != v) return u > v;
  return a < b;
}

std::vector<int64_t> ranked(const std::vector<float>& x) {
  std::vector<int64_t> order;
  for (size_t e = 0; e < x.size(); ++e) order.push_back(static_cast<int64_t>(e));
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return comes_first(x, a, b); });
  return order;
}

std::vector<int32_t> choices_of(const Router& r, int64_t t, const std::vector<float>& x) {
  std::vector<float> noised = x;
  for (int64_t e = 0; e < r.experts && r.noise != MoeNoise::kNone; ++e) {
    const int upper = upper_bits(word_of(t, e, kGumbelDraws));
    noised[static_cast<size_t>(e)] += gumbel_of<DeviceArithmetic>(upper);
  }
  std::vector<int64_t> order = ranked(noised);
  if (r.noise == MoeNoise::kGumbelRest) {
    const int64_t first = ranked(x).front();
    order.erase(std::find(order.begin(), order.end(), first));
    order.insert(order.begin(), first);
  }
  return {order.begin(), order.begin() + r.k};
}

template <class T>
bool check_choose(Draw& draw, DType type, const Router& r) {
  const int64_t stride = r.experts + 3;
  Array<T> logits(r.n * stride);
  Array<uint8_t> mask(r.n);
  std::vector<int32_t> want_ids;
  std::vector<double> want_p;
  for (int64_t t = 0; t < r.n; ++t) {
    std::vector<float> x;
    for (int64_t e = 0; e < stride; ++e) {
      logits[t * stride + e] = element_of<T>(draw_logit(draw, r.special));
      if (e < r.experts) x.push_back(static_cast<float>(logits[t * stride + e]));
    }
    mask[t] = draw(0, 3) != 0;
    const bool token = !r.masked || mask[t];
    const auto ids = choices_of(r, t, x);
    double top = -INFINITY, total = 0;
    for (float v : x) top = std::isnan(v) ? top : std::max(top, static_cast<double>(v));
    for (float v : x) total += std::exp(v - top);
    for (float v : x) {
      const double p =
          r.scoring == MoeScoring::kSoftmax ? std::exp(v - top) / total : 1 / (1 + std::exp(-v));
      want_p.push_back(token ? p : 0);
    }
    for (int32_t e : ids) want_ids.push_back(token ? e : -1);
  }
  Array<int32_t> ids(r.n * r.k);
  Array<float> p(r.n * r.experts);
  moe_choose_cuda(
      {type, logits.data(), stride, r.masked ? mask.data() : nullptr, r.n, r.experts, r.k,
       r.scoring, r.noise, r.noise == MoeNoise::kNone ? nullptr : kSeed, ids.data(), p.data()},
      nullptr);
  return check::equal("expert_ids", ids, want_ids) && near("probabilities", p, want_p);
}

bool check_chooses(Draw& draw) {
  bool ok = true;
  for (int64_t experts : {1, 2, 5, 31, 32, 33, 70}) {
    const int64_t few = std::min<int64_t>(experts, 3);
    for (MoeNoise noise : {MoeNoise::kNone, MoeNoise::kGumbel, MoeNoise::kGumbelRest}) {
      ok &= check_choose<float>(draw, DType::kFloat32,
                                {19, experts, few, MoeScoring::kSoftmax, noise, true, false});
    }
    ok &= check_choose<float>(
        draw, DType::kFloat32,
        {9, experts, experts, MoeScoring::kSoftmax, MoeNoise::kNone, false, true});
    ok &= check_choose<__nv_bfloat16>(
        draw, DType::kBFloat16,
        {9, experts, few, MoeScoring::kSigmoid, MoeNoise::kNone, true, false});
    ok &= check_choose<__half>(
        draw, DType::kFloat16,
        {9, experts, few, MoeScoring::kSigmoid, MoeNoise::kGumbelRest, false, true});
  }
  return ok;
}

struct Sorting {
  int64_t n, experts, k;
  double factor;  // 0: no limit
  int64_t least;
  bool random;
  int64_t used;  // only the first so many experts are chosen
};

bool check_sort(Draw& draw, const Sorting& s) {
  const int64_t choices = s.n * s.k;
  Array<int32_t> ids(choices);
  int64_t tokens = 0;
  for (int64_t t = 0; t < s.n; ++t) {
    const bool token = draw(0, 5) != 0;
    tokens += token;
    const int64_t first = draw(0, s.used - 1);  // neighbours, so that no expert comes twice
    for (int64_t j = 0; j < s.k; ++j) {
      ids[t * s.k + j] = token ? static_cast<int32_t>((first + j) % s.used) : -1;
    }
  }
  int64_t room = choices;
  if (s.factor > 0) {
    const double load = static_cast<double>(tokens) / static_cast<double>(s.experts) * s.factor;
    room = std::max(static_cast<int64_t>(std::ceil(load)), s.least);
  }
  std::vector<int32_t> rows, slots(static_cast<size_t>(choices), -1), ends{0};
  for (int64_t e = 0; e < s.experts; ++e) {
    std::vector<int32_t> queue;  // in the order (rank, token)
    for (int64_t i = 0; i < choices; ++i) {
      const int64_t choice = i % s.n * s.k + i / s.n;
      if (ids[choice] == e) queue.push_back(static_cast<int32_t>(choice));
    }
    const auto rank = [&](int32_t c) { return c % s.k; };
    const auto key = [&](int32_t c) { return word_of(c / s.k, c % s.k, kPriorityDraws) >> 1; };
    if (s.random) {
      std::stable_sort(queue.begin(), queue.end(), [&](int32_t a, int32_t b) {
        return rank(a) != rank(b) ? rank(a) < rank(b) : key(a) < key(b);
      });
    }
    if (static_cast<int64_t>(queue.size()) > room) queue.resize(static_cast<size_t>(room));
    std::sort(queue.begin(), queue.end(),
              [&](int32_t a, int32_t b) { return rank(a) != rank(b) ? rank(a) < rank(b) : a < b; });
    for (int32_t choice : queue) {
      slots[static_cast<size_t>(choice)] = static_cast<int32_t>(rows.size());
      rows.push_back(choice);
    }
    ends.push_back(static_cast<int32_t>(rows.size()));
  }
  rows.resize(static_cast<size_t>(choices), -1);
  Array<int32_t> got_rows(choices), got_slots(choices), got_ends(s.experts + 1);
  Array<int32_t> scratch(moe_sort_scratch(s.n, s.experts, s.k, s.random));
  moe_sort_cuda({ids.data(), s.n, s.experts, s.k, s.factor > 0, s.factor, s.least, s.random,
                 s.random ? kSeed : nullptr, got_rows.data(), got_slots.data(), got_ends.data(),
                 scratch.data()},
                nullptr);
  return check::equal("rows", got_rows, rows) && check::equal("slots", got_slots, slots) &&
         check::equal("cu_seqlens", got_ends, ends);
}

bool check_sorts(Draw& draw) {
  bool ok = check_sort(draw, {0, 3, 2, 0, 0, false, 3});
  for (bool random : {false, true}) {
    ok &= check_sort(draw, {40, 5, 2, 1.0, 0, random, 5});
    ok &= check_sort(draw, {40, 5, 2, 0.3, 0, random, 3});  // experts without a token
    ok &= check_sort(draw, {33, 1, 1, 0.5, 0, random, 1});  // one expert, all at it
    ok &= check_sort(draw, {33, 4, 4, 0.6, 2, random, 4});  // all experts
    ok &= check_sort(draw, {9, 3, 1, 0.1, 50, random, 3});  // room for all
    // Several tiles, whose borders lie within a rank.
    ok &= check_sort(draw, {400, 7, 2, 0.8, 0, random, 7});
    // More choices of the last rank than threads.
    ok &= check_sort(draw, {620, 2, 2, 0.9, 0, random, 2});
  }
  ok &= check_sort(draw, {290, 270, 2, 1.0, 0, false, 270});
  return ok && check_sort(draw, {200, 6, 3, 0, 0, false, 6});
}

struct Weights {
  int64_t n, experts, k;
  MoeRenormalise renormalise;
  MoeScoring scoring;
  bool with_gates, with_p;  // which gradients there are
};

bool check_gates(Draw& draw, const Weights& w) {
  Array<float> p(w.n * w.experts), dgates(w.n * w.k), dp(w.n * w.experts), gates(w.n * w.k),
      dlogits(w.n * w.experts);
  Array<int32_t> ids(w.n * w.k), slots(w.n * w.k);
  for (int64_t i = 0; i < p.size(); ++i) {
    p[i] = static_cast<float>(draw(1, 100)) / 128;
    dp[i] = static_cast<float>(draw(-8, 8)) / 8;
  }
  std::vector<double> want_gates, want;
  for (int64_t t = 0; t < w.n; ++t) {
    const bool token = draw(0, 4) != 0;
    const int64_t first = draw(0, w.experts - 1);
    double total = 0, inner = 0, mean = 0;
    for (int64_t j = 0; j < w.k; ++j) {
      const int64_t c = t * w.k + j, e = (first + j) % w.experts;
      ids[c] = token ? static_cast<int32_t>(e) : -1;
      slots[c] = token && draw(0, 3) != 0 ? static_cast<int32_t>(c) : -1;
      dgates[c] = static_cast<float>(draw(-8, 8)) / 8;
      if (!token) continue;
      if (w.renormalise == MoeRenormalise::kChosen || slots[c] >= 0) total += p[t * w.experts + e];
      if (slots[c] >= 0) inner += static_cast<double>(dgates[c]) * p[t * w.experts + e];
    }
    const bool divided = w.renormalise != MoeRenormalise::kNone && total > 0;
    if (!divided) total = 1;
    const double shared = divided ? inner / total : 0;
    std::vector<double> d;
    for (int64_t e = 0; e < w.experts; ++e) d.push_back(w.with_p ? dp[t * w.experts + e] : 0);
    for (int64_t j = 0; j < w.k; ++j) {
      const int64_t c = t * w.k + j;
      const bool kept = slots[c] >= 0;
      want_gates.push_back(kept ? p[t * w.experts + ids[c]] / total : 0);
      if (!token || !w.with_gates || (!kept && w.renormalise != MoeRenormalise::kChosen)) continue;
      d[static_cast<size_t>(ids[c])] += ((kept ? dgates[c] : 0) - shared) / total;
    }
    for (int64_t e = 0; e < w.experts; ++e)
      mean += p[t * w.experts + e] * d[static_cast<size_t>(e)];
    for (int64_t e = 0; e < w.experts; ++e) {
      const double s = p[t * w.experts + e], g = d[static_cast<size_t>(e)];
      const double grad = w.scoring == MoeScoring::kSoftmax ? s * (g - mean) : s * (1 - s) * g;
      want.push_back(token ? grad : 0);
    }
  }
  moe_gates_cuda(
      {p.data(), ids.data(), slots.data(), w.n, w.experts, w.k, w.renormalise, gates.data()},
      nullptr);
  moe_route_bwd_cuda({w.with_gates ? dgates.data() : nullptr, w.with_p ? dp.data() : nullptr,
                      p.data(), ids.data(), slots.data(), w.n, w.experts, w.k, w.scoring,
                      w.renormalise, DType::kFloat32, dlogits.data()},
                     nullptr);
  for (double& x : want) x /= 16;  // sums of that many terms of their size
  for (int64_t i = 0; i < dlogits.size(); ++i) dlogits[i] /= 16;
  return near("gates", gates, want_gates) && near("dlogits", dlogits, want);
}

bool check_all_gates(Draw& draw) {
  bool ok = true;
  for (auto rule : {MoeRenormalise::kNone, MoeRenormalise::kChosen, MoeRenormalise::kKept}) {
    for (auto scoring : {MoeScoring::kSoftmax, MoeScoring::kSigmoid}) {
      ok &= check_gates(draw, {21, 40, 3, rule, scoring, true, true});
      ok &= check_gates(draw, {9, 4, 4, rule, scoring, true, false});
    }
  }
  return ok &&
         check_gates(draw, {150, 2, 1, MoeRenormalise::kNone, MoeScoring::kSigmoid, false, true});
}

// One token of two choices, of 3 experts.
void sort_with(int32_t a, int32_t b) {
  Array<int32_t> ids(2), rows(2), slots(2), ends(4), scratch(moe_sort_scratch(1, 3, 2, false));
  ids[0] = a;
  ids[1] = b;
  moe_sort_cuda({ids.data(), 1, 3, 2, false, 1, 0, false, nullptr, rows.data(), slots.data(),
                 ends.data(), scratch.data()},
                nullptr);
}

void differentiate_with(int32_t id) {
  Array<int32_t> ids(1), slots(1);
  Array<float> p(3), dgates(1), dlogits(3);
  ids[0] = id;
  slots[0] = 0;
  dgates[0] = 1;
  for (int64_t e = 0; e < 3; ++e) p[e] = 0.25f;
  moe_route_bwd_cuda({dgates.data(), nullptr, p.data(), ids.data(), slots.data(), 1, 3, 1,
                      MoeScoring::kSoftmax, MoeRenormalise::kNone, DType::kFloat32, dlogits.data()},
                     nullptr);
}

}  // namespace

int main(int, char** args) {
  const std::string call = args[1];
  if (call == "bad_id") sort_with(0, 3);
  if (call == "negative_id") sort_with(-2, 0);
  if (call == "bad_gradient_id") differentiate_with(3);
  return check::under_seeds(args, [](Draw& draw) {
    return check_chooses(draw) && check_sorts(draw) && check_all_gates(draw);
  });
}
