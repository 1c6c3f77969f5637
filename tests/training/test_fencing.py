"""A writer that is stopped anywhere, and wakes once another has finished, changes nothing of it."""

import contextlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import GROUPS
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.writer_lease import Lease, SupersededError

REQUESTS = [
    name
    for name, function in inspect.getmembers(object_store, inspect.isfunction)
    if hasattr(function, "__wrapped__")  # each public function that asks a storage
]


class Stopwatch:
    """Runs `meanwhile` before request number `at` to the storage."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at, self.count, self.meanwhile = -1, 0, lambda: None
        for name in REQUESTS:
            patch.setattr(object_store, name, self._watched(getattr(object_store, name)))

    def stop(self, at: int, meanwhile: Callable[[], None]) -> None:
        self.at, self.count, self.meanwhile = at, 0, meanwhile

    @property
    def stopped(self) -> bool:
        """Whether there was such a request."""
        return self.at < 0

    def _watched(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*args: Any, **kwargs: Any) -> Any:
            if self.at == self.count:
                self.at, meanwhile = -1, self.meanwhile
                meanwhile()
            self.count += 1
            return act(*args, **kwargs)

        return acting


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


def snapshot(step: int) -> Snapshot:
    tensors = {group: {"w": torch.full((4,), float(step))} for group in GROUPS}
    return Snapshot(tensors, {"step": step})


def begin(url: str, driver: Lease) -> CheckpointStore:
    """A writer with a lease, as the main worker makes it."""
    store = CheckpointStore(url, keep=2)
    store.acquire_lease(driver.renewed())
    return store


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], str]:
    """URLs of empty run folders, on a disk and in a bucket."""
    if request.param == "folder":
        return lambda number: str(tmp_path / str(number))
    bucket = request.getfixturevalue("s3")
    return lambda number: f"{bucket}/fencing-{tmp_path.name}/{number}"


@pytest.mark.parametrize("commits", [1, 4])
def test_a_save_stopped_at_any_request_cannot_undo_a_later_start(
    commits: int, place: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later start commits once, so that it still names older ones, or lets all of them go."""
    watch, last = Stopwatch(monkeypatch), 500 + 25 * commits
    for at in range(1000):
        url = place(at)
        driver = Lease.first(url)
        stopped = begin(url, driver)
        for step in (25, 50, 75):
            stopped.save(snapshot(step))

        def take_over(url: str = url, driver: Lease = driver) -> None:
            other = begin(url, driver)
            assert other.load() is not None
            for step in range(525, last + 1, 25):
                other.save(snapshot(step))

        watch.stop(at, take_over)
        try:
            stopped.save(snapshot(100))
        except SupersededError:
            assert watch.stopped
        if not watch.stopped:
            break  # the save has fewer requests than that
        found = CheckpointStore(url).load()
        assert found is not None
        assert found[1].step == last, f"stopped before request {at}"
        for reference in CheckpointStore(url).pointer().references:
            assert object_store.exists(f"{url}/{reference.folder}/manifest.json"), (at, reference)
        with pytest.raises(SupersededError, match="commits no more"):
            stopped.save(snapshot(125))
        again = begin(url, driver)  # the next start goes on from there and cleans up
        found = again.load()
        assert found is not None
        assert found[1].step == last
        for step in (900, 925, 950):
            again.save(snapshot(step))
        left = [int(name.split("-")[1]) for name in object_store.folders(url) if "step" in name]
        assert left == [last, 925, 950]  # the one that it has read, and the newest two
    else:
        pytest.fail("a save has no end")
    assert at > 10  # it was a real save


def test_what_a_start_continued_from_is_kept_until_a_later_start_reads_a_newer_one(
    place: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is known to be readable. Half of a save on a full disk goes at once."""
    url, write = place(0), object_store.write_bytes
    driver = Lease.first(url)
    first = begin(url, driver)
    first.save(snapshot(10))

    def full(where: str, data: bytes) -> None:
        if "/step-00000020-" in where and where.endswith("optimizer.safetensors"):
            raise StorageError(where, "the disk is full", "free some space")
        write(where, data)

    with monkeypatch.context() as patch:
        patch.setattr(object_store, "write_bytes", full)
        with pytest.raises(StorageError, match="the disk is full"):
            first.save(snapshot(20))
    for continued_from, saved, left in [(10, (20, 30, 40), [10, 30, 40]), (40, (50,), [40, 50])]:
        store = begin(url, driver)
        found = store.load()
        assert found is not None
        assert found[1].step == continued_from
        for step in saved:
            store.save(snapshot(step))
        names = [name for name in object_store.folders(url) if name.startswith("step-")]
        assert [int(name.split("-")[1]) for name in names] == left


def test_a_start_stopped_at_any_request_cannot_undo_a_later_one(
    place: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has the lead it sweeps up: it must not sweep away what the later start writes."""
    watch = Stopwatch(monkeypatch)
    for at in range(1000):
        url = place(at)
        driver = Lease.first(url)
        first = begin(url, driver)
        for step in (25, 50):
            first.save(snapshot(step))
        object_store.write_bytes(f"{url}/step-00000075-0123abcd/model.safetensors", b"half")

        def take_over(url: str = url, driver: Lease = driver) -> None:
            other = begin(url, driver)
            for step in (75, 100):
                other.save(snapshot(step))
            assert other.lease is not None  # and it is at its next checkpoint
            begun = f"{url}/step-00000125-{other.lease.epoch:08d}-0123abcd"
            object_store.write_bytes(f"{begun}/model.safetensors", b"half")

        stopped = CheckpointStore(url, keep=2)
        lease = driver.renewed()
        watch.stop(at, take_over)
        stopped.acquire_lease(lease)
        if not watch.stopped:
            break
        found = CheckpointStore(url).load()
        assert found is not None
        assert found[1].step == 100, f"stopped before request {at}"
        assert [name for name in object_store.folders(url) if "-00000125-" in name], "swept away"
        with pytest.raises(SupersededError, match="commits no more"):
            stopped.save(snapshot(125))
        found = CheckpointStore(url).load()
        assert found is not None
        assert found[1].step == 100
    else:
        pytest.fail("a start has no end")
    assert at > 4


def test_what_a_superseded_writer_is_about_to_delete_is_copied_first(
    place: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer ones are damaged, so that the later start goes on from just that one."""
    watch, deleted_after = Stopwatch(monkeypatch), 0
    for at in range(1000):
        url = place(at)
        driver = Lease.first(url)
        stopped = begin(url, driver)
        oldest, _ = (stopped.save(snapshot(step)) for step in (25, 50))
        taken: list[int] = []

        def take_over(
            url: str = url, driver: Lease = driver, oldest: str = oldest, taken: list[int] = taken
        ) -> None:
            for folder in object_store.folders(url):
                weights = f"{url}/{folder}/ema.safetensors"
                if not oldest.endswith(folder) and object_store.exists(weights):
                    object_store.write_bytes(weights, b"")
            found = begin(url, driver).load()
            assert found is not None
            taken.append(found[1].step)

        watch.stop(at, take_over)
        with contextlib.suppress(SupersededError):
            stopped.save(snapshot(75))
        if not watch.stopped:
            break
        assert taken == [25]
        found = CheckpointStore(url).load()
        assert found is not None
        assert found[1].step == 25, f"stopped before request {at}"
        deleted_after += not object_store.exists(oldest)
    else:
        pytest.fail("a save has no end")
    assert at > 10
    assert deleted_after  # else nothing needed to be copied
