"""The compiled half of fake_cuda.py, built once for each version of torch. Imports no torch.

The dynamic linker must load it before torch (LD_PRELOAD), so only a process that `environment`
prepared can make fake CUDA tensors.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
PRELOADED = "LD_PRELOAD"


class NoFakeCudaError(RuntimeError):
    """There can be no fake CUDA tensors on this machine; the text says why."""


def library() -> Path:
    """The shared library, from the cache folder or built in about 2 s. Raises NoFakeCudaError."""
    torch = _torch_folder()
    if any((torch / "lib").glob("*torch_cuda*")):
        raise NoFakeCudaError("torch has CUDA of its own; where there is a GPU run make gpu-check")
    if sys.platform != "linux":
        raise NoFakeCudaError(f"a library is loaded before torch on Linux, not on {sys.platform}")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoFakeCudaError("there is no C++ compiler (c++, g++ or clang++) on the PATH")
    cache = Path(tempfile.gettempdir()) / f"ddpm-ray-fake-cuda-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.is_symlink() or cache.stat().st_uid != os.getuid():  # its files are executed
        raise NoFakeCudaError(f"{cache} belongs to another user; set TMPDIR to a folder of yours")
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{version} {torch} {compiler}".encode())
    built = cache / f"{key.hexdigest()[:16]}.so"
    if built.is_file():
        return built
    part = built.with_suffix(f".{os.getpid()}")
    lib = torch / "lib"
    command = [
        compiler,
        "-std=c++20",
        "-O0",
        "-shared",
        "-fPIC",
        f"-I{torch / 'include'}",
        str(SOURCE),
        "-o",
        str(part),
        f"-L{lib}",
        "-lc10",
        "-ltorch_cpu",
        f"-Wl,-rpath,{lib}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise NoFakeCudaError(f"{compiler} cannot build {SOURCE.name} against torch: {first}")
    part.replace(built)  # of two that build at once both are whole
    return built


def environment() -> dict[str, str]:
    """This process's environment for a child that makes fake CUDA tensors."""
    others = [os.environ[PRELOADED]] if os.environ.get(PRELOADED) else []
    return {**os.environ, PRELOADED: ":".join([str(library()), *others])}


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise NoFakeCudaError("torch is not installed")
    return Path(found.origin).parent
