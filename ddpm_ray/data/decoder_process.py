"""A process that decodes encoded images, and its side of the parent.

Files and pixels are in shared memory. Requests on its stdin and answers on its stdout are one short
line of JSON each:

    [bytes of each file] -> [], or [number of a file, problem, remedy]

A decoder ends when its stdin closes and, on Linux, when the thread that started it ends: none
outlives its parent, however that ends. This module is the program of a decoder too, so it imports
nothing heavy.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST_DECODE_S = 60.0  # of one request; then the decoder counts as dead
PROGRAM = "from ddpm_ray.data.decoder_process import main; main()"
PR_SET_PDEATHSIG = 1  # Linux: a signal for this process at the end of the thread that started it


class DecoderProcess:
    """One decoder process and its shared memory: pixels, then files."""

    def __init__(
        self, encoding: str, shape: tuple[int, ...], pixels_bytes: int, files_bytes: int
    ) -> None:
        self.pixels_bytes, self.files_bytes = pixels_bytes, files_bytes
        self.death = "ended"
        self._asked_s = 0.0
        with _memory_file(pixels_bytes + files_bytes) as file:
            self._memory = mmap.mmap(file.fileno(), pixels_bytes + files_bytes)
            settings = [file.fileno(), pixels_bytes, files_bytes, encoding, shape, os.getpid()]
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[file.fileno()],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(part or "." for part in sys.path),
                    # NumPy starts a thread for each core of the node when it is imported.
                    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
                },
                process_group=0,  # Ctrl-C in a terminal is for the training process
            )
        self.pid = self._process.pid

    def fileno(self) -> int:
        """Return what becomes readable with an answer, for `wait`."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def request(self, files: list[Any]) -> None:
        """Ask for the pixels of these files; a dead decoder shows in `answer`."""
        at = self.pixels_bytes
        for file in files:
            self._memory[at : at + len(file)] = file
            at += len(file)
        self._asked_s = time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # shorter than a pipe holds: it never blocks
            os.write(self._process.stdin.fileno(), _line([len(file) for file in files]))

    def answer(self, out: npt.NDArray[np.uint8]) -> list[Any] | None:
        """Copy the pixels to `out`; return [] or [number, problem, remedy]; None: it died."""
        assert self._process.stdout is not None
        if self.overdue_s() < 0:
            self.death = f"gave no answer for {LONGEST_DECODE_S:.0f} s"
            return None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._process.wait()
            code = self._process.returncode
            self.death = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            )
            return None
        found: list[Any] = json.loads(line)
        if not found:
            pixels = np.frombuffer(self._memory, np.uint8, out.size)
            out[...] = pixels.reshape(out.shape)
        return found

    def overdue_s(self) -> float:
        """Seconds until this decoder counts as dead."""
        return self._asked_s + LONGEST_DECODE_S - time.monotonic()

    def kill(self) -> None:
        """Kill the process; whoever waits for its answer sees its death."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process and release its pipes."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def main() -> None:
    """Decode what the parent asks for, until it closes stdin: the program of a decoder."""
    file, pixels_bytes, files_bytes, encoding, shape, parent = json.loads(sys.argv[1])
    if sys.platform == "linux":  # for a decoder that is frozen when its parent dies
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    from ddpm_ray.data.image_shape import ImageShape
    from ddpm_ray.data.packing import image_files

    memory = memoryview(mmap.mmap(file, pixels_bytes + files_bytes))
    image_shape, size = ImageShape(*shape), math.prod(shape)
    for line in sys.stdin.buffer:
        at, answer = pixels_bytes, list[Any]()
        for number, file_bytes in enumerate(json.loads(line)):
            try:
                stored = memory[at : at + file_bytes]
                pixels = image_files.decode_stored(stored, encoding, image_shape)
            except image_files.BadImageError as error:
                answer = [number, *error.args[1:]]
                break
            memory[number * size : (number + 1) * size] = pixels.tobytes()
            at += file_bytes
        sys.stdout.buffer.write(_line(answer))
        sys.stdout.buffer.flush()


@contextlib.contextmanager
def _memory_file(size: int) -> Iterator[Any]:
    """Yield an open file of `size` bytes in memory that has no name, so that none is left over.

    /dev/shm is no place for it: containers limit it to 64 MB.
    """
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("image-decoder"), "r+b", buffering=0) as file:
            file.truncate(size)
            yield file
        return
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        yield file


def _line(value: list[Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
