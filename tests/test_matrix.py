# SPDX-License-Identifier: MIT
"""`make matrix`: which versions it runs, what it notes of them, and the empty CUDA libraries that let torch start."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

click_testing = pytest.importorskip("click.testing", reason="needs the extra `bench`")
pytest.importorskip("tabulate", reason="needs the extra `bench`")

ROOT = Path(__file__).parents[1]
FOLDERS = os.environ["PATH"].split(os.pathsep)
PYPROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def matrix(monkeypatch, tmp_path):
    """.ci/matrix.py, which writes into a folder of the test."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    module = importlib.import_module("matrix")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "matrix.json")
    return module


def test_the_oldest_row_is_what_pyproject_promises(matrix):
    row = matrix.ROWS["oldest"]
    for name, version in {
        "requires-python = ": row.python, "torch": row.torch, "triton": row.triton, "transformers": row.transformers,
        "x-transformers": row.x_transformers,
    }.items():  # fmt: skip
        (promised,) = set(re.findall(rf'"?(?<![\w-]){name}"?>=([\d.]+)"', PYPROJECT))
        assert (version + ".").startswith(promised + "."), name


def test_every_version_has_a_row(matrix):
    rows = matrix.ROWS.values()
    assert {row.python for row in rows} == {"3.10", "3.11", "3.12", "3.13"}
    assert {row.torch.rpartition(".")[0] for row in rows} == {f"2.{minor}" for minor in range(10, 16)}
    assert {row.triton.rpartition(".")[0] for row in rows} == {f"3.{minor}" for minor in range(6, 10)}
    assert len(set(rows)) == len(rows)


def test_torch_is_nobody_s_requirement(matrix):
    """Whatever pip installs with its requirements must not bring a torch of its own."""
    if importlib.util.find_spec("dpb_triton") and not list(importlib.metadata.Distribution.discover(name="dpb_triton")):
        pytest.skip("dpb_triton is used in place, not installed")
    plain = matrix.requirements()
    assert not any(re.match("(torch|x-transformers|dpb_triton|triton|build|ruff)", word) for word in plain)
    assert {"pytest>=8", "transformers>=5.20", "numpy>=1.26", "click>=8.1", "einx"} <= set(plain)
    libraries = ["triton==3.7.1", "transformers==5.24.0", "x-transformers==2.31.10"]
    assert matrix.PLAIN.libraries == libraries
    libraries = ["triton==3.6.0", "transformers==5.20.0", "x-transformers==2.0.5", "numpy==2.2.6"]
    assert matrix.ROWS["oldest"].libraries == libraries


def test_rows_share_environments_and_differ_in_libraries(matrix, monkeypatch):
    installed = []

    def pip(python, *words):
        installed.append(words)
        if "--target" in words:
            Path(words[2]).mkdir(parents=True)

    def start(command, **options):
        if "venv" in command:
            (command[-1] / "lib/python3.11/site-packages/torch").mkdir(parents=True)
        else:
            assert command[1].name == "stub_cuda.py" and command[2].name == "torch"

    monkeypatch.setattr(matrix, "pip", pip)
    monkeypatch.setattr(matrix, "find_python", str)
    monkeypatch.setattr(matrix, "is_reached", lambda address: False)
    monkeypatch.setattr(matrix, "requires", lambda name: [])  # a row's environment has this package in place only
    monkeypatch.setattr(matrix.subprocess, "run", start)
    half = matrix.environment_of(matrix.PLAIN) / "of a run that was killed"
    part = matrix.FOLDER / "libraries-3.11/triton==3.7.1.part/triton"
    for folder in (half, part):
        folder.mkdir(parents=True)
    matrix.prepare(matrix.PLAIN)
    assert not half.exists() and not (matrix.FOLDER / "libraries-3.11/triton==3.7.1/triton").exists()
    assert ("--no-deps", "torch==2.13.0") in installed
    added = [words[-1] for words in installed if "--target" in words]
    assert added == matrix.PLAIN.libraries
    installed.clear()
    row = matrix.ROWS["triton-3.9.0"]
    matrix.prepare(row)
    assert [words[-1] for words in installed] == ["triton==3.9.0"]
    (site,) = matrix.environment_of(row).glob("lib/python*/site-packages")
    scope = {}
    exec(
        (site / "row.pth").read_text().replace("import sys;", "import types; sys = types.SimpleNamespace(path=[9]);"),
        scope,
    )
    assert [Path(place).name for place in scope["sys"].path[:-1]] == row.libraries and scope["sys"].path[-1] == 9
    monkeypatch.setattr(matrix, "is_reached", lambda address: True)
    matrix.prepare(matrix.ROWS["torch-2.11"])
    assert any(words[1:3] == ("--index-url", matrix.CPU_INDEX) and words[3] == "torch==2.11.0" for words in installed)


def test_a_row_without_its_versions_does_not_run(matrix):
    row, site = matrix.PLAIN, matrix.FOLDER / "site"
    python = matrix.environment_of(row) / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" -S "$@"\n')  # sees that folder alone
    python.chmod(0o755)
    with pytest.raises(LookupError, match="torch"):
        matrix.verify(row)
    versions = {"torch": "2.13.0+cpu", "triton": "3.7.1", "transformers": "5.24.0", "x_transformers": "2.31.10"}
    for name, version in versions.items():
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    matrix.verify(row)
    with pytest.raises(LookupError, match=r"^triton is 3\.7\.1, not 3\.9\.0$"):
        matrix.verify(matrix.ROWS["triton-3.9.0"])


@pytest.mark.parametrize(
    ("last", "found"),
    [
        ("7 passed, 2 skipped in 3.10s", {"passed": 7, "skipped": 2}),
        ("1 failed, 7 passed, 2 errors in 3.10s", {"failed": 1, "passed": 7, "error": 2}),
        ("2 skipped in 0.10s", None),
    ],
)
def test_a_row_is_what_pytest_counted(matrix, last, found, tmp_path, monkeypatch):
    """Its Python sees no package of this one, and its scripts come first."""
    row = matrix.ROWS["transformers-5.20.0"]
    monkeypatch.setenv("PYTHONPATH", "of this Python")
    python = matrix.environment_of(row) / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho 99 passed\necho \"$PYTHONPATH,$PATH,$*\"\necho '{last}'\n")
    python.chmod(0o755)
    if found is None:
        with pytest.raises(LookupError, match="no test passed"):
            matrix.run(row, tmp_path / "log")
    else:
        assert matrix.run(row, tmp_path / "log").items() > found.items()
        said = (tmp_path / "log").read_text().splitlines()[1]
        assert said.startswith(f",{python.parent}{os.pathsep}") and said.endswith(" -m not slow tests/integrations")


def test_results_are_kept_in_the_order_of_the_rows(matrix, monkeypatch):
    from bench import pages

    def run(row, log):
        if row.torch == "2.15.0":
            raise LookupError("there is no Python 3.13 here")
        bad = {"3.8.0": {"passed": 5, "error": 1}, "3.9.0": {"passed": 1234, "failed": 1}}
        return bad.get(row.triton, {"passed": 5, "skipped": 2})

    written = []  # the number of rows whenever the pages are written
    write = SimpleNamespace(callback=lambda: written.append(len(json.loads(matrix.RESULTS.read_text()))))
    monkeypatch.setattr(matrix, "pages", write)
    monkeypatch.setattr(matrix, "prepare", lambda row: None)
    monkeypatch.setattr(matrix, "verify", lambda row: None)
    monkeypatch.setattr(matrix, "run", run)
    call = click_testing.CliRunner().invoke
    old = asdict(matrix.PLAIN) | {"passed": 5, "skipped": 2, "date": "then UTC", "sha": "1"}
    matrix.RESULTS.write_text(json.dumps({"of old": old}))
    assert call(matrix.main, ["triton-3.9.0"]).exit_code == 1
    assert call(matrix.main, ["triton-3.8.0"]).exit_code == 1
    assert call(matrix.main, ["transformers-5.20.0"]).exit_code == 0
    assert call(matrix.main, ["torch-2.12", "--parts", "tests/expand tests/module"]).exit_code == 0
    assert call(matrix.main, ["oldest"]).exit_code == 0
    done = call(matrix.main, ["newest"])
    assert done.exit_code == 1 and "newest" in done.output.splitlines()[-1]
    assert written == [2, 3, 4, 5, 6, 7]
    results = json.loads(matrix.RESULTS.read_text())
    tritons = ["triton-3.8.0", "triton-3.9.0"]
    assert list(results) == ["oldest", "torch-2.12", "newest", *tritons, "transformers-5.20.0", "of old"]
    assert all(result["date"].endswith("UTC") and "sha" in result for result in results.values())
    monkeypatch.setattr(pages, "ROOT", matrix.RESULTS.parent)
    table = pages.filled("<!-- matrix: matrix.json -->\n<!-- end of matrix -->").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[3:-1]]
    assert cells[0][:7] == ["3.10", "2.10.0", "3.6.0", "5.20.0", "2.0.5", "all", "5 passed, 2 skipped"]
    counts = "5 passed, 2 skipped"
    assert [row[6] for row in cells[1:]] == [
        counts, "there is no Python 3.13 here", "5 passed, 1 error", "1,234 passed, 1 failed", counts, counts,
    ]  # fmt: skip
    assert [row[5] for row in cells] == ["all", "expand module", "all", "all", "all", "integrations", "all"]


def test_what_pip_says_and_is_told(matrix, monkeypatch):
    seen = []

    def start(command, env, **options):
        seen.append((command, env))
        return SimpleNamespace(returncode=len(seen) - 1, stderr="ERROR: others\nERROR: no such version\nWARNING: old")

    monkeypatch.setattr(matrix.subprocess, "run", start)
    monkeypatch.setenv("PIP_CONSTRAINT", "of this machine")
    matrix.pip("python9", "einops")
    assert seen[0][0] == ["python9", "-m", "pip", "install", "-q", "einops"]
    assert seen[0][1]["PIP_CONSTRAINT"] == os.devnull
    with pytest.raises(LookupError, match="^ERROR: no such version$"):
        matrix.pip("python9", "einops")


def test_a_page_that_does_not_answer(matrix, monkeypatch):
    def refused(address, timeout):
        raise ConnectionRefusedError

    monkeypatch.setattr(matrix.urllib.request, "urlopen", refused)
    assert not matrix.is_reached("http://localhost")
    monkeypatch.setattr(matrix.urllib.request, "urlopen", lambda address, timeout: SimpleNamespace(status=200))
    assert matrix.is_reached("http://localhost")


def test_a_name_that_starts_no_python_is_passed_over(matrix, monkeypatch, tmp_path):
    pythons = [tmp_path / ".pyenv/versions/9.9.1/bin/python9.9", tmp_path / "bin/python9.9"]
    monkeypatch.setattr(matrix.Path, "home", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for python, code in zip(pythons, (1, 0), strict=True):
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        python.chmod(0o755)
    assert str(matrix.find_python("9.9")) == str(pythons[1])


def test_a_python_that_is_not_here(matrix):
    with pytest.raises(LookupError, match=r"no Python 9\.9"):
        matrix.find_python("9.9")


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="there is no gcc")
@pytest.mark.parametrize("path", [FOLDERS, [folder for folder in FOLDERS if "sbin" not in folder]])
def test_a_library_that_is_missing_is_replaced(path, tmp_path):
    """As torch: one function carries the version of its library, one carries none, one returns words."""
    library, versions = tmp_path / "lib", "libcudart.so.77 { global: *; };"
    library.mkdir()
    (tmp_path / "map").write_text(versions)
    code = {
        "libcudart.so.77": "int cudaOne(void) { return 1; } const char *cudaGetErrorString(void) { return 0; }",
        "libcufile.so.77": "int cuFileTwo(void) { return 2; }",
        "libtorch_test.so": "int cudaOne(void), cuFileTwo(void); const char *cudaGetErrorString(void);"
        "int one(void) { return cudaOne(); } int two(void) { return cuFileTwo(); }"
        "const char *words(void) { return cudaGetErrorString(); }",
    }
    for name, text in code.items():
        needed = [library / other for other in code if "cu" in other] if "torch" in name else [f"-Wl,-soname,{name}"]
        script = [f"-Wl,--version-script={tmp_path / 'map'}"] if "cudart" in name else []
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library / name, "-x", "none", *script, *needed]
        subprocess.run(command, input=text, text=True, check=True)
    for name in ("libcudart.so.77", "libcufile.so.77"):
        (library / name).unlink()
    command = [sys.executable, ROOT / ".ci/stub_cuda.py", tmp_path]
    done = subprocess.run(command, env=os.environ | {"PATH": os.pathsep.join(path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "libcudart.so.77: 2 functions that return 100\nlibcufile.so.77: 1 functions that return 100\n"
    for name in ("libcudart.so.77", "libcufile.so.77"):
        ctypes.CDLL(str(library / name), mode=ctypes.RTLD_GLOBAL)
    torch = ctypes.CDLL(str(library / "libtorch_test.so"))
    torch.words.restype = ctypes.c_char_p
    assert (torch.one(), torch.two()) == (100, 100) and b"stub" in torch.words()
