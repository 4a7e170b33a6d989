# SPDX-License-Identifier: MIT
"""The complete examples of docs/distributed.md run under torchrun, as a user copies them, and print what they say."""

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without torch.distributed or gloo", allow_module_level=True)

from quick import slow
from torchrun import ROOT, examples, finished, torchrun, without_examples

PAGE = (ROOT / "docs/distributed.md").read_text()
EXAMPLES = examples(PAGE)


@pytest.mark.parametrize("name", [name if example.processes <= 2 else slow(name) for name, example in EXAMPLES.items()])
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
