// encfast._host: planning on NumPy arrays for data-loader workers, without PyTorch.
// Arguments were checked by encfast/data/packing.py and mask_grids.py, whose NumPy versions give
// equal results.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "masks.h"
#include "packing.h"

namespace py = pybind11;
using BoolArray = py::array_t<bool, py::array::c_style>;
using SeedArray = py::array_t<uint64_t, py::array::c_style>;
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

// One row of the result per seed; fill(seed, row) finds its row all 0.
template <typename Fill>
BoolArray masks(const SeedArray& seeds, int64_t patches, Fill fill) {
  BoolArray out({seeds.size(), static_cast<py::ssize_t>(patches)});
  static_assert(sizeof(bool) == sizeof(uint8_t), "NumPy's bool is a byte");
  uint8_t* rows = reinterpret_cast<uint8_t*>(out.mutable_data());
  py::gil_scoped_release nogil;
  std::fill_n(rows, seeds.size() * patches, uint8_t{0});
  for (py::ssize_t i = 0; i < seeds.size(); ++i) fill(seeds.data()[i], rows + i * patches);
  return out;
}

BoolArray random_masks(const SeedArray& seeds, int64_t patches, int64_t keep) {
  return masks(seeds, patches, [=](uint64_t seed, uint8_t* row) {
    encfast::random_mask(seed, patches, keep, row);
  });
}

BoolArray block_masks(const SeedArray& seeds, int64_t height, int64_t width, int64_t keep,
                      int64_t min_patches, int64_t max_patches, double min_aspect) {
  const int64_t patches = height * width;
  const encfast::BlockRule rule{height,      width,       patches - keep,
                                min_patches, max_patches, min_aspect};
  return masks(seeds, patches,
               [=](uint64_t seed, uint8_t* row) { encfast::block_mask(seed, rule, row); });
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Packing plans and masks on NumPy arrays; use encfast.data.";
  m.def("first_fit", &first_fit, py::arg("lengths").noconvert(), py::arg("capacity"));
  m.def("batch_starts", &batch_starts, py::arg("lengths").noconvert(), py::arg("max_tokens"),
        py::arg("max_padding"), py::arg("max_sequences"));
  m.def("random_masks", &random_masks, py::arg("seeds").noconvert(), py::arg("patches"),
        py::arg("keep"));
  m.def("block_masks", &block_masks, py::arg("seeds").noconvert(), py::arg("height"),
        py::arg("width"), py::arg("keep"), py::arg("min_patches"), py::arg("max_patches"),
        py::arg("min_aspect"));
}
