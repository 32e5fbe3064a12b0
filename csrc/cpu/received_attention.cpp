// received_attention: column sums of softmax(Q K^T), with queries in the lanes (logits.h). A block of queries
// leaves its weights relative to the peaks of the moment, its factors follow once it has seen all keys: one
// product, one exponential per weight, and memory for one block of rows. Where the rows' log-sum-exp is
// given, the weights of a tile are final and go straight into the sums.
//
// A key's sums stay apart by head and by part of the rows until the end. How rows fall into blocks and parts
// depends on the sample's live tokens alone: neither the threads nor the neighbours change a bit.
#include <cfloat>

#include "logits.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kParts = 16;      // of the rows that share a head, at most: their sums are kept apart
constexpr int64_t kPartBlocks = 4;  // blocks of rows that are worth a part

// What one thread holds: a head of K in words, the weights of a block of queries, and the sums of a part.
template <class T, class Words>
struct Worker {
  const ReceivedAttention& p;
  const float scale = p.scale * 1.44269504f;  // weights are powers of two
  const int64_t tiles = (p.tokens + kTile - 1) / kTile;
  const Logits<T, Words> logits{p.query, p.key, p.heads / p.kv_heads, p.tokens, p.dim};
  const Buffer weights{(p.lse ? 1 : tiles) * kTile * kBlock};  // [token][query]
  const Buffer peaks{tiles * kBlock};                          // [tile][query]
  const Buffer sums{round_up(p.tokens, kLanes) * kLanes};      // [token][lane]

  // Adds the weights of tokens [begin, begin + count), times the queries' factors, to the tokens' sums.
  template <int kCount>
  void add(const float* weight, const F32 (&factor)[kCount], int64_t begin, int64_t count) const {
    for (int64_t t = 0; t < count; ++t) {
      F32 sum = load(sums + (begin + t) * kLanes);
      for (int j = 0; j < kCount; ++j) sum += load(weight + (t * kCount + j) * kLanes) * factor[j];
      store(sums + (begin + t) * kLanes, sum);
    }
  }

  // A tile's logits become weights relative to the queries' peaks.
  template <int kCount>
  static void weigh(float* tile, const F32 (&peak)[kCount], F32 (&sum)[kCount], int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int j = 0; j < kCount; ++j) {
        const F32 weight = exp2(load(tile + (t * kCount + j) * kLanes) - peak[j]);
        store(tile + (t * kCount + j) * kLanes, weight);
        sum[j] += weight;
      }
  }

  // The packed queries, each counting `share`.
  template <int kCount>
  void add_block(const F32 (&share)[kCount], int64_t live) const {
    F32 peak[kCount], total[kCount] = {};
    for (F32& x : peak) x = F32{} - FLT_MAX;
    for (int64_t begin = 0; begin < live; begin += kTile) {
      const int64_t tokens = min(kTile, live - begin);
      float *tile = weights + begin * kCount * kLanes, *peak_then = peaks + begin / kTile * kCount * kLanes;
      F32 shrink[kCount], sum[kCount] = {};
      for (int j = 0; j < kCount; ++j) shrink[j] = peak[j];
      logits.template form<kCount>(tile, peak, begin, tokens, scale);
      weigh(tile, peak, sum, tokens);
      for (int j = 0; j < kCount; ++j) {
        total[j] = total[j] * exp2(shrink[j] - peak[j]) + sum[j];
        store(peak_then + j * kLanes, peak[j]);
      }
    }
    for (int64_t begin = 0; begin < live; begin += kTile) {
      const float* peak_then = peaks + begin / kTile * kCount * kLanes;
      F32 factor[kCount];
      for (int j = 0; j < kCount; ++j)
        factor[j] = share[j] * exp2(load(peak_then + j * kLanes) - peak[j]) / total[j];
      add(weights + begin * kCount * kLanes, factor, begin, min(kTile, live - begin));
    }
  }

  // The same with the log-sum-exp of each.
  template <int kCount>
  void add_block(const F32 (&share)[kCount], const F32 (&lse)[kCount], int64_t live) const {
    F32 unused[kCount] = {};
    for (int64_t begin = 0; begin < live; begin += kTile) {
      const int64_t tokens = min(kTile, live - begin);
      logits.template form<kCount>(weights, unused, begin, tokens, scale);
      weigh(weights, lse, unused, tokens);
      add(weights, share, begin, tokens);
    }
  }

  // Queries [first, first + count) of those that share the packed head, kCount vectors of them.
  template <int kCount>
  void add_queries(int64_t batch, int64_t head, int64_t first, int64_t count, int64_t live) const {
    logits.template pack_queries<kCount>(batch, head, live, first, count);
    F32 share[kCount] = {}, lse[kCount];
    for (F32& x : lse) x = F32{} + FLT_MAX;
    for (int64_t i = 0; i < count; ++i) {  // lanes without a query count nothing
      const int64_t q = first + i, row = batch * p.heads + head * logits.group + q / live;
      share[i / kLanes][i % kLanes] = 1;
      if (p.lse) lse[i / kLanes][i % kLanes] = p.lse[row * p.tokens + q % live] * 1.44269504f;
    }
    if (p.lse)
      add_block(share, lse, live);
    else
      add_block(share, live);
  }

  // out[t]: the sum of column t over queries [first, end) of those that share the packed head.
  void add_part(float* out, int64_t batch, int64_t head, int64_t first, int64_t end, int64_t live) const {
    memset(sums, 0, round_up(live, kLanes) * kLanes * sizeof(float));
    for (; first < end; first += kBlock) {
      const int64_t count = min(kBlock, end - first);
      with_vectors(count, [&]<int kCount>() { add_queries<kCount>(batch, head, first, count, live); });
    }
    for (int64_t t = 0; t < live; t += kLanes) {
      F32 lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = load(sums + (t + i) * kLanes);
      store(out + t, reduce_lanes(lanes), min(kLanes, live - t));
    }
  }
};

template <class T, class Words>
void run_all(const ReceivedAttention& p, ParallelFor run) {
  const int64_t group = p.heads / p.kv_heads;
  // Of a sample with `live` tokens: blocks of rows that share a head, rows of a part, and parts.
  auto blocks = [&](int64_t live) { return (group * live + kBlock - 1) / kBlock; };
  auto part_rows = [&](int64_t live) {
    return max((blocks(live) + kParts - 1) / kParts, kPartBlocks) * kBlock;
  };
  auto parts = [&](int64_t live) { return (group * live + part_rows(live) - 1) / part_rows(live); };
  // Fewer tokens may make more parts, but never more than this.
  const int64_t most = min(kParts, (blocks(p.tokens) + kPartBlocks - 1) / kPartBlocks);
  // [batch][head][part][token], and what the last vector of tokens has too many.
  const Buffer sums(p.batch * p.kv_heads * most * p.tokens + kLanes);

  const int64_t products = min(group * p.tokens, part_rows(p.tokens)) * p.tokens * p.dim;
  // A thread packs a head once for all its parts; threads that share a head pack it each.
  parallel_for(
      run, p.batch * p.kv_heads * most, max(1, kGrain / max(products, 1)), [&](int64_t begin, int64_t end) {
        const Worker<T, Words> worker{p};
        for (int64_t i = begin; i < end; ++i) {
          const int64_t batch = i / most / p.kv_heads, head = i / most % p.kv_heads, part = i % most;
          const int64_t live = p.lengths[batch], rows = part_rows(live), first = part * rows;
          if (first >= group * live) continue;
          if (i == begin || part == 0) worker.logits.pack_keys(batch, head, 0, live);
          worker.add_part(sums + i * p.tokens, batch, head, first, min(first + rows, group * live), live);
        }
      });
  const int64_t chunks = (p.tokens + kLanes - 1) / kLanes, terms = p.kv_heads * most * kLanes;
  parallel_for(run, p.batch * chunks, max(1, kGrain / max(terms, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / chunks, t = i % chunks * kLanes, live = p.lengths[batch];
      F64 total{};
      for (int64_t head = 0; head < p.kv_heads && t < live; ++head)
        for (int64_t part = 0; part < parts(live); ++part)
          total += widen(load(sums + ((batch * p.kv_heads + head) * most + part) * p.tokens + t));
      F32 mean = __builtin_convertvector(total / (double)(p.heads * max(live, 1)), F32);
      for (int64_t lane = max(live - t, 0); lane < kLanes; ++lane) mean[lane] = 0;
      store(p.out + batch * p.tokens + t, mean, min(kLanes, p.tokens - t));
    }
  });
}

}  // namespace

void received_attention(const ReceivedAttention& p, ParallelFor run) {
  with_words(p.dtype, [&](auto type, auto words) { run_all<decltype(type), decltype(words)>(p, run); });
}

}  // namespace flowcut::FLOWCUT_ISA
