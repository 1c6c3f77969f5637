"""Whatever a crash, a full disk or a flipped bit does, a checkpoint comes back whole or not."""

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training import checkpoint_folder
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.writer_lease import Lease
from tests.fixtures.unreadable import make_unreadable
from tests.limits import ENDS_S

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)
OBJECTS = (  # in the order in which a save writes them
    "model.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
    "pointers/",
    "latest.json",
)


class Killed(Exception):
    """The process is gone, in the middle of a write."""


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine loses its power here, and a thousand waits for the disk are half a minute."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def snapshot(step: int, dtype: torch.dtype = torch.float32) -> Snapshot:
    """A state that differs from that of any other step in every file."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"w": (3, 2), "deep.name.b": (5,), "scalar": (), "empty": (0, 4)}

    def draw(shape: tuple[int, ...]) -> Tensor:
        return (torch.randn(shape, generator=generator) * 50).to(dtype)

    groups = {
        group: {name: draw(shape) for name, shape in shapes.items()}
        for group in checkpoint_folder.GROUPS
    }
    facts = {"step": step, "bands": [[0.1 * step, 1e-300], [1, 2]], "text": "é\n", "none": None}
    return Snapshot(groups, facts)


def assert_same_bits(found: Snapshot, wanted: Snapshot) -> None:
    assert found.facts == wanted.facts
    assert found.tensors.keys() == wanted.tensors.keys()
    for group, tensors in wanted.tensors.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            other = found.tensors[group][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert other.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def newest(store: CheckpointStore) -> Snapshot:
    found = store.load()
    assert found is not None
    return found[1]


def dying(
    monkeypatch: pytest.MonkeyPatch, at: int, torn: Callable[[bytes], bytes | None] | None = None
) -> None:
    """From now on write number `at` (from 0) dies, after leaving what `torn` makes of its bytes."""
    write, calls = object_store.write_bytes, iter(range(10**6))

    def write_or_die(url: str, data: bytes) -> None:
        number = next(calls)
        if number == at:
            if torn is not None and (part := torn(data)) is not None:
                write(url, part)
            raise Killed(url)
        assert number < at, "a dead process writes on"
        write(url, data)

    monkeypatch.setattr(object_store, "write_bytes", write_or_die)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_comes_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    where = store.save(snapshot(7, dtype))
    found = store.load()
    assert found is not None
    assert found[0] == where
    assert_same_bits(found[1], snapshot(7, dtype))
    assert_same_bits(checkpoint_folder.read_checkpoint(where), snapshot(7, dtype))


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    """In tensors: NaN with its payload bits, infinities, minus zero, denormals."""
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    wanted = snapshot(1)
    wanted.tensors["model"]["w"] = odd
    store = CheckpointStore(str(tmp_path))
    store.save(wanted)
    assert newest(store).tensors["model"]["w"].view(torch.int32).equal(odd.view(torch.int32))


def test_before_the_first_save_there_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(str(tmp_path / "nowhere")).load() is None


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    where = Path(store.save(snapshot(3)))
    assert {path.name for path in where.iterdir()} == set(OBJECTS[:-2])
    for path in tmp_path.rglob("*.*"):
        data = path.read_bytes()
        if path.suffix == ".safetensors":  # its header's length, then the header as JSON
            length = int.from_bytes(data[:8], "little")
            assert "w" in json.loads(data[8 : 8 + length])
        else:
            json.loads(data)


TEARS: dict[str, Callable[[bytes], bytes | None]] = {
    "nothing": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "but one byte": lambda data: data[:-1],
}


@pytest.mark.parametrize("left", TEARS)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_save_that_dies_leaves_the_one_before_it(
    name: str, before: int, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead at any write, which may leave a torn object on a store that is not atomic."""
    store = CheckpointStore(str(tmp_path), keep=2)
    for step in range(1, before + 1):
        store.save(snapshot(step))
    with monkeypatch.context() as patch:
        dying(patch, OBJECTS.index(name), TEARS[left])
        with pytest.raises(Killed, match=name):
            store.save(snapshot(9))
    whole = name in OBJECTS[-2:] or (name == "manifest.json" and left == "but one byte")
    pointed_to = name == "latest.json" or (name == "pointers/" and left != "nothing")
    # Without any pointer, or beside a torn one, a whole checkpoint counts.
    expected = 9 if pointed_to or (whole and not before) else before
    again = CheckpointStore(str(tmp_path), keep=2)
    if expected:
        assert_same_bits(newest(again), snapshot(expected))
    else:
        assert again.load() is None
    again.save(snapshot(10))  # and the run goes on
    assert_same_bits(newest(again), snapshot(10))


@pytest.mark.parametrize("deleted", range(len(OBJECTS) - 1))
def test_a_save_that_dies_right_after_its_commit_counts(
    deleted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old folders are deleted after the pointer has forgotten them, never before."""
    store = CheckpointStore(str(tmp_path), keep=1)
    store.save(snapshot(1))

    def die(url: str) -> None:
        for path in sorted(Path(url).iterdir())[:deleted]:
            path.unlink()
        raise Killed(url)

    monkeypatch.setattr(object_store, "delete_folder", die)
    with pytest.raises(Killed, match="step-00000001"):
        store.save(snapshot(2))
    assert_same_bits(newest(store), snapshot(2))


def test_the_newest_steps_stay_and_the_planned_one_among_them(tmp_path: Path) -> None:
    """A second checkpoint of a step replaces its first: it costs no older one its place."""
    store, kept = CheckpointStore(str(tmp_path), keep=2, planned_every=10), []
    for step in (10, 11, 11, 12, 13, 13, 20, 21):
        store.save(snapshot(step))
        kept.append([reference.step for reference in store.pointer().references])
    assert kept == [
        [10],
        [11, 10],
        [11, 10],
        [12, 11, 10],
        [13, 12, 10],
        [13, 12, 10],
        [20, 13],
        [21, 20],
    ]
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_milestones_stay_for_ever(tmp_path: Path) -> None:
    """Through later starts too; a checkpoint saved on request between them is none."""
    for saved in ((10, 20, 30, 40, 50), (60, 70, 80, 90), (101, 110, 121)):
        store = CheckpointStore(str(tmp_path), keep=2, milestone_every=20)
        store.acquire_lease(Lease.first(str(tmp_path)).renewed())
        for step in saved:
            store.save(snapshot(step))
    steps = [reference.step for reference in store.pointer().references]
    assert steps == [121, 110, 80, 60, 40, 20]
    assert len(list(tmp_path.glob("step-*"))) == len(steps)


@pytest.mark.parametrize("name", OBJECTS[:-2])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "swapped"])
def test_a_damaged_file_makes_way_for_the_checkpoint_before(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path))
    old, new = (Path(store.save(snapshot(step))) for step in (1, 2))
    data = bytearray((new / name).read_bytes())
    match damage:
        case "flip":
            data[len(data) // 2] ^= 1
        case "cut":
            del data[-1]
        case "swapped":  # whole and well-formed, but of another checkpoint
            data = bytearray((old / name).read_bytes())
    (new / name).write_bytes(data)
    if damage == "gone":
        (new / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert_same_bits(newest(store), snapshot(1))
    (warning,) = caplog.messages
    assert str(new / name) in warning
    assert warning.endswith("; trying the checkpoint before it")


def test_behind_the_oldest_checkpoint_no_other_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path), keep=2)
    for step in (1, 2):
        (Path(store.save(snapshot(step))) / "state.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        store.load()
    newer, older = (line.rpartition("; ")[2] for line in caplog.messages)
    assert newer == "trying the checkpoint before it"
    assert older == "there is no checkpoint before it"


def test_the_way_back_leads_past_several(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=3)
    folders = [Path(store.save(snapshot(step))) for step in (1, 2, 3)]
    for folder in folders[1:]:
        (folder / "state.json").write_bytes(b"")
    assert_same_bits(newest(store), snapshot(1))


def test_an_outage_does_not_send_a_run_back_to_an_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest is there and cannot be read for now: that is for another try, not for step 1."""
    store = CheckpointStore(str(tmp_path))
    store.save(snapshot(1))
    store.save(snapshot(2))
    make_unreadable(monkeypatch, "ema.safetensors")
    with pytest.raises(StorageError, match=r"step-00000002.*no answer"):
        store.load()


def test_where_all_are_damaged_nothing_starts_from_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    for step in (1, 2):
        Path(store.save(snapshot(step)), "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint verifies \(.*ema\.safetensors.*name"):
        store.load()


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "3", "null", "[3]", '[{"folder": "a"}]', DEEP, None]
)
def test_where_pointers_are_damaged_the_newest_whole_checkpoint_is_recovered(
    text: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing of it is forgotten or deleted. None: a folder stands in each one's place."""
    store = CheckpointStore(str(tmp_path))
    folders = [Path(store.save(snapshot(step))) for step in (1, 2)]
    for path in [*tmp_path.glob("pointers/*"), tmp_path / "latest.json"]:
        path.unlink()
        path.write_text(text) if text is not None else path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert_same_bits(newest(store), snapshot(2))
    (warning,) = caplog.messages
    assert "is damaged; recovered 2 checkpoints, the newest " + str(folders[1]) in warning
    if text is not None:
        store.save(snapshot(3))
        assert all(folder.exists() for folder in folders)
        assert_same_bits(newest(store), snapshot(3))
    for folder in tmp_path.glob("step-*"):
        shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "pointers")
    if text is not None:
        (tmp_path / "latest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"latest\.json: is not a list of checkpoints; rest"):
        store.load()
    with pytest.raises(CheckpointError, match=r"latest\.json"):
        store.save(snapshot(4))


@settings(max_examples=60)
@given(bit=st.integers(0, 10**6))
def test_any_flipped_bit_gives_a_whole_checkpoint_or_an_error(
    bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever in the store it is: never None, never a state that nobody saved."""
    folder = tmp_path_factory.mktemp("flip")
    store = CheckpointStore(str(folder))
    for step in (1, 2):
        store.save(snapshot(step))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[bit % len(files)]
    data = bytearray(path.read_bytes())
    place = bit // len(files) % (8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    try:
        found = newest(store)
    except CheckpointError:
        return
    assert_same_bits(found, snapshot(found.step))


def test_the_newest_are_kept_and_no_more(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep=3)
    for step in range(1, 8):
        store.save(snapshot(step))
        left = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("step-*"))
        assert left == list(range(max(1, step - 2), step + 1))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["latest.json"]
    assert len(list(tmp_path.glob("pointers/*"))) == 2  # the newest, and one in case it is damaged


def test_what_cannot_be_deleted_stays_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path), keep=1)
    old = store.save(snapshot(1))

    def refuse(url: str) -> None:
        raise StorageError(url, "access denied", "check the credentials")

    monkeypatch.setattr(object_store, "delete_folder", refuse)
    store.save(snapshot(2))
    assert_same_bits(newest(store), snapshot(2))
    assert f"old checkpoint stays: {old}" in caplog.text


def test_one_step_saved_twice_lies_in_two_folders(tmp_path: Path) -> None:
    """Of two attempts that overlap neither writes into the other's files."""
    store = CheckpointStore(str(tmp_path))
    assert store.save(snapshot(4)) != store.save(snapshot(4))


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("through", ["wait", "submit"])
def test_a_full_disk_reaches_the_training_thread(
    through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path))
    writer = CheckpointWriter(store)
    writer.submit(snapshot(1))
    writer.wait()
    with monkeypatch.context() as patch:
        full_disk(patch)
        writer.submit(snapshot(2))
        with pytest.raises(StorageError, match="the disk is full; free some space"):
            writer.wait() if through == "wait" else writer.submit(snapshot(3))
    assert_same_bits(newest(store), snapshot(1))
    writer.submit(snapshot(4))  # told once; with space again it goes on
    writer.wait()
    assert_same_bits(newest(store), snapshot(4))


def test_the_step_path_waits_only_for_the_save_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submit() returns while its own save is blocked, and saves keep their order."""
    store, open_gate, write = (
        CheckpointStore(str(tmp_path)),
        threading.Event(),
        object_store.write_bytes,
    )

    def slow(url: str, data: bytes) -> None:
        assert open_gate.wait(ENDS_S)
        write(url, data)

    monkeypatch.setattr(object_store, "write_bytes", slow)
    writer = CheckpointWriter(store)
    writer.submit(snapshot(1))
    assert writer.committed is None
    open_gate.set()
    writer.submit(snapshot(2))
    writer.wait()
    assert_same_bits(newest(store), snapshot(2))
    assert writer.committed is not None
    assert "step-00000002" in writer.committed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_facts_that_json_cannot_hold_are_refused_before_any_write(
    value: Any, tmp_path: Path
) -> None:
    wanted = snapshot(1)
    wanted.facts["scores"] = {"eval/fid": value}
    with pytest.raises(ValueError, match="not JSON compliant"):
        CheckpointStore(str(tmp_path)).save(wanted)
    assert list(tmp_path.iterdir()) == []
