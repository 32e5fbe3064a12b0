// The GPU kernels of compact_kv and compact_kv_paged run on the host: a thread for every thread of a block, a
// barrier for __syncthreads. Random caches against the plain definition; a sanitizer watches the memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __grid_constant__

struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx;
static std::barrier<>* block;
static void __syncthreads() { block->arrive_and_wait(); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

#include "../sanitize/draw.h"
#include "compact_kv_paged.cuh"

using namespace flowcut;
using namespace flowcut::cuda;

static void launch(unsigned blocks, const std::function<void()>& kernel) {
  std::barrier<> barrier(kThreads);
  block = &barrier;
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < kThreads; ++thread)
    threads.emplace_back([&, thread] {
      threadIdx.x = thread;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) kernel();
    });
  for (std::thread& thread : threads) thread.join();
}

// One layer: keys of `dim` elements of T (turned in 2 * half of them), values of twice as many.
template <class V, class T, bool kInPlace>
bool right(int64_t dim, int64_t half) {
  using Element = std::conditional_t<std::is_void_v<T>, uint8_t, T>;
  constexpr int64_t kBatch = 2, kHeads = 2;
  const int64_t tokens = draw(1, 200), kept = draw(1, 200);
  std::vector<int64_t> keep;
  for (int64_t b = 0; b < kBatch; ++b)
    for (const int64_t row : draw_keep(tokens, kept)) keep.push_back(row);
  std::vector<float> cos(kBatch * kept * half), sin(cos.size());
  for (auto* table : {&cos, &sin})
    for (float& x : *table) x = draw(-100, 100) / 100.0f;

  CompactKV p{};
  p.count = 2, p.turned = half > 0, p.batch = kBatch, p.heads = kHeads, p.kept = kept, p.keep = keep.data();
  p.in_place = kInPlace, p.half = half, p.cos = cos.data(), p.sin = sin.data();
  Table table{};
  std::vector<std::vector<Element>> memory(2), out(2), wanted(2);
  for (int i = 0; i < 2; ++i) {
    const int64_t width = dim << i, rows = kBatch * kHeads * tokens, new_rows = kBatch * kHeads * kept;
    memory[i].resize(rows * width), out[i].resize(new_rows * width);
    for (Element& x : memory[i]) x = Element(float(draw(0, 100)));
    const int64_t bytes = width * sizeof(Element);
    table.tensors[i] = {reinterpret_cast<const char*>(memory[i].data()),
                        reinterpret_cast<char*>(out[i].data()),
                        kHeads * tokens * bytes,
                        tokens * bytes,
                        bytes,
                        int32_t(tokens),
                        int32_t(bytes)};
    wanted[i] = kInPlace ? memory[i] : out[i];
    for (int64_t head = 0; head < kBatch * kHeads; ++head)
      for (int64_t m = 0; m < kept; ++m) {
        const int64_t at = head / kHeads * kept + m, token = keep[at];
        if (token < 0) continue;
        const Element* row = &memory[i][(head * tokens + token) * width];
        Element* to = &wanted[i][(head * (kInPlace ? tokens : kept) + m) * width];
        std::copy_n(row, width, to);
        if constexpr (!std::is_void_v<T>)
          for (int64_t j = 0; i == 0 && j < half; ++j) {
            const float a = to_float(row[j]), b = to_float(row[j + half]);
            const float c = cos[at * half + j], s = sin[at * half + j];
            from_float(a * c - b * s, to + j);
            from_float(b * c + a * s, to + j + half);
          }
      }
  }
  const unsigned pieces = kInPlace ? 1 : (kept * 2 * dim * sizeof(Element) / sizeof(V) + kTile - 1) / kTile;
  launch(2 * kBatch * kHeads * pieces, [&] { compact_kv<V, T, kInPlace>(table, p, pieces); });
  for (int i = 0; i < 2; ++i)
    if (memcmp(wanted[i].data(), kInPlace ? memory[i].data() : out[i].data(),
               wanted[i].size() * sizeof(Element)))
      return false;
  return true;
}

// One layer of keys and values interleaved, [blocks, 2, block_size, heads, dim], after a random plan, some of
// whose moves name slots that do not exist: the GPU is the first to see them.
template <class V, class T>
bool paged_right(int64_t dim, int64_t half) {
  using Element = std::conditional_t<std::is_void_v<T>, uint8_t, T>;
  constexpr int64_t kHeads = 2;
  const DrawnBatch drawn(draw(1, 40));
  PagedPlan plan = plan_paged(drawn.batch());
  const int64_t size = drawn.block_size, row = kHeads * dim, block = 2 * size * row,
                moved = plan.shifts.size();
  std::vector<float> cos(moved * half), sin(cos.size());
  for (auto* table : {&cos, &sin})
    for (float& x : *table) x = draw(-100, 100) / 100.0f;
  std::vector<Element> memory(drawn.blocks * block);
  for (Element& x : memory) x = Element(float(draw(0, 100)));
  std::vector<Element> wanted = memory;
  for (int64_t& slot : plan.moves)
    if (draw(0, 19) == 0) slot = draw(0, 1) ? -1 : drawn.blocks * size;

  CompactKVPaged p{};
  p.count = 2, p.turned = half > 0, p.sequences = drawn.sequences, p.heads = kHeads, p.blocks = drawn.blocks;
  p.block_size = size, p.moved = moved, p.moves = plan.moves.data(), p.offsets = plan.offsets.data();
  p.half = half, p.cos = cos.data(), p.sin = sin.data();
  PagedTable table{};
  for (int i = 0; i < 2; ++i) {
    constexpr int64_t kBytes = sizeof(Element);
    table.tensors[i] = {reinterpret_cast<char*>(memory.data() + i * size * row), block * kBytes, dim * kBytes,
                        row * kBytes, int32_t(dim * kBytes)};
    for (int64_t m = 0; m < moved; ++m)
      for (int64_t head = 0; head < kHeads; ++head) {
        auto at = [&](int64_t slot) {
          return slot / size * block + (i * size + slot % size) * row + head * dim;
        };
        const int64_t source = plan.moves[2 * m], target = plan.moves[2 * m + 1];
        if (std::min(source, target) < 0 || std::max(source, target) >= drawn.blocks * size) continue;
        const Element* from = memory.data() + at(source);
        Element* to = wanted.data() + at(target);
        std::copy_n(from, dim, to);
        if constexpr (!std::is_void_v<T>)
          for (int64_t j = 0; i == 0 && j < half; ++j) {
            const float a = to_float(from[j]), b = to_float(from[j + half]);
            const float c = cos[m * half + j], s = sin[m * half + j];
            from_float(a * c - b * s, to + j);
            from_float(b * c + a * s, to + j + half);
          }
      }
  }
  launch(2 * drawn.sequences * kHeads, [&] { compact_kv_paged<V, T>(table, p); });
  return !memcmp(memory.data(), wanted.data(), memory.size() * sizeof(Element));
}

template <class V, class T>
bool all_right(int64_t dim, int64_t half) {
  bool ok = true;
  for (int round = 0; round < 2; ++round)
    ok &= right<V, T, false>(dim, half) & right<V, T, true>(dim, half) & paged_right<V, T>(dim, half);
  if (!ok) std::printf("wrong: vectors of %zu bytes, dim %d, half %d\n", sizeof(V), int(dim), int(half));
  return ok;
}

int main() {
  bool ok = all_right<uint4, void>(64, 0) & all_right<uint32_t, void>(20, 0) & all_right<uint8_t, void>(7, 0);
  ok &= all_right<uint4, __nv_bfloat16>(64, 32) & all_right<uint4, __nv_bfloat16>(40, 8);
  ok &= all_right<uint16_t, __nv_bfloat16>(11, 3) & all_right<uint4, __half>(32, 16);
  ok &= all_right<uint4, float>(24, 8) & all_right<uint32_t, float>(9, 4);
  return ok ? 0 : 1;
}
