// Logits with queries in the lanes: what attention and received_attention are made of. They are formed as K
// Q^T, so that maximum, exponential and sum of a softmax run down the rows without a horizontal step, and K
// is not transposed.
//
// The product is a micro-kernel on 32-bit words: a float, or two bfloat16 where the machine multiplies those
// (two neighbours along the dimension that is summed over). Every logit is computed by the same steps in the
// same order wherever its query lies: neither the threads nor the neighbours change a bit.
#pragma once

#include "simd.h"

namespace flowcut::FLOWCUT_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;  // accumulators of the micro-kernel: 24 of 32 registers
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int64_t kBlock = kVectors * kLanes;  // queries that are worked on together
constexpr int64_t kTile = 96;                  // keys between two rescalings: logits and weights stay in L1
constexpr int64_t kGrain = 4 * 1024 * 1024;    // products that are worth a thread

// How elements become words, and what a product of words is.
struct Floats {
  static constexpr int kPerWord = 1;
  static F32 multiply_add(F32 sum, F32 a, F32 b) { return sum + a * b; }

  static void pack(float* out, const float* x, int64_t dim) { memcpy(out, x, dim * sizeof(float)); }
  static void pack(float* out, const BFloat16* x, int64_t dim) {
    for (int64_t i = 0; i < dim; ++i) {
      const uint32_t bits = (uint32_t)x[i].bits << 16;
      memcpy(out + i, &bits, sizeof(bits));
    }
  }
  static void pack(float* out, const Float16* x, int64_t dim) {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(out + i, widen(x + i));
    if (i == dim) return;
    Float16 rest[kLanes] = {};
    memcpy(rest, x + i, (dim - i) * sizeof(*x));
    store(out + i, widen(rest), dim - i);
  }
  template <class T>
  static void join(float* out, const T* x, const T*, int64_t dim) {
    pack(out, x, dim);
  }
  static F32 join(const F32* x) { return x[0]; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPerWord = 2;
  static F32 multiply_add(F32 sum, F32 a, F32 b) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  // Neighbours of a row; an odd one is paired with zero.
  static void pack(float* out, const BFloat16* x, int64_t dim) {
    if (dim % 2) out[dim / 2] = 0;
    memcpy(out, x, dim * sizeof(*x));
  }
  // Two rows; null for the one that an odd end lacks.
  static void join(float* out, const BFloat16* x, const BFloat16* next, int64_t dim) {
    for (int64_t i = 0; i < dim; ++i) {
      const uint32_t word = x[i].bits | (next ? (uint32_t)next[i].bits << 16 : 0);
      memcpy(out + i, &word, sizeof(word));
    }
  }
  // Weights, rounded to nearest; a tie, which goes up, is one case in 2^16.
  static F32 join(const F32* x) {
    const I32 low = (I32)x[0] + 0x8000, high = (I32)x[1] + 0x8000;
    return (F32)(((low >> 16) & 0xffff) | (high & (int32_t)0xffff0000));
  }
};
#endif

// sum[i][j] += a's row i times b's column vector j over `depth` words; b is [depth][kCount vectors].
template <class Words, int kCount>
inline void multiply(F32 (&sum)[kRows][kCount], const float* a, int64_t row_stride, int64_t word_stride,
                     const float* b, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, a += word_stride, b += kCount * kLanes) {
    F32 column[kCount];
    for (int j = 0; j < kCount; ++j) column[j] = load(b + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      int32_t word;
      memcpy(&word, a + i * row_stride, sizeof(word));
      const F32 row = (F32)(I32{} + word);
      for (int j = 0; j < kCount; ++j) sum[i][j] = Words::multiply_add(sum[i][j], row, column[j]);
    }
  }
}

// What one thread holds: the keys of one head in words, and a block of the queries that share them. The
// queries of one head come after those of another, `each` of a head.
template <class T, class Words>
struct Logits {
  const Heads &query, &key;
  const int64_t group, tokens, dim;  // query heads per key head; the most keys there are
  const int64_t depth = (dim + Words::kPerWord - 1) / Words::kPerWord;
  const Buffer keys{round_up(tokens, kRows) * depth};   // [token][depth]
  const Buffer rows{kLanes * round_up(depth, kLanes)};  // queries before their transposition
  const Buffer queries{depth * kBlock};                 // [depth][query]

  static const T* at(const Heads& x, int64_t batch, int64_t head, int64_t token) {
    return (const T*)x.data + batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
  }

  // `live` keys from `begin`.
  void pack_keys(int64_t batch, int64_t head, int64_t begin, int64_t live) const {
    // The rows that fill the last micro-kernel repeat a live key, which changes no maximum.
    for (int64_t t = 0; t < round_up(live, kRows); ++t)
      Words::pack(keys + t * depth, at(key, batch, head, begin + min(t, live - 1)), dim);
  }

  template <int kCount>
  void pack_queries(int64_t batch, int64_t head, int64_t each, int64_t first, int64_t count) const {
    const int64_t width = round_up(depth, kLanes);
    for (int64_t lane = 0; lane < kCount * kLanes; lane += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t q = first + min(lane + i, count - 1);  // lanes without a query repeat the last one
        Words::pack(rows + i * width, at(query, batch, head * group + q / each, q % each), dim);
      }
      for (int64_t k = 0; k < depth; k += kLanes) {
        F32 x[kLanes];
        for (int i = 0; i < kLanes; ++i) x[i] = load(rows + i * width + k);
        transpose(x);
        for (int i = 0; i < min(kLanes, depth - k); ++i)
          store(queries + (k + i) * kCount * kLanes + lane, x[i]);
      }
    }
  }

  // tile [token][query]: the logits of `count` keys from the packed one `first`; raises the queries' peaks to
  // them. Out of line: among a caller's vectors GCC leaves the micro-kernel's columns in memory and loads them
  // once per row (AVX2: received_attention took 1.37 times as long).
  template <int kCount>
  __attribute__((noinline)) void form(float* tile, F32 (&peak)[kCount], int64_t first, int64_t count,
                                      float scale) const {
    for (int64_t t = 0; t < count; t += kRows) {
      F32 logits[kRows][kCount] = {};
      multiply<Words>(logits, keys + (first + t) * depth, depth, 1, queries, depth);
      for (int j = 0; j < kCount; ++j) {
        F32 top = peak[j];  // the tile might overlap the peaks, for all that the compiler knows
        for (int i = 0; i < kRows; ++i) {
          const F32 logit = logits[i][j] * scale;
          store(tile + ((t + i) * kCount + j) * kLanes, logit);
          top = max(logit, top);
        }
        peak[j] = top;
      }
    }
  }
};

// Calls f(T{}, Words{}) with the element type and the words it becomes.
template <class F>
inline void with_words(DType dtype, const F& f) {
#if defined(__AVX512BF16__)
  if (dtype == DType::BFloat16) return f(BFloat16{}, Pairs{});
#endif
  with_dtype(dtype, [&](auto type) { f(type, Floats{}); });
}

// Calls f<kCount>() with as many vectors as `count` queries need.
template <class F>
inline void with_vectors(int64_t count, const F& f) {
  if (count <= kLanes)
    f.template operator()<1>();
  else if (count <= 2 * kLanes)
    f.template operator()<2>();
  else
    f.template operator()<kVectors>();
}

}  // namespace flowcut::FLOWCUT_ISA
