# SPDX-License-Identifier: MIT
"""The phases of `python -m bench gpu`: what each runs, and its share of the time.

A phase has one or more commands, each its own process. In a command line `{lines}` stands for a file for one JSON line
per cell, `{json}` for a file for `records` at the end, `{limit}` for the seconds after which the command should stop by
itself, `{out}` for the folder of --out.
"""

from dataclasses import dataclass, replace

from . import suite

NCU_KERNELS = r"regex:^_\w+_kernel$"  # this library's: names of torch's kernels have no underscore in front


@dataclass(frozen=True)
class Command:
    """The arguments of the interpreter, and the weight among the commands of its phase."""

    arguments: tuple
    weight: float = 1.0
    wants_csrc: bool = False  # waits for csrc, which is built in the background

    def line(self, **words):
        """The arguments with {lines}, {limit}, … filled in."""
        filled = []
        for argument in self.arguments:
            for name, word in words.items():
                argument = argument.replace("{" + name + "}", str(word))
            filled.append(argument)
        return filled


@dataclass(frozen=True)
class Phase:
    """Name for --phase, weight, commands. The weight is about the seconds it takes; each command needs ten to start."""

    name: str
    weight: float
    about: str
    commands: tuple


def shares(weights, seconds):
    """Divide `seconds` in proportion to `weights`."""
    total = sum(weights)
    return [seconds * weight / total for weight in weights]


def _words(option, values):
    return tuple(word for value in values for word in (option, str(value)))


def _smoke(device, *options):
    return Command(("-m", "bench.gpu.smoke", "--device", device, *options, "--lines", "{lines}"))


def phases(device, tiny=False):
    """All phases, in order; `tiny`: with the lengths of a rehearsal on a CPU."""

    def bench(name, weight, *options, lengths=(), peers=(), heads=True, wants_csrc=False):
        """A command of `python -m bench`, which stops by itself and writes its records as they come."""
        small = ("--smoke", "--backend", "torch", *(("--heads", "2") if heads else ())) if tiny else ()
        lengths = (33,) if tiny and lengths else lengths
        words = ("-m", "bench", name, "--device", device, *_words("--seq", lengths), *_words("--peer", peers), *options)
        return Command((*words, *small, "--limit", "{limit}", "--lines", "{lines}"), weight, wants_csrc)

    bf16, fp32 = ("--dtype", "bf16"), ("--dtype", "fp32")
    materialised = ("eager", "sdpa with bias")
    flex = ("flex fixed table", "flex trained table")
    # the launches are recorded on a CPU, whose defaults are other ones
    decoder = ("--heads", "32", "--head-dim", "128", *_words("--group", (1, 8)))
    rows = ("sdpa with row", "sdpa with row folded")
    tiles = ("16,64,4,2", "16,64,4,4", "16,128,4,2", "16,32,4,5", "16,64,2,3", "16,64,4,3,1024", "16,64,4,3,4096")
    return [
        Phase("smoke", 40, "every kernel once, checked against float64", (
            _smoke(device, *(("--tiny",) if tiny else ())),
            replace(_smoke(device, "--only", "csrc"), weight=0.3, wants_csrc=True),
        )),
        Phase("tests", 130, "the suite's tests that need a GPU", (
            Command(suite.arguments(device, tiny), wants_csrc=True),
        )),
        Phase("sweep", 60, "launch constants, timed", (
            Command(("-m", "bench", "sweep", "--device", device, "--limit", "{limit}", "--lines", "{lines}")),
        )),
        Phase("attention", 150, "bf16, causal, 2k to 16k, against peers and limits; head_dim 128 too", (
            bench("attention", 3, *bf16, lengths=(8192,), peers=materialised),
            bench("attention", 4, *bf16, lengths=(16384, 2048, 4096), peers=("none",)),
            bench("attention", 2, *bf16, "--head-dim", "128", lengths=(8192,), peers=("none",)),
        )),
        Phase("expand", 45, "the bias alone at 1k to 16k, against fill and sum", (
            bench("expand", 1, *bf16, lengths=(8192,), peers=("eager",), wants_csrc=True),
            bench("expand", 2, *bf16, lengths=(8191, 16384, 1024), peers=("none",), wants_csrc=True),
        )),
        Phase("profile", 60, "ncu's counters of each kernel at 8k", (
            Command(("-m", "bench.gpu.counters", "{out}", NCU_KERNELS, device, "{lines}")),
        )),
        Phase("flex", 50, "FlexAttention at 8k, which takes long to compile", (
            bench("attention", 1, *bf16, lengths=(8192,), peers=flex),
        )),
        Phase("window", 55, "a window with a published time, padding, all pairs", (
            bench("attention", 2, *bf16, "--cell", "window", peers=("none",)),
            bench("attention", 2, *bf16, "--mask", "padded", "--mask", "full", lengths=(8192,), peers=("none",)),
        )),
        Phase("decode", 40, "one query of 1 and 16 sequences against 4k to 64k keys, with and without grouped heads", (
            bench("decode", 1, *bf16, *decoder, *_words("--batch", (1, 16)), lengths=(16384, 65536, 4096), peers=rows,
                  heads=False),
            bench("decode", 0.5, *bf16, *decoder, "--batch", "16", *_words("--tile", () if tiny else tiles),
                  lengths=(16384,), peers=("none",), heads=False),
        )),
        Phase("float32", 50, "float32's errors and times", (
            bench("attention", 1, *fp32, lengths=(4096,), peers=materialised),
            bench("attention", 1, *fp32, "--errors", lengths=(512, 2048, 4096), peers=materialised),
        )),
        Phase("memory", 20, "the longest sequence that trains at 16 heads", (
            bench("attention", 1, *bf16, "--memory", "256" if tiny else "76000", peers=("none",)),
        )),
        Phase("host", 15, "the host's time per call", (
            Command(("-m", "bench", "host", "--device", device, "--json", "{json}")),
        )),
    ]  # fmt: skip
