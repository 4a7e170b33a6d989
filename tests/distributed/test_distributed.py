# SPDX-License-Identifier: MIT
"""Several processes against one: one launch runs all cases, with 2, then 4, then 8 processes."""

import json

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without torch.distributed or gloo", allow_module_level=True)

import distributed_worker
from quick import slow
from torchrun import ROOT, finished, started


@pytest.fixture(scope="module")
def launch(request, tmp_path_factory):
    """({size: {case: {"failure": str, "seconds": float}}}, what the processes printed) of all cases that are wanted."""
    path, wanted = tmp_path_factory.mktemp("distributed") / "results.json", {}
    for item in request.session.items:
        if item.path == request.path and item.originalname == test_several_processes.__name__:
            wanted.setdefault(item.callspec.params["size"], []).append(item.callspec.params["name"])
    worker = ROOT / "tests/support/distributed_worker.py"
    _, *output = finished(started(worker, path, json.dumps(wanted), TRITON_INTERPRET="1"), timeout=600)
    return json.loads(path.read_text()) if path.exists() else {}, "".join(output)


CASES = [
    (pytest.param if size == 2 and name not in distributed_worker.SLOW else slow)(size, name, id=f"{size}-{name}")
    for size in (2, 4, 8)
    for name in distributed_worker.names_for(size)
]


@pytest.mark.parametrize(("size", "name"), CASES)
def test_several_processes(size, name, launch):
    results, output = launch
    found = results.get(str(size), {})
    assert name in found, f"the case did not run:\n{output[-4000:]}"
    assert not found[name]["failure"], found[name]["failure"]
