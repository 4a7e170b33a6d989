#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Make a CUDA build of torch importable without the CUDA libraries that it asks for, which are gigabytes:

    python3 .ci/stub_cuda.py FOLDER/site-packages/torch

For each library that torch's own need and that lies neither beside them nor on this machine, gcc makes a small one in
torch/lib. Its functions do nothing but return 100, which is cudaErrorNoDevice. So torch finds no GPU, and all that it
does on a CPU is its own code. PyPI has no other torch for Linux on x86-64.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

LDCONFIG = shutil.which("ldconfig") or "/sbin/ldconfig"  # a user's PATH may lack /sbin
DRIVER = "libcuda.so.1"  # torch loads it only where there is a GPU
OF_CUDA = re.compile(r"_*(cu|nv|nccl)")  # the names of functions that carry no version
SAYS = re.compile(r"Get(Error|Status|LastError)\w*(String|Name)$|GetErrorMessage")


def _lines(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def missing(folder):
    """{library: the names to define in it} for the libraries that the loader would not find."""
    libraries = sorted(path for path in folder.glob("*.so*") if path.is_file())
    known = {path.name for path in libraries}
    known |= set(re.findall(r"^\s+(\S+) ", "\n".join(_lines(LDCONFIG, "-p")), re.M))
    needed, wanted, defined = {}, {}, set()
    for path in libraries:
        for found in re.finditer(r"NEEDED.*\[(\S+)\]", "\n".join(_lines("readelf", "-dW", path))):
            needed[found[1]] = None
        for line in _lines("nm", "-D", path):
            kind, name = line.split()[-2:]
            name, _, version = name.partition("@")
            if kind == "U":
                wanted[name] = version
            else:
                defined.add(name)
    absent = [name for name in needed if name not in known and name != DRIVER]
    made = {library: {} for library in absent}
    for name, version in wanted.items():
        if name in defined:
            continue
        if version in made:
            made[version][name] = version
        elif version == "NVSHMEM":
            made[next(library for library in absent if "nvshmem" in library)][name] = version
        elif not version and OF_CUDA.match(name):  # any of them may define it: the loader searches them all
            made[next(library for library in absent if library not in wanted.values())][name] = None
    return made


def write(folder, library, names):
    """Compile one library into `folder`."""
    says = 'const char *{}(void) {{ return "a stub of .ci/stub_cuda.py"; }}'
    code = [(says if SAYS.search(name) else "long {}(void) {{ return 100; }}").format(name) for name in names]
    version = next(filter(None, names.values()), None)
    script = folder / "stub.map"
    script.write_text(f"{version} {{ global: *; }};" if version else "{ global: *; };")
    command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", "-x", "c", "-", "-o", str(folder / library)]
    command += [f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
    subprocess.run(command, input="\n".join(code) + "\n", text=True, check=True)
    script.unlink()


def main():
    """Write what is missing."""
    folder = Path(sys.argv[1], "lib")
    for library, names in missing(folder).items():
        write(folder, library, names)
        print(f"{library}: {len(names)} functions that return 100")


if __name__ == "__main__":
    main()
