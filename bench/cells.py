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
    frozen(provider)                the name of the provider that does the same without the table's gradient, or None
    replayed(direction, provider)   the function that a CUDA graph captures, or None

It makes its tensors when they are first asked for: what does not fit is then a finding about a cell. A cell's record
has `wrong` where its result is wrong or it raised, which fails the run, and `unmeasured` where there are no times for
another reason. A wrong result is timed all the same: the time may be what explains it.
"""

import sys
import time
from contextlib import suppress

import click
import torch
from tqdm import tqdm

from .lines import Lines
from .memory import free, peak_mib
from .reasons import NO_KERNEL, NO_MEMORY, NO_TIME, first_line, reason_of, refusals
from .report import plot_times, times_table, write_json
from .timing import measure, warm_clocks

LONGEST_GRAPH = 10.0  # ms; the host is far ahead of a longer call, and a graph of it would only hold its memory


class _Run:
    """The records of a run, where they are written, and the time that is left."""

    def __init__(self, result, common):
        self.result, self.common, self.device = result, common, common.device
        self.absent = result["absent"]
        self.lines = Lines(common.lines)
        self.lines.write(
            "start", **{name: value for name, value in result.items() if name not in ("absent", "records")}
        )
        for name, reason in list(self.absent.items()):
            self.is_absent(name, reason)

    def is_absent(self, name, reason):
        self.absent[name] = reason
        self.lines.write("absent", name=name, reason=reason)

    def is_over(self):
        return self.common.deadline is not None and time.monotonic() >= self.common.deadline

    def measure(self, calls, kind):
        """({name: Time}, {name: reason}) of the calls that could be timed and of the others."""
        failed = {}
        times = measure(calls, kind, self.common.rounds, self.common.seconds, failed, self.common.deadline)
        return times, {name: reason_of(error) for name, error in failed.items()}


def _add_times(cells, direction, records, times, frozen, prefix):
    """Write the times, and what follows from them, into the records of one shape and direction."""
    limits = [name for name in _limit_names(records) if name in times]
    for record in records:
        name = record["provider"].removeprefix("limit: ")
        if name not in times:
            continue
        this = times[name]
        record[prefix + "ms"] = this.median
        record[prefix + "ms_p20"], record[prefix + "ms_p80"] = this.spread
        record |= {prefix + unit: value for unit, value in cells.rate(direction, this.median).items()}
        if limits:
            record[prefix + "of_limit"] = {limit: this.ratio(times[limit]) for limit in limits}
        if "eager" in times:
            record[prefix + "x_eager"] = this.ratio(times["eager"])
        if frozen.get(name) in times:
            record[prefix + "over_frozen"] = times[frozen[name]].ratio(this)


def _limit_names(records):
    return [r["provider"].removeprefix("limit: ") for r in records if r["provider"].startswith("limit: ")]


def _checked(cells, direction, provider, run):
    """(record or None, call or None) of one cell; a peer that says that it cannot do this is noted as absent."""
    record = {**vars(cells.shape), "direction": direction, "provider": provider.name, "wrong": None}
    record |= cells.facts(direction, provider)
    if run.is_over():
        return record | {"unmeasured": NO_TIME}, None
    try:
        with refusals():
            record["wrong"] = cells.wrong(direction, provider)
        call = cells.call(direction, provider)
        record["peak_mib"] = peak_mib(call, run.device)
        return record, call
    except torch.OutOfMemoryError:
        record["unmeasured"] = NO_MEMORY
    except NotImplementedError as error:
        if NO_KERNEL not in str(error):
            run.is_absent(f"{provider.name}, {direction}", reason_of(error))
            return None, None
        record["unmeasured"] = reason_of(error)  # of this shape
    except Exception as error:  # one provider's failure is a finding, not the end of the others
        record["wrong"] = first_line(error)
    free(run.device)
    return record, None


def _limits(cells, direction, run):
    """({name: call}, records) of the limits that this machine can show; why not is noted as absent."""
    calls, records = {}, []
    if run.is_over():
        return calls, records
    try:
        wanted = cells.limits(direction)
    except Exception:  # of the inputs, which every provider has met before
        wanted = {}
    for name, call in wanted.items():
        record = {**vars(cells.shape), "direction": direction, "wrong": None} | cells.facts(direction, None)
        record["provider"] = f"limit: {name}"
        try:
            with refusals():
                call()
            calls[name] = call
        except torch.OutOfMemoryError:
            record["unmeasured"] = NO_MEMORY
        except Exception as error:
            run.is_absent(f"limit: {name}, {direction}", reason_of(error))
            continue
        records.append(record)
    free(run.device)
    return calls, records


def _time_graphs(cells, direction, mine, calls, frozen, run):
    """Replays of CUDA graphs of the calls that are short enough.

    Ours are captured first: a capture that fails may leave the allocator in a state that the next one suffers from.
    """
    short = {record["provider"].removeprefix("limit: ") for record in mine if record.get("ms", 1e9) < LONGEST_GRAPH}
    captured = {name: call for name, call in calls.items() if call and name in short}
    if not captured or run.is_over():
        return
    times, failed = run.measure(captured, "graph")
    _add_times(cells, direction, mine, times, frozen, "graph_")
    for record in mine:
        name = record["provider"].removeprefix("limit: ")
        if name in failed and failed[name] != NO_TIME:  # a call that cannot be captured is a finding, not the end
            record["graph_error"] = failed[name]


def _measure_direction(cells, direction, found, run, progress):
    """The records of one shape and direction."""
    calls, mine = {}, []
    for provider in found:
        progress.update()
        if not cells.serves(direction, provider) or f"{provider.name}, {direction}" in run.absent:
            continue
        progress.set_postfix_str(f"{cells.shape.dtype} {cells.shape.n} {direction} {provider.name}")
        record, call = _checked(cells, direction, provider, run)
        if record:
            mine.append(record)
            run.lines.write("checked", **record)
        if call:
            calls[provider.name] = call
    limits, limit_records = _limits(cells, direction, run)
    mine += limit_records
    frozen = {provider.name: cells.frozen(provider) for provider in found}
    if run.device == "cuda" and calls:
        with suppress(RuntimeError):  # the calls themselves will say what is wrong with the device
            warm_clocks()
    times, failed = run.measure(limits | calls, run.device)
    _add_times(cells, direction, mine, times, frozen, "")
    for record in mine:
        name = record["provider"].removeprefix("limit: ")
        if name in failed:
            is_crash = failed[name] not in (NO_MEMORY, NO_TIME) and name in calls
            record["wrong" if is_crash and not record["wrong"] else "unmeasured"] = failed[name]
        run.lines.write("timed", **record)
    if run.device == "cuda":
        ours, peers = (
            [p for p in found if p.name in calls and bool(p.backend) is is_ours] for is_ours in (True, False)
        )
        ours, peers = ({p.name: cells.replayed(direction, p) for p in some} for some in (ours, peers))
        _time_graphs(cells, direction, mine, ours | limits | peers, frozen, run)
        for record in mine:
            if "graph_ms" in record or "graph_error" in record:
                run.lines.write("timed", **record)
    return mine


def run(make, shapes, found, result, common):
    """Measure `make(shape)` for every shape, report; exits with 1 if a result was wrong."""
    records = result["records"] = []
    this = _Run(result, common)
    total = sum(len(make.DIRECTIONS) for _ in shapes) * len(found)
    with tqdm(total=total, unit="cell", disable=None, leave=False) as progress:
        for shape in shapes:
            cells = make(shape, common.device)
            for direction in make.DIRECTIONS:
                records += _measure_direction(cells, direction, found, this, progress)
                if common.path:
                    write_json(common.path, result)  # a run that is cut off leaves what it has done
            del cells
            free(common.device)
    this.lines.write("end", seconds=round(time.monotonic() - common.begin, 1))
    click.echo(times_table(result))
    if common.picture:
        plot_times(result).savefig(common.picture)
        click.echo(f"wrote {common.picture}")
    if any(record["wrong"] for record in records):
        sys.exit(1)
