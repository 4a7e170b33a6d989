# SPDX-License-Identifier: MIT
"""`python -m dpb_triton`: the installed versions, the backends that run here, why the others cannot, the choice."""

import importlib.metadata
import platform

import torch

from . import __version__, dispatch
from .dispatch import BACKENDS, why_not


def version_of(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def triton_version() -> str:
    """The version of the package that holds Triton. For torch's builds for ROCm it has another name."""
    if not dispatch.has_triton():
        return "not installed"
    return version_of(importlib.metadata.packages_distributions().get("triton", ["triton"])[0])


def chosen(device_type: str) -> str:
    """The backend that `backend=None` takes for tensors on that device."""
    preferred = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}[device_type]
    return next(backend for backend in preferred if why_not(backend, device_type) is None)


def print_backends(device_type: str) -> None:
    """Print which backends serve tensors on that device, and whether there is such a device."""
    choice, ready = f"{chosen(device_type)!r} is chosen", dict.fromkeys(BACKENDS, "available")
    if device_type == "cuda" and not torch.cuda.is_available():
        choice = f"there are none here, torch sees no GPU; with one {choice}"
        ready |= {"triton": "installed, but there is no GPU", "cuda": "built, but there is no GPU"}
    print(f"\n{device_type} tensors: {choice}")
    for backend in BACKENDS:
        print(f"  {backend:<7} {why_not(backend, device_type) or ready[backend]}")


def main() -> None:
    """Print all of it."""
    print(f"dpb_triton {__version__} in {dispatch.__file__.rpartition('/')[0]}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton_version()}")
    if torch.cuda.is_available():
        toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        print(f"cuda: {torch.cuda.get_device_name()}, {toolkit}")
    else:
        is_cpu_build = not (torch.version.cuda or torch.version.hip)
        print("cuda: torch sees no GPU" + (" (a CPU build of torch)" if is_cpu_build else ""))
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print_backends("cpu")
    print_backends("cuda")


if __name__ == "__main__":
    main()
