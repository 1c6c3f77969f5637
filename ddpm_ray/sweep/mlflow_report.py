"""A sweep in MLflow: its run, the ends of its trials, tables, pictures and the champion model."""

import contextlib
import io
import json
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import flat, to_yaml
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.dataset_codec import codec_of
from ddpm_ray.evaluation.loss_by_snr import linear_guess
from ddpm_ray.redaction import counted
from ddpm_ray.runs.run_description import code, data_line, own_command, training_length
from ddpm_ray.runs.run_identity import IDENTITY
from ddpm_ray.runs.run_tags import run_tags
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.sweep import charts
from ddpm_ray.sweep.contact_sheet import ROWS, contact_sheet
from ddpm_ray.sweep.leaderboard import as_markdown
from ddpm_ray.sweep.leaderboard_html import as_html
from ddpm_ray.sweep.standings import Standing, direction, standings
from ddpm_ray.sweep.trial_store import Trial, TrialStore
from ddpm_ray.tracking import mlflow_runs, model_registry, run_lookup
from ddpm_ray.tracking.mlflow_runs import TrackingError
from ddpm_ray.tracking.run_info import TrackedRun
from ddpm_ray.tracking.tracking_uri import artifact_root
from ddpm_ray.training.validation_loss import LEVELS

log = logging.getLogger(__name__)

STATUSES = {"finished": "FINISHED", "stopped": "KILLED", "pruned": "KILLED", "failed": "FAILED"}
PARAMS = ("search.kind", "stopping.kind", "run.training.steps", "run.evaluation.num_images")


@dataclass
class SweepRun:
    """The MLflow run of a sweep, the parent of its trials' runs."""

    config: SweepConfig
    folder: str
    identity: str
    run: TrackedRun
    data_variance: float  # of x_0
    description: str = ""  # Markdown, above the leaderboard

    @classmethod
    def find_or_create(
        cls, config: SweepConfig, folder: str, identity: str, dataset: Dataset
    ) -> "SweepRun":
        """Find or create the run of the sweep `identity`, set to RUNNING. Raises TrackingError."""
        tracked = config.run.tracking
        run = run_lookup.find_or_create_run(
            tracked.uri, tracked.experiment, config.name, identity, artifact_root(tracked.uri)
        )
        mlflow_runs.describe(
            run,
            params={key: flat(config)[key] for key in PARAMS} | {"metric": config.score},
            tags=run_tags(dataset),
            config_yaml=to_yaml(config),
            dataset_url=dataset.url,
            dataset_fingerprint=dataset.fingerprint,
            description=(description := _description(config, dataset)),
        )
        manifest = dataset.manifest
        variance = codec_of(manifest).variance(manifest.pixel_std)
        return cls(config, folder, identity, run, variance, description)

    @property
    def runs(self) -> str:
        """Storage folder of the trials' training runs."""
        return object_store.join(self.folder, "runs")

    def close_trials(self, store: TrialStore) -> bool:
        """Log in MLflow how trials ended; returns False in an outage.

        The next call sends what is left: running trials never wait for MLflow.
        """
        for trial in list(store.trials):
            if trial.status == "running" or trial.logged:
                continue
            try:
                self._close(trial)
            except (TrackingError, StorageError) as error:
                log.warning("%s; retrying", error)
                return False
            trial.logged = True
            store.write(trial)
        return True

    def publish(self, store: TrialStore) -> None:
        """Log tables and pictures of all trials in the sweep's run; logs an outage as a warning."""
        # Copies: Tune's thread changes the trials meanwhile.
        trials = [
            replace(t, validation_losses=[*t.validation_losses], outcome=dict(t.outcome))
            for t in store.trials
        ]
        score = self.config.score
        rows = standings(trials, score)
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        guess = linear_guess(levels, self.data_variance).tolist()
        drawn = {
            "1_score_against_T": charts.score_against_T(trials, score),
            "2_loss_against_T": charts.loss_against_T(trials, score),
            "3_samples": contact_sheet(trials, _grids(trials, rows), score),
            "4_common_loss": charts.common_loss(trials),
            "5_loss_by_log_snr": charts.loss_by_log_snr(trials, LEVELS, guess),
            "6_cost": charts.cost_bars(trials),
        }
        counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
        metrics = {f"sweep/{status}": float(count) for status, count in counts.items()}
        if rows and rows[0].place == 1 and rows[0].score is not None:
            metrics["sweep/best"] = rows[0].score
        try:
            mlflow_runs.publish(
                self.run,
                pictures={key: picture for key, picture in drawn.items() if picture is not None},
                texts={
                    "leaderboard.html": as_html(rows, score, self.config.name),
                    "trials.json": json.dumps([trial.to_json() for trial in trials], indent=1),
                },
                metrics=metrics,
                step=sum(counts.values()),
                description=f"{self.description}\n\n{as_markdown(rows, score)}",
            )
        except TrackingError as error:
            log.warning("%s; the sweep's tables and pictures in MLflow are out of date", error)

    def conclude(self, store: TrialStore, finished: bool, slot_s: float) -> dict[str, Any]:
        """Close the sweep's run and return its report as plain JSON.

        `slot_s`: worker-seconds that were available to trials, all slots together.
        """
        self.close_trials(store)
        self.publish(store)
        trials = store.trials
        best = standings(trials, self.config.score)[:1]
        winner = trials[best[0].number] if best and best[0].place == 1 else None
        busy_s, worker_s = (
            sum(trial.outcome.get(key, 0.0) for trial in trials) for key in ("busy_s", "worker_s")
        )
        report: dict[str, Any] = {
            "name": self.config.name,
            "run_id": self.run.run_id,
            "tracking_uri": self.run.uri,
            "page": self.run.page,
            "trials": {s: sum(t.status == s for t in trials) for s in ("running", *STATUSES)},
            "worker_s": round(worker_s, 1),
            "busy_s": round(busy_s, 1),
            "slot_s": round(slot_s, 1),
            "winner": None,
            "champion": None,
        }
        if winner is not None:
            report["winner"] = {
                "trial": winner.number,
                "values": winner.values,
                "run_id": winner.outcome["run_id"],
                "checkpoint": winner.outcome["checkpoint"],
                "metrics": winner.metrics,
            }
        if winner is not None and finished and self.config.run.traits.draws_images:
            report["champion"] = self._promote(winner)
        self.finish("FINISHED" if finished else "KILLED")
        return report

    def finish(self, status: str, reason: str = "") -> None:
        """Close the sweep's run; logs an outage as a warning."""
        try:
            mlflow_runs.finish(self.run, status, reason)
        except TrackingError as error:
            log.warning("%s; the MLflow run %s stays open", error, self.run.run_id)

    def _promote(self, winner: Trial) -> dict[str, Any] | None:
        try:
            return model_registry.promote(
                self.run.uri,
                self.config.register_as or self.config.name,
                winner.outcome["run_id"],
                self.config.score,
                winner.metrics,
                winner.outcome["certificate"],
            )
        except TrackingError as error:
            log.warning("%s; the best model is not registered", error)
            return None

    def _close(self, trial: Trial) -> None:
        status = STATUSES[trial.status]
        if run_id := trial.outcome.get("run_id"):
            if trial.reason:
                run = TrackedRun(self.run.uri, run_id, self.run.experiment_id, 0)
                mlflow_runs.finish(run, status, trial.reason)
            return
        known = object_store.join(self.runs, trial.name, IDENTITY)
        own = f"{self.identity}/{trial.name}"
        if object_store.exists(known):  # it started, and failed before it reported its run id
            own = str(checksummed_json.read(known)["identity"])
        trial.outcome["run_id"] = mlflow_runs.log_ended(
            self.run, trial.title, own, trial.values, status, trial.reason
        )


def _description(config: SweepConfig, dataset: Dataset) -> str:
    """Describe what the sweep varies and what all of its trials share."""
    keys = {key: None for branch in config.space for key in branch}
    training, evaluation = config.run.training, config.run.evaluation
    length = training_length(training)
    if total := config.core_seconds:
        length = f"{total:,.0f} core-seconds, autoencoder and encoding included"
    return "\n\n".join(
        [
            f"**Sweep** of {', '.join(map(code, keys))}: search {config.search.kind}, early "
            f"stopping {config.stopping.kind}, compared by {code(config.score)} of "
            f"{counted(evaluation.num_images, 'image')}, {direction(config.score)}",
            data_line(dataset.url, dataset),
            f"**Trials** of {length}, global_batch_size "
            f"{training.global_batch_size}, workers {config.run.cluster.num_workers} each",
            f"**Continue** {code(own_command())}",
        ]
    )


def _grids(trials: list[Trial], rows: list[Standing]) -> dict[int, Image.Image]:
    """Return the newest sample grids of the best trials, as many as the contact sheet shows."""
    found: dict[int, Image.Image] = {}
    for row in rows:
        if len(found) == ROWS:
            break
        if url := trials[row.number].outcome.get("samples"):
            with contextlib.suppress(StorageError, OSError):  # only its picture is missing
                found[row.number] = Image.open(io.BytesIO(object_store.read_bytes(url)))
    return found
