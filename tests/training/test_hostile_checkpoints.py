"""A run's folder that somebody else has written to: nothing runs, nothing else is read or lost."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_ray.assembly import checkpoint_loading, training_run
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.storage import checksummed_json
from ddpm_ray.training import checkpoint_folder
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.state import Snapshot

TINY = (
    "name=tiny",
    "data.url=/shards",
    "sampling.steps=2",
    "schedule.num_steps=9",
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[]",
)


def snapshot(step: int) -> Snapshot:
    tensors = {group: {"w": torch.full((2,), float(step))} for group in checkpoint_folder.GROUPS}
    return Snapshot(tensors, {"step": step})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "run/checkpoints"), keep=2)


@pytest.mark.parametrize("folder", ["../../precious", "", ".", "..", "/precious", "step-1/../.."])
def test_a_pointer_leads_to_no_folder_but_a_checkpoints(
    folder: str, store: CheckpointStore, tmp_path: Path
) -> None:
    """Old ones are deleted with all that they hold, so a pointer could name what goes next."""
    precious = tmp_path / "precious/thesis.tex"
    precious.parent.mkdir()
    precious.write_text("three years")
    first = store.save(snapshot(1))
    pointer = json.loads((tmp_path / "run/checkpoints/latest.json").read_text())["value"]
    folder = str(precious.parent) if folder == "/precious" else folder
    forged = pointer | {"checkpoints": [{"folder": folder, "manifest_sha256": "0"}] * 3}
    pointers = tmp_path.glob("run/checkpoints/pointers/*")
    for path in [
        *pointers,
        *(tmp_path / "run/checkpoints" / n for n in ("latest.json", "previous.json")),
    ]:
        checksummed_json.write(str(path), forged)
    found = store.load()
    assert found is not None
    assert found[0] == first  # it stands for itself; what the pointers say is not followed
    for step in (2, 3, 4):
        store.save(snapshot(step))
    assert precious.read_text() == "three years"


class Bomb:
    """A pickle that, once believed, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def put(folder: str, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint and its hash in the manifest, as the bucket's owner can."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (Path(folder) / "manifest.json").write_text(json.dumps(manifest))
    (Path(folder) / name).write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["pickle", "torch.save", "npz"])
def test_a_pickle_in_a_checkpoint_is_damage(
    name: str, how: str, store: CheckpointStore, tmp_path: Path
) -> None:
    where, bomb, file = store.save(snapshot(1)), Bomb(tmp_path / "run-it"), tmp_path / "file"
    if how == "torch.save":
        torch.save({"w": bomb}, file)
    else:
        file.write_bytes(pickle.dumps(bomb))
    put(where, name, file.read_bytes())
    with pytest.raises(CheckpointError, match=r"manifest.json: cannot be understood"):
        checkpoint_folder.read_checkpoint(where)
    assert not (tmp_path / "run-it").exists()


def edited(change: Callable[[dict[str, Any]], None], store: CheckpointStore) -> str:
    config = load_config(RunConfig, None, [*TINY])
    facts = {"config": to_dict(config), "image_shape": [4, 4, 1], "data_fingerprint": "f"}
    state = training_run.training_state(config, ImageShape(4, 4, 1), torch.device("cpu"), facts)
    where = store.save(state.snapshot([]))
    held = json.loads((Path(where) / "state.json").read_text())
    change(held["config"])
    put(where, "state.json", json.dumps(held).encode())
    return where


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"storage": "${oc.env:AWS_SECRET_ACCESS_KEY}"}, r"a saved config holds \$\{...\}"),
        ({"_target_": "os.system"}, "_target_"),
    ],
)
def test_a_checkpoints_config_runs_and_looks_up_nothing(
    changes: dict[str, Any], problem: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-5f3c")
    with pytest.raises(ConfigError, match=problem) as refused:
        checkpoint_loading.trained_model(edited(lambda config: config.update(changes), store))
    assert "canary" not in str(refused.value)
