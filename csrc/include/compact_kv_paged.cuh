// compact_kv_paged on a GPU, on raw pointers: one thread block for a head of a sequence in one tensor.
#pragma once

#include "compact_kv.cuh"

namespace flowcut::cuda {

struct PagedTable {
  PagedRows tensors[kTensors];
};

// Runs every sequence's moves in vectors V. T: the keys' type where they are turned, void otherwise. Blocks
// are in the order tensor, sequence, head.
//
// The sweep is that of compact_kv in place: items in the order of the moves, a tile at a time, one barrier
// between a tile's reads and its writes. A later tile reads no row that an earlier one writes, and no other
// block touches this one's rows; planner.h says why.
template <class V, class T>
__global__ void __launch_bounds__(kThreads)
    compact_kv_paged(const __grid_constant__ PagedTable table, const __grid_constant__ CompactKVPaged p) {
  const unsigned heads = p.heads, sequences = p.sequences, place = blockIdx.x / heads;
  const unsigned tensor = place / sequences, sequence = place % sequences;
  const PagedRows& x = table.tensors[tensor];
  char* head = x.data + blockIdx.x % heads * x.head_stride;
  // Neither offsets nor moves were read back to be checked: a row that does not exist must not be touched.
  const int64_t first = max(p.offsets[sequence], int64_t{0});
  const int64_t last = min(p.offsets[sequence + 1], p.moved);
  if (first >= last) return;

  unsigned pairs = 0;
  if constexpr (!std::is_void_v<T>)
    if (tensor < p.turned) pairs = p.half * sizeof(T) / sizeof(V);
  const unsigned items = x.row_bytes / sizeof(V) - pairs, total = (last - first) * items;
  const unsigned block_size = p.block_size, slots = p.blocks * block_size;
  auto exists = [&](int64_t slot) { return 0 <= slot && slot < slots; };
  auto row = [&](unsigned slot) {
    return reinterpret_cast<V*>(head + slot / block_size * x.block_stride +
                                slot % block_size * x.token_stride);
  };
  for (unsigned tile = 0; tile < total; tile += kTile) {
    V a[kInFlight] = {}, b[kInFlight] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const unsigned item = tile + k * kThreads + threadIdx.x;
      if (item >= total) break;
      const int64_t* move = p.moves + 2 * (first + item / items);
      const unsigned column = item % items;
      if (!exists(move[0])) continue;
      const V* from = row(move[0]);
      a[k] = from[column < pairs ? column : column + pairs];
      if (column < pairs) b[k] = from[column + pairs];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const unsigned item = tile + k * kThreads + threadIdx.x;
      if (item >= total) break;
      const int64_t at = first + item / items, *move = p.moves + 2 * at;
      const unsigned column = item % items;
      if (!exists(move[0]) || !exists(move[1])) continue;
      V* to = row(move[1]);
      if constexpr (!std::is_void_v<T>)
        if (column < pairs) {
          const int64_t angle = at * p.half + column * (sizeof(V) / sizeof(T));
          turn<T>(a[k], b[k], p.cos + angle, p.sin + angle);
          to[column + pairs] = b[k];
        }
      to[column < pairs ? column : column + pairs] = a[k];
    }
  }
}

}  // namespace flowcut::cuda
