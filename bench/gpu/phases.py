# SPDX-License-Identifier: MIT
"""The phases of `python -m bench gpu`: what each runs, and which part of the time it may take.

A phase is one or more commands, each a process of its own. Of a command line, `{lines}` becomes the file for one JSON
line a cell and `{limit}` the seconds after which it should end by itself.
"""

from dataclasses import dataclass

from . import suite

NCU_KERNELS = r"regex:^_\w+_kernel$"  # this library's: torch's own kernels have no leading underscore


@dataclass(frozen=True)
class Command:
    """What follows the interpreter, or `program`; its weight among the commands of its phase."""

    arguments: tuple
    weight: float = 1.0
    wants_csrc: bool = False  # waits for the compiled half, which is built in the background
    program: str | None = None  # None: this interpreter

    def line(self, **words):
        """The arguments with {lines} and {limit} filled in."""
        filled = []
        for argument in self.arguments:
            for name, word in words.items():
                argument = argument.replace("{" + name + "}", str(word))
            filled.append(argument)
        return filled


@dataclass(frozen=True)
class Phase:
    """A name for --phase, a weight (the seconds of a schedule of ten minutes), and the commands."""

    name: str
    weight: float
    about: str
    commands: tuple


def shares(weights, seconds):
    """Cut `seconds` in the proportion of `weights`."""
    total = sum(weights)
    return [seconds * weight / total for weight in weights]


def _words(option, values):
    return tuple(word for value in values for word in (option, str(value)))


def _bench(name, *options):
    return ("-m", "bench", name, *options, "--lines", "{lines}")


def _smoke(device, *options):
    return ("-m", "bench.gpu.smoke", "--device", device, *options, "--lines", "{lines}")


def phases(device, tiny=False):
    """All phases, in their order; `tiny` has the lengths of a rehearsal on a CPU."""
    timed = ("--limit", "{limit}", *(("--rounds", "1", "--seconds", "0.002") if tiny else ("--rounds", "5")))
    where = ("--device", device)
    size = ("--batch", "1", "--heads", "2") if tiny else ("--batch", "2", "--heads", "16")

    def attention(dtype, lengths, peers, *options):
        shape = ("--dtype", dtype, *_words("--seq", (33,) if tiny else lengths), *size)
        return _bench("attention", *where, *shape, *_words("--peer", peers), *timed, *options)

    def expand(dtype, lengths, peers):
        shape = ("--dtype", dtype, *_words("--seq", (33,) if tiny else lengths))
        return _bench("expand", *where, *shape, *_words("--peer", peers), *timed)

    flex = ("flex fixed table", "flex trained table")
    d64, d128 = ("--head-dim", "64"), ("--head-dim", "128")
    found = [
        Phase("smoke", 20, "is it right at all: every kernel once, against float64", (
            Command(_smoke(device, *(("--tiny",) if tiny else ()))),
            Command(_smoke(device, "--only", "csrc"), 0.3, wants_csrc=True),
        )),
        Phase("tests", 120, "the suite's tests that need a GPU", (
            Command(suite.arguments(device, workers=1 if tiny else None, tiny=tiny), wants_csrc=True),
        )),
        Phase("sweep", 90, "launch constants by their times", (
            Command(_bench("sweep", *where, "--limit", "{limit}")),
        )),
        Phase("attention", 100, "attention at 2k to 16k, bf16, causal, against its peers and limits", (
            Command(attention("bf16", (8192, 2048, 16384, 4096), ("eager", "sdpa with bias"), *d64), 2),
            Command(attention("bf16", (8192, 2048), ("none",), *d128), 1),
        )),
        Phase("expand", 50, "the bias alone at 1k to 16k, against fill and sum", (
            Command(expand("bf16", (8192, 8191, 1024), ("eager",)), 1, wants_csrc=True),
            Command(expand("bf16", (16384,), ("none",)), 1, wants_csrc=True),
        )),
        Phase("profile", 60, "ncu's counters of each kernel at 8k", (
            Command(("-m", "bench.gpu.profile", "{out}", NCU_KERNELS, device)),
        )),
        Phase("flex", 90, "FlexAttention, which compiles for long, at 8k", (
            Command(attention("bf16", (8192,), flex, *d64)),
        )),
        Phase("window", 50, "a window cell with a published time, a cell of decoding, a padded one, all pairs", (
            Command(_bench("attention", *where, *timed, "--cell", "window"), 2),
            Command(_bench("attention", *where, *timed, "--cell", "decode"), 1),
            Command(attention("bf16", (8192,), ("none",), *d64, "--mask", "padded"), 1),
            Command(attention("bf16", (8192,), ("none",), *d64, "--mask", "full"), 1),
        )),
        Phase("float32", 30, "float32's errors and times", (
            Command(attention("fp32", (512, 2048, 4096), ("eager", "sdpa with bias"), *d64, "--errors")),
        )),
        Phase("memory", 40, "the longest sequence that trains at 16 heads", (
            Command(_bench("attention", *where, "--memory", "81920", "--heads", "16", "--dtype", "bf16")),
        )),
        Phase("host", 20, "the host's time for a call", (
            Command(_bench("host", *where)),
        )),
    ]  # fmt: skip
    return found

