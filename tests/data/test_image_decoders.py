"""Images are decoded in processes: the pixels of Pillow, deaths are noticed, none is left over."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_ray.data import decoder_process, image_decoders
from ddpm_ray.data.dataset import Dataset, UInt8s
from ddpm_ray.data.decoder_process import DecoderProcess
from ddpm_ray.data.image_decoders import DecoderDiedError, ImageDecoders, UndecodableError
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import ShardStream, read_images
from ddpm_ray.data.packing.image_files import encode_image
from tests.limits import ENDS_S

SHAPE = ImageShape(5, 4, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, *SHAPE), dtype=np.uint8)
FILES = [encode_image(image, "png") for image in IMAGES]
# A decoder that is killed by the file "poison", as by one for which its memory does not suffice.
POISONED = """
import os
from ddpm_ray.data.packing import image_files
decode = image_files.decode_stored
def decode_or_die(file, *rest):
    if bytes(file) == b"poison":
        os.kill(os.getpid(), 9)
    return decode(file, *rest)
image_files.decode_stored = decode_or_die
"""


def decoded(decoders: ImageDecoders, files: list[bytes]) -> UInt8s:
    out = np.zeros((len(files), IMAGES[0].size), np.uint8)
    decoders.decode(files, out)
    return out.reshape(-1, *SHAPE)


@pytest.fixture(scope="module")
def two() -> Iterator[ImageDecoders]:
    """Two decoders for all tests of sound files."""
    with ImageDecoders("png", SHAPE, 2) as decoders:
        yield decoders


@settings(max_examples=20)
@given(st.lists(st.integers(0, 39), max_size=40), st.sampled_from([60, 200, 4 << 20]))
def test_the_pixels_are_those_of_the_files_in_any_chunks(
    two: ImageDecoders, chosen: list[int], chunk_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_decoders, "CHUNK_BYTES", chunk_bytes)
        found = decoded(two, [FILES[n] for n in chosen])
    assert np.array_equal(found, IMAGES[chosen])


def test_files_larger_than_a_chunk_are_decoded() -> None:
    large = np.random.default_rng(1).integers(0, 256, (1200, 1300, 3), dtype=np.uint8)
    out = np.empty((1, large.size), np.uint8)
    with ImageDecoders("png", ImageShape(*large.shape), 1) as decoders:
        file = encode_image(large, "png")
        assert len(file) > image_decoders.CHUNK_BYTES
        decoders.decode([file], out)
    assert np.array_equal(out.reshape(large.shape), large)


@pytest.mark.parametrize("at", [0, 17, 39])
def test_an_image_that_is_none_is_told_by_its_number(two: ImageDecoders, at: int) -> None:
    files = list(FILES)
    files[at] = b"no png"
    with pytest.raises(UndecodableError, match="not a readable png") as error:
        decoded(two, files)
    assert error.value.args[0] == at
    assert np.array_equal(decoded(two, FILES), IMAGES)  # an answer of before is not taken for one


def test_a_killed_decoder_is_named_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    with ImageDecoders("png", SHAPE, 2) as decoders:
        decoded(decoders, FILES)
        killed = decoders.pids[0]
        os.kill(killed, signal.SIGKILL)
        assert np.array_equal(decoded(decoders, FILES), IMAGES)
        assert np.array_equal(decoded(decoders, FILES), IMAGES)
        assert len(decoders.pids) == 2
    assert f"image decoder {killed} was killed by SIGKILL; another one takes over" in caplog.text


def test_an_image_that_kills_two_decoders_is_told_by_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder_process, "PROGRAM", POISONED + decoder_process.PROGRAM)
    files = [*FILES[:10], b"poison", *FILES[11:20]]
    with (
        ImageDecoders("png", SHAPE, 1) as decoders,
        pytest.raises(DecoderDiedError, match="10: the image decoder was killed by SIGKILL"),
    ):
        decoded(decoders, files)


def test_a_frozen_decoder_is_replaced_after_the_time_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ImageDecoders("png", SHAPE, 1) as decoders:
        decoded(decoders, FILES)
        os.kill(decoders.pids[0], signal.SIGSTOP)
        limits = iter([0.05])
        request = DecoderProcess.request

        def asked(self: DecoderProcess, files: list[bytes]) -> None:
            monkeypatch.setattr(decoder_process, "LONGEST_DECODE_S", next(limits, ENDS_S))
            request(self, files)

        monkeypatch.setattr(DecoderProcess, "request", asked)
        assert np.array_equal(decoded(decoders, FILES[:8]), IMAGES[:8])
    assert "gave no answer for 0 s; another one takes over" in caplog.text


PARENT = """
import os, signal, sys
import numpy as np
from ddpm_ray.data.image_decoders import ImageDecoders
from ddpm_ray.data.packing.image_files import encode_image
files = [encode_image(np.zeros((4, 4, 3), np.uint8), "png")] * 16
decoders = ImageDecoders("png", (4, 4, 3), 2)
decoders.decode(files, np.empty((16, 48), np.uint8))
if sys.argv[1] == "frozen":
    os.kill(decoders.pids[0], signal.SIGSTOP)
print(*decoders.pids, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open")
@pytest.mark.parametrize("state", ["idle", "frozen"])
def test_no_decoder_outlives_its_parent(state: str) -> None:
    command = [sys.executable, "-c", PARENT, state]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        files = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(files) == 2
        parent.kill()
        for file in files:  # readable when the process has ended
            assert select.select([file], [], [], ENDS_S)[0]
            os.close(file)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_closed_decoders_start_no_process() -> None:
    decoders = ImageDecoders("png", SHAPE, 1)
    decoded(decoders, FILES[:1])
    (pid,) = decoders.pids
    decoders.close()
    assert not is_running(pid)
    with pytest.raises(RuntimeError, match="these image decoders are closed"):
        decoded(decoders, FILES[:1])


def test_a_decoder_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy alone would start one for each core of the node."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "4")
    with ImageDecoders("png", SHAPE, 1) as decoders:
        decoded(decoders, FILES[:1])
        assert len(list(Path(f"/proc/{decoders.pids[0]}/task").iterdir())) == 1


@pytest.mark.parametrize("way", ["steps", "all"])
def test_a_stream_ends_its_decoders_and_names_the_image_they_died_of(
    make_dataset: Callable[..., Dataset], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(20, 20, encoding="png")
    poison = "import os; from ddpm_ray.data.packing import image_files\n"
    poison += "image_files.decode_stored = lambda *rest: os.kill(os.getpid(), 9)\n"
    monkeypatch.setattr(decoder_process, "PROGRAM", poison + decoder_process.PROGRAM)
    started: list[DecoderProcess] = []
    begin = DecoderProcess.__init__

    def counted(self: DecoderProcess, *args: Any) -> None:
        begin(self, *args)
        started.append(self)

    monkeypatch.setattr(DecoderProcess, "__init__", counted)

    def read() -> None:
        if way == "all":
            list(read_images(dataset, [0]))
        else:  # it closes what it started, after an error
            ShardStream(
                dataset,
                seed=0,
                global_batch_size=4,
                positions=range(4),
                lanes=1,
                window_samples=20,
            ).batch(0)

    with pytest.raises(RuntimeError, match=r"n-0000\d\d: the image decoder was killed by SIGKILL"):
        read()
    assert len(started) > 2
    assert not any(is_running(decoder.pid) for decoder in started)
