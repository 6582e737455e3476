// The kernels of csrc/cuda/restore_rows.cu on the CPU: every type of rows and parameters, rows that
// are whole vectors and others, sums in one stage and in two, against plain loops.
#include "cuda/restore_rows.cu"

#include "check.h"

namespace {

using namespace encfast;
using check::Array;
using check::Draw;
using check::element_of;

template <class T>
constexpr DType kTypeOf = DType::kFloat32;
template <>
constexpr DType kTypeOf<__nv_bfloat16> = DType::kBFloat16;
template <>
constexpr DType kTypeOf<__half> = DType::kFloat16;

// Small integers, which add without rounding in every type.
template <class T>
void fill_with_integers(Draw& draw, Array<T>& x) {
  for (int64_t i = 0; i < x.size(); ++i) {
    x[i] = element_of<T>(static_cast<double>(draw(-8, 8)));
  }
}

struct Layout {
  int64_t channels;
  int64_t gap = 0;    // elements between two rows
  size_t offset = 0;  // bytes from an address aligned to 64
  int64_t stride() const { return channels + gap; }
  int64_t elements(int64_t rows) const { return rows ? (rows - 1) * stride() + channels : 0; }
};

template <class T, class Add>
bool check_restore(Draw& draw, int64_t m, int64_t n, int64_t n_add, const Layout& at,
                   bool add_index) {
  const int64_t C = at.channels;
  Array<T> x(at.elements(n), at.offset), out(m * C, at.offset);
  Array<float> fill(C, at.offset);
  Array<Add> add(at.elements(n_add), at.offset);
  fill_with_integers(draw, x);
  fill_with_integers(draw, fill);
  fill_with_integers(draw, add);
  Array<int64_t> index(m), added(m);
  const bool has_fill = draw(0, 3) != 0;
  std::vector<T> want;
  for (int64_t i = 0; i < m; ++i) {
    index[i] = draw(-1, n - 1);
    added[i] = n_add ? add_index ? draw(0, n_add - 1) : i % n_add : -1;
    for (int64_t c = 0; c < C; ++c) {
      float sum = index[i] >= 0 ? static_cast<float>(x[index[i] * at.stride() + c])
                  : has_fill    ? fill[c]
                                : 0;
      if (n_add) sum += static_cast<float>(add[added[i] * at.stride() + c]);
      want.push_back(element_of<T>(sum));
    }
  }
  restore_rows_cuda(
      {kTypeOf<T>, kTypeOf<Add>, x.data(), index.data(), has_fill ? fill.data() : nullptr,
       n_add ? add.data() : nullptr, add_index ? added.data() : nullptr, out.data(), m, n, n_add, C,
       at.stride(), at.stride()},
      nullptr);
  return check::equal("restore_rows", out, want);
}

template <class T, class Add>
bool check_restores_of(Draw& draw) {
  bool ok = true;
  for (const Layout& at : {Layout{1}, Layout{16}, Layout{37}, Layout{48, 16}, Layout{16, 1},
                           Layout{16, 0, 4}, Layout{2056}}) {
    ok &= check_restore<T, Add>(draw, 12, 5, 4, at, false);
    ok &= check_restore<T, Add>(draw, 11, 5, 3, at, true);
  }
  ok &= check_restore<T, Add>(draw, 9, 0, 0, {16}, false);  // no rows but fill's
  return ok && check_restore<T, Add>(draw, 0, 3, 2, {16}, false);
}

bool check_restores(Draw& draw) {
  return check_restores_of<float, float>(draw) && check_restores_of<__nv_bfloat16, float>(draw) &&
         check_restores_of<float, __nv_bfloat16>(draw) && check_restores_of<__half, __half>(draw) &&
         check_restore<float, float>(draw, 3, 5, 1, {0}, false);
}

// 1 + 2^-8 + 2^-16 in bfloat16: an addend rounded first would leave a tie, and 1.
bool check_one_rounding() {
  Array<__nv_bfloat16> x(1), out(1);
  Array<float> add(1);
  Array<int64_t> index(1);
  x[0] = element_of<__nv_bfloat16>(1);
  add[0] = 0x1.01p-8f;
  index[0] = 0;
  restore_rows_cuda({DType::kBFloat16, DType::kFloat32, x.data(), index.data(), nullptr, add.data(),
                     nullptr, out.data(), 1, 1, 1, 1, 1, 1},
                    nullptr);
  return check::equal("one rounding", out, {element_of<__nv_bfloat16>(1.0078125)});
}

// What a backward reads, and room for what it writes.
template <class T>
struct Backward {
  Backward(int64_t m, int64_t n_add, const Layout& at)
      : m(m),
        n_add(n_add),
        at(at),
        dout(at.elements(m), at.offset),
        index(m),
        sorted(m),
        order(m),
        begin(n_add + 1),
        partials(restore_rows_bwd_scratch(m, n_add, at.channels)),
        dfill(at.channels),
        dadd(n_add * at.channels) {}

  void run(bool want_dfill, bool want_dadd, bool add_index) {
    restore_rows_bwd_cuda({kTypeOf<T>, dout.data(), index.data(),
                           add_index ? sorted.data() : nullptr, add_index ? order.data() : nullptr,
                           begin.data(), partials.data(), want_dfill ? dfill.data() : nullptr,
                           want_dadd ? dadd.data() : nullptr, m, n_add, at.channels, at.stride()},
                          nullptr);
  }

  // Draws the indices; returns that of each row of dout into `add`.
  std::vector<int64_t> draw_indices(Draw& draw, bool add_index) {
    std::vector<std::pair<int64_t, int64_t>> places;
    std::vector<int64_t> added;
    for (int64_t i = 0; i < m; ++i) {
      index[i] = draw(-1, 1);
      added.push_back(add_index ? draw(0, n_add - 1) : n_add ? i % n_add : 0);
      places.push_back({added.back(), i});
    }
    std::sort(places.begin(), places.end());
    for (int64_t j = 0; j < m; ++j) {
      sorted[j] = places[static_cast<size_t>(j)].first;
      order[j] = places[static_cast<size_t>(j)].second;
    }
    return added;
  }

  int64_t m, n_add;
  Layout at;
  Array<T> dout;
  Array<int64_t> index, sorted, order, begin;
  Array<float> partials, dfill, dadd;
};

template <class T>
bool check_backward(Draw& draw, int64_t m, int64_t n_add, const Layout& at, bool add_index) {
  const int64_t C = at.channels;
  Backward<T> run(m, n_add, at);
  fill_with_integers(draw, run.dout);
  const std::vector<int64_t> added = run.draw_indices(draw, add_index);
  std::vector<float> dfill(static_cast<size_t>(C)), dadd(static_cast<size_t>(n_add * C));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < C; ++c) {
      const auto value = static_cast<float>(run.dout[i * at.stride() + c]);
      if (run.index[i] < 0) dfill[static_cast<size_t>(c)] += value;
      if (n_add) dadd[static_cast<size_t>(added[static_cast<size_t>(i)] * C + c)] += value;
    }
  }
  run.run(true, true, add_index);
  return check::equal("dfill", run.dfill, dfill) && check::equal("dadd", run.dadd, dadd);
}

template <class T>
bool check_backwards_of(Draw& draw) {
  bool ok = true;
  for (const Layout& at : {Layout{1}, Layout{16}, Layout{37}, Layout{264}, Layout{48, 16},
                           Layout{16, 1}, Layout{16, 0, 4}}) {
    ok &= check_backward<T>(draw, 12, 4, at, false) && check_backward<T>(draw, 11, 3, at, true);
  }
  // Splits: of dfill and of a single row of add, of both rows of two, of rows in uneven use.
  ok &= check_backward<T>(draw, 301, 1, {16}, false) && check_backward<T>(draw, 300, 2, {8}, false);
  return ok && check_backward<T>(draw, 299, 2, {37}, true);
}

bool check_backwards(Draw& draw) {
  bool ok = check_backwards_of<float>(draw) && check_backwards_of<__nv_bfloat16>(draw);
  ok &= check_backward<__half>(draw, 11, 3, {16}, true) &&
        check_backward<__half>(draw, 12, 4, {16, 1}, false);
  // No rows, none to add to, no channels.
  ok &=
      check_backward<float>(draw, 0, 3, {8}, false) && check_backward<float>(draw, 0, 3, {8}, true);
  return ok && check_backward<float>(draw, 5, 0, {8}, false) &&
         check_backward<float>(draw, 4, 2, {0}, false);
}

// What is not wanted is not written, nor missed.
bool check_single_gradients(Draw& draw) {
  Backward<float> run(6, 2, {8});
  fill_with_integers(draw, run.dout);
  run.draw_indices(draw, false);
  const std::vector<float> unwritten(run.dadd.data(), run.dadd.data() + run.dadd.size());
  run.run(true, false, false);
  if (!check::equal("dadd, not wanted", run.dadd, unwritten)) return false;
  const std::vector<float> dfill(run.dfill.data(), run.dfill.data() + run.dfill.size());
  run.run(false, true, false);
  return check::equal("dfill, not wanted", run.dfill, dfill) && run.dadd[0] == run.dadd[0];
}

// Sums of any numbers have the same bits whether rows move in vectors or in elements.
bool check_same_bits(Draw& draw) {
  Backward<float> vectors(300, 2, {16}), elements(300, 2, {16, 1});
  vectors.draw_indices(draw, false);
  for (int64_t i = 0; i < 300; ++i) {
    elements.index[i] = vectors.index[i];
    for (int64_t c = 0; c < 16; ++c) {
      const float x = static_cast<float>(draw(-1000000, 1000000)) * 1e-3f;
      vectors.dout[i * 16 + c] = elements.dout[i * 17 + c] = x;
    }
  }
  vectors.run(true, true, false);
  elements.run(true, true, false);
  return check::equal("the same bits: dfill", vectors.dfill,
                      {elements.dfill.data(), elements.dfill.data() + 16}) &&
         check::equal("the same bits: dadd", vectors.dadd,
                      {elements.dadd.data(), elements.dadd.data() + 32});
}

// Row 3 of 3 does not exist.
void restore_out_of_range(int64_t index_value, int64_t add_index_value) {
  Array<float> x(3 * 4), add(3 * 4), out(4);
  Array<int64_t> index(1), add_index(1);
  index[0] = index_value;
  add_index[0] = add_index_value;
  restore_rows_cuda({DType::kFloat32, DType::kFloat32, x.data(), index.data(), nullptr, add.data(),
                     add_index.data(), out.data(), 1, 3, 3, 4, 4, 4},
                    nullptr);
}

void backward_out_of_range() {
  Backward<float> run(1, 3, {4});
  run.sorted[0] = 3;
  run.order[0] = 0;
  run.run(false, true, true);
}

}  // namespace

int main(int, char** args) {
  if (std::strcmp(args[1], "bad_index") == 0) restore_out_of_range(3, 0);
  if (std::strcmp(args[1], "bad_add_index") == 0) restore_out_of_range(0, 3);
  if (std::strcmp(args[1], "bad_sorted_index") == 0) backward_out_of_range();
  return check::under_seeds(args, [](Draw& draw) {
    return check_restores(draw) && check_one_rounding() && check_backwards(draw) &&
           check_single_gradients(draw) && check_same_bits(draw);
  });
}
