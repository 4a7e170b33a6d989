# SPDX-License-Identifier: MIT
"""`python -m bench.gpu.counters FOLDER REGEX DEVICE LINES`: Nsight Compute's counters of each kernel at 8k, d64, bf16.

It runs itself under ncu (`--step`): one training step of attention and one of expand and reduce, when the clocks are
warm. FOLDER gets profile.ncu-rep, for ncu's own windows, and profile.csv. The file LINES gets a line per kernel.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

MOST_KERNELS = 16
# the contents of a line: our name, and the metric's name in ncu's details page
METRICS = {
    "duration": "Duration",
    "registers": "Registers Per Thread",
    "occupancy": "Achieved Occupancy",
    "theoretical_occupancy": "Theoretical Occupancy",
    "sm_throughput": "Compute (SM) Throughput",
    "memory_throughput": "Memory Throughput",
    "issue_slots": "Issue Slots Busy",
    "ipc": "Executed Ipc Active",
    "dram": "DRAM Throughput",
    "l2_hit": "L2 Hit Rate",
    "shared_bytes": "Dynamic Shared Memory Per Block",
    "local_spilling": "Local Memory Spilling Requests",
    "no_eligible": "No Eligible",
    "sm_mhz": "SM Frequency",
}


def step(device, n=8192):
    """Run each kernel once; on a GPU the clocks are warmed up first."""
    import torch

    from dpb_triton import bias_attention, expand_bias

    if device == "cuda":
        square = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        for _ in range(200):
            square @ square
        torch.cuda.synchronize()
    size = (2, 16, n, 64)
    query, key, value, dout = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(4))
    leaves = [query, key, value, torch.randn(16, n, device=device)]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.autograd.grad(bias_attention(*leaves, is_causal=True, backend="triton"), leaves, dout)
    table = torch.randn(8, n, device=device, dtype=torch.bfloat16).requires_grad_()
    bias = expand_bias(table, n, n, backend="triton")
    torch.autograd.grad(bias, table, torch.empty_like(bias).fill_(1.0))
    if device == "cuda":
        torch.cuda.synchronize()


def lines_of(text):
    """[record] of ncu's details page as CSV: one per launch, with the values of METRICS and their units.

    The second launch of a kernel is attention's repair, which returns at once. It gets its own name.
    """
    start = next((place for place, line in enumerate(text.splitlines()) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found = {}
    for row in csv.DictReader(text.splitlines()[start:]):
        if row["ID"] not in found:
            names = [record["kernel"] for record in found.values()]
            name = row["Kernel Name"]
            found[row["ID"]] = {"kernel": f"{name} repair" if name in names else name}
        record = found[row["ID"]]
        for name, metric in METRICS.items():
            if row.get("Metric Name") == metric and name not in record:
                record[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(found.values())


def main(folder, regex, device, lines):
    """Profile, or say in one line why not."""
    if device == "cpu" or shutil.which("ncu") is None:
        print("no profile: ncu is not installed" if device != "cpu" else "no profile: a rehearsal has no counters")
        return 0
    report, table = Path(folder) / "profile.ncu-rep", Path(folder) / "profile.csv"
    command = ["ncu", "--clock-control", "none", "-c", str(MOST_KERNELS), "-k", regex, "--set", "full", "-f"]
    command += ["-o", str(report.with_suffix("")), sys.executable, "-m", "bench.gpu.counters", "--step", device]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    print(done.stdout, flush=True)
    if "ERR_NVGPUCTRPERM" in done.stdout:
        print("no profile: this user may not read the GPU's counters (ERR_NVGPUCTRPERM)")
        return 0
    if not report.exists():
        return done.returncode or 1
    page = ["ncu", "--import", str(report), "--csv", "--page", "details"]
    text = subprocess.run(page, text=True, stdout=subprocess.PIPE, check=False).stdout
    table.write_text(text)
    with open(lines, "a", encoding="utf-8") as file:
        for record in lines_of(text):
            file.write(json.dumps(record) + "\n")
    return done.returncode


def record(arguments):
    """For bench.gpu.record: the step's launches."""
    step("cpu")


if __name__ == "__main__":
    if sys.argv[1] == "--step":
        step(sys.argv[2])
    else:
        sys.exit(main(*sys.argv[1:]))
