# SPDX-License-Identifier: MIT
"""The loop of the benches: check every cell, measure its peak memory, then time all cells in turn.

A bench brings the cells of one shape, an object with

    shape                           a dataclass; its fields go into every record
    DIRECTIONS                      the names of what is measured
    serves(direction, provider)     whether the provider takes part
    call(direction, provider)       the function to time
    wrong(direction, provider)      None if its result is right, else what is wrong
    facts(direction, provider)      more fields of its record; provider None: of a limit's record. "aim": the speed over
                                    the fastest limit that it should reach; no peer should be faster either
    limits(direction)               {name: call} of the least work that the machine could do
    rate(direction, milliseconds)   {unit: rate} from the time: GB/s, TFLOP/s
    frozen(provider)                the provider that does the same without the table's gradient, by name; or None
    replayed(direction, provider)   the function to capture in a CUDA graph, or None

It makes its tensors on first use, so a lack of memory is a finding about one cell. A cell's record has `wrong` if its
result is wrong or it raised an error, which fails the run. It has `unmeasured` if another reason left it without times.
A wrong result is timed all the same: the time may explain it.
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

# A record's field, and the peers: the field holds the speed over the fastest of them.
COMPARED = {"x_eager": ("eager",), "x_row": ("sdpa with row", "sdpa with row folded")}
COMPARED_IF_AIMED = {"x_peer": ("eager", "compiled eager", "sdpa with bias")}
LONGEST_GRAPH = 10.0  # ms; in a longer call the host is far ahead of the GPU, and a graph would only hold memory


class _Run:
    """The records of a run, the file that they go to, and the deadline."""

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
        """({name: Time} of the calls that could be timed, {name: reason} of the others)."""
        failed = {}
        times = measure(calls, kind, self.common.rounds, self.common.seconds, failed, self.common.deadline)
        return times, {name: reason_of(error) for name, error in failed.items()}


def _add_times(cells, direction, records, times, frozen, prefix):
    """Write times, rates and ratios into the records of one shape and direction."""
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
        for field, peers in (COMPARED | (COMPARED_IF_AIMED if "aim" in record else {})).items():
            if found := [times[peer] for peer in peers if peer in times]:
                record[prefix + field] = this.ratio(min(found, key=lambda time: time.median))
        if frozen.get(name) in times:
            record[prefix + "over_frozen"] = times[frozen[name]].ratio(this)


def _limit_names(records):
    return [r["provider"].removeprefix("limit: ") for r in records if r["provider"].startswith("limit: ")]


def _checked(cells, direction, provider, run):
    """(record or None, call or None) of one cell. A peer that cannot do it raises NotImplementedError and is absent."""
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
        record["unmeasured"] = reason_of(error)  # this shape only
    except Exception as error:  # a failure is a finding; the other providers go on
        record["wrong"] = first_line(error)
    free(run.device)
    return record, None


def _limits(cells, direction, run):
    """({name: call}, records) of the limits that run here; the others are absent."""
    calls, records = {}, []
    if run.is_over():
        return calls, records
    try:
        wanted = cells.limits(direction)
    except Exception:  # making the inputs failed; the providers have met the same error
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
    """Time replays of CUDA graphs of the short calls.

    Our calls come first in `calls`: a capture that fails may leave the allocator in a bad state for the next one.
    """
    short = {record["provider"].removeprefix("limit: ") for record in mine if record.get("ms", 1e9) < LONGEST_GRAPH}
    captured = {name: call for name, call in calls.items() if call and name in short}
    if not captured or run.is_over():
        return
    times, failed = run.measure(captured, "graph")
    _add_times(cells, direction, mine, times, frozen, "graph_")
    for record in mine:
        name = record["provider"].removeprefix("limit: ")
        if name in failed and failed[name] != NO_TIME:  # a failed capture is a finding; the run goes on
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
        with suppress(RuntimeError):  # if the device is broken, the calls will report it
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
    """Measure `make(shape)` for every shape and print the tables; exit with 1 if a result was wrong."""
    records = result["records"] = []
    this = _Run(result, common)
    total = sum(len(make.DIRECTIONS) for _ in shapes) * len(found)
    with tqdm(total=total, unit="cell", disable=None, leave=False) as progress:
        for shape in shapes:
            cells = make(shape, common.device)
            for direction in make.DIRECTIONS:
                records += _measure_direction(cells, direction, found, this, progress)
                if common.path:
                    write_json(common.path, result)  # a run that is killed leaves what it has measured
            del cells
            free(common.device)
    this.lines.write("end", seconds=round(time.monotonic() - common.begin, 1))
    click.echo(times_table(result))
    if common.picture:
        plot_times(result).savefig(common.picture)
        click.echo(f"wrote {common.picture}")
    if any(record["wrong"] for record in records):
        sys.exit(1)
