// attention: flash attention with queries in the lanes (logits.h). Outputs are formed as V^T P^T by the same
// micro-kernel, so that V is not transposed either, and by the same steps wherever their query lies. One
// thread of an EPYC with AVX512-BF16, 16 heads of 577 x 577 x 64: float 7.2 ms, bfloat16 4.2 ms, torch 19 and
// 20 ms.
#include <cfloat>

#include "logits.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

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
  const int64_t group = p.heads / p.kv_heads, columns = round_up(p.value_dim, kRows);
  const Logits<T, Words> logits{p.query, p.key, group, p.tokens, p.dim};
  const Buffer values{(p.tokens + kPer - 1) / kPer * columns};  // [word of tokens][columns]
  const Buffer tile{kTile * kBlock};                            // [token][query]: logits, then weights
  const Buffer sums{round_up(columns, kPair) * kBlock};         // [column][query]

  void pack_head(int64_t batch, int64_t head, Span span) const {
    const int64_t live = span.end - span.begin;
    logits.pack_keys(batch, head, span.begin, live);
    for (int64_t t = 0; t < live; t += kPer) {
      float* out = values + t / kPer * columns;
      const T* x = logits.at(p.value, batch, head, span.begin + t);
      Words::join(out, x, t + kPer <= live ? x + p.value.token_stride : nullptr, p.value_dim);
      memset(out + p.value_dim, 0, (columns - p.value_dim) * sizeof(float));
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

  // Queries [first, first + count) of those that share the packed head, kCount vectors of them.
  template <int kCount>
  void attend(int64_t batch, int64_t head, int64_t first, int64_t count, int64_t live) const {
    constexpr int64_t kWidth = kCount * kLanes;
    const float scale = p.scale * 1.44269504f;  // weights are powers of two
    logits.template pack_queries<kCount>(batch, head, p.queries, first, count);
    memset(sums, 0, round_up(columns, kPair) * kWidth * sizeof(float));
    F32 peak[kCount], total[kCount] = {};
    for (F32& x : peak) x = F32{} - FLT_MAX;
    for (int64_t begin = 0; begin < live; begin += kTile) {
      const int64_t tokens = min(kTile, live - begin);
      F32 decay[kCount];
      for (int j = 0; j < kCount; ++j) decay[j] = peak[j];
      logits.template form<kCount>(tile, peak, begin, tokens, scale);
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
                   with_vectors(count, [&]<int kCount>() {
                     worker.template attend<kCount>(batch, head, first, count, span.end - span.begin);
                   });
                 }
               });
}

}  // namespace

void attention(const Attention& p, ParallelFor run) {
  with_words(p.dtype, [&](auto type, auto words) { run_all<decltype(type), decltype(words)>(p, run); });
}

}  // namespace flowcut::FLOWCUT_ISA
