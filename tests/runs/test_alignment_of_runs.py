"""The encoder that scores alignment: refused before Ray starts, then the same on all workers."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly import scoring, training_run
from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.assembly.run_config import tokenizer_facts
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.distributed import worker_group
from ddpm_ray.runs.evaluation import evaluate, evaluate_worker
from ddpm_ray.runs.spare_evaluator import evaluation_store, evaluator_settings, spare_evaluator
from ddpm_ray.runs.training_data import checked_data
from ddpm_ray.runs.training_outputs import training_outputs
from ddpm_ray.runs.worker_process import facts_of_run
from ddpm_ray.training.evaluation_store import EvaluationResult
from tests.data.captioned_sets import write_captioned
from tests.data.latent_sets import TINY_UNET
from tests.noise import pack_noise
from tests.runs.test_ema_search import RunControl
from tests.test_cascade_job import (
    CONTRASTIVE,
    DIFFUSION,
    TEXT,
    TEXTS,
    TOKENIZER,
    trained,
)

CPU = torch.device("cpu")
SCORES = ("evaluation.num_images=4", "evaluation.features=digits", "training.grid_every_steps=0")
Change = Callable[..., str]


class Places(NamedTuple):
    """Folders of captioned images 8 x 8, of an encoder's run and of a model of texts."""

    data: str
    encoder: str
    model: str


@pytest.fixture
def places(tmp_path: Path) -> Places:
    shape = ImageShape(8, 8, 1)
    write_captioned(tmp_path / "data", [TEXTS[:1], TEXTS[1:]] * 4, 8, noise=True, shape=shape)
    data = str(tmp_path / "data")
    return Places(
        data,
        trained(tmp_path / "encoder", data, *CONTRASTIVE),
        trained(tmp_path / "model", data, *TINY_UNET, *DIFFUSION, *TEXT),
    )


def config_of(places: Places, *keys: str) -> RunConfig:
    given = f"evaluation.alignment_encoder={places.encoder}"
    words = ["name=x", f"data.url={places.data}", *TINY_UNET, *DIFFUSION, *TEXT, *SCORES, given]
    return load_config(RunConfig, None, [*words, *keys])


def train_on(places: Places) -> Change:
    """A later checkpoint of the encoder's run, with other weights."""
    return partial(trained, Path(places.encoder), places.data, *CONTRASTIVE, seed=1, step=5)


def test_evaluations_of_a_run_have_the_encoder_that_its_driver_saw(
    places: Places, tmp_path: Path
) -> None:
    """Also a spare process; each loads it once, so that it may be deleted then."""
    config = config_of(places)
    dataset, checked = checked_data(config)
    first = trained_encoders(places.encoder)
    assert checked["alignment_checkpoint"] == {"url": first.url, "sha256": first.sha256}
    train_on(places)()
    assert trained_encoders(places.encoder).sha256 != first.sha256
    settings: dict[str, Any] = {
        "config": to_dict(config),
        "folder": str(tmp_path / "run"),
        "identity": "i",
    }
    settings |= {**checked, "tokenizer": tokenizer_facts(TOKENIZER)}
    facts = facts_of_run(settings, dataset, PIXELS)
    state = training_run.training_state(config, dataset.manifest.diffused_shape, CPU, facts)
    args = config, settings, dataset, PIXELS, state, Workers(), EvaluationResult()
    outputs = training_outputs(*args)
    store = evaluation_store(settings["folder"])
    spare = spare_evaluator(evaluator_settings(settings))
    for step in (3, 4):
        outputs.evaluate(step)
        store.save_weights(step, state.ema.state_dict())
        digest = spare({"step": step, "outputs": ["scores"], "history": {}})
        found = store.result(step, digest).scores
        for scores in (state.scores, found):
            assert scores["certificate"]["alignment"]["model_sha256"] == first.sha256
            assert -1 <= scores["metrics"]["eval/alignment"] <= 1
        assert found["metrics"] == state.scores["metrics"]
        if step == 3:
            shutil.rmtree(first.url)


def test_workers_refuse_another_encoder_than_the_driver_saw(places: Places) -> None:
    wanted = config_of(places).evaluation
    found = trained_encoders(places.encoder)
    pinned = {"url": found.url, "sha256": "0" * 64}
    found_it = rf"and that of .* is {found.sha256[:12]}: put that"
    says = rf"alignment_encoder is .*of sha256 0{{12}}, {found_it}"
    with pytest.raises(ConfigError, match=says):
        scoring.alignment_encoders(wanted, pinned, CPU)
    with pytest.raises(ConfigError, match=r"alignment_encoder is .*nowhere: there is no such"):
        scoring.alignment_encoders(wanted, {**pinned, "url": "nowhere"}, CPU)
    with pytest.raises(KeyError, match="url"):  # no score is left out in silence
        scoring.alignment_encoders(wanted, {}, CPU)
    assert scoring.alignment_encoders(EvaluationConfig(num_images=4), {}, CPU) is None


def unusable_encoders(places: Places, tmp_path: Path) -> dict[str, str]:
    """Encoders that cannot score, and what is said of them."""
    levels = "contrastive.channel_mults=[1,1,1,1,1]"
    large = ImageShape(16, 16, 1)
    write_captioned(tmp_path / "large", [TEXTS] * 2, 2, shape=large)
    write_captioned(tmp_path / "colour", [TEXTS] * 2, 2, shape=ImageShape(8, 8, 3))
    deep = trained(tmp_path / "deep", str(tmp_path / "large"), *CONTRASTIVE, levels)
    colour = trained(tmp_path / "of-colour", str(tmp_path / "colour"), *CONTRASTIVE)
    return {
        str(tmp_path / "nowhere"): "nowhere: there is no such folder",
        places.model: "a denoiser, which embeds no images and texts: name a run with task=con",
        colour: "images have 1 channel, but the encoder .* takes 3",
        deep: "images are 8 x 8, which 5 levels do not halve evenly",
    }


def test_an_encoder_that_cannot_score_is_refused_before_ray_starts(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By training and by evaluate, in one line."""
    monkeypatch.setattr(worker_group, "run", lambda *_: pytest.fail("Ray was started"))
    for url, says in unusable_encoders(places, tmp_path).items():
        given = config_of(places, f"evaluation.alignment_encoder={url}")
        job = EvaluateConfig(evaluation=given.evaluation, sampling=given.sampling)
        for act in (
            partial(checked_data, given),
            partial(evaluate.run_evaluation, places.model, job, tmp_path),
        ):
            with pytest.raises(ConfigError, match=f"alignment_encoder is .*: .*{says}") as refused:
                act()
            assert len(str(refused.value).splitlines()) == 1


def test_evaluate_scores_with_the_encoder_that_its_driver_saw(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run trains on before the worker starts."""
    first = trained_encoders(places.encoder).sha256

    def alone(_: Any, settings: dict[str, Any], *__: Any) -> Any:
        train_on(places)()
        return evaluate_worker.evaluate_worker(settings | {"control": RunControl()})

    monkeypatch.setattr(worker_group, "run", alone)
    monkeypatch.setattr(evaluate_worker, "distributed_context", Workers)
    config = config_of(places)
    job = EvaluateConfig(evaluation=config.evaluation, sampling=config.sampling)
    found = evaluate.run_evaluation("model", job, tmp_path)
    assert found["certificate"]["alignment"]["model_sha256"] == first
    assert -1 <= found["metrics"]["eval/alignment"] <= 1


def test_samples_without_prompts_are_refused_before_ray_starts(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model without texts, of data without captions, and of a decoder."""
    monkeypatch.setattr(worker_group, "run", lambda *_: pytest.fail("Ray was started"))
    config = config_of(places)
    pack_noise(str(tmp_path / "silent"), 4, 8)
    plain = trained(tmp_path / "plain", places.data, *TINY_UNET, *DIFFUSION)
    given = f"embedding.encoder={places.encoder}"
    decoder = trained(tmp_path / "decoder", places.data, *TINY_UNET, *DIFFUSION, *TEXT, given)
    for model, data in ((plain, ""), (places.model, "silent"), (decoder, "")):
        job = EvaluateConfig(data, evaluation=config.evaluation, sampling=config.sampling)
        with pytest.raises(ConfigError, match=r"but the samples have no prompts: set sampling\.pr"):
            evaluate.run_evaluation(model, job, tmp_path)
