// Chooses the widest vector that all addresses and sizes allow and launches compact_kv.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "compact_kv.cuh"

namespace flowcut::cuda {
namespace {

template <class V, class T, bool kInPlace>
void launch(const Table& table, const CompactKV& p, cudaStream_t stream) {
  int64_t vectors = 1;
  for (int64_t i = 0; i < p.count; ++i)
    vectors = std::max<int64_t>(vectors, p.kept * (table.tensors[i].row_bytes / sizeof(V)));
  const int64_t pieces = kInPlace ? 1 : (vectors + kTile - 1) / kTile;
  const int64_t blocks = p.count * p.batch * p.heads * pieces;
  // The kernel counts vectors of a head and blocks in 32 bits.
  if (std::max(vectors, blocks) > INT32_MAX)
    throw std::runtime_error(
        "compact_kv: this cache is too large for one launch; compact fewer layers at a time");
  compact_kv<V, T, kInPlace><<<blocks, kThreads, 0, stream>>>(table, p, pieces);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    throw std::runtime_error(std::string("compact_kv: ") + cudaGetErrorString(error));
}

template <class V, class T>
void launch(const Table& table, const CompactKV& p, cudaStream_t stream) {
  p.in_place ? launch<V, T, true>(table, p, stream) : launch<V, T, false>(table, p, stream);
}

// All bits that may be set in an address or a size that a vector must divide.
uint64_t bits(const Table& table, const CompactKV& p) {
  uint64_t all = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const CacheRows& x = table.tensors[i];
    all |= reinterpret_cast<uintptr_t>(x.data) | (p.in_place ? 0 : reinterpret_cast<uintptr_t>(x.out));
    all |= x.batch_stride | x.head_stride | x.token_stride | x.row_bytes;
  }
  return all;
}

template <class T>
void launch_turned(const Table& table, const CompactKV& p, cudaStream_t stream) {
  using Element = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  // half * sizeof(T) is the distance of the two vectors; the tables are read in vectors of floats.
  const uint64_t all = bits(table, p) | p.half * sizeof(T) | reinterpret_cast<uintptr_t>(p.cos) |
                       reinterpret_cast<uintptr_t>(p.sin);
  all % 16 == 0 ? launch<uint4, T>(table, p, stream) : launch<Element, T>(table, p, stream);
}

}  // namespace

void compact_kv(const CompactKV& all, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (all.batch * all.heads * all.kept == 0) return;
  for (int64_t first = 0; first < all.count; first += kTensors) {
    CompactKV p = all;
    p.count = std::min<int64_t>(kTensors, all.count - first);
    p.turned = std::clamp<int64_t>(all.turned - first, 0, p.count);
    Table table{};
    std::copy_n(all.tensors + first, p.count, table.tensors);
    if (p.turned > 0) {
      switch (p.dtype) {
        case DType::Float32: launch_turned<float>(table, p, stream); break;
        case DType::BFloat16: launch_turned<__nv_bfloat16>(table, p, stream); break;
        case DType::Float16: launch_turned<__half>(table, p, stream); break;
      }
      continue;
    }
    const uint64_t unit = bits(table, p);
    if (unit % 16 == 0)
      launch<uint4, void>(table, p, stream);
    else if (unit % 4 == 0)
      launch<uint32_t, void>(table, p, stream);
    else
      launch<uint8_t, void>(table, p, stream);
  }
}

}  // namespace flowcut::cuda
