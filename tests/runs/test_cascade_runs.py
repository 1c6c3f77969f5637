"""Cascades as one thing: copied, moved, in MLflow's registry, scored by any number of workers."""

import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("tokenizers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly import cascades
from ddpm_ray.assembly.cascades import write_copies
from ddpm_ray.assembly.portable_models import copy_model
from ddpm_ray.assembly.prior_loading import trained_prior
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.cascade import CascadeConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.config.tracking import TrackingConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.distributed import worker_group
from ddpm_ray.runs.evaluation import evaluate, evaluate_cascade, evaluate_worker
from ddpm_ray.runs.load_model import load_to_draw
from ddpm_ray.runs.make_cascade import make_cascade
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.storage import checksummed_json
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.tracking.errors import TrackingError
from ddpm_ray.tracking.pyfunc_model import _load_pyfunc
from tests.data.captioned_sets import write_captioned
from tests.fixtures.threaded_workers import OnWorkers
from tests.runs.test_ema_search import RunControl
from tests.sampling.test_cascade import PROMPTS
from tests.sampling.test_cascade import cascade as exact_cascade
from tests.test_cascade_job import TEXTS, runs  # noqa: F401
from tests.tracking.test_mlflow_runs import MLFLOWS

TWO = "prior", "decoder"
CALL: dict[str, Any] = {"prompts": TEXTS, "seed": 3}
SHOWN = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 1), np.uint8)
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(runs: Path, tmp_path: Path) -> Make:  # noqa: F811
    """Make the cascade of the runs in the folder `cascade` of the test."""

    def made(
        prior: str = "prior", out: str = str(tmp_path / "cascade"), **options: Any
    ) -> dict[str, Any]:
        where = {name: str(runs / name) for name in (prior, "decoder", "upsampler-4")}
        stages = where[prior], where["decoder"], (where["upsampler-4"],)
        config = CascadeConfig(*stages, candidates=3, **options)
        return make_cascade(out, config, tmp_path)

    return made


def drawn(where: Path | str) -> tuple[Images, Images]:
    """Images of prompts, and variations, which need the image encoder."""
    cascade = ddpm_ray.load_cascade(where, "cpu")
    return cascade.sample(3, **CALL), cascade.variations(SHOWN, seed=1)


def test_a_cascade_with_copies_loads_anywhere(
    make: Make,
    runs: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make()
    wanted = drawn(tmp_path / "cascade")
    parts = make(copies=True)
    names = [parts["prior"], parts["decoder"], *parts["upsamplers"]]
    folders = {file.name for file in (tmp_path / "cascade").iterdir() if file.is_dir()}
    assert folders == {one["url"] for one in names}
    assert {name.rpartition("-")[0] for name in folders} == {"prior", "decoder", "upsampler-1"}
    shutil.move(tmp_path / "cascade", tmp_path / "elsewhere")
    runs.rename(gone := runs.with_name("gone"))
    try:
        for found, want in zip(drawn(tmp_path / "elsewhere"), wanted, strict=True):
            np.testing.assert_array_equal(found, want)
    finally:
        gone.rename(runs)


def test_a_copy_without_its_encoder_is_refused(
    make: Make,
    runs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Before there is a cascade.json; a copy of a copy takes the encoder of the copy."""
    parts, encoder = make(), runs / "encoder"
    first = write_copies(tmp_path / "first", parts)
    within = {
        name: {**first[name], "url": str(tmp_path / "first" / first[name]["url"])} for name in TWO
    }
    encoder.rename(runs / "away")
    try:
        with pytest.raises(ConfigError, match=r"^prior cannot be copied: .*put that encoder back$"):
            write_copies(tmp_path / "none", parts)
        write_copies(tmp_path / "second", parts | within)
        assert not (tmp_path / "none/cascade.json").exists()
        for found, want in zip(*map(drawn, (tmp_path / "first", tmp_path / "second")), strict=True):
            np.testing.assert_array_equal(found, want)
    finally:
        (runs / "away").rename(encoder)


def test_a_cascade_with_copies_in_a_bucket_needs_nothing_else(
    make: Make,
    runs: Path,  # noqa: F811
    s3: str,
) -> None:
    """Copied there by the job, or later by hand."""
    where = f"{s3}/cascade"
    make(out=where, copies=True)
    encoder = runs / "encoder"
    encoder.rename(runs / "away")
    try:
        found = drawn(where)
    finally:
        (runs / "away").rename(encoder)
    make()
    for one, want in zip(found, drawn(Path(make()["cascade"])), strict=True):
        np.testing.assert_array_equal(one, want)


def test_the_folder_of_a_run_is_left_as_it_is(
    make: Make,
    runs: Path,  # noqa: F811
) -> None:
    before = sorted(runs.joinpath("decoder").rglob("*"))
    (runs / "decoder/run.json").touch()
    try:
        with pytest.raises(ConfigError, match="which holds a run: name another folder"):
            make(out=str(runs / "decoder"), copies=True)
    finally:
        (runs / "decoder/run.json").unlink()
    assert sorted(runs.joinpath("decoder").rglob("*")) == before


def test_another_cascade_in_the_folder_is_named(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    make(copies=True)
    assert not caplog.records  # the same models
    file = tmp_path / "cascade/cascade.json"
    other = {**first, "decoder": {**first["decoder"], "sha256": "0" * 64}}
    checksummed_json.write(str(file), other)
    make()
    file.write_text("{}")
    make()
    said = [one for one in map(str, caplog.messages) if "does not use the copies" not in one]
    assert said[0].endswith("held a cascade of other models: it is replaced")
    assert "cascade.json cannot be used (it is not checksummed JSON (KeyError)) and is" in said[1]
    assert len(said) == 2


def test_copies_that_are_replaced_stay_until_the_new_ones_are_whole(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A job that ends as it writes leaves the cascade as it was; the next one names its files."""
    make(copies=True)
    where = tmp_path / "cascade"
    wanted = drawn(where)
    before = {file.name for file in where.iterdir()}
    with monkeypatch.context() as broken:
        broken.setattr(cascades, "write_cascade", failing)
        with pytest.raises(StorageError, match="the disk is full"):
            make(prior="second-prior", copies=True)
    for found, want in zip(drawn(where), wanted, strict=True):
        np.testing.assert_array_equal(found, want)
    left = {file.name for file in where.iterdir()}
    assert before < left
    make(copies=True)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"does not use the copies {', '.join(left - before)}; delete them if" in said
    assert {file.name for file in where.iterdir()} == left  # another cascade may name them


def test_a_cascade_of_copies_in_its_own_folder_keeps_them(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Named by URL; none of them is unused."""
    parts, where = make(copies=True), tmp_path / "cascade"
    wanted = drawn(where)
    prior, decoder = (str(where / parts[name]["url"]) for name in TWO)
    upsampler = str(where / parts["upsamplers"][0]["url"])
    make_cascade(str(where), CascadeConfig(prior, decoder, (upsampler,), 3), tmp_path)
    for found, want in zip(drawn(where), wanted, strict=True):
        np.testing.assert_array_equal(found, want)
    assert not caplog.records


def failing(folder: str, parts: Any) -> None:
    """In place of write_cascade in the folder of the result."""
    if Path(folder).name == "cascade":
        raise StorageError(folder, "the disk is full", "free some")
    checksummed_json.write(f"{folder}/cascade.json", parts)


@pytest.mark.parametrize("name", ["a/b", "a:b", " "])
def test_a_name_that_mlflow_does_not_take_is_refused_at_once(name: str) -> None:
    words = ["prior=a", "decoder=b", f"register_as='{name}'"]
    with pytest.raises(ConfigError, match=r"register_as is .*; MLflow takes names without / and"):
        load_config(CascadeConfig, None, words)


@pytest.mark.filterwarnings(*MLFLOWS)
def test_a_cascade_in_the_registry_draws_the_same(
    make: Make,
    mlflow_database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By load_cascade, by the jobs, by mlflow.pyfunc; the job may be repeated."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_database)
    monkeypatch.chdir(tmp_path)
    tracked = TrackingConfig(experiment="cascades")
    made = make(register_as="fruit", tracking=tracked)
    assert made == make(register_as="fruit", tracking=tracked)
    assert made["registered"] == {"name": "fruit", "version": "1"}
    wanted = drawn(tmp_path / "cascade")
    for uri in ("models:/fruit@champion", f"runs:/{made['run_id']}/model"):
        for found, want in zip(drawn(uri), wanted, strict=True):
            np.testing.assert_array_equal(found, want)
    assert load_to_draw("models:/fruit@champion").drawn_shape == (8, 8, 1)
    mlflow.set_tracking_uri(mlflow_database)
    served = mlflow.pyfunc.load_model("models:/fruit@champion")
    table = pd.DataFrame({"prompt": [TEXTS[0], TEXTS[1], TEXTS[0]], "seed": 3})
    np.testing.assert_array_equal(served.predict(table), wanted[0])
    with pytest.raises(ConfigError, match="holds a cascade, not one model: load it with"):
        ddpm_ray.load("models:/fruit@champion")
    with pytest.raises(TrackingError, match="the run's id, or the model's name and alias"):
        ddpm_ray.load_cascade("models:/fruit@other")
    run = mlflow.get_run(made["run_id"])
    assert run.info.status == "FINISHED"
    assert made["decoder"]["url"] in run.data.tags["mlflow.note.content"]


def test_a_prior_in_mlflow_draws_embeddings_of_prompts(
    make: Make,
    runs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """From the folder that a run of it is logged as, wherever its encoder has gone."""
    assert not copy_model(make()["prior"]["url"], tmp_path / "prior")
    encoder = runs / "encoder"
    encoder.rename(runs / "away")
    try:
        found = _load_pyfunc(str(tmp_path / "prior")).predict(
            pd.DataFrame({"prompt": TEXTS, "seed": 5, "candidates": 2})
        )
    finally:
        (runs / "away").rename(encoder)
    wanted = trained_prior(str(runs / "prior")).embeddings(TEXTS, range(2), 5, 2)
    np.testing.assert_array_equal(found, wanted.numpy())


def scored(
    model: str, config: EvaluateConfig, workers: Workers, tmp_path: Path, monkeypatch: Any
) -> dict[str, Any]:
    """Scores by `evaluate` on threads in place of Ray's workers."""
    here = threading.local()

    def run(_: Any, settings: dict[str, Any], *__: Any) -> Any:
        here.workers = workers
        return evaluate_worker.evaluate_worker(settings | {"control": RunControl()})

    monkeypatch.setattr(worker_group, "run", run)
    monkeypatch.setattr(evaluate_worker, "distributed_context", lambda: here.workers)
    return evaluate.run_evaluation(model, config, tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Captioned images 8 x 8, of the size that the cascade draws."""
    shape = ImageShape(8, 8, 1)
    write_captioned(tmp_path / "data", [TEXTS[:1], TEXTS[1:]] * 4, 8, noise=True, shape=shape)
    return str(tmp_path / "data")


def test_a_cascade_is_scored_the_same_by_any_number_of_workers(
    make: Make,
    data: str,
    runs: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_workers: OnWorkers,
) -> None:
    """The images of a worker's share are those of one worker; prompts are captions of the data."""
    make()
    wanted = EvaluationConfig(
        num_images=5, features="digits", alignment_encoder=str(runs / "encoder")
    )
    config = EvaluateConfig(
        data, sampling=SamplingSettings(steps=4, batch_size=2), evaluation=wanted
    )
    folder = str(tmp_path / "cascade")
    alone = scored(folder, config, Workers(), tmp_path, monkeypatch)
    assert {"eval/fd_digits", "eval/alignment"} < alone["metrics"].keys()
    origin = alone["certificate"]["model"]
    parts = json.loads(Path(folder, "cascade.json").read_text())["value"]
    assert origin["prior"]["model_sha256"] == parts["prior"]["sha256"]
    assert origin["candidates"] == 3
    assert alone["certificate"]["samples"]["prompts"]
    settings = {
        "model_uri": folder,
        "tracking_uri": "",
        "config": to_dict(config),
        "alignment_checkpoint": {
            "url": str(next((runs / "encoder/checkpoints").glob("step-*"))),
            "sha256": alone["certificate"]["alignment"]["model_sha256"],
        },
    }
    here = threading.local()
    monkeypatch.setattr(evaluate_worker, "distributed_context", lambda: here.workers)

    def part(workers: Workers) -> dict[str, float]:
        here.workers = workers
        found = evaluate_worker._scores(config, settings, lambda progress: None)
        assert found["certificate"]["samples"] == alone["certificate"]["samples"]
        return dict(found["metrics"])

    for count in (2, 3):  # two workers have a batch that begins at 3
        for found in on_workers(count, part):
            assert found == pytest.approx(alone["metrics"], rel=1e-4)  # other batches


def test_each_batch_of_a_score_has_its_own_prompts() -> None:
    """Wherever it begins: image i has prompt i % n of all, though the call gets a few."""
    prompts = [PROMPTS[n] for n in (0, 1, 0, 0, 1)]
    whole = exact_cascade().sample(7, prompts=prompts)
    for part in (range(3, 5), range(1, 4), range(5, 7)):
        found = evaluate_cascade._drawn(exact_cascade(), prompts, part)
        np.testing.assert_array_equal(found, whole[part.start : part.stop])


def test_scores_that_a_cascade_does_not_have_are_refused_before_ray_starts(
    make: Make,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make()
    monkeypatch.setattr(worker_group, "run", lambda *_: pytest.fail("Ray was started"))
    run = partial(evaluate.run_evaluation, str(tmp_path / "cascade"), home=tmp_path)
    for wanted, says in (
        ({"bits_per_dim_images": 2}, r"bits_per_dim_images is 2; it is a score of one network"),
        ({"precision": "bf16_weights"}, r"precision is bf16_weights; a cascade draws in float32"),
    ):
        chosen = EvaluationConfig(num_images=4, features="digits", **wanted)
        config = EvaluateConfig(data, sampling=SamplingSettings(steps=4), evaluation=chosen)
        with pytest.raises(ConfigError, match=says):
            run(config=config)
    chosen = EvaluationConfig(num_images=4, features="digits")
    silent = EvaluateConfig(sampling=SamplingSettings(steps=4), evaluation=chosen)
    with pytest.raises(ConfigError, match=r"large holds no captions: a cascade draws images of te"):
        run(config=silent)


def test_the_variable_that_names_a_database_without_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any model is loaded; the option tracking.uri is not set."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/below/mlflow.db")
    config = CascadeConfig("no prior", "no decoder", register_as="fruit")
    with pytest.raises(ConfigError, match=r"^\$MLFLOW_TRACKING_URI is sqlite:.*cannot be made"):
        make_cascade(str(tmp_path / "out"), config, tmp_path)
