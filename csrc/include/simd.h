// Vectors of kLanes floats for the instruction set this file is compiled for, on the compiler's vector
// extension; intrinsics only where it has no word for what is needed. Everything lives in the namespace of
// the instruction set and nothing from std:: is instantiated, so that the linker cannot merge code of two
// instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flowcut::FLOWCUT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kPair = 2 * kLanes;

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef double F64 __attribute__((vector_size(8 * kLanes)));  // as many lanes, in more registers

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// memcpy; `streamed` past the caches, which saves reading the lines that are about to be overwritten. In whole
// lines where there are vectors of that size: halves of a line may leave for memory one by one.
inline void copy(char* out, const char* in, int64_t bytes, [[maybe_unused]] bool streamed) {
#if defined(__AVX512F__)
  if (streamed && (uintptr_t)out % 64 == 0 && bytes % 64 == 0) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < bytes; i += 64)
      _mm512_stream_si512((__m512i*)(out + i), _mm512_loadu_si512((const __m512i*)(in + i)));
    return;
  }
#endif
#if defined(__AVX2__)
  if (streamed && (uintptr_t)out % 32 == 0 && bytes % 32 == 0) {
    for (int64_t i = 0; i < bytes; i += 32)
      _mm256_stream_si256((__m256i*)(out + i), _mm256_loadu_si256((const __m256i*)(in + i)));
    return;
  }
#endif
  memcpy(out, in, bytes);
}

// Orders streamed stores before whatever tells another thread that they are done.
inline void publish_streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
inline F32 load(const float* p) { return load_as<F32>(p); }
inline void store(float* p, F32 v) { memcpy(p, &v, sizeof(v)); }
inline void store(float* p, F32 v, int64_t count) { memcpy(p, &v, count * sizeof(float)); }

inline F32 select(I32 mask, F32 a, F32 b) { return mask ? a : b; }
inline F32 max(F32 a, F32 b) { return select(a > b, a, b); }
inline F32 abs(F32 x) { return (F32)((I32)x & 0x7fffffff); }
inline F32 sqrt(F32 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// kPair consecutive elements as two vectors, in an order that is the element type's own but always the same:
// sums do not care, and products meet operands that came through the same door.
struct Pair {
  F32 a, b;
};

inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
inline void store_pair(float* p, Pair v) {
  store(p, v.a);
  store(p + kLanes, v.b);
}

// bfloat16 is the upper half of a float: a word of two gives both with a shift and a mask, without any
// shuffle.
inline Pair split(I32 words) { return {(F32)(words << 16), (F32)(words & (int32_t)0xffff0000)}; }
inline Pair load_pair(const BFloat16* p) { return split(load_as<I32>(p)); }
// To nearest even, in the upper half.
inline I32 round_to_bfloat16(F32 x) {
  const I32 bits = (I32)x;
  const I32 even = bits + 0x7fff + ((bits >> 16) & 1);
  return (x == x ? even : bits | 0x00400000) & (int32_t)0xffff0000;
}
inline void store_pair(BFloat16* p, Pair v) {
  const I32 low = (round_to_bfloat16(v.a) >> 16) & 0xffff, words = low | round_to_bfloat16(v.b);
  memcpy(p, &words, sizeof(words));
}

// kLanes elements in their own order.
inline F32 widen(const float* p) { return load(p); }
inline void narrow(float* p, F32 x) { store(p, x); }
inline F32 widen(const BFloat16* p) { return (F32)(__builtin_convertvector(load_as<U16>(p), I32) << 16); }
inline void narrow(BFloat16* p, F32 x) {
  const U16 out = __builtin_convertvector((round_to_bfloat16(x) >> 16) & 0xffff, U16);
  memcpy(p, &out, sizeof(out));
}

#if defined(__AVX512F__)
inline F32 widen(__m256i halves) { return (F32)_mm512_maskz_cvtph_ps(0xffff, halves); }
inline F32 widen(const Float16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline void narrow(Float16* p, F32 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0));
}
#elif defined(__AVX2__)
inline F32 widen(const Float16* p) { return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void narrow(Float16* p, F32 x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
#else
inline F32 widen(const Float16* p) {
  const I32 h = __builtin_convertvector(load_as<U16>(p), I32);
  // Exponent and fraction in place, 2^112 corrects the bias and makes denormals normal; Inf and NaN keep
  // exponent 255.
  const F32 finite = (F32)((h & 0x7fff) << 13) * 0x1p112f;
  const I32 magnitude = (h & 0x7c00) == 0x7c00 ? ((h & 0x7fff) << 13) | 0x7f800000 : (I32)finite;
  return (F32)(magnitude | (h & 0x8000) << 16);
}
inline void narrow(Float16* p, F32 x) {
  const I32 bits = (I32)x, magnitude = bits & 0x7fffffff;
  const I32 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 lets the adder round a result below 2^-14 to a multiple of 2^-24, the denormals' unit.
  const I32 denormal = (I32)((F32)magnitude + 0.5f) - (I32)(F32{} + 0.5f);
  const I32 finite = magnitude < (113 << 23) ? denormal : normal;
  const I32 special = magnitude > 0x7f800000 ? I32{} + 0x7e00 : I32{} + 0x7c00;
  const I32 half = (magnitude >= 0x477ff000 ? special : finite) | ((bits >> 16) & 0x8000);
  const U16 out = __builtin_convertvector(half, U16);
  memcpy(p, &out, sizeof(out));
}
#endif
inline Pair load_pair(const Float16* p) { return {widen(p), widen(p + kLanes)}; }
inline void store_pair(Float16* p, Pair v) {
  narrow(p, v.a);
  narrow(p + kLanes, v.b);
}

// The first `live` < kPair elements, zeros after them; nothing beyond them is touched.
#if defined(__AVX512F__)
inline Pair load_part(const float* p, int64_t live) {
  const uint32_t mask = (1u << live) - 1;
  return {(F32)_mm512_maskz_loadu_ps(mask, p), (F32)_mm512_maskz_loadu_ps(mask >> 16, p + kLanes)};
}
inline Pair load_part(const BFloat16* p, int64_t live) {
  return split((I32)_mm512_maskz_loadu_epi16((1u << live) - 1, p));
}
inline Pair load_part(const Float16* p, int64_t live) {
  const __m512i h = _mm512_maskz_loadu_epi16((1u << live) - 1, p);
  return {widen(_mm512_castsi512_si256(h)), widen(_mm512_extracti64x4_epi64(h, 1))};
}
#else
inline Pair load_half(const float* p) { return {load(p), F32{}}; }
inline Pair load_half(const BFloat16* p) {
#if defined(__AVX2__)
  return split((I32)_mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p)));
#else
  I32 words{};
  memcpy(&words, p, kLanes * sizeof(*p));
  return split(words);
#endif
}
inline Pair load_half(const Float16* p) { return {widen(p), F32{}}; }
template <class T>
inline Pair load_part(const T* p, int64_t live) {
  if (live == kLanes) return load_half(p);  // the usual case: heads are multiples of 8
  T buffer[kPair] = {};
  memcpy(buffer, p, live * sizeof(T));
  return load_pair(buffer);
}
#endif
template <class T>
inline Pair load_pair(const T* p, int64_t live) {
  return live == kPair ? load_pair(p) : load_part(p, live);
}
template <class T>
inline void store_pair(T* p, Pair v, int64_t live) {
  if (live == kPair) return store_pair(p, v);
  T buffer[kPair];
  store_pair(buffer, v);
  memcpy(p, buffer, live * sizeof(T));
}

template <class T>
inline void prefetch_pair(const T* p) {
  for (size_t byte = 0; byte < kPair * sizeof(T); byte += 64) __builtin_prefetch((const char*)p + byte);
}

// Calls f(offset, live elements) for the pairs of a row.
template <class F>
__attribute__((always_inline)) inline void for_pairs(int64_t dim, const F& f) {
  int64_t i = 0;
#if !defined(__AVX512F__)
#pragma GCC unroll 4  // AVX2: a head of 64 in one turn
#endif
  for (; i + kPair <= dim; i += kPair) f(i, kPair);
  if (i < dim) f(i, dim - i);
}

// Lane i of the result is the sum of the lanes of x[i]: each level of the tree adds halves of two vectors.
inline F32 reduce_lanes(const F32* x) {
#if defined(__AVX512F__)
  __m512 half[8], quarter[4];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const __m512 u = (__m512)x[i + 8 * j], v = (__m512)x[i + 8 * j + 4];
      half[2 * i + j] = _mm512_add_ps(_mm512_shuffle_f32x4(u, v, 0x44), _mm512_shuffle_f32x4(u, v, 0xee));
    }
    const __m512 u = half[2 * i], v = half[2 * i + 1];
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u, v, 0x88), _mm512_shuffle_f32x4(u, v, 0xdd));
  }
  auto merge = [](__m512 u, __m512 v) {
    return _mm512_add_ps(_mm512_unpacklo_ps(u, v), _mm512_unpackhi_ps(u, v));
  };
  const __m512 u = merge(quarter[0], quarter[1]), v = merge(quarter[2], quarter[3]);
  return (F32)_mm512_add_ps(_mm512_shuffle_ps(u, v, 0x44), _mm512_shuffle_ps(u, v, 0xee));
#elif defined(__AVX2__)
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 u = (__m256)x[i], v = (__m256)x[i + 4];
    half[i] = _mm256_add_ps(_mm256_permute2f128_ps(u, v, 0x20), _mm256_permute2f128_ps(u, v, 0x31));
  }
  auto merge = [](__m256 u, __m256 v) {
    return _mm256_add_ps(_mm256_unpacklo_ps(u, v), _mm256_unpackhi_ps(u, v));
  };
  const __m256 u = merge(half[0], half[1]), v = merge(half[2], half[3]);
  return (F32)_mm256_add_ps(_mm256_shuffle_ps(u, v, 0x44), _mm256_shuffle_ps(u, v, 0xee));
#else
  F32 sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = (x[i][0] + x[i][2]) + (x[i][1] + x[i][3]);
  return sums;
#endif
}

// The lanes of a and b in turns, as two vectors.
inline Pair interleave(F32 a, F32 b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {(F32)_mm512_permutex2var_ps((__m512)a, low, (__m512)b),
          (F32)_mm512_permutex2var_ps((__m512)a, high, (__m512)b)};
#elif defined(__AVX2__)
  const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  return {(F32)_mm256_permute2f128_ps(even, odd, 0x20), (F32)_mm256_permute2f128_ps(even, odd, 0x31)};
#else
  return {F32{a[0], b[0], a[1], b[1]}, F32{a[2], b[2], a[3], b[3]}};
#endif
}

// x[i][j] becomes x[j][i].
inline void transpose(F32* x) {
  for (int step = 1; step < kLanes; step *= 2) {
    F32 y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      const Pair rows = interleave(x[i], x[i + kLanes / 2]);
      y[2 * i] = rows.a, y[2 * i + 1] = rows.b;
    }
    memcpy(x, y, sizeof(y));
  }
}

inline F64 widen(F32 x) { return __builtin_convertvector(x, F64); }

inline double sum(F64 x) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// first x^n + ... + last.
template <class... C>
inline F32 polynomial(F32 x, float first, C... rest) {
  F32 y = F32{} + first;
  ((y = y * x + rest), ...);
  return y;
}

// e^x for x <= 0 (NaN stays NaN), 0 below the smallest denormal; about 1 ulp. x = n ln2 + r with |r| <= ln2 /
// 2, the Taylor series of e^r to r^7 (its rest is below 1e-8), and 2^n in two factors so that denormal
// results are right.
inline F32 exp(F32 x) {
  x = select(x < -104.0f, F32{} - 104.0f, x);
  const F32 shifted = x * 1.44269504f + 0x1.8p23f;  // the low bits of the sum are the rounded integer
  const F32 n = shifted - 0x1.8p23f;
  const F32 r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln2 in two parts: n times the first is exact
  const F32 y = polynomial(r, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f);
  const I32 k = (I32)shifted - 0x4b400000, k0 = k >> 1, k1 = k - k0;
  return y * (F32)((k0 + 127) << 23) * (F32)((k1 + 127) << 23);
}

// 2^x for x <= 0 (NaN stays NaN), 0 below 2^-126; about 1 ulp. The minimax polynomial of 2^r on |r| <= 1/2.
inline F32 exp2(F32 x) {
  const F32 shifted = x + 0x1.8p23f, r = x - (shifted - 0x1.8p23f);
  const F32 y = polynomial(r, 1.53458124e-4f, 1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f, 0.240226462f,
                           0.693147182f, 1.0f);
  const F32 power = select(x < -126.0f, F32{}, (F32)((I32)y + ((I32)shifted << 23)));
  return select(x != x, x, power);  // the sum of bits would make a number of some NaNs
}

// ln x for normal x > 0 (NaN stays NaN), about 2 ulp: x = 2^n m with m in [2/3, 4/3), ln m = 2
// atanh((m-1)/(m+1)).
inline F32 log(F32 x) {
  const I32 n = ((I32)x - 0x3f2aaaab) >> 23;
  const F32 m = (F32)((I32)x - (n << 23));
  const F32 s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  const F32 y = polynomial(s2, 2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3);
  const F32 e = __builtin_convertvector(n, F32);
  // NaN has no exponent to speak of; x - x carries it into the result.
  return e * 0x1.62e4p-1f + (2.0f * s + (s * s2 * y + e * 0x1.7f7d1cp-20f)) + (x - x);
}

// Uninitialised floats for the time of one call, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data_((float*)::operator new(4 * floats, std::align_val_t(64))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return data_; }

 private:
  float* data_;
};

// Calls f(T{}) with the element type.
template <class F>
inline void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float32: return f(float{});
    case DType::BFloat16: return f(BFloat16{});
    case DType::Float16: return f(Float16{});
  }
}

}  // namespace flowcut::FLOWCUT_ISA
