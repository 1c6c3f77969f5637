"""Scores of a contrastive run, in training and by the job evaluate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly import training_run
from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.assembly.run_config import tokenizer_facts
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset, DatasetError
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.runs.contrastive_outputs import ContrastiveOutputs, retrieval_scores
from ddpm_ray.runs.evaluation import evaluate_contrastive
from ddpm_ray.runs.evaluation.evaluate_autoencoder import (
    require_reconstruction_scores,
    run_without_noise,
)
from ddpm_ray.runs.evaluation.evaluate_contrastive import (
    contrastive_scores,
    scored_checkpoint,
)
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.runs.run_tokenizer import FILE, run_tokenizer
from ddpm_ray.runs.scored_captions import require_scored_captions
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.training.state import TrainingState
from tests.data.captioned_sets import write_captioned
from tests.data.latent_sets import commit
from tests.fixtures.threaded_workers import OnWorkers
from tests.noise import pack_noise

CAPTIONS = [["A plum"], ["two pears", "pears"], [], ["a plum"], ["three figs"], ["figs"], ["a fig"]]
KEYS = (
    "name=tiny",
    "task=contrastive",
    "contrastive.width=6",
    "contrastive.base_channels=4",
    "contrastive.groups=2",
    "contrastive.channel_mults=[1,2]",
    "contrastive.blocks_per_level=1",
    "text.encoder=transformer",
    "text.length=6",
    "text.width=8",
    "text.depth=1",
    "text.heads=2",
    "training.grid_every_steps=0",
    "evaluation.num_images=7",
    "sampling.batch_size=2",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_captioned(tmp_path_factory.mktemp("captioned"), CAPTIONS, 4)


def config_on(dataset: Dataset, *keys: str) -> RunConfig:
    return load_config(RunConfig, None, [*KEYS, f"data.url={dataset.url}", *keys])


def begun(config: RunConfig, dataset: Dataset) -> TrainingState:
    of = Tokenizer.trained([text for texts in CAPTIONS for text in texts], 280, 6)
    facts: dict[str, Any] = {
        "config": to_dict(config),
        "image_shape": list(dataset.manifest.image_shape),
        "data_fingerprint": dataset.fingerprint,
        **tokenizer_facts(of),
    }
    shape = dataset.manifest.image_shape
    return training_run.training_state(config, shape, torch.device("cpu"), facts)


def test_scores_do_not_depend_on_the_workers_and_name_what_was_scored(
    dataset: Dataset, on_workers: OnWorkers, tmp_path: Path
) -> None:
    """Captions that differ in case alone have equal tokens: 6 of the 7 distinct texts."""
    config = config_on(dataset)
    commit(begun(config, dataset), tmp_path)
    encoders = trained_encoders(str(tmp_path))

    def score(workers: Workers) -> Any:
        return retrieval_scores(config, config.evaluation, dataset, encoders, {}, workers)

    (alone,) = on_workers(1, score)
    assert alone.provenance["retrieval"]["captions"] == 6
    assert alone.provenance["retrieval"]["images"] == 6
    assert alone.provenance["retrieval"]["without_caption"] == 1
    assert alone.metrics["eval/image_to_text_r10"] == 1
    assert "eval/zero_shot_accuracy" in alone.metrics
    for found in on_workers(3, score):
        assert found.metrics == alone.metrics
        assert found.provenance == alone.provenance


def test_encoders_that_know_all_pairs_score_1(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample n is the grey level n: embeddings that its captions share, found by their text."""
    config = config_on(dataset)
    commit(begun(config, dataset), tmp_path)
    encoders = trained_encoders(str(tmp_path))
    tokens = {
        tuple(encoders.tokenizer.encode([text])[0].tolist()): n
        for n, texts in reversed([*enumerate(CAPTIONS)])
        for text in texts
    }
    same = {0: 0, 3: 0}  # both are a plum
    one_hot = torch.eye(7)

    def of_images(self: TrainedEncoders, images: Any, *, batch_size: int = 0) -> Any:
        levels = [int(image.flatten()[0]) for image in images]
        return one_hot[[same.get(level, level) for level in levels]]

    def of_tokens(self: TrainedEncoders, rows: Any) -> Any:
        return one_hot[[tokens[tuple(row.tolist())] for row in rows]]

    monkeypatch.setattr(TrainedEncoders, "image_embeddings", of_images)
    monkeypatch.setattr(TrainedEncoders, "token_embeddings", of_tokens)
    monkeypatch.setattr(TrainedEncoders, "width", 7)
    without = replace(dataset, manifest=replace(dataset.manifest, label_names=()))
    found = retrieval_scores(config, config.evaluation, without, encoders, {}, Workers())
    scores = {name: found.metrics[name] for name in found.metrics if name.endswith("r1")}
    assert scores == {"eval/image_to_text_r1": 1, "eval/text_to_image_r1": 1}
    assert "eval/zero_shot_accuracy" not in found.metrics


def test_the_job_scores_as_the_run_does(dataset: Dataset, tmp_path: Path) -> None:
    config = config_on(dataset)
    state = begun(config, dataset)
    ContrastiveOutputs(config, dataset, state, Workers(), None).evaluate(0)
    commit(state, tmp_path)
    keys = [f"data_url={dataset.url}", "evaluation.num_images=7"]
    asked = load_config(EvaluateConfig, None, keys)
    progress = ImageProgress(7, Workers(), lambda _: None)
    found = contrastive_scores(str(tmp_path), asked, Workers(), progress)
    assert found["metrics"] == state.scores["metrics"]
    origin = found["certificate"]["model"]
    assert origin["model_sha256"]
    assert origin["data"] == dataset.fingerprint
    assert run_without_noise(str(tmp_path)) == config


def test_step_and_weights_of_the_job_are_of_one_checkpoint(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves a newer one while the job reads: the workers read what the driver found."""
    config = config_on(dataset)
    state = begun(config, dataset)
    commit(state, tmp_path)
    asked = load_config(EvaluateConfig, None, [f"data_url={dataset.url}"])
    where, old = scored_checkpoint(str(tmp_path), asked), trained_encoders(str(tmp_path)).sha256
    load = trained_encoders

    def slow(*given: Any) -> TrainedEncoders:
        """Load, while the run trains on."""
        found = load(*given)
        with torch.no_grad():
            for value in state.ema.model.parameters():
                value.add_(1)
        state.step += 1
        commit(state, tmp_path)
        return found

    monkeypatch.setattr(evaluate_contrastive, "trained_encoders", slow)
    for uri in (str(tmp_path), where):
        progress = ImageProgress(7, Workers(), lambda _: None)
        step = state.step
        model = contrastive_scores(uri, asked, Workers(), progress)["certificate"]["model"]
        assert model["step"] == (step if uri != where else 0)
        assert (model["model_sha256"] == old) is (model["step"] == 0)


def test_what_cannot_be_scored_is_refused_before_training(dataset: Dataset, tmp_path: Path) -> None:
    """Data without captions, with other channels or sides, with too few captioned images."""
    of, run = Tokenizer.trained(["a plum"], 280, 6), str(tmp_path / "run")
    pack_noise(str(tmp_path / "plain"), 4, 4)
    deep = "contrastive.channel_mults=[1,1,1,1]"
    config = config_on(dataset)
    require_scored_captions(config, dataset, of)
    for held_out, key, says in (
        (str(tmp_path / "plain"), "", "plain: the data set has no captions"),
        (dataset.url, deep, r"captioned\d+: images are 4 x 4, which 4 levels do not halve evenly"),
        (
            write_captioned(tmp_path / "one", [["a plum", "figs"], [], []], 3).url,
            "",
            "one: .*num_images is 7, which gives 1 image with captions and 2 distinct captions",
        ),
        (
            write_captioned(tmp_path / "same", [["a plum"], ["A plum"]], 2).url,
            "",
            "2 images with captions and 1 distinct caption, .* at least 2 of both; score more imag",
        ),
    ):
        config = config_on(dataset, f"evaluation.held_out_url={held_out}", *filter(None, [key]))
        with pytest.raises(DatasetError, match=says):
            run_tokenizer(config, dataset, run)
    assert not Path(run, FILE).exists()
    colours = replace(dataset.manifest, image_shape=ImageShape(4, 4, 3))
    with pytest.raises(DatasetError, match=r"it holds pixels of .*, not images with channels: 3"):
        require_scored_captions(
            config_on(dataset, f"evaluation.held_out_url={dataset.url}"),
            replace(dataset, manifest=colours),
            of,
        )
    commit(begun(config_on(dataset), dataset), tmp_path)
    asked = load_config(EvaluateConfig, None, [f"data_url={tmp_path}/same"])
    with pytest.raises(DatasetError, match=r"same: evaluation.num_images is 10000, which gives 2"):
        scored_checkpoint(str(tmp_path), asked)


def test_scores_of_denoisers_are_refused() -> None:
    wanted = load_config(EvaluateConfig, None, ["evaluation.bits_per_dim_images=4"]).evaluation
    with pytest.raises(ConfigError, match="it belongs to scores of denoisers: leave it out"):
        require_reconstruction_scores(wanted, "a contrastive model")
