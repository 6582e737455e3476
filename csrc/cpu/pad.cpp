// Row gather: out[i] = src[index[i]], zeros for a negative index. Pure memory traffic, row_bytes
// read and written per row; long rows are the common case (a hidden state is 1.5 to 8 KiB), so each
// is copied as a whole while the next one is fetched.
//
// Row sum: the same where several rows land on one. A result row belongs to one task, which adds
// its sources in their order, kW columns at a time in registers: no atomics, one rounding.
//
// Kept rows of a mask: counted row by row, then written row by row behind those of earlier rows.
// The mask is read twice, a byte an entry, and 8 bytes an entry are written.
#include "pad.h"

#include <cstring>

#include "copy_row.h"
#include "dtype.h"
#include "isa.h"

namespace encfast::ENCFAST_ISA {
namespace {

// Bytes moved by one task: enough that taking a task costs nothing beside it.
constexpr int64_t kTaskBytes = 128 * 1024;

int64_t rows_per_task(const GatherRowsParams& p) {
  return p.row_bytes >= kTaskBytes ? 1 : kTaskBytes / (p.row_bytes > 0 ? p.row_bytes : 1);
}

void gather_task(int64_t task, int, void* ctx) {
  const GatherRowsParams& p = *static_cast<const GatherRowsParams*>(ctx);
  const int64_t rows = rows_per_task(p);
  const int64_t end = (task + 1) * rows < p.n ? (task + 1) * rows : p.n;
  const char* src = static_cast<const char*>(p.src);
  char* out = static_cast<char*>(p.out);
  const bool fresh = p.n * p.row_bytes > kFreshBytes;
  for (int64_t i = task * rows; i < end; ++i) {
    char* to = out + i * p.out_stride;
    if (p.index[i] < 0) {
      std::memset(to, 0, p.row_bytes);
      continue;
    }
    const int64_t next = i + 1 < end && p.index[i + 1] >= 0 ? p.index[i + 1] : p.index[i];
    copy_row(to, src + p.index[i] * p.src_stride, src + next * p.src_stride, p.row_bytes, fresh);
  }
}

void gather_rows(const GatherRowsParams& p, const Pool& pool) {
  if (p.n == 0 || p.row_bytes == 0) return;
  const int64_t rows = rows_per_task(p);
  pool.run(pool.self, (p.n + rows - 1) / rows, gather_task, const_cast<GatherRowsParams*>(&p));
}

template <DType kT>
void sum_row(const SumRowsParams& p, int64_t r) {
  const int64_t size = element_bytes(kT), row_bytes = p.row_elements * size;
  const char* src = static_cast<const char*>(p.src);
  char* out = static_cast<char*>(p.out) + r * row_bytes;
  const int64_t first = p.begin[r], last = p.begin[r + 1];
  if (first == last) {
    std::memset(out, 0, row_bytes);
    return;
  }
  for (int64_t c = 0; c < p.row_elements; c += kW) {
    const int lanes = p.row_elements - c < kW ? static_cast<int>(p.row_elements - c) : kW;
    const auto source = [&](int64_t j) {
      const char* at = src + (p.order[j] * p.src_stride + c) * size;
      return lanes == kW ? load_as<kT>(at) : load_partial_as<kT>(at, lanes);
    };
    Vec sum = source(first);
    for (int64_t j = first + 1; j < last; ++j) sum += source(j);
    if (lanes == kW) {
      store_as<kT>(out + c * size, sum);
    } else {
      store_partial_as<kT>(out + c * size, sum, lanes);
    }
  }
}

// Types that are summed in themselves; integers wrap around, hence the unsigned ones.
template <class T>
void sum_row_plain(const SumRowsParams& p, int64_t r) {
  T* out = static_cast<T*>(p.out) + r * p.row_elements;
  std::memset(out, 0, p.row_elements * sizeof(T));
  for (int64_t j = p.begin[r]; j < p.begin[r + 1]; ++j) {
    const T* source = static_cast<const T*>(p.src) + p.order[j] * p.src_stride;
    for (int64_t c = 0; c < p.row_elements; ++c) out[c] += source[c];
  }
}

using SumRow = void (*)(const SumRowsParams&, int64_t);

SumRow sum_row_of(SumType type) {
  switch (type) {
    case SumType::kFloat32:
      return sum_row<DType::kFloat32>;
    case SumType::kBFloat16:
      return sum_row<DType::kBFloat16>;
    case SumType::kFloat16:
      return sum_row<DType::kFloat16>;
    case SumType::kFloat64:
      return sum_row_plain<double>;
    case SumType::kInt32:
      return sum_row_plain<uint32_t>;
    case SumType::kInt64:
      return sum_row_plain<uint64_t>;
  }
  return nullptr;
}

struct SumJob {
  const SumRowsParams& params;
  SumRow sum_row;
  int64_t rows;  // per task
};

void sum_task(int64_t task, int, void* ctx) {
  const SumJob& job = *static_cast<const SumJob*>(ctx);
  const int64_t n = job.params.n;
  const int64_t end = (task + 1) * job.rows < n ? (task + 1) * job.rows : n;
  for (int64_t r = task * job.rows; r < end; ++r) job.sum_row(job.params, r);
}

void sum_rows(const SumRowsParams& p, const Pool& pool) {
  if (p.n == 0 || p.row_elements == 0) return;
  const int64_t row_bytes = 4 * p.row_elements;
  SumJob job{p, sum_row_of(p.type), row_bytes >= kTaskBytes ? 1 : kTaskBytes / row_bytes};
  pool.run(pool.self, (p.n + job.rows - 1) / job.rows, sum_task, &job);
}

// Tasks of find_rows are stretches of mask rows.
struct FindJob {
  const FindRowsParams& params;
  int64_t rows;  // per task
};

template <class F>
ENCFAST_INLINE void for_rows_of_task(int64_t task, void* ctx, F f) {
  const FindJob& job = *static_cast<const FindJob*>(ctx);
  const int64_t batch = job.params.batch;
  const int64_t end = (task + 1) * job.rows < batch ? (task + 1) * job.rows : batch;
  for (int64_t b = task * job.rows; b < end; ++b) f(job.params, b);
}

void count_task(int64_t task, int, void* ctx) {
  for_rows_of_task(task, ctx, [](const FindRowsParams& p, int64_t b) {
    const uint8_t* mask = p.mask + b * p.seqlen;
    int32_t count = 0;
    for (int64_t s = 0; s < p.seqlen; ++s) count += mask[s] != 0;
    p.cu_seqlens[b + 1] = count;
  });
}

void place_task(int64_t task, int, void* ctx) {
  for_rows_of_task(task, ctx, [](const FindRowsParams& p, int64_t b) {
    const uint8_t* mask = p.mask + b * p.seqlen;
    int64_t* out = p.indices + p.cu_seqlens[b];
    for (int64_t s = 0; s < p.seqlen; ++s) {
      if (mask[s]) *out++ = b * p.seqlen + s;
    }
  });
}

void find_rows(const FindRowsParams& p, const Pool& pool) {
  const int64_t row = p.seqlen > 0 ? p.seqlen : 1;
  FindJob job{p, row >= kTaskBytes ? 1 : kTaskBytes / row};
  const int64_t tasks = (p.batch + job.rows - 1) / job.rows;
  p.cu_seqlens[0] = 0;
  pool.run(pool.self, tasks, count_task, &job);
  for (int64_t b = 0; b < p.batch; ++b) p.cu_seqlens[b + 1] += p.cu_seqlens[b];
  pool.run(pool.self, tasks, place_task, &job);
  const int64_t kept = p.cu_seqlens[p.batch];
  std::memset(p.indices + kept, 0xff, (p.batch * p.seqlen - kept) * sizeof(int64_t));  // -1
}

}  // namespace

extern const PadKernels kPad = {gather_rows, sum_rows, find_rows};

}  // namespace encfast::ENCFAST_ISA
