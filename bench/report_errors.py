# SPDX-License-Identifier: MIT
"""The table of `python -m bench attention --errors`, made from its JSON alone."""

from .report_parts import mask_of, render

EPS = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}


def errors_table(result, style="simple"):
    """The tables of a run of `python -m bench attention --errors`: one for each dtype and mask."""
    parts = [
        f"{result['setting']}: max|result - float64|; in brackets the same in units of the dtype's eps * max|float64|"
    ]
    groups = {}
    for record in result["records"]:
        groups.setdefault((record["dtype"], mask_of(record)), []).append(record)
    for (dtype, mask), records in groups.items():
        names = list(dict.fromkeys(name for record in records for name in record.get("errors", ())))
        headers = {"n": "seq", "provider": "who"} | {name: name for name in names} | {"wrong": ""}
        rows = []
        for record in records:
            row = dict.fromkeys(headers, "") | {"n": record["n"], "provider": record["provider"]}
            for name, error in record.get("errors", {}).items():
                row[name] = f"{error:.2g} ({error / (EPS[dtype] * record['largest'][name]):.2g})"
            rows.append(row | {"wrong": f"FAIL {record['wrong']}" if record["wrong"] else record.get("unmeasured", "")})
        parts.append(f"{dtype}, {mask}\n\n{render(rows, headers, style)}")
    parts += [f"absent: {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n" + "\n\n".join(parts)
