# SPDX-License-Identifier: MIT
"""Tests a dpb_triton that was built against a CUDA build of torch: `python smoke_cuda.py`, no GPU needed.

`make cuda-build-test` runs it. It checks that the binary has CUDA kernels for every architecture that setup.py or
TORCH_CUDA_ARCH_LIST names, and then runs smoke.py.
"""

import os
import runpy
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import dpb_triton._C as compiled
import smoke
import torch
import triton


def images(path):
    """The images that cuobjdump from Triton's wheel finds in the binary: {"sm_90.cubin", "sm_100.ptx", …}."""
    tool = triton.knobs.nvidia.cuobjdump.path
    listed = [
        subprocess.run([tool, option, path], capture_output=True, text=True).stdout for option in ("-lelf", "-lptx")
    ]
    return {".".join(line.split(".")[-2:]) for line in "".join(listed).splitlines()}


def main():
    """Load the binary, check its kernels and images, and run smoke.py."""
    assert torch.version.cuda, f"torch {torch.__version__} is not a CUDA build"
    print(f"{compiled.__file__} with torch {torch.__version__}")
    for name in ("expand_cuda", "reduce_cuda"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dpb_triton::{name}", "CUDA"), name
    with redirect_stdout(StringIO()) as said:
        runpy.run_module("dpb_triton", run_name="__main__")
    state = "available" if torch.cuda.is_available() else "built, but there is no GPU"
    assert said.getvalue().splitlines()[-1].split(maxsplit=1) == ["cuda", state], said.getvalue()

    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    if archs == [""]:
        archs = runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))["ARCHS"]
        archs = [*archs[:-1], archs[-1] + "+PTX"]
    numbers = [arch.removesuffix("+PTX").replace(".", "") for arch in archs]
    wanted = {f"sm_{number}.cubin" for number in numbers}
    wanted |= {f"sm_{number}.ptx" for number, arch in zip(numbers, archs, strict=True) if arch.endswith("+PTX")}
    assert images(compiled.__file__) == wanted, (images(compiled.__file__), wanted)
    print(f"holds {', '.join(sorted(wanted))}")
    smoke.main()


if __name__ == "__main__":
    main()
