# SPDX-License-Identifier: MIT
"""The complete examples of docs/distributed.md run in several processes, as users copy them, and print the same."""

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without torch.distributed or gloo", allow_module_level=True)

from torchrun import ROOT, examples, finished, torchrun, without_examples

PAGE = (ROOT / "docs/distributed.md").read_text()
EXAMPLES = examples(PAGE)
OF_SURVIVAL = "A run that survives"  # test_survival.py runs this one


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != OF_SURVIVAL])
def test_examples(name, tmp_path):
    example = EXAMPLES[name]
    script = tmp_path / "example.py"
    script.write_text(example.code)
    status, output, errors = finished(torchrun(example.processes, script, cwd=tmp_path), timeout=240)
    assert status == 0, output + errors
    assert example.output is None or output == example.output


def test_every_mark_has_its_example():
    assert len(EXAMPLES) == PAGE.count("<!-- torchrun")
    assert without_examples(PAGE).count("<!-- torchrun") == len(EXAMPLES)


def test_an_example_ends_at_its_fence():
    mark, fence = "<!-- torchrun: 2 -->\n", "```"
    page = f"# A\n{mark}{fence}python\n# 1\n{fence}\n\n{fence}text\n2\n{fence}\n{mark}{fence}python\n3\n{fence}\n"
    assert examples(page) == {"A": (2, "# 1\n", "2\n"), "A 2": (2, "3\n", None)}
    assert without_examples(page) == f"# A\n{mark}{mark}"
