// encfast._host: planning on NumPy arrays for data-loader workers, without PyTorch.
// Arguments were checked by encfast/data/packing.py, whose NumPy versions give equal results.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "packing.h"

namespace py = pybind11;
using Int64Array = py::array_t<int64_t, py::array::c_style>;

namespace {

Int64Array to_numpy(const std::vector<int64_t>& values) {
  return Int64Array(static_cast<py::ssize_t>(values.size()), values.data());
}

Int64Array first_fit(const Int64Array& lengths, int64_t capacity) {
  std::vector<int64_t> bins;
  {
    py::gil_scoped_release nogil;
    bins = encfast::first_fit(lengths.data(), lengths.size(), capacity);
  }
  return to_numpy(bins);
}

Int64Array batch_starts(const Int64Array& lengths, int64_t max_tokens, double max_padding,
                        int64_t max_sequences) {
  std::vector<int64_t> starts;
  {
    py::gil_scoped_release nogil;
    starts = encfast::batch_starts(lengths.data(), lengths.size(), max_tokens, max_padding,
                                   max_sequences);
  }
  return to_numpy(starts);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Packing and batching plans on NumPy arrays; use encfast.data.";
  m.def("first_fit", &first_fit, py::arg("lengths").noconvert(), py::arg("capacity"));
  m.def("batch_starts", &batch_starts, py::arg("lengths").noconvert(), py::arg("max_tokens"),
        py::arg("max_padding"), py::arg("max_sequences"));
}
