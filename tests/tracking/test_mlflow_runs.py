"""One MLflow run per training run, each row once, whatever dies: on a real database and server."""

import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from ddpm_ray import fault_injection
from ddpm_ray.assembly import checkpoint_loading
from ddpm_ray.assembly.training_run import training_state
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.reporting import RATES, Row
from ddpm_ray.runs import train
from ddpm_ray.tracking import async_logger, mlflow_runs, model_registry, run_log, run_lookup
from ddpm_ray.tracking.async_logger import Tracker
from ddpm_ray.tracking.mlflow_runs import TrackingError, TrackingOutageError
from ddpm_ray.tracking.run_info import MAX_METRICS, RunMetadata, TrackedRun
from ddpm_ray.training import checkpoint_parts
from ddpm_ray.training.checkpoint_folder import read_checkpoint
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.writer_lease import Lease
from tests.data.latent_sets import TINY_UNET, commit, encode_noise, initial_run
from tests.limits import ENDS_S

PATIENCE_S = ENDS_S


class Line(Protocol):
    """The line to the server that conftest.py makes."""

    up: bool

    @property
    def uri(self) -> str: ...

    def cut(self) -> None: ...


@pytest.fixture(params=["database", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    """A tracking store: the database itself, or a server in front of it."""
    if request.param == "database":
        return str(request.getfixturevalue("mlflow_database"))
    return f"http://127.0.0.1:{request.getfixturevalue('mlflow_server')}"


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[[str], TrackedRun]:
    """A new run in an experiment of this test's own, with its files in tmp_path."""

    def make(uri: str) -> TrackedRun:
        artifacts = None if uri.startswith("http") else str(tmp_path / "artifacts")
        experiment = f"{tmp_path.parent.name}/{tmp_path.name}"
        return run_lookup.find_or_create_run(uri, experiment, "tiny", tmp_path.name, artifacts)

    return make


NewRun = Callable[[str], TrackedRun]


def history(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    metrics = MlflowClient(run.uri).get_metric_history(run.run_id, key)
    return sorted((metric.step, metric.value) for metric in metrics)


def rows(steps: range, rate: float = 1.0) -> list[Row]:
    """What a run logs: a loss per step, and each 5 steps the rates, which a replay gives anew."""
    return [
        Row(
            step,
            {"train/loss": 1 / step} | (dict.fromkeys(RATES, rate + step) if step % 5 == 0 else {}),
        )
        for step in steps
    ]


def sent(run: TrackedRun, *parts: list[Row], unsent: list[Row] | None = None) -> Tracker:
    """A closed tracker that has sent all of `parts`."""
    tracker = Tracker(lambda: run, 0.01, unsent or [])
    for part in parts:
        tracker.rows(part)
    assert tracker.close(PATIENCE_S) == 0
    assert tracker.unsent() == []
    return tracker


def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds, which threads of others bring about."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_a_run_is_found_again_by_its_identity(uri: str, tmp_path: Path) -> None:
    """In its experiment, whatever its name; another identity is another run."""
    artifacts = None if uri.startswith("http") else str(tmp_path)
    make = run_lookup.find_or_create_run
    experiment = f"found {tmp_path}"
    one, two = f"one {tmp_path}", f"two {tmp_path}"
    first = make(uri, experiment, "tiny", one, artifacts)
    mlflow_runs.finish(first, "FAILED")
    assert make(uri, experiment, "renamed", one, artifacts) == first
    assert MlflowClient(uri).get_run(first.run_id).info.status == "RUNNING"
    other = make(uri, experiment, "tiny", two, artifacts)
    assert other.run_id != first.run_id
    assert other.experiment_id == first.experiment_id
    assert other.page.startswith(f"/#/experiments/{other.experiment_id}/runs/{other.run_id}/")


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_with_the_given_status(
    status: str, mlflow_database: str, new_run: NewRun
) -> None:
    run = new_run(mlflow_database)
    mlflow_runs.finish(run, status)
    assert MlflowClient(run.uri).get_run(run.run_id).info.status == status


def test_a_replay_leaves_each_row_once_and_the_first_rate(uri: str, new_run: NewRun) -> None:
    """Killed at step 23, whose newest checkpoint was of step 12 and had 2 rows unsent."""
    run = new_run(uri)
    sent(run, rows(range(1, 20)), rows(range(20, 24)))
    sent(run, rows(range(13, 31), rate=7.0), unsent=rows(range(11, 13), rate=7.0))
    assert history(run, "train/loss") == [(step, 1 / step) for step in range(1, 31)]
    for key in RATES:
        first = [(step, 1.0 + step) for step in (5, 10, 15, 20)]
        assert history(run, key) == [*first, (25, 32.0), (30, 37.0)]


@pytest.mark.parametrize("stops_at", ["asked", "checked"])
def test_a_sender_that_wakes_after_a_takeover_adds_no_rows(
    stops_at: str,
    uri: str,
    new_run: NewRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It stops after it asked what is stored, or between its lease check and its send.

    The other one goes on from step 10 meanwhile, and ends at step 40. In the second case one batch
    arrives, whose losses are those of a replay; no later one does, and no row is missing.
    """
    run, driver = new_run(uri), Lease.first(str(tmp_path / "checkpoints"))
    old, batches, stopped, go_on = driver.renewed(), 0, threading.Event(), threading.Event()
    send, at = run_log.RunLog.rows, {"asked": "flush", "checked": "send"}[stops_at]

    def stop(point: str) -> None:
        if point == at and threading.current_thread() is sender and not go_on.is_set():
            stopped.set()
            assert go_on.wait(PATIENCE_S)

    def counted(log: run_log.RunLog, rows: Any) -> None:
        nonlocal batches
        stop("send")
        batches += threading.current_thread() is sender
        send(log, rows)

    sent(run, rows(range(1, 21)))
    monkeypatch.setattr(fault_injection, "at", stop)
    monkeypatch.setattr(run_log.RunLog, "rows", counted)
    frozen = Tracker(lambda: run, 0.01, rows(range(21, 1021)), check_lease=old.check)
    sender = frozen._threads[0]
    assert stopped.wait(PATIENCE_S)
    new = driver.renewed()
    follower = Tracker(lambda: run, 0.01, rows(range(11, 31)), check_lease=new.check)
    until(lambda: not follower.unsent())
    go_on.set()
    until(lambda: not sender.is_alive())
    follower.rows(rows(range(31, 41)))
    assert follower.close(PATIENCE_S) == 0
    found = history(run, "train/loss")
    assert batches == (0 if stops_at == "asked" else 1)
    last = 40 if stops_at == "asked" else found[-1][0]
    assert found == [(step, 1 / step) for step in range(1, last + 1)]
    assert last <= 20 + MAX_METRICS
    assert caplog.text.count("of this run goes on with it; this process commits no more") == 1
    frozen.rows(rows(range(1021, 1031)))
    assert frozen.close(PATIENCE_S) > 0  # at once
    assert "sent on resume" not in caplog.text


def test_pictures_of_a_superseded_process_stay_where_they_are(
    mlflow_database: str, new_run: NewRun, tmp_path: Path
) -> None:
    """They have the names of the later process's, and would take their places."""
    run, driver = new_run(mlflow_database), Lease.first(str(tmp_path / "checkpoints"))
    old, new = driver.renewed(), driver.renewed()
    for lease, score in ((new, 2), (old, 1)):
        sink = Tracker(lambda: run, 0.01, [], check_lease=lease.check)
        sink.document("evaluation/a.json", {"score": score})
        sink.close(PATIENCE_S)
    artifacts = MlflowClient(run.uri).get_run(run.run_id).info.artifact_uri
    assert mlflow.artifacts.load_dict(f"{artifacts}/evaluation/a.json") == {"score": 2}


def test_more_rows_than_one_call_takes_arrive(mlflow_database: str, new_run: NewRun) -> None:
    """MLflow takes 1,000 metrics a call; whole rows go together, none is cut."""
    run = new_run(mlflow_database)
    many = [Row(step, {f"m{k}": float(step) for k in range(7)}) for step in range(1, 301)]
    sent(run, many)
    for key in ("m0", "m6"):
        assert [step for step, _ in history(run, key)] == list(range(1, 301))


def test_a_row_has_the_time_of_its_step(mlflow_database: str, new_run: NewRun) -> None:
    """So that it is the same row however often it is sent."""
    run = new_run(mlflow_database)
    sent(run, rows(range(1, 4)))
    metrics = MlflowClient(run.uri).get_metric_history(run.run_id, "train/loss")
    assert sorted(m.timestamp for m in metrics) == [run.start_ms + step for step in (1, 2, 3)]


def pictures(run: TrackedRun) -> Counter[tuple[str, str, str]]:
    """(key, step, kind) of each picture that the UI finds."""
    found: Counter[tuple[str, str, str]] = Counter()
    for item in MlflowClient(run.uri).list_artifacts(run.run_id, "images"):
        stem, _, kind = Path(item.path).name.rpartition(".")
        key, _, step, *_ = stem.split("+")
        found[key.removeprefix("at a glance~"), step, kind] += 1
    return found


def test_pictures_and_documents_arrive_once(uri: str, new_run: NewRun, tmp_path: Path) -> None:
    """Also two pictures of one step, and also where a second life sends them again."""
    run, image = new_run(uri), Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30))
    for score in (1, 2):
        tracker = Tracker(lambda: run, 0.01, [])
        for key, step in (("samples", 5), ("samples", 10), ("denoising", 10)):
            tracker.image(key, step, image)
        tracker.document("evaluation/step-00000010.json", {"score": score})
        assert tracker.close(PATIENCE_S) == 0
    wanted = itertools.product(
        [(key, "0") for key in ("samples", "denoising")]
        + [("samples", "5"), ("samples", "10"), ("denoising", "10")],
        ("png", "webp"),
    )
    assert pictures(run) == Counter((*which, kind) for which, kind in wanted)
    client = MlflowClient(run.uri)
    whole = next(
        item.path for item in client.list_artifacts(run.run_id, "images") if "png" in item.path
    )
    with Image.open(client.download_artifacts(run.run_id, whole, str(tmp_path))) as lying:
        assert (np.asarray(lying) == np.asarray(image)).all()
    document = client.download_artifacts(run.run_id, "evaluation", str(tmp_path))
    assert json.loads(Path(document, "step-00000010.json").read_text()) == {"score": 2}
    assert client.get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_mlflows_panel_opens_on_the_newest_picture(
    mlflow_database: str, new_run: NewRun, tmp_path: Path
) -> None:
    """It opens at step 0, which showed the noise of the untrained network."""
    run, tracker = new_run(mlflow_database), None
    for step in (0, 5, 10):
        tracker = Tracker(lambda: run, 0.01, [])
        tracker.image("samples", step, Image.new("L", (9, 9), 20 * step))
        assert tracker.close(PATIENCE_S) == 0
    for step, level in ((0, 200), (5, 100), (10, 200)):
        path = run_log.image_path(run, "samples", step)
        found = MlflowClient(run.uri).download_artifacts(run.run_id, path, str(tmp_path))
        with Image.open(found) as image:
            assert image.getextrema() == (level, level)


def test_pictures_are_named_as_mlflow_names_them(
    mlflow_database: str, new_run: NewRun, tmp_path: Path
) -> None:
    """Its UI reads key, step and time from the file's name: ours differ in the numbers alone."""
    run, image = new_run(mlflow_database), Image.new("L", (300, 300))
    client = MlflowClient(run.uri)

    def names() -> set[str]:
        return {item.path for item in client.list_artifacts(run.run_id, "images")}

    tracker = Tracker(lambda: run, 0.01, [])
    tracker.image("k", 7, image)
    assert tracker.close(PATIENCE_S) == 0
    ours = names()
    for step in (0, 7):
        when = run.start_ms + step
        client.log_image(run.run_id, image, key="at a glance/k", step=step, timestamp=when)
    theirs = names() - ours
    number = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    assert len(theirs) == 4
    assert {number.sub("", name) for name in ours} == {number.sub("", name) for name in theirs}


def described(run: TrackedRun, **changes: Any) -> None:
    reported: dict[str, Any] = {
        "params": {f"key.{i}": i for i in range(150)},  # MLflow takes 100 a call
        "tags": {"git_commit": "abc"},
        "config_yaml": "name: a\n",
        "dataset_url": "/shards/digits",
        "dataset_fingerprint": "f" * 64,
    }
    mlflow_runs.describe(run, **reported | changes)


def test_what_a_run_is_stands_in_it_and_may_be_sent_again(uri: str, new_run: NewRun) -> None:
    """Resumed with another value of a key that may change: MLflow refuses a changed parameter."""
    run = new_run(uri)
    described(run)
    described(run, params={"key.1": "changed", "key.new": "x"}, tags={"git_commit": "def"})
    found = MlflowClient(run.uri).get_run(run.run_id)
    assert found.data.params == {f"key.{i}": str(i) for i in range(150)} | {"key.new": "x"}
    assert found.data.tags["git_commit"] == "def"
    assert MlflowClient(run.uri).list_artifacts(run.run_id)[0].path == "config.yaml"
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "f" * 36)
    assert "/shards/digits" in dataset.dataset.source
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]


def test_a_restart_replaces_its_description_and_keeps_the_users_words(
    uri: str, new_run: NewRun
) -> None:
    """Of a run that failed, was started again and finished; the tag is MLflow's description."""
    run, client = new_run(uri), MlflowClient(uri)

    def note() -> str:
        return str(client.get_run(run.run_id).data.tags["mlflow.note.content"])

    described(run, description="digits, no scores")
    client.set_tag(run.run_id, "mlflow.note.content", f"{note()}\n\nmine")
    mlflow_runs.finish(run, "FAILED", "out of memory")
    assert "**Failed**: out of memory" in note()
    described(run, description="digits, no scores")
    assert "out of memory" not in note()
    for _ in range(2):
        mlflow_runs.finish(run, "FINISHED", description="FID 3.1", tags={"eval/fid": "3.1 [3, 4]"})
        assert note().count("FID 3.1") == 1
        assert "no scores" not in note()
        assert note().endswith("\n\nmine")
    assert client.get_run(run.run_id).data.tags["eval/fid"] == "3.1 [3, 4]"


@pytest.mark.parametrize("rival", [True, False])
def test_a_data_set_that_another_driver_logs_meanwhile_is_logged(
    uri: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch, rival: bool
) -> None:
    """On commit 54bfc9e the second of two drivers ended: "MLflow refuses it (UNIQUE ...)"."""
    run, log_inputs = new_run(uri), MlflowClient.log_inputs

    def refused(*args: Any, **kwargs: Any) -> None:
        if rival:
            log_inputs(*args, **kwargs)
        raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: inputs")

    monkeypatch.setattr(MlflowClient, "log_inputs", refused)
    if rival:
        described(run)
        assert len(MlflowClient(run.uri).get_run(run.run_id).inputs.dataset_inputs) == 1
    else:
        with pytest.raises(TrackingError, match="UNIQUE constraint failed"):
            described(run)


def test_of_two_runs_that_a_lost_answer_left_one_remains(uri: str, tmp_path: Path) -> None:
    artifacts = None if uri.startswith("http") else str(tmp_path)
    experiment = f"twins {tmp_path}"
    one = f"one {tmp_path}"
    first = run_lookup.find_or_create_run(uri, experiment, "tiny", one, artifacts)
    client = MlflowClient(uri)
    client.create_run(first.experiment_id, None, {run_lookup.RUN_TAG: one}, "tiny")
    found = run_lookup.find_or_create_run(uri, experiment, "tiny", one, artifacts)
    (left,) = client.search_runs([first.experiment_id])
    assert left.info.run_id == found.run_id


@pytest.mark.usefixtures("_impatient")
def test_a_server_that_is_away_when_a_run_starts_misses_nothing(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver goes on without a run; the worker's tracker makes it once it can."""
    metadata = RunMetadata(
        line.uri,
        f"away {tmp_path}",
        "tiny",
        f"one {tmp_path}",
        None,
        "",
        params={"seed": 1},
        tags={"a": "b"},
        config_yaml="seed: 1\n",
        dataset_url="/shards/digits",
        dataset_fingerprint="f" * 64,
    )
    line.cut()
    assert train._tracked(metadata) is None
    assert "Training continues; metric rows are kept" in caplog.text
    tracker = Tracker(partial(mlflow_runs.open_run, metadata), 0.01, [])
    tracker.rows(rows(range(1, 8)))
    until(lambda: "kept, retrying" in caplog.text)
    assert tracker.unsent() == rows(range(1, 8))
    line.up = True
    assert tracker.close(PATIENCE_S) == 0
    run = mlflow_runs.open_run(metadata)
    (found,) = MlflowClient(run.uri).search_runs([run.experiment_id])
    assert (found.data.params, found.data.tags["a"]) == ({"seed": "1"}, "b")
    assert history(run, "train/loss") == [(step, 1 / step) for step in range(1, 8)]


def test_what_will_not_pass_is_no_outage(uri: str, tmp_path: Path) -> None:
    """A name that MLflow refuses stays refused: the run ends at once, with the line."""
    with pytest.raises(TrackingError, match="MLflow refuses it") as reported:
        run_lookup.find_or_create_run(uri, "", "tiny", f"one {tmp_path}", str(tmp_path))
    assert not isinstance(reported.value, TrackingOutageError)


def test_a_dead_server_is_reported_in_a_line_within_seconds() -> None:
    """Nobody listens on port 9 of this host; MLflow's own defaults would try for two minutes."""
    begun_s = time.monotonic()
    with pytest.raises(TrackingError, match=r"does not answer .* correct tracking\.uri") as e:
        run_lookup.find_or_create_run("http://127.0.0.1:9", "e", "n", "i", None)
    assert time.monotonic() - begun_s < 30
    assert str(e.value).startswith("http://127.0.0.1:9: ")
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.usefixtures("mlflow_database")
def test_a_database_that_cannot_be_is_reported_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="cannot be written") as reported:
        run_lookup.find_or_create_run(f"sqlite:///{tmp_path}/file/x.db", "e", "n", "i", None)
    assert len(str(reported.value).splitlines()) == 1


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(async_logger, "RETRY_S", 0.05)


@pytest.mark.usefixtures("_impatient")
def test_an_outage_loses_nothing_and_stops_no_step(
    line: Line, new_run: NewRun, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of the outage stand in unsent(), for the checkpoint, and arrive after it, once."""
    run = new_run(line.uri)
    tracker = Tracker(lambda: run, 0.01, [])
    tracker.rows(rows(range(1, 8)))
    until(lambda: not tracker.unsent())
    line.cut()
    tracker.rows(rows(range(8, 12)))
    tracker.image("samples", 10, Image.new("L", (4, 4)))
    until(lambda: "kept, retrying" in caplog.text)
    assert tracker.unsent() == rows(range(8, 12))
    line.up = True
    until(lambda: not tracker.unsent())
    assert tracker.close(PATIENCE_S) == 0
    assert history(run, "train/loss") == [(step, 1 / step) for step in range(1, 12)]
    assert sum(pictures(run).values()) == 4, "each at its step and as the newest"


@pytest.mark.usefixtures("_impatient")
def test_a_server_that_was_away_at_the_start_still_has_no_rate_twice(
    line: Line, new_run: NewRun, caplog: pytest.LogCaptureFixture
) -> None:
    """What earlier lives logged is looked up before the first row is sent, however late."""
    run = new_run(line.uri)
    sent(run, rows(range(1, 11)))
    line.cut()
    tracker = Tracker(lambda: run, 0.01, [])
    tracker.rows(rows(range(4, 16), rate=9.0))
    until(lambda: "kept, retrying" in caplog.text)
    line.up = True
    assert tracker.close(PATIENCE_S) == 0
    assert history(run, RATES[0]) == [(5, 6.0), (10, 11.0), (15, 24.0)]


@pytest.mark.usefixtures("_impatient")
def test_at_the_end_a_dead_server_costs_the_patience_and_no_more(
    line: Line, new_run: NewRun
) -> None:
    run = new_run(line.uri)
    line.cut()
    tracker = Tracker(lambda: run, 0.01, [])
    tracker.rows(rows(range(1, 4)))
    begun_s = time.monotonic()
    assert tracker.close(0.5) == 3
    assert time.monotonic() - begun_s < 10
    assert tracker.unsent() == rows(range(1, 4))
    for thread in tracker._threads:  # give up by themselves: nothing is sent behind one's back
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


# The model.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a tiny committed checkpoint whose network does something."""
    config = load_config(
        RunConfig,
        None,
        [
            "name=tiny",
            "data.url=/shards",
            "schedule.num_steps=9",
            "sampling.steps=3",
            "model.base_channels=4",
            "model.groups=2",
            "model.channel_mults=[1]",
            "model.blocks_per_level=1",
            "model.attention_resolutions=[]",
        ],
    )
    facts = {"config": to_dict(config), "image_shape": [4, 4, 3], "data_fingerprint": "f" * 64}
    state = training_state(config, ImageShape(4, 4, 3), torch.device("cpu"), facts)
    for parameter in state.ema.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    store = CheckpointStore(str(tmp_path_factory.mktemp("run") / "checkpoints"))
    return store.save(state.snapshot([]))


LOADER = "ddpm_ray.tracking.pyfunc_model"
FORMER_LOADER = "ddpm_ray.cluster.served_model"  # of models that are in MLflow already
MLFLOWS = [  # warnings that MLflow's own code meets as it logs and loads a model
    "ignore::DeprecationWarning:mlflow",
    "ignore::FutureWarning:mlflow",
    "ignore::UserWarning:mlflow",
    "ignore::ResourceWarning",
]


@pytest.mark.parametrize(
    "loader, wanted",
    [
        (LOADER, {"num_images": 5, "steps": 3, "seed": 2}),
        (FORMER_LOADER, pd.DataFrame({"num_images": [5], "seed": [2], "steps": [3]})),
    ],
    ids=["dict", "table"],
)
@pytest.mark.filterwarnings(*MLFLOWS)
def test_a_logged_model_samples_what_its_checkpoint_samples(
    loader: str,
    wanted: Any,
    uri: str,
    new_run: NewRun,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without pickle; as any MLflow user loads it."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    run = new_run(uri)
    model_registry.log_model(run, checkpoint, loader)
    mlflow.set_tracking_uri(uri)
    served = mlflow.pyfunc.load_model(f"runs:/{run.run_id}/model")
    expected = checkpoint_loading.trained_model(checkpoint).sample(5, steps=3, seed=2)
    assert (served.predict(wanted) == expected).all()
    assert expected.std() > 1


@pytest.mark.filterwarnings(*MLFLOWS)
def test_a_model_is_logged_once_and_found_by_its_alias(
    uri: str, new_run: NewRun, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are several files of the checkpoint."""
    run, client = new_run(uri), MlflowClient(uri)
    monkeypatch.setattr(checkpoint_parts, "PART_BYTES", 1024)
    split = CheckpointStore(str(tmp_path / "split")).save(read_checkpoint(checkpoint))
    assert len([*Path(split).glob("ema-*")]) > 1
    for _ in range(2):
        model_registry.log_model(run, split, LOADER)
    assert len(client.get_run(run.run_id).outputs.model_outputs) == 1
    name = f"tiny-{run.run_id}"
    mlflow.set_tracking_uri(uri)
    version = mlflow.register_model(f"runs:/{run.run_id}/model", name)
    client.set_registered_model_alias(name, "best", version.version)
    expected = checkpoint_loading.trained_model(checkpoint).sample(2, steps=3)
    for number, place in enumerate([f"runs:/{run.run_id}/model", f"models:/{name}@best"]):
        folder = model_registry.download_model(uri, place, tmp_path / str(number))
        assert not [*tmp_path.rglob("*.pkl"), *tmp_path.rglob("*.py")]
        assert (checkpoint_loading.trained_model(str(folder)).sample(2, steps=3) == expected).all()


@pytest.mark.filterwarnings(*MLFLOWS)
def test_a_model_of_latents_is_logged_with_its_autoencoder(
    mlflow_database: str, new_run: NewRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As it loads where the autoencoder's own folder is not; without it there is a warning."""
    url = encode_noise(tmp_path, images=12)
    keys = ["name=tiny", "schedule.num_steps=5", "sampling.steps=2", f"data.url={url}"]
    run = commit(initial_run(load_config(RunConfig, None, [*keys, *TINY_UNET])), tmp_path / "run")
    (checkpoint,) = map(str, Path(run).glob("checkpoints/step-*"))
    wanted = checkpoint_loading.trained_model(run).sample(2)
    logged = new_run(mlflow_database)
    model_registry.log_model(logged, checkpoint, LOADER)
    assert not caplog.records
    (tmp_path / "autoencoder").rename(tmp_path / "gone")
    mlflow.set_tracking_uri(mlflow_database)
    served = mlflow.pyfunc.load_model(f"runs:/{logged.run_id}/model")
    assert (served.predict({"num_images": 2}) == wanted).all()
    uri = f"runs:/{logged.run_id}/model"
    folder = model_registry.download_model(mlflow_database, uri, tmp_path / "download")
    assert (checkpoint_loading.trained_model(str(folder)).sample(2) == wanted).all()
    without = run_lookup.find_or_create_run(
        mlflow_database, tmp_path.name, "other", "other", str(tmp_path / "artifacts")
    )
    model_registry.log_model(without, checkpoint, LOADER)
    assert "does not load: " in caplog.text
    assert "The copy is without it: load it with autoencoder=URL" in caplog.text
    uri = f"runs:/{without.run_id}/model"
    folder = model_registry.download_model(mlflow_database, uri, tmp_path / "second")
    assert not (folder / "autoencoder").exists()
    moved = str(tmp_path / "gone")
    found = checkpoint_loading.trained_model(str(folder), autoencoder=moved).sample(2)
    assert (found == wanted).all()


@pytest.mark.parametrize("place", ["models:/nobody@best", "runs:/0123456789abcdef/model"])
def test_a_model_that_is_not_there_is_reported_in_a_line(
    place: str, uri: str, tmp_path: Path
) -> None:
    with pytest.raises(TrackingError, match="check the run's id, or the model's name") as reported:
        model_registry.download_model(uri, place, tmp_path)
    assert len(str(reported.value).splitlines()) == 1


def test_an_error_keeps_its_text_through_a_pickle() -> None:
    error = TrackingError("http://here", "it is out", "wait")
    assert str(TrackingError(*error.args)) == str(error) == "http://here: it is out; wait"


# The commit.
