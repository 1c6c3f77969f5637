"""All workers write a checkpoint together; whatever one of them meets, no half of it counts."""

import contextlib
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import PermanentStorageError, StorageError
from ddpm_ray.training import checkpoint_folder, checkpoint_parts, shared_writing
from ddpm_ray.training.checkpoint_folder import GROUPS, CheckpointError, read_checkpoint
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.shared_reading import load_newest
from ddpm_ray.training.shared_writing import SharedSave
from ddpm_ray.training.state import Snapshot, TrainingState
from ddpm_ray.training.writer_lease import Lease, SupersededError
from tests.fixtures.unreadable import make_unreadable
from tests.limits import ENDS_S
from tests.training.test_checkpoints import assert_same_bits
from tests.training.test_damaged_checkpoints import SPOIL
from tests.training.test_fencing import Stopwatch
from tests.training.test_shared_reading import on_all
from tests.training.test_state import state_with, step

COUNT = 3  # workers


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two tensors of nine numbers."""
    monkeypatch.setattr(checkpoint_parts, "PART_BYTES", 72)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def state_at(at: int) -> TrainingState:
    """A state of several files for each group, that differs from that of another step."""
    state = state_with([[0, 1, 2, 3]])
    step(state, at)
    with torch.no_grad():
        for name, value in state.model.named_parameters():
            value.fill_(10.0 * at + int(name[0]))
            state.ema.model.get_parameter(name).fill_(10.0 * at - int(name[0]))
    state.step = at
    return state


def snapshot(at: int) -> Snapshot:
    """What a checkpoint of `state_at` holds."""
    return state_at(at).snapshot(["rows of 0"])


class Start:
    """The workers of one start of a run, without collectives."""

    def __init__(self, url: str, driver: Lease, count: int = COUNT) -> None:
        self.count, self.store = count, CheckpointStore(url, keep=2)
        self.store.acquire_lease(driver.renewed())
        stores = [self.store, *(CheckpointStore(url) for _ in range(1, count))]
        for store in stores:
            store.lease = self.store.lease
        self.writers = [CheckpointWriter(store) for store in stores]

    def acts(self, at: int) -> list[Callable[[], None]]:
        """What each worker does to save the state of step `at`, until it knows that it is saved."""

        def act(rank: int) -> None:
            writer = self.writers[rank]
            writer.save(state_at(at), [f"rows of {rank}"], Workers(rank, self.count))
            writer.wait()

        return [partial(act, rank) for rank in range(self.count)]

    def save(self, at: int) -> None:
        for act in reversed(self.acts(at)):
            act()


def newest(url: str) -> int | None:
    """Step of the newest checkpoint, whose bits are compared."""
    found = CheckpointStore(url).load()
    if found is None:
        return None
    assert_same_bits(found[1], snapshot(found[1].step))
    return found[1].step


sizes = st.integers(0, 40).map(lambda number: torch.zeros(number, dtype=torch.uint8))
tensors = st.dictionaries(st.text("abc.", min_size=1, max_size=4), sizes, max_size=12)


@settings(max_examples=50)
@given(tensors, st.randoms(use_true_random=False), st.integers(1, 5))
def test_each_tensor_is_in_one_file_of_one_worker(
    group: dict[str, Tensor], random: Any, count: int
) -> None:
    """Parts are full up to the largest tensor, and so are the workers up to the largest file."""
    limit = checkpoint_parts.PART_BYTES
    files = checkpoint_parts.split({"model": group})
    names = [name for file in files.values() for name in file]
    assert sorted(names) == sorted(group)
    assert all(file[name] is group[name] for file in files.values() for name in file)
    loads = {name: sum(tensor.nbytes for tensor in file.values()) for name, file in files.items()}
    assert all(load <= limit or len(files[name]) == 1 for name, load in loads.items())
    largest = max((tensor.nbytes for tensor in group.values()), default=0)
    assert all(load > limit - largest for load in list(loads.values())[:-1])
    assert {checkpoint_parts.group_of(name) for name in files} == {"model"}
    assert checkpoint_parts.files_of_group("model", reversed(list(files))) == list(files)
    assert checkpoint_parts.split(files) == files

    mixed = list(group.items())
    random.shuffle(mixed)
    again = checkpoint_parts.split({"model": dict(mixed)})
    assert {name: set(file) for name, file in again.items()} == {
        name: set(file) for name, file in files.items()
    }
    lease = Lease("", 3)
    one, other = (SharedSave.of(lease, 1, 5, held, count) for held in (files, again))
    assert one == other
    owned = [one.files_of(rank) for rank in range(count)]
    assert sorted(name for own in owned for name in own) == sorted(files)
    most = max(sum(loads[name] for name in own) for own in owned)
    assert most <= sum(loads.values()) / count + max(loads.values())


def test_a_small_state_is_written_by_the_main_worker_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, and the format that earlier versions read."""
    monkeypatch.setattr(checkpoint_parts, "PART_BYTES", 2**20)
    where = written_by_all(str(tmp_path), 2, [trained([0]), trained([0])])
    names = {path.name for path in Path(where).iterdir()}
    assert names == {*(f"{group}.safetensors" for group in GROUPS), "state.json", "manifest.json"}
    assert json.loads(Path(where, "manifest.json").read_text())["format"] == 1


def trained(seeds: list[int]) -> TrainingState:
    torch.manual_seed(0)
    state = state_with([[0, 1, 2, 3]])
    for seed in seeds:
        step(state, seed)
        state.ema.update(state.model, 0.5)
    state.step = len(seeds)
    return state


def written_by_all(url: str, count: int, states: list[TrainingState]) -> str:
    """The folder of a checkpoint that a start with so many workers saves."""
    stores = [CheckpointStore(url) for _ in range(count)]
    stores[0].acquire_lease(Lease.first(url).renewed())
    found = on_all(count, lambda workers: load_newest(stores[workers.rank], workers))
    writers = [CheckpointWriter(store) for store in stores]
    for rank, (writer, state) in enumerate(zip(writers, states, strict=True)):
        if found[rank] is not None:
            state.restore(found[rank][1])
            step(state, state.step)
            state.ema.update(state.model, 0.5)
            state.step += 1
        writer.store.lease = stores[0].lease
        writer.save(state, [f"rows of {rank}"], Workers(rank, count))
    for writer in writers:
        writer.wait()
    copied = [name for state in states for name in state.background_copy._blocks]
    assert len(copied) == len({*copied})  # no worker holds a copy of another's files
    assert [writer.committed is None for writer in writers] == [rank > 0 for rank in range(count)]
    assert writers[0].committed is not None
    return writers[0].committed


def test_any_number_of_workers_goes_on_from_what_any_other_wrote(tmp_path: Path) -> None:
    """1, 2, 4 and 1 workers, a step each: the bits and the files of one that never stopped."""
    counts = (1, 2, 4, 1)
    for number, count in enumerate(counts, 1):
        seeds = [] if number > 1 else [0]
        where = written_by_all(str(tmp_path / "run"), count, [trained(seeds) for _ in range(count)])
        wanted = trained(list(range(number))).snapshot(["rows of 0"])
        assert_same_bits(read_checkpoint(where), wanted)
        alone = CheckpointStore(str(tmp_path / "alone")).save(wanted)
        held = [
            {path.name: path.read_bytes() for path in Path(w).iterdir()} for w in (where, alone)
        ]
        records = {name for name in held[0] if name.startswith("written-")}
        assert len(records) == count - 1
        assert {name: held[0][name] for name in held[0].keys() - records} == held[1]
        assert len(held[1]) > 8  # groups are split


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_worker_of_an_earlier_start_that_wakes_changes_nothing(
    who: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is frozen before any of its requests, while a later start takes over and saves."""
    watch = Stopwatch(monkeypatch)
    for at in range(1000):
        url = str(tmp_path / str(at))
        driver = Lease.first(url)
        frozen = Start(url, driver)
        frozen.save(25)
        acts = frozen.acts(50)

        def take_over(url: str = url, driver: Lease = driver) -> None:
            other = Start(url, driver)
            assert other.store.load() is not None
            for step_ in (525, 550):
                other.save(step_)

        for rank in {1, 2} - {who}:
            acts[rank]()
        watch.stop(at, take_over)
        with contextlib.suppress(SupersededError):
            acts[who]()
        if not watch.stopped:
            break
        if who:  # and then the main worker wakes as well
            with pytest.raises(SupersededError, match="commits no more"):
                acts[0]()
        assert newest(url) == 550, f"stopped before request {at}"
        again = Start(url, driver)
        found = again.store.load()
        assert found is not None
        assert found[1].step == 550
        for step_ in (900, 925, 950):
            again.save(step_)
        left = [int(name.split("-")[1]) for name in object_store.folders(url) if "step" in name]
        assert left == [550, 925, 950]  # parts that were written late are gone
        shutil.rmtree(url)
    else:
        pytest.fail("a save has no end")
    assert at >= 5


@pytest.mark.parametrize("written", ["nothing", "files", "record only", "cut", "fewer"])
def test_without_all_files_of_all_workers_nothing_is_committed(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 2 died in between, or its store lost something of what it had acknowledged."""
    monkeypatch.setattr(shared_writing, "WAIT_S", -1.0)
    url = str(tmp_path)
    start = Start(url, Lease.first(url))
    start.save(25)
    acts = start.acts(50)
    for act in acts[1:]:
        act()
    (folder,) = tmp_path.glob("step-00000050-*")
    record = folder / "written-00002.json"
    entries = checksummed_json.read(str(record))
    match written:
        case "nothing" | "files":
            record.unlink()
        case "cut":
            file = folder / min(entries)
            file.write_bytes(file.read_bytes()[:-1])
        case "fewer":
            checksummed_json.write(str(record), {min(entries): entries[min(entries)]})
    if written in ("nothing", "record only"):
        for name in entries:
            (folder / name).unlink()
    late = written in ("nothing", "files", "record only")
    reason = "worker 2 has not written its files" if late else "worker 2 wrote other files than"
    with pytest.raises(StorageError, match=reason):
        acts[0]()
    assert newest(url) == 25
    assert not folder.exists()


def refuse_writes(monkeypatch: pytest.MonkeyPatch, first: int, last: int, error: Exception) -> None:
    """Make the writes of these numbers, from 0 and from now on, raise `error`."""
    write, numbers = object_store.write_bytes, itertools.count()

    def refusing(url: str, data: bytes | memoryview) -> None:
        if first <= next(numbers) <= last:
            raise type(error)(url, *error.args)
        write(url, data)

    monkeypatch.setattr(object_store, "write_bytes", refusing)


FULL = PermanentStorageError("the disk is full", "free some space")
AWAY = StorageError("no answer (https://anna:hunter2@store/)", "try again")
NO_MEMORY = MemoryError("no memory")
FAILURES = {
    "of its first file": (0, FULL, r"safetensors: worker 2 failed: the disk is full; free some"),
    "of its last file": (2, AWAY, r"safetensors: worker 2 failed: no answer \(https"),
    "of its record": (3, AWAY, r"written-00002\.json: worker 2 failed: no answer \(https"),
    "of no store": (1, NO_MEMORY, r"step-00000050-.*: worker 2 failed: MemoryError: .*no memory"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_main_worker_raises_the_error_of_another_at_once(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waiting for files already; a save after the fault is whole."""
    monkeypatch.setattr(shared_writing, "WAIT_S", ENDS_S)
    number, error, reason = FAILURES[failure]
    url, waits, list_files = str(tmp_path), threading.Event(), object_store.list_files
    start = Start(url, Lease.first(url))
    start.save(25)

    def listed(where: str) -> dict[str, int]:
        sizes = list_files(where)
        waits.set()
        return sizes

    with monkeypatch.context() as patch:
        patch.setattr(object_store, "list_files", listed)
        start.writers[0].save(state_at(50), ["rows of 0"], Workers(0, COUNT))
        assert waits.wait(ENDS_S)
        acts = start.acts(50)
        acts[1]()
        refuse_writes(patch, number, number, error)
        with pytest.raises(type(error), match=str(error.args[0]).partition(" (")[0]):
            acts[2]()
        kind = PermanentStorageError if error is FULL else StorageError
        with pytest.raises(StorageError, match=reason) as raised:
            start.writers[0].wait()
    assert type(raised.value) is kind
    assert "hunter2" not in "".join(raised.value.args)
    assert newest(url) == 25
    assert not list(tmp_path.glob("step-00000050-*"))
    start.save(75)
    assert newest(url) == 75


def test_a_worker_that_can_write_nothing_raises_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is refused as well, so that the main worker is not told."""
    monkeypatch.setattr(shared_writing, "WAIT_S", -1.0)
    start = Start(str(tmp_path), Lease.first(str(tmp_path)))
    acts = start.acts(50)
    acts[1]()
    with monkeypatch.context() as patch:
        refuse_writes(patch, 0, 99, FULL)
        with pytest.raises(PermanentStorageError, match=r"safetensors: the disk is full"):
            acts[2]()
    with pytest.raises(StorageError, match="worker 2 has not written its files"):
        acts[0]()


def test_the_main_worker_of_an_earlier_start_does_not_wait_for_dead_ones(tmp_path: Path) -> None:
    url = str(tmp_path)
    driver = Lease.first(url)
    start = Start(url, driver)
    start.save(25)
    acts = start.acts(50)
    Start(url, driver)
    with pytest.raises(SupersededError, match="commits no more"):
        acts[0]()
    assert newest(url) == 25


@pytest.mark.parametrize("how", SPOIL)
def test_a_damaged_part_makes_way_for_the_checkpoint_before(how: str, tmp_path: Path) -> None:
    url = str(tmp_path)
    start = Start(url, Lease.first(url))
    start.save(25)
    start.save(50)
    (folder,) = tmp_path.glob("step-00000050-*")
    files = sorted(folder.iterdir())
    parts = checkpoint_parts.split(snapshot(50).tensors)
    assert len(parts) > 2 * len(GROUPS)  # each group is split
    assert len(files) == len(parts) + 2 + COUNT - 1
    for file in files:
        data = file.read_bytes()
        SPOIL[how](file)
        assert newest(url) == (50 if file.name.startswith("written-") else 25), file.name
        with contextlib.suppress(FileNotFoundError):
            file.rmdir() if file.is_dir() else file.unlink()
        file.write_bytes(data)
    assert newest(url) == 50


def test_an_outage_does_not_send_a_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path)
    start = Start(url, Lease.first(url))
    start.save(25)
    start.save(50)
    make_unreadable(monkeypatch, "ema-00001-of-00002.safetensors")
    with pytest.raises(StorageError, match=r"step-00000050.*no answer"):
        CheckpointStore(url).load()


def test_milestones_and_old_checkpoints_are_whole_folders(tmp_path: Path) -> None:
    url = str(tmp_path)
    start = Start(url, Lease.first(url))
    start.store.milestone_every = 20
    for at in (10, 20, 30, 40, 50):
        start.save(at)
    found = {int(path.name.split("-")[1]): path for path in tmp_path.glob("step-*")}
    assert sorted(found) == [20, 40, 50]
    for at, path in found.items():
        assert_same_bits(read_checkpoint(str(path)), snapshot(at))


def listing(change: Callable[[dict[str, Any]], None], folder: Path) -> str:
    where = Path(CheckpointStore(str(folder)).save(snapshot(5)))
    manifest = json.loads((where / "manifest.json").read_text())
    change(manifest)
    (where / "manifest.json").write_text(json.dumps(manifest))
    return str(where)


EMA = "ema-00002-of-00002.safetensors"
MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a part is left out": lambda listed: listed.pop(EMA),
    "whole and in parts": lambda listed: listed.update({"ema.safetensors": listed[EMA]}),
    "two splittings": lambda listed: listed.update({"ema-00001-of-00003.safetensors": listed[EMA]}),
    "of none": lambda listed: listed.update({"moments-00001-of-00000.safetensors": listed[EMA]}),
    "the same tensors twice": lambda listed: listed.update(
        {"ema-00001-of-00002.safetensors": listed[EMA]}
    ),
}


@pytest.mark.parametrize("how", MALFORMED)
def test_parts_that_do_not_make_a_group_are_refused(how: str, tmp_path: Path) -> None:
    """In a folder without a pointer, whose manifest nothing vouches for."""
    where = listing(MALFORMED[how], tmp_path)
    if how == "the same tensors twice":
        shutil.copy(Path(where, EMA), Path(where, "ema-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be understood"):
        read_checkpoint(where)


def test_a_split_group_is_read_alone_and_has_one_sha256(tmp_path: Path) -> None:
    where = CheckpointStore(str(tmp_path)).save(snapshot(5))
    assert json.loads(Path(where, "manifest.json").read_text())["format"] == 2
    for path in Path(where).glob("model-*"):
        path.unlink()
    found = read_checkpoint(where, groups=("ema",))
    wanted = snapshot(5).tensors["ema"]
    assert found.tensors.keys() == {"ema"}
    assert all(torch.equal(found.tensors["ema"][name], wanted[name]) for name in wanted)
    assert checkpoint_folder.group_names(where) == sorted(GROUPS)
    sha256 = checkpoint_folder.weights_sha256(where)
    assert re.fullmatch("[0-9a-f]{64}", sha256)
    again = CheckpointStore(str(tmp_path / "again")).save(snapshot(5))
    assert checkpoint_folder.weights_sha256(again) == sha256
    other = CheckpointStore(str(tmp_path / "other")).save(snapshot(6))
    assert checkpoint_folder.weights_sha256(other) != sha256
    unwritten = checkpoint_folder.tensor_files({"ema": wanted})
    assert checkpoint_folder.group_sha256(checkpoint_folder.described(unwritten)) == sha256
