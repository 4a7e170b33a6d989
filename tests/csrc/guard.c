// SPDX-License-Identifier: MIT
// A library for LD_PRELOAD that guards the memory of torch's CPU tensors (posix_memalign) and of C++ arrays (new[]).
//
//   one half of the blocks   [ no access ][ known bytes … | the block ][ no access ]     they end where a page ends
//   the other half           [ no access ][ the block | known bytes … ][ no access ]     they begin where a page begins
//
// A new block is filled with ones, which are NaN in every floating type: what nobody has written shows in the results.
// An access beyond one end of a block stops the program. A write beyond its other end shows when the block is freed:
// `free` checks the known bytes. It also takes all access away, so a later use of the block stops the program too. A
// block that ends at a page has no alignment but that of its size.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096, KNOWN = 0xA5 };
static const size_t SPACE = (size_t)1 << 40;  // addresses, not memory; freed ones are not used again

struct Header {  // alone on the page before the first page without access
  size_t size, pages;
  char* block;
};

static _Atomic size_t used;
static char* _Atomic space;

static char* begin_of_space(void) {
  char* begin = space;
  if (begin == NULL) {
    begin = mmap(NULL, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* expected = NULL;
    if (!atomic_compare_exchange_strong(&space, &expected, begin)) {
      munmap(begin, SPACE);
      begin = expected;
    }
  }
  return begin;
}

int posix_memalign(void** to, size_t alignment, size_t size) {
  (void)alignment;
  static _Atomic unsigned number;
  const size_t pages = (size + PAGE - 1) / PAGE + (size == 0), whole = (pages + 3) * PAGE;
  if (size > SPACE / 4) {
    return ENOMEM;
  }
  char* begin = begin_of_space() + atomic_fetch_add(&used, whole);
  if (begin + whole > space + SPACE) {
    return ENOMEM;
  }
  struct Header* header = (struct Header*)begin;
  char* first = begin + 2 * PAGE;
  if (mprotect(begin, PAGE, PROT_READ | PROT_WRITE) != 0 ||
      mprotect(first, pages * PAGE, PROT_READ | PROT_WRITE) != 0) {
    return ENOMEM;
  }
  char* block = (number++ * 0x9e3779b9u) >> 31 ? first + pages * PAGE - size : first;
  *header = (struct Header){size, pages, block};
  if (size < (size_t)1 << 26) {  // nobody fills a larger block, so it takes no memory
    memset(block, 0xFF, size);
  }
  memset(first, KNOWN, block - first);
  memset(block + size, KNOWN, first + pages * PAGE - block - size);
  *to = block;
  return 0;
}

void free(void* block) {
  static void (*_Atomic next)(void*);
  char* at = block;
  if (space == NULL || at < space || at >= space + SPACE) {
    if (next == NULL) {
      next = (void (*)(void*))dlsym(RTLD_NEXT, "free");
    }
    next(block);
    return;
  }
  char* first = (char*)((uintptr_t)at / PAGE * PAGE);
  struct Header* header = (struct Header*)(first - 2 * PAGE);
  const size_t bytes = header->pages * PAGE;
  for (char* c = first; c < first + bytes; ++c) {
    if ((c < at || c >= at + header->size) && (unsigned char)*c != KNOWN) {
      fprintf(stderr, "guard: byte %td of a block of %zu bytes was overwritten\n", c - at, header->size);
      abort();
    }
  }
  madvise(header, bytes + 2 * PAGE, MADV_DONTNEED);
  mprotect(header, bytes + 2 * PAGE, PROT_NONE);
}

// new[], delete[] and the sized delete[], by the names that the compiler gives them
void* _Znam(size_t size) {
  void* block = NULL;
  return posix_memalign(&block, 1, size) == 0 ? block : NULL;
}

void _ZdaPv(void* block) {
  free(block);
}

void _ZdaPvm(void* block, size_t size) {
  (void)size;
  free(block);
}
