// Random arguments for the host programs that drive the kernels and the page planner.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "planner.h"

namespace flowcut {

inline std::mt19937 generator(0);
inline int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// Ascending rows of 0..tokens - 1, -1 after the last.
inline std::vector<int64_t> draw_keep(int64_t tokens, int64_t kept) {
  std::vector<int64_t> keep(kept, -1);
  const int odds = draw(0, 4);
  int64_t m = 0;
  for (int64_t token = 0; token < tokens && m < kept; ++token)
    if (draw(0, 3) < odds) keep[m++] = token;
  return keep;
}

// Sequences that share leading blocks and, some of them, the rows to keep.
struct DrawnBatch {
  int64_t sequences = draw(1, 5), width = draw(1, 6), block_size;
  int64_t kept = width * block_size, blocks = 2 * sequences * width + 2;
  std::vector<int32_t> tables, counts, free;
  std::vector<int64_t> lengths, keep;

  explicit DrawnBatch(int64_t block_size)
      : block_size(block_size), tables(sequences * width, 0), counts(blocks, 0) {
    free.resize(blocks);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), generator);
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t parent = b > 0 && draw(0, 3) > 0 ? draw(0, b - 1) : -1;
      lengths.push_back(draw(0, kept));
      const int64_t used = (lengths[b] + block_size - 1) / block_size;
      const int64_t inherited = parent < 0 ? 0 : (lengths[parent] + block_size - 1) / block_size;
      const int64_t shared = std::min<int64_t>({draw(0, width), inherited, used});
      for (int64_t i = 0; i < used; ++i) {
        int32_t& block = tables[b * width + i];
        if (i < shared) {
          block = tables[parent * width + i];
        } else {
          block = free.back();
          free.pop_back();
        }
        ++counts[block];
      }
      std::vector<int64_t> rows = draw_keep(lengths[b], kept);
      if (parent >= 0 && draw(0, 1)) {
        rows.assign(keep.begin() + parent * kept, keep.begin() + (parent + 1) * kept);
        for (int64_t& row : rows)
          if (row >= lengths[b]) row = -1;
      }
      keep.insert(keep.end(), rows.begin(), rows.end());
    }
    for (int32_t& count : counts)  // sequences that are not in this batch
      if (count > 0 && draw(0, 7) == 0) ++count;
  }

  PagedBatch batch() const {
    return {sequences,     width,          kept,        blocks,        int64_t(free.size()), block_size,
            tables.data(), lengths.data(), keep.data(), counts.data(), free.data()};
  }
};

}  // namespace flowcut
