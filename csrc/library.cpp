// The operators' registration on the libtorch stable ABI. Schemas are defined in flowcut_kernels/_ops.py,
// arguments are validated in flowcut_kernels/ops/; what is checked here again is what the kernels' memory
// safety rests on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef FLOWCUT_WITH_CUDA
#include <dlfcn.h>
#endif

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using namespace flowcut;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "[") << sizes[i];
  return out << "]";
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> want) {
  const bool equal = std::equal(want.begin(), want.end(), x.sizes().begin(), x.sizes().end());
  check(equal, name, " must be ", Sizes(want.begin(), want.size()), ", got ", x.sizes());
}

DType dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::Float32;
    case ScalarType::BFloat16: return DType::BFloat16;
    case ScalarType::Half: return DType::Float16;
    default: break;
  }
  throw std::runtime_error(std::string(name) +
                           ": the C++ form takes float32, bfloat16 and float16; use backend='reference'");
}

int32_t dtype_code(const Tensor& x) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  return code;
}

// A contiguous, uninitialised CPU tensor.
Tensor empty(Sizes sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_floats(std::initializer_list<int64_t> sizes) {
  return empty(Sizes(sizes.begin(), sizes.size()), aoti_torch_dtype_float32());
}

Tensor unit_stride(const Tensor& x) {
  return x.dim() == 0 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n > 0) TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

// A small integer tensor of any width and strides.
std::vector<int64_t> integers(const char* name, const Tensor& x) {
  check(x.is_cpu(), name, " must be a CPU tensor");
  const Tensor dense = torch::stable::contiguous(x);
  const int64_t n = dense.numel();
  if (x.scalar_type() == ScalarType::Long) {
    const auto* p = static_cast<const int64_t*>(dense.const_data_ptr());
    return {p, p + n};
  }
  check(x.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  const auto* p = static_cast<const int32_t*>(dense.const_data_ptr());
  return {p, p + n};
}

// The spans of [batch, 2] `ends`, cut to the tokens there are; without `ends` all of them.
std::vector<Span> live_spans(const char* name, const std::optional<Tensor>& ends, int64_t batch,
                             int64_t tokens, int64_t protect) {
  std::vector<Span> spans(batch, Span{0, std::min(protect, tokens), tokens});
  if (!ends) return spans;
  check_shape(name, *ends, {batch, 2});
  const std::vector<int64_t> values = integers(name, *ends);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = std::clamp<int64_t>(values[2 * b], 0, tokens);
    const int64_t end = std::clamp(values[2 * b + 1], begin, tokens);
    spans[b] = {begin, std::clamp(values[2 * b] + protect, begin, end), end};
  }
  return spans;
}

Heads heads(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> anchor_stats(Tensor query, Tensor key, Tensor value,
                                                        std::optional<Tensor> value_anchor,
                                                        std::optional<Tensor> key_span, double scale,
                                                        int64_t protect, int64_t relevance,
                                                        int64_t value_norm) {
  check(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
        "anchor_stats: query, key and value must be [batch, heads, tokens, dim]");
  AnchorStats p{};
  p.dtype = dtype_of("anchor_stats: key", key);
  p.batch = key.size(0), p.kv_heads = key.size(1), p.tokens = key.size(2), p.dim = key.size(3);
  p.heads = query.size(1), p.anchors = query.size(2), p.value_dim = value.size(3);
  check(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "anchor_stats: query has ", p.heads,
        " heads, which must be a multiple of key's ", p.kv_heads);
  check_shape("anchor_stats: query", query, {p.batch, p.heads, p.anchors, p.dim});
  check_shape("anchor_stats: value", value, {p.batch, p.kv_heads, p.tokens, p.value_dim});
  check(key.stride(3) == 1 || p.dim <= 1, "anchor_stats: key needs a contiguous last dimension");
  check(value.stride(3) == 1 || p.value_dim <= 1, "anchor_stats: value needs a contiguous last dimension");
  check(0 <= relevance && relevance <= int64_t(Relevance::ScaledSoftmax) && 0 <= value_norm &&
            value_norm <= int64_t(ValueNorm::HeadMean),
        "anchor_stats: relevance=", relevance, " or value_norm=", value_norm, " is unknown");
  check(0 <= protect && protect <= p.tokens, "anchor_stats: protect=", protect, " must lie in 0..", p.tokens);
  p.relevance = Relevance(relevance), p.value_norm = ValueNorm(value_norm);
  check(p.relevance == Relevance::None || value_anchor, "anchor_stats: relevance needs value_anchor");
  query = unit_stride(query);
  if (p.relevance != Relevance::None) {
    check_shape("anchor_stats: value_anchor", *value_anchor, {p.batch, p.kv_heads, p.anchors, p.value_dim});
    value_anchor = unit_stride(*value_anchor);
    p.value_anchor = heads(*value_anchor);
  }
  for (const Tensor* x : {&query, &key, &value, value_anchor ? &*value_anchor : &key})
    check(x->is_cpu() && x->scalar_type() == key.scalar_type(),
          "anchor_stats: query, key, value and value_anchor must be CPU tensors of one dtype");
  p.query = heads(query), p.key = heads(key), p.value = heads(value);
  p.scale = static_cast<float>(scale);

  const std::vector<Span> spans = live_spans("anchor_stats: key_span", key_span, p.batch, p.tokens, protect);
  p.spans = spans.data();

  Tensor attention = empty_floats({p.batch, p.anchors, p.tokens});
  Tensor relevant = empty_floats({p.batch, p.anchors, p.relevance == Relevance::None ? 0 : p.tokens});
  Tensor norm = empty_floats({p.batch, p.value_norm == ValueNorm::None ? 0 : p.tokens});
  Tensor entropy = empty_floats({p.batch, p.anchors});
  p.attention_out = floats(attention), p.relevance_out = floats(relevant);
  p.norm_out = floats(norm), p.entropy_out = floats(entropy);
  kernels().anchor_stats(p, run_parallel);
  return {attention, relevant, norm, entropy};
}

std::tuple<Tensor, Tensor, Tensor> score_select(
    std::optional<Tensor> attention, std::optional<Tensor> relevance, std::optional<Tensor> value_norm,
    std::optional<Tensor> history, std::optional<Tensor> entropy, std::optional<Tensor> lengths,
    double history_weight, int64_t protect, int64_t mode, int64_t budget, double divisor,
    std::vector<double> criteria_weights, double entropy_exponent, std::optional<Tensor> budgets,
    int64_t block) {
  check(attention || relevance || value_norm,
        "score_select: attention, relevance and value_norm are all None");
  const Tensor first = attention ? *attention : relevance ? *relevance : *value_norm;
  check(first.dim() == 2, "score_select: criteria must be [batch, tokens]");
  ScoreSelect p{};
  p.batch = first.size(0), p.tokens = first.size(1);
  auto criterion = [&](const char* name, std::optional<Tensor>& x) {
    if (!x) return Criterion{};
    check_shape(name, *x, {p.batch, p.tokens});
    check(x->is_cpu() && x->scalar_type() == ScalarType::Float, name,
          ": the C++ form takes float32 CPU tensors; use backend='reference'");
    x = unit_stride(*x);
    return Criterion{static_cast<const float*>(x->const_data_ptr()), x->stride(0)};
  };
  p.attention = criterion("score_select: attention", attention);
  p.relevance = criterion("score_select: relevance", relevance);
  p.value_norm = criterion("score_select: value_norm", value_norm);
  p.history = criterion("score_select: history", history);
  check(criteria_weights.size() == 3, "score_select: criteria_weights must be 3 numbers, got ",
        criteria_weights.size());
  p.attention_weight = static_cast<float>(criteria_weights[0]);
  p.relevance_weight = static_cast<float>(criteria_weights[1]);
  p.norm_exponent = static_cast<float>(criteria_weights[2]);
  p.history_weight = static_cast<float>(history_weight),
  p.score_weight = static_cast<float>(1 - history_weight);
  p.protect = protect, p.mode = Select(mode), p.budget = budget, p.divisor = static_cast<float>(divisor);
  p.entropy_exponent = static_cast<float>(entropy_exponent);
  check(0 <= mode && mode <= int64_t(Select::Fixed), "score_select: mode=", mode, " is unknown");
  check(0 <= protect && protect <= p.tokens && budget >= 0, "score_select: protect=", protect,
        " or budget=", budget, " does not fit ", p.tokens, " tokens");
  check(block >= 1 && (p.tokens - protect) % block == 0, "score_select: block=", block,
        " must be at least 1 and divide the ", p.tokens - protect, " tokens behind protect");
  p.block = block;
  if (budgets) {
    check_shape("score_select: budgets", *budgets, {p.batch});
    check(budgets->is_cpu() && budgets->scalar_type() == ScalarType::Int,
          "score_select: budgets must be int32 on the CPU");
    budgets = torch::stable::contiguous(*budgets);
    p.budgets = static_cast<const int32_t*>(budgets->const_data_ptr());
  }
  if (entropy) {
    check_shape("score_select: entropy", *entropy, {p.batch});
    check(entropy->is_cpu() && entropy->scalar_type() == ScalarType::Float,
          "score_select: entropy must be float32");
    entropy = torch::stable::contiguous(*entropy);
    p.entropy = static_cast<const float*>(entropy->const_data_ptr());
  }
  check(entropy || p.mode == Select::ScoreOnly || p.mode == Select::Fixed || divisor == 0,
        "score_select: entropy is None; the adaptive modes need it while divisor > 0");
  std::vector<int64_t> live(p.batch, p.tokens);
  if (lengths) {
    check_shape("score_select: lengths", *lengths, {p.batch});
    live = integers("score_select: lengths", *lengths);
    for (int64_t& n : live) n = std::min(n, p.tokens);
  }
  p.lengths = live.data();

  p.width = p.mode == Select::ScoreOnly ? 0
            : p.mode == Select::Fixed   ? protect + std::min(budget, (p.tokens - protect) / block) * block
                                        : p.tokens;
  Tensor score = empty_floats({p.batch, p.tokens});
  const std::array<int64_t, 2> index_sizes{p.batch, p.width};
  Tensor index = empty(Sizes(index_sizes.data(), 2), aoti_torch_dtype_int64());
  Tensor new_lengths = empty(Sizes(index_sizes.data(), 1), aoti_torch_dtype_int32());
  p.score_out = floats(score);
  p.index_out = static_cast<int64_t*>(index.mutable_data_ptr());
  p.lengths_out = static_cast<int32_t*>(new_lengths.mutable_data_ptr());
  kernels().score_select(p, run_parallel);
  return {score, index, new_lengths};
}

std::vector<Tensor> gather_tokens(std::vector<Tensor> inputs, Tensor index, std::optional<Tensor> norm_weight,
                                  std::optional<Tensor> norm_bias, double eps, bool rms) {
  check(!inputs.empty(), "gather_tokens: inputs is empty");
  check(index.dim() == 2 && index.is_cpu() && index.scalar_type() == ScalarType::Long,
        "gather_tokens: index must be an int64 CPU tensor [batch, kept]");
  index = unit_stride(index);
  GatherTokens p{};
  p.batch = index.size(0), p.kept = index.size(1), p.count = inputs.size();
  p.index = static_cast<const int64_t*>(index.const_data_ptr()), p.index_stride = index.stride(0);
  const int64_t tokens = inputs[0].dim() < 2 ? 0 : inputs[0].size(1);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t m = 0; m < p.kept; ++m) {
      const int64_t token = p.index[b * p.index_stride + m];
      check(-1 <= token && token < tokens, "gather_tokens: index[", b, ", ", m, "] = ", token,
            " must lie in -1..", tokens - 1);
    }

  std::vector<Rows> rows;
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& x = inputs[i];
    check(x.dim() >= 2 && x.is_cpu() && x.size(0) == p.batch && x.size(1) == tokens, "gather_tokens: inputs[",
          i, "] must be a CPU tensor [", p.batch, ", ", tokens, ", ...], got ", x.sizes());
    int64_t row = 1;
    for (int64_t d = x.dim() - 1; d >= 2; --d) {
      check(x.size(d) == 1 || x.stride(d) == row || x.numel() == 0, "gather_tokens: the rows of inputs[", i,
            "] are not contiguous (stride ", x.stride(d), " along dimension ", d,
            "); call .contiguous() on it");
      row *= x.size(d);
    }
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes[1] = p.kept;
    outputs.push_back(empty(Sizes(sizes.data(), sizes.size()), dtype_code(x)));
    const int64_t bytes = x.element_size();
    rows.push_back({static_cast<const char*>(x.const_data_ptr()), x.stride(0) * bytes, x.stride(1) * bytes,
                    row * bytes, static_cast<char*>(outputs.back().mutable_data_ptr())});
  }
  p.inputs = rows.data();

  if (norm_weight) {
    const Tensor& x = inputs[0];
    p.dtype = dtype_of("gather_tokens: inputs[0] (for a norm)", x);
    check(x.dim() == 3, "gather_tokens: inputs[0] must be [batch, tokens, dim] for a norm, got ", x.sizes());
    p.dim = x.size(2);
    auto parameter = [&](const char* name, std::optional<Tensor>& w) -> const void* {
      if (!w) return nullptr;
      check_shape(name, *w, {p.dim});
      check(w->is_cpu() && w->scalar_type() == x.scalar_type(), name,
            " must have the dtype of inputs[0], on the CPU");
      w = unit_stride(*w);
      return w->const_data_ptr();
    };
    p.norm_weight = parameter("gather_tokens: norm_weight", norm_weight);
    p.norm_bias = parameter("gather_tokens: norm_bias", norm_bias);
    outputs.push_back(empty(outputs[0].sizes(), dtype_code(x)));
    p.norm_out = outputs.back().mutable_data_ptr();
    p.eps = static_cast<float>(eps), p.rms = rms;
  }
  kernels().gather_tokens(p, run_parallel);
  return outputs;
}

Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> key_span, double scale) {
  check(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
        "attention: query, key and value must be [batch, heads, tokens, dim]");
  Attention p{};
  p.dtype = dtype_of("attention: key", key);
  p.batch = key.size(0), p.kv_heads = key.size(1), p.tokens = key.size(2), p.dim = key.size(3);
  p.heads = query.size(1), p.queries = query.size(2), p.value_dim = value.size(3);
  check(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "attention: query has ", p.heads,
        " heads, which must be a multiple of key's ", p.kv_heads);
  check_shape("attention: query", query, {p.batch, p.heads, p.queries, p.dim});
  check_shape("attention: value", value, {p.batch, p.kv_heads, p.tokens, p.value_dim});
  for (const Tensor* x : {&query, &key, &value}) {
    check(x->is_cpu() && x->scalar_type() == key.scalar_type(),
          "attention: query, key and value must be CPU tensors of one dtype");
    check(x->stride(3) == 1 || x->size(3) <= 1,
          "attention: query, key and value need a contiguous last dimension");
  }
  p.query = heads(query), p.key = heads(key), p.value = heads(value);
  p.scale = static_cast<float>(scale);
  const std::vector<Span> spans = live_spans("attention: key_span", key_span, p.batch, p.tokens, 0);
  p.spans = spans.data();

  const std::array<int64_t, 4> sizes{p.batch, p.queries, p.heads, p.value_dim};
  Tensor out = empty(Sizes(sizes.data(), 4), dtype_code(query));
  p.out = out.mutable_data_ptr();
  kernels().attention(p, run_parallel);
  return out;
}

Tensor received_attention(Tensor query, Tensor key, std::optional<Tensor> lse, std::optional<Tensor> lengths,
                          double scale) {
  check(query.dim() == 4 && key.dim() == 4,
        "received_attention: query and key must be [batch, heads, tokens, dim]");
  ReceivedAttention p{};
  p.dtype = dtype_of("received_attention: key", key);
  p.batch = key.size(0), p.kv_heads = key.size(1), p.tokens = key.size(2), p.dim = key.size(3);
  p.heads = query.size(1);
  check(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "received_attention: query has ", p.heads,
        " heads, which must be a multiple of key's ", p.kv_heads);
  check_shape("received_attention: query", query, {p.batch, p.heads, p.tokens, p.dim});
  for (const Tensor* x : {&query, &key}) {
    check(x->is_cpu() && x->scalar_type() == key.scalar_type(),
          "received_attention: query and key must be CPU tensors of one dtype");
    check(x->stride(3) == 1 || p.dim <= 1,
          "received_attention: query and key need a contiguous last dimension");
  }
  p.query = heads(query), p.key = heads(key);
  p.scale = static_cast<float>(scale);
  if (lse) {
    check_shape("received_attention: lse", *lse, {p.batch, p.heads, p.tokens});
    check(lse->is_cpu() && lse->scalar_type() == ScalarType::Float,
          "received_attention: lse must be a float32 CPU tensor");
    lse = torch::stable::contiguous(*lse);
    p.lse = static_cast<const float*>(lse->const_data_ptr());
  }
  std::vector<int64_t> live(p.batch, p.tokens);
  if (lengths) {
    check_shape("received_attention: lengths", *lengths, {p.batch});
    live = integers("received_attention: lengths", *lengths);
    for (int64_t& n : live) n = std::clamp<int64_t>(n, 0, p.tokens);
  }
  p.lengths = live.data();

  Tensor out = empty_floats({p.batch, p.tokens});
  p.out = floats(out);
  kernels().received_attention(p, run_parallel);
  return out;
}

Tensor patch_entropy(Tensor pixels, int64_t patch_size, std::vector<double> mean, std::vector<double> std) {
  check(pixels.dim() == 4 && pixels.is_cpu() && (pixels.size(1) == 1 || pixels.size(1) == 3),
        "patch_entropy: pixels must be a CPU tensor [batch, 1 or 3, height, width], got ", pixels.sizes());
  check(patch_size >= 1, "patch_entropy: patch_size=", patch_size, " must be at least 1");
  PatchEntropy p{};
  p.bytes = pixels.scalar_type() == ScalarType::Byte;
  p.batch = pixels.size(0), p.channels = pixels.size(1), p.patch_size = patch_size;
  p.rows = pixels.size(2) / patch_size, p.columns = pixels.size(3) / patch_size;
  if (!p.bytes) {
    p.dtype = dtype_of("patch_entropy: pixels", pixels);
    check(int64_t(mean.size()) == p.channels && int64_t(std.size()) == p.channels,
          "patch_entropy: mean and std must be of ", p.channels, " values");
    for (int64_t c = 0; c < p.channels; ++c)
      p.scale[c] = static_cast<float>(255 * std[c]), p.offset[c] = static_cast<float>(255 * mean[c]);
  }
  pixels = unit_stride(pixels);
  const int64_t bytes = pixels.element_size();
  p.pixels = static_cast<const char*>(pixels.const_data_ptr());
  p.batch_stride = pixels.stride(0) * bytes, p.channel_stride = pixels.stride(1) * bytes;
  p.line_stride = pixels.stride(2) * bytes;
  Tensor out = empty_floats({p.batch, p.rows * p.columns});
  p.out = floats(out);
  kernels().patch_entropy(p, run_parallel);
  return out;
}

std::tuple<Tensor, Tensor> recycle_tokens(Tensor tokens, Tensor importance, Tensor cell, int64_t cells) {
  check(tokens.dim() == 2 && tokens.is_cpu(),
        "recycle_tokens: tokens must be a CPU tensor [tokens, dim], got ", tokens.sizes());
  check(cells >= 0, "recycle_tokens: cells=", cells, " must not be negative");
  RecycleTokens p{};
  p.dtype = dtype_of("recycle_tokens: tokens", tokens);
  p.tokens = tokens.size(0), p.dim = tokens.size(1), p.cells = cells;
  check_shape("recycle_tokens: importance", importance, {p.tokens});
  check_shape("recycle_tokens: cell", cell, {p.tokens});
  check(importance.is_cpu() && importance.scalar_type() == ScalarType::Float,
        "recycle_tokens: importance must be a float32 CPU tensor");
  check(cell.is_cpu() && cell.scalar_type() == ScalarType::Long,
        "recycle_tokens: cell must be an int64 CPU tensor");
  tokens = unit_stride(tokens), importance = unit_stride(importance), cell = unit_stride(cell);
  p.data = tokens.const_data_ptr(), p.token_stride = tokens.stride(0);
  p.importance = static_cast<const float*>(importance.const_data_ptr());

  // Members by cell: a counting sort keeps their order.
  const auto* cell_of = static_cast<const int64_t*>(cell.const_data_ptr());
  std::vector<int64_t> starts(cells + 1);
  for (int64_t n = 0; n < p.tokens; ++n) {
    check(-1 <= cell_of[n] && cell_of[n] < cells, "recycle_tokens: cell[", n, "] = ", cell_of[n],
          " must lie in -1..", cells - 1);
    ++starts[cell_of[n] + 1];  // those of no cell at the front
  }
  const int64_t kept = starts[0];
  starts[0] = 0;
  for (int64_t c = 0; c < cells; ++c) starts[c + 1] += starts[c];
  std::vector<int64_t> members(p.tokens - kept), next(starts);
  for (int64_t n = 0; n < p.tokens; ++n)
    if (cell_of[n] >= 0) members[next[cell_of[n]]++] = n;
  p.starts = starts.data(), p.members = members.data();

  const std::array<int64_t, 2> sizes{cells, p.dim};
  Tensor merged = empty(Sizes(sizes.data(), 2), dtype_code(tokens));
  Tensor position = empty(Sizes(sizes.data(), 1), aoti_torch_dtype_int64());
  p.merged_out = merged.mutable_data_ptr();
  p.position_out = static_cast<int64_t*>(position.mutable_data_ptr());
  kernels().recycle_tokens(p, run_parallel);
  return {merged, position};
}

#ifdef FLOWCUT_WITH_CUDA
// The stream that torch works on. The symbol is looked up when it is needed: a CPU build of torch lacks it.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
                      : nullptr;
  }();
  check(get, "this torch has no CUDA");
  void* stream;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}
#endif

void check_place(const char* op, const char* name, const Tensor& x, const Tensor& first) {
  check((x.is_cpu() && first.is_cpu()) ||
            (x.is_cuda() && first.is_cuda() && x.get_device_index() == first.get_device_index()),
        op, ": ", name, " must be on the device of keys[0]");
}

// The tables by which keys are turned, [rows..., half], made contiguous here.
template <class Parameters>
void set_rotation(const char* op, Parameters& p, const std::vector<Tensor>& keys, std::vector<int64_t> shape,
                  std::optional<Tensor>& cos, std::optional<Tensor>& sin) {
  check(cos.has_value() == sin.has_value(), op, ": cos and sin come together");
  if (!cos) return;
  p.dtype = dtype_of("keys that are turned", keys[0]), p.turned = keys.size();
  p.half = cos->dim() > 0 ? cos->size(cos->dim() - 1) : 0;
  shape.push_back(p.half);
  for (auto* table : {&cos, &sin}) {
    const Sizes sizes = (*table)->sizes();
    check(std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()), op, ": cos and sin must be ",
          Sizes(shape.data(), shape.size()), ", got ", sizes);
    check((*table)->scalar_type() == ScalarType::Float, op, ": cos and sin must be float32");
    check_place(op, "cos and sin", **table, keys[0]);
    *table = torch::stable::contiguous(**table);
  }
  p.cos = static_cast<const float*>(cos->const_data_ptr());
  p.sin = static_cast<const float*>(sin->const_data_ptr());
  for (const Tensor& x : keys)
    check(x.dim() == 4 && 2 * p.half <= x.size(3), op, ": cos and sin are for ", 2 * p.half,
          " columns, keys are ", x.sizes());
}

// Both operators on both devices: the outputs, keys before values; none in place.
std::vector<Tensor> compact(const std::vector<Tensor>& keys, const std::vector<Tensor>& values, Tensor keep,
                            std::optional<Tensor> cos, std::optional<Tensor> sin, bool in_place) {
  check(!keys.empty() && keys.size() == values.size(),
        "compact_kv: keys and values must be as many, at least one, got ", keys.size(), " and ",
        values.size());
  check(keep.dim() == 2 && keep.scalar_type() == ScalarType::Long,
        "compact_kv: keep must be int64 [batch, kept]");
  const Tensor& first = keys[0];
  check(first.dim() == 4, "compact_kv: keys[0] must be [batch, heads, tokens, dim]");
  CompactKV p{};
  p.batch = keep.size(0), p.heads = first.size(1), p.kept = keep.size(1), p.in_place = in_place;
  check_place("compact_kv", "keep", keep, first);
  keep = torch::stable::contiguous(keep);
  p.keep = static_cast<const int64_t*>(keep.const_data_ptr());
  set_rotation("compact_kv", p, keys, {p.batch, p.kept}, cos, sin);

  std::vector<Tensor> tensors = keys, outputs;
  tensors.insert(tensors.end(), values.begin(), values.end());
  std::vector<CacheRows> rows;
  int64_t tokens = INT32_MAX;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    check(x.dim() == 4 && x.size(0) == p.batch && x.size(1) == p.heads &&
              x.scalar_type() == first.scalar_type(),
          "compact_kv: keys and values must be [", p.batch, ", ", p.heads,
          ", tokens, dim] of one dtype, got ", x.sizes());
    check_place("compact_kv", "keys and values", x, first);
    check(x.stride(3) == 1 || x.size(3) <= 1, "compact_kv: keys and values need a contiguous last dimension");
    const int64_t bytes = x.element_size();
    check(x.size(2) < INT32_MAX && x.size(3) * bytes < INT32_MAX, "compact_kv: got ", x.sizes(),
          ", tokens and the bytes of a row must fit 32 bits");
    tokens = std::min(tokens, x.size(2));
    CacheRows row{static_cast<const char*>(x.const_data_ptr()),
                  nullptr,
                  x.stride(0) * bytes,
                  x.stride(1) * bytes,
                  x.stride(2) * bytes,
                  static_cast<int32_t>(x.size(2)),
                  static_cast<int32_t>(x.size(3) * bytes)};
    if (!in_place) {
      const std::array<int64_t, 4> sizes{p.batch, p.heads, p.kept, x.size(3)};
      outputs.push_back(torch::stable::new_empty(x, Sizes(sizes.data(), 4)));
      row.out = static_cast<char*>(outputs.back().mutable_data_ptr());
    }
    rows.push_back(row);
  }
  p.tensors = rows.data(), p.count = rows.size();

  if (first.is_cpu()) {
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t m = 0, last = -1; m < p.kept; ++m) {
        const int64_t token = p.keep[b * p.kept + m];
        const bool padding = token == -1, padded = m > 0 && last == -1;
        check(padding || (!padded && last < token && token < tokens), "compact_kv: keep[", b, ", ", m,
              "] = ", token, " after ", last, ": rows must ascend within 0..", tokens - 1, ", then -1");
        last = token;
      }
    kernels().compact_kv(p, run_parallel);
    return outputs;
  }
#ifdef FLOWCUT_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  cuda::compact_kv(p, current_stream(first.get_device_index()));
#endif
  return outputs;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> compact_kv(std::vector<Tensor> keys,
                                                                std::vector<Tensor> values, Tensor keep,
                                                                std::optional<Tensor> cos,
                                                                std::optional<Tensor> sin) {
  const std::vector<Tensor> all = compact(keys, values, keep, cos, sin, false);
  const auto middle = all.begin() + keys.size();
  return {{all.begin(), middle}, {middle, all.end()}};
}

void compact_kv_in_place(std::vector<Tensor> keys, std::vector<Tensor> values, Tensor keep,
                         std::optional<Tensor> cos, std::optional<Tensor> sin) {
  compact(keys, values, keep, cos, sin, true);
}

void compact_kv_paged(std::vector<Tensor> keys, std::vector<Tensor> values, Tensor moves, Tensor offsets,
                      std::optional<Tensor> cos, std::optional<Tensor> sin) {
  check(!keys.empty() && keys.size() == values.size(),
        "compact_kv_paged_: keys and values must be as many, at least one, got ", keys.size(), " and ",
        values.size());
  const Tensor& first = keys[0];
  check(first.dim() == 4, "compact_kv_paged_: keys[0] must be [blocks, block_size, heads, dim]");
  check(moves.dim() == 2 && moves.size(1) == 2 && moves.scalar_type() == ScalarType::Long &&
            offsets.dim() == 1 && offsets.size(0) > 0 && offsets.scalar_type() == ScalarType::Long,
        "compact_kv_paged_: moves must be int64 [moved, 2] and offsets int64 [sequences + 1], got ",
        moves.sizes(), " and ", offsets.sizes());
  check_place("compact_kv_paged_", "moves", moves, first);
  check_place("compact_kv_paged_", "offsets", offsets, first);
  moves = torch::stable::contiguous(moves), offsets = torch::stable::contiguous(offsets);
  CompactKVPaged p{};
  p.blocks = first.size(0), p.block_size = first.size(1), p.heads = first.size(2);
  p.moved = moves.size(0), p.sequences = offsets.size(0) - 1;
  p.moves = static_cast<const int64_t*>(moves.const_data_ptr());
  p.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t slots = p.blocks * p.block_size;
  check(slots <= INT32_MAX, "compact_kv_paged_: ", p.blocks, " blocks of ", p.block_size,
        " rows are more rows than fit 32 bits");
  set_rotation("compact_kv_paged_", p, keys, {p.moved}, cos, sin);

  std::vector<PagedRows> rows;
  for (const auto* tensors : {&keys, &values})
    for (const Tensor& x : *tensors) {
      check(x.dim() == 4 && x.size(0) == p.blocks && x.size(1) == p.block_size && x.size(2) == p.heads &&
                x.scalar_type() == first.scalar_type(),
            "compact_kv_paged_: keys and values must be [", p.blocks, ", ", p.block_size, ", ", p.heads,
            ", dim] of one dtype, got ", x.sizes());
      check_place("compact_kv_paged_", "keys and values", x, first);
      check(x.stride(3) == 1 || x.size(3) <= 1,
            "compact_kv_paged_: keys and values need a contiguous last dimension");
      const int64_t bytes = x.element_size();
      check(x.size(3) * bytes < INT32_MAX, "compact_kv_paged_: got ", x.sizes(),
            ", the bytes of a row must fit 32 bits");
      rows.push_back({static_cast<char*>(x.mutable_data_ptr()), x.stride(0) * bytes, x.stride(2) * bytes,
                      x.stride(1) * bytes, static_cast<int32_t>(x.size(3) * bytes)});
    }
  p.tensors = rows.data(), p.count = rows.size();

  if (first.is_cpu()) {
    for (int64_t b = 0, last = 0; b <= p.sequences; last = p.offsets[b++])
      check(last <= p.offsets[b] && p.offsets[b] <= p.moved, "compact_kv_paged_: offsets[", b,
            "] = ", p.offsets[b], " must ascend within 0..", p.moved);
    for (int64_t i = 0; i < 2 * p.moved; ++i)
      check(0 <= p.moves[i] && p.moves[i] < slots, "compact_kv_paged_: moves[", i / 2, ", ", i % 2,
            "] = ", p.moves[i], " must lie in 0..", slots - 1);
    kernels().compact_kv_paged(p, run_parallel);
    return;
  }
#ifdef FLOWCUT_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  cuda::compact_kv_paged(p, current_stream(first.get_device_index()));
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowcut_kernels, CPU, m) {
  m.impl("anchor_stats", TORCH_BOX(&anchor_stats));
  m.impl("score_select", TORCH_BOX(&score_select));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("patch_entropy", TORCH_BOX(&patch_entropy));
  m.impl("recycle_tokens", TORCH_BOX(&recycle_tokens));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("received_attention", TORCH_BOX(&received_attention));
  m.impl("compact_kv", TORCH_BOX(&compact_kv));
  m.impl("compact_kv_", TORCH_BOX(&compact_kv_in_place));
  m.impl("compact_kv_paged_", TORCH_BOX(&compact_kv_paged));
}

#ifdef FLOWCUT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(flowcut_kernels, CUDA, m) {
  m.impl("compact_kv", TORCH_BOX(&compact_kv));
  m.impl("compact_kv_", TORCH_BOX(&compact_kv_in_place));
  m.impl("compact_kv_paged_", TORCH_BOX(&compact_kv_paged));
}
#endif

// For flowcut_kernels.info and the tests, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* flowcut_cpu_isa() { return kernels().isa; }
