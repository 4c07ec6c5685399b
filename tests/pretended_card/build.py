"""Compiles the pretended card for the torch of this interpreter: ``python -m tests.pretended_card.build``.

About a minute with g++, once for each version of torch, of Python and of the sources.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("memory.h", "device.h", "call.h", "operators.cpp")
BUILT = FOLDER / "built"


def compiler() -> str | None:
    """The C++ compiler; None where there is none."""
    return os.environ.get("CXX") or shutil.which("g++")


def library() -> Path:
    """Where it is, or will be: its name holds all that it depends on."""
    sources = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()[:12]
    return BUILT / f"card-{version('torch')}-{sys.implementation.cache_tag}-{sources}.so"


def build() -> Path:
    """Compile it, unless that was done.

    Raises:
        FileNotFoundError: There is no compiler.
        subprocess.CalledProcessError: It does not compile.
    """
    target = library()
    if target.exists():
        return target
    found = compiler()
    if found is None:
        raise FileNotFoundError("the pretended card needs a C++ compiler: apt-get install g++")

    # torch is looked up, not imported: the library has to be loaded before it.
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    includes = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    partial = target.with_suffix(f".{os.getpid()}.partial")
    BUILT.mkdir(exist_ok=True)
    subprocess.run(
        [
            *(found, "-O1", "-std=c++20", "-shared", "-fPIC", "-w"),
            *("-DTORCH_EXTENSION_NAME=pretended", "-DTORCH_API_INCLUDE_EXTENSION_H"),
            *(f"-I{folder}" for folder in includes),
            *(str(FOLDER / "operators.cpp"), "-o", str(partial)),
            *(f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-ltorch_python", f"-Wl,-rpath,{torch / 'lib'}"),
        ],
        check=True,
    )
    partial.replace(target)  # two processes may compile at a time: each gets a whole file
    return target


if __name__ == "__main__":
    print(build())
