# SPDX-License-Identifier: MIT
"""The tests that are worth a GPU's time: which files, which of their tests; a pytest plugin (`-p bench.gpu.suite`).

It chooses the same tests on the GPU and where their launches are recorded for the compiled cache. Tests marked slow are
included: they are slow only in the interpreter.
"""

import importlib.util
import os

# In this order: plain tests first, those that wait for torch.compile last.
CHOSEN = (
    "expand/test_expand.py",
    "expand/test_reduce.py",
    "expand/test_properties.py",
    "expand/test_kernels.py",
    "module/test_module.py",
    "expand/test_autograd.py",
    "attention/test_attention.py",
    "attention/test_kernels.py",
    "attention/test_decode_kernel.py",
    "attention/test_paged.py",
    "attention/test_varlen.py",
    "attention/test_key_bias.py",
    "attention/test_dropout.py",
    "attention/test_integers.py",
    "attention/test_properties.py",
    "attention/test_nan.py",
    "attention/test_large_strides.py",
    "attention/test_autograd.py",
    "attention/test_training.py",
    "test_results_are_tensors.py",
    "module/test_decoding.py",
    "multihead/test_multihead.py",
    "multihead/test_layers.py",
    "multihead/test_module.py",
    "module/test_in_training.py",
    "expand/test_compile.py",
    "attention/test_compile.py",
)
OFFLINE = "compiles or reads code, runs no kernel on a device"
OWN_PROCESSES = "starts processes of its own, on the CPU"
BEFORE = "raises before a kernel starts, the same on every machine"
NO_KERNEL = "runs no kernel of this library"
CPU_ONLY = "draws its tensors on the CPU"
INTERPRETED = "counts what Triton's interpreter calls"
TRACED = "a trace holds torch's operators, and none of this library's"
LEFT_OUT = {  # by pattern
    "attention/test_bad_input.py": BEFORE,
    "attention/test_reference.py": NO_KERNEL,
    "attention/test_tiles.py": NO_KERNEL,
    "attention/test_tiles_computed.py": INTERPRETED,
    "attention/test_decode.py": NO_KERNEL,
    "attention/test_cpp.py": CPU_ONLY,
    "attention/test_fake_kernels.py": CPU_ONLY,
    "attention/test_torch_tiles.py": NO_KERNEL,
    "expand/test_bad_input.py": BEFORE,
    "bench/test_*.py": OWN_PROCESSES,
    "csrc/test_csrc.py": OFFLINE,
    "distributed/test_*.py": OWN_PROCESSES,
    "module/test_foreign_parameters.py": CPU_ONLY,
    "module/test_kept_table.py": NO_KERNEL,
    "attention/test_flops.py": CPU_ONLY,
    "launching/test_keys.py": OFFLINE,
    "launching/test_launch_path.py": OFFLINE,
    "launching/test_replay.py": OFFLINE,
    "test_interpreter.py": OWN_PROCESSES,
    "test_layers.py": OWN_PROCESSES,
    "multihead/test_bad_input.py": BEFORE,
    "test_makefile.py": OWN_PROCESSES,
    "test_matrix.py": OFFLINE,
    "test_operators_seen.py": OWN_PROCESSES,
    "test_defaults_of_torch.py": CPU_ONLY,
    "test_dispatch.py": NO_KERNEL,
    "test_robustness.py": OWN_PROCESSES,
    "module/test_plot.py": NO_KERNEL,
    "test_cuda_at_hand.py": OFFLINE,
    "test_docs.py": OWN_PROCESSES,
    "test_setup.py": OFFLINE,
    "test_tracing.py": TRACED,
    "test_without_triton.py": OWN_PROCESSES,
    "test_types.py": NO_KERNEL,
    "integrations/test_transformers*.py": CPU_ONLY,
    "integrations/test_x_transformers.py": CPU_ONLY,
}
TINY = ("expand/test_expand.py", "attention/test_kernels.py")  # of a rehearsal


def arguments(device, tiny=False):
    """The arguments of the interpreter. Without xdist the tests run in one process."""
    workers = 1 if tiny else max(1, min(14, (os.cpu_count() or 1) - 2))  # leave two cores to other processes
    parallel = ("-n", str(workers), "--dist", "worksteal") if workers > 1 and importlib.util.find_spec("xdist") else ()
    plugins = ("-p", "bench.gpu.suite", "-p", "no:cacheprovider", "-m", "not hypothesis")
    files = [f"tests/{name}" for name in (TINY if tiny else CHOSEN)]
    return ("-m", "pytest", "-q", *parallel, "--device", device, "--maxfail=60", "--tb=short", *plugins, *files)


def is_wanted(item):
    """Whether a test needs a GPU: not if it asks for a backend of plain torch or of the CPU."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return not {"torch", "cpp"} & {parameters.get("backend"), parameters.get("attention_backend")}


def pytest_runtest_logreport(report):
    """Print a failure at once: the time may be up before pytest's own summary."""
    if report.failed:
        last = str(report.longrepr).strip().splitlines()[-1]
        print(f"\nFAILED {report.nodeid}: {last[:300]}", flush=True)


def pytest_collection_modifyitems(config, items):
    """Keep the wanted tests. `-m "not hypothesis"` leaves out random examples: each would compile its own kernel."""
    unwanted = [item for item in items if not is_wanted(item)]
    items[:] = [item for item in items if is_wanted(item)]
    config.hook.pytest_deselected(items=unwanted)
