// recycle_tokens: each cell's rows added up a block of columns at a time, the sums in the first-level cache.
#include "simd.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // elements that are worth a thread
constexpr int64_t kColumns = 4096;     // of a block; shorter pieces of rows stream worse
constexpr int kRows = 8;               // added at once, so that the sums are fetched less often

float weight_of(float importance) { return importance < 0 ? 0 : importance; }  // NaN stays

// Adds the rows of `count` members times their weights, and asks for those of the members kRows further on.
template <int count, class T>
void add_rows(const RecycleTokens& p, int64_t m, int64_t column, int64_t width, bool equal, Pair* sums) {
  const T *row[count], *ahead[count];
  float weight[count];
  for (int k = 0; k < count; ++k) {
    const int64_t later = min(m + k + kRows, p.starts[p.cells] - 1);
    row[k] = (const T*)p.data + p.members[m + k] * p.token_stride + column;
    ahead[k] = (const T*)p.data + p.members[later] * p.token_stride + column;
    weight[k] = equal ? 1 : weight_of(p.importance[p.members[m + k]]);
  }
  for_pairs(width, [&](int64_t i, int64_t live) {
    Pair sum = sums[i / kPair];
    for (int k = 0; k < count; ++k) {
      const Pair x = load_pair(row[k] + i, live);
      prefetch_pair(ahead[k] + i);
      sum.a += weight[k] * x.a;
      sum.b += weight[k] * x.b;
    }
    sums[i / kPair] = sum;
  });
}

template <class T>
void merge(const RecycleTokens& p, int64_t cell, int64_t column, int64_t width) {
  const int64_t first = p.starts[cell], last = p.starts[cell + 1];
  float total = 0, highest = 0;
  int64_t position = -1;
  for (int64_t m = first; m < last; ++m) {
    const int64_t n = p.members[m];
    const float x = p.importance[n], rank = x == x ? x : __builtin_inff();
    total += weight_of(x);
    if (position < 0 || rank > highest) position = n, highest = rank;
  }
  if (column == 0) p.position_out[cell] = position;

  const bool equal = total == 0;
  const float divisor = equal ? (float)max(last - first, 1) : total;
  Pair sums[kColumns / kPair];
  memset(sums, 0, round_up(width, kPair) * sizeof(float));
  int64_t m = first;
  for (; m + kRows <= last; m += kRows) add_rows<kRows, T>(p, m, column, width, equal, sums);
  if (last - m >= 4) add_rows<4, T>(p, m, column, width, equal, sums), m += 4;
  if (last - m >= 2) add_rows<2, T>(p, m, column, width, equal, sums), m += 2;
  if (m < last) add_rows<1, T>(p, m, column, width, equal, sums);
  T* out = (T*)p.merged_out + cell * p.dim + column;
  for_pairs(width, [&](int64_t i, int64_t live) {
    const Pair sum = sums[i / kPair];
    store_pair(out + i, Pair{sum.a / divisor, sum.b / divisor}, live);
  });
}

}  // namespace

void recycle_tokens(const RecycleTokens& p, ParallelFor run) {
  const int64_t blocks = max((p.dim + kColumns - 1) / kColumns, 1);  // one, of no columns, for the positions
  const int64_t work = p.starts[p.cells] / max(p.cells, 1) * min(p.dim, kColumns);
  parallel_for(run, blocks * p.cells, max(1, kGrain / max(work, 1)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t column = i / p.cells * kColumns;
      with_dtype(p.dtype, [&](auto type) {
        merge<decltype(type)>(p, i % p.cells, column, min(p.dim - column, kColumns));
      });
    }
  });
}

}  // namespace flowcut::FLOWCUT_ISA
