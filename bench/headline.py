# SPDX-License-Identifier: MIT
"""The one table of README.md, made from the files of measured runs and nothing else."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from .gpu.show import read
from .report_parts import three_digits

RESULTS = Path(__file__).parent / "results"
GPU = "h200/2026-11-27-third"
CPU_BIAS = "cpu-epyc-2-threads.json"
CPU_ATTENTION = "attention-cpu-2-threads.json"
OURS = ("dpb triton", "dpb cpp", "dpb torch")  # the backend that is chosen by default comes first
PEERS = {  # those that add the same bias; a table that is not trained counts forward only
    "sdpa with bias": "SDPA, bias as mask",
    "flex trained table": "FlexAttention",
    "flex fixed table": "FlexAttention",
    "compiled eager": "compiled eager",
}
LIMITS = {
    "limit: fill": "fill",
    "limit: sum": "sum",
    "limit: clone": "clone",
    "limit: no bias flash": "FlashAttention-2",
    "limit: no bias cudnn": "cuDNN",
    "limit: no bias": "SDPA",
    "no bias flash": "FlashAttention-2",
}


@functools.cache
def _records(source):
    """All records of a file, or of a folder of a GPU's run; several rows share one."""
    path = RESULTS / source
    return read(path)[1] if path.is_dir() else json.loads(path.read_text())["records"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    where: str
    what: str
    source: str  # a file or a folder of bench/results
    cell: dict  # what the records of that line have in common
    unit: str = "ms"

    def columns(self):
        """The two names, ours, eager's, the fastest peer's, the limits'."""
        found = {record["provider"]: record[self.key] for record in self.records()}
        ours = next(found[name] for name in OURS if name in found)
        peers = [(found[name], PEERS[name]) for name in PEERS if name in found]
        limits = [self.words(found[name], LIMITS[name]) for name in LIMITS if name in found]
        return [
            self.where,
            self.what,
            f"**{self.words(ours)}**",
            self.words(found["eager"]) if "eager" in found else "not measured",
            self.words(*min(peers)) if peers else "not measured",
            ", ".join(limits),
        ]

    @property
    def key(self):
        return {"ms": "ms", "MiB": "peak_mib"}[self.unit]

    def records(self):
        """Those of the cell; where one was measured twice the last one counts."""
        for record in _records(self.source):
            is_untrained = record.get("provider") == "flex fixed table" and record.get("direction") == "training"
            if self.cell.items() <= record.items() and record.get(self.key) and not is_untrained:
                yield record

    def words(self, number, name=""):
        unit = "" if self.unit == "ms" else f" {self.unit}"
        return f"{three_digits(number)}{unit}" + f" ({name})" * bool(name)


def _bias(n, direction, **cell):
    return {"n": n, "direction": direction, "heads": 8, **cell}


LONG = {"dtype": "bf16", "n": 8192, "head_dim": 64, "mask": "causal"}
WINDOW = {"dtype": "bf16", "n": 4600, "head_dim": 16, "mask": "window", "direction": "training"}
SHORT = {"dtype": "fp32", "n": 2048, "head_dim": 64, "mask": "causal"}
ROWS = (
    Row("H200", "bias, forward: 8 x 8192 x 8192", GPU, _bias(8192, "forward", dtype="bf16", phase="expand")),
    Row("H200", "bias, backward: 8 x 16384 x 16384", GPU, _bias(16384, "backward", dtype="bf16", phase="expand")),
    Row("H200", "attention, forward: 2 x 16 x 8192 x 64", GPU, LONG | {"direction": "forward"}),
    Row("H200", "attention, training: 2 x 16 x 8192 x 64", GPU, LONG | {"direction": "training"}),
    Row("H200", "window of 128, training: 600 x 8 x 4600 x 16", GPU, WINDOW),
    Row("H200", "memory of training: 1 x 16 x 262144 x 64", GPU, {"event": "memory", "n": 262144}, "MiB"),
    Row("CPU", "bias, forward: 8 x 2048 x 2048", CPU_BIAS, _bias(2048, "forward", dtype="fp32")),
    Row("CPU", "bias, backward: 8 x 2048 x 2048", CPU_BIAS, _bias(2048, "backward", dtype="fp32")),
    Row("CPU", "attention, forward: 1 x 8 x 2048 x 64", CPU_ATTENTION, SHORT | {"direction": "forward"}),
    Row("CPU", "attention, training: 1 x 8 x 2048 x 64", CPU_ATTENTION, SHORT | {"direction": "training"}),
)
HEAD = ["", "", "dpb_triton", "eager", "fastest peer with this bias", "limit"]


def markdown():
    """The table."""
    return tabulate([row.columns() for row in ROWS], HEAD, "github", disable_numparse=True)
