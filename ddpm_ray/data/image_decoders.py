"""Decode encoded images in processes of their own.

Decoding in threads of the training process slowed the launch of each operation there: Pillow holds
the interpreter's lock for part of its work.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_ray.data.decoder_process import DecoderProcess

log = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 2**20  # of pixels or files, unless one image is larger
# In a chunk: fewer do not pay for another process; the request of more might fill the pipe.
LEAST_IMAGES, MOST_IMAGES = 8, 256


class UndecodableError(RuntimeError):
    """A file that is no image of the data set; args are (its number, problem, remedy)."""


class DecoderDiedError(RuntimeError):
    """Two decoders died of one image; args are (image, how the second one died)."""

    def __str__(self) -> str:
        image, how = self.args
        return (
            f"{image}: the image decoder {how} and so did the one before; pack the data set again "
            "without this image, or give the worker more memory"
        )


class ImageDecoders:
    """A pool of at most `processes` decoders of one encoding, to uint8 [H, W, C].

    They start when they are needed. One thread at a time may call `decode`; any may call `close`.
    """

    def __init__(self, encoding: str, image_shape: Sequence[int], processes: int) -> None:
        self._encoding, self._shape, self._processes = encoding, tuple(image_shape), processes
        self._sample_bytes = math.prod(image_shape)
        self._idle: list[DecoderProcess] = []
        self._all: set[DecoderProcess] = set()
        self._closed = False
        self._in_use = threading.Lock()  # by a call of `decode`

    def __enter__(self) -> ImageDecoders:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the decoders that were started and have not died."""
        return [decoder.pid for decoder in self._all]

    def decode(self, files: Sequence[Any], out: npt.NDArray[np.uint8]) -> None:
        """Decode n files (buffers) to the rows of `out` [n, H * W * C].

        The images of a decoder that dies are decoded one by one by others. Raises UndecodableError,
        and DecoderDiedError if a second one dies of the same image; its `args[0]` is the number.
        """
        chunks = deque(self._chunks(files))
        died_of: set[int] = set()  # images that were alone in a decoder that died
        busy: dict[DecoderProcess, range] = {}
        self._in_use.acquire()
        try:
            while chunks or busy:
                while chunks and len(busy) < self._processes:
                    chunk = chunks.popleft()
                    decoder = self._decoder([len(files[at]) for at in chunk])
                    busy[decoder] = chunk
                    decoder.request([files[at] for at in chunk])
                for decoder in _answered(busy):
                    chunk = busy.pop(decoder)
                    if (answer := decoder.answer(out[chunk.start : chunk.stop])) is None:
                        chunks.extendleft(reversed(self._again(decoder, chunk, died_of)))
                        continue
                    self._idle.append(decoder)
                    if answer:
                        raise UndecodableError(chunk.start + answer[0], *answer[1:])
        finally:
            for decoder in busy:  # after an error: their answers are of no use
                self._end(decoder)
            self._in_use.release()

    def close(self) -> None:
        """End the decoders; a `decode` in another thread raises RuntimeError."""
        self._closed = True
        for decoder in list(self._all):
            decoder.kill()  # which ends such a `decode`
        with self._in_use:
            self._idle.clear()
            for decoder in list(self._all):
                self._end(decoder)

    def _chunks(self, files: Sequence[Any]) -> Iterator[range]:
        """Yield runs of files that fit a decoder's memory, of about equal shares of all."""
        share = max(LEAST_IMAGES, math.ceil(len(files) / self._processes))
        most = max(1, min(share, CHUNK_BYTES // self._sample_bytes, MOST_IMAGES))
        start, held = 0, 0
        for at, file in enumerate(files):
            if at > start and (at - start == most or held + len(file) > CHUNK_BYTES):
                yield range(start, at)
                start, held = at, 0
            held += len(file)
        if files:
            yield range(start, len(files))

    def _decoder(self, sizes: list[int]) -> DecoderProcess:
        """Return an idle decoder with memory for files of these sizes, or start one."""
        pixels = max(CHUNK_BYTES, self._sample_bytes)
        needed = max(CHUNK_BYTES, sum(sizes))
        while self._idle:
            decoder = self._idle.pop()
            if decoder.files_bytes >= needed:
                return decoder
            self._end(decoder)
        decoder = DecoderProcess(self._encoding, self._shape, pixels, needed)
        self._all.add(decoder)
        self._require_open(decoder)  # `close` may not have seen it
        return decoder

    def _again(self, decoder: DecoderProcess, chunk: range, died_of: set[int]) -> list[range]:
        """Report a death; return the images to decode again. Raises DecoderDiedError."""
        self._require_open(decoder)
        self._end(decoder)
        log.warning("image decoder %d %s; another one takes over", decoder.pid, decoder.death)
        if len(chunk) == 1:
            if chunk.start in died_of:
                raise DecoderDiedError(chunk.start, decoder.death)
            died_of.add(chunk.start)
        return [range(at, at + 1) for at in chunk]

    def _require_open(self, decoder: DecoderProcess) -> None:
        """End `decoder` and raise RuntimeError after `close`."""
        if self._closed:
            self._end(decoder)
            raise RuntimeError("these image decoders are closed")

    def _end(self, decoder: DecoderProcess) -> None:
        self._all.discard(decoder)
        decoder.end()


def _answered(busy: dict[DecoderProcess, range]) -> list[DecoderProcess]:
    """Wait for answers, deaths or time-outs; return these decoders."""
    left_s = max(0.0, min(decoder.overdue_s() for decoder in busy))
    ready: list[Any] = wait(list(busy), left_s)  # type: ignore[arg-type]  # they have a fileno()
    return ready or [decoder for decoder in busy if decoder.overdue_s() <= 0]
