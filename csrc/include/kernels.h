// The kernels on raw pointers: no torch header, so that any host program can drive them.
#pragma once

#include <cstdint>

namespace flowcut {

enum class DType { Float32, BFloat16, Float16 };

// Integers as in flowcut_kernels/_ops.py.
enum class Relevance : int64_t { None, Cosine, Softmax, ScaledSoftmax };
enum class ValueNorm : int64_t { None, Full, HeadMean };
enum class Select : int64_t { ScoreOnly, Adaptive, AdaptiveBatch, Fixed };

// Runs body(begin, end, context) over pieces of [0, n) of at least `grain` items on the host's thread pool.
using ParallelFor = void (*)(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class Body>
void parallel_for(ParallelFor run, int64_t n, int64_t grain, const Body& body) {
  run(
      n, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const Body*>(f))(begin, end); },
      const_cast<Body*>(&body));
}

// [batch, heads, tokens, dim]: strides in elements, the last one is 1.
struct Heads {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// Live keys [begin, end) of one sample, of which [scored, end) get a result.
struct Span {
  int64_t begin, scored, end;
};

struct AnchorStats {
  DType dtype;
  int64_t batch, heads, kv_heads, anchors, tokens, dim, value_dim;
  Heads query, key, value, value_anchor;
  const Span* spans;  // [batch]
  float scale;
  Relevance relevance;
  ValueNorm value_norm;
  // Contiguous outputs [batch, anchors, tokens] twice, [batch, tokens], [batch, anchors].
  float *attention_out, *relevance_out, *norm_out, *entropy_out;
};

struct Attention {
  DType dtype;
  int64_t batch, heads, kv_heads, queries, tokens, dim, value_dim;
  Heads query, key, value;
  const Span* spans;  // [batch]; scored is not used
  float scale;
  void* out;  // [batch, queries, heads, value_dim]
};

struct ReceivedAttention {
  DType dtype;
  int64_t batch, heads, kv_heads, tokens, dim;
  Heads query, key;
  const float* lse;        // [batch, heads, tokens] or null
  const int64_t* lengths;  // [batch], within 0..tokens
  float scale;
  float* out;  // [batch, tokens]
};

// [batch, tokens] of floats, contiguous along tokens; null: not given.
struct Criterion {
  const float* data;
  int64_t batch_stride;
};

struct ScoreSelect {
  int64_t batch, tokens;
  Criterion attention, relevance, value_norm, history;
  const float* entropy;    // [batch] or null
  const int64_t* lengths;  // [batch]
  float attention_weight, relevance_weight, norm_exponent, history_weight, score_weight;
  int64_t protect;
  Select mode;
  int64_t budget;
  const int32_t* budgets;  // [batch] or null: each at most `budget`
  int64_t block;           // rows of a group; n and the budgets count groups
  float divisor, entropy_exponent;
  float* score_out;    // [batch, tokens]
  int64_t* index_out;  // [batch, width]
  int64_t width;
  int32_t* lengths_out;  // [batch]
};

// One tensor to gather from: strides and row size in bytes, rows contiguous, `out` contiguous.
struct Rows {
  const char* data;
  int64_t batch_stride, token_stride, row_bytes;
  char* out;
};

struct GatherTokens {
  const Rows* inputs;
  int64_t count, batch, kept;
  const int64_t* index;  // [batch, kept], values in -1..tokens-1
  int64_t index_stride;  // between batches
  // Norm of the gathered rows of inputs[0]; norm_out null: none.
  DType dtype;
  int64_t dim;
  const void *norm_weight, *norm_bias;
  void* norm_out;
  float eps;
  bool rms;
};

// Keys or values of one layer [batch, heads, tokens, dim]: strides and row size in bytes, rows contiguous.
struct CacheRows {
  const char* data;
  char* out;  // contiguous [batch, heads, kept, dim]; not used in place, where `data` is written
  int64_t batch_stride, head_stride, token_stride;
  int32_t tokens, row_bytes;
};

struct CompactKV {
  const CacheRows* tensors;
  int64_t count, turned;  // the first `turned` tensors are keys whose rotation changes
  int64_t batch, heads, kept;
  const int64_t* keep;  // [batch, kept]: ascending rows, then -1
  bool in_place;
  // Rotation of columns j and j + half, j < half, by the angles of the tables [batch, kept, half].
  DType dtype;
  int64_t half;
  const float *cos, *sin;
};

// Keys or values of one layer in blocks [blocks, heads, block_size, dim]: strides and row size in bytes, rows
// contiguous.
struct PagedRows {
  char* data;
  int64_t block_stride, head_stride, token_stride;
  int32_t row_bytes;
};

struct CompactKVPaged {
  const PagedRows* tensors;
  int64_t count, turned;  // the first `turned` tensors are keys whose rotation changes
  int64_t sequences, heads, blocks, block_size, moved;
  const int64_t* moves;    // [moved, 2]: source slot, destination slot; slot = block * block_size + offset
  const int64_t* offsets;  // [sequences + 1]: sequence b moves offsets[b]..offsets[b + 1] - 1, in this order
  // Rotation of columns j and j + half, j < half, by the angles of the tables [moved, half].
  DType dtype;
  int64_t half;
  const float *cos, *sin;
};

// Images [batch, channels, height, width] in patches of patch_size: strides in bytes, rows contiguous.
struct PatchEntropy {
  bool bytes;   // pixels are uint8, else normalised numbers of `dtype`
  DType dtype;  // byte = clamp(round(x * scale + offset), 0, 255)
  float scale[3], offset[3];
  int64_t batch, channels, rows, columns, patch_size;  // 1 or 3 channels; rows and columns of whole patches
  const char* pixels;
  int64_t batch_stride, channel_stride, line_stride;
  float* out;  // [batch, rows * columns]
};

struct RecycleTokens {
  DType dtype;
  int64_t tokens, dim, cells;
  const void* data;  // [tokens, dim], rows contiguous
  int64_t token_stride;
  const float* importance;  // [tokens]
  // The members of cell c, ascending: members[starts[c]], ..., members[starts[c + 1] - 1].
  const int64_t *starts, *members;
  void* merged_out;       // [cells, dim]
  int64_t* position_out;  // [cells]
};

// The kernels compiled for one instruction set.
struct Kernels {
  const char* isa;
  void (*anchor_stats)(const AnchorStats&, ParallelFor);
  void (*score_select)(const ScoreSelect&, ParallelFor);
  void (*gather_tokens)(const GatherTokens&, ParallelFor);
  void (*attention)(const Attention&, ParallelFor);
  void (*received_attention)(const ReceivedAttention&, ParallelFor);
  void (*compact_kv)(const CompactKV&, ParallelFor);
  void (*compact_kv_paged)(const CompactKVPaged&, ParallelFor);
  void (*patch_entropy)(const PatchEntropy&, ParallelFor);
  void (*recycle_tokens)(const RecycleTokens&, ParallelFor);
};

// The best set this machine runs, or the one FLOWCUT_CPU_ISA names; std::runtime_error if it cannot be had.
const Kernels& kernels();

namespace cuda {
// All pointers but `tensors` are the device's; `stream` is a cudaStream_t. std::runtime_error if the launch
// fails.
void compact_kv(const CompactKV&, void* stream);
void compact_kv_paged(const CompactKVPaged&, void* stream);
}  // namespace cuda

}  // namespace flowcut
