// Chooses the widest vector that all addresses and sizes allow and launches compact_kv_paged.
#include "compact_kv_paged.cuh"
#include "launch.cuh"

namespace flowcut::cuda {

void compact_kv_paged(const CompactKVPaged& all, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (all.sequences * all.heads * all.moved == 0) return;
  for_tables<PagedTable>(all, [&](const CompactKVPaged& p, const PagedTable& table) {
    uint64_t unit = 0;
    int64_t bytes = 0;
    for (int64_t i = 0; i < p.count; ++i) {
      const PagedRows& x = table.tensors[i];
      unit |=
          reinterpret_cast<uintptr_t>(x.data) | x.block_stride | x.head_stride | x.token_stride | x.row_bytes;
      bytes = std::max<int64_t>(bytes, x.row_bytes);
    }
    with_vector(p, unit, [&]<class V, class T>() {
      const int64_t blocks = p.count * p.sequences * p.heads;
      check_counts("compact_kv_paged", p.moved * (bytes / sizeof(V)), blocks);
      compact_kv_paged<V, T><<<blocks, kThreads, 0, stream>>>(table, p);
      check_launch("compact_kv_paged");
    });
  });
}

}  // namespace flowcut::cuda
