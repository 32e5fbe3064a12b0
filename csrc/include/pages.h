// Whether memory that is about to be overwritten has been given pages yet.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace flowcut::FLOWCUT_ISA {

// A look at one page in the middle of [begin, begin + bytes). A page that the kernel has yet to give comes zeroed through
// the cache, which makes stores past the cache the slow way into it.
inline bool has_pages([[maybe_unused]] char* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = sysconf(_SC_PAGESIZE);
  unsigned char resident = 1;
  if (mincore((void*)(((uintptr_t)begin + bytes / 2) / page * page), page, &resident) == 0) return resident & 1;
#endif
  return true;
}

}  // namespace flowcut::FLOWCUT_ISA
