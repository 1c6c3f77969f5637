"""Weights and results of evaluations: whole, or an error that says what to do."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpm_ray.reporting import Row
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.evaluation_store import (
    EvaluationResult,
    EvaluationResultError,
    EvaluationStore,
)

SETTINGS = {"of": "this test"}
LEVEL = 77  # of the one pixel of a picture


def test_a_result_of_other_weights_or_settings_is_not_taken(tmp_path: Path) -> None:
    store, result = EvaluationStore(str(tmp_path)), EvaluationResult()
    store.save_weights(5, {"w": torch.ones(2)})
    first = store.digest(5, SETTINGS)
    assert not store.has_result(5, first)
    store.save_result(5, first, result)
    assert store.has_result(5, first)
    assert not store.has_result(5, store.digest(5, {"of": "another"}))
    store.save_weights(5, {"w": torch.zeros(2)})
    assert not store.has_result(5, store.digest(5, SETTINGS))


def test_a_result_comes_back_whole(tmp_path: Path) -> None:
    store = EvaluationStore(str(tmp_path))
    store.save_weights(5, {"w": torch.ones(2)})
    values: dict[str, Any] = {"step": 5, "metrics": {"eval/fid": 0.1 + 0.2}}
    result = EvaluationResult(
        [Row(5, {"eval/fid": 0.1 + 0.2})], [("samples", 5, Image.new("L", (1, 1), LEVEL))]
    )
    result.document("a.json", values)
    result.scores = values
    digest = store.digest(5, SETTINGS)
    store.save_result(5, digest, result)
    found = store.result(5, digest)
    assert (found.metric_rows, found.documents, found.scores) == (
        result.metric_rows,
        [("a.json", values)],
        values,
    )
    ((key, step, image),) = found.images
    assert (key, step, image.getpixel((0, 0))) == ("samples", 5, LEVEL)


def with_a_result(folder: Path) -> tuple[EvaluationStore, str]:
    """A store with the result of step 5, with a picture; and its digest."""
    store, result = EvaluationStore(str(folder)), EvaluationResult()
    store.save_weights(5, {"w": torch.ones(2)})
    result.image("samples", LEVEL, Image.new("L", (1, 1), LEVEL))
    digest = store.digest(5, SETTINGS)
    store.save_result(5, digest, result)
    assert store.has_result(5, digest)
    return store, digest


def without_the_sha256_of_pictures(file: Path) -> None:
    """As earlier versions stored a result."""
    value = checksummed_json.read(str(file))
    value["images"] = [image[:2] for image in value["images"]]
    checksummed_json.write(str(file), value)


PICTURE, RESULT = "samples.png", "result.json"
DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    (PICTURE, lambda file: file.write_bytes(file.read_bytes()[:-1]), "is damaged"),
    (PICTURE, Image.new("L", (1, 1), LEVEL + 1).save, "is damaged"),  # that of another evaluation
    (PICTURE, Path.unlink, "is missing"),
    (RESULT, lambda file: file.write_bytes(file.read_bytes()[:-9]), "is damaged"),
    (
        RESULT,
        lambda file: file.write_text(file.read_text().replace(f"{LEVEL}", f"{LEVEL + 1}")),
        "is damaged",
    ),
    (RESULT, lambda file: checksummed_json.write(str(file), []), "is of another version"),
    (RESULT, without_the_sha256_of_pictures, "is of another version"),
    (RESULT, Path.unlink, "is missing"),
]


@pytest.mark.parametrize("file, damage, reason", DAMAGES)
def test_a_damaged_result_is_not_used(
    file: str, damage: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    store, digest = with_a_result(tmp_path)
    damage(tmp_path / "step-00000005" / file)
    assert not store.has_result(5, digest)
    reported = rf"step-00000005/{file}: {reason}; evaluate a checkpoint of the step, if one"
    with pytest.raises(EvaluationResultError, match=reported):
        store.result(5, digest)


def test_a_result_that_another_process_replaced_is_not_used(tmp_path: Path) -> None:
    """As one of an earlier start that was frozen, which has other options."""
    store, digest = with_a_result(tmp_path)
    store.save_result(5, store.digest(5, {"of": "another"}), EvaluationResult())
    with pytest.raises(EvaluationResultError, match="is the result of other weights, settings or"):
        store.result(5, digest)


def test_lost_weights_are_reported_with_what_to_do(tmp_path: Path) -> None:
    """Nobody has a backup of weights that are stored for minutes."""
    store = EvaluationStore(str(tmp_path))
    store.save_weights(5, {"w": torch.ones(1)})
    (tmp_path / "step-00000005/ema.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"ema\.safetensors: is damaged; evaluate a checkpoint"
    ):
        store.weights(5)
    for lost in (store.weights, partial(store.digest, settings={})):
        with pytest.raises(CheckpointError, match=r"step-00000006/ema\S+ is missing; evaluate"):
            lost(6)


def test_folders_of_finished_evaluations_are_deleted_at_the_next_start(tmp_path: Path) -> None:
    """Not those that are outstanding, nor results of steps that will be taken again."""
    store = EvaluationStore(str(tmp_path))
    for step in (2, 4, 6, 8):
        store.save_weights(step, {"w": torch.ones(1)})
    store.delete_finished({4}, 6)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        "step-00000004",
        "step-00000008",
    ]
    store.delete_finished({4})
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000004"]


def test_folders_and_files_of_other_names_stay(tmp_path: Path) -> None:
    """A person may put them there; they must not keep a run from starting."""
    others = ["step-", "step-2", "step-foo", "step-00000002-copy", "notes"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000002").write_text("a file")
    store = EvaluationStore(str(tmp_path))
    store.save_weights(3, {"w": torch.ones(1)})
    store.delete_finished(set())
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([*others, "step-00000002"])


def test_an_outage_while_folders_are_listed_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(url: str) -> list[str]:
        raise StorageError(url, "no answer", "wait")

    monkeypatch.setattr(object_store, "folders", away)
    EvaluationStore(str(tmp_path)).delete_finished(set())
    assert f"folders of finished evaluations may stay: {tmp_path}: no answer; wait" in caplog.text
