// The CPU forms of score_select, compact_kv, compact_kv_paged, patch_entropy, recycle_tokens and
// received_attention and the page planner on random arguments, for a build with sanitizers: results against
// naive ones, every array exactly as long as it may be read.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "draw.h"
#include "kernels.h"

namespace flowcut::FLOWCUT_ISA {
void score_select(const ScoreSelect&, ParallelFor);
void compact_kv(const CompactKV&, ParallelFor);
void compact_kv_paged(const CompactKVPaged&, ParallelFor);
void patch_entropy(const PatchEntropy&, ParallelFor);
void recycle_tokens(const RecycleTokens&, ParallelFor);
void received_attention(const ReceivedAttention&, ParallelFor);
}  // namespace flowcut::FLOWCUT_ISA

using namespace flowcut;

namespace {

void require(bool ok, const char* what) {
  if (ok) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

// Pieces of `grain` items, the last first: none may depend on another.
void run_backwards(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t piece = (n + grain - 1) / grain; piece-- > 0;)
    body(piece * grain, std::min(n, (piece + 1) * grain), context);
}

std::vector<float> floats(int64_t count) {
  std::vector<float> x(count);
  for (float& value : x) value = draw(-1000, 1000) / 8.0f;
  return x;
}

void check_score_select() {
  ScoreSelect p{};
  p.batch = draw(1, 3), p.block = draw(0, 1) ? 1 : draw(2, 5), p.protect = draw(0, 2);
  p.tokens = p.protect + p.block * draw(1, 40), p.budget = draw(0, 30), p.mode = Select(draw(0, 3));
  p.width = p.mode == Select::ScoreOnly ? 0 : p.tokens;
  if (p.mode == Select::Fixed) p.width = std::min(p.tokens, p.protect + p.block * p.budget);
  p.divisor = draw(0, 4), p.entropy_exponent = 2, p.norm_exponent = 1, p.history_weight = p.score_weight = 0.5f;
  // Eighths below 1000: sums and means are the same in any order, and many are equal.
  std::vector<float> norm = floats(p.batch * p.tokens), entropy(p.batch), score(norm.size(), NAN);
  std::vector<int64_t> lengths, index(p.batch * p.width);
  std::vector<int32_t> budgets(p.batch), kept(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) {
    lengths.push_back(p.protect + p.block * draw(0, (p.tokens - p.protect) / p.block));
    budgets[b] = draw(-1, p.budget + 1), entropy[b] = draw(0, 8) / 8.0f;
    if (draw(0, 5) == 0 && lengths[b] > p.protect)
      norm[b * p.tokens + draw(p.protect, lengths[b] - 1)] = INFINITY;
  }
  p.value_norm = p.history = {norm.data(), p.tokens};
  p.entropy = entropy.data(), p.lengths = lengths.data(), p.budgets = draw(0, 1) ? budgets.data() : nullptr;
  p.score_out = score.data(), p.index_out = index.data(), p.lengths_out = kept.data();
  FLOWCUT_ISA::score_select(p, run_backwards);

  const bool adaptive = (p.mode == Select::Adaptive || p.mode == Select::AdaptiveBatch) && p.divisor > 0;
  auto target = [&](int64_t b) { return p.budgets ? std::clamp<int64_t>(budgets[b], 0, p.budget) : p.budget; };
  std::vector<int64_t> drops;
  for (int64_t b = 0; b < p.batch; ++b)
    drops.push_back(std::max(0.0f, std::rint(((lengths[b] - p.protect) / p.block - target(b)) / p.divisor *
                                             (1 - entropy[b] * entropy[b]))));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t n = (lengths[b] - p.protect) / p.block;
    std::vector<std::pair<float, int64_t>> groups;  // negated, so that the best sort first, the lower of equals
    bool finite = true;
    for (int64_t g = 0; g < n; ++g) {
      float sum = 0;
      for (int64_t i = 0; i < p.block; ++i) sum += norm[b * p.tokens + p.protect + g * p.block + i];
      groups.push_back({-sum / p.block, g});
      finite &= std::isfinite(sum);
      for (int64_t i = 0; i < p.block; ++i)
        require(score[b * p.tokens + p.protect + g * p.block + i] == sum / p.block, "score_select: score");
    }
    for (int64_t i = 0; i < p.tokens; ++i)
      if (i < p.protect || i >= lengths[b])
        require(score[b * p.tokens + i] == 0, "score_select: score of no candidate");
    int64_t keep = std::min(n, target(b));
    if (adaptive)
      keep = std::max(keep, n - (p.mode == Select::Adaptive ? drops[b] : std::ranges::max(drops)));
    const int64_t live = p.mode == Select::ScoreOnly ? lengths[b] : p.protect + p.block * keep;
    require(kept[b] == (finite ? live : -1), "score_select: lengths");
    std::vector<int64_t> rows;
    if (finite && p.mode != Select::ScoreOnly) {
      for (int64_t i = 0; i < p.protect; ++i) rows.push_back(i);
      std::ranges::sort(groups);
      for (int64_t g = 0; g < keep; ++g)
        for (int64_t i = 0; i < p.block; ++i) rows.push_back(p.protect + groups[g].second * p.block + i);
      std::ranges::sort(rows);
    }
    rows.resize(p.width, -1);
    require(std::equal(rows.begin(), rows.end(), index.begin() + b * p.width), "score_select: index");
  }
}

// `row` turned as in the definition.
void turn(float* row, const float* cos, const float* sin, int64_t half) {
  for (int64_t j = 0; j < half; ++j) {
    const float a = row[j], b = row[j + half];
    const float ac = a * cos[j], bs = b * sin[j], bc = b * cos[j], as = a * sin[j];
    row[j] = ac - bs, row[j + half] = bc + as;
  }
}

// `width` floats in a row, and so many rows that the output goes past the caches; 0: few rows, of any width.
void check_compact_kv(bool in_place, int64_t width = 0) {
  const int64_t batch = draw(1, 3), heads = draw(1, 3), dim = width ? width : draw(1, 70);
  const int64_t kept = width ? (9 << 20) / (2 * batch * heads * dim * 4) : draw(0, 45);
  const int64_t tokens = width ? kept + draw(0, 40) : draw(0, 40), half = draw(0, 1) ? draw(0, dim / 2) : 0;
  std::vector<int64_t> keep;
  for (int64_t b = 0; b < batch; ++b)
    for (const int64_t row : draw_keep(tokens, kept)) keep.push_back(row);
  const std::vector<float> cos = floats(batch * kept * half), sin = floats(cos.size());
  std::vector<std::vector<float>> memory, out, wanted;
  std::vector<CacheRows> rows;
  for (int64_t i = 0; i < 2; ++i) {
    memory.push_back(floats(batch * heads * tokens * dim)), out.push_back(floats(batch * heads * kept * dim));
    wanted.push_back(in_place ? memory[i] : std::vector<float>(out[i].size(), 0.0f));
    for (int64_t head = 0; head < batch * heads; ++head)
      for (int64_t m = 0; m < kept; ++m) {
        const int64_t at = head / heads * kept + m;
        if (keep[at] < 0) continue;
        float* to = wanted[i].data() + (head * (in_place ? tokens : kept) + m) * dim;
        std::copy_n(memory[i].data() + (head * tokens + keep[at]) * dim, dim, to);
        if (i == 0) turn(to, cos.data() + at * half, sin.data() + at * half, half);
      }
  }
  for (int64_t i = 0; i < 2; ++i)
    rows.push_back({reinterpret_cast<char*>(memory[i].data()), reinterpret_cast<char*>(out[i].data()),
                    heads * tokens * dim * 4, tokens * dim * 4, dim * 4, int32_t(tokens), int32_t(dim * 4)});
  CompactKV p{};
  p.tensors = rows.data(), p.count = 2, p.turned = half > 0, p.batch = batch, p.heads = heads, p.kept = kept;
  p.keep = keep.data(), p.in_place = in_place, p.dtype = DType::Float32, p.half = half;
  p.cos = cos.data(), p.sin = sin.data();
  FLOWCUT_ISA::compact_kv(p, run_backwards);
  require((in_place ? memory : out) == wanted, "compact_kv");
}

// The plan by what it is for: every kept row arrives, shared blocks are as they were, references add up.
void check_plan(const PagedBatch& batch, const PagedPlan& plan) {
  const int64_t size = batch.block_size;
  std::vector<int64_t> memory(batch.blocks * size);
  std::iota(memory.begin(), memory.end(), 0);
  const std::vector<int64_t> before = memory;
  std::vector<bool> written(batch.blocks);
  for (size_t m = 0; m < plan.shifts.size(); ++m) {
    memory[plan.moves[2 * m + 1]] = before[plan.moves[2 * m]];
    written[plan.moves[2 * m + 1] / size] = true;
  }
  std::vector<int32_t> references(batch.ref_counts, batch.ref_counts + batch.blocks);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int32_t *table = batch.block_tables + b * batch.width,
                  *now = plan.block_tables.data() + b * batch.width;
    const int64_t *keep = batch.keep + b * batch.kept, length = plan.context_lens[b];
    require(length == std::count_if(keep, keep + batch.kept, [](int64_t row) { return row >= 0; }),
            "new lengths");
    for (int64_t m = 0; m < length; ++m)
      require(memory[now[m / size] * size + m % size] == table[keep[m] / size] * size + keep[m] % size,
              "kept rows");
    for (int64_t i = 0; i * size < batch.context_lens[b]; ++i) --references[table[i]];
    for (int64_t i = 0; i * size < length; ++i) ++references[now[i]];
  }
  std::vector<int32_t> freed;
  for (int64_t block = 0; block < batch.blocks; ++block) {
    require(!written[block] || batch.ref_counts[block] <= 1, "a shared block is written");
    if (batch.ref_counts[block] > 0 && references[block] == 0) freed.push_back(block);
  }
  require(references == plan.ref_counts && freed == plan.freed_blocks, "references");
}

void check_compact_kv_paged() {
  const DrawnBatch drawn(draw(1, 5));
  const PagedBatch batch = drawn.batch();
  const PagedPlan plan = plan_paged(batch);
  check_plan(batch, plan);
  const int64_t size = batch.block_size, heads = draw(1, 3), dim = draw(1, 40);
  const int64_t moved = plan.shifts.size(), half = draw(0, 1) ? draw(0, dim / 2) : 0;
  const std::vector<float> cos = floats(moved * half), sin = floats(cos.size());
  // Keys and values of a block beside each other, [blocks, 2, block_size, heads, dim].
  const int64_t row = heads * dim, block = 2 * size * row;
  std::vector<float> memory = floats(batch.blocks * block), wanted = memory;
  for (int64_t m = 0; m < moved; ++m)
    for (int64_t i = 0; i < 2; ++i) {
      auto at = [&](int64_t slot) { return slot / size * block + (i * size + slot % size) * row; };
      float* to = wanted.data() + at(plan.moves[2 * m + 1]);
      std::copy_n(memory.data() + at(plan.moves[2 * m]), row, to);
      for (int64_t head = 0; i == 0 && head < heads; ++head)
        turn(to + head * dim, cos.data() + m * half, sin.data() + m * half, half);
    }
  std::vector<PagedRows> rows;
  for (int64_t i = 0; i < 2; ++i)
    rows.push_back({reinterpret_cast<char*>(memory.data() + i * size * row), block * 4, dim * 4, row * 4,
                    int32_t(dim * 4)});
  CompactKVPaged p{};
  p.tensors = rows.data(), p.count = 2, p.turned = half > 0, p.sequences = batch.sequences, p.heads = heads;
  p.blocks = batch.blocks, p.block_size = size, p.moved = moved, p.moves = plan.moves.data();
  p.offsets = plan.offsets.data(), p.dtype = DType::Float32, p.half = half;
  p.cos = cos.data(), p.sin = sin.data();
  FLOWCUT_ISA::compact_kv_paged(p, run_backwards);
  require(memory == wanted, "compact_kv_paged");
}

// One array of a batch changed at random: an error or a plan, never a wild read.
void check_broken_batch() {
  DrawnBatch drawn(draw(1, 5));
  const int value = draw(0, 3) > 0 ? draw(-3, 40) : draw(INT32_MIN, INT32_MAX);
  auto change = [&](auto& values) {
    if (!values.empty()) values[draw(0, values.size() - 1)] = value;
  };
  switch (draw(0, 4)) {
    case 0: change(drawn.tables); break;
    case 1: change(drawn.lengths); break;
    case 2: change(drawn.keep); break;
    case 3: change(drawn.counts); break;
    case 4: drawn.free.resize(draw(0, 2)), change(drawn.free); break;
  }
  try {
    check_plan(drawn.batch(), plan_paged(drawn.batch()));
  } catch (const std::invalid_argument&) {
  }
}

// The GPU's sweep: units run side by side, each its moves in tiles of items (a vector of a row). Between two
// barriers the writes of a tile and the reads of the next come in any order. Every row must be read before it
// is overwritten, whoever overwrites it.
void check_sweep(const std::vector<std::vector<std::pair<int64_t, int64_t>>>& units, int64_t slots) {
  struct Step {
    bool write;
    int64_t from, to, value;
  };
  const int64_t width = draw(1, 4), tile = draw(1, 12);
  std::vector<int64_t> memory(slots * width);
  std::iota(memory.begin(), memory.end(), 0);
  std::vector<int64_t> wanted = memory, next(units.size(), 0);
  for (const auto& moves : units)
    for (const auto& [from, to] : moves)
      for (int64_t column = 0; column < width; ++column) wanted[to * width + column] = from * width + column;
  std::vector<std::vector<Step>> phase(units.size()), loaded(units.size());
  std::vector<size_t> running(units.size());
  std::iota(running.begin(), running.end(), 0);
  while (!running.empty()) {
    const size_t at = draw(0, running.size() - 1), unit = running[at];
    std::vector<Step>& steps = phase[unit];
    if (!steps.empty()) {
      Step step = steps.back();
      steps.pop_back();
      if (step.write) {
        memory[step.to] = step.value;
      } else {
        step.value = memory[step.from], step.write = true;
        loaded[unit].push_back(step);
      }
      continue;
    }
    // A barrier: what was loaded is written while the next tile is read.
    steps.swap(loaded[unit]);
    const int64_t items = units[unit].size() * width;
    for (const int64_t end = std::min(items, next[unit] + tile); next[unit] < end; ++next[unit]) {
      const auto& [from, to] = units[unit][next[unit] / width];
      const int64_t column = next[unit] % width;
      steps.push_back({false, from * width + column, to * width + column, 0});
    }
    std::shuffle(steps.begin(), steps.end(), generator);
    if (steps.empty()) running.erase(running.begin() + at);
  }
  require(memory == wanted, "a row was overwritten before it was read");
}

void check_sweeps() {
  const int64_t tokens = draw(1, 40);
  std::vector<std::pair<int64_t, int64_t>> moves;
  for (const int64_t row : draw_keep(tokens, tokens))
    if (row >= 0) moves.emplace_back(row, moves.size());
  check_sweep({moves}, tokens);

  const DrawnBatch drawn(draw(1, 5));
  const PagedBatch batch = drawn.batch();
  const PagedPlan plan = plan_paged(batch);
  std::vector<std::vector<std::pair<int64_t, int64_t>>> sequences(batch.sequences);
  for (int64_t b = 0; b < batch.sequences; ++b)
    for (int64_t m = plan.offsets[b]; m < plan.offsets[b + 1]; ++m)
      sequences[b].emplace_back(plan.moves[2 * m], plan.moves[2 * m + 1]);
  check_sweep(sequences, batch.blocks * batch.block_size);
}

// Pixels and dim as they come, so that lines and rows end anywhere in a vector.
void check_patch_entropy() {
  PatchEntropy p{};
  const int64_t size = draw(1, 9), height = draw(0, 20), width = draw(0, 70);
  p.bytes = draw(0, 1), p.batch = draw(1, 2), p.channels = draw(0, 1) ? 3 : 1, p.patch_size = size;
  p.rows = height / size, p.columns = width / size, p.dtype = DType::Float32;
  std::vector<float> pixels(p.batch * p.channels * height * width);
  for (float& x : pixels) x = p.bytes ? draw(0, 7) * 36.0f : draw(-2, 9) * 36.25f;
  if (!p.bytes && !pixels.empty() && draw(0, 3) == 0) pixels[draw(0, pixels.size() - 1)] = NAN;
  const std::vector<uint8_t> bytes(p.bytes ? pixels.begin() : pixels.end(), pixels.end());
  const int64_t itemsize = p.bytes ? 1 : 4;
  p.pixels = p.bytes ? (const char*)bytes.data() : (const char*)pixels.data();
  p.line_stride = width * itemsize, p.channel_stride = height * p.line_stride;
  p.batch_stride = p.channels * p.channel_stride;
  for (int64_t c = 0; c < p.channels; ++c) p.scale[c] = 1;
  std::vector<float> out(p.batch * p.rows * p.columns, -1.0f);
  p.out = out.data();
  FLOWCUT_ISA::patch_entropy(p, run_backwards);

  for (int64_t patch = 0; patch < int64_t(out.size()); ++patch) {
    const int64_t image = patch / (p.rows * p.columns), row = patch / p.columns % p.rows;
    std::vector<int> counts(256);
    double wanted = 0;
    for (int64_t i = 0; i < size * size; ++i) {
      const int64_t y = row * size + i / size, x = patch % p.columns * size + i % size;
      double total = 0;
      for (int64_t c = 0; c < p.channels; ++c) {
        const float value = pixels[((image * p.channels + c) * height + y) * width + x];
        total += std::rint(std::clamp(value, 0.0f, 255.0f));
      }
      if (std::isnan(total))
        wanted = NAN;
      else
        ++counts[std::lround(total / p.channels)];
    }
    for (const int n : counts)
      if (n > 0) wanted += n / double(size * size) * std::log2(size * size / double(n));
    require(std::isnan(wanted) ? std::isnan(out[patch]) : std::fabs(out[patch] - wanted) < 1e-5,
            "patch_entropy");
  }
}

void check_recycle_tokens() {
  RecycleTokens p{};
  p.tokens = draw(0, 60), p.dim = draw(0, 3) ? draw(0, 80) : draw(4090, 4200), p.cells = draw(0, 6);
  p.token_stride = p.dim, p.dtype = DType::Float32;
  const std::vector<float> rows = floats(p.tokens * p.dim), importance = floats(p.tokens);
  std::vector<int64_t> starts{0}, members, position(p.cells, -2);
  std::vector<std::vector<int64_t>> of(p.cells + 1);
  for (int64_t n = 0; n < p.tokens; ++n) of[draw(0, p.cells)].push_back(n);
  for (int64_t c = 0; c < p.cells; ++c) {
    members.insert(members.end(), of[c].begin(), of[c].end());
    starts.push_back(members.size());
  }
  std::vector<float> merged(p.cells * p.dim, NAN);
  p.data = rows.data(), p.importance = importance.data();
  p.starts = starts.data(), p.members = members.data();
  p.merged_out = merged.data(), p.position_out = position.data();
  FLOWCUT_ISA::recycle_tokens(p, run_backwards);

  for (int64_t c = 0; c < p.cells; ++c) {
    double total = 0;
    int64_t best = -1;
    for (const int64_t n : of[c]) {
      total += std::fmax(importance[n], 0);
      if (best < 0 || importance[n] > importance[best]) best = n;
    }
    require(position[c] == best, "recycle_tokens: position");
    const double divisor = total > 0 ? total : std::max<double>(of[c].size(), 1);
    for (int64_t i = 0; i < p.dim; ++i) {
      double sum = 0;
      for (const int64_t n : of[c])
        sum += (total > 0 ? std::fmax(importance[n], 0) : 1) * rows[n * p.dim + i];
      require(std::fabs(merged[c * p.dim + i] - sum / divisor) < 1e-2, "recycle_tokens: merged");
    }
  }
}

// The upper halves, all there is of the numbers from now on.
std::vector<uint16_t> halves(std::vector<float>& x) {
  std::vector<uint16_t> out;
  for (float& value : x) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    out.push_back(bits >> 16);
    bits &= 0xffff0000;
    std::memcpy(&value, &bits, 4);
  }
  return out;
}

void check_received_attention() {
  const int64_t batch = draw(1, 2), kv_heads = draw(1, 2), group = draw(1, 8), heads = kv_heads * group;
  const int64_t tokens = draw(1, 140), dim = draw(1, 40);
  const bool half = draw(0, 1), given = draw(0, 1);
  const float scale = draw(-10, 10) / 1e5f;
  std::vector<float> query = floats(batch * heads * tokens * dim),
                     key = floats(batch * kv_heads * tokens * dim);
  const std::vector<uint16_t> query_halves = halves(query), key_halves = halves(key);
  std::vector<int64_t> lengths;
  std::vector<float> lse(batch * heads * tokens, NAN), received(batch * tokens);
  std::vector<double> wanted(batch * tokens);
  for (int64_t b = 0; b < batch; ++b) {
    lengths.push_back(draw(0, 3) ? draw(0, tokens) : tokens);
    const int64_t live = lengths[b];
    for (int64_t row = 0; row < heads * live; ++row) {
      const int64_t head = b * heads + row / live;
      const float *q = &query[(head * tokens + row % live) * dim], *k = &key[head / group * tokens * dim];
      std::vector<double> weights;
      double total = 0;
      for (int64_t t = 0; t < live; ++t) {
        double dot = 0;
        for (int64_t i = 0; i < dim; ++i) dot += double(q[i]) * k[t * dim + i];
        weights.push_back(std::exp(scale * dot));
        total += weights.back();
      }
      lse[head * tokens + row % live] = std::log(total);
      for (int64_t t = 0; t < live; ++t) wanted[b * tokens + t] += weights[t] / total / (heads * live);
    }
  }
  auto view = [&](const std::vector<float>& x, const std::vector<uint16_t>& words, int64_t count) {
    return Heads{half ? (const void*)words.data() : x.data(), count * tokens * dim, tokens * dim, dim};
  };
  FLOWCUT_ISA::received_attention({half ? DType::BFloat16 : DType::Float32, batch, heads, kv_heads, tokens,
                                   dim, view(query, query_halves, heads), view(key, key_halves, kv_heads),
                                   given ? lse.data() : nullptr, lengths.data(), scale, received.data()},
                                  [](int64_t n, int64_t, void (*body)(int64_t, int64_t, void*),
                                     void* context) { run_backwards(n, draw(1, 3), body, context); });
  for (size_t i = 0; i < wanted.size(); ++i)
    require(std::abs(received[i] - wanted[i]) <= 1e-4 * wanted[i], "a token received something else");
}

}  // namespace

int main() {
  constexpr int kRounds = 1000;
  for (int round = 0; round < kRounds; ++round) {
    check_score_select();
    check_compact_kv(false);
    check_compact_kv(true);
    check_compact_kv_paged();
    check_broken_batch();
    check_sweeps();
    check_patch_entropy();
    check_recycle_tokens();
    if (round % 10 == 0) check_received_attention();
  }
  for (const int64_t width : {31, 32, 48, 64, 128}) check_compact_kv(false, width);
  std::printf("%d rounds: all results as they should be\n", kRounds);
}
