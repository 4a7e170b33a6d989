# SPDX-License-Identifier: MIT
"""One of several processes: runs every case of `distributed_*.py` and writes the results for test_distributed.py.

python -m torch.distributed.run --standalone --nproc-per-node 4 tests/support/distributed_worker.py results.json [case]
"""

import datetime
import json
import sys
import time
import traceback
from pathlib import Path

import distributed_context
import distributed_shards
import distributed_tensor
import distributed_training
import pytest
import quick_interpreter
import torch
import torch.distributed as dist

CASES = distributed_context.CASES | distributed_shards.CASES | distributed_training.CASES | distributed_tensor.CASES
SIZES = {"context triton": (2,), "context nan triton": (2,), "data and tensor parallel": (4,)}  # all others: (2, 4)


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


def main(path, *names):
    torch.set_num_threads(1)
    quick_interpreter.install()
    # if a rank fails inside a collective, the others wait for it: after the timeout they and this launch give up
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results = {}
    for name in names or names_for(dist.get_world_size()):
        began = time.perf_counter()
        errors = run(name)
        messages = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
        results[name] = {"failure": "\n".join(messages), "seconds": time.perf_counter() - began}
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(results, indent=1))
            if names:
                print(name, f"{results[name]['seconds']:.2f} s", results[name]["failure"] or "passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
