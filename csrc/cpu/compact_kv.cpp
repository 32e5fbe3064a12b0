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
// unless their pages are new: then that took 1.7 times as long. In place a head is swept forward: row m comes
// from a row at or after m, so what it overwrites was read before.
//
// What limits is finding where rows lie: every second one is on a page of its own, and an instruction that asks
// for a row waits for its page at the end of the processor's window. How many pages are looked up at a time is
// how many rows fit into the window, so the loop over rows has few instructions: what to do with a row is
// decided outside of it, its width is known, and nothing in it reads through `p`, whose fields any store to
// `out` might have changed.
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
      const int64_t batch = i % heads / p.heads, head = i % p.heads, row_bytes = x.row_bytes;
      const char* data = x.data + batch * x.batch_stride + head * x.head_stride;
      char* out = p.in_place ? (char*)data : x.out + i % heads * p.kept * row_bytes;
      const int64_t stride = x.token_stride, step = p.in_place ? stride : row_bytes;
      const int64_t* keep = p.keep + batch * p.kept;
      int64_t live = p.kept;
      while (live > 0 && keep[live - 1] < 0) --live;
      auto sweep = [&](auto width, auto move) {
        for (int64_t m = 0; m < live; ++m) {
          ask_ahead(m, live, width, [=](int64_t ahead) { return data + keep[m + ahead] * stride; });
          move(m, data + keep[m] * stride, out + m * step);
        }
      };
      if (i / heads < p.turned)
        with_dtype(p.dtype, [&](auto type) {
          using T = decltype(type);
          sweep(row_bytes, [&, done = 2 * p.half * (int64_t)sizeof(T)](int64_t m, const char* row, char* to) {
            const int64_t at = (batch * p.kept + m) * p.half;
            turn_row((const T*)row, p.cos + at, p.sin + at, p.half, (T*)to);
            if (row != to) memcpy(to + done, row + done, row_bytes - done);
          });
        });
      else
        with_width(row_bytes, [&](auto width) {
          if (streamed)
            sweep(width, [=](int64_t, const char* row, char* to) { copy(to, row, width, true); });
          else
            sweep(width, [=](int64_t, const char* row, char* to) {
              if (row != to) memcpy(to, row, width);
            });
        });
      if (live < p.kept && !p.in_place) memset(out + live * step, 0, (p.kept - live) * row_bytes);
    }
    if (streamed) publish_streamed();
  });
}

}  // namespace flowcut::FLOWCUT_ISA
