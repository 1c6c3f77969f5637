"""Runs in a real PostgreSQL, the database that cluster.yaml and docs/cluster.md give MLflow."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ddpm_ray.reporting import RATES, Row
from ddpm_ray.tracking import mlflow_runs, run_lookup
from ddpm_ray.tracking.async_logger import Tracker
from ddpm_ray.tracking.mlflow_runs import TrackingOutageError
from ddpm_ray.tracking.run_info import TrackedRun
from ddpm_ray.tracking.run_log import RunLog
from tests.fixtures.postgres import postgres_database


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, mlflow_database: str) -> Iterator[str]:
    """The URI of a server's database; `mlflow_database` imports MLflow's store quietly."""
    assert mlflow_database
    with postgres_database(tmp_path_factory.mktemp("postgres") / "data") as uri:
        yield uri


def rows(steps: range, rate: float = 1.0) -> list[Row]:
    return [
        Row(step, {"train/loss": 1 / step} | (dict.fromkeys(RATES, rate) if step % 5 == 0 else {}))
        for step in steps
    ]


def losses(run: TrackedRun) -> list[tuple[int, float]]:
    found = MlflowClient(run.uri).get_metric_history(run.run_id, "train/loss")
    return sorted((row.step, row.value) for row in found)


def opened(uri: str, folder: Path) -> TrackedRun:
    return run_lookup.find_or_create_run(uri, "e", "n", f"run {folder}", str(folder / "artifacts"))


def test_a_replay_leaves_each_row_once_and_the_first_rate(server: str, tmp_path: Path) -> None:
    """Killed at step 23, whose newest checkpoint was of step 12 and had 2 rows unsent."""
    run = opened(server, tmp_path)
    for unsent, steps, rate in (
        ([], range(1, 24), 1.0),
        (rows(range(11, 13), 7.0), range(13, 31), 7.0),
    ):
        sink = Tracker(lambda: run, 0.01, unsent)
        sink.rows(rows(steps, rate))
        assert sink.close(60) == 0
    assert losses(run) == [(step, 1 / step) for step in range(1, 31)]
    rates = MlflowClient(server).get_metric_history(run.run_id, RATES[0])
    assert sorted((row.step, row.value) for row in rates) == [
        *((step, 1.0) for step in (5, 10, 15, 20)),
        (25, 7.0),
        (30, 7.0),
    ]
    assert opened(server, tmp_path) == run
    mlflow_runs.finish(run, "FINISHED")
    assert MlflowClient(server).get_run(run.run_id).info.status == "FINISHED"


def test_rows_that_are_there_already_are_there_once(server: str, tmp_path: Path) -> None:
    """As after a lost answer: MLflow tells rows that are equal from rows that are new."""
    run = opened(server, tmp_path)
    batch = [("train/loss", 1 / step, step) for step in range(1, 41)]
    for some in (batch[:30], batch[:30], batch):
        RunLog(run).rows(some)
    assert losses(run) == [(step, value) for _, value, step in batch]
    assert RunLog(run).newest_steps() == {"train/loss": 40}


def test_a_server_that_is_away_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are kept, as for an MLflow server that is away.

    MLflow tries ten times in 101 s and holds the lock of its stores meanwhile: two tries here.
    """
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 2)
    with pytest.raises(TrackingOutageError, match="MLflow does not answer"):
        run_lookup.find_or_create_run("postgresql+psycopg2://u@127.0.0.1:9/x", "e", "n", "i", None)
