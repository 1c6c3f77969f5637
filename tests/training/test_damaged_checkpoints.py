"""Whatever is lost or damaged below a run's folder: the newest checkpoint that verifies, or a line.

Never a run that begins anew beside a whole checkpoint, and never a whole one deleted.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_ray.training.checkpoint_folder import GROUPS, CheckpointError
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.writer_lease import Lease
from tests.training.test_fencing import snapshot

STEPS = (25, 50, 75, 100)
DEEP = b"[" * 200_000


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


def run_of(folder: Path, steps: tuple[int, ...] = STEPS) -> None:
    """A run that has committed these steps and keeps three of them."""
    store = CheckpointStore(str(folder), keep=3)
    store.acquire_lease(Lease.first(str(folder)).renewed())
    for step in steps:
        store.save(snapshot(step))


def pointers(folder: Path) -> list[Path]:
    """Newest first, the copy for other readers last."""
    return [*sorted(folder.glob("pointers/*"), reverse=True), folder / "latest.json"]


def newest(folder: Path) -> Path:
    return max(folder.glob("step-*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nest(path: Path) -> None:
    path.write_bytes(DEEP)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def each(act: Callable[[Path], None], paths: list[Path]) -> None:
    for path in paths:
        act(path)


SPOIL: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "flipped": flip,
    "cut": cut,
    "empty": empty,
    "deep": nest,
    "folder": put_folder,
}
FILES = (*(f"{group}.safetensors" for group in GROUPS), "state.json", "manifest.json")


@pytest.mark.parametrize("steps", [STEPS, STEPS[:1]])
@pytest.mark.parametrize("which", ["newest", "all below pointers/", "latest.json", "all"])
@pytest.mark.parametrize("how", SPOIL)
def test_pointers_that_are_lost_or_damaged_cost_nothing(
    how: str, which: str, steps: tuple[int, ...], tmp_path: Path
) -> None:
    run_of(tmp_path, steps)
    kept = {path.name for path in tmp_path.glob("step-*")}
    paths = pointers(tmp_path)
    chosen = {"newest": paths[:1], "latest.json": paths[-1:], "all": paths}
    each(SPOIL[how], chosen.get(which, paths[:-1]))
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    assert {path.name for path in tmp_path.glob("step-*")} == kept
    found = store.load()
    assert found is not None
    assert found[1].step == steps[-1]
    store.save(snapshot(125))
    found = CheckpointStore(str(tmp_path)).load()
    assert found is not None
    assert found[1].step == 125


def old_run_of(folder: Path) -> None:
    """A run as earlier versions wrote it: no pointers/, and the last commit but one beside."""
    run_of(folder, STEPS[:-1])
    shutil.copy(folder / "latest.json", folder / "before")
    store = CheckpointStore(str(folder), keep=3)
    store.acquire_lease(Lease.first(str(folder), store.pointer().epoch).renewed())
    store.save(snapshot(STEPS[-1]))
    (folder / "before").rename(folder / "previous.json")
    shutil.rmtree(folder / "pointers")


@pytest.mark.parametrize("how", SPOIL)
def test_a_pointer_lost_in_a_run_of_an_earlier_version_costs_nothing(
    how: str, tmp_path: Path
) -> None:
    old_run_of(tmp_path)
    kept = {path.name for path in tmp_path.glob("step-*")}
    SPOIL[how](tmp_path / "latest.json")
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    assert {path.name for path in tmp_path.glob("step-*")} == kept
    found = store.load()
    assert found is not None
    assert found[1].step == STEPS[-1]


def test_a_run_of_which_previous_json_alone_verifies_does_not_begin_anew(tmp_path: Path) -> None:
    old_run_of(tmp_path)
    (tmp_path / "latest.json").unlink()
    each(flip, list(tmp_path.glob("step-*/manifest.json")))
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    assert len(list(tmp_path.glob("step-*"))) == 3
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        store.load()


@pytest.mark.parametrize("how", SPOIL)
def test_a_lost_pointer_beside_a_damaged_one_costs_nothing(how: str, tmp_path: Path) -> None:
    run_of(tmp_path)
    lost, *older = pointers(tmp_path)
    for path in (lost, older[-1]):  # the newest commit and its copy, latest.json
        path.unlink()
    SPOIL[how](older[0])
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    found = store.load()
    assert found is not None
    assert found[1].step == STEPS[-1]


@pytest.mark.parametrize("lost", [["writers"], ["writers", "pointers"]])
def test_checkpoint_folders_alone_are_enough(lost: list[str], tmp_path: Path) -> None:
    """As somebody restores them from a backup: the next start takes a number above theirs."""
    for _ in range(3):  # starts, so that the folders hold a number above the first
        CheckpointStore(str(tmp_path)).acquire_lease(Lease.first(str(tmp_path)))
    run_of(tmp_path)
    for name in lost:
        shutil.rmtree(tmp_path / name)
    (tmp_path / "latest.json").unlink()
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    found = store.load()
    assert found is not None
    assert found[1].step == STEPS[-1]
    store.save(snapshot(125))
    found = CheckpointStore(str(tmp_path)).load()
    assert found is not None
    assert found[1].step == 125


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", SPOIL)
def test_a_damaged_checkpoint_makes_way_for_the_one_before(
    how: str, name: str, tmp_path: Path
) -> None:
    run_of(tmp_path)
    SPOIL[how](newest(tmp_path) / name)
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    found = store.load()
    assert found is not None
    assert found[1].step == 75
    assert len(list(tmp_path.glob("step-*"))) == 3


def test_a_checkpoint_that_is_gone_whole_makes_way_for_the_one_before(tmp_path: Path) -> None:
    run_of(tmp_path)
    shutil.rmtree(newest(tmp_path))
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    found = store.load()
    assert found is not None
    assert found[1].step == 75
    assert len(list(tmp_path.glob("step-*"))) == 2


@pytest.mark.parametrize("how", SPOIL)
def test_a_start_beside_damaged_pointers_deletes_nothing(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor a damaged checkpoint: it may be what a person can mend the run by."""
    run_of(tmp_path)
    for pointer in pointers(tmp_path):
        SPOIL[how](pointer)
    SPOIL["cut"](newest(tmp_path) / "manifest.json")
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), 0).renewed())
    assert len(list(tmp_path.glob("step-*"))) == 3
    assert f"recovered 2 checkpoints, the newest {tmp_path}/step-00000075-" in caplog.text


@pytest.mark.parametrize("what", ["gone", "state.json"])
def test_where_no_checkpoint_verifies_a_line_says_so(what: str, tmp_path: Path) -> None:
    run_of(tmp_path)
    for folder in tmp_path.glob("step-*"):
        shutil.rmtree(folder) if what == "gone" else flip(folder / what)
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: no checkpoint verifies (")):
        store.load()


@pytest.mark.parametrize("which", ["newest", "all"])
@pytest.mark.parametrize("how", SPOIL)
def test_damaged_writers_cost_nothing(how: str, which: str, tmp_path: Path) -> None:
    """Claims of starts: the next start takes the next number, and the run goes on."""
    run_of(tmp_path)
    claims = sorted(tmp_path.glob("writers/*"))
    each(SPOIL[how], claims if which == "all" else claims[-1:])
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    store.save(snapshot(125))
    found = CheckpointStore(str(tmp_path)).load()
    assert found is not None
    assert found[1].step == 125


def test_a_whole_checkpoint_that_no_pointer_names_is_taken_over(tmp_path: Path) -> None:
    """Its writer died between manifest and pointer; the next start goes on from it."""
    run_of(tmp_path)
    unnamed = tmp_path / "step-00000110-00000002-0123abcd"
    shutil.copytree(newest(tmp_path), unnamed)
    assert CheckpointStore(str(tmp_path)).pointer().references[0].step == 100  # for readers
    store = CheckpointStore(str(tmp_path), keep=3)
    store.acquire_lease(Lease.first(str(tmp_path), store.pointer().epoch).renewed())
    assert CheckpointStore(str(tmp_path)).pointer().references[0].folder == unnamed.name
