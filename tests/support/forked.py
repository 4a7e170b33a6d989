# SPDX-License-Identifier: MIT
"""torchrun without its slow starts: imports torch once, and forks the processes, under the same agent of torch.

python tests/support/forked.py PROCESSES RESTARTS SCRIPT [ARGUMENT …]
"""

import runpy
import sys
import uuid

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import dpb_triton  # noqa: F401


def run(script, *words):
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def main(processes, restarts, script, *words):
    torch.set_num_threads(1)  # a fork does not copy threads
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(processes), max_restarts=int(restarts), start_method="fork",
        run_id=str(uuid.uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    try:
        elastic_launch(config, run)(script, *words)
    except ChildFailedError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
