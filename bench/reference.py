# SPDX-License-Identifier: MIT
"""The tables of docs/bench.md: options of each command, what a cell stands for, what a GPU runs, what is compiled."""

import importlib
import re

import click
from tabulate import tabulate

from .__main__ import MODULES, cli
from .attention.command import attention
from .attention.shapes import CELLS
from .codegen import attention as launches
from .codegen.matrix import OPS, attention_cases
from .gpu.command import SECONDS
from .gpu.phases import phases, shares

BY_TORCHRUN = ("context_parallel", "overlap")  # modules whose command is `main`


def _table(rows, *head):
    return tabulate(rows, head, "github", disable_numparse=True)


def _code(words):
    return ", ".join(f"`{word}`" for word in words)


def _takes(option):
    """What follows an option on the command line, from click's description of it."""
    kind = option["type"]
    if option["is_flag"]:
        return ""
    if "choices" in kind:
        return _code(kind["choices"])
    if "file_okay" in kind:
        return "a file" if kind["file_okay"] else "a folder"
    words = {"integer": "an integer", "float": "a number"}.get(kind["name"].removesuffix(" range"), "text")
    low, high = kind.get("min"), kind.get("max")
    words += f" {'>' if kind['min_open'] else '>='} {low}" if low is not None else ""
    return words + (f", {'<' if kind['max_open'] else '<='} {high}" if high is not None else "")


def _default(option, found):
    """The default as `--help` shows it."""
    if isinstance(option.show_default, str):
        return option.show_default
    if not option.show_default or found is None:
        return ""
    return ", ".join(map(str, found)) if isinstance(found, (tuple, list)) else str(found)


def _row(option):
    described = option.to_info_dict()
    names = _code(option.opts + option.secondary_opts)
    takes = _code([option.metavar]) if option.metavar else _takes(described)
    more = ", repeatable" if option.multiple else ""
    return names, takes + more, _default(option, described["default"]), option.help or ""


def options():
    """Of each command its help and a table of its options, in the order of `--help`."""
    commands = {f"bench {name}": cli.get_command(None, name) for name in MODULES}
    for name in BY_TORCHRUN:
        commands[f"bench.{name}"] = importlib.import_module(f".{name}", __package__).main
    parts = []
    for name, command in commands.items():
        arguments = [param.name.upper() for param in command.params if isinstance(param, click.Argument)]
        rows = [_row(param) for param in command.params if isinstance(param, click.Option) and not param.hidden]
        parts.append(f"### {' '.join([name, *arguments])}")
        parts += [" ".join(part.split()) for part in re.split(r"\n\s*\n", command.help.strip())]
        parts += [_table(rows, "option", "takes", "default", "meaning")] if rows else []
    return "\n\n".join(parts)


def cells():
    """The options that each `--cell` of `bench attention` stands for."""
    names = {param.name: param.opts[0] for param in attention.params}
    rows = []
    for cell, found in CELLS.items():
        values = {names[name]: value if isinstance(value, tuple) else (value,) for name, value in found.items()}
        rows.append((f"`{cell}`", "; ".join(f"`{name}` {', '.join(map(str, each))}" for name, each in values.items())))
    return _table(rows, "cell", "stands for")


def on_gpu():
    """The phases of `bench gpu`, their shares of its time, and the commands of `python -m bench` in them."""
    found = phases("cuda")
    seconds = shares([phase.weight for phase in found], SECONDS)
    rows = [(phase.name, f"{each:.0f}", phase.about) for phase, each in zip(found, seconds, strict=True)]
    lines = [
        " ".join(f"'{word}'" if " " in word else word for word in command.arguments[1:])
        for phase in found
        for command in phase.commands
        if command.arguments[1] == "bench"
    ]
    return "\n\n".join([_table(rows, "phase", "seconds", "what"), "```text\n" + "\n".join(lines) + "\n```"])


def compiled():
    """What `bench codegen` compiles: layouts of each kernel, option sets of attention."""
    rows = []
    for op, entry in OPS.items():
        for name, layout in entry.layouts.items():
            demand = ", ".join(entry.streams.values()) if layout.is_wide else ""
            rows.append((op, name, _words(layout.options), demand, "every" if layout.is_common else "the first"))
    sets, every_case = [], attention_cases("attention", ("sm_90", "sm_80"))
    for name, found in launches.OPTIONS.items():
        cases = [case for case in every_case if case.layout.split(" ", 1)[1] == name]
        for dtype in dict.fromkeys(case.dtype for case in cases):
            some = [case for case in cases if case.dtype == dtype]
            widths = [_widths(case for case in some if case.arch == arch) for arch in ("sm_90", "sm_80")]
            sets.append((name, dtype, _words(found), *widths))
        if not cases:
            sets.append((name, "", _words(found), "if --options names it", ""))
    return "\n\n".join(
        [
            _table(rows, "kernel", "layout", "sizes", "only 16-byte accesses of", "dtypes"),
            _table(sets, "option set of attention", "dtype", "options", "head_dims on sm_90", "and on the others"),
        ]
    )


def _words(options):
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _widths(cases):
    """head_dim, or head_dim and value_dim, of each case."""
    return ", ".join(case.layout.split()[0].removeprefix("d").replace("v", " with values of ") for case in cases)


PARTS = {"options": options, "cells": cells, "gpu": on_gpu, "compiled": compiled}
