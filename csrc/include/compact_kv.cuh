// compact_kv on a GPU, on raw pointers: one thread block for a piece of a head, or in place for all of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace flowcut::cuda {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;                 // vectors that a thread loads before it stores the first
constexpr int kTile = kThreads * kInFlight;  // vectors that a block moves between two barriers
constexpr int kTensors = 256;                // 12 KiB of kernel parameters: 128 layers in one launch

struct Table {
  CacheRows tensors[kTensors];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half* out) { *out = __float2half_rn(x); }

// kCount floats of a table; whole vectors where the launcher saw that they are aligned.
template <int kCount>
__device__ inline void load_angles(const float* from, float (&to)[kCount]) {
  if constexpr (kCount % 4 == 0) {
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  } else {
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

// The points (a, b) turned, each product and sum rounded as in the definition.
template <class T, class V>
__device__ inline void turn(V& a, V& b, const float* cos, const float* sin) {
  constexpr int kCount = sizeof(V) / sizeof(T);
  T x[kCount], y[kCount];
  float c[kCount], s[kCount];
  memcpy(x, &a, sizeof(V));
  memcpy(y, &b, sizeof(V));
  load_angles(cos, c);
  load_angles(sin, s);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float u = to_float(x[i]), v = to_float(y[i]);
    from_float(__fsub_rn(__fmul_rn(u, c[i]), __fmul_rn(v, s[i])), x + i);
    from_float(__fadd_rn(__fmul_rn(v, c[i]), __fmul_rn(u, s[i])), y + i);
  }
  memcpy(&a, x, sizeof(V));
  memcpy(&b, y, sizeof(V));
}

// Moves `p.kept` rows of every head in vectors V. T: the keys' type where they are turned, void otherwise.
// Blocks are in the order tensor, sample, head, piece; in place a head is one piece.
//
// An item is a vector of a row, or the two vectors that are turned together. In place, items are swept in
// row-major order, a tile at a time: what the tile writes may be what it reads itself, hence the barrier; a
// later tile reads only at or after its own rows, which no earlier tile writes, so one barrier a tile is
// enough.
template <class V, class T, bool kInPlace>
__global__ void __launch_bounds__(kThreads)
    compact_kv(const __grid_constant__ Table table, const __grid_constant__ CompactKV p, unsigned pieces) {
  const unsigned place = blockIdx.x / pieces, heads = p.batch * p.heads;
  const unsigned tensor = place / heads, batch = place % heads / p.heads, head = place % p.heads;
  const CacheRows& x = table.tensors[tensor];
  const char* data = x.data + batch * x.batch_stride + head * x.head_stride;
  const int64_t step = kInPlace ? x.token_stride : x.row_bytes;
  char* out = kInPlace ? const_cast<char*>(data) : x.out + place % heads * p.kept * step;
  const int64_t* keep = p.keep + batch * p.kept;

  unsigned pairs = 0;
  if constexpr (!std::is_void_v<T>)
    if (tensor < p.turned) pairs = p.half * sizeof(T) / sizeof(V);
  const unsigned items = x.row_bytes / sizeof(V) - pairs, total = p.kept * items;
  // keep was not read back to be checked: a row that does not exist must not be touched.
  auto moves = [&](int64_t token, unsigned m, unsigned column) {
    if (kInPlace && (token < m || (token == m && column >= pairs))) return false;
    return token >= 0 && token < x.tokens;
  };
  const unsigned begin = kInPlace ? 0 : blockIdx.x % pieces * kTile;
  const unsigned end = kInPlace ? total : min(total, begin + kTile);
  for (unsigned tile = begin; tile < end; tile += kTile) {
    V a[kInFlight] = {}, b[kInFlight] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const unsigned item = tile + k * kThreads + threadIdx.x;
      if (item >= end) break;
      const unsigned m = item / items, column = item % items;
      const int64_t token = keep[m];
      if (!moves(token, m, column)) continue;
      const V* row = reinterpret_cast<const V*>(data + token * x.token_stride);
      a[k] = row[column < pairs ? column : column + pairs];
      if (column < pairs) b[k] = row[column + pairs];
    }
    if constexpr (kInPlace) __syncthreads();
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const unsigned item = tile + k * kThreads + threadIdx.x;
      if (item >= end) break;
      const unsigned m = item / items, column = item % items;
      const bool moved = moves(keep[m], m, column);
      if (kInPlace && !moved) continue;
      V* row = reinterpret_cast<V*>(out + m * step);
      if constexpr (!std::is_void_v<T>)
        if (column < pairs) {
          const int64_t angle = (batch * p.kept + m) * p.half + column * (sizeof(V) / sizeof(T));
          if (moved) turn<T>(a[k], b[k], p.cos + angle, p.sin + angle);  // padding is +0, whatever its angle
          row[column + pairs] = b[k];
        }
      row[column < pairs ? column : column + pairs] = a[k];
    }
  }
}

}  // namespace flowcut::cuda
