# SPDX-License-Identifier: MIT
"""The tests that are worth a GPU's time: which files, which of their tests; a pytest plugin (`-p bench.gpu.suite`).

Its choice of tests is the same where they run and where their launches are recorded for the compiled cache.
"""

import importlib.util
import os

# In this order: the plain ones first, those that wait for torch.compile last.
CHOSEN = (
    "test_expand.py",
    "test_reduce.py",
    "test_kernels.py",
    "test_module.py",
    "test_autograd.py",
    "test_attention.py",
    "test_attention_kernels.py",
    "test_attention_varlen.py",
    "test_attention_key_bias.py",
    "test_attention_dropout.py",
    "test_attention_integers.py",
    "test_attention_properties.py",
    "test_attention_nan.py",
    "test_large_strides.py",
    "test_attention_autograd.py",
    "test_attention_training.py",
    "test_decoding.py",
    "test_multihead.py",
    "test_in_training.py",
    "test_compile.py",
    "test_attention_compile.py",
)
OFFLINE = "compiles or reads code, runs no kernel on a device"
OWN_PROCESSES = "starts processes of its own, on the CPU"
BEFORE = "raises before a kernel starts, the same on every machine"
NO_KERNEL = "runs no kernel of this library"
CPU_ONLY = "draws its tensors on the CPU"
LEFT_OUT = {  # by pattern
    "test_attention_bad_input.py": BEFORE,
    "test_attention_reference.py": NO_KERNEL,
    "test_bad_input.py": BEFORE,
    "test_bench*.py": OWN_PROCESSES,
    "test_codegen*.py": OFFLINE,
    "test_csrc.py": OFFLINE,
    "test_distributed.py": OWN_PROCESSES,
    "test_kernel_keys.py": OFFLINE,
    "test_launch_path.py": OFFLINE,
    "test_layers.py": OWN_PROCESSES,
    "test_operators_seen.py": OWN_PROCESSES,
    "test_plot.py": NO_KERNEL,
    "test_readme.py": OWN_PROCESSES,
    "test_setup.py": OFFLINE,
    "test_sweep.py": OFFLINE,
    "test_transformers*.py": CPU_ONLY,
    "test_x_transformers.py": CPU_ONLY,
}
TINY = ("test_expand.py", "test_attention_kernels.py")  # a rehearsal's


def arguments(device, tiny=False):
    """What follows the interpreter. Without xdist the tests run in one process."""
    workers = 1 if tiny else max(1, min(14, (os.cpu_count() or 1) - 2))  # two cores are left to what else runs
    parallel = ("-n", str(workers), "--dist", "worksteal") if workers > 1 and importlib.util.find_spec("xdist") else ()
    plugins = ("-p", "bench.gpu.suite", "-p", "no:cacheprovider", "-m", "not hypothesis")
    files = [f"tests/{name}" for name in (TINY if tiny else CHOSEN)]
    return ("-m", "pytest", "-q", *parallel, "--device", device, "--maxfail=20", "--tb=short", *plugins, *files)


def is_wanted(item):
    """Not those that ask for a backend of plain torch or of the CPU: they need no GPU."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return not {"torch", "cpp"} & {parameters.get("backend"), parameters.get("attention_backend")}


def pytest_collection_modifyitems(config, items):
    """Random examples are left out by `-m "not hypothesis"`: each compiles a kernel of its own."""
    unwanted = [item for item in items if not is_wanted(item)]
    items[:] = [item for item in items if is_wanted(item)]
    config.hook.pytest_deselected(items=unwanted)
