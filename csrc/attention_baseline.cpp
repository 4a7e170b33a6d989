// SPDX-License-Identifier: MIT
// The attention kernels for any processor.

#include <algorithm>

#include "attention.h"
#include "convert.h"

#ifdef DPB_VECTORS
#define DPB_ISA baseline
#define DPB_LANES 4
#include "attention_isa.h"
#endif
