"""Runs with a text encoder of another run: what a checkpoint names, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("tokenizers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly import frozen_text, networks, operations, training_run
from ddpm_ray.assembly.checkpoint_loading import trained_weights
from ddpm_ray.assembly.frozen_text import TextModel, text_facts, text_model
from ddpm_ray.assembly.init_compatibility import learned_anew
from ddpm_ray.assembly.portable_models import copy_model
from ddpm_ray.config.jobs.sample import SampleConfig
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.text_encoder import TextEncoder
from ddpm_ray.runs import load_model
from ddpm_ray.runs.absolute_paths import with_absolute_paths
from ddpm_ray.runs.run_start import begin_run
from ddpm_ray.runs.run_text_model import run_text_model
from ddpm_ray.runs.run_tokenizer import run_tokenizer, text_settings
from ddpm_ray.training.checkpoint_folder import CheckpointError, read_checkpoint
from tests.config.test_task_options import complaints
from tests.data.captioned_sets import write_captioned
from tests.data.latent_sets import commit
from tests.runs.test_contrastive_scores import CAPTIONS, begun, config_on
from tests.test_sampled_as_configured import TINY

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports

SHAPE, CPU = ImageShape(4, 4, 1), torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_captioned(tmp_path_factory.mktemp("captioned"), CAPTIONS, 4)


@pytest.fixture(scope="module")
def encoders(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a contrastive run."""
    return committed_encoders(dataset, tmp_path_factory.mktemp("encoders"))


def committed_encoders(dataset: Dataset, folder: Path, *keys: str, step: int = 0) -> Path:
    state = begun(config_on(dataset, *keys), dataset)
    state.step = step
    return Path(commit(state, folder))


def configured(encoders: Path, *keys: str) -> RunConfig:
    frozen = "text.encoder=contrastive", f"text.model={encoders}"
    return load_config(RunConfig, None, [*TINY, *frozen, *keys])


def committed(config: RunConfig, folder: Path, model: TextModel, **more: Any) -> str:
    """The folder of a run with text, with random weights and `more` facts."""
    facts = {"config": to_dict(config), "image_shape": list(SHAPE), "data_fingerprint": "f"}
    facts |= text_facts(model.tokenizer, model)
    state = training_run.training_state(config, SHAPE, CPU, facts)
    generator = torch.Generator().manual_seed(3)
    for weight in state.ema.model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    state.facts |= more
    return commit(state, folder)


@pytest.fixture(scope="module")
def run(encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    model = text_model("contrastive", str(encoders), 6)
    return committed(configured(encoders), tmp_path_factory.mktemp("run"), model)


def checkpoint_of(run: str) -> Path:
    (found,) = Path(run).glob("checkpoints/step-*")
    return found


def test_a_checkpoint_names_the_encoder_and_has_none_of_its_tensors(
    run: str, encoders: Path
) -> None:
    """In no group of tensors; its embeddings are as wide as that of contrastive.width."""
    found = read_checkpoint(str(checkpoint_of(run)))
    for group in found.tensors.values():
        assert not [name for name in group if name.startswith("text.encoder")]
    assert found.tensors["ema"]["text.pooled.weight"].shape[1] == 6
    held = found.facts["text_encoder"]
    assert held["sha256"] == ddpm_ray.load_encoders(encoders).sha256
    assert held["url"] == str(checkpoint_of(str(encoders)))
    assert (held["width"], held["pooled_width"]) == (8, 6)


def test_it_draws_by_prompts_as_a_model_with_an_encoder_of_its_own(run: str) -> None:
    """Guidance and a negative prompt change the images, and so does each prompt."""
    model = ddpm_ray.load(run, "cpu")
    settings: list[dict[str, Any]] = [
        {"prompts": ["two pears"]},
        {"prompts": ["three figs"]},
        {},
        {"prompts": ["two pears"], "guidance_scale": 3},
        {"prompts": ["two pears"], "guidance_scale": 3, "negative_prompt": "figs"},
    ]
    drawn = [model.sample(32, **given) for given in settings]
    assert len({one.tobytes() for one in drawn}) == len(drawn)
    np.testing.assert_array_equal(model.sample(32, prompts=["Two pears"]), drawn[0])
    assert len(model.provenance["text_encoder_sha256"]) == 64


def test_a_moved_encoder_is_named_and_another_is_refused(
    run: str, encoders: Path, dataset: Dataset, tmp_path: Path
) -> None:
    config, model = configured(encoders), text_model("contrastive", str(encoders), 6)
    gone = {"text_encoder": model.facts() | {"url": str(tmp_path / "gone")}}
    lost = committed(config, tmp_path / "lost", model, **gone)
    says = r"does not load: .*; name the one that it was trained with, as in text_model=runs/enc"
    with pytest.raises(CheckpointError, match=says):
        ddpm_ray.load(lost, "cpu")
    wanted = ddpm_ray.load(run, "cpu").sample(1, prompts=["figs"], steps=2)
    found = ddpm_ray.load(lost, "cpu", text_model=str(encoders))
    np.testing.assert_array_equal(found.sample(1, prompts=["figs"], steps=2), wanted)
    job = load_model.as_trained(
        load_config(SampleConfig, None, [f"text_model={encoders.name}"]), lost, (), encoders.parent
    )
    assert job.text_model == str(encoders)
    here = with_absolute_paths(configured(Path(encoders.name)), encoders.parent)
    assert here.text.model == str(encoders)
    other = committed_encoders(dataset, tmp_path / "other", "seed=5")
    with pytest.raises(CheckpointError, match=r"trained with the text encoder of sha256 .*other.*"):
        ddpm_ray.load(run, "cpu", text_model=str(other))
    facts = text_facts(Tokenizer.trained(["something else"], 280, 6), model)
    swapped = committed(config, tmp_path / "swapped", model, **facts)
    with pytest.raises(CheckpointError, match=r"trained with the tokenizer of sha256 "):
        ddpm_ray.load(swapped, "cpu")


def test_a_text_encoder_for_a_model_without_a_frozen_one_is_refused(tmp_path: Path) -> None:
    config = load_config(RunConfig, None, [*TINY])
    facts = {"config": to_dict(config), "image_shape": list(SHAPE), "data_fingerprint": "f"}
    plain = commit(training_run.training_state(config, SHAPE, CPU, facts), tmp_path)
    with pytest.raises(ConfigError, match=r"text_model is 'e', but .* holds a model without a fro"):
        ddpm_ray.load(plain, "cpu", text_model="e")


def test_a_copy_for_mlflow_loads_without_the_encoder_s_run(
    dataset: Dataset, tmp_path: Path
) -> None:
    encoders = committed_encoders(dataset, tmp_path / "encoders")
    run = committed(
        configured(encoders), tmp_path / "run", text_model("contrastive", str(encoders), 6)
    )
    wanted = ddpm_ray.load(run, "cpu").sample(1, prompts=["figs"], steps=2)
    copy, bare = tmp_path / "copy", tmp_path / "bare"
    assert not copy_model(str(checkpoint_of(run)), copy)
    encoders.rename(tmp_path / "moved")
    found = ddpm_ray.load(copy, "cpu")
    np.testing.assert_array_equal(found.sample(1, prompts=["figs"], steps=2), wanted)
    (missing,) = copy_model(str(checkpoint_of(run)), bare)
    assert missing.endswith("The copy is without it: load it with text_model=URL")
    assert not (bare / frozen_text.TEXT_ENCODER_COPY).exists()
    weights = next(copy.glob("text_encoder/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="sha256"):
        ddpm_ray.load(copy, "cpu")


def test_a_continued_run_has_the_encoder_that_it_began_with(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Though its run goes on, and where an equal one is; the tokenizer is its own too."""
    encoders, folder = committed_encoders(dataset, tmp_path / "encoders"), str(tmp_path / "run")
    config = configured(encoders, f"data.url={dataset.url}", "model.num_classes=7")

    def start(config: RunConfig) -> TextModel:
        model = run_text_model(config, folder)
        assert model is not None
        tokenizer = run_tokenizer(config, dataset, folder, model)
        assert tokenizer is not None
        assert tokenizer.sha256 == model.tokenizer.sha256
        assert tokenizer.length == 6
        assert text_settings(config, dataset, tokenizer, model)["tokenizer"] == text_facts(
            tokenizer, model
        )
        begin_run(config, dataset, folder, tokenizer, text_model=model)
        return model

    first = start(config)
    kept = tmp_path / "kept"
    shutil.copytree(encoders, kept)
    committed_encoders(dataset, encoders, "seed=5", step=4)
    newest = text_model("contrastive", str(encoders), 6)
    assert newest.sha256 != first.sha256
    assert start(config).url == first.url
    moved = configured(kept, f"data.url={dataset.url}", "model.num_classes=7")
    assert start(moved).sha256 == first.sha256
    shutil.rmtree(first.url)
    with pytest.raises(ConfigError, match=r"text.model is .*encoders, whose text encoder ha"):
        start(config)
    assert start(moved).sha256 == first.sha256
    (tmp_path / "run/run.json").unlink()  # lost before the first checkpoint: another run
    (tmp_path / "run/tokenizer.json").write_text(Tokenizer.trained(["x"], 280, 6).json)
    with pytest.raises(
        ConfigError, match=r"text.model is .*, whose tokenizer is of sha256 .* began"
    ):
        start(moved)


def test_an_identity_that_was_lost_still_knows_the_encoder(
    run: str, encoders: Path, dataset: Dataset, tmp_path: Path
) -> None:
    other = committed_encoders(dataset, tmp_path / "other", "seed=5")
    with pytest.raises(ConfigError, match=r"text.model is .*other, whose text encoder has sha256"):
        run_text_model(configured(other), run)
    found = run_text_model(configured(encoders), run)
    assert found is not None
    assert found.url == str(checkpoint_of(str(encoders)))


def test_a_run_of_another_kind_is_no_text_encoder(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a denoiser, which embeds no images and texts"):
        run_text_model(configured(Path(run)), str(tmp_path))
    with pytest.raises(ConfigError, match=r"gone: there is no such folder; name a run's folder"):
        run_text_model(configured(tmp_path / "gone"), str(tmp_path))


def test_a_run_that_begins_with_the_weights_of_another_encoder_is_told(
    run: str, encoders: Path, tmp_path: Path
) -> None:
    found, config = trained_weights(run), configured(encoders)
    mine = text_model("contrastive", str(encoders), 6).sha256
    assert [*learned_anew(found, config, PIXELS, mine)] == []
    for sha256, name in (
        ("b" * 64, "the frozen text encoder of sha256 bbbb"),
        ("", "its own text"),
    ):
        (line,) = learned_anew(found, config, PIXELS, sha256)
        assert line.startswith("was trained with the frozen text encoder of sha256 " + mine[:12])
        assert name in line


def test_a_run_on_embeddings_of_another_encoder_says_so(run: str) -> None:
    found, config = trained_weights(run), configured(Path(run))
    ours = found._replace(image_encoder_sha256="a" * 64, tokenizer_sha256="")
    assert [*learned_anew(ours, config, PIXELS, image_encoder="a" * 64)] == []
    (line,) = learned_anew(ours, config, PIXELS, image_encoder="b" * 64)
    assert "of sha256 aaaaaaaaaaaa, and this run is on those of bbbbbbbbbbbb, which it" in line


def test_the_operations_of_a_frozen_encoder_do_not_count() -> None:
    """Counts differ by those of ours, of the same width and length, alone."""
    sizes = "text.length=6", "text.width=8", "text.depth=1", "text.heads=2"
    ours = load_config(RunConfig, None, [*TINY, "text.encoder=transformer", *sizes])
    frozen = replace(ours, text=replace(ours.text, encoder="contrastive"))
    counts = [operations.training_operations(one, SHAPE) for one in (ours, frozen)]
    spec = networks.text_encoder_spec(ours.text, None)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        encoder, counter = TextEncoder(spec), FlopCounterMode(display=False)
        with counter:
            encoder(encoder.null_tokens[None])
    assert counts[0] - counts[1] == operations.PASSES * counter.get_total_flops() > 0


FROZEN = ("text.encoder=contrastive", "text.model=e")


@pytest.mark.parametrize(
    "keys, line",
    [
        (
            FROZEN[:1],
            "text.model is empty; text.encoder=contrastive takes a text encoder that is trained "
            "elsewhere: name it, as in text.model=runs/encoders",
        ),
        (
            FROZEN[1:],
            "text.model is 'e', which text.encoder=none does not read; leave it out, or set "
            "text.encoder=contrastive",
        ),
        (
            ("text.encoder=transformer", "text.model=e"),
            "text.model is 'e', which text.encoder=transformer does not read: it is trained with "
            "the network; leave it out, or set text.encoder=contrastive or transformers",
        ),
        *(
            (
                (*FROZEN, f"text.{key}={value}"),
                f"text.{key} is {shown}, which the model of text.model defines; leave it out",
            )
            for key, value, shown in (
                ("tokenizer", "t", "'t'"),
                ("vocabulary", "300", "300"),
                ("length", "8", "8"),
                ("width", "8", "8"),
                ("depth", "1", "1"),
                ("heads", "2", "2"),
            )
        ),
        (
            ("task=contrastive", "training.grid_every_steps=0", *FROZEN),
            "text.encoder is contrastive; a contrastive model trains its own: set "
            "text.encoder=transformer",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(keys: tuple[str, ...], line: str) -> None:
    assert line in complaints(*keys)
