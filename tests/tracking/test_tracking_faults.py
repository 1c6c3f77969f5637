"""A failure of MLflow is reported in a line that says what happened, and no row is lost."""

import dataclasses
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image

from ddpm_ray.distributed import worker_group
from ddpm_ray.reporting import Row
from ddpm_ray.runs import train
from ddpm_ray.tracking import (
    async_logger,
    mlflow_client,
    mlflow_runs,
    model_registry,
    run_log,
    run_lookup,
)
from ddpm_ray.tracking.async_logger import Tracker
from ddpm_ray.tracking.mlflow_runs import TrackingError, TrackingOutageError, TrackingServerError
from ddpm_ray.tracking.run_info import RunMetadata, TrackedRun
from tests.limits import ENDS_S

PATIENCE_S = ENDS_S
ANSWER_S = 300.0  # of an answer that comes too late
ROWS = [Row(step, {"train/loss": 1 / step}) for step in range(1, 8)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(async_logger, "RETRY_S", 0.05)


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def answering_with() -> Iterator[Callable[[Answer], str]]:
    """Makes a server that answers every request so; its URL."""
    servers = []

    def serve(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer(self)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def whole(status: int, body: bytes) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.mark.parametrize(
    "status, body, kind, said",
    [
        (200, b"<html>hello</html>", TrackingError, "is not MLflow .*correct tracking.uri"),
        (200, b"{}", TrackingError, "is not MLflow .*correct tracking.uri"),
        (200, b'{"status": "ok"}', TrackingError, "is not MLflow .*correct tracking.uri"),
        (404, b"<html>nothing</html>", TrackingError, "is not MLflow .*correct tracking.uri"),
        (404, b'{"detail": "Not Found"}', TrackingError, "is not MLflow .*correct tracking.uri"),
        (405, b"<html>not so</html>", TrackingError, "is not MLflow .*correct tracking.uri"),
        (401, b"who are you", TrackingError, "password .401. .*MLFLOW_TRACKING_USERNAME"),
        (403, b"not you", TrackingError, "forbids this .*403.* EDIT on the experiment"),
        (403, b"Invalid Host header", TrackingError, "host name .*--allowed-hosts"),
        (418, b"teapot", TrackingError, "MLflow refuses it .*see MLflow's log"),
        (500, b"oh", TrackingServerError, "an internal error 500 .*see MLflow's log"),
        (502, b"<html>bad gateway</html>", TrackingOutageError, "does not answer .*start it"),
        (503, b"busy", TrackingOutageError, "does not answer .*too many 503 .*start it"),
    ],
)
def test_each_answer_has_its_own_line(
    status: int,
    body: bytes,
    kind: type[TrackingError],
    said: str,
    answering_with: Callable[[Answer], str],
) -> None:
    uri = answering_with(whole(status, body))
    with pytest.raises(TrackingError, match=said) as reported:
        run_lookup.find_or_create_run(uri, "e", "n", "i", None)
    assert type(reported.value) is kind
    assert len(str(reported.value).splitlines()) == 1


@pytest.mark.usefixtures("mlflow_database")  # imports MLflow's store, whose warnings are no errors
@pytest.mark.parametrize(
    "uri, said",
    [
        ("mysql://host/mlflow", "package MySQLdb is not installed; pip install mysqlclient"),
        ("postgresql+asyncpg://host/m", "package asyncpg is not installed; install asyncpg"),
    ],
)
def test_a_missing_driver_is_named(uri: str, said: str) -> None:
    with pytest.raises(TrackingError, match=said) as reported:
        run_lookup.find_or_create_run(uri, "e", "n", "i", None)
    assert not isinstance(reported.value, TrackingOutageError)


def drop_by_drop(handler: http.server.BaseHTTPRequestHandler) -> None:
    """One byte after the other, each well within the time-out between bytes; for ANSWER_S."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(int(10 * ANSWER_S)):
        handler.wfile.write(b" ")
        threading.Event().wait(0.1)


@pytest.mark.parametrize("answer", [drop_by_drop, lambda _: threading.Event().wait(ANSWER_S)])
def test_an_answer_that_does_not_end_is_given_up(
    answer: Answer,
    answering_with: Callable[[Answer], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A line says early that it is late; the run's end waits as long as it was asked to."""
    monkeypatch.setattr(mlflow_client, "CALL_S", 1.5)
    monkeypatch.setattr(mlflow_client, "LATE_S", 0.2)
    uri = answering_with(answer)
    mine = run_lookup.find_or_create_run
    began = time.monotonic()
    with pytest.raises(TrackingOutageError, match="no complete answer within 2 s"):
        mine(uri, "e", "n", "i", None)
    assert time.monotonic() - began < ANSWER_S
    assert f"{uri}: MLflow has not answered for 0 s; waiting" in caplog.text
    sink = Tracker(lambda: mine(uri, "e", "n", "i", None), 0.01, [])
    sink.rows(ROWS)
    began = time.monotonic()
    assert sink.close(0.5) == len(ROWS)
    assert time.monotonic() - began < ANSWER_S
    assert "7 metric rows undelivered; stored in the checkpoint, sent on resume" in caplog.text


# Runs and experiments that people change.


@pytest.fixture
def metadata(mlflow_database: str, tmp_path: Path) -> RunMetadata:
    return RunMetadata(
        mlflow_database,
        f"of {tmp_path}",
        "tiny",
        f"id {tmp_path}",
        str(tmp_path / "artifacts"),
        "",
        {},
        {},
        "a: 1\n",
        "/shards",
        "f" * 64,
    )


def losses(run: TrackedRun) -> list[int]:
    rows = MlflowClient(run.uri).get_metric_history(run.run_id, "train/loss")
    return sorted(row.step for row in rows)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_a_run_is_found_where_its_experiment_went(metadata: RunMetadata) -> None:
    """README: one training run is one MLflow run. Renamed, or another one is configured."""
    first, client = mlflow_runs.open_run(metadata), MlflowClient(metadata.uri)
    client.rename_experiment(first.experiment_id, f"renamed {metadata.experiment}")
    assert mlflow_runs.open_run(metadata) == first
    assert client.get_experiment_by_name(metadata.experiment) is None
    other = dataclasses.replace(metadata, experiment=f"other {metadata.experiment}")
    client.create_experiment(other.experiment)
    assert mlflow_runs.open_run(other) == first


def test_a_deleted_experiment_is_reported_with_both_remedies(metadata: RunMetadata) -> None:
    """With its run in it, and where it was empty."""
    first, client = mlflow_runs.open_run(metadata), MlflowClient(metadata.uri)
    client.delete_experiment(first.experiment_id)
    command = f"mlflow experiments restore --experiment-id {first.experiment_id}"
    with pytest.raises(TrackingError, match=f"run of this training run, was deleted.*{command}"):
        mlflow_runs.open_run(metadata)
    another = dataclasses.replace(metadata, identity=f"another {metadata.identity}")
    with pytest.raises(TrackingError, match=f"{command}`, or set another tracking.experiment"):
        mlflow_runs.open_run(another)
    client.restore_experiment(first.experiment_id)
    assert mlflow_runs.open_run(metadata) == first


def test_a_deleted_run_is_not_replaced_by_one_without_its_rows(metadata: RunMetadata) -> None:
    first, client = mlflow_runs.open_run(metadata), MlflowClient(metadata.uri)
    client.delete_run(first.run_id)
    with pytest.raises(
        TrackingError, match=f"mlflow runs restore --run-id {first.run_id}"
    ) as reported:
        mlflow_runs.open_run(metadata)
    assert not isinstance(reported.value, TrackingOutageError)
    client.restore_run(first.run_id)
    assert mlflow_runs.open_run(metadata) == first


def test_a_run_deleted_while_it_trains_keeps_its_rows(
    metadata: RunMetadata, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so and how it comes back; then the rows arrive."""
    run, client = mlflow_runs.open_run(metadata), MlflowClient(metadata.uri)
    sink = Tracker(lambda: run, 0.01, [])
    sink.rows(ROWS[:3])
    until(lambda: not sink.unsent())
    client.delete_run(run.run_id)
    sink.rows(ROWS[3:])
    said = f"the run {run.run_id} was deleted in MLflow; restore it with"
    until(lambda: said in caplog.text)
    until(lambda: sink.unsent() == ROWS[3:])
    assert caplog.text.count(said) == 1  # not at each of its tries
    client.restore_run(run.run_id)
    assert sink.close(PATIENCE_S) == 0
    assert losses(run) == list(range(1, 8))


def test_a_lost_database_is_reported_when_the_run_goes_on(
    metadata: RunMetadata, caplog: pytest.LogCaptureFixture
) -> None:
    """A new MLflow run in the middle of a training run: earlier metrics are not in it."""
    mlflow_runs.open_run(metadata)
    mlflow_runs.open_run(dataclasses.replace(metadata, begun_step=20))
    assert "created a new one" not in caplog.text
    gone = dataclasses.replace(metadata, identity=f"gone {metadata.identity}", begun_step=20)
    run = mlflow_runs.open_run(gone)
    assert f"at step 20, does not exist; created a new one, {run.run_id}" in caplog.text


def test_a_database_deleted_under_a_run_is_reported_at_its_end(
    metadata: RunMetadata, tmp_path: Path
) -> None:
    file = tmp_path / "own.db"
    run = mlflow_runs.open_run(dataclasses.replace(metadata, uri=f"sqlite:///{file}"))
    file.unlink()
    with pytest.raises(TrackingError, match="the database was deleted during the run"):
        mlflow_runs.finish(run, "FINISHED")


@pytest.mark.parametrize("status", ["FINISHED", "RUNNING"])
def test_a_driver_that_was_followed_leaves_the_run_alone(
    status: str, metadata: RunMetadata
) -> None:
    """The first was frozen; the second took the run over, and finished it or is at it."""
    first = mlflow_runs.open_run(dataclasses.replace(metadata, owner="first"))
    second = mlflow_runs.open_run(dataclasses.replace(metadata, owner="second"))
    if status == "FINISHED":
        mlflow_runs.finish(second, "FINISHED")
    mlflow_runs.finish(first, "FAILED", "lost its lease")
    mlflow_runs.finish(
        mlflow_runs.known_run(dataclasses.replace(metadata, owner="first")), "FAILED"
    )
    found = MlflowClient(metadata.uri).get_run(first.run_id)
    assert (found.info.status, "reason" in found.data.tags) == (status, False)


def test_pictures_that_are_refused_hold_up_nothing(
    metadata: RunMetadata, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their folder cannot be made. Rows, documents and the run's end go on; one line names it."""
    run = mlflow_runs.open_run(metadata)
    root = MlflowClient(metadata.uri).get_run(run.run_id).info.artifact_uri
    Path(root.removeprefix("file://"), "images").write_text("in the way")
    sink = Tracker(lambda: run, 0.01, [])
    for step in (5, 10):
        sink.image("samples", step, Image.new("L", (4, 4)))
    sink.document("evaluation/a.json", {"score": 1})
    sink.rows(ROWS)
    began = time.monotonic()
    assert sink.close(PATIENCE_S) == 0
    assert time.monotonic() - began < PATIENCE_S / 2
    assert losses(run) == list(range(1, 8))
    assert [one.path for one in MlflowClient(metadata.uri).list_artifacts(run.run_id, "evaluation")]
    assert caplog.text.count("MLflow does not accept samples of step 5; skipped") == 1
    assert "not sent to MLflow: samples of step 5, samples of step 10" in caplog.text
    assert "undelivered" not in caplog.text


def test_an_artifact_store_without_credentials_holds_up_nothing(
    metadata: RunMetadata,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """As a worker meets it whose MLflow hands out places in a bucket."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    run = run_lookup.find_or_create_run(
        metadata.uri, metadata.experiment, "tiny", metadata.identity, "s3://bucket/folder"
    )
    sink = Tracker(lambda: run, 0.01, [])
    sink.document("a.json", {})
    sink.rows(ROWS)
    assert sink.close(PATIENCE_S) == 0
    assert "its artifact store): it refuses files (Unable to locate credentials)" in caplog.text
    assert losses(run) == list(range(1, 8))


@pytest.mark.parametrize(
    "kind, fails, tried, arrives",
    [(TrackingServerError, 9, 3, False), (TrackingOutageError, 9, 10, True)],
)
def test_files_wait_out_an_outage_but_not_a_store_that_always_fails(
    kind: type[TrackingError],
    fails: int,
    tried: int,
    arrives: bool,
    metadata: RunMetadata,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that cannot reach its bucket answers 500 each time; one that is away comes back."""
    tries: list[str] = []
    send = run_log.RunLog.document

    def document(self: run_log.RunLog, path: str, content: dict[str, Any]) -> None:
        if path == "first.json" and len(tries) < fails:
            tries.append(path)
            raise kind("http://there", "no", "wait")
        tries.extend([path] if path == "first.json" else [])
        send(self, path, content)

    monkeypatch.setattr(run_log.RunLog, "document", document)
    run = mlflow_runs.open_run(metadata)
    sink = Tracker(lambda: run, 0.01, [])
    sink.document("first.json", {})
    sink.document("second.json", {})
    assert sink.close(PATIENCE_S) == 0
    assert len(tries) == tried
    there = {one.path for one in MlflowClient(metadata.uri).list_artifacts(run.run_id)}
    assert ("first.json" in there) is arrives
    assert "second.json" in there


OPENER = """
import os, sys, warnings
warnings.simplefilter("ignore")
import mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
from ddpm_ray.tracking import mlflow_runs as tracking
folder, count, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
failed = 0
for number in range(rounds):
    gate, opened = os.pipe()
    children = []
    for child in range(count):
        if (pid := os.fork()) == 0:
            os.close(opened)
            os.read(gate, 1)  # returns for all at once, when the parent closes its end
            try:
                uri = f"sqlite:///{folder}/{number}.db"
                tracking.find_or_create_run(uri, "e", "n", f"run {child}", folder)
            except BaseException as error:
                print(error, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(pid)
    os.close(gate), os.close(opened)
    failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in children)
print("failed", failed)
"""


@pytest.mark.slow
def test_processes_that_open_a_new_database_at_once_all_find_its_tables(tmp_path: Path) -> None:
    """Two drivers of a new home, or a driver and its worker: one of them makes the tables."""
    done = subprocess.run(
        [sys.executable, "-c", OPENER, str(tmp_path), "3", "2"],
        capture_output=True,
        text=True,
        timeout=ENDS_S,
    )
    assert done.stdout.splitlines()[-1:] == ["failed 0"], done.stdout + done.stderr[-2000:]


# The driver's part.


@pytest.mark.parametrize("undelivered, status", [(5, "FAILED"), (0, "FINISHED")])
def test_a_run_does_not_finish_before_all_its_rows_are_there(
    undelivered: int,
    status: str,
    metadata: RunMetadata,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from ddpm_ray.config.loading import load_config
    from ddpm_ray.config.run import RunConfig
    from tests.noise import pack_noise

    pack_noise(str(tmp_path / "data"), images=8, side=4)
    ended = {"step": 20, "finished": True, "core_seconds": 1.0, "checkpoint": "x"}
    ended |= {"scores": {}, "undelivered": undelivered}
    monkeypatch.setattr(worker_group, "run", lambda *_, **__: ended)
    monkeypatch.setattr(model_registry, "log_model", lambda *_: None)
    config = load_config(
        RunConfig,
        None,
        [
            "name=a",
            "data.url=data",
            "training.steps=20",
            "training.global_batch_size=8",
            "model.base_channels=8",
            "model.channel_mults=[1]",
            "model.groups=4",
            "model.attention_resolutions=[]",
            "tracking.uri=sqlite:///my.db",
            "evaluation.num_images=0",
        ],
    )
    if undelivered:
        said = "5 metric rows undelivered; stored in the checkpoint; run the same command"
        with pytest.raises(TrackingOutageError, match=said):
            train.run_training(config, tmp_path, lambda _: None)
    else:
        assert train.run_training(config, tmp_path, lambda _: None).finished
    client = MlflowClient(f"sqlite:///{tmp_path / 'my.db'}")
    experiment = client.get_experiment_by_name("ddpm-ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == status
