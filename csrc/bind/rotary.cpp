// encfast::rotary on the CPU: checks everything the core relies on, then runs it on new tensors.
//
// The Python function has checked the same with better sentences; this is for compiled graphs and
// direct calls, where a position outside of the tables must end in an exception.
#include "cpu/rotary.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "bind/pool.h"
#include "bind/tensor_util.h"
#include "cpu/isa.h"

namespace encfast {
namespace {

constexpr const char* kOp = "encfast::rotary";

using OptTensor = std::optional<Tensor>;

// x [N, heads, D] with its last dimension contiguous; a view of a fused projection is left in
// place.
Tensor checked_heads(const char* name, const Tensor& x) {
  check_cpu(kOp, name, x);
  check_dim(kOp, name, x, 3);
  STD_TORCH_CHECK(x.size(2) >= 2 && x.size(2) <= kRotaryMaxHeadSize, kOp, ": ", name,
                  " has head size ", x.size(2), ", expected 2..", kRotaryMaxHeadSize);
  return with_inner_contiguous(x, 2);
}

Tensor checked_table(const char* name, const Tensor& table, int64_t head_size) {
  check_cpu(kOp, name, table);
  check_dim(kOp, name, table, 2);
  STD_TORCH_CHECK(table.size(1) >= 1 && 2 * table.size(1) <= head_size, kOp, ": ", name,
                  " has shape ", shape_text(table), ", expected 1..", head_size / 2, " columns");
  return with_inner_contiguous(table, 1);
}

// positions [n] as contiguous int64, each a row of a table of `rows` rows.
Tensor checked_positions(const Tensor& positions, int64_t n, int64_t rows) {
  check_cpu(kOp, "positions", positions);
  check_dim(kOp, "positions", positions, 1);
  const ScalarType dtype = positions.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, kOp,
                  ": positions is not int64 or int32");
  STD_TORCH_CHECK(positions.size(0) == n, kOp, ": positions has ", positions.size(0),
                  " entries, q has ", n, " rows");
  Tensor contiguous = torch::stable::contiguous(to_dtype(positions, ScalarType::Long));
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < rows, kOp, ": positions holds ", values[i],
                    " at ", i, ", the tables have ", rows, " rows");
  }
  return contiguous;
}

RotaryHeads heads_of(const Tensor& x, const Tensor& out) {
  return {{x.const_data_ptr(), x.stride(0), x.stride(1)},
          {out.mutable_data_ptr(), out.stride(0), out.stride(1)},
          x.size(1)};
}

std::tuple<Tensor, Tensor> rotary_cpu(const Tensor& q, const OptTensor& k, const Tensor& cos,
                                      const Tensor& sin, const OptTensor& positions,
                                      bool interleaved, bool conjugate) {
  const Tensor qc = checked_heads("q", q);
  const int64_t n = qc.size(0), head_size = qc.size(2);
  OptTensor kc;
  if (k) {
    kc = checked_heads("k", *k);
    STD_TORCH_CHECK(kc->size(0) == n && kc->size(2) == head_size, kOp, ": k has shape ",
                    shape_text(*k), ", expected rows and head size of q, ", shape_text(q));
    STD_TORCH_CHECK(kc->scalar_type() == qc.scalar_type(), kOp, ": k has another dtype than q");
  }
  const Tensor cosc = checked_table("cos", cos, head_size);
  const Tensor sinc = checked_table("sin", sin, head_size);
  check_same_shape(kOp, "sin", sinc, "cos", cosc);
  STD_TORCH_CHECK(sinc.scalar_type() == cosc.scalar_type(), kOp,
                  ": sin has another dtype than cos");
  OptTensor rows;
  if (positions) {
    rows = checked_positions(*positions, n, cosc.size(0));
  } else {
    STD_TORCH_CHECK(cosc.size(0) == n, kOp, ": cos has ", cosc.size(0), " rows, q has ", n,
                    "; pass positions unless the tables have one row for each");
  }

  Tensor q_out = new_contiguous(q, q.sizes(), q.scalar_type());
  Tensor k_out = kc ? new_contiguous(*kc, kc->sizes(), kc->scalar_type())
                    : new_contiguous(q, {0}, q.scalar_type());
  RotaryParams p{};
  p.dtype = core_dtype(kOp, "q", qc);
  p.q = heads_of(qc, q_out);
  if (kc) p.k = heads_of(*kc, k_out);
  p.table_dtype = core_dtype(kOp, "cos", cosc);
  p.cos = cosc.const_data_ptr();
  p.sin = sinc.const_data_ptr();
  p.cos_stride = cosc.stride(0);
  p.sin_stride = sinc.stride(0);
  p.positions = rows ? rows->const_data_ptr<int64_t>() : nullptr;
  p.N = n;
  p.D = head_size;
  p.pairs = cosc.size(1);
  p.interleaved = interleaved;
  p.conjugate = conjugate;
  TorchPool pool;
  cpu_kernels().rotary.rotate(p, pool.pool());
  return {q_out, k_out};
}

}  // namespace
}  // namespace encfast

STABLE_TORCH_LIBRARY_IMPL(encfast, CPU, m) { m.impl("rotary", TORCH_BOX(&encfast::rotary_cpu)); }
