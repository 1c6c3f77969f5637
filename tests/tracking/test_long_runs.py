"""A long run is started again on SQLite: its rows are accepted within seconds."""

import sqlite3
import time
from pathlib import Path

import pytest

from ddpm_ray.reporting import RATES, Row
from ddpm_ray.tracking import run_lookup
from ddpm_ray.tracking.async_logger import Tracker
from ddpm_ray.tracking.run_info import TrackedRun

STEPS, REPLAYED, NEW = 200_000, 1_000, 1_000
KEYS = "train/grad_norm", "train/loss", "train/lr"


def rows(steps: range) -> list[Row]:
    return [
        Row(
            step,
            dict.fromkeys(KEYS, 1 / step) | (dict.fromkeys(RATES, 2.0) if step % 50 == 0 else {}),
        )
        for step in steps
    ]


def stored(run: TrackedRun, file: Path, steps: int) -> None:
    """Put what a run logs in `steps` steps into its database, as MLflow would have: in 6 s."""
    made = [
        (key, value, run.start_ms + row.step, run.run_id, row.step, 0)
        for row in rows(range(1, steps + 1))
        for key, value in row.metrics.items()
    ]
    newest = {key: (key, value, at, step, 0, of) for key, value, at, of, step, _ in made}
    columns = "(key, value, timestamp, run_uuid, step, is_nan)"
    latest = "(key, value, timestamp, step, is_nan, run_uuid)"
    with sqlite3.connect(file) as database:
        database.executemany(f"INSERT INTO metrics {columns} VALUES (?,?,?,?,?,?)", made)
        database.executemany(
            f"INSERT INTO latest_metrics {latest} VALUES (?,?,?,?,?,?)", newest.values()
        )
    database.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("mlflow_database")  # imports MLflow's store without its warnings
def test_a_restart_at_step_200_000_has_its_rows_accepted(tmp_path: Path) -> None:
    """It replays 1,000 steps that MLflow holds, of which MLflow would take 12 s a batch."""
    file = tmp_path / "mlflow.db"
    run = run_lookup.find_or_create_run(f"sqlite:///{file}", "e", "long", "long", str(tmp_path))
    stored(run, file, STEPS)
    began = time.monotonic()
    sink = Tracker(lambda: run, 0.05, rows(range(STEPS - REPLAYED + 1, STEPS - 900)))
    sink.rows(rows(range(STEPS - 900, STEPS + NEW + 1)))
    assert sink.close(120) == 0
    took_s = time.monotonic() - began
    print(f"{took_s:.1f} s for {REPLAYED} replayed and {NEW} new steps")
    with sqlite3.connect(file) as database:
        for key in (*KEYS, RATES[0]):
            query = "SELECT count(*), count(DISTINCT step), max(step) FROM metrics WHERE key = ?"
            every = 50 if key in RATES else 1
            count = (STEPS + NEW) // every
            assert database.execute(query, (key,)).fetchone() == (count, count, STEPS + NEW)
    database.close()
    assert took_s < 30
