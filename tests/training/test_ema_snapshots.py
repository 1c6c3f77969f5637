"""What a run keeps of its averages is whole or an error, and enough for other widths."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.assembly import training_run
from ddpm_ray.config.run import RunConfig
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.background_writer import BackgroundWriter
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.ema import EMA, Averages, width_group
from ddpm_ray.training.ema_snapshots import SNAPSHOTS, EmaSnapshotter, SnapshotStore, averaged
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.post_hoc_ema import gamma_of, power_decay
from ddpm_ray.training.run import Run
from ddpm_ray.training.state import Snapshot, TrainingState
from tests.fixtures.same_bits import assert_same_bits
from tests.limits import ENDS_S
from tests.noise import pack_noise
from tests.training.test_loop import (
    IMAGES,
    SIDE,
    Killed,
    _closed_streams,  # noqa: F401 - a fixture
    begin,
    bits,
    configured,
)

WIDTHS = (0.1, 0.2)
GROUPS = [width_group(width) for width in WIDTHS]
NAMES = ["ema-width-0.1.safetensors", "ema-width-0.2.safetensors", "manifest.json"]


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine loses its power here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {group: {"w": torch.randn(3, 2, generator=generator)} for group in GROUPS}


def hashes(folder: Path) -> dict[str, str]:
    """Of all files below `folder`, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_an_average_comes_back_bit_by_bit(tmp_path: Path) -> None:
    store, wanted = SnapshotStore(str(tmp_path)), tensors(0)
    store.save(500, wanted)
    for group in GROUPS:
        assert torch.equal(store.read(500, group)["w"], wanted[group]["w"])
    assert sorted(hashes(tmp_path)) == [f"step-00000500/{name}" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.99])
def test_a_flipped_bit_or_a_cut_off_file_is_reported(
    name: str, place: float, tmp_path: Path
) -> None:
    store = SnapshotStore(str(tmp_path))
    store.save(1, tensors(0))
    file = tmp_path / "step-00000001" / name
    whole = file.read_bytes()
    at = int(place * len(whole))
    damages: tuple[bytes, ...] = (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for damaged in damages:
        file.write_bytes(damaged)
        reported = r"step-00000001/ema-width-0\.[12]\.safetensors: is damaged; leave its step"
        with pytest.raises(CheckpointError, match=reported):
            print([store.read(1, group) for group in GROUPS])


def test_what_was_not_kept_is_reported(tmp_path: Path) -> None:
    store = SnapshotStore(str(tmp_path))
    store.save(1, tensors(0))
    with pytest.raises(CheckpointError, match=r"ema-width-0\.3\.safetensors: was not kept; leave"):
        store.read(1, "ema-width-0.3")
    with pytest.raises(CheckpointError, match=r"step-00000002/ema-width-0.1\S+ is missing; leave"):
        store.read(2, GROUPS[0])


def toy(widths: tuple[float, ...]) -> TrainingState:
    model = nn.Linear(3, 4)
    decays = {width_group(width): partial(power_decay, gamma_of(width)) for width in widths}
    optimizer = torch.optim.SGD(model.parameters())
    return TrainingState(model, EMA(model), optimizer, {}, averages=Averages.of(model, decays))


def wander(state: TrainingState, steps: int, keep: Callable[[int], None]) -> None:
    """A random walk in place of training."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        state.averages.update(state.model, step)
        keep(step + 1)


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize("every, steps", [(4, [4, 8, 10]), (5, [5, 10]), (20, [10]), (0, [])])
def test_averages_are_kept_when_due_and_at_the_end(
    every: int, steps: list[int], is_main: bool, tmp_path: Path
) -> None:
    """Every worker notes it, as each may save the state; the main worker alone writes."""
    state, writer = toy(WIDTHS), BackgroundWriter("test")
    store = SnapshotStore(str(tmp_path)) if is_main else None
    wander(state, 10, EmaSnapshotter(state, GROUPS, every, 10, store, writer).snapshot)
    writer.wait()
    assert state.ema_snapshot_steps == steps
    folders = {f"step-{step:08d}" for step in steps} if is_main else set()
    assert {path.name for path in tmp_path.iterdir()} == folders


def test_what_is_kept_is_of_its_step_whatever_comes_after(tmp_path: Path) -> None:
    """It is written in the background, while the averages move on."""
    state, store, writer = toy(WIDTHS), SnapshotStore(str(tmp_path)), BackgroundWriter("test")
    after: dict[int, Tensor] = {}

    def keep(step: int) -> None:
        snapshotter.snapshot(step)
        after[step] = state.averages.means[GROUPS[1]].state_dict()["weight"].clone()

    snapshotter = EmaSnapshotter(state, GROUPS, 2, 8, store, writer)
    wander(state, 8, keep)
    writer.wait()
    for step in (2, 4, 6, 8):
        assert torch.equal(store.read(step, GROUPS[1])["weight"], after[step])


def test_a_save_follows_averages_on_their_way_without_waiting_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step path goes on while their write hangs; the checkpoint that names them comes after."""
    written, gate, write = list[str](), threading.Event(), object_store.write_bytes

    def slow(url: str, data: bytes) -> None:
        assert gate.wait(ENDS_S), "the step path waits"
        written.append(url)
        write(url, data)

    monkeypatch.setattr(object_store, "write_bytes", slow)
    state = toy(WIDTHS)
    writer = CheckpointWriter(CheckpointStore(str(tmp_path / "checkpoints")))
    store = SnapshotStore(str(tmp_path / SNAPSHOTS))
    EmaSnapshotter(state, GROUPS, 1, 9, store, writer).snapshot(1)
    writer.submit(state.snapshot([]))
    assert not written
    gate.set()
    writer.wait()
    assert [SNAPSHOTS in url for url in written[:4]] == [True, True, True, False]
    assert writer.committed is not None


def test_no_checkpoint_names_averages_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failed write is an error, and what was to follow it is left out, not committed."""
    gate, write = threading.Event(), object_store.write_bytes

    def fails(url: str, data: bytes) -> None:
        assert gate.wait(ENDS_S), "the step path waits"
        if SNAPSHOTS in url:
            raise StorageError(url, "the disk is full", "free some space")
        write(url, data)

    monkeypatch.setattr(object_store, "write_bytes", fails)
    state = toy(WIDTHS)
    checkpoints = CheckpointStore(str(tmp_path / "checkpoints"))
    writer = CheckpointWriter(checkpoints)
    EmaSnapshotter(state, GROUPS, 1, 9, SnapshotStore(str(tmp_path / SNAPSHOTS)), writer).snapshot(
        1
    )
    writer.submit(state.snapshot([]))
    gate.set()
    with pytest.raises(StorageError, match=r"snapshots/.* the disk is full"):
        writer.wait()
    assert writer.committed is None
    assert checkpoints.load() is None


def test_another_width_is_made_of_what_was_kept(tmp_path: Path) -> None:
    """Near the average that was tracked under that width: by 0.2 % of it, at the end and before."""
    state, store, writer = (
        toy((*WIDTHS, 0.15)),
        SnapshotStore(str(tmp_path)),
        BackgroundWriter("test"),
    )
    wanted: dict[int, Tensor] = {}

    def keep(step: int) -> None:
        snapshotter.snapshot(step)
        wanted[step] = state.averages.means[width_group(0.15)].state_dict()["weight"].clone()

    snapshotter = EmaSnapshotter(state, GROUPS, 10, 320, store, writer)
    wander(state, 320, keep)
    writer.wait()
    for step in (320, 200):
        made, profile_error = averaged(store, state.ema_snapshot_steps, WIDTHS, 0.15, step)
        assert made.keys() == state.model.state_dict().keys()
        assert (made["weight"] - wanted[step]).norm() < 2e-3 * wanted[step].norm()
        assert 0 < profile_error < 5e-3
    same, profile_error = averaged(store, state.ema_snapshot_steps, WIDTHS, 0.2, 320)
    torch.testing.assert_close(same["weight"], store.read(320, GROUPS[1])["weight"])
    assert profile_error < 1e-6
    with pytest.raises(ValueError, match=r"step is 33; EMA snapshots exist at 10, 20, .* 320"):
        averaged(store, state.ema_snapshot_steps, WIDTHS, 0.15, 33)


OVERRIDES = (
    "training.ema_more_decays=[0.5]",
    "training.ema_snapshot_widths=[0.1,0.2]",
    "training.ema_snapshot_every_steps=2",
    "evaluation.validation_every_steps=0",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Eight steps, checkpoints after 3, 6 and 8, averages kept after 2, 4, 6 and 8."""
    folder = str(tmp_path_factory.mktemp("data"))
    pack_noise(folder, IMAGES, SIDE)
    return configured(folder, *OVERRIDES)


def begun(config: RunConfig, folder: Path) -> Run:
    run = begin(config, folder / "checkpoints")
    run.snapshot_ema = training_run.ema_snapshotter(
        config, run.state, run.checkpoints, str(folder), run.workers
    )
    return run


@pytest.fixture(scope="module")
def unbroken(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, Path]:
    folder = tmp_path_factory.mktemp("whole")
    run = begun(config, folder)
    assert train_loop(run)
    return bits(run), folder / SNAPSHOTS


def dies_at_write(number: int, patch: pytest.MonkeyPatch) -> None:
    """Write `number` (from 0) fails, half of it there if it is an average; none comes after it."""
    write, calls = object_store.write_bytes, iter(range(10**6))

    def write_or_die(url: str, data: bytes) -> None:
        if (at := next(calls)) < number:
            write(url, data)
            return
        if at == number and SNAPSHOTS in url:
            write(url, data[: len(data) // 2])
        raise Killed(f"write {number}")

    patch.setattr(object_store, "write_bytes", write_or_die)


# Of 41: the averages of step 2 are 0 to 2, the first checkpoint 3 to 11, the averages of 4 12 to 14
# and those of 6 15 to 17; the last checkpoint commits with 40.
@pytest.mark.parametrize("number", [0, 2, 7, 11, 13, 16, 20, 29, 40])
def test_a_killed_run_keeps_the_averages_of_an_unbroken_one(
    number: int, config: RunConfig, unbroken: tuple[Snapshot, Path], tmp_path: Path
) -> None:
    """All files of snapshots/, and all averages of the state, to the last bit; and before it goes
    on, each step that its newest checkpoint names is whole.
    """
    wanted, kept = unbroken
    run = begun(config, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        dies_at_write(number, patch)
        with pytest.raises(Killed, match=f"write {number}"):
            train_loop(run)
        with contextlib.suppress(Killed):
            run.checkpoints.wait()
    again = begun(config, tmp_path)
    store = SnapshotStore(str(tmp_path / SNAPSHOTS))
    for step in again.state.ema_snapshot_steps:
        assert all(store.read(step, group) for group in GROUPS)
    assert train_loop(again)
    assert again.state.ema_snapshot_steps == [2, 4, 6, 8]
    assert {"ema-0.5", *GROUPS} < wanted.tensors.keys()
    assert_same_bits(bits(again), wanted)
    assert hashes(tmp_path / SNAPSHOTS) == hashes(kept)


def test_further_means_are_as_if_each_were_the_main_one(
    config: RunConfig, unbroken: tuple[Snapshot, Path], tmp_path: Path
) -> None:
    """The same run whose samples come from decay 0.5, ramp and all."""
    main = begun(configured(config.data.url, "training.ema_decay_per_step=0.5"), tmp_path)
    assert train_loop(main)
    for name, tensor in bits(main).tensors["ema"].items():
        assert torch.equal(unbroken[0].tensors["ema-0.5"][name], tensor)
    assert not (tmp_path / SNAPSHOTS).exists()


def test_a_checkpoint_from_before_averages_were_kept_is_taken(
    config: RunConfig, tmp_path: Path
) -> None:
    """Its facts do not know the key."""
    plain = configured(config.data.url)
    state = begun(plain, tmp_path).state
    old = state.snapshot([])
    del old.facts["kept_at"]
    state.ema_snapshot_steps = [99]
    state.restore(old)
    assert state.ema_snapshot_steps == []
