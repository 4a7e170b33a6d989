// SPDX-License-Identifier: MIT
// What an attention_<isa>.cpp of x86 includes before it names its instruction set: after that, these functions would be
// compiled for it, too.
#pragma once

#include <algorithm>

#include "attention.h"
#include "convert.h"

#ifdef DPB_X86
// GCC 12 warns of variables that its own intrinsics leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
