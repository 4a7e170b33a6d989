# SPDX-License-Identifier: MIT
"""Results of the sweep as its file has them, its command, and threads that compile in place of its processes."""

from concurrent.futures import ThreadPoolExecutor

GROUP = ("dkdv", 64, "bf16", "sm_90")


def result(candidate, problems=(), estimate=100.0, issue=None):
    found = {
        "kernel": candidate.kernel,
        "blocks": list(candidate.blocks),
        "width": 64,
        "dtype": "bf16",
        "arch": "sm_90",
    }
    found["problems"] = list(problems)
    clocks = {"tensor": estimate, "issue": issue or estimate, "exp2": 1.0}
    options = {"registers": 128, "shared": 0, "blocks": 1, "instructions": 99, "clocks": clocks}
    return found if problems else found | dict.fromkeys(("causal", "full"), options | {"estimate": estimate})


def listed(*entries):
    """The results by their names in the file."""
    from bench.sweep.offline import candidate_of, key_of  # needs the extra `bench`

    return {key_of(candidate_of(entry), 64, "bf16", "sm_90"): entry for entry in entries}


def sweep(*words):
    """What `python -m bench sweep` prints with these words."""
    from click.testing import CliRunner

    from bench.sweep import command

    done = CliRunner().invoke(command.sweep, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


class Threads(ThreadPoolExecutor):
    """Threads instead of processes."""

    def __init__(self, jobs, mp_context):
        super().__init__(jobs)
