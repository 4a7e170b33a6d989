# SPDX-License-Identifier: MIT
"""The kernel cache of `bench gpu`: which kernels it gets, which process finds them, and what a miss says."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the cache needs the extra `triton`")
for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench.gpu import archive  # noqa: E402
from bench.gpu.cache import Cache, kernels_in  # noqa: E402

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))


LAUNCH = """
import triton
from bench import fake_cuda
from bench.gpu import record, smoke_cases
fake = fake_cuda.install()
triton.knobs.runtime.kernel_load_end_hook.remove(fake.declare)  # it reads PTX, which is not stored
fake.record(False)
record.let_cpu_tensors_through()
smoke_cases.CASES["expand bf16, odd"]("cpu", 512)
print("launched")
"""


def call(*words, **environment):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT | environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def launches_in(path):
    return pickle.loads(path.read_bytes())["launches"]


def a_tar(tmp_path, folder, about):
    (tmp_path / "filled" / "KEY").mkdir(parents=True)
    (tmp_path / "filled" / "KEY" / "k.cubin").write_text("binary")
    (tmp_path / "filled" / "OTHER").mkdir()
    facts = {"triton_key": archive.own_key(), "triton": "3.6.0", "python": "3.12.3", "folder": str(folder)}
    facts |= {"sources": archive.sources()} | about
    archive.write(tmp_path / "c.tar", tmp_path / "filled", ["KEY"], facts)
    return tmp_path / "c.tar"


def test_a_cache_for_this_triton_is_unpacked(tmp_path):
    folder = tmp_path / "of nobody yet" / "cache"
    cache = Cache(a_tar(tmp_path, folder, {}), folder)
    line = cache.open()
    assert "hit" in line and "1 kernels" in line and "changed" not in line and "\n" not in line
    assert [path.name for path in folder.iterdir()] == ["KEY"]
    assert cache.news() == "kernels compiled anew: 0"
    (folder / "NEW").mkdir()
    (folder / "NEW" / "k.cubin").write_text("binary")
    assert cache.news() == "kernels compiled anew: 1"


@pytest.mark.parametrize(
    "about, words",
    [
        (
            {"triton_key": "0" * 64},
            [
                "miss",
                "Triton 3.6.0",
                "Python 3.12.3",
                f"triton_key {'0' * 12};",
                f"here it is {archive.own_key()[:12]}",
            ],
        ),
        ({"folder": "/elsewhere"}, ["miss", "/elsewhere"]),
        ({"sources": "other"}, ["hit", "sources have changed"]),
    ],
)
def test_a_cache_that_does_not_fit_says_so_in_one_line(about, words, tmp_path):
    folder = tmp_path / "cache"
    line = Cache(a_tar(tmp_path, folder, about), folder).open()
    assert all(word in line for word in words) and "\n" not in line
    assert kernels_in(folder) == ("hit" in words)


@pytest.mark.parametrize("about", [None, {"folder": "/elsewhere"}, {}], ids=["none", "miss", "hit"])
def test_only_kernels_that_this_run_compiled_are_news(about, tmp_path):
    folder = tmp_path / "cache"
    (folder / "OF_AN_EARLIER_RUN").mkdir(parents=True)
    (folder / "OF_AN_EARLIER_RUN" / "k.cubin").write_text("binary")
    cache = Cache(None if about is None else a_tar(tmp_path, folder, about), folder)
    line = cache.open()
    assert about is not None or line.endswith(f"none given; {folder} holds 1 kernels")
    assert cache.given == 1 + (about == {}) and cache.news() == "kernels compiled anew: 0"


def test_without_triton_every_cache_is_a_miss(tmp_path, monkeypatch):
    tar = a_tar(tmp_path, tmp_path / "cache", {})
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", None)
    assert Cache(tar, tmp_path / "cache").open().endswith("here it is None")


def test_another_source_is_seen(tmp_path, monkeypatch):
    """Whatever file of the kernels has changed."""
    monkeypatch.setattr(archive, "ROOT", tmp_path)
    paths = [tmp_path / source.replace("*", "a") for source in archive.SOURCES]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    seen = {archive.sources()}
    for path in paths:
        path.write_text("after")
        seen.add(archive.sources())
    assert len(seen) == 1 + len(paths)


@pytest.mark.slow
def test_every_case_of_the_smoke_is_recorded_at_its_real_length(tmp_path):
    """This also shows that each case is valid at that length, at least on the way to the compiler."""
    output = call("-m", "bench.gpu.record", tmp_path / "l.pickle", "-m", "bench.gpu.smoke", "--device", "cuda")
    assert "FAIL" not in output
    names = [name for _, name, *_ in launches_in(tmp_path / "l.pickle")]
    assert {"_expand_kernel", "_reduce_kernel", "_forward_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel"} <= {
        *names
    }
    assert names.count("_forward_kernel") >= 10


@pytest.mark.slow
def test_a_bench_is_recorded_with_the_launches_of_its_real_length(tmp_path):
    words = ("-m", "bench", "attention", "--device", "cuda", "--dtype", "bf16", "--seq", "4096", "--peer", "eager")
    call("-m", "bench.gpu.record", tmp_path / "a.pickle", *words, "--batch", "1", "--heads", "2")
    kernels = {name: (signature, attrs) for _, name, signature, _, attrs, _ in launches_in(tmp_path / "a.pickle")}
    assert {"_forward_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel"} <= set(kernels)
    signature, attrs = kernels["_forward_kernel"]
    assert signature["query_ptr"] == "*bf16"
    names = list(signature)
    assert ["tt.divisibility", 16] in attrs[(names.index("query_ptr"),)], "tensors are aligned to 16 bytes there"


@pytest.mark.slow
def test_the_tests_are_recorded(tmp_path):
    words = (
        "-m",
        "pytest",
        "-q",
        "--device",
        "cuda",
        "--maxfail=20",
        "-p",
        "bench.gpu.suite",
        "-p",
        "no:cacheprovider",
    )
    call("-m", "bench.gpu.record", tmp_path / "t.pickle", *words, "tests/attention/test_kernels.py")
    assert {"_forward_kernel", "_dtable_kernel"} <= {name for _, name, *_ in launches_in(tmp_path / "t.pickle")}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton needs gcc for its launchers")
def test_what_was_filled_is_found_by_another_process(tmp_path):
    """A second fill compiles nothing either."""
    recorded, folder = tmp_path / "l.pickle", tmp_path / "cache"
    call("-m", "bench.gpu.record", recorded, "-m", "bench.gpu.smoke", "--device", "cuda", "--only", "expand bf16, odd")
    count = len(launches_in(recorded))
    assert count == 3
    environment = {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    first = call("-m", "bench.gpu.fill", tmp_path / "c.tar", recorded, **environment)
    assert f"{count} kernels, 0 failed" in first and kernels_in(folder) == count
    again = call("-m", "bench.gpu.fill", tmp_path / "c.tar", recorded, **environment)
    assert f"{count} kernels, 0 failed; 0 of" in again

    shutil.rmtree(folder)
    cache = Cache(tmp_path / "c.tar", folder)
    assert "hit" in cache.open()
    assert cache.given == count
    before = sorted(folder.glob("*/*"))
    assert "launched" in call("-c", LAUNCH, **environment)
    assert sorted(folder.glob("*/*")) == before, "a kernel or a launcher was compiled"
    assert cache.news() == "kernels compiled anew: 0"
