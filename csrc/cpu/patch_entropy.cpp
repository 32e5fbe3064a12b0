// patch_entropy: the grey levels of a strip of patches, then each patch's histogram and a table of n log2 n.
#include "simd.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // pixels that are worth a thread
constexpr int64_t kLevels = 256;       // levels 0..255; level 256 is NaN
constexpr int64_t kTable = 4096;       // counts that a table is made for

// n log2 n in units that make sums of integers of it: exact whatever the order, and 0 bits of a single level.
constexpr double kUnit = 0x1p24;
int64_t n_log_n(int64_t n) {
  return n > 1 ? (int64_t)__builtin_rint(n * __builtin_log2((double)n) * kUnit) : 0;
}

// The rounded mean of three bytes from their sum: (n + 1) / 3 for n <= 765.
constexpr int kThird = 21846;

void line_levels(const PatchEntropy& p, const uint8_t* x, int64_t width, uint16_t* level) {
  if (p.channels == 1) {
    for (int64_t i = 0; i < width; ++i) level[i] = x[i];
    return;
  }
  const uint8_t *y = x + p.channel_stride, *z = y + p.channel_stride;
  for (int64_t i = 0; i < width; ++i) {
    const uint16_t n = (uint16_t)(x[i] + y[i] + z[i] + 1);
    level[i] = (uint16_t)((uint32_t)n * kThird >> 16);
  }
}

template <class T>
void line_levels(const PatchEntropy& p, const T* x, int64_t width, uint16_t* level) {
  const bool three = p.channels == 3;
  auto byte = [&](const T* in, int c) {
    F32 y = widen(in) * p.scale[c] + p.offset[c];
    y = select(y < 0.0f, F32{}, y);  // NaN stays
    y = select(y > 255.0f, F32{} + 255.0f, y);
    return (y + 0x1.8p23f) - 0x1.8p23f;  // the sum has no bits below 1
  };
  auto levels = [&](const T* in, int64_t channel_stride) {
    F32 total = byte(in, 0);
    if (three) total = total + byte(in + channel_stride, 1) + byte(in + 2 * channel_stride, 2);
    const I32 whole = total == total;
    I32 n = (I32)(select(whole, total, F32{}) + 0x1p23f) - 0x4b000000;
    if (three) n = (n + 1) * kThird >> 16;
    return __builtin_convertvector(whole ? n : I32{} + (int32_t)kLevels, U16);
  };
  const int64_t stride = p.channel_stride / (int64_t)sizeof(T);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const U16 found = levels(x + i, stride);
    memcpy(level + i, &found, sizeof(found));
  }
  if (i < width) {
    T rest[3 * kLanes] = {};
    for (int64_t c = 0; c < p.channels; ++c)
      memcpy(rest + c * kLanes, x + c * stride + i, (width - i) * sizeof(T));
    const U16 found = levels(rest, kLanes);
    memcpy(level + i, &found, (width - i) * sizeof(uint16_t));
  }
}

// Bits of one patch, whose lines are `pitch` levels apart.
float entropy(const uint16_t* level, int64_t pitch, int64_t size, const int64_t* table) {
  // Neighbours are often equal: two histograms, so that the second need not wait for the first.
  uint32_t even[kLevels + 1] = {}, odd[kLevels + 1] = {};
  for (int64_t y = 0; y < size; ++y, level += pitch) {
    for (int64_t x = 0; x + 1 < size; x += 2) {
      ++even[level[x]];
      ++odd[level[x + 1]];
    }
    if (size % 2) ++even[level[size - 1]];
  }
  if (even[kLevels] + odd[kLevels]) return __builtin_nanf("");
  const int64_t area = size * size;
  int64_t total = 0;
  if (area <= kTable)
    for (int64_t i = 0; i < kLevels; ++i) total += table[even[i] + odd[i]];
  else
    for (int64_t i = 0; i < kLevels; ++i) total += n_log_n((int64_t)even[i] + odd[i]);
  return (float)((double)(n_log_n(area) - total) / (kUnit * (double)area));
}

}  // namespace

void patch_entropy(const PatchEntropy& p, ParallelFor run) {
  const int64_t size = p.patch_size, width = p.columns * size;
  const int64_t counts = size * size <= kTable ? size * size + 1 : 0;
  const Buffer table_memory(2 * counts);
  int64_t* table = (int64_t*)(float*)table_memory;
  for (int64_t n = 0; n < counts; ++n) table[n] = n_log_n(n);

  const int64_t grain = max(1, kGrain / max(size * width, 1));
  parallel_for(run, p.batch * p.rows, grain, [&](int64_t first, int64_t last) {
    const Buffer strip((size * width + 1) / 2);
    uint16_t* level = (uint16_t*)(float*)strip;
    for (int64_t i = first; i < last; ++i) {
      const char* line = p.pixels + i / p.rows * p.batch_stride + i % p.rows * size * p.line_stride;
      for (int64_t y = 0; y < size; ++y, line += p.line_stride) {
        if (p.bytes)
          line_levels(p, (const uint8_t*)line, width, level + y * width);
        else
          with_dtype(p.dtype, [&](auto type) {
            line_levels(p, (const decltype(type)*)line, width, level + y * width);
          });
      }
      for (int64_t c = 0; c < p.columns; ++c)
        p.out[i * p.columns + c] = entropy(level + c * size, width, size, table);
    }
  });
}

}  // namespace flowcut::FLOWCUT_ISA
