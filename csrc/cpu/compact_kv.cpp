// compact_kv: kept rows of a KV cache moved as bytes, keys turned on the way if wanted.
#include "simd.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // bytes that are worth a thread

// out = x turned: columns j and j + half are a point in the plane. `out` may be x.
template <class T>
void turn_row(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
  auto turn = [](const T* x, const T* y, const float* cos, const float* sin, T* x_out, T* y_out) {
    const F32 a = widen(x), b = widen(y), c = load(cos), s = load(sin);
    narrow(x_out, a * c - b * s);
    narrow(y_out, b * c + a * s);
  };
  int64_t j = 0;
  for (; j + kLanes <= half; j += kLanes)
    turn(x + j, x + half + j, cos + j, sin + j, out + j, out + half + j);
  const int64_t rest = half - j;
  if (rest == 0) return;
  T points[2][kLanes] = {};
  float angles[2][kLanes] = {};
  for (int i = 0; i < 2; ++i) {
    memcpy(points[i], x + i * half + j, rest * sizeof(T));
    memcpy(angles[i], (i ? sin : cos) + j, rest * sizeof(float));
  }
  turn(points[0], points[1], angles[0], angles[1], points[0], points[1]);
  for (int i = 0; i < 2; ++i) memcpy(out + i * half + j, points[i], rest * sizeof(T));
}

}  // namespace

// Stores go through the caches: past them, into pages that are new, this took 1.7 times as long (2 cores, 8
// layers, 608 -> 96 rows of 256 bytes). In place a head is swept forward: row m comes from a row at or after
// m, so what it overwrites was read before.
void compact_kv(const CompactKV& p, ParallelFor run) {
  int64_t bytes = 1;
  for (int64_t i = 0; i < p.count; ++i) bytes = max(bytes, p.kept * p.tensors[i].row_bytes);
  const int64_t heads = p.batch * p.heads;
  parallel_for(run, p.count * heads, max(1, kGrain / bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const CacheRows& x = p.tensors[i / heads];
      const int64_t batch = i % heads / p.heads, head = i % p.heads;
      const char* data = x.data + batch * x.batch_stride + head * x.head_stride;
      char* out = p.in_place ? (char*)data : x.out + i % heads * p.kept * x.row_bytes;
      const int64_t step = p.in_place ? x.token_stride : x.row_bytes;
      const bool turned = i / heads < p.turned;
      for (int64_t m = 0; m < p.kept; ++m, out += step) {
        const int64_t at = batch * p.kept + m, token = p.keep[at];
        if (token < 0) {
          if (!p.in_place) memset(out, 0, x.row_bytes);
          continue;
        }
        const char* row = data + token * x.token_stride;
        int64_t done = 0;
        if (turned)
          with_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            turn_row((const T*)row, p.cos + at * p.half, p.sin + at * p.half, p.half, (T*)out);
            done = 2 * p.half * sizeof(T);
          });
        if (row != out) memcpy(out + done, row + done, x.row_bytes - done);
      }
    }
  });
}

}  // namespace flowcut::FLOWCUT_ISA
