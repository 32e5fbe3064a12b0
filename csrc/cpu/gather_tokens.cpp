// gather_tokens: rows copied as bytes, and the norm of a row while it is in the first-level cache.
#include "simd.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // bytes that are worth a thread
constexpr int64_t kStreamed = 8 << 20;  // bytes that no longer wait in cache for whoever reads them next

// LayerNorm or RMSNorm of one row, statistics in float; RMSNorm rounds to T before the weight, as Llama does.
template <class T>
void norm_row(const GatherTokens& p, const T* x, T* out) {
  const T *weight = (const T*)p.norm_weight, *bias = (const T*)p.norm_bias;
  const int64_t whole = p.dim / kPair * kPair, rest = p.dim - whole;
  auto mean_of = [&](auto f) {
    Pair total{};
    auto add = [&](Pair v) {
      total.a += f(v.a);
      total.b += f(v.b);
    };
    for (int64_t i = 0; i < whole; i += kPair) add(load_pair(x + i));
    if (rest) {
      // Elements one by one, each in a vector of its own: none of the filling zeros may count.
      for (int64_t i = whole; i < p.dim; ++i) total.a[0] += f(load_pair(x + i, 1).a)[0];
    }
    return (float)(sum(widen(total.a + total.b)) / (double)p.dim);
  };
  const float mean = p.rms ? 0 : mean_of([](F32 v) { return v; });
  const float variance = mean_of([&](F32 v) { return (v - mean) * (v - mean); });
  const float scale = 1 / __builtin_sqrtf(variance + p.eps);

  auto normed = [&](Pair v, Pair w, Pair b) -> Pair {
    v = {(v.a - mean) * scale, (v.b - mean) * scale};
    if (p.rms) {
      T rounded[kPair];
      store_pair(rounded, v);
      v = load_pair(rounded);
    }
    return {v.a * w.a + b.a, v.b * w.b + b.b};
  };
  for (int64_t i = 0; i < whole; i += kPair)
    store_pair(out + i, normed(load_pair(x + i), load_pair(weight + i), bias ? load_pair(bias + i) : Pair{}));
  if (rest) {
    const Pair b = bias ? load_pair(bias + whole, rest) : Pair{};
    store_pair(out + whole, normed(load_pair(x + whole, rest), load_pair(weight + whole, rest), b), rest);
  }
}

}  // namespace

void gather_tokens(const GatherTokens& p, ParallelFor run) {
  int64_t bytes = 1;
  for (int64_t i = 0; i < p.count; ++i) bytes += p.inputs[i].row_bytes;
  const bool streamed = p.batch * p.kept * bytes > kStreamed;
  parallel_for(run, p.batch * p.kept, max(1, kGrain / bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < p.count; ++i) {
      const Rows& x = p.inputs[i];
      for (int64_t row = first; row < last; ++row) {
        char* out = x.out + row * x.row_bytes;
        const int64_t batch = row / p.kept, token = p.index[batch * p.index_stride + row % p.kept];
        if (token < 0)
          memset(out, 0, x.row_bytes);
        else
          copy(out, x.data + batch * x.batch_stride + token * x.token_stride, x.row_bytes, streamed);
        if (i > 0 || !p.norm_out) continue;
        char* normed = (char*)p.norm_out + row * x.row_bytes;
        if (token < 0)
          memset(normed, 0, x.row_bytes);
        else
          with_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            norm_row(p, (const T*)out, (T*)normed);
          });
      }
    }
    if (streamed) publish_streamed();
  });
}

}  // namespace flowcut::FLOWCUT_ISA
