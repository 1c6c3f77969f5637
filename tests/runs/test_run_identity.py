"""One id for each run's folder: of drivers that begin at once, of a lost file, of a copy."""

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_ray.assembly import run_config
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.runs import run_identity
from ddpm_ray.runs.run_identity import CLAIMS, IDENTITY, claim
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.sweep.trial_store import TrialStore
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.state import Snapshot
from tests.limits import ENDS_S

TRIES = 30
LIMIT_S = ENDS_S


def nothing(_: dict[str, Any]) -> list[str]:
    return []


def begun(**facts: Any) -> dict[str, Any]:
    return {"config": {}, "data_fingerprint": "the data"} | facts


@pytest.fixture(params=["local", "bucket without conditions"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder's URL; the bucket writes over what is there, whatever it is asked (rclone)."""
    if request.param == "local":
        return str(tmp_path)
    return object_store.join(request.getfixturevalue("s3"), tmp_path.name)


def test_drivers_that_begin_at_once_get_one_identity(place: str) -> None:
    """On commit c58b265 two drivers got two, 30 of 30 times."""
    found: list[set[str]] = [set() for _ in range(TRIES)]

    def drive(number: int, barrier: threading.Barrier) -> None:
        barrier.wait(LIMIT_S)
        found[number].add(claim(object_store.join(place, f"at-once-{number}"), begun(), nothing))

    threads: list[threading.Thread] = []
    for number in range(TRIES):
        barrier = threading.Barrier(2)
        pair = [threading.Thread(target=drive, args=(number, barrier)) for _ in range(2)]
        threads += pair
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert [len(ids) for ids in found] == [1] * TRIES
    assert len(set.union(*found)) == TRIES
    for number, ids in enumerate(found):
        assert {claim(object_store.join(place, f"at-once-{number}"), begun(), nothing)} == ids


def test_a_driver_that_begins_at_once_with_another_config_is_refused(s3: str) -> None:
    """In a bucket that writes over: the lowest claim is the run's, and others learn of it."""
    folder = object_store.join(s3, "another-config")
    first = begun(identity="0" * 32, folder=folder, config={"seed": 1})
    checksummed_json.write(object_store.join(folder, CLAIMS, "0" * 32 + ".json"), first)
    with pytest.raises(ConfigError, match="the run began with 1"):
        claim(folder, begun(), lambda found: [f"the run began with {found['config']['seed']}"])
    assert checksummed_json.read(object_store.join(folder, IDENTITY)) == first


def test_a_claim_whose_driver_died_long_ago_counts_no_more(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = object_store.join(s3, "died-long-ago")
    checksummed_json.write(
        object_store.join(folder, CLAIMS, "0" * 32 + ".json"), begun(identity="0" * 32)
    )
    threading.Event().wait(1.1)  # buckets count in seconds
    monkeypatch.setattr(run_identity, "STALE_S", 0.5)
    assert claim(folder, begun(), nothing) != "0" * 32


def test_a_storage_that_is_slow_holds_no_start_up_for_ever(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_identity, "SETTLE_S", 0.0)  # no answer is as fast
    folder = object_store.join(s3, "slow")
    found = claim(folder, begun(), nothing)
    assert checksummed_json.read(object_store.join(folder, IDENTITY))["identity"] == found
    assert "another driver that started it at once may continue as a separate run" in caplog.text


CONFIG = "name=kept", "data.url=somewhere", "training.learning_rate=0.001"


def config(tmp_path: Path, *more: str) -> RunConfig:
    return load_config(RunConfig, None, [*CONFIG, f"storage={tmp_path}", *more])


def begin(config: RunConfig, folder: str) -> str:
    facts = {"config": to_dict(config), "data_fingerprint": "the data"}
    return claim(
        folder, facts, lambda found: run_config.changed_keys(config, found, ImageShape(32, 32, 3))
    )


def commit(config: RunConfig, folder: str, **facts: Any) -> None:
    tensors = {name: {"a": torch.zeros(1)} for name in ("model", "ema", "optimizer")}
    known = {"config": to_dict(config), "data_fingerprint": "the data", "step": 5} | facts
    CheckpointStore(object_store.join(folder, CHECKPOINTS)).save(Snapshot(tensors, known))


def test_a_lost_identity_comes_out_of_the_newest_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On commit c58b265 the run went on under another seed and learning rate without a word."""
    folder = str(tmp_path / "kept")
    before = begin(config(tmp_path), folder)
    commit(config(tmp_path), folder, identity=before)
    (tmp_path / "kept" / IDENTITY).unlink()
    other = config(tmp_path, "training.learning_rate=0.002", "seed=7")
    with pytest.raises(ConfigError, match=r"(?s)learning_rate is 0.002.*began with 0.001") as error:
        begin(other, folder)
    assert "seed is 7, but the run began with 0" in str(error.value)
    assert not (tmp_path / "kept" / IDENTITY).exists()
    assert begin(config(tmp_path), folder) == before
    assert "run.json is lost; restoring it from" in caplog.text
    assert begin(config(tmp_path), folder) == before  # written down again


@pytest.mark.parametrize(
    "saved, now",
    [
        ("attention_resolutions=[8,32]", "attention_factors=[1,4]"),
        ("attention_resolutions=[32,8]", "attention_resolutions=[8,32]"),
        ("attention_resolutions=[]", "attention_factors=[]"),
        ("attention_resolutions=[16]", "attention_factors=null"),  # the default
        ("attention_resolutions=[16]", "attention_factors=[2]"),
    ],
)
def test_a_run_continues_with_attention_by_factor(saved: str, now: str, tmp_path: Path) -> None:
    """Saved configs of earlier versions name the sides in pixels; the data has 32 x 32."""
    folder, levels = str(tmp_path / "kept"), "model.channel_mults=[1,1,1]"
    before = begin(config(tmp_path, levels, f"model.{saved}"), folder)
    assert begin(config(tmp_path, levels, f"model.{now}"), folder) == before
    with pytest.raises(ConfigError, match=r"model.attention_factors is .*, but the run began with"):
        begin(config(tmp_path, levels, "model.attention_factors=[1,2,4]"), folder)


def test_attention_of_a_run_on_images_of_another_size_is_reported(tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    begin(config(tmp_path, "model.attention_factors=[2]"), folder)
    there = tmp_path / "kept" / IDENTITY
    found = checksummed_json.read(str(there))
    found["config"]["model"] |= {"attention_factors": None, "attention_resolutions": [7]}
    checksummed_json.write(str(there), found)
    with pytest.raises(ConfigError, match=r"attention_resolutions is None, but .* with \(7,\)"):
        begin(config(tmp_path, "model.attention_factors=[2]"), folder)


def test_a_checkpoint_of_another_data_set_is_reported(tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    commit(config(tmp_path), folder, identity="a", data_fingerprint="other data")
    with pytest.raises(ConfigError, match="holds data set the data, but the run began with other"):
        begin(config(tmp_path), folder)


def test_a_sweep_whose_identity_is_lost_is_not_begun_over_its_trials(tmp_path: Path) -> None:
    TrialStore(str(tmp_path)).add({"seed": 1})
    with pytest.raises(ConfigError, match=r"trials of a sweep, but its run\.json is lost; put it"):
        claim(str(tmp_path), begun(sweep={}), nothing)


def test_a_copied_folder_goes_on_as_a_run_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On commit c58b265 original and copy wrote into one MLflow run."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    before = claim(str(original), begun(), nothing)
    shutil.copytree(original, copy)
    own = claim(str(copy), begun(), nothing)
    assert own != before
    assert f"{copy} is a copy of the run in {original}" in caplog.text
    assert claim(str(copy), begun(), nothing) == own
    assert claim(str(original), begun(), nothing) == before
    assert checksummed_json.read(str(copy / IDENTITY))["copied_from"] == str(original)


def test_a_copy_without_its_identity_is_a_copy_too(tmp_path: Path) -> None:
    original, copy = tmp_path / "kept", tmp_path / "copy"
    before = begin(config(tmp_path), str(original))
    commit(config(tmp_path), str(original), identity=before)
    shutil.copytree(original, copy)
    (copy / IDENTITY).unlink()
    assert begin(config(tmp_path), str(copy)) != before
    assert begin(config(tmp_path), str(original)) == before


def test_a_moved_folder_goes_on_and_so_does_it_where_it_was(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    before = claim(str(here), begun(), nothing)
    here.rename(there)
    assert claim(str(there), begun(), nothing) == before
    shutil.copytree(there, here)  # a copy now, though it lies where the run began
    assert claim(str(here), begun(), nothing) != before
    assert claim(str(there), begun(), nothing) == before


def test_one_folder_under_two_names_is_no_copy(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    before = claim(str(tmp_path / "folder"), begun(), nothing)
    assert claim(str(tmp_path / "link"), begun(), nothing) == before
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [IDENTITY]


def test_a_copy_out_of_a_bucket_is_one(s3: str, tmp_path: Path) -> None:
    original = object_store.join(s3, "copied")
    before = claim(original, begun(), nothing)
    checksummed_json.write(
        str(tmp_path / IDENTITY), checksummed_json.read(object_store.join(original, IDENTITY))
    )
    assert claim(str(tmp_path), begun(), nothing) != before


def test_what_names_no_folder_goes_on_as_it_is(tmp_path: Path) -> None:
    """As commit c58b265 wrote it."""
    old = begun(identity="old")
    checksummed_json.write(str(tmp_path / IDENTITY), old)
    assert claim(str(tmp_path), begun(), nothing) == "old"
    assert checksummed_json.read(str(tmp_path / IDENTITY)) == old


def test_an_original_that_cannot_be_read_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / IDENTITY).write_text("{}")
    found = begun(identity="mine", folder=str(tmp_path / "before"))
    checksummed_json.write(str(tmp_path / "now" / IDENTITY), found)
    assert claim(str(tmp_path / "now"), begun(), nothing) == "mine"
    assert "cannot check whether it is a copy" in caplog.text
