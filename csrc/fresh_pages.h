// SPDX-License-Identifier: MIT
// Ask the kernel for all pages of a fresh range at once, instead of taking a page fault for each.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace dpb_triton {

// A large tensor's memory comes fresh from mmap each time, and page faults take half of the time to write it. One
// system call for 128 pages saves a third of an expand's time. Huge pages save more while they last. But if the machine
// gets its own memory on first touch, they cost five times as much, in the first call and again after every pause
// (measured on a Firecracker guest). So huge pages are left to torch's THP_MEM_ALLOC_ENABLE. For memory that is already
// resident, the walk through its page table would be wasted, so the function first checks one page in the middle.
inline void populate_if_fresh([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_NORMAL)
  constexpr int POPULATE_WRITE = 23;  // MADV_POPULATE_WRITE, Linux 5.14; an older kernel rejects it, which is harmless
  static const int64_t page = sysconf(_SC_PAGESIZE);
  if (bytes < 16 * page) {
    return;
  }
  const uintptr_t mask = ~static_cast<uintptr_t>(page - 1);
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + page - 1) & mask;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + bytes) & mask;  // only whole pages of this range
  unsigned char is_resident = 1;
  if (mincore(reinterpret_cast<void*>((begin + (end - begin) / 2) & mask), page, &is_resident) == 0 &&
      (is_resident & 1) == 0) {
    madvise(reinterpret_cast<void*>(begin), end - begin, POPULATE_WRITE);
  }
#endif
}

}  // namespace dpb_triton
