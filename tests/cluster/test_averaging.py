"""The search for a width, with a score in place of FID whose best width is known."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray import build, build_trained
from ddpm_ray.average_config import AverageConfig
from ddpm_ray.cluster import averaging
from ddpm_ray.config import RunConfig
from ddpm_ray.generation.trained_model import TrainedModel
from ddpm_ray.job_config import EvaluateConfig
from ddpm_ray.knobs import ConfigError, from_dict, load, to_dict
from ddpm_ray.models.ema import Averages, width_group
from ddpm_ray.models.post_hoc_ema import gamma_of, power_decay
from ddpm_ray.models.unet import UNet
from ddpm_ray.training.checkpoints import CheckpointError, CheckpointStore, CheckpointWriter
from ddpm_ray.training.snapshots import SnapshotStore
from ddpm_ray.training.workers import Workers

STEPS, TRUTH = 60, 0.15


def wandering(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """A run in `folder` whose weights walk at random; the average of width TRUTH at its end."""
    config = load(
        RunConfig,
        None,
        [
            "name=a", "data.url=b", "schedule.num_steps=10", "sampling.steps=5",
            "model.base_channels=4", "model.groups=2", "model.channel_mults=[1]",
            "model.blocks_per_level=1", "model.attention_resolutions=[]",
            f"training.steps={STEPS}", *overrides,
        ],
    )  # fmt: skip
    facts = {"config": to_dict(config), "image_shape": [4, 4, 1], "data_fingerprint": ""}
    state = build.training_state(config, (4, 4, 1), torch.device("cpu"), facts)
    writer = CheckpointWriter(CheckpointStore(str(folder / "checkpoints")))
    keep = build.keeper(config, state, writer, str(folder), Workers())
    name = width_group(TRUTH)
    truth = Averages.of(state.model, {name: partial(power_decay, gamma_of(TRUTH))})
    for _ in range(STEPS):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(torch.randn_like(parameter))
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


KEPT = "training.ema_snapshot_widths=[0.1,0.2]", "training.ema_snapshot_every_steps=5"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run below tmp_path; models that are like its average of width TRUTH score best."""
    truth = wandering(tmp_path / "run", *KEPT)

    def evaluate(url: str, config: EvaluateConfig, home: Path) -> dict[str, Any]:
        found = weights_of(build_trained.trained_model(url))
        apart = sum(float((found[name] - truth[name]).square().sum()) for name in truth)
        metrics = {"eval/kd_digits": 0.0, "eval/fd_digits": apart}
        return {"metrics": metrics, "certificate": {"scored": url}}

    monkeypatch.setattr(averaging, "evaluate", evaluate)
    return tmp_path / "run"


def test_the_best_width_is_found_and_left_as_a_model(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = AverageConfig(widths=(0.05, 0.15, 0.2, 0.25))
    with caplog.at_level(logging.INFO):
        result = averaging.sweep("run", config, tmp_path, "best")
    assert json.loads(json.dumps(result)) == result
    assert result["widths"] == [0.05, 0.15, 0.2, 0.25]
    assert result["best"] == TRUTH
    assert result["step"] == STEPS
    assert result["metric"] == "eval/fd_digits"
    others = [score for score in result["scores"] if score != min(result["scores"])]
    assert len(others) == 3
    assert min(result["scores"]) < min(others) / 100
    assert result["certificate"] == {"scored": f"{run}/average-0.15-step-00000060"}
    assert {path.name for path in run.iterdir()} == {"checkpoints", "snapshots"}

    best = build_trained.trained_model(str(tmp_path / "best"))
    assert best.provenance["average"]["sigma_rel"] == TRUTH
    assert best.provenance["average"]["steps"] == list(range(5, STEPS + 1, 5))
    assert best.provenance["step"] == STEPS
    assert best.sample(2, steps=2).shape == (2, 4, 4, 1)
    table = [record.getMessage().split() for record in caplog.records]
    assert table[0] == ["width", "eval/fd_digits", "misfit"]
    assert [row[0] for row in table[1:5]] == ["0.05", "0.15", "0.2", "0.25"]


def test_a_certificate_says_which_average_was_scored(run: Path, tmp_path: Path) -> None:
    """The decay of the main average is not claimed for another one."""
    averaging.sweep("run", AverageConfig(widths=(0.15,)), tmp_path, "best")
    told = {}
    for name, url, ema in (
        ("main", run, "ema"), ("tracked", run, "ema-width-0.1"), ("made", tmp_path / "best", "ema"),
    ):  # fmt: skip
        known = build_trained.trained_model(str(url), ema=ema).provenance
        config = from_dict(RunConfig, known["config"])
        told[name] = build.ema_provenance(config, known["step"], known["average"])
    assert told["main"]["weights"] == "ema"
    assert told["main"]["ema_decay_per_step"] == pytest.approx(61 / 70)  # still on its ramp
    assert told["tracked"] == {"weights": "ema-width-0.1", "step": STEPS, "training_seed": 0}
    assert told["made"]["weights"]["sigma_rel"] == TRUTH
    assert "ema_decay_per_step" not in told["made"]


def test_an_average_can_end_earlier(run: Path, tmp_path: Path) -> None:
    """Nothing that was kept later is asked for; it is the tracked width of that step."""
    shutil.rmtree(run / "snapshots/step-00000025")
    averaging.sweep("run", AverageConfig(widths=(0.1,), step=20), tmp_path, "early")
    made = build_trained.trained_model(str(tmp_path / "early"))
    store = SnapshotStore(str(run / "snapshots"))
    kept = store.read(20, width_group(0.1))
    assert made.provenance["step"] == 20
    torch.testing.assert_close(weights_of(made), kept, rtol=1e-5, atol=1e-5)


def test_a_width_out_of_reach_is_told(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    averaging.sweep("run", AverageConfig(widths=(0.011,)), tmp_path)
    assert "width 0.011 is out of reach of what was kept (misfit 0." in caplog.text


def test_nothing_stays_of_what_could_not_be_scored(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("no places")

    monkeypatch.setattr(averaging, "evaluate", fails)
    with pytest.raises(RuntimeError, match="no places"):
        averaging.sweep("run", AverageConfig(), tmp_path)
    assert {path.name for path in run.iterdir()} == {"checkpoints", "snapshots"}


def test_what_cannot_be_averaged_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step is 33; no averages .* try step=35"):
        averaging.sweep("run", AverageConfig(step=33), tmp_path)
    wandering(tmp_path / "plain")
    for name in ("plain", "nowhere"):
        with pytest.raises(CheckpointError, match=rf"{name}: no averages were kept here; train"):
            averaging.sweep(name, AverageConfig(), tmp_path)
    (run / "snapshots/step-00000035/manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000035/ema-width-0\.1\S+ is damaged"):
        averaging.sweep("run", AverageConfig(), tmp_path)


@pytest.mark.parametrize(
    "kind, given, line",
    [
        (AverageConfig, ["widths=[]"], "widths is empty"),
        (AverageConfig, ["widths=[0.1,0.3]"], r"widths holds 0\.3; .* below 0\.2886.*: try 0\.1"),
        (AverageConfig, ["evaluation.num_images=0"], "evaluation.num_images is 0; widths are"),
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
        load(kind, None, given)
