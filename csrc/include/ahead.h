// Rows that are read in an order only the program knows.
#pragma once

#include <cstdint>

namespace flowcut::FLOWCUT_ISA {

constexpr int64_t kRowsAhead = 16;   // whole rows
constexpr int64_t kPagesAhead = 32;  // one line: finding where a page lies takes longer than fetching the row

template <int64_t kBytes>
struct Fixed {
  constexpr operator int64_t() const { return kBytes; }
};

// f(bytes), known to the compiler for the usual widths of a head: 64 and 128 numbers of two bytes or of four.
template <class F>
inline void with_width(int64_t bytes, const F& f) {
  if (bytes == 128) return f(Fixed<128>());
  if (bytes == 256) return f(Fixed<256>());
  if (bytes == 512) return f(Fixed<512>());
  f(bytes);
}

// Asks for a row, once it is read. Always inlined: GCC takes a function that does nothing but prefetch for one
// without effects, and drops its calls.
__attribute__((always_inline)) inline void ask(const char* row, int64_t bytes) {
#pragma GCC unroll 8
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 0);
}

// Before row m of `count` is read: asks for a later one, row_at(ahead) being the address of row m + ahead.
template <class F>
__attribute__((always_inline)) inline void ask_ahead(int64_t m, int64_t count, int64_t bytes, const F& row_at) {
  if (m + kPagesAhead < count) __builtin_prefetch(row_at(kPagesAhead));
  if (m + kRowsAhead < count) ask(row_at(kRowsAhead), bytes);
}

}  // namespace flowcut::FLOWCUT_ISA
