// Chooses the instruction set once per process.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace flowcut {

#define FLOWCUT_DECLARE(isa)                                      \
  namespace isa {                                                 \
  void anchor_stats(const AnchorStats&, ParallelFor);             \
  void score_select(const ScoreSelect&, ParallelFor);             \
  void gather_tokens(const GatherTokens&, ParallelFor);           \
  void attention(const Attention&, ParallelFor);                  \
  void received_attention(const ReceivedAttention&, ParallelFor); \
  void compact_kv(const CompactKV&, ParallelFor);                 \
  void compact_kv_paged(const CompactKVPaged&, ParallelFor);      \
  void patch_entropy(const PatchEntropy&, ParallelFor);           \
  void recycle_tokens(const RecycleTokens&, ParallelFor);         \
  }
#define FLOWCUT_TABLE(isa)                                                             \
  {#isa,           isa::anchor_stats,       isa::score_select, isa::gather_tokens,     \
   isa::attention, isa::received_attention, isa::compact_kv,   isa::compact_kv_paged,  \
   isa::patch_entropy, isa::recycle_tokens}

FLOWCUT_DECLARE(scalar)
#ifdef FLOWCUT_X86
FLOWCUT_DECLARE(avx512_bf16)
FLOWCUT_DECLARE(avx512)
FLOWCUT_DECLARE(avx2)
#endif

namespace {

struct Choice {
  Kernels kernels;
  bool supported;
};

#ifdef FLOWCUT_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels& choose() {
  // Best first. Every processor with AVX2 and FMA has F16C too.
  static const Choice choices[] = {
#ifdef FLOWCUT_X86
      {FLOWCUT_TABLE(avx512_bf16), has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {FLOWCUT_TABLE(avx512), has_avx512()},
      {FLOWCUT_TABLE(avx2), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {FLOWCUT_TABLE(scalar), true},
  };
  const char* request = std::getenv("FLOWCUT_CPU_ISA");
  std::string offered;
  for (const Choice& choice : choices) {
    if (!choice.supported) continue;
    if (!request || !*request || std::string(request) == choice.kernels.isa) return choice.kernels;
    offered += (offered.empty() ? "" : ", ") + std::string(choice.kernels.isa);
  }
  throw std::runtime_error("FLOWCUT_CPU_ISA=" + std::string(request) +
                           " cannot be had: this machine offers " + offered);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace flowcut
