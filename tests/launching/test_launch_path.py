# SPDX-License-Identifier: MIT
"""`launch_worker.py`, in a process of its own, launches every kernel as on an H100, down to a fake driver."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch requires it

pytest.importorskip("triton", reason="launching needs the extra `triton`")

import launch_worker
from quick import slow

ROOT = Path(__file__).parents[2]
ATTENTION = {"_bias_kernel", "_forward_kernel", "_prologue_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel",
             "_fold_dtable_kernel"}  # fmt: skip
STEP = ATTENTION - {"_bias_kernel", "_forward_kernel"} | {"_decode_kernel", "_merge_kernel"}
EXPAND = {"_expand_kernel", "_reduce_kernel", "_fold_kernel"}
# These cases launch every kernel, and fill tuple fields that are None elsewhere. `make test-full` runs all cases.
QUICK = ("causal", "causal, described", "key mask", "packed, window, dropout", "step", "step, paged", "expand")
CASES = [name if name in QUICK else slow(name) for name in launch_worker.CASES]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the other tests launch on it")


@pytest.fixture(scope="session")
def results(tmp_path_factory, request):
    """The launch worker's results for the selected cases; it runs once for all of pytest-xdist's workers."""
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__))
    cases = {"causal"} | {call.params["case"] for call in calls if call and "case" in call.params}
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    path = shared / "launches.json"
    with FileLock(shared / "launches.lock"):
        if not path.exists():
            # the binaries hold no code, so they must not enter a cache that others read
            environment = os.environ | {"TRITON_CACHE_DIR": str(shared / "launches"), "PYTHONPATH": _python_path()}
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, "tests/support/launch_worker.py", str(path), *sorted(cases)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def _python_path():
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


@pytest.mark.parametrize("case", CASES)
def test_the_driver_is_given_what_the_call_says(results, case):
    found = results["cases"][case]
    assert found["error"] is None, found["error"]
    expected = EXPAND if case.startswith("expand") else STEP if case.startswith("step") else ATTENTION
    expected = {"_decode_kernel", "_merge_kernel"} if case == "step, paged" else expected
    assert set(found["launched"]) == expected | ({"_key_bias_kernel"} if "key mask" in case else set())
    both = {"expand", "reduce"} if case.startswith("expand") else {"forward", "backward"}
    both = {"paged"} if case == "step, paged" else both
    assert {function for function, _ in found["repeated"]} == both
    # a call that rounds its result or copies its input with torch is never repeated
    never = {"expand, bfloat16": {"reduce"}, "expand, columns": {"reduce"}, "causal, copied": both,
             "copied, described": both}.get(case, set())  # fmt: skip
    assert {function for function, is_repeated in found["repeated"] if not is_repeated} == never


def test_a_repeated_call_takes_its_tensors_one_by_one_and_is_heard(results):
    assert results["repeated"] is None, results["repeated"]


def test_a_repeated_call_encodes_the_maps_of_its_own_tensors_once(results):
    assert results["described"] is None, results["described"]


def test_a_launcher_of_unknown_form_is_left_to_triton(results):
    assert results["unknown launcher"] is None, results["unknown launcher"]
    assert results["unknown launcher repeated"] == [["forward", False], ["backward", False]]


@pytest.mark.parametrize("kinds", ["every kind", "every described kind"])
def test_every_kind_of_argument_takes_tritons_binary(results, kinds):
    case = results["cases"][kinds]
    assert case["error"] is None, case["error"]


def test_named_values_are_compared(results):
    """Triton knows no names, so without this an int in another's place would pass."""
    for kernel in ("_forward_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel"):
        assert len([name for owner, name in results["named"] if owner == kernel]) >= 12


BROKEN = [change.__name__ for change in (*launch_worker.BROKEN, *launch_worker.DESCRIBED_BROKEN)]
BROKEN += [*launch_worker.MAPS_BROKEN, *launch_worker.STALE, "all descriptors alike", "pointers", "the launcher"]


@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_launch_is_noticed(results, change):
    assert results["broken"][change] is not None


def test_the_tried_versions_are_launched_directly(results):
    """With a new minor version, launches go through Triton itself until somebody has run this file with it."""
    assert results["triton"].startswith(("3.6.", "3.7.", "3.8.", "3.9.")) == results["is_tried"]
