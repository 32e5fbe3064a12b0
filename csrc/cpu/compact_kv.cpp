// compact_kv: kept rows of a KV cache moved as bytes, keys turned on the way if wanted.
#include "ahead.h"
#include "pages.h"
#include "turn.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // bytes that are worth a thread
constexpr int64_t kStreamed = 8 << 20;  // bytes that no longer wait in cache for whoever reads them next

}  // namespace

// Kept rows are too far apart for the processor to see a pattern (ahead.h). Large outputs go past the caches,
// unless their pages are new: then that took 1.7 times as long. (2 cores, 32 layers, 3,000 -> 400 rows of 256
// bytes: 5.5 ms plain, 4 with rows asked for ahead and stores past the caches, 3 where their pages are asked for
// before.) In place a head is swept forward: row m comes from a row at or after m, so what it overwrites was
// read before.
void compact_kv(const CompactKV& p, ParallelFor run) {
  int64_t bytes = 1;
  for (int64_t i = 0; i < p.count; ++i) bytes = max(bytes, p.kept * p.tensors[i].row_bytes);
  const int64_t heads = p.batch * p.heads;
  const CacheRows& end = p.tensors[p.count - 1];
  const bool streamed =
      !p.in_place && p.count * heads * bytes > kStreamed && has_pages(end.out, heads * p.kept * end.row_bytes);
  parallel_for(run, p.count * heads, max(1, kGrain / bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const CacheRows& x = p.tensors[i / heads];
      const int64_t batch = i % heads / p.heads, head = i % p.heads;
      const char* data = x.data + batch * x.batch_stride + head * x.head_stride;
      char* out = p.in_place ? (char*)data : x.out + i % heads * p.kept * x.row_bytes;
      const int64_t step = p.in_place ? x.token_stride : x.row_bytes;
      const bool turned = i / heads < p.turned;
      for (int64_t m = 0; m < p.kept; ++m, out += step) {
        const int64_t at = batch * p.kept + m, token = p.keep[at];
        if (token < 0) {
          if (!p.in_place) memset(out, 0, x.row_bytes);
          continue;
        }
        const char* row = data + token * x.token_stride;
        ask_ahead(m, p.kept, x.row_bytes,
                  [&](int64_t ahead) { return data + max(p.keep[at + ahead], 0) * x.token_stride; });
        int64_t done = 0;
        if (turned)
          with_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            turn_row((const T*)row, p.cos + at * p.half, p.sin + at * p.half, p.half, (T*)out);
            done = 2 * p.half * sizeof(T);
          });
        if (row != out) copy(out + done, row + done, x.row_bytes - done, streamed);
      }
    }
  });
}

}  // namespace flowcut::FLOWCUT_ISA
