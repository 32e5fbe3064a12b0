// flowcut_kernels._C: the page planner of planner.h for numpy arrays. A module of its own: it depends on the
// Python version, as the native library does not.
#include "planner.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

// Contiguous; arrays of another type are refused (noconvert below), not read as something else.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
Array<T> array(const std::vector<T>& values) {
  return Array<T>(values.size(), values.data());
}

py::tuple plan_paged(const Array<int32_t>& block_tables, const Array<int64_t>& context_lens,
                     const Array<int64_t>& keep, int64_t block_size, const Array<int32_t>& ref_counts,
                     const Array<int32_t>& free_blocks) {
  if (block_tables.ndim() != 2 || keep.ndim() != 2 || context_lens.ndim() != 1 || ref_counts.ndim() != 1 ||
      free_blocks.ndim() != 1 || keep.shape(0) != block_tables.shape(0) ||
      context_lens.shape(0) != block_tables.shape(0))
    throw std::invalid_argument(
        "plan_paged: block_tables must be [sequences, width], context_lens [sequences], keep [sequences, "
        "kept], ref_counts and free_blocks [blocks]");
  flowcut::PagedBatch batch{};
  batch.sequences = block_tables.shape(0), batch.width = block_tables.shape(1), batch.kept = keep.shape(1);
  batch.blocks = ref_counts.shape(0), batch.free = free_blocks.shape(0), batch.block_size = block_size;
  batch.block_tables = block_tables.data(), batch.context_lens = context_lens.data();
  batch.keep = keep.data(), batch.ref_counts = ref_counts.data(), batch.free_blocks = free_blocks.data();
  flowcut::PagedPlan plan;
  {
    const py::gil_scoped_release unlocked;
    plan = flowcut::plan_paged(batch);
  }
  const auto moved = static_cast<py::ssize_t>(plan.shifts.size());
  return py::make_tuple(
      array(plan.moves).reshape({moved, py::ssize_t{2}}), array(plan.offsets), array(plan.shifts),
      array(plan.block_tables).reshape({block_tables.shape(0), block_tables.shape(1)}),
      array(plan.context_lens), array(plan.ref_counts), array(plan.taken_blocks), array(plan.freed_blocks));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("plan_paged", &plan_paged, py::arg("block_tables").noconvert(), py::arg("context_lens").noconvert(),
        py::arg("keep").noconvert(), py::arg("block_size"), py::arg("ref_counts").noconvert(),
        py::arg("free_blocks").noconvert());
}
