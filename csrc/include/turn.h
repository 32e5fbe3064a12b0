// A row of a key turned to another position, for both forms of compact_kv.
#pragma once

#include "simd.h"

namespace flowcut::FLOWCUT_ISA {

// out = x turned: columns j and j + half are a point in the plane. `out` may be x.
template <class T>
inline void turn_row(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
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

}  // namespace flowcut::FLOWCUT_ISA
