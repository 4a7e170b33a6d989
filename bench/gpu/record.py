# SPDX-License-Identifier: MIT
"""`python -m bench.gpu.record FILE -m MODULE ARGUMENTS…`: record which kernels that command would compile on an H100.

The command runs in this process, on CPU tensors. Every launch takes Triton's real path up to the compiler, where it is
recorded and dropped. So the results mean nothing, and nothing compares them. Benches run only this library's Triton
backend and call each function once; tests run without their oracles.
"""

import contextlib
import importlib
import os
import pickle
import sys

import click
import torch
import triton
from triton.runtime.jit import JITFunction

from . import offline


class Recorder:
    """The launches of this process, each kernel and specialisation once, in the order of their first launch."""

    def __init__(self):
        self.launches = {}

    def install(self):
        """Record every launch of this process from now on."""
        os.environ.pop("TRITON_INTERPRET", None)
        offline.install()

        def record(kernel, key, signature, device, constexprs, options, attrs, warmup):
            if "fp64" in str(signature.get("query_ptr")):
                return  # on a GPU float64 attention is torch's
            options = {name: value for name, value in vars(options).items() if name != "extern_libs"}
            found = (kernel.fn.__module__, kernel.fn.__name__, signature, constexprs, attrs, options)
            self.launches.setdefault(repr(found), found)

        JITFunction._do_compile = record

    def write(self, path):
        """Pickle Triton's version and the launches."""
        with open(path, "wb") as file:
            pickle.dump({"triton": triton.__version__, "launches": list(self.launches.values())}, file)


def _modules(prefix):
    return [module for name, module in sys.modules.items() if name.startswith(prefix)]


def replace(name, value):
    """Set `name` to `value` in every module of the bench that has it; at least one must have it."""
    found = [module for module in _modules("bench.") if name in vars(module)]
    if not found:
        raise RuntimeError(f"the bench has no {name} any more: update bench/gpu/record.py")
    for module in found:
        setattr(module, name, value)


def let_cpu_tensors_through():
    """Let backend "triton" serve CPU tensors, and make it the default backend."""
    from dpb_triton import dispatch

    dispatch.is_interpreting = lambda: True
    for module in _modules("dpb_triton"):
        for name in {"check_backend", "check_attention_backend"} & vars(module).keys():
            setattr(module, name, _prefer_triton(getattr(module, name)))
    assert dispatch.why_not("triton", "cpu") is None


def _prefer_triton(check):
    def checked(backend, *rest):
        if backend is None:
            with contextlib.suppress(ValueError):  # float64 attention is torch's
                return check("triton", *rest)
        return check(backend, *rest)

    return checked


def _make_nothing_expensive():
    """Make random tensors uninitialised memory, which nobody touches."""
    torch.randn = lambda *size, generator=None, **options: torch.empty(*size, **options)
    torch.Tensor.normal_ = lambda self, *rest, **options: self


DROPPED = ("--peer", "--lines", "--limit")  # each with the word that follows it


def _bench(arguments):
    """Run a command of `python -m bench` on the CPU, without peers, each call once."""
    from bench.__main__ import MODULES, cli
    from bench.timing import Time

    if arguments[0] == "attention" and "--memory" in arguments:
        return  # it starts other processes; its kernels are those of the other lengths
    if arguments[0] == "sweep":
        return _sweep(arguments)
    if arguments[0] == "host":
        return _host(arguments)
    importlib.import_module(MODULES[arguments[0]], "bench")
    replace("default_backends", lambda device: ("triton",))
    replace("why_not_measured", lambda backend, device: None if backend == "triton" else "is not recorded")
    replace("peak_mib", lambda call, device: (call(), None)[1])
    replace("measure", lambda calls, *rest: {name: Time([1.0]) for name, call in calls.items() if [call()]})
    for kind in {vars(module).get("Cells") for module in _modules("bench.")} - {None}:
        kind.wrong = lambda self, direction, provider: None
        kind.limits = lambda self, direction: {}
    _make_nothing_expensive()

    words, drop = [], False
    for word in arguments:
        if not drop and word not in (*DROPPED, "--errors"):  # --errors makes the same launches
            words.append("cpu" if word == "cuda" else word)
        drop = word in DROPPED
    peers = ("--peer", "none") if arguments[0] in ("attention", "decode", "expand") else ()
    try:
        cli([*words, *peers], standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(2) from error


def _sweep(arguments):
    """Launch the candidates that the sweep would time on a GPU: those of the saved list."""
    from bench.sweep import command as sweep
    from bench.sweep import gpu as sweep_gpu

    calls_of = sweep_gpu.calls_of
    sweep_gpu.calls_of = lambda *problem: calls_of(*problem[:-1], "meta")
    sweep_gpu.prefill = lambda *rest: None
    sweep_gpu.time_group = lambda launch, offers, *rest: [launch(candidate) for candidate in offers] and {}
    sweep._arch_here = lambda archs: "sm_90"
    sweep._offline = lambda *rest: 0
    sweep.sweep([*arguments[1:]], standalone_mode=False)


def _host(arguments):
    """Make each call of `python -m bench host` once, without the fake driver that it uses on a CPU."""
    from bench import host

    host.fake_cuda.let_cpu_tensors_through = lambda: None
    host.measure = lambda calls, *rest: {name: (call(), 0.0)[1] for name, call in calls.items()}
    host.host(["cpu" if word == "cuda" else word for word in arguments[1:]], standalone_mode=False)


def _pytest(arguments, recorder):
    """Run the tests that the device would run; a failure means nothing."""
    import pytest

    class Plugin:
        @pytest.hookimpl(trylast=True)
        def pytest_configure(self, config):
            recorder.install()
            let_cpu_tensors_through()

        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items):
            for name in ("oracle", "attention_oracle"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name).assert_within_budget = lambda *rest, **options: None
            with contextlib.suppress(ImportError):
                importlib.import_module("attention_oracle").attention = _no_oracle

    words = [word for word in arguments if not word.startswith("--maxfail")]
    words = ["cpu" if word == "cuda" else word for word in words]
    for option in ("-n", "--dist"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    pytest.main([*words, "--tb=no", "--no-summary", "-W", "ignore", "-p", "no:xdist"], plugins=[Plugin()])


def _no_oracle(query, key, value, table, dout, dlse=None, *, options, keep=None):
    shapes = {
        "out": (*query.shape[:3], value.shape[3]), "lse": query.shape[:3], "dq": query.shape, "dk": key.shape,
        "dv": value.shape, "dtable": table.shape,
    }  # fmt: skip
    return {name: (torch.zeros(shape).double(),) * 2 for name, shape in shapes.items()}


def main(path, flag, module, *arguments):
    """Run the module, write the launches."""
    assert flag == "-m", flag
    recorder = Recorder()
    try:
        if module == "pytest":
            _pytest(arguments, recorder)
        else:
            recorder.install()
            let_cpu_tensors_through()
            if module == "bench":
                _bench(arguments)
            else:
                words = ["cpu" if word == "cuda" else word for word in arguments]
                importlib.import_module(module).record(words)
    finally:
        recorder.write(path)
        print(f"{module} {' '.join(arguments)[:100]}: {len(recorder.launches)} kernels", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
