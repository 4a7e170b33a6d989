# SPDX-License-Identifier: MIT
"""Several processes on this machine run the cases of `distributed_*.py`, for test_distributed.py.

python tests/support/distributed_worker.py results.json '{"4": ["context causal"]}'

The second argument names the cases to run for each number of processes. This process imports everything once and then
forks the others, because every start of Python and torch takes as long as dozens of cases.
"""

import datetime
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

import distributed_context
import distributed_loading
import distributed_mesh
import distributed_multihead
import distributed_shards
import distributed_tensor
import distributed_training
import pytest
import quick_interpreter
import torch
import torch._dynamo  # here, before the fork: a case under torch.compile imports it, and so does fully_shard
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

GROUPS = (
    distributed_context, distributed_shards, distributed_training, distributed_tensor, distributed_multihead,
    distributed_loading, distributed_mesh,
)  # fmt: skip
CASES = {name: case for group in GROUPS for name, case in group.CASES.items()}
# What 4 processes would show no better: torch's wrappers, forms of a call, what is copied and loaded, compiled graphs
FEW = (
    "compiled", "ddp", "fake kernels", "fsdp", "frozen", "hooks", "load_state_dict", "model state_dict", "pickles",
    "triton",
)  # fmt: skip
FORMS = {f"tensor parallel calls of MultiheadAttention: {name}" for name in ("plain", "kdim and vdim", "all")}
SIZES = (
    {name: (2,) for name in CASES if any(words in name for words in FEW) and not name.startswith("context and")}
    | {name: (2,) for name in CASES if "calls of MultiheadAttention" in name and name not in FORMS}
    | {name: (4,) for name in CASES if name.startswith("data and tensor parallel")}
    | distributed_mesh.SIZES
)  # all others: (2, 4)

# `make test` runs the others with 2 processes
SLOW = {name for name in CASES if "compiled" in name and name != "shards compiled ring"}
SLOW |= {"context triton", "context nan triton", "shards triton dense"}
SLOW |= {name for name in CASES if "calls of MultiheadAttention" in name and name not in FORMS}


def names_for(size):
    return [name for name in CASES if size in SIZES.get(name, (2, 4))]


def run(name):
    """Run a case. Returns each rank's error, None for a rank that passed."""
    error = None
    try:
        torch.manual_seed(0)
        CASES[name]()
    except (Exception, pytest.fail.Exception):
        error = traceback.format_exc()
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return errors


def run_all(rank, size, names, folder):
    """What each process does. Rank 0 writes a file with the results so far after each case."""
    # if a rank fails inside a collective, the others wait for it: after the timeout they and this launch give up
    timeout, store = datetime.timedelta(seconds=60), f"file://{folder}/store-{size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    results = {}
    for name in names:
        began = time.perf_counter()
        errors = run(name)
        messages = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
        results[name] = {"failure": "\n".join(messages), "seconds": time.perf_counter() - began}
        if rank == 0:
            Path(folder, f"{size}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main(path, names_of_sizes):
    torch.set_num_threads(1)  # a fork does not copy threads
    quick_interpreter.install()
    results = {}
    for size, names in json.loads(names_of_sizes).items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = int(size), names, folder
            try:
                start_processes(run_all, arguments, nprocs=int(size), start_method="fork")
            except (ProcessRaisedException, ProcessExitedException) as error:  # the results tell which cases it cost
                print(f"{size} processes: {error}", file=sys.stderr)
            finally:
                found = Path(folder, f"{size}.json")
                results[size] = json.loads(found.read_text()) if found.exists() else {}
                Path(path).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
