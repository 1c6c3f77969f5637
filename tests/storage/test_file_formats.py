"""What a later version wrote is refused in one line that says what to do, never passed over."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpm_ray
from ddpm_ray.assembly import run_config
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data import dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.runs.run_identity import IDENTITY, claim
from ddpm_ray.storage import checksummed_json
from ddpm_ray.storage.file_formats import NewerFormatError, package_version
from ddpm_ray.sweep import driver
from ddpm_ray.sweep.trial_store import TrialStore
from ddpm_ray.training import checkpoint_folder
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.ema_snapshots import SnapshotStore
from ddpm_ray.training.state import Snapshot
from ddpm_ray.training.writer_lease import Lease
from tests.noise import pack_noise

LATER = "9.1.0"
GIVEN = ["name=kept", "data.url=somewhere", "schedule.num_steps=60"]


def snapshot(step: int, **facts: Any) -> Snapshot:
    tensors = {name: {"a": torch.zeros(1)} for name in checkpoint_folder.GROUPS}
    known = {"config": to_dict(load_config(RunConfig, None, GIVEN)), "data_fingerprint": "f"}
    return Snapshot(tensors, known | {"step": step, "image_shape": [4, 4, 1]} | facts)


def begin(folder: Path, **begun: Any) -> str:
    known = {"config": to_dict(RunConfig()), "data_fingerprint": "f"} | begun
    return claim(
        str(folder),
        known,
        lambda found: run_config.changed_keys(RunConfig(), found, ImageShape(32, 32, 3)),
    )


def a_checkpoint(folder: Path) -> tuple[Path, Callable[[], Any]]:
    store = CheckpointStore(str(folder / "checkpoints"))
    where = store.save(snapshot(1))
    return Path(where, "manifest.json"), lambda: checkpoint_folder.read_checkpoint(where)


def a_pointer(folder: Path) -> tuple[Path, Callable[[], Any]]:
    store = CheckpointStore(str(folder))
    store.save(snapshot(1))
    return next(folder.glob("pointers/*")), store.load


def a_run(folder: Path) -> tuple[Path, Callable[[], Any]]:
    begin(folder)
    return folder / IDENTITY, lambda: begin(folder)


def a_trial(folder: Path) -> tuple[Path, Callable[[], Any]]:
    TrialStore(str(folder)).add({"seed": 1})
    return folder / "trials/00000.json", lambda: TrialStore(str(folder))


def an_ema_snapshot(folder: Path) -> tuple[Path, Callable[[], Any]]:
    store = SnapshotStore(str(folder))
    store.save(3, {"ema-width-0.1": {"a": torch.zeros(1)}})
    return next(folder.rglob("manifest.json")), lambda: store.read(3, "ema-width-0.1")


def a_data_set(folder: Path) -> tuple[Path, Callable[[], Any]]:
    pack_noise(str(folder), images=6, side=4)
    return folder / "manifest.json", lambda: dataset.open_dataset(str(folder))


FILES = [a_checkpoint, a_pointer, a_run, a_trial, an_ema_snapshot, a_data_set]


def renumbered(file: Path, number: int | None) -> None:
    """The same content as of format `number`; None: as what an earlier version wrote."""
    held = json.loads(file.read_text())
    if "value" in held:
        held = json.loads(checksummed_json.encode(held["value"], number or 1))
    if isinstance(held["format"], str):
        held["format"] = f"ddpm-ray shards {number or 1}"
    elif number is None:
        del held["format"]
    else:
        held["format"] = number
    file.write_text(json.dumps(held))


@pytest.mark.parametrize("later", [1, 16])
@pytest.mark.parametrize("made", FILES)
def test_a_later_format_is_refused_in_one_line(
    made: Callable[[Path], tuple[Path, Callable[[], Any]]], later: int, tmp_path: Path
) -> None:
    file, read = made(tmp_path)
    read()
    numbers: dict[Callable[..., Any], int] = {
        a_data_set: dataset.NEWEST_FORMAT,
        a_checkpoint: checkpoint_folder.NEWEST_FORMAT,
    }
    newest = numbers.get(made, 1)
    number = newest + later
    renumbered(file, number)
    line = (
        f"{file}: its format is {number}, and ddpm_ray {package_version()} reads up to {newest}; "
        "upgrade ddpm_ray to the version that wrote it"
    )
    with pytest.raises(NewerFormatError, match=f"^{re.escape(line)}$"):
        read()


@pytest.mark.parametrize("made", FILES[1:-1])
def test_a_file_without_a_format_is_of_the_first(
    made: Callable[[Path], tuple[Path, Callable[[], Any]]], tmp_path: Path
) -> None:
    file, read = made(tmp_path)
    assert json.loads(file.read_text())["format"] == 1
    renumbered(file, None)
    assert read() is not None


@pytest.mark.parametrize("number", ["2", 0, -1, 1.5, True, None, [1]])
def test_a_format_that_is_no_number_is_damage(number: Any, tmp_path: Path) -> None:
    manifest, read = a_checkpoint(tmp_path)
    held = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(held | {"format": number}))
    if number is None:
        assert read().step == 1
        return
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be understood"):
        read()


def test_a_run_does_not_fall_back_past_a_checkpoint_of_a_later_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would lose steps in silence. Nor is that checkpoint deleted as a half written one."""
    store = CheckpointStore(str(tmp_path))
    store.save(snapshot(1))
    with monkeypatch.context() as later:
        later.setattr(checkpoint_folder, "WHOLE_FORMAT", 3)
        newest = Path(store.save(snapshot(2)))
    with pytest.raises(NewerFormatError, match="its format is 3"):
        store.load()
    for pointer in (*tmp_path.glob("pointers/*"), tmp_path / "latest.json"):
        pointer.unlink()
    again = CheckpointStore(str(tmp_path))
    again.acquire_lease(Lease.first(str(tmp_path), 1))
    with pytest.raises(NewerFormatError, match="its format is 3"):
        again.load()
    assert (newest / "manifest.json").exists()


def with_a_new_key(config: RunConfig | SweepConfig) -> dict[str, Any]:
    values = to_dict(config)
    (values if isinstance(config, RunConfig) else values["run"])["training"]["warmth"] = 3
    return values


NEW_KEY = rf"training\.warmth, which ddpm_ray .* does not know; ddpm_ray {LATER} saved it: upgrade"


def test_a_key_of_a_later_version_names_that_version(tmp_path: Path) -> None:
    """In a run's and a sweep's identity, and in a checkpoint."""
    run = tmp_path / "run"
    begin(run)
    held = checksummed_json.read(str(run / IDENTITY))
    assert held["version"] == package_version()
    checksummed_json.write(
        str(run / IDENTITY), held | {"config": with_a_new_key(RunConfig())} | {"version": LATER}
    )
    with pytest.raises(ConfigError, match=rf"^{run}: a saved config has {NEW_KEY}"):
        begin(run)

    found = {"sweep": with_a_new_key(SweepConfig()), "version": LATER, "folder": "there"}
    with pytest.raises(ConfigError, match=rf"^there: a saved config has run\.{NEW_KEY}"):
        driver._changed_keys(SweepConfig(), found, ImageShape(32, 32, 3))

    facts = {"config": with_a_new_key(load_config(RunConfig, None, GIVEN)), "version": LATER}
    CheckpointStore(str(tmp_path / "trained/checkpoints")).save(snapshot(1, **facts))
    with pytest.raises(ConfigError, match=rf"trained: a saved config has {NEW_KEY}"):
        ddpm_ray.load(tmp_path / "trained")
