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
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
PRELOADED = "LD_PRELOAD"


class NoCompilerError(RuntimeError):
    """The library cannot be built on this machine; the text says why."""


def library() -> Path:
    """The shared library, from the cache folder or built in about 2 s. Raises NoCompilerError."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or os.name != "posix":
        raise NoCompilerError("there is no C++ compiler (c++, g++ or clang++) on the PATH")
    torch = _torch_folder()
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{version} {torch} {compiler}".encode())
    cache = Path(tempfile.gettempdir()) / f"ddpm-ray-fake-cuda-{os.getuid()}"
    built = cache / f"{key.hexdigest()[:16]}.so"
    if built.is_file():
        return built
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise NoCompilerError(f"{cache} belongs to another user; set TMPDIR to a folder of yours")
    part = built.with_suffix(f".{os.getpid()}")
    lib = torch / "lib"
    command = [
        compiler, "-std=c++20", "-O0", "-shared", "-fPIC", "-D_GLIBCXX_USE_CXX11_ABI=1",
        f"-I{torch / 'include'}", str(SOURCE), "-o", str(part),
        f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise NoCompilerError(f"{compiler} cannot build {SOURCE.name} against torch: {first}")
    part.replace(built)  # of two that build at once both are whole
    return built


def environment() -> dict[str, str]:
    """This process's environment for a child that makes fake CUDA tensors."""
    others = [os.environ[PRELOADED]] if os.environ.get(PRELOADED) else []
    return {**os.environ, PRELOADED: ":".join([str(library()), *others])}


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise NoCompilerError("torch is not installed")
    return Path(found.origin).parent
