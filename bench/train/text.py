# SPDX-License-Identifier: MIT
"""Real text that every machine has: the sources of Python's standard library and its licence, as bytes."""

import hashlib
import sysconfig
from pathlib import Path

import torch

SEED_STRIDE = 1_000_003  # between the seeds of two runs; more steps than anybody trains


def load_text():
    """(training, validation) as uint8 tensors; every 20th file is validation.

    Packages that pip installed and the library's own tests are left out. The files are sorted by path, so two machines
    with the same Python read the same text.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(path.parts)]
    paths += sorted(root.glob("LICENSE*"))
    files = [path.read_bytes() for path in paths]
    validation = files[19::20]
    del files[19::20]
    return tuple(torch.frombuffer(bytearray().join(part), dtype=torch.uint8) for part in (files, validation))


def fingerprint(text):
    """The first 16 digits of the text's SHA-256, to tell whether two runs read the same."""
    return hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16]


def batch_of(text, step, *, batch, seq, seed):
    """(inputs, targets), int64 (batch, seq) each: random places of the text, which depend only on seed and step.

    So a resumed run reads what it would have read, and no generator's state has to be kept.
    """
    generator = torch.Generator().manual_seed(seed * SEED_STRIDE + step)
    starts = torch.randint(len(text) - seq, (batch,), generator=generator)
    rows = text[starts[:, None] + torch.arange(seq + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def windows(text, total, seq):
    """(inputs, targets), int64 (total // seq, seq) each: the first `total` bytes cut into windows of `seq`."""
    rows = total // seq
    return text[: rows * seq].view(rows, seq).long(), text[1 : rows * seq + 1].view(rows, seq).long()
