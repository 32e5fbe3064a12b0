// What the launchers of compact_kv and compact_kv_paged share: the vector type, launches of enough layers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

namespace flowcut::cuda {

// Calls f<V, T>(): V the widest vector that divides `unit`, in which all bits are set that are set in an
// address or a size; T the keys' type where they are turned, void otherwise.
template <class Parameters, class F>
void with_vector(const Parameters& p, uint64_t unit, const F& f) {
  auto turned = [&]<class T>() {
    using Element = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    // half * sizeof(T) is the distance of the two vectors; the tables are read in vectors of floats.
    unit |= p.half * sizeof(T) | reinterpret_cast<uintptr_t>(p.cos) | reinterpret_cast<uintptr_t>(p.sin);
    unit % 16 == 0 ? f.template operator()<uint4, T>() : f.template operator()<Element, T>();
  };
  if (p.turned > 0) {
    switch (p.dtype) {
      case DType::Float32: return turned.template operator()<float>();
      case DType::BFloat16: return turned.template operator()<__nv_bfloat16>();
      case DType::Float16: return turned.template operator()<__half>();
    }
  }
  if (unit % 16 == 0)
    f.template operator()<uint4, void>();
  else if (unit % 4 == 0)
    f.template operator()<uint32_t, void>();
  else
    f.template operator()<uint8_t, void>();
}

// Calls f(parameters, table) for every `kCount` tensors, which is what fits into a launch's parameters.
template <class Table, class Parameters, class F>
void for_tables(const Parameters& all, const F& f) {
  constexpr int64_t kCount = std::extent_v<decltype(Table::tensors)>;
  for (int64_t first = 0; first < all.count; first += kCount) {
    Parameters p = all;
    p.count = std::min<int64_t>(kCount, all.count - first);
    p.turned = std::clamp<int64_t>(all.turned - first, 0, p.count);
    Table table{};
    std::copy_n(all.tensors + first, p.count, table.tensors);
    f(p, table);
  }
}

// The kernels count a block's vectors and the blocks in 32 bits.
inline void check_counts(const char* op, int64_t vectors, int64_t blocks) {
  if (std::max(vectors, blocks) > INT32_MAX)
    throw std::runtime_error(std::string(op) +
                             ": this cache is too large for one launch; compact fewer layers at a time");
}

inline void check_launch(const char* op) {
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace flowcut::cuda
