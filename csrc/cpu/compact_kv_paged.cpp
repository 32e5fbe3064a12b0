// compact_kv_paged: rows of a block-table cache moved as bytes, keys turned on the way if wanted.
#include "ahead.h"
#include "turn.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // bytes that are worth a thread
constexpr int64_t kStreamed = 8 << 20;  // bytes that no longer wait in cache for whoever reads them next
constexpr int64_t kBytesAhead = 4096;   // of rows that are asked for, and a line of one twice as far

}  // namespace

// A sequence's moves are run in their order, so that a row is read before it is overwritten; planner.h says
// why sequences do not meet. Where the heads of a row lie side by side they move together: its page is found
// once for all of them, and a head of a later row is asked for with each, as asking for all of that row at once
// would hold up the stores. Many rows go past the caches, which saves reading what they overwrite. What to do
// with a head is decided outside of the loop, as in compact_kv.
void compact_kv_paged(const CompactKVPaged& p, ParallelFor run) {
  int64_t bytes = 1;
  bool joined = true;
  for (int64_t i = 0; i < p.count; ++i) {
    bytes = max(bytes, p.tensors[i].row_bytes);
    joined = joined && p.tensors[i].head_stride == p.tensors[i].row_bytes;
  }
  const int64_t heads = joined ? p.heads : 1, groups = joined ? 1 : p.heads;  // of a move, of a sequence
  const int64_t places = p.sequences * groups, mean = p.moved / max(p.sequences, 1) + 1;
  const bool streamed = p.count * p.moved * p.heads * bytes > kStreamed;
  const int64_t grain = max(1, kGrain / (mean * max(1, heads) * bytes));
  parallel_for(run, p.count * places, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const PagedRows& x = p.tensors[i / places];
      const int64_t sequence = i % places / groups, row_bytes = x.row_bytes;
      const int64_t begin = p.offsets[sequence], end = p.offsets[sequence + 1];
      const int64_t ahead = max(1, min(kRowsAhead, kBytesAhead / max(1, heads * row_bytes)));
      const int64_t* moves = p.moves;
      // 32 bits hold any slot, and divide faster.
      const uint32_t block_size = p.block_size;
      const int64_t stride = x.token_stride, skip = x.block_stride - block_size * stride;
      char* data = x.data + i % groups * x.head_stride;
      auto row = [=](int64_t slot) { return data + slot * stride + (uint32_t)slot / block_size * skip; };
      auto sweep = [&](auto width, auto move) {
        for (int64_t m = begin; m < end; ++m) {
          if (m + 2 * ahead < end) __builtin_prefetch(row(moves[2 * (m + 2 * ahead)]));
          const char *later = row(moves[2 * min(m + ahead, end - 1)]), *in = row(moves[2 * m]);
          char* out = row(moves[2 * m + 1]);
          for (int64_t h = 0; h < heads; ++h, later += width, in += width, out += width) {
            ask(later, width);
            move(m, in, out);
          }
        }
      };
      if (i / places < p.turned)
        with_dtype(p.dtype, [&](auto type) {
          using T = decltype(type);
          sweep(row_bytes, [&, done = 2 * p.half * (int64_t)sizeof(T)](int64_t m, const char* in, char* out) {
            turn_row((const T*)in, p.cos + m * p.half, p.sin + m * p.half, p.half, (T*)out);
            if (in != out) memcpy(out + done, in + done, row_bytes - done);
          });
        });
      else
        with_width(row_bytes, [&](auto width) {
          sweep(width, [=](int64_t, const char* in, char* out) {
            if (in != out) copy(out, in, width, streamed);
          });
        });
    }
    if (streamed) publish_streamed();
  });
}

}  // namespace flowcut::FLOWCUT_ISA
