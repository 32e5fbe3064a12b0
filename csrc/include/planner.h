// The page planner: which rows of a block-table cache move where, and which blocks become free. No torch and
// no Python, so that any host program can drive it. Its definition is
// flowcut_kernels/ops/compact_kv_paged/reference.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace flowcut {

// Contiguous arrays. Row n of a sequence lies in slot table[n / block_size] * block_size + n % block_size.
struct PagedBatch {
  int64_t sequences, width, kept, blocks, free, block_size;
  const int32_t* block_tables;  // [sequences, width]
  const int64_t* context_lens;  // [sequences]
  const int64_t* keep;          // [sequences, kept]: ascending rows, then -1
  const int32_t* ref_counts;    // [blocks]
  const int32_t* free_blocks;   // [free]
};

struct PagedPlan {
  std::vector<int64_t> moves;         // [moved, 2]: source slot, destination slot
  std::vector<int64_t> shifts;        // [moved]: new row - old row
  std::vector<int64_t> offsets;       // [sequences + 1]: sequence b moves offsets[b]..offsets[b + 1] - 1
  std::vector<int32_t> block_tables;  // [sequences, width], -1 after the last block
  std::vector<int64_t> context_lens;
  std::vector<int32_t> ref_counts, taken_blocks, freed_blocks;
};

// What the planner's memory safety and the order of its moves rest on; the Python side says it at length.
inline void check_batch(const PagedBatch& p) {
  auto check = [](bool ok, const auto&... parts) {
    if (ok) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  };
  check(0 < p.block_size && p.block_size <= INT32_MAX, "plan_paged: block_size=", p.block_size,
        " must be positive and fit 32 bits");
  std::vector<int64_t> left(p.ref_counts, p.ref_counts + p.blocks);
  for (int64_t i = 0; i < p.free; ++i) {
    const int64_t block = p.free_blocks[i];
    check(0 <= block && block < p.blocks && left[block]-- == 0, "plan_paged: free_blocks[", i, "] = ", block,
          " must be a block without references, named once");
  }
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t length = p.context_lens[b];
    check(0 <= length && length <= p.width * p.block_size, "plan_paged: context_lens[", b, "] = ", length,
          " must lie in 0..", p.width * p.block_size);
    for (int64_t i = 0; i * p.block_size < length; ++i) {
      const int64_t block = p.block_tables[b * p.width + i];
      check(0 <= block && block < p.blocks && left[block]-- > 0, "plan_paged: block_tables[", b, ", ", i,
            "] = ", block, " is no block, or has more references than ref_counts says");
    }
    for (int64_t m = 0, last = -1; m < p.kept; ++m) {
      const int64_t row = p.keep[b * p.kept + m];
      const bool padded = m > 0 && last == -1;
      check(row == -1 || (!padded && last < row && row < length), "plan_paged: keep[", b, ", ", m,
            "] = ", row, " after ", last, ": rows must ascend within 0..", length - 1, ", then -1");
      last = row;
    }
  }
}

// One launch may run all moves, sequences side by side and each in the order of its moves:
// - A block is written only if it had one reference before the plan, or none. So what one sequence writes no
//   other reads or writes. References that go within the plan do not count: the moves of the sequence that
//   drops a block still read it, so no other may write it, nor is a freed block taken.
// - Row m comes from row keep[m] >= m, and rows ascend: what a move overwrites, row m, is before every row
//   that the sequence's later moves read.
inline PagedPlan plan_paged(const PagedBatch& p) {
  check_batch(p);
  PagedPlan plan;
  plan.ref_counts.assign(p.ref_counts, p.ref_counts + p.blocks);
  plan.block_tables.assign(p.sequences * p.width, -1);
  plan.offsets.assign(1, 0);
  // The rows of a new block (source slot and shift of each) -> the block.
  std::map<std::vector<int64_t>, int32_t> copies;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int32_t* table = p.block_tables + b * p.width;
    const int64_t* keep = p.keep + b * p.kept;
    const int64_t kept = std::find(keep, keep + p.kept, -1) - keep;
    for (int64_t i = 0; i * p.block_size < p.context_lens[b]; ++i) --plan.ref_counts[table[i]];
    for (int64_t first = 0; first < kept; first += p.block_size) {
      const int64_t i = first / p.block_size, last = std::min(first + p.block_size, kept);
      int32_t block = table[i];
      // Rows ascend, so if the last one stays, all before it do.
      bool written = keep[last - 1] != last - 1;
      std::vector<int64_t> rows;
      for (int64_t m = first; written && m < last; ++m) {
        rows.push_back(int64_t{table[keep[m] / p.block_size]} * p.block_size + keep[m] % p.block_size);
        rows.push_back(m - keep[m]);
      }
      if (written && p.ref_counts[block] > 1) {
        // Copied on write. Sequences that shared rows and keep the same ones share the copy.
        const auto [copy, created] = copies.try_emplace(rows, -1);
        if (created) {
          const size_t taken = plan.taken_blocks.size();
          copy->second = taken < size_t(p.free) ? p.free_blocks[taken] : -1;
          plan.taken_blocks.push_back(copy->second);
        }
        block = copy->second, written = created;
      }
      for (int64_t m = first; written && m < last; ++m) {
        const int64_t source = rows[2 * (m - first)], target = int64_t{block} * p.block_size + m - first;
        if (source == target) continue;
        plan.moves.insert(plan.moves.end(), {source, target});
        plan.shifts.push_back(m - keep[m]);
      }
      plan.block_tables[b * p.width + i] = block;
      if (block >= 0) ++plan.ref_counts[block];
    }
    plan.context_lens.push_back(kept);
    plan.offsets.push_back(plan.shifts.size());
  }
  if (plan.taken_blocks.size() > size_t(p.free)) {
    std::ostringstream message;
    message << "plan_paged: free_blocks has " << p.free << " blocks, but " << plan.taken_blocks.size()
            << " are needed for copies of shared blocks; free some first, or compact fewer sequences";
    throw std::invalid_argument(message.str());
  }
  for (int64_t block = 0; block < p.blocks; ++block)
    if (p.ref_counts[block] > 0 && plan.ref_counts[block] == 0) plan.freed_blocks.push_back(block);
  return plan;
}

}  // namespace flowcut
