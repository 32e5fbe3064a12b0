// attention: flash attention with queries in the lanes. Logits are formed as K Q^T and outputs as V^T P^T, so
// that maximum, exponential and sum of a softmax run down the rows without a horizontal step, and neither K
// nor V is transposed. One thread of an EPYC with AVX512-BF16, 16 heads of 577 x 577 x 64: float 7.2 ms,
// bfloat16 4.2 ms, torch 19 and 20 ms.
//
// Both products are one micro-kernel on 32-bit words: a float, or two bfloat16 where the machine multiplies
// those (two neighbours along the dimension that is summed over). Every output is computed by the same steps
// in the same order wherever its query lies: neither the threads nor the neighbours change a bit.
#include <cfloat>

#include "simd.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;  // accumulators of the micro-kernel: 24 of 32 registers
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int64_t kTile = 96;                // keys between two rescalings: logits and weights stay in L1
constexpr int64_t kGrain = 4 * 1024 * 1024;  // products that are worth a thread

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

// 2^x for x <= 0 (NaN stays NaN), 0 below 2^-126; about 1 ulp. The minimax polynomial of 2^r on |r| <= 1/2.
inline F32 exp2(F32 x) {
  const F32 shifted = x + 0x1.8p23f, r = x - (shifted - 0x1.8p23f);
  const F32 y = polynomial(r, 1.53458124e-4f, 1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f, 0.240226462f,
                           0.693147182f, 1.0f);
  const F32 power = select(x < -126.0f, F32{}, (F32)((I32)y + ((I32)shifted << 23)));
  return select(x != x, x, power);  // the sum of bits would make a number of some NaNs
}

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

// Where store_pair puts lane i of a Pair's first vector: i * kStep, of its second one: kSecond + i * kStep.
template <class T>
constexpr int kStep = 1;
template <class T>
constexpr int kSecond = kLanes;
template <>
constexpr int kStep<BFloat16> = 2;
template <>
constexpr int kSecond<BFloat16> = 1;

// What one thread holds: a head of K and V in words, and the state of one block of queries.
template <class T, class Words>
struct Worker {
  static constexpr int kPer = Words::kPerWord;
  const Attention& p;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t depth = (p.dim + kPer - 1) / kPer, columns = round_up(p.value_dim, kRows);
  const Buffer keys{round_up(p.tokens, kRows) * depth};             // [token][depth]
  const Buffer values{(p.tokens + kPer - 1) / kPer * columns};      // [word of tokens][columns]
  const Buffer rows{kLanes * round_up(depth, kLanes)};              // queries before their transposition
  const Buffer queries{depth * kVectors * kLanes};                  // [depth][query]
  const Buffer tile{kTile * kVectors * kLanes};                     // [token][query]: logits, then weights
  const Buffer sums{round_up(columns, kPair) * kVectors * kLanes};  // [column][query]

  static const T* at(const Heads& x, int64_t batch, int64_t head, int64_t token) {
    return (const T*)x.data + batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
  }

  void pack_head(int64_t batch, int64_t head, Span span) const {
    const int64_t live = span.end - span.begin;
    // The rows that fill the last micro-kernel repeat a live key, which changes no maximum.
    for (int64_t t = 0; t < round_up(live, kRows); ++t)
      Words::pack(keys + t * depth, at(p.key, batch, head, span.begin + min(t, live - 1)), p.dim);
    for (int64_t t = 0; t < live; t += kPer) {
      float* out = values + t / kPer * columns;
      const T* x = at(p.value, batch, head, span.begin + t);
      Words::join(out, x, t + kPer <= live ? x + p.value.token_stride : nullptr, p.value_dim);
      memset(out + p.value_dim, 0, (columns - p.value_dim) * sizeof(float));
    }
  }

  template <int kCount>
  void pack_queries(int64_t batch, int64_t head, int64_t first, int64_t count) const {
    const int64_t width = round_up(depth, kLanes);
    for (int64_t lane = 0; lane < kCount * kLanes; lane += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t q = first + min(lane + i, count - 1);  // lanes without a query repeat the last one
        Words::pack(rows + i * width, at(p.query, batch, head * group + q / p.queries, q % p.queries), p.dim);
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

  // The sums of queries [first, first + count) times the queries' factors.
  template <int kCount>
  void write(int64_t batch, int64_t head, int64_t first, int64_t count, const F32* factor) const {
    constexpr int step = kStep<T>, second = kSecond<T>;
    for (int64_t lane = 0; lane < count; lane += kLanes)
      for_pairs(p.value_dim, [&](int64_t c, int64_t live) {
        F32 x[2][kLanes];
        for (int j = 0; j < 2; ++j) {
          for (int i = 0; i < kLanes; ++i) {
            const int64_t column = c + j * second + i * step;
            x[j][i] = load(sums + column * kCount * kLanes + lane) * factor[lane / kLanes];
          }
          transpose(x[j]);
        }
        for (int64_t i = 0; i < min(kLanes, count - lane); ++i) {
          const int64_t q = first + lane + i, token = batch * p.queries + q % p.queries;
          T* out = (T*)p.out + (token * p.heads + head * group + q / p.queries) * p.value_dim;
          store_pair(out + c, {x[0][i], x[1][i]}, live);
        }
      });
  }

  // Queries [first, first + count) of those that share the packed head, kCount vectors of them; the queries
  // of one head come after those of another.
  template <int kCount>
  void attend(int64_t batch, int64_t head, int64_t first, int64_t count, int64_t live) const {
    constexpr int64_t kWidth = kCount * kLanes;
    const float scale = p.scale * 1.44269504f;  // weights are powers of two
    pack_queries<kCount>(batch, head, first, count);
    memset(sums, 0, round_up(columns, kPair) * kWidth * sizeof(float));
    F32 peak[kCount], total[kCount] = {};
    for (F32& x : peak) x = F32{} - FLT_MAX;
    for (int64_t begin = 0; begin < live; begin += kTile) {
      const int64_t tokens = min(kTile, live - begin);
      F32 decay[kCount];
      for (int j = 0; j < kCount; ++j) decay[j] = peak[j];
      for (int64_t t = 0; t < tokens; t += kRows) {
        F32 logits[kRows][kCount] = {};
        multiply<Words>(logits, keys + (begin + t) * depth, depth, 1, queries, depth);
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kCount; ++j) {
            const F32 logit = logits[i][j] * scale;
            store(tile + (t + i) * kWidth + j * kLanes, logit);
            peak[j] = max(logit, peak[j]);
          }
      }
      F32 sum_of_tile[kCount] = {};
      for (int64_t t = 0; t < tokens; t += kPer)
        for (int j = 0; j < kCount; ++j) {
          F32 weight[kPer] = {};
          for (int i = 0; i < min(kPer, tokens - t); ++i) {
            weight[i] = exp2(load(tile + (t + i) * kWidth + j * kLanes) - peak[j]);
            sum_of_tile[j] += weight[i];
          }
          store(tile + t / kPer * kWidth + j * kLanes, Words::join(weight));
        }
      for (int j = 0; j < kCount; ++j) {
        decay[j] = exp2(decay[j] - peak[j]);
        total[j] = total[j] * decay[j] + sum_of_tile[j];
      }
      for (int64_t c = 0; c < columns; c += kRows) {
        F32 sum[kRows][kCount] = {};
        multiply<Words>(sum, values + begin / kPer * columns + c, 1, columns, tile,
                        (tokens + kPer - 1) / kPer);
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kCount; ++j) {
            float* kept = sums + (c + i) * kWidth + j * kLanes;
            store(kept, load(kept) * decay[j] + sum[i][j]);
          }
      }
    }
    // Without a live key, or with no logit above -inf: zeros, as torch gives.
    for (F32& x : total) x = select(x == 0.0f, F32{}, 1.0f / x);
    write<kCount>(batch, head, first, count, total);
  }
};

template <class T, class Words>
void run_all(const Attention& p, ParallelFor run) {
  constexpr int64_t kBlock = kVectors * kLanes;
  const int64_t shared = p.heads / p.kv_heads * p.queries, blocks = (shared + kBlock - 1) / kBlock;
  const int64_t products = min(shared, kBlock) * p.tokens * (p.dim + p.value_dim);
  // A thread packs a head once for all its blocks; threads that share a head pack it each.
  parallel_for(run, p.batch * p.kv_heads * blocks, max(1, kGrain / max(products, 1)),
               [&](int64_t begin, int64_t end) {
                 const Worker<T, Words> worker{p};
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t batch = i / blocks / p.kv_heads, head = i / blocks % p.kv_heads;
                   const int64_t first = i % blocks * kBlock, count = min(kBlock, shared - first);
                   const Span span = p.spans[batch];
                   if (i == begin || first == 0) worker.pack_head(batch, head, span);
                   auto attend = [&]<int kCount>() {
                     worker.template attend<kCount>(batch, head, first, count, span.end - span.begin);
                   };
                   if (count <= kLanes)
                     attend.template operator()<1>();
                   else if (count <= 2 * kLanes)
                     attend.template operator()<2>();
                   else
                     attend.template operator()<kVectors>();
                 }
               });
}

}  // namespace

void attention(const Attention& p, ParallelFor run) {
#if defined(__AVX512BF16__)
  if (p.dtype == DType::BFloat16) return run_all<BFloat16, Pairs>(p, run);
#endif
  with_dtype(p.dtype, [&](auto type) { run_all<decltype(type), Floats>(p, run); });
}

}  // namespace flowcut::FLOWCUT_ISA
