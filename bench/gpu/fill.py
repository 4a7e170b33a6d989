# SPDX-License-Identifier: MIT
"""`python -m bench.gpu.fill TAR LAUNCHES.pickle…`: compile recorded launches into the cache, then into a tar.

It runs under the lent machine's versions of Python and Triton, and needs no torch: kernels only import it. Kernels that
have not changed come from the cache; the tar holds only this fill's kernels. It also holds the launchers, C code that
Triton compiles for each list of types; they are linked against an empty libcuda.so.1.
"""

import ctypes
import importlib.util
import multiprocessing
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest.mock import MagicMock

from . import archive, offline


def _without_torch():
    """Make the kernels' modules importable without the package above them, and without torch."""
    for folder in {folder for source in archive.SOURCES for folder in Path(source).parents} - {Path(".")}:
        module = types.ModuleType(".".join(folder.parts))
        module.__path__ = [str(archive.ROOT / folder)]
        sys.modules[module.__name__] = module
    if importlib.util.find_spec("torch") is None:
        sys.modules["torch"] = MagicMock()


def _keep_names(used):
    """Add the names of all cache entries that Triton looks at to `used`."""
    from triton.runtime import cache

    init = cache.FileCacheManager.__init__

    def noting(self, key, *rest, **options):
        used.add(key)
        init(self, key, *rest, **options)

    cache.FileCacheManager.__init__ = noting


def compile_one(launch):
    """(name, cache entries, error) of one launch."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import ASTSource, compile

    module, name, signature, constexprs, attrs, options = launch
    USED.clear()
    try:
        function = getattr(importlib.import_module(module), name)
        source = ASTSource(function, signature, constexprs, attrs)
        kernel = compile(source, target=offline.TARGET, options=options)
        CudaLauncher(source, kernel.metadata)
    except Exception as error:
        return name, set(), f"{type(error).__name__}: {error}"
    return name, set(USED), None


def _utilities():
    """Compile the C module of Triton's driver; returns its cache entries."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    USED.clear()
    compile_module_from_src(
        src=Path(driver.dirname, "driver.c").read_text(), name="cuda_utils", library_dirs=driver.library_dirs(),
        include_dirs=driver.include_dirs, libraries=driver.libraries,
    )  # fmt: skip
    return set(USED)


def _empty_libcuda(folder):
    """Build an empty libcuda for Triton's C code to link and load; with lazy binding nobody looks up its functions."""
    library = Path(folder) / "libcuda.so.1"
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), "-x", "c", os.devnull]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.setdlopenflags(os.RTLD_LAZY)


def read(files):
    """The launches of all files, each once."""
    import triton

    found = {}
    for file in files:
        recorded = pickle.loads(Path(file).read_bytes())
        if recorded["triton"] != triton.__version__:
            sys.exit(
                f"recorded under Triton {recorded['triton']}, compiled under {triton.__version__}: the interpreter "
                "that records must import the same version"
            )
        for launch in recorded["launches"]:
            found.setdefault(repr(launch), launch)
    return list(found.values())


def main(tar, *files):
    """Compile, write the tar, print a summary; returns 1 if a kernel did not compile."""
    import triton

    begin = time.monotonic()
    _without_torch()
    offline.install()
    launches, used, failures = read(files), set(), 0
    folder = Path(triton.knobs.cache.dir)
    before = {path.name for path in folder.glob("*")} if folder.exists() else set()
    with tempfile.TemporaryDirectory() as scratch:
        _empty_libcuda(scratch)
        used |= _utilities()
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            for done, (name, entries, error) in enumerate(pool.imap_unordered(compile_one, launches), 1):
                used |= entries
                if error:
                    failures += 1
                    print(f"{name}: {error[:300]}", flush=True)
                elif done % 50 == 0:
                    print(f"{done} of {len(launches)}, {time.monotonic() - begin:.0f} s", flush=True)
    facts = {"triton": triton.__version__, "python": platform.python_version(), "kernels": len(launches)}
    facts |= {"triton_key": archive.own_key(), "sources": archive.sources(), "folder": str(folder)}
    archive.write(tar, folder, used, facts)
    size = Path(tar).stat().st_size / 2**20
    new = len(used - before)
    print(
        f"{len(launches)} kernels, {failures} failed; {new} of {len(used)} entries are new; {size:.1f} MiB in {tar}; "
        f"{time.monotonic() - begin:.0f} s"
    )
    return 1 if failures else 0


USED = set()

if __name__ == "__main__":
    _keep_names(USED)
    sys.exit(main(*sys.argv[1:]))
