# SPDX-License-Identifier: MIT
"""`python -m bench attention --errors`: print how far the results are from float64; time nothing."""

import sys
import time

import click
import torch
from tqdm import tqdm

from ..lines import Lines
from ..memory import free
from ..reasons import NO_TIME, first_line, reason_of, refusals
from ..report import write_json
from ..report_errors import errors_table


def _errors(cells, provider):
    """{"errors": {name: max|result - exact|}, "largest": {name: max|exact|}, "wrong": …} of one provider."""
    found, record = {}, {"errors": {}, "largest": {}, "wrong": None}
    for direction in cells.DIRECTIONS:
        if cells.serves(direction, provider):
            found |= cells.errors(direction, provider)
    for name, (error, budget) in found.items():
        record["errors"][name], record["largest"][name] = error, cells.largest(name)
        if not error <= budget and not record["wrong"]:
            record["wrong"] = f"{name} off by {error:.3g}, budget {budget:.3g}"
    return record


def measure_errors(make, shapes, found, result, common):
    """Measure and print a record for each shape and provider; exit with 1 if one exceeds its budget."""
    records, result["kind"] = [], "errors"
    lines = Lines(common.lines)
    lines.start(result)
    result["records"] = records
    everybody = [p for p in found if "training" in p.directions and p.trains_table]
    for shape in (progress := tqdm(shapes, disable=None, leave=False)):
        cells = make(shape, common.device)
        for provider in everybody:
            progress.set_postfix_str(f"{shape.n} {provider.name}")
            record = {**vars(shape), "provider": provider.name, "wrong": None}
            try:
                if common.deadline is not None and time.monotonic() >= common.deadline:
                    record["unmeasured"] = NO_TIME
                else:
                    with refusals():
                        record |= _errors(cells, provider)
            except (torch.OutOfMemoryError, NotImplementedError) as error:
                record["unmeasured"] = reason_of(error)
            except Exception as error:
                record["wrong"] = first_line(error)
            records.append(record)
            lines.write("errors", **record)
            if common.path:
                write_json(common.path, result)
        del cells
        free(common.device)
    lines.write("end", seconds=round(time.monotonic() - common.begin, 1))
    click.echo(errors_table(result))
    if any(record["wrong"] for record in records):
        sys.exit(1)
