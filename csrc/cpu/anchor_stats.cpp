// anchor_stats: one pass over K and V in fixed blocks of tokens, then a short pass over one number per token
// and head.
//
// A softmax keeps exp(logit - maximum of the block) per token and head, heads in the lanes, so that maximum,
// exponential and sum need no horizontal step. The second pass joins the blocks in order: the number of
// threads changes no bit.
#include <cfloat>

#include "simd.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kBlock = 32;         // tokens of one unit of work
constexpr int64_t kGrain = 64 * 1024;  // elements that are worth a thread

// How tokens are walked. From the caches: several rows at a time, which share the loads of the anchor and
// keep the adders busy. From memory: row by row in the order of the addresses, asking for later rows, since
// interleaved rows halve the bandwidth (bf16, 8 x 2305 tokens of 16 x 64, one core: 17 against 31 GB/s; 577
// tokens: 60 against 41).
constexpr int kRows = kLanes / 4;                  // as many as the registers hold
constexpr int kAhead = 4;                          // tokens
constexpr int64_t kCacheBytes = 12 * 1024 * 1024;  // K and V together

// Head 0 of a token.
template <class T>
inline const T* at(const Heads& x, int64_t batch, int64_t token) {
  return (const T*)x.data + batch * x.batch_stride + token * x.token_stride;
}

// Calls f<count>(t) for tokens t, ..., t + count - 1 of [begin, end); the arithmetic of a row is always the
// same.
template <class F>
inline void for_rows(bool cached, int64_t begin, int64_t end, const F& f) {
  if (cached)
    for (; begin + kRows <= end; begin += kRows) f.template operator()<kRows>(begin);
  for (; begin < end; ++begin) f.template operator()<1>(begin);
}

// A row of an anchor as floats in load_pair's order.
template <class T>
void pack(float* out, const T* x, int64_t dim, float scale) {
  for_pairs(dim, [&](int64_t i, int64_t live) {
    const Pair v = load_pair(x + i, live);
    store_pair(out + i, {v.a * scale, v.b * scale});
  });
}

// sums[row * kLanes]: products of consecutive tokens' rows with one packed row.
template <int kCount, class T>
inline void dots(F32* sums, const T* x, int64_t token_stride, const float* packed, int64_t dim) {
  F32 sum[kCount] = {};
  for_pairs(dim, [&](int64_t i, int64_t live) {
    const Pair b = load_pair(packed + i);
    for (int row = 0; row < kCount; ++row) {
      if (kCount == 1) prefetch_pair(x + kAhead * token_stride + i);
      const Pair a = load_pair(x + row * token_stride + i, live);
      sum[row] += a.a * b.a;
      sum[row] += a.b * b.b;
    }
  });
  for (int row = 0; row < kCount; ++row) sums[row * kLanes] = sum[row];
}

struct Shape {
  const AnchorStats& p;
  const int64_t element_bytes;
  const int64_t blocks = (p.tokens + kBlock - 1) / kBlock;
  const bool cached = p.batch * p.tokens * p.kv_heads * (p.dim + p.value_dim) * element_bytes <= kCacheBytes;
  // The cosine and the full norm see the heads of a token as one segment where they are contiguous.
  const bool merged = p.value.head_stride == p.value_dim;
  const int64_t segments = merged ? 1 : p.kv_heads;
  const int64_t segment = merged ? p.kv_heads * p.value_dim : p.value_dim;
};

// Softmax over the live tokens of the products of `rows` with `heads` anchor rows per anchor, averaged over
// heads.
struct Softmax {
  const Shape& s;
  const Heads &anchor, &rows;
  const int64_t heads, dim;
  const int64_t packed = round_up(dim, kPair), lanes = round_up(heads, kLanes), width = s.p.anchors * lanes;
  const Buffer anchors{s.p.batch * s.p.anchors * heads * packed};
  // Per token, and per block: the maximum logit, later the factor of the block's weights; the sum of the
  // weights.
  const Buffer weights{s.p.batch * s.p.tokens * width};
  const Buffer peaks{s.p.batch * s.blocks * width};
  const Buffer sums{s.p.batch * s.blocks * width};

  template <class T>
  void pack_anchors(float scale) const {
    float* out = anchors;
    for (int64_t b = 0; b < s.p.batch; ++b)
      for (int64_t r = 0; r < s.p.anchors; ++r)
        for (int64_t h = 0; h < heads; ++h, out += packed)
          pack(out, at<T>(anchor, b, r) + h * anchor.head_stride, dim, scale);
  }

  // Weights of tokens [begin, end) of a block, relative to the block's maximum, and their sum. Calls
  // then<count>(t) for the rows of tokens t, ..., t + count - 1 while the first-level cache holds them.
  template <class T, class F>
  void add_block(int64_t batch, int64_t block, int64_t begin, int64_t end, const F& then) const {
    const int64_t group = heads / s.p.kv_heads;
    float* weight = weights + batch * s.p.tokens * width;
    for_rows(s.cached, begin, end, [&]<int kCount>(int64_t t) {
      const float* q = anchors + batch * s.p.anchors * heads * packed;
      for (int64_t r = 0; r < s.p.anchors; ++r) {
        const T* x = at<T>(rows, batch, t);
        for (int64_t lane = 0, member = 0; lane < lanes; lane += kLanes) {
          F32 sums[kCount * kLanes];
          const int64_t live = min(kLanes, heads - lane);
          for (int64_t i = 0; i < live; ++i, q += packed) {
            dots<kCount>(sums + i, x, rows.token_stride, q, dim);
            if (++member == group) member = 0, x += rows.head_stride;
          }
          for (int row = 0; row < kCount; ++row) {
            for (int64_t i = live; i < kLanes; ++i) sums[row * kLanes + i] = F32{};
            store(weight + (t + row) * width + r * lanes + lane, reduce_lanes(sums + row * kLanes));
          }
        }
      }
      then.template operator()<kCount>(t);
    });
    for (int64_t i = 0; i < width; i += kLanes) {
      F32 peak = F32{} - FLT_MAX, sum{};
      for (int64_t t = begin; t < end; ++t) peak = max(peak, load(weight + t * width + i));
      for (int64_t t = begin; t < end; ++t) {
        const F32 w = exp(load(weight + t * width + i) - peak);
        store(weight + t * width + i, w);
        sum += w;
      }
      store(peaks + (batch * s.blocks + block) * width + i, peak);
      store(sums + (batch * s.blocks + block) * width + i, sum);
    }
  }

  // out[t] for the scored tokens of one anchor.
  void finish(int64_t batch, int64_t r, float* out) const {
    const Span span = s.p.spans[batch];
    if (span.scored == span.end) return;
    const float* weight = weights + batch * s.p.tokens * width + r * lanes;
    float* factor = peaks + batch * s.blocks * width + r * lanes;
    const float* sum = sums + batch * s.blocks * width + r * lanes;
    auto for_blocks = [&](auto f) {
      for (int64_t k = span.begin / kBlock; k * kBlock < span.end; ++k) f(k * width);
    };
    for (int64_t lane = 0; lane < lanes; lane += kLanes, factor += kLanes, sum += kLanes) {
      F32 peak = F32{} - FLT_MAX, total{}, inverse;
      for_blocks([&](int64_t k) { peak = max(peak, load(factor + k)); });
      for_blocks([&](int64_t k) {
        const F32 f = exp(load(factor + k) - peak);
        total += f * load(sum + k);
        store(factor + k, f);
      });
      inverse = 1.0f / (total * (float)heads);
      for (int64_t i = 0; i < kLanes; ++i)
        if (lane + i >= heads) inverse[i] = 0;  // a lane without a head
      for_blocks([&](int64_t k) { store(factor + k, load(factor + k) * inverse); });
    }
    factor -= lanes;
    for (int64_t t = span.scored, count; t < span.end; t += count) {
      count = min(kLanes, min((t / kBlock + 1) * kBlock, span.end) - t);
      F32 mean[kLanes] = {};
      for (int64_t i = 0; i < count; ++i)
        for (int64_t lane = 0; lane < lanes; lane += kLanes)
          mean[i] += load(weight + (t + i) * width + lane) * load(factor + t / kBlock * width + lane);
      store(out + t, reduce_lanes(mean), count);
    }
  }
};

// Cosine relevance and value norms of single tokens.
struct ValueStats {
  const Shape& s;
  const bool cosine = s.p.relevance == Relevance::Cosine, full = s.p.value_norm == ValueNorm::Full;
  const int64_t packed = round_up(s.segment, kPair), width = s.segments * packed;
  const Buffer anchors{cosine ? s.p.batch * s.p.anchors * width : 0};
  const Buffer norms{cosine ? s.p.batch * s.p.anchors : 0};

  template <class T>
  void pack_anchors() const {
    if (!cosine) return;
    const Heads& x = s.p.value_anchor;
    Buffer row(s.p.kv_heads * s.p.value_dim);
    for (int64_t b = 0; b < s.p.batch; ++b)
      for (int64_t r = 0; r < s.p.anchors; ++r) {
        // The heads of an anchor need not be contiguous where those of a token are.
        for (int64_t h = 0; h < s.p.kv_heads; ++h)
          memcpy((T*)(float*)row + h * s.p.value_dim, at<T>(x, b, r) + h * x.head_stride,
                 s.p.value_dim * sizeof(T));
        float* out = anchors + (b * s.p.anchors + r) * width;
        F32 square{};
        for (int64_t i = 0; i < s.segments; ++i)
          pack(out + i * packed, (T*)(float*)row + i * s.segment, s.segment, 1);
        for (int64_t i = 0; i < width; i += kLanes) square += load(out + i) * load(out + i);
        norms[b * s.p.anchors + r] = (float)__builtin_sqrt(sum(widen(square)));
      }
  }

  // Sums over the segments of some tokens: products with the anchor, squares, absolute values.
  template <class T, bool kCosine, bool kFull, int kCount>
  void add_rows(const T* x, const float* anchor, F32* product, F32* square, F32* absolute) const {
    F32 products[kCount] = {}, squares[kCount] = {};
    Pair absolutes[kCount] = {};  // no sign cancels what rounding adds up: two short chains, not a long one
    for (int64_t i = 0; i < s.segments; ++i, x += s.p.value.head_stride, anchor += packed)
      for_pairs(s.segment, [&](int64_t j, int64_t live) {
        const Pair a = kCosine ? load_pair(anchor + j) : Pair{};
        for (int row = 0; row < kCount; ++row) {
          if (kCount == 1) prefetch_pair(x + kAhead * s.p.value.token_stride + j);
          const Pair v = load_pair(x + row * s.p.value.token_stride + j, live);
          if (kCosine) {
            products[row] += v.a * a.a;
            products[row] += v.b * a.b;
            squares[row] += v.a * v.a;
            squares[row] += v.b * v.b;
          }
          if (kFull) absolutes[row].a += abs(v.a), absolutes[row].b += abs(v.b);
        }
      });
    for (int row = 0; row < kCount; ++row) {
      if (kCosine) product[row] = products[row], square[row] = squares[row];
      if (kFull) absolute[row] = absolutes[row].a + absolutes[row].b;
    }
  }

  // Absolute values of the sum over heads.
  template <class T, int kCount>
  void add_head_sums(const T* x, F32* absolute) const {
    for_pairs(s.p.value_dim, [&](int64_t j, int64_t live) {
      Pair sums[kCount] = {};
      for (int64_t h = 0; h < s.p.kv_heads; ++h)
        for (int row = 0; row < kCount; ++row) {
          const Pair v = load_pair(x + row * s.p.value.token_stride + h * s.p.value.head_stride + j, live);
          sums[row].a += v.a;
          sums[row].b += v.b;
        }
      for (int row = 0; row < kCount; ++row) absolute[row] += abs(sums[row].a) + abs(sums[row].b);
    });
  }

  // Scored tokens [begin, end), one vector of tokens at a time.
  template <class T>
  void add_block(int64_t batch, int64_t begin, int64_t end) const {
    const F32 tiny = F32{} + FLT_MIN;
    for (int64_t tile = begin; tile < end; tile += kLanes) {
      const int64_t count = min(kLanes, end - tile);
      F32 product[kLanes] = {}, square[kLanes] = {}, absolute[kLanes] = {}, norm{};
      auto row = [&](int64_t t) { return at<T>(s.p.value, batch, tile + t); };
      for (int64_t r = 0; r < (cosine ? s.p.anchors : 0); ++r) {
        const int64_t index = batch * s.p.anchors + r;
        const float* anchor = anchors + index * width;
        for_rows(s.cached, 0, count, [&]<int kCount>(int64_t t) {
          if (full && r == 0)
            add_rows<T, true, true, kCount>(row(t), anchor, product + t, square + t, absolute + t);
          else
            add_rows<T, true, false, kCount>(row(t), anchor, product + t, square + t, nullptr);
        });
        if (r == 0) norm = max(sqrt(reduce_lanes(square)), tiny);
        const F32 cos = reduce_lanes(product) / max(F32{} + norms[index], tiny) / norm;
        store(s.p.relevance_out + index * s.p.tokens + tile, (1.0f + cos) * 0.5f, count);
      }
      if (s.p.value_norm == ValueNorm::None) continue;
      if (!full || !cosine || s.p.anchors == 0)
        for_rows(s.cached, 0, count,
                 [&]<int kCount>(int64_t t) { add_norms<T, kCount>(batch, tile + t, absolute + t); });
      store_norms(batch, tile, count, absolute);
    }
  }

  // Terms of the value norms of some tokens.
  template <class T, int kCount>
  void add_norms(int64_t batch, int64_t token, F32* absolute) const {
    const T* row = at<T>(s.p.value, batch, token);
    if (full)
      add_rows<T, false, true, kCount>(row, nullptr, nullptr, nullptr, absolute);
    else
      add_head_sums<T, kCount>(row, absolute);
  }

  // Norms of up to a vector of tokens from their terms.
  void store_norms(int64_t batch, int64_t token, int64_t count, const F32* absolute) const {
    const float factor = full ? 1.0f : 1.0f / (float)s.p.kv_heads;
    store(s.p.norm_out + batch * s.p.tokens + token, reduce_lanes(absolute) * factor, count);
  }
};

// -sum p ln p / ln n with p = x / sum x; 1 where that is undefined.
float entropy_ratio(const float* x, int64_t n) {
  auto for_vectors = [&](auto f) {
    for (int64_t i = 0; i < n; i += kLanes) {
      F32 v{};
      memcpy(&v, x + i, min(kLanes, n - i) * sizeof(float));
      f(v);
    }
  };
  F64 totals{}, products{};
  for_vectors([&](F32 v) { totals += widen(v); });
  const float total = (float)sum(totals);
  if (n <= 1 || total == 0) return 1;
  // 0 ln 0 = 0; beside a sum of 1 the terms below the normal floats are nothing either.
  for_vectors([&](F32 v) {
    const F32 p = v / total;
    products += widen(select(p < FLT_MIN, F32{}, p * log(p)));
  });
  return (float)(-sum(products) / __builtin_log((double)n));
}

void clear_unscored(float* row, Span span, int64_t tokens) {
  memset(row, 0, span.scored * sizeof(float));
  memset(row + span.end, 0, (tokens - span.end) * sizeof(float));
}

template <class T>
void run_all(const AnchorStats& p, ParallelFor run) {
  const Shape s{p, sizeof(T)};
  const bool products = p.relevance == Relevance::Softmax || p.relevance == Relevance::ScaledSoftmax;
  const Softmax attention{s, p.query, p.key, p.heads, p.dim};
  const Softmax relevance{s, p.value_anchor, p.value, products ? p.kv_heads : 0, p.value_dim};
  const ValueStats values{s};
  attention.pack_anchors<T>(p.scale);
  relevance.pack_anchors<T>(p.relevance == Relevance::Softmax ? 1 : 1 / __builtin_sqrtf((float)p.value_dim));
  values.pack_anchors<T>();

  const int64_t elements = kBlock * p.kv_heads * (p.dim + p.value_dim) * max(p.anchors, 1);
  parallel_for(run, p.batch * s.blocks, max(1, kGrain / max(elements, 1)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t batch = i / s.blocks, block = i % s.blocks;
      const Span span = p.spans[batch];
      if (block == 0 && p.value_norm != ValueNorm::None)
        clear_unscored(p.norm_out + batch * p.tokens, span, p.tokens);
      const int64_t begin = max(block * kBlock, span.begin), end = min((block + 1) * kBlock, span.end);
      if (begin >= end) continue;
      attention.add_block<T>(batch, block, begin, end, []<int>(int64_t) {});
      if (!products) {
        values.add_block<T>(batch, max(begin, span.scored), end);
        continue;
      }
      F32 absolute[kBlock + kLanes] = {};  // the last vector of tokens may reach beyond the block
      relevance.add_block<T>(batch, block, begin, end, [&]<int kCount>(int64_t t) {
        if (p.value_norm != ValueNorm::None) values.add_norms<T, kCount>(batch, t, absolute + (t - begin));
      });
      if (p.value_norm == ValueNorm::None) continue;
      for (int64_t t = max(begin, span.scored); t < end; t += kLanes)
        values.store_norms(batch, t, min(kLanes, end - t), absolute + (t - begin));
    }
  });
  const int64_t width = attention.lanes + relevance.lanes;
  parallel_for(run, p.batch * p.anchors, max(1, kGrain / max(p.tokens * width, 1)),
               [&](int64_t first, int64_t last) {
                 for (int64_t i = first; i < last; ++i) {
                   const Span span = p.spans[i / p.anchors];
                   float *a = p.attention_out + i * p.tokens, *r = p.relevance_out + i * p.tokens;
                   clear_unscored(a, span, p.tokens);
                   attention.finish(i / p.anchors, i % p.anchors, a);
                   p.entropy_out[i] = entropy_ratio(a + span.scored, span.end - span.scored);
                   if (p.relevance != Relevance::None) clear_unscored(r, span, p.tokens);
                   if (products) relevance.finish(i / p.anchors, i % p.anchors, r);
                 }
               });
}

}  // namespace

void anchor_stats(const AnchorStats& p, ParallelFor run) {
  with_dtype(p.dtype, [&](auto type) { run_all<decltype(type)>(p, run); });
}

}  // namespace flowcut::FLOWCUT_ISA
