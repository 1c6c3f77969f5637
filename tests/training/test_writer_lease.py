"""Of all starts of a run the newest alone commits."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ddpm_ray.storage import checksummed_json
from ddpm_ray.training.checkpoint_folder import GROUPS
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.writer_lease import Lease, LeaseLostError, SupersededError


def snapshot(step: int) -> Snapshot:
    return Snapshot({name: {"w": torch.full((2,), step)} for name in GROUPS}, {"step": step})


def folders(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("step-*"))


def test_numbers_rise_and_the_newest_alone_holds(tmp_path: Path) -> None:
    driver = Lease.first(str(tmp_path))
    workers = driver.renewed()
    again = driver.renewed()
    assert [one.epoch for one in (driver, workers, again)] == [1, 2, 3]
    again.check()
    with pytest.raises(SupersededError, match=r"start 3 of this run goes on with it") as lost:
        workers.check()
    assert not isinstance(lost.value, LeaseLostError)  # its own driver's: no reason to end that


def test_another_job_of_the_same_name_ends_the_first(tmp_path: Path) -> None:
    driver = Lease.first(str(tmp_path))
    workers = driver.renewed()
    other = Lease.first(str(tmp_path), after=2)
    for act in (workers.check, driver.renewed):  # it must not take the run back and forth
        with pytest.raises(LeaseLostError, match=r"start 3 .* Another job has the same name="):
            act()
    other.renewed().check()


def test_a_number_has_one_owner_though_many_want_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        leases = list(pool.map(lambda _: Lease.first(str(tmp_path)), range(16)))
    assert sorted(lease.epoch for lease in leases) == list(range(1, 17))


def test_where_two_thought_they_had_it_the_last_writer_keeps_it(tmp_path: Path) -> None:
    """As on a store that does not know the condition and writes over the first one's object."""
    first = Lease.first(str(tmp_path))
    second = Lease(str(tmp_path), first.epoch)
    place = str(tmp_path / "writers/00000001.json")
    checksummed_json.write(place, {"owner": second.owner, "token": second.token})
    second.check()
    with pytest.raises(LeaseLostError, match="start 1 of this run"):
        first.check()


def test_a_worker_that_comes_back_from_the_dead_commits_nothing(tmp_path: Path) -> None:
    old, new = CheckpointStore(str(tmp_path)), CheckpointStore(str(tmp_path))
    driver = Lease.first(str(tmp_path))
    old.acquire_lease(driver.renewed())
    old.save(snapshot(5))
    new.acquire_lease(driver.renewed())
    with pytest.raises(SupersededError, match="commits no more"):
        old.save(snapshot(10))
    found = new.load()
    assert found is not None
    assert found[1].step == 5
    new.save(snapshot(10))
    assert new.pointer().epoch == 3


def test_what_an_earlier_start_left_half_done_is_swept(tmp_path: Path) -> None:
    store, driver = CheckpointStore(str(tmp_path), keep=2), Lease.first(str(tmp_path))
    for step in (5, 10, 15):
        store.save(snapshot(step))
    orphan = tmp_path / "step-00000020-abcdef01"
    orphan.mkdir()
    (orphan / "model.safetensors").write_bytes(b"half")
    assert folders(tmp_path) == [10, 15, 20]
    store.acquire_lease(driver.renewed())
    assert folders(tmp_path) == [10, 15]
    assert (tmp_path / "writers").is_dir()


def test_the_last_one_that_was_read_back_whole_is_kept(tmp_path: Path) -> None:
    """Two later ones may have been spoilt on their way to the store: nobody has read them yet."""
    CheckpointStore(str(tmp_path), keep=2).save(snapshot(5))
    store = CheckpointStore(str(tmp_path), keep=2)
    store.load()
    for step in (10, 15, 20, 25):
        store.save(snapshot(step))
    assert folders(tmp_path) == [5, 20, 25]
    for path in [*tmp_path.glob("step-*20-*/ema*"), *tmp_path.glob("step-*25-*/ema*")]:
        path.write_bytes(b"spoilt")
    found = CheckpointStore(str(tmp_path), keep=2).load()
    assert found is not None
    assert found[1].step == 5
