# SPDX-License-Identifier: MIT
"""The tar of a compiled cache, and facts about it. Imports only the standard library and Triton."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

ABOUT = "dpb_triton_cache.json"
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("dpb_triton/launching/*.py", "dpb_triton/attention/kernels/*.py", "dpb_triton/expand/triton_kernels.py")


def own_key():
    """SHA-256 of the `triton_key` of this interpreter's Triton; None without Triton."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        return None
    return hashlib.sha256(triton_key().encode()).hexdigest()


def sources():
    """A hash of the kernels' source files."""
    paths = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def read_about(path):
    """The facts that `write` stored in the tar."""
    with tarfile.open(path) as tar:
        return json.load(tar.extractfile(ABOUT))


def unpack(path, folder):
    """Extract all entries into `folder`."""
    with tarfile.open(path) as tar:
        # Python before 3.11.4 and 3.10.12 has no filters; `write` made the tar
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (Path(folder) / ABOUT).unlink()


def write(path, folder, names, about):
    """Write the tar `path` with the entries `names` of the cache `folder`, and the facts `about` it."""
    with tarfile.open(path, "w:xz", preset=3) as tar:
        data = json.dumps(about).encode()
        member = tarfile.TarInfo(ABOUT)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
        for name in sorted(names):
            tar.add(Path(folder) / name, arcname=name)
