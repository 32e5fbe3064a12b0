// score_select: fusion, history, count and ordered top-k, a thread per image.
//
// The k-th largest score is found by bisection on the bits of the scores (32 passes of vector compares,
// whatever the data), then one pass writes the kept rows in order. The loops are plain: the compiler
// vectorises them, and this file is compiled without contraction, so that a product and a sum round as they
// do in torch.
#include "simd.h"

namespace flowcut::FLOWCUT_ISA {
namespace {

constexpr int64_t kGrain = 2 * 1024;  // tokens that are worth a thread

float total(const float* x, int64_t n) {
  F64 lanes{};
  double rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes += widen(load(x + i));
  for (; i < n; ++i) rest += x[i];
  return (float)(sum(lanes) + rest);
}

// x^exponent in double and rounded once, so that all forms agree on the float.
float power(float x, float exponent) { return (float)__builtin_pow(x, exponent); }

// score = weight * x / sum x, or 0 for a sum of 0; `add` puts it on top of what is there.
void share(float* __restrict score, const float* __restrict x, float weight, int64_t n, bool add) {
  const float sum = total(x, n);
  if (sum == 0 && !add) memset(score, 0, n * sizeof(float));
  if (sum == 0) return;
  if (add)
    for (int64_t i = 0; i < n; ++i) score[i] += weight * (x[i] / sum);
  else
    for (int64_t i = 0; i < n; ++i) score[i] = weight * (x[i] / sum);
}

// Every group of `block` scores becomes its mean.
void average(float* __restrict score, int64_t n, int64_t block) {
  for (int64_t i = 0; i + block <= n; i += block) {
    float sum = 0;
    for (int64_t j = 0; j < block; ++j) sum += score[i + j];
    for (int64_t j = 0; j < block; ++j) score[i + j] = sum / (float)block;
  }
}

// The cumulative score of candidates [begin, begin + n) of one image; false if one is NaN or Inf.
bool update_score(const ScoreSelect& p, int64_t batch, int64_t begin, int64_t n) {
  auto row = [&](const Criterion& x) { return x.data ? x.data + batch * x.batch_stride + begin : nullptr; };
  float* __restrict score = p.score_out + batch * p.tokens + begin;
  if (p.attention.data) share(score, row(p.attention), p.attention_weight, n, false);
  if (p.relevance.data) share(score, row(p.relevance), p.relevance_weight, n, p.attention.data);
  if (const float* __restrict norm = row(p.value_norm)) {
    const bool first = !p.attention.data && !p.relevance.data;
    if (p.norm_exponent != 1)
      for (int64_t i = 0; i < n; ++i) score[i] = (first ? 1.0f : score[i]) * power(norm[i], p.norm_exponent);
    else if (!first)
      for (int64_t i = 0; i < n; ++i) score[i] *= norm[i];
    else
      memcpy(score, norm, n * sizeof(float));
  }
  if (const float* __restrict history = row(p.history))
    for (int64_t i = 0; i < n; ++i) score[i] = p.history_weight * history[i] + p.score_weight * score[i];
  if (p.block > 1) average(score, n, p.block);
  int32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    score[i] += 0.0f;  // -0.0 becomes +0.0, so that the two tie
    bad |= !(__builtin_fabsf(score[i]) <= __FLT_MAX__);
  }
  return !bad;
}

// Groups that image `batch` is to end with.
int64_t target(const ScoreSelect& p, int64_t batch) {
  return p.budgets ? min(max(p.budgets[batch], 0), p.budget) : p.budget;
}

// Groups to drop of n, in float like torch: round_half_even((n - T) / divisor * (1 - h^e)).
int64_t drop_count(const ScoreSelect& p, int64_t batch, int64_t n) {
  const float h = p.entropy[batch];
  const float share = p.entropy_exponent == 2 ? h * h : power(h < 0 ? 0 : h, p.entropy_exponent);
  const float count = __builtin_rintf((float)(n - target(p, batch)) / p.divisor * (1.0f - share));
  // A NaN says nothing of its own image, which falls to the budget, and does not decide for its batch.
  if (count != count) return INT64_MIN;
  return count > 0 ? (int64_t)(count < 0x1p62f ? count : 0x1p62f) : 0;
}

// Writes the rows of the k of n groups whose (equal) scores are largest, as offset + position, ascending, ties to the
// lower position. Without groups, the loops are those of a block of 1.
template <bool kGroups>
void top_k(const float* score, int64_t n, int64_t k, int64_t block, int64_t offset, int32_t* __restrict keys,
           int64_t* out) {
  if constexpr (!kGroups) block = 1;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    memcpy(&bits, score + i * block, sizeof(bits));
    keys[i] = bits ^ (bits >> 31 & 0x7fffffff);  // integers in the order of the floats
  }
  // The largest threshold that at least k keys reach, bit by bit from the sign (whose bit counts upside
  // down).
  uint32_t threshold = 0;
  for (uint32_t bit = 0x80000000; bit; bit >>= 1) {
    const int32_t trial = (int32_t)((threshold | bit) ^ 0x80000000);
    int32_t reach = 0;
    for (int64_t i = 0; i < n; ++i) reach += keys[i] >= trial;
    if (reach >= k) threshold |= bit;
  }
  const int32_t limit = (int32_t)(threshold ^ 0x80000000);
  int64_t ties = k;
  for (int64_t i = 0; i < n; ++i) ties -= keys[i] > limit;
  for (int64_t i = 0, m = 0; m < k; ++i) {
    const bool tie = keys[i] == limit && ties > 0;
    ties -= tie;
    for (int64_t j = 0; j < block; ++j) out[m * block + j] = offset + i * block + j;
    m += keys[i] > limit || tie;
  }
}

}  // namespace

void score_select(const ScoreSelect& p, ParallelFor run) {
  auto candidates = [&](int64_t batch) { return max(p.lengths[batch] - p.protect, 0) / p.block; };
  const bool adaptive = (p.mode == Select::Adaptive || p.mode == Select::AdaptiveBatch) && p.divisor != 0;
  int64_t batch_drop = INT64_MIN;
  if (adaptive && p.mode == Select::AdaptiveBatch)
    for (int64_t b = 0; b < p.batch; ++b) batch_drop = max(batch_drop, drop_count(p, b, candidates(b)));

  parallel_for(run, p.batch, max(1, kGrain / max(p.tokens, 1)), [&](int64_t first, int64_t last) {
    const Buffer keys(p.tokens);
    for (int64_t b = first; b < last; ++b) {
      const int64_t n = candidates(b), end = max(min(p.lengths[b], p.tokens), p.protect),
                    live = end - p.protect;
      float* score = p.score_out + b * p.tokens;
      // A count that follows from NaN is no choice either.
      const bool finite = update_score(p, b, p.protect, live) && (!adaptive || __builtin_fabsf(p.entropy[b]) <= __FLT_MAX__);
      memset(score, 0, p.protect * sizeof(float));
      memset(score + end, 0, (p.tokens - end) * sizeof(float));
      if (p.mode == Select::ScoreOnly) {
        p.lengths_out[b] = finite ? (int32_t)p.lengths[b] : -1;
        continue;
      }
      int64_t keep = min(n, target(p, b));
      if (adaptive) {
        const int64_t drop = p.mode == Select::AdaptiveBatch ? batch_drop : drop_count(p, b, n);
        if (drop >= 0) keep = max(keep, n - drop);
      }
      const int64_t kept = finite ? p.protect + p.block * keep : 0;
      int64_t* index = p.index_out + b * p.width;
      if (finite) {
        for (int64_t i = 0; i < p.protect; ++i) index[i] = i;
        (p.block > 1 ? top_k<true> : top_k<false>)(score + p.protect, n, keep, p.block, p.protect,
                                                   (int32_t*)(float*)keys, index + p.protect);
      }
      for (int64_t i = kept; i < p.width; ++i) index[i] = -1;
      p.lengths_out[b] = finite ? (int32_t)kept : -1;
    }
  });
}

}  // namespace flowcut::FLOWCUT_ISA
