"""The search for a width, with a score in place of FID whose best width is known."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray.assembly import checkpoint_loading, scoring, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.ema_search import AverageConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, from_dict, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.distributed import failures, worker_group
from ddpm_ray.evaluation import sample_quality
from ddpm_ray.evaluation.sample_quality import SampleSet, Scores
from ddpm_ray.models.unet import UNet
from ddpm_ray.reporting import Progress
from ddpm_ray.runs.evaluation import ema_search, evaluate_worker
from ddpm_ray.runs.evaluation import evaluate as evaluation_run
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.ema import Averages, width_group
from ddpm_ray.training.ema_snapshots import SnapshotStore
from ddpm_ray.training.post_hoc_ema import gamma_of, power_decay
from tests.noise import pack_noise

ROOT = Path(__file__).parents[2]
STEPS, TRUTH = 60, 0.15


def wandering(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """A run in `folder` whose weights walk at random; the average of width TRUTH at its end."""
    pack_noise(str(folder.parent / "data"), 60, 8)
    config = load_config(
        RunConfig,
        None,
        [
            "name=a",
            f"data.url={folder.parent / 'data'}",
            "schedule.num_steps=10",
            "sampling.steps=5",
            "model.base_channels=4",
            "model.groups=2",
            "model.channel_mults=[1]",
            "model.blocks_per_level=1",
            "model.attention_resolutions=[]",
            f"training.steps={STEPS}",
            *overrides,
        ],
    )
    facts = {"config": to_dict(config), "image_shape": [8, 8, 1], "data_fingerprint": ""}
    state = training_run.training_state(config, ImageShape(8, 8, 1), torch.device("cpu"), facts)
    writer = CheckpointWriter(CheckpointStore(str(folder / "checkpoints")))
    keep = training_run.ema_snapshotter(config, state, writer, str(folder), Workers())
    name = width_group(TRUTH)
    truth = Averages.of(state.model, {name: partial(power_decay, gamma_of(TRUTH))})
    for _ in range(STEPS):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for averages in (state.averages, truth):
            averages.update(state.model, state.step)
        state.step += 1
        keep(state.step)
    writer.submit(state.snapshot([]))
    writer.wait()
    return truth.means[name].state_dict()


def weights_of(model: TrainedModel) -> dict[str, Tensor]:
    network = model.denoiser.network
    assert isinstance(network, UNet)
    return network.state_dict()


# Samples are few and small, seen by the bundled classifier.
DIGITS = AverageConfig(
    sampling=SamplingSettings(steps=2),
    evaluation=EvaluationConfig(num_images=20, features="digits", kernel_distance=False),
)
KEPT = "training.ema_snapshot_widths=[0.1,0.2]", "training.ema_snapshot_every_steps=5"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run below tmp_path; models that are like its average of width TRUTH score best."""
    truth = wandering(tmp_path / "run", *KEPT)

    def evaluate(samples: SampleSet, *_: Any, **__: Any) -> Scores:
        network = samples.denoiser.network
        assert isinstance(network, UNet)
        found = network.state_dict()
        apart = sum(float((found[name] - truth[name]).square().sum()) for name in truth)
        ends = {"eval/fd_digits_low": apart - 1, "eval/fd_digits_high": apart + 1}
        return Scores(
            {"eval/kd_digits": 0.0, "eval/fd_digits": apart} | ends, dict(samples.weights)
        )

    monkeypatch.setattr(sample_quality, "evaluate_samples", evaluate)
    alone(monkeypatch)
    return tmp_path / "run"


@dataclass
class RunControl:
    """What a worker tells its driver."""

    fatal: str | None = None
    progress: list[Progress] = field(default_factory=list)

    def status(self) -> "RunControl":
        return self

    def report_fatal(self, reason: str) -> None:
        self.fatal = reason

    def report(self, progress: Progress) -> None:
        self.progress.append(progress)


def alone(patch: pytest.MonkeyPatch) -> list[RunControl]:
    """Have groups be one worker in this process, without Ray; their controls, as they come."""
    controls: list[RunControl] = []

    def run(worker: Callable[[dict[str, Any]], Any], settings: dict[str, Any], *_: Any) -> Any:
        controls.append(RunControl())
        return worker(json.loads(json.dumps(settings)) | {"control": controls[-1]})

    patch.setattr(worker_group, "run", run)
    patch.setattr(ema_search, "distributed_context", Workers)
    return controls


def test_the_best_width_is_found_and_left_as_a_model(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(DIGITS, widths=(0.05, 0.15, 0.2, 0.25))
    with caplog.at_level(logging.INFO):
        result = ema_search.search("run", config, tmp_path, "best")
    assert json.loads(json.dumps(result)) == result
    assert result["widths"] == [0.05, 0.15, 0.2, 0.25]
    assert result["best"] == TRUTH
    reported = f"width 0.15 has the lowest eval/fd_digits; it is written to {tmp_path / 'best'}"
    assert reported in caplog.text
    assert result["step"] == STEPS
    assert result["metric"] == "eval/fd_digits"
    others = [score for score in result["scores"] if score != min(result["scores"])]
    assert len(others) == 3
    assert min(result["scores"]) < min(others) / 100
    assert result["intervals"] == [[score - 1, score + 1] for score in result["scores"]]
    assert {path.name for path in run.iterdir()} == {"checkpoints", "snapshots"}

    best = checkpoint_loading.trained_model(str(tmp_path / "best"))
    assert best.provenance["weights_sha256"] == result["certificate"]["model_sha256"]
    assert best.provenance["average"] == result["certificate"]["weights"]
    assert best.provenance["average"]["sigma_rel"] == TRUTH
    assert best.provenance["average"]["steps"] == list(range(5, STEPS + 1, 5))
    assert best.provenance["step"] == STEPS
    assert best.sample(2, steps=2).shape == (2, 8, 8, 1)
    table = [record.getMessage().split() for record in caplog.records]
    assert table[0] == ["width", "eval/fd_digits", "95", "%", "interval", "profile", "error"]
    assert [row[0] for row in table[1:5]] == ["0.05", "0.15", "0.2", "0.25"]


def test_the_provenance_says_which_average_was_scored(run: Path, tmp_path: Path) -> None:
    """The decay of the main average is not claimed for another one."""
    ema_search.search("run", replace(DIGITS, widths=(0.15,)), tmp_path, "best")
    reported = {}
    for name, url, ema in (
        ("main", run, "ema"),
        ("tracked", run, "ema-width-0.1"),
        ("made", tmp_path / "best", "ema"),
    ):
        known = checkpoint_loading.trained_model(str(url), ema=ema).provenance
        config = from_dict(RunConfig, known["config"])
        reported[name] = scoring.ema_provenance(config, known["step"], known["average"])
    assert reported["main"]["weights"] == "ema"
    assert reported["main"]["ema_decay_per_step"] == pytest.approx(61 / 70)  # still on its ramp
    assert reported["tracked"] == {
        "weights": "ema-width-0.1",
        "step": STEPS,
        "training_seed": 0,
        "precision": "fp32",
    }
    assert reported["made"]["weights"]["sigma_rel"] == TRUTH
    assert "ema_decay_per_step" not in reported["made"]


def test_an_average_can_end_earlier(run: Path, tmp_path: Path) -> None:
    """Nothing that was kept later is asked for; it is the tracked width of that step."""
    shutil.rmtree(run / "snapshots/step-00000025")
    ema_search.search("run", replace(DIGITS, widths=(0.1,), step=20), tmp_path, "early")
    made = checkpoint_loading.trained_model(str(tmp_path / "early"))
    store = SnapshotStore(str(run / "snapshots"))
    kept = store.read(20, width_group(0.1))
    assert made.provenance["step"] == 20
    torch.testing.assert_close(weights_of(made), kept, rtol=1e-5, atol=1e-5)


def test_a_width_out_of_reach_is_reported(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ema_search.search("run", replace(DIGITS, widths=(0.011,)), tmp_path)
    line = "width 0.011 is only approximated by the run's snapshots (profile error 0."
    assert line in caplog.text


def test_scores_are_those_of_jobs_evaluate_for_the_model_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each width, by its own network and reference: the numbers of an evaluation's worker."""
    wandering(tmp_path / "run", *KEPT)
    alone(monkeypatch)
    result = ema_search.search("run", replace(DIGITS, widths=(0.1, 0.25)), tmp_path, "best")
    assert len(set(result["scores"])) == 2
    monkeypatch.setattr(evaluate_worker, "distributed_context", Workers)
    config = EvaluateConfig(
        data_url=str(tmp_path / "data"), sampling=DIGITS.sampling, evaluation=DIGITS.evaluation
    )
    settings = {"model_uri": str(tmp_path / "best"), "tracking_uri": "", "config": to_dict(config)}
    known = evaluate_worker.evaluate_worker(settings | {"control": RunControl()})
    best = result["scores"].index(min(result["scores"]))
    assert known["metrics"]["eval/fd_digits"] == result["scores"][best]
    assert known["metrics"]["eval/fd_digits_low"] == result["intervals"][best][0]
    assert known["certificate"]["model"].pop("guidance") == vars(
        config.guidance
    )  # of no other network
    assert known["certificate"] == result["certificate"]


def test_workers_give_up_where_another_attempt_would_fail_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandering(tmp_path / "run", *KEPT)
    pack_noise(str(tmp_path / "large"), 30, 12)
    controls = alone(monkeypatch)
    with pytest.raises(ValueError, match=r"12, 12, 1\]; the digits classifier reads"):
        ema_search.search("run", replace(DIGITS, data_url="large"), tmp_path)
    assert "the digits classifier reads" in str(controls[0].fatal)
    (tmp_path / "run/snapshots/step-00000035/manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000035/ema-width-0\.1\S+ is damaged"):
        ema_search.search("run", DIGITS, tmp_path)
    assert "is damaged" in str(controls[1].fatal)


def test_what_cannot_be_averaged_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step is 33; no EMA snapshots .* try step=35"):
        ema_search.search("run", replace(DIGITS, step=33), tmp_path)
    wandering(tmp_path / "plain")
    for name in ("plain", "nowhere"):
        with pytest.raises(CheckpointError, match=rf"{name}: no EMA snapshots in this run; train"):
            ema_search.search(name, DIGITS, tmp_path)


def started(job: str, run: Path, wanted: EvaluationConfig) -> None:
    """The job of that name, on `run`, from the folder above it."""
    if job == "average":
        ema_search.search(run.name, replace(DIGITS, evaluation=wanted), run.parent)
    else:
        config = EvaluateConfig(sampling=DIGITS.sampling, evaluation=wanted)
        evaluation_run.run_evaluation(run.name, config, run.parent)


@pytest.mark.parametrize("job", ["average", "evaluate"])
def test_a_worker_is_given_places_below_home(
    job: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own folder is another one, where a relative place would lead nowhere."""
    given: list[dict[str, Any]] = []

    def begin(_: Any, settings: dict[str, Any], *__: Any) -> Any:
        given.append(settings["config"]["evaluation"])
        raise failures.RunFailedError("enough")

    monkeypatch.setattr(worker_group, "run", begin)
    wanted = replace(DIGITS.evaluation, weights="w.npz", held_out_url="data")
    with pytest.raises(failures.RunFailedError, match="enough"):
        started(job, run, wanted)
    (found,) = given
    assert found["weights"] == str(tmp_path / "w.npz")
    assert found["held_out_url"] == str(tmp_path / "data")


@pytest.mark.parametrize("job", ["average", "evaluate"])
def test_a_held_out_set_that_is_not_there_is_reported_before_ray_starts(
    job: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "run", lambda *_: pytest.fail("Ray was started"))
    wanted = replace(DIGITS.evaluation, held_out_url="nowhere")
    with pytest.raises(DatasetError, match=r"nowhere: no manifest\.json"):
        started(job, run, wanted)


def test_a_score_is_a_line_with_its_interval() -> None:
    scores = {"eval/fid": 3.14159, "eval/fid_low": 3.0, "eval/fid_high": 3.25, "eval/kd_a": 0.5}
    assert evaluation_run.score_lines(scores) == [
        "eval/fid   3.142  (95 % interval 3 .. 3.25)",
        "eval/kd_a  0.5",
    ]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_workers_on_ray_find_what_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job itself, in a process of its own, beside one worker without Ray."""
    wandering(tmp_path / "run", *KEPT)
    asked = [
        "widths=[0.1,0.25]",
        "sampling.steps=2",
        "evaluation.features=digits",
        "evaluation.num_images=20",
        "evaluation.kernel_distance=false",
        "cluster.num_workers=2",
    ]
    ended = subprocess.run(
        [sys.executable, str(ROOT / "jobs/average.py"), "run", "--out", "best", *asked],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    alone(monkeypatch)
    known = ema_search.search("run", replace(DIGITS, widths=(0.1, 0.25)), tmp_path, "known")
    assert found["scores"] == pytest.approx(known["scores"], rel=1e-6)
    assert (found["widths"], found["best"]) == (known["widths"], known["best"])
    best = [checkpoint_loading.trained_model(str(tmp_path / name)) for name in ("best", "known")]
    assert best[0].provenance["weights_sha256"] == best[1].provenance["weights_sha256"]


@pytest.mark.parametrize(
    "kind, given, line",
    [
        (AverageConfig, ["widths=[]"], "widths is empty"),
        (AverageConfig, ["widths=[0.1,0.3]"], r"widths holds 0\.3; .* below 0\.2886.*: try 0\.1"),
        (AverageConfig, ["evaluation.num_images=0"], "evaluation.num_images is 0; widths are"),
        (AverageConfig, ["widths=[0.1,0.2,0.1]"], r"widths holds 0\.1 twice; .*: leave one out"),
        (AverageConfig, ["evaluation.likelihood_images=5"], "likelihood_images is 5; .* set it to"),
        (AverageConfig, ["evaluation.memorisation_images=5"], "tion_images is 5; .* set it to 0"),
        (
            AverageConfig,
            ["evaluation.alignment_encoder=runs/e"],
            "'runs/e'; widths .* leave it out",
        ),
        (RunConfig, ["training.ema_more_decays=[0.9,0.9]"], r"ema_more_decays holds 0\.9 twice"),
        (
            RunConfig,
            ["training.ema_more_decays=[0]"],
            r"ema_more_decays holds 0\.0; .* above 0",
        ),
        (RunConfig, ["training.ema_snapshot_widths=[0.1,0.1]"], r"_widths holds 0\.1 twice; each"),
        (AverageConfig, ["step=-1"], "step is -1; it must be at least 0"),
        (RunConfig, ["training.ema_snapshot_widths=[0]"], r"ema_snapshot_widths holds 0\.0; "),
        (RunConfig, ["training.ema_more_decays=[0.9,1.0]"], r"ema_more_decays holds 1\.0; "),
        (RunConfig, ["training.ema_snapshot_every_steps=5"], r"_widths is empty; .* \[0\.05,0\.1"),
    ],
)
def test_a_config_that_averages_nothing_is_refused(
    kind: type[Any], given: list[str], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        load_config(kind, None, given)
