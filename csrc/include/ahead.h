// Rows that are read in an order only the program knows.
#pragma once

#include <cstdint>

namespace flowcut::FLOWCUT_ISA {

constexpr int64_t kRowsAhead = 16;   // whole rows
constexpr int64_t kPagesAhead = 32;  // one line: finding where a page lies takes longer than fetching the row

// Before row m of `count` is read: asks for a later one, row_at(ahead) being the address of row m + ahead. Always
// inlined: GCC takes a function that does nothing but prefetch for one without effects, and drops its calls.
template <class F>
__attribute__((always_inline)) inline void ask_ahead(int64_t m, int64_t count, int64_t bytes, const F& row_at) {
  if (m + kPagesAhead < count) __builtin_prefetch(row_at(kPagesAhead));
  if (m + kRowsAhead >= count) return;
  const char* row = row_at(kRowsAhead);
#pragma GCC unroll 8
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 0);
}

}  // namespace flowcut::FLOWCUT_ISA
