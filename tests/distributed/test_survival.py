# SPDX-License-Identifier: MIT
"""The script of "A run that survives" in docs/distributed.md, with ranks that are killed, ends as if nothing happened.

torchrun stops the other ranks and starts all anew. The script goes on from its last complete checkpoint.
"""

import re

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without torch.distributed or gloo", allow_module_level=True)

from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchrun import ROOT, examples, finished, torchrun

SCRIPT = examples((ROOT / "docs/distributed.md").read_text())["A run that survives"].code
STEPS, EVERY = (int(re.search(rf"^{name} = (\d+)", SCRIPT, re.M)[1]) for name in ("STEPS", "EVERY"))


def run(folder, processes, *killing, restarts=3):
    """(exit status, [(step, printed loss)], what went wrong) of the script in `folder`; `killing` is for killed.py."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    words = ROOT / "tests/support/killed.py", script, *killing
    # torch's store outlives the processes. A restarted rank may find the address of one that is dead (pytorch#135712).
    process = torchrun(processes, *words, restarts=restarts, cwd=folder, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    status, output, errors = finished(process, timeout=240)
    return status, re.findall(r"^step (\d+): (\S+)$", output, re.M), errors


def last_checkpoint(folder):
    """The parameters, and what the optimizer knows of each."""
    dcp_to_torch_save(folder / "checkpoints" / str(STEPS), folder / "last.pt")
    state = torch.load(folder / "last.pt")
    assert state["model"].keys() == state["optimizer"]["state"].keys()
    return state["model"], state["optimizer"]["state"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(printed losses, last checkpoint) of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("unbroken")
    status, losses, errors = run(folder, 2)
    assert status == 0, errors
    assert [int(step) for step, _ in losses] == [*range(1, STEPS + 1)]
    return dict(losses), last_checkpoint(folder)


def steps_from(*pieces):
    return [step for first, last in pieces for step in range(first, last + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [("write", 2, 1), ("metadata", 2, 0)], ids=["while saving", "at the end of saving"])
def test_a_killed_rank(moment, unbroken, tmp_path):
    """The checkpoint that is not complete is not loaded: the run goes on from the one before it."""
    expected, checkpoint = unbroken
    status, losses, errors = run(tmp_path, 2, *moment)
    assert status == 0, errors
    assert f"rank {moment[2]} kills itself" in errors
    assert [int(step) for step, _ in losses] == steps_from((1, 2 * EVERY), (EVERY + 1, STEPS)), errors
    assert all(loss == expected[step] for step, loss in losses)
    torch.testing.assert_close(last_checkpoint(tmp_path), checkpoint, atol=0, rtol=0)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_fewer_processes(unbroken, tmp_path):
    expected, checkpoint = unbroken
    status, before, errors = run(tmp_path, 4, "backward", EVERY + 2, 0, 1, 2, 3, restarts=0)
    assert status != 0 and "kills itself" in errors
    status, after, errors = run(tmp_path, 2)
    assert status == 0, errors
    assert [int(step) for step, _ in (*before, *after)] == steps_from((1, EVERY + 1), (EVERY + 1, STEPS))
    for step, loss in (*before, *after):
        assert float(loss) == pytest.approx(float(expected[step]), abs=1e-11)
    torch.testing.assert_close(last_checkpoint(tmp_path), checkpoint, atol=1e-11, rtol=1e-11)
