// Runs the moe_route core of one instruction set without PyTorch (sanitize.h): against plain loops,
// 1 thread equal to 4, every output written.
#include "common/moe_noise.h"
#include "sanitize.h"

namespace {

using namespace encfast;

constexpr const MoeRouteKernels& kKernels = ENCFAST_ISA::kMoeRoute;
constexpr PhiloxKey kKey = {{17, 4}};

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

size_t at(int64_t i) { return static_cast<size_t>(i); }

// ---- choices and gates ----

struct Case {
  int64_t N, E, K;
  MoeScoring scoring;
  MoeNoise noise;
};

struct Choices {
  std::vector<int32_t> ids;
  std::vector<float> p;
  bool operator==(const Choices& other) const { return ids == other.ids && p == other.p; }
};

bool is_token(int64_t t) { return t % 7 != 3; }

Choices choose(const Case& c, DType dtype, const std::vector<char>& logits, int threads) {
  std::vector<uint8_t> mask;
  for (int64_t t = 0; t < c.N; ++t) mask.push_back(is_token(t));
  Choices out{std::vector<int32_t>(at(c.N * c.K), -7), std::vector<float>(at(c.N * c.E), NAN)};
  const int64_t row_floats = (c.E + kMoeStep - 1) / kMoeStep * kMoeStep;
  const Block workspace(at(kChooseRows * row_floats * threads) * sizeof(float));
  ThreadPool pool{threads};
  kKernels.choose({{logits.data(), c.E, dtype},
                   mask.data(),
                   c.N,
                   c.E,
                   c.K,
                   c.scoring,
                   c.noise,
                   kKey,
                   out.ids.data(),
                   out.p.data(),
                   static_cast<float*>(workspace.data),
                   row_floats},
                  pool.pool());
  return out;
}

struct ScalarArithmetic {
  using Float = float;
  using Int = int32_t;
  static float splat(float x) { return x; }
  static float to_float(int32_t x) { return static_cast<float>(x); }
  static float times(float a, float b) {
    volatile float product = a * b;  // not fused with what follows
    return product;
  }
  static float plus(float a, float b) { return a + b; }
  static int32_t bits(float x) {
    int32_t out;
    std::memcpy(&out, &x, 4);
    return out;
  }
  static float from_bits(int32_t x) {
    float out;
    std::memcpy(&out, &x, 4);
    return out;
  }
};

uint32_t word_of(int64_t row, int64_t column, uint32_t purpose) {
  uint32_t words[4];
  draw_words(kKey, static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), purpose, words);
  return words[column % 4];
}

bool right_choices(const Case& c, const std::vector<float>& logits, const Choices& found) {
  for (int64_t t = 0; t < c.N; ++t) {
    std::vector<float> ranked;
    double total = 0;
    for (int64_t e = 0; e < c.E; ++e) {
      const float x = logits[at(t * c.E + e)];
      const auto upper = static_cast<int32_t>(word_of(t, e, kGumbelDraws) >> 9);
      ranked.push_back(c.noise == MoeNoise::kNone ? x : x + gumbel_of<ScalarArithmetic>(upper));
      total += std::exp(static_cast<double>(x));
    }
    for (int64_t e = 0; e < c.E; ++e) {
      const double x = logits[at(t * c.E + e)];
      const double softmax = std::exp(x) / total, sigmoid = 1 / (1 + std::exp(-x));
      const double want = c.scoring == MoeScoring::kSoftmax ? softmax : sigmoid;
      if (!(std::abs(found.p[at(t * c.E + e)] - (is_token(t) ? want : 0)) < 1e-6)) return false;
    }
    std::vector<bool> taken(at(c.E));
    for (int64_t j = 0; j < c.K; ++j) {
      int64_t best = -1;
      const bool noised = c.noise != MoeNoise::kGumbelRest || j > 0;
      const auto value = [&](int64_t e) {
        return noised ? ranked[at(e)] : logits[at(t * c.E + e)];
      };
      for (int64_t e = 0; e < c.E; ++e) {
        if (!taken[at(e)] && (best < 0 || value(e) > value(best))) best = e;
      }
      taken[at(best)] = true;
      if (found.ids[at(t * c.K + j)] != (is_token(t) ? best : -1)) return false;
    }
  }
  return true;
}

bool check_choose() {
  bool ok = true;
  for (const int64_t E : {1, 3, 8, 16, 17, 64, 70}) {
    for (const MoeNoise noise : {MoeNoise::kNone, MoeNoise::kGumbel, MoeNoise::kGumbelRest}) {
      for (const MoeScoring scoring : {MoeScoring::kSoftmax, MoeScoring::kSigmoid}) {
        const Case c{150, E, E < 3 ? E : 3, scoring, noise};
        Values values;
        const std::vector<char> logits = values.make(DType::kFloat32, c.N * E);
        const Choices found = choose(c, DType::kFloat32, logits, 4);
        ok &= found == choose(c, DType::kFloat32, logits, 1);
        ok &= right_choices(c, values_of<float>(logits), found);
      }
    }
    const Case c{20, E, E, MoeScoring::kSoftmax, MoeNoise::kNone};  // every expert
    Values values;
    const std::vector<char> logits = values.make(DType::kBFloat16, c.N * E);
    const Choices found = choose(c, DType::kBFloat16, logits, 4);
    for (float p : found.p) ok &= !std::isnan(p);
    for (int32_t e : found.ids) ok &= e >= -1 && e < E;
  }
  return report("choose", ok);
}

std::vector<float> gates(const Case& c, const Choices& chosen, const std::vector<int32_t>& slots,
                         MoeRenormalise renormalise, int threads) {
  std::vector<float> out(at(c.N * c.K), NAN);
  ThreadPool pool{threads};
  kKernels.gates(
      {chosen.p.data(), chosen.ids.data(), slots.data(), c.N, c.E, c.K, renormalise, out.data()},
      pool.pool());
  return out;
}

std::vector<char> backward(const Case& c, const Choices& chosen, const std::vector<int32_t>& slots,
                           MoeRenormalise renormalise, DType dtype, int threads) {
  Values values;
  const auto dgates = values_of<float>(values.make(DType::kFloat32, c.N * c.K));
  const auto dp = values_of<float>(values.make(DType::kFloat32, c.N * c.E));
  std::vector<char> out = nan_filled(c.N * c.E, size_of(dtype));
  const int64_t row_floats = (c.E + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  const Block workspace(at(row_floats * threads) * sizeof(float));
  ThreadPool pool{threads};
  kKernels.route_bwd({dgates.data(),
                      dp.data(),
                      chosen.p.data(),
                      chosen.ids.data(),
                      slots.data(),
                      c.N,
                      c.E,
                      c.K,
                      c.scoring,
                      renormalise,
                      {out.data(), c.E, dtype},
                      static_cast<float*>(workspace.data),
                      row_floats},
                     pool.pool());
  return out;
}

bool check_gates() {
  bool ok = true;
  for (const int64_t E : {3, 17, 64}) {
    const Case c{150, E, 3, MoeScoring::kSoftmax, MoeNoise::kNone};
    Values values;
    const Choices chosen = choose(c, DType::kFloat32, values.make(DType::kFloat32, c.N * E), 1);
    std::vector<int32_t> slots;
    for (int64_t i = 0; i < c.N * c.K; ++i) {
      slots.push_back(chosen.ids[at(i)] < 0 || i % 5 == 2 ? -1 : static_cast<int32_t>(i));
    }
    for (const auto renormalise :
         {MoeRenormalise::kNone, MoeRenormalise::kChosen, MoeRenormalise::kKept}) {
      const std::vector<float> found = gates(c, chosen, slots, renormalise, 4);
      ok &= found == gates(c, chosen, slots, renormalise, 1);
      for (int64_t t = 0; t < c.N; ++t) {
        double total = 0;
        for (int64_t j = 0; j < c.K && is_token(t); ++j) {
          const bool counts = renormalise == MoeRenormalise::kChosen || slots[at(t * c.K + j)] >= 0;
          if (counts) total += chosen.p[at(t * E + chosen.ids[at(t * c.K + j)])];
        }
        if (renormalise == MoeRenormalise::kNone) total = 1;
        for (int64_t j = 0; j < c.K; ++j) {
          double want = 0;
          if (slots[at(t * c.K + j)] >= 0) {
            want = chosen.p[at(t * E + chosen.ids[at(t * c.K + j)])] / total;
          }
          ok &= std::abs(found[at(t * c.K + j)] - want) < 1e-6;
        }
      }
      for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
        const auto grads = backward(c, chosen, slots, renormalise, dtype, 4);
        ok &= grads == backward(c, chosen, slots, renormalise, dtype, 1);
        ok &= all_written(dtype, grads);
      }
    }
  }
  return report("gates and backward", ok);
}

// ---- sort ----

struct Places {
  std::vector<int32_t> rows, slots, ends;
  bool operator==(const Places& other) const {
    return rows == other.rows && slots == other.slots && ends == other.ends;
  }
};

struct Sorting {
  int64_t N, E, K;
  bool limited;
  double factor;
  bool random;
};

std::vector<int32_t> make_ids(const Sorting& s) {
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < s.N; ++t) {
    const uint64_t first = static_cast<uint64_t>(t) * 2654435761u >> 7;
    for (int64_t j = 0; j < s.K; ++j) {
      const auto e = static_cast<int32_t>((first + at(j)) % static_cast<uint64_t>(s.E));
      ids.push_back(is_token(t) ? (t % 3 ? e : static_cast<int32_t>(j)) : -1);
    }
  }
  return ids;
}

Places sort(const Sorting& s, const std::vector<int32_t>& ids, int threads) {
  const int64_t choices = s.N * s.K, per_tile = 100, tiles = (choices + per_tile - 1) / per_tile;
  const int64_t stride = (s.N + kMoeStep + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  Places out{std::vector<int32_t>(at(choices), -7), std::vector<int32_t>(at(choices), -7),
             std::vector<int32_t>(at(s.E + 1), -7)};
  std::vector<int32_t> histograms(at(tiles * s.E)), all(at(s.E + 1)), sorted(at(choices));
  const Block keys(at(stride * threads) * sizeof(int32_t));
  ThreadPool pool{threads};
  kKernels.sort({ids.data(), s.N, s.E, s.K, s.limited, s.factor, 2, s.random, kKey, out.rows.data(),
                 out.slots.data(), out.ends.data(), tiles, per_tile, histograms.data(), all.data(),
                 sorted.data(), static_cast<int32_t*>(keys.data), stride},
                pool.pool());
  return out;
}

Places plainly_sorted(const Sorting& s, const std::vector<int32_t>& ids) {
  struct Choice {
    int64_t j, key, t;
  };
  Places out{{}, std::vector<int32_t>(at(s.N * s.K), -1), {0}};
  int64_t tokens = 0;
  for (int64_t t = 0; t < s.N; ++t) tokens += is_token(t);
  const double load = static_cast<double>(tokens) / static_cast<double>(s.E) * s.factor;
  const auto room = s.limited ? static_cast<int64_t>(std::max(std::ceil(load), 2.0)) : s.N * s.K;
  for (int64_t e = 0; e < s.E; ++e) {
    std::vector<Choice> queue;
    for (int64_t t = 0; t < s.N; ++t) {
      for (int64_t j = 0; j < s.K; ++j) {
        if (ids[at(t * s.K + j)] != e) continue;
        queue.push_back({j, s.random ? word_of(t, j, kPriorityDraws) >> 1 : 0, t});
      }
    }
    std::stable_sort(queue.begin(), queue.end(), [](const Choice& a, const Choice& b) {
      return a.j != b.j ? a.j < b.j : a.key < b.key;
    });
    queue.resize(std::min(queue.size(), at(room)));
    std::stable_sort(queue.begin(), queue.end(), [](const Choice& a, const Choice& b) {
      return a.j != b.j ? a.j < b.j : a.t < b.t;
    });
    for (const Choice& c : queue) {
      out.slots[at(c.t * s.K + c.j)] = static_cast<int32_t>(out.rows.size());
      out.rows.push_back(static_cast<int32_t>(c.t * s.K + c.j));
    }
    out.ends.push_back(static_cast<int32_t>(out.rows.size()));
  }
  out.rows.resize(at(s.N * s.K), -1);
  return out;
}

bool check_sort() {
  bool ok = true;
  for (const int64_t E : {1, 3, 8, 70}) {
    for (const int64_t K : {1, 2, 3}) {
      if (K > E) continue;
      for (const double factor : {0.0, 0.3, 1.0, 1.5}) {
        for (const bool random : {false, true}) {
          const Sorting s{330, E, K, factor > 0, factor, random && factor > 0};
          const std::vector<int32_t> ids = make_ids(s);
          const Places found = sort(s, ids, 4);
          ok &= found == sort(s, ids, 1) && found == plainly_sorted(s, ids);
        }
      }
    }
  }
  const Sorting nothing{0, 4, 2, false, 0, false};
  ok &= sort(nothing, {}, 2).ends == std::vector<int32_t>(5, 0);
  return report("sort", ok);
}

// ---- rows ----

bool check_rows_of(int64_t C, int64_t K) {
  const Sorting s{90, 9, K, true, 0.7 * static_cast<double>(K), false};
  const Places places = plainly_sorted(s, make_ids(s));
  const int64_t M = s.N * K;
  Values values;
  const std::vector<char> x = values.make(DType::kFloat32, s.N * C);
  const std::vector<char> y = values.make(DType::kFloat32, M * C);
  const auto weights = values_of<float>(values.make(DType::kFloat32, M));
  const auto tokens = values_of<float>(x), rows = values_of<float>(y);
  const auto permute = [&](int threads) {
    std::vector<char> out = nan_filled(M * C, 4);
    ThreadPool pool{threads};
    kKernels.permute({{x.data(), C, DType::kFloat32},
                      places.rows.data(),
                      {out.data(), C, DType::kFloat32},
                      M,
                      K,
                      C,
                      7},
                     pool.pool());
    return out;
  };
  const auto unpermute = [&](DType dtype, const std::vector<char>& from, bool gated, int threads) {
    std::vector<char> out = nan_filled(s.N * C, size_of(dtype));
    const int64_t row_floats = (C + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
    const Block workspace(at(row_floats * threads) * sizeof(float));
    ThreadPool pool{threads};
    kKernels.unpermute({{from.data(), C, dtype},
                        gated ? weights.data() : nullptr,
                        places.slots.data(),
                        {out.data(), C, dtype},
                        s.N,
                        K,
                        C,
                        7,
                        static_cast<float*>(workspace.data),
                        row_floats},
                       pool.pool());
    return out;
  };
  bool ok = permute(4) == permute(1);
  const auto moved = values_of<float>(permute(4));
  for (int64_t i = 0; i < M * C; ++i) {
    const int32_t choice = places.rows[at(i / C)];
    ok &= moved[at(i)] == (choice < 0 ? 0.0f : tokens[at(choice / K * C + i % C)]);
  }
  for (const bool gated : {false, true}) {
    const auto out = unpermute(DType::kFloat32, y, gated, 4);
    ok &= out == unpermute(DType::kFloat32, y, gated, 1);
    const auto found = values_of<float>(out);
    for (int64_t i = 0; i < s.N * C; ++i) {
      double want = 0;
      for (int64_t j = 0; j < K; ++j) {
        const int64_t choice = i / C * K + j;
        if (places.slots[at(choice)] < 0) continue;
        const double gate = gated ? weights[at(choice)] : 1;
        want += gate * rows[at(places.slots[at(choice)] * C + i % C)];
      }
      ok &= std::abs(found[at(i)] - want) < 1e-5;
    }
  }
  ok &= all_written(DType::kBFloat16,
                    unpermute(DType::kBFloat16, values.make(DType::kBFloat16, M * C), true, 4));
  const auto gradient = [&](int threads) {
    std::vector<float> dy(at(M * C), NAN), dgates(at(M), 0);
    ThreadPool pool{threads};
    kKernels.unpermute_bwd({{x.data(), C, DType::kFloat32},
                            {y.data(), C, DType::kFloat32},
                            weights.data(),
                            places.rows.data(),
                            {dy.data(), C, DType::kFloat32},
                            dgates.data(),
                            M,
                            K,
                            C,
                            7},
                           pool.pool());
    dy.insert(dy.end(), dgates.begin(), dgates.end());
    return dy;
  };
  const std::vector<float> found = gradient(4);
  ok &= found == gradient(1);
  for (int64_t slot = 0; slot < M; ++slot) {
    const int32_t choice = places.rows[at(slot)];
    double dot = 0;
    for (int64_t c = 0; c < C; ++c) {
      const float dout = choice < 0 ? 0 : tokens[at(choice / K * C + c)];
      ok &= found[at(slot * C + c)] == (choice < 0 ? 0 : dout * weights[at(choice)]);
      dot += static_cast<double>(dout) * rows[at(slot * C + c)];
    }
    if (choice >= 0) ok &= std::abs(found[at(M * C + choice)] - dot) < 1e-4;
  }
  return ok;
}

bool check_rows() {
  bool ok = true;
  for (const int64_t C : {1, 5, 16, 37, 128}) {
    for (const int64_t K : {1, 2, 5, 9}) ok &= check_rows_of(C, K);
  }
  return report("permute and unpermute", ok);
}

bool check_jitter() {
  bool ok = true;
  for (const int64_t C : {1, 16, 63, 64, 130}) {
    Values values;
    const std::vector<char> x = values.make(DType::kFloat32, 20 * C);
    const auto jitter = [&](int threads) {
      std::vector<char> out = nan_filled(20 * C, 4);
      ThreadPool pool{threads};
      kKernels.jitter(
          {{x.data(), C, DType::kFloat32}, {out.data(), C, DType::kFloat32}, kKey, 0.1f, 20, C, 3},
          pool.pool());
      return out;
    };
    ok &= jitter(4) == jitter(1);
    const auto found = values_of<float>(jitter(4)), in = values_of<float>(x);
    for (int64_t i = 0; i < 20 * C; ++i) {
      const auto upper = static_cast<int32_t>(word_of(i / C, i % C, kJitterDraws) >> 9);
      ok &= found[at(i)] == in[at(i)] * jitter_of<ScalarArithmetic>(upper, 0.1f);
    }
  }
  return report("jitter", ok);
}

}  // namespace

int main() {
  const bool ok[] = {check_choose(), check_gates(), check_sort(), check_rows(), check_jitter()};
  return ok[0] && ok[1] && ok[2] && ok[3] && ok[4] ? 0 : 1;
}
