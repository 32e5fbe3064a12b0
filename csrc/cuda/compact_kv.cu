// Chooses the widest vector that all addresses and sizes allow and launches compact_kv.
#include "compact_kv.cuh"
#include "launch.cuh"

namespace flowcut::cuda {
namespace {

template <class V, class T, bool kInPlace>
void launch(const Table& table, const CompactKV& p, cudaStream_t stream) {
  int64_t vectors = 1;
  for (int64_t i = 0; i < p.count; ++i)
    vectors = std::max<int64_t>(vectors, p.kept * (table.tensors[i].row_bytes / sizeof(V)));
  const int64_t pieces = kInPlace ? 1 : (vectors + kTile - 1) / kTile;
  const int64_t blocks = p.count * p.batch * p.heads * pieces;
  check_counts("compact_kv", vectors, blocks);
  compact_kv<V, T, kInPlace><<<blocks, kThreads, 0, stream>>>(table, p, pieces);
  check_launch("compact_kv");
}

}  // namespace

void compact_kv(const CompactKV& all, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (all.batch * all.heads * all.kept == 0) return;
  for_tables<Table>(all, [&](const CompactKV& p, const Table& table) {
    uint64_t unit = 0;
    for (int64_t i = 0; i < p.count; ++i) {
      const CacheRows& x = table.tensors[i];
      unit |= reinterpret_cast<uintptr_t>(x.data) | (p.in_place ? 0 : reinterpret_cast<uintptr_t>(x.out));
      unit |= x.batch_stride | x.head_stride | x.token_stride | x.row_bytes;
    }
    with_vector(p, unit, [&]<class V, class T>() {
      p.in_place ? launch<V, T, true>(table, p, stream) : launch<V, T, false>(table, p, stream);
    });
  });
}

}  // namespace flowcut::cuda
