# SPDX-License-Identifier: MIT
"""The tables of `python -m bench scale`, and what they say in words."""

from dataclasses import replace

from tabulate import tabulate

from ..environment import one_line
from ..report_parts import three_digits
from . import room
from .machine import LINK_SHARE, MEASURED, MLP_SHARE, PUBLISHED_BF16, gpu
from .measure import machine_of
from .model import ALL_TO_ALL, CONTIGUOUS, METHODS, PARTS, RING, Clock, Prediction, Work, add_mlp, predict

TOKENS = (8 << 10, 32 << 10, 128 << 10, 512 << 10, 1 << 20)
GPUS = (8, 32, 64, 256, 1024)
MLP_WIDTHS = (64, 256, 1024)
GIB = 2**30


def tokens_word(tokens):
    """8k, 1M."""
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def _table(rows, headers, style):
    rows = [["" if cell is None else str(cell) for cell in row] for row in rows]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=["right"] * len(headers))


def ms(seconds):
    """Milliseconds with three digits."""
    return three_digits(1e3 * seconds)


def predictions(work, machine, tokens=TOKENS, ranks=GPUS):
    """{(tokens, ranks): {method: (Prediction, bytes at the peak)}}, without methods that cannot run."""
    found = {}
    for total in tokens:
        for count in ranks:
            here = replace(work, total=total)
            cell = found[total, count] = {}
            for method in METHODS:
                prediction = predict(here, machine, count, method)
                if prediction:
                    cell[method] = prediction, sum(room.peak(here, count, method).values())
    return found


def winner(cell, machine):
    """The fastest method of those that fit, or None."""
    fitting = {method: found[0].seconds for method, found in cell.items() if found[1] <= machine.capacity}
    return min(fitting, key=fitting.get, default=None)


def _title(work, machine):
    return (
        f"Predicted, not measured: {machine.name}, one layer, forward and backward; batch {work.batch}, {work.heads} "
        f"heads, {work.kv_heads} of keys, head_dim {work.head_dim}, bf16, causal, MLP {work.depth} x {work.mlp_dim}"
    )


def prediction_table(work, machine, style):
    """A row per length and number of GPUs: milliseconds, GiB and the limiter of each method, and the winner."""
    rows = []
    for (total, count), cell in predictions(work, machine).items():
        row = [tokens_word(total), count]
        for method in METHODS:
            if method not in cell:
                row += [""] * (2 if method == CONTIGUOUS else 3)
                continue
            found, size = cell[method]
            limit = "memory" if size > machine.capacity else found.limit
            row += [ms(found.seconds), *([] if method == CONTIGUOUS else [f"{size / GIB:.3g}"]), limit]
        best = winner(cell, machine)
        share = cell[best][0].busy if best else None
        fixed = f"{(share['MLP'] + share['table']) / cell[best][0].seconds:.0%}" if best else ""
        rows.append([*row, best, fixed])
    headers = ["tokens", "GPUs", "ring ms", "GiB", "limit", "contiguous ms", "limit", "all-to-all ms", "GiB", "limit",
               "fastest", "table, MLP"]  # fmt: skip
    return f"{_title(work, machine)}\n\n{_table(rows, headers, style)}"


def parts_table(work, machine, style, total=1 << 20):
    """Milliseconds that each part keeps its resource busy, at one length."""
    rows = []
    for count in GPUS:
        for method in (RING, ALL_TO_ALL):
            found = predict(replace(work, total=total), machine, count, method)
            if found:
                rows.append([count, method, ms(found.seconds), *map(ms, found.busy.values())])
    headers = ["GPUs", "method", "ms", *PARTS]
    title = f"Predicted, not measured: the parts at {tokens_word(total)} tokens. Link and host work at the same time."
    return f"{title}\n\n{_table(rows, headers, style)}"


def mlp_table(work, machine, style, total=1 << 20):
    """What every rank does for all distances: it does not shrink with the ranks."""
    rows = []
    for width in MLP_WIDTHS:
        here = replace(work, total=total, mlp_dim=width)
        row = [width, ms(predict(here, machine, 1, RING).busy["MLP"]), f"{room.mlp_bytes(here) / GIB:.3g}"]
        for count in (8, 64, 1024):
            cell = {m: (p, 0) for m in METHODS if (p := predict(here, machine, count, m))}
            best = cell[winner(cell, machine)][0]
            row.append(f"{best.busy['MLP'] / best.seconds:.1%}")
        rows.append(row)
    headers = ["MLP width", "ms", "GiB saved", "share of 8 GPUs", "of 64", "of 1024"]
    title = f"Predicted, not measured: the MLP at {tokens_word(total)} tokens, on every GPU, however many there are."
    return f"{title}\n\n{_table(rows, headers, style)}"


def words(work, machine):
    """Which method wins where, and what limits it: sentences made from the numbers."""
    found = predictions(work, machine)
    lines = []
    for count in GPUS:
        runs, last = [], None
        for total in TOKENS:
            best = winner(found[total, count], machine)
            limit = found[total, count][best][0].limit if best else "memory"
            word = f"{best} (limit: {limit})" if best else "nothing fits"
            if word != last:
                runs.append(f"from {tokens_word(total)} {word}")
                last = word
        lines.append(f"{count} GPUs: {'; '.join(runs)}.")
    longest, least = found[TOKENS[-1], GPUS[-1]], found[TOKENS[-1], GPUS[0]]
    silent = replace(machine, host_forward=0, host_backward=0, host_operation=0)
    method = winner(longest, machine)
    if method and winner(least, machine):
        best, first = longest[method][0], least[winner(least, machine)][0]
        free = predictions(work, silent, TOKENS[-1:], GPUS[-1:])[TOKENS[-1], GPUS[-1]]
        freed = winner(free, machine)
        lines.append(
            f"{tokens_word(TOKENS[-1])} tokens on {GPUS[-1]} GPUs are {first.seconds / best.seconds:.0f} times as fast "
            f"as on {GPUS[0]}, with {GPUS[-1] // GPUS[0]} times the GPUs. {_sentence(best)} If launches took the host "
            f"no time (a CUDA graph), it would be {ms(free[freed][0].seconds)} instead of {ms(best.seconds)} ms, by "
            f"{freed}, limit: {free[freed][0].limit}."
        )
    if work.heads % machine.node == work.kv_heads % machine.node == 0:
        here = replace(work, total=TOKENS[-1], heads=work.heads // machine.node, kv_heads=work.kv_heads // machine.node)
        nodes = GPUS[-1] // machine.node
        both = predict(here, replace(machine, node=1), nodes, RING)
        lines.append(
            f"With the heads split inside each node (HeadParallel) and a ring of {nodes} nodes it would be "
            f"{ms(both.seconds)} ms, limit: {both.limit}."
        )
    lead = [
        f"{cell[RING][0].seconds / cell[ALL_TO_ALL][0].seconds:.2f} at {tokens_word(total)}"
        for (total, count), cell in found.items()
        if count == GPUS[1] and ALL_TO_ALL in cell
    ]
    if lead:
        lines.append(f"Time of the ring over that of all-to-all on {GPUS[1]} GPUs: {', '.join(lead)}.")
    firsts = {}
    for count in GPUS[2:]:
        totals = [1 << power for power in range(13, 28)]
        limits = {total: predict(replace(work, total=total), machine, count, RING).limit for total in totals}
        first = next((total for total in totals if limits[total] == "products"), None)
        if first:
            firsts.setdefault(first // count, []).append(f"{count}")
    for own, counts in firsts.items():
        lines.append(f"Products limit a ring of {', '.join(counts)} GPUs from {own:,} tokens a GPU on.")
    lines.append(
        f"All-to-all ends at {work.heads} GPUs, one for each head. A ring's keys and gradients pass every GPU, so its "
        f"exchange does not shrink: {ms(longest[RING][0].busy['exchange'])} ms at {tokens_word(TOKENS[-1])} tokens."
    )
    size = room.FLOAT * work.heads * TOKENS[-1] / room.MIB
    lines.append(
        f"The table and its gradient have {size:.0f} MiB each at {tokens_word(TOKENS[-1])} tokens, on every GPU; the "
        f"MLP keeps {room.mlp_bytes(replace(work, total=TOKENS[-1])) / GIB:.3g} GiB."
    )
    return "In words, all of it predicted:\n\n" + "\n".join(f"- {line}" for line in lines)


def _sentence(prediction):
    parts = sorted(prediction.busy.items(), key=lambda item: -item[1])[:4]
    return "Busy: " + ", ".join(f"{part} {ms(seconds)} ms" for part, seconds in parts) + "."


def sources(work, machine):
    """Where the numbers of the prediction come from."""
    peaks = [f"{rate / PUBLISHED_BF16:.0%}" for rate in (machine.forward, machine.backward)]
    host = [f"{1e6 * x:.0f}" for x in (machine.host_forward, machine.host_backward, machine.host_operation)]
    return (
        f"Sources: {machine.forward / 1e12:.0f} TFLOP/s forward and {machine.backward / 1e12:.0f} backward "
        f"({machine.products_backward} products), {peaks[0]} and {peaks[1]} of the published peak, and {host[0]} and "
        f"{host[1]} us of the host for a call, all measured on one H200 ({MEASURED}). The latter are those of a whole "
        "training step with autograd, so they are upper bounds. Published peaks: memory, NVLink (450 GB/s), network "
        f"(50 GB/s a GPU). Assumed: {LINK_SHARE:.0%} of the links' peaks, {MLP_SHARE:.0%} of the memory's and of "
        f"float32's, latencies of {machine.link_latency * 1e6:.0f} and {machine.network_latency * 1e6:.0f} us, "
        f"{host[2]} us of the host for an operation between the calls."
    )


def _ratio(measured, expected, word):
    """[expected, measured, their ratio] as words."""
    return [word(expected), word(measured), f"{measured / expected:.2f}"]


def expected_point(result, point):
    """(seconds, seconds of computing on the busiest rank, bytes) that the model gives for a measured point."""
    work, machine = Work(**result["work"]), machine_of(result)
    ranks, method, is_forward = point["ranks"], point["method"], point["pass"] == "forward"

    def of(machine):
        if method == "MLP":
            clocks = Clock(work, machine), Clock(work, machine)
            add_mlp(clocks, ranks)
            return Prediction(*clocks)
        return predict(work, machine, ranks, method, has_mlp=False)

    shared, lonely = of(machine), of(replace(machine, cores=None))
    computed = lonely.forward.computed() + (0 if is_forward else lonely.backward.computed())
    size = room.mlp_bytes(work) if method == "MLP" else beyond_inputs(work, ranks, method, is_forward)
    return shared.forward.seconds if is_forward else shared.seconds, computed, size


def measured_table(result, style):
    """The measured points beside the prediction from that machine's constants."""
    rows = []
    for point in result["points"]:
        seconds, computed, size = expected_point(result, point)
        rows.append([
            point["ranks"], point["method"], point["pass"], *_ratio(point["seconds"], seconds, ms),
            *_ratio(max(point["cpu"]), computed, ms), *_ratio(max(point["peak_mib"]), size / room.MIB, "{:.1f}".format),
        ])  # fmt: skip
    headers = ["processes", "method", "pass", "ms predicted", "measured", "ratio", "CPU ms predicted", "measured",
               "ratio", "MiB predicted", "measured", "ratio"]  # fmt: skip
    work = Work(**result["work"])
    title = (
        f"Measured beside predicted: gloo, {result['cores']} cores for all processes, one thread each; batch "
        f"{work.batch}, {work.heads} heads, {work.total} tokens, head_dim {work.head_dim}, float32, causal. CPU ms are "
        "of the busiest rank, MiB are beyond the inputs."
    )
    return f"{title}\n\n{_table(rows, headers, style)}"


def beyond_inputs(work, ranks, method, is_forward):
    """Bytes at the peak that a call on the CPU needs beyond query, key, value, dout and the table."""
    is_exchange = method == ALL_TO_ALL
    forward = room.all_to_all_forward if is_exchange else room.ring_forward
    first = sum(forward(work, ranks).values())
    if is_forward:
        return first
    if is_exchange:
        sizes = work.total, work.total, work.heads // ranks, max(1, work.kv_heads // ranks)
    else:
        own = work.total // ranks // (2 if method == RING and ranks > 1 else 1)
        sizes = own, own, work.heads, work.kv_heads
    backward = room.all_to_all_backward if is_exchange else room.ring_backward
    later = sum(backward(work, ranks).values()) + room.cpu_buffers(work, *sizes)
    return max(first, room.saved_bytes(work, ranks, method) + later)


def balance_table(result, style):
    """How evenly the ranks share the work: visible pairs, and CPU time."""
    rows = []
    for point in result["points"]:
        if point["ranks"] == 4 and point["method"] != "MLP":
            ratios = [max(x) / (sum(x) / len(x)) for x in (point["pairs"], point["cpu"])]
            cpu = ", ".join(f"{1e3 * seconds:.0f}" for seconds in point["cpu"])
            rows.append([point["method"], point["pass"], *(f"{ratio:.2f}" for ratio in ratios), cpu])
    headers = ["method", "pass", "pairs", "CPU time", "CPU ms of each rank"]
    return f"Balance of 4 processes, largest / mean:\n\n{_table(rows, headers, style)}"


def predicted_page(work, machine, style="simple"):
    """The predictions, their sources, and the words."""
    tables = prediction_table(work, machine, style), parts_table(work, machine, style), mlp_table(work, machine, style)
    return "\n\n".join([*tables, words(work, machine), sources(work, machine)])


def measured_page(result, style="simple"):
    """The measured points of a JSON, without the environment."""
    parts = measured_table(result, style), result.get("remark"), balance_table(result, style)
    constants = ", ".join(f"{name} {value:.3g}" for name, value in result["constants"].items())
    return "\n\n".join([*filter(None, parts), f"The machine's constants, per second or in seconds: {constants}"])


def docs_page(result):
    """The tables for docs/: the prediction for a GPU, and the measured points of a JSON."""
    work = Work(0)
    machine = gpu("h200", work.head_dim)
    predicted = prediction_table(work, machine, "github"), sources(work, machine)
    return "\n\n".join([*predicted, one_line(result["environment"]), measured_page(result, "github")])
