// compact_kv_paged: rows of a block-table cache moved as bytes, keys turned on the way if wanted.
#include "ahead.h"
#include "turn.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kGrain = 64 * 1024;  // bytes that are worth a thread

}  // namespace

// A sequence's moves are run in their order, so that a row is read before it is overwritten; planner.h says
// why sequences do not meet.
void compact_kv_paged(const CompactKVPaged& p, ParallelFor run) {
  int64_t bytes = 1;
  for (int64_t i = 0; i < p.count; ++i) bytes = max(bytes, p.tensors[i].row_bytes);
  const int64_t places = p.sequences * p.heads, mean = p.moved / max(p.sequences, 1) + 1;
  parallel_for(run, p.count * places, max(1, kGrain / (mean * bytes)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const PagedRows& x = p.tensors[i / places];
      const int64_t sequence = i % places / p.heads;
      char* head = x.data + i % p.heads * x.head_stride;
      auto row = [&](int64_t slot) {
        return head + slot / p.block_size * x.block_stride + slot % p.block_size * x.token_stride;
      };
      const int64_t end = p.offsets[sequence + 1];
      for (int64_t m = p.offsets[sequence]; m < end; ++m) {
        ask_ahead(m, end, x.row_bytes, [&](int64_t ahead) { return row(p.moves[2 * (m + ahead)]); });
        const char* in = row(p.moves[2 * m]);
        char* out = row(p.moves[2 * m + 1]);
        int64_t done = 0;
        if (i / places < p.turned)
          with_dtype(p.dtype, [&](auto type) {
            using T = decltype(type);
            turn_row((const T*)in, p.cos + m * p.half, p.sin + m * p.half, p.half, (T*)out);
            done = 2 * p.half * sizeof(T);
          });
        if (in != out) memcpy(out + done, in + done, x.row_bytes - done);
      }
    }
  });
}

}  // namespace flowcut::FLOWCUT_ISA
