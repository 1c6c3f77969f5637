"""The driver's states without Ray: how the workers end -> MLflow's status, exit code, JSON.

The group of workers is a function here; MLflow, leases and the job's own `main` are real.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError

from ddpm_ray.cli.job import Job
from ddpm_ray.cli.main import main
from ddpm_ray.config.run import RunConfig
from ddpm_ray.distributed import connection, signals, worker_group
from ddpm_ray.distributed.control_actor import ControlLostError, RunControl
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.jobs.train import train
from ddpm_ray.tracking import mlflow_runs, model_registry
from ddpm_ray.training.checkpoints import CHECKPOINTS
from ddpm_ray.training.writer_lease import Lease, LeaseLostError
from tests.noise import pack_noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports

STEPS = 8
ENDED: dict[str, Any] = {
    "step": STEPS,
    "finished": True,
    "core_seconds": 1.0,
    "checkpoint": "",
    "scores": {},
    "validation_losses": [],
    "undelivered": 0,
}


@dataclass
class Place:
    """Where the run of a test lies, and what it leaves."""

    folder: Path
    uri: str

    @property
    def arguments(self) -> list[str]:
        return [
            "job",
            "name=driven",
            f"storage={self.folder}",
            f"data.url={self.folder / 'data'}",
            f"training.steps={STEPS}",
            f"tracking.uri={self.uri}",
            "model.base_channels=32",
            f"tracking.experiment={self.folder.name}",
            "model.channel_mults=[1]",
            "training.global_batch_size=8",
            "model.attention_resolutions=[4]",
        ]

    def statuses(self) -> list[str]:
        """Of all MLflow runs that there are."""
        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self.folder.name)
        runs = client.search_runs([found.experiment_id]) if found else []
        return [run.info.status for run in runs]


@pytest.fixture
def place(tmp_path: Path, mlflow_database: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    pack_noise(str(tmp_path / "data"), images=8, side=4)
    made = Place(tmp_path, mlflow_database)
    monkeypatch.setattr(sys, "argv", made.arguments)
    monkeypatch.setattr(signals, "_last", 2)  # no signal has come yet
    monkeypatch.setattr(model_registry, "log_model", lambda *_: None)
    return made


Workers = Callable[[Place, dict[str, Any]], dict[str, Any]]


def finish(_: Place, settings: dict[str, Any]) -> dict[str, Any]:
    return ENDED


def stop_half_way(_: Place, settings: dict[str, Any]) -> dict[str, Any]:
    return ENDED | {"step": STEPS // 2, "finished": False}


def raising(error: BaseException) -> Workers:
    def fail(_: Place, settings: dict[str, Any]) -> dict[str, Any]:
        raise error

    return fail


def superseded(then: Workers) -> Workers:
    """Frozen while a second driver begins, finishes and ends the MLflow run; then `then`."""

    def wake(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
        lease = Lease.first(f"{place.folder}/driven/{CHECKPOINTS}")
        assert lease.owner != settings["lease"]["owner"]
        client = MlflowClient(tracking_uri=place.uri)
        client.set_terminated(settings["tracked"]["run_id"], "FINISHED")
        return then(place, settings)

    return wake


LEASE_LOST = RunFailedError(str(LeaseLostError("runs/driven/checkpoints", 2)))
CONTROL_LOST = ControlLostError("died (killed, or a crash of its own)")


@pytest.mark.parametrize(
    "workers, status, code, says",
    [
        (finish, "FINISHED", 0, "MLflow run"),
        (stop_half_way, "KILLED", 130, f"stopped at step {STEPS // 2} of {STEPS}"),
        (raising(RunFailedError("worker 1: no")), "FAILED", 1, "error: worker 1: no"),
        (raising(CONTROL_LOST), "FAILED", 1, "error: the control actor between"),
        (raising(KeyboardInterrupt("SIGINT")), "KILLED", 130, "interrupted; the same command"),
        (raising(LEASE_LOST), "FAILED", 1, "error: runs/driven/checkpoints: start 2 of this run"),
        (superseded(raising(LEASE_LOST)), "FINISHED", 1, "has taken over this run; its MLflow run"),
        (superseded(stop_half_way), "FINISHED", 130, "has taken over this run; its MLflow run"),
    ],
)
def test_how_the_workers_end_is_what_mlflow_and_the_caller_learn(
    workers: Workers,
    status: str,
    code: int,
    says: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(worker_group, "run", lambda _, settings, *more: workers(place, settings))
    assert run_job() == code
    assert place.statuses() == [status]
    output = capsys.readouterr()
    assert says in output.err + caplog.text
    if code:
        assert output.out == ""
    else:
        assert json.loads(output.out)["step"] == STEPS


@pytest.mark.parametrize("away", ["at the start", "all the time"])
def test_an_mlflow_that_is_away_costs_the_run_nothing_at_the_start(
    away: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, asked = mlflow_runs.open_run, 0

    def open_run(metadata: Any) -> Any:
        nonlocal asked
        asked += 1
        if away == "all the time" or asked == 1:
            raise mlflow_runs.TrackingOutageError(
                metadata.uri, "MLflow does not answer", "start it"
            )
        return opened(metadata)

    seen: list[dict[str, Any]] = []

    def workers(_: Any, settings: dict[str, Any], *more: Any) -> dict[str, Any]:
        seen.append(settings)
        return ENDED

    monkeypatch.setattr(mlflow_runs, "open_run", open_run)
    monkeypatch.setattr(worker_group, "run", workers)
    code = run_job()
    assert [settings["tracked"] for settings in seen] == [None]  # they find it later
    assert place.statuses() == ([] if code else ["FINISHED"])
    output = capsys.readouterr()
    assert (code, bool(output.out)) == ((0, True) if away == "at the start" else (1, False))
    assert code == 0 or "error: sqlite:" in output.err


@pytest.mark.parametrize("deterministic", [True, False])
def test_workers_get_absolute_places_and_the_variables_of_determinism(
    deterministic: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has another working directory: there a relative database is a second, empty one."""
    seen: list[dict[str, Any]] = []

    def workers(_: Any, settings: dict[str, Any], *more: Any) -> dict[str, Any]:
        seen.append(settings)
        return ENDED

    database = Path(place.uri.removeprefix("sqlite:///"))
    monkeypatch.chdir(database.parent)
    words = [f"tracking.uri=sqlite:///{database.name}", f"training.deterministic={deterministic}"]
    monkeypatch.setattr(sys, "argv", [*place.arguments, *words])
    monkeypatch.setattr(worker_group, "run", workers)
    assert run_job() == 0
    ((settings),) = seen
    for uri in (settings["config"]["tracking"]["uri"], settings["metadata"]["uri"]):
        assert uri == place.uri
    assert ("CUBLAS_WORKSPACE_CONFIG" in settings["environment"]) == deterministic


@pytest.mark.parametrize("every", [0, 4])
def test_a_run_without_grids_names_none(
    every: int, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*place.arguments, f"training.grid_every_steps={every}"])
    monkeypatch.setattr(worker_group, "run", lambda *_: ENDED)
    assert run_job() == 0
    reported = json.loads(capsys.readouterr().out)
    assert [reported[key] is None for key in ("samples", "denoising")] == [every == 0] * 2


def run_job() -> int:
    """The exit code of jobs/train.py with what stands in sys.argv."""

    def job(config: RunConfig, arguments: Namespace) -> dict[str, Any]:
        return train(config, arguments)

    return main(Job("train", "", RunConfig, job, continues=True))


class Actor:
    """An actor whose methods return their own names as replies."""

    def __getattr__(self, name: str) -> Any:
        return Namespace(remote=lambda *_: name)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> RunControl:
    """A handle without an actor; ray.wait returns each reply as ready."""
    made = RunControl.__new__(RunControl)
    made._actor, made._reports, made._status = Actor(), [], None
    monkeypatch.setattr(ray, "wait", lambda replies, **_: (replies, []))
    return made


DEATH = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: _RunControlActor"
    "\n\tpid: 7\n"
)


@pytest.mark.parametrize(
    "error, says",
    [
        (RayActorError("0", DEATH), r"died \(killed, or a crash"),
        (ActorDiedError(), r"died \(killed, or a crash"),
        (RayActorError("0", DEATH + "its node has died."), r"died \(its node was lost\)"),
        (RayActorError("0", DEATH + "was low on memory"), r"died \(killed by Ray: its node ran ou"),
        (GetTimeoutError(), r"does not answer for 120 s"),
    ],
)
def test_an_actor_that_is_gone_is_one_line(
    error: Exception, says: str, control: RunControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ControlLostError, match=says + r".*the same command continues") as lost:
        control.status()
    assert "\n" not in str(lost.value)


def test_an_actor_that_cannot_be_reached_for_a_while_ends_nothing(
    control: RunControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: list[Any] = [ActorUnavailableError("x", b"0" * 16), (None, None, [], [], "")]

    def get(*_: Any, **__: Any) -> Any:
        if isinstance(replies[0], Exception):
            raise replies.pop(0)
        return replies[0]

    monkeypatch.setattr(ray, "get", get)
    assert control.poll() is None
    assert control.poll() is None  # the one that was lost
    assert (found := control.poll()) is not None
    assert found.fatal is None


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The node timed out\nduring startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    says = r"^Ray did not start on this machine \(The node timed out during startup.\); free CPU .*"
    with pytest.raises(RunFailedError, match=says):
        connection.connect("")
