# SPDX-License-Identifier: MIT
"""A data set whose items come from modules. A spawned worker imports this file."""

import torch
from torch.utils.data import Dataset

from dpb_triton import MultiheadAttention


class ModuleRows(Dataset):
    """Each item builds a module, calls it, and calls one that the parent built and used."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 4

    def __getitem__(self, n):
        torch.manual_seed(n)
        with torch.no_grad():
            x = torch.randn(1, 6, 8)
            own, _ = MultiheadAttention(8, 2, batch_first=True).eval()(x, x, x, need_weights=False)
            return own, self.module(n + 1, 6)
