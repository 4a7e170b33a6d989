# SPDX-License-Identifier: MIT
"""The loop of the benches of calls: every cell is checked, then its memory taken, then all are timed in turn.

A bench brings the cells of one shape, an object with

    shape                           a dataclass, whose fields go into every record
    DIRECTIONS                      what is measured, by name
    serves(direction, provider)     whether the provider takes part
    call(direction, provider)       the function that is timed
    wrong(direction, provider)      None if its result is right, else what is wrong
    facts(direction, provider)      more fields of its record; of a limit's, whose provider is None
    limits(direction)               {name: call} of what the machine needs at least
    rate(direction, milliseconds)   what follows from the time: GB/s, TFLOP/s
    replayed(direction, provider)   the function that a CUDA graph captures, or None
"""

import gc
import sys

import click
import torch
from tqdm import tqdm

from .memory import peak_mib
from .report import plot_times, times_table, write_json
from .timing import measure


def first_line(error):
    """What an exception says, in one line that fits a table."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _add_times(cells, direction, records, times, limits, prefix):
    """Write the times, and what follows from them, into the records of one shape and direction."""
    for record in records:
        name = record["provider"].removeprefix("limit: ")
        if name not in times:
            continue
        time = times[name]
        record[prefix + "ms"] = time.median
        record[prefix + "ms_p20"], record[prefix + "ms_p80"] = time.spread
        record |= {prefix + unit: value for unit, value in cells.rate(direction, time.median).items()}
        if limits:
            record[prefix + "of_limit"] = {limit: time.ratio(times[limit]) for limit in limits}
        if "eager" in times:
            record[prefix + "x_eager"] = time.ratio(times["eager"])


def _checked(cells, direction, provider, device, absent):
    """(record or None, call or None) of one cell; a peer that says that it cannot do this is noted as absent."""
    record = {**vars(cells.shape), "direction": direction, "provider": provider.name, "wrong": None}
    record |= cells.facts(direction, provider)
    try:
        record["wrong"] = cells.wrong(direction, provider)
        if record["wrong"] is None:
            call = cells.call(direction, provider)
            record["peak_mib"] = peak_mib(call, device)
            return record, call
    except torch.OutOfMemoryError:
        record["wrong"] = "out of memory"
    except NotImplementedError as error:
        absent[f"{provider.name}, {direction}"] = first_line(error).removeprefix("NotImplementedError: ")
        return None, None
    except Exception as error:  # one provider's failure is a finding, not the end of the others
        record["wrong"] = first_line(error)
    return record, None


def _measure_shape(cells, found, absent, options, progress):
    """The records of one shape."""
    device, shape = options["device"], cells.shape
    records = []
    for direction in cells.DIRECTIONS:
        limits = cells.limits(direction)
        calls, mine = {}, []
        for provider in found:
            progress.update()
            if not cells.serves(direction, provider) or f"{provider.name}, {direction}" in absent:
                continue
            progress.set_postfix_str(f"{shape.dtype} {shape.n} {direction} {provider.name}")
            record, call = _checked(cells, direction, provider, device, absent)
            if record:
                mine.append(record)
            if call:
                calls[provider.name] = call
        common = {**vars(shape), "direction": direction, "wrong": None} | cells.facts(direction, None)
        mine += [common | {"provider": f"limit: {name}"} for name in limits]
        times = measure(limits | calls, device, options["rounds"], options["seconds"])
        _add_times(cells, direction, mine, times, limits, "")
        replayed = {}
        if device == "cuda":
            made = {p.name: cells.replayed(direction, p) for p in found if p.backend and p.name in calls}
            replayed = {name: call for name, call in made.items() if call}
        if replayed:
            try:
                times = measure(limits | replayed, "graph", options["rounds"], options["seconds"])
                _add_times(cells, direction, mine, times, limits, "graph_")
            except RuntimeError as error:  # a call that cannot be captured is a finding, not the end
                mine[0]["graph_error"] = str(error)[:300]
        records += mine
        del calls, replayed
        gc.collect()
    return records


def run(make, shapes, found, result, options, path, picture):
    """Measure `make(shape)` for every shape, report; exits with 1 if a result was wrong."""
    records = result["records"] = []
    total = sum(len(make.DIRECTIONS) for _ in shapes) * len(found)
    with tqdm(total=total, unit="cell", disable=None, leave=False) as progress:
        for shape in shapes:
            records += _measure_shape(make(shape, options["device"]), found, result["absent"], options, progress)
            if path:
                write_json(path, result)  # a run that is cut off leaves the lengths it has done
    click.echo(times_table(result))
    if picture:
        plot_times(result).savefig(picture)
        click.echo(f"wrote {picture}")
    if any(record["wrong"] not in (None, "out of memory") for record in records):
        sys.exit(1)
