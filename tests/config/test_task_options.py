"""Options that a task does not use are refused, each in one line."""

import pytest

from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig

AUTOENCODER = ("task=autoencoder",)
CLASSIFIER = ("task=classifier", "model.num_classes=3", "training.grid_every_steps=0")


def complaints(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError, match=r"^command line: ") as refused:
        load_config(RunConfig, None, ["name=a", "data.url=shards", *overrides])
    return [line.removeprefix("command line: ") for line in str(refused.value).splitlines()]


@pytest.mark.parametrize(
    "key, shown",
    [
        ("schedule.num_steps=50", "schedule.num_steps is 50"),
        ("objective.prediction=v", "objective.prediction is 'v'"),
        ("model.base_channels=64", "model.base_channels is 64"),
        ("sampling.steps=9", "sampling.steps is 9"),
    ],
)
def test_an_option_of_denoisers_is_refused_for_an_autoencoder(key: str, shown: str) -> None:
    assert complaints(*AUTOENCODER, key) == [f"{shown}; an autoencoder has none: leave it out"]


@pytest.mark.parametrize("task", [(), CLASSIFIER], ids=["denoiser", "classifier"])
def test_an_option_of_autoencoders_is_refused_for_other_tasks(task: tuple[str, ...]) -> None:
    assert complaints(*task, "autoencoder.kl_weight=0.5") == [
        "autoencoder.kl_weight is 0.5; only task=autoencoder uses it: leave it out"
    ]


def test_the_batch_of_scores_and_grids_may_be_set_for_an_autoencoder() -> None:
    keys = [
        "name=a",
        "data.url=d",
        *AUTOENCODER,
        "sampling.batch_size=8",
        "training.precision=bf16",
    ]
    assert load_config(RunConfig, None, keys).traits.reconstructs


@pytest.mark.parametrize(
    "key, line",
    [
        (
            "evaluation.validation_every_steps=5",
            "evaluation.validation_every_steps is 5; an autoencoder draws no images: set it to 0",
        ),
        (
            "training.gradient_checkpointing=true",
            "training.gradient_checkpointing is true, which an autoencoder does not have: use "
            "training.micro_batch_size to save memory",
        ),
        (
            "autoencoder.channel_mults=[1,3]",
            "autoencoder.groups is 32; it must divide every level's channels, and 64 leaves 0",
        ),
    ],
)
def test_what_an_autoencoder_cannot_do_is_refused(key: str, line: str) -> None:
    more = ("autoencoder.base_channels=24",) if "mults" in key else ()
    (found,) = complaints(*AUTOENCODER, key, *more)
    assert found.startswith(line.partition(", and")[0])


def test_a_discriminator_is_not_compiled() -> None:
    keys = ("autoencoder.discriminator_from_step=5", "training.compile=default")
    assert complaints(*AUTOENCODER, *keys) == [
        "training.compile is default, which autoencoder.discriminator_from_step does not support: "
        "set one of the two to its default"
    ]


def test_no_feature_network_is_for_autoencoders_alone() -> None:
    assert complaints("evaluation.features=none") == [
        "evaluation.features is 'none'; the scores of a denoiser need a feature network: choose "
        "inception or digits"
    ]


CONTRASTIVE = ("task=contrastive", "text.encoder=transformer", "training.grid_every_steps=0")


def test_a_contrastive_run_has_scores_and_the_options_of_its_encoders() -> None:
    keys = ["text.width=64", "contrastive.loss=infonce", "evaluation.num_images=9"]
    keys += ["sampling.batch_size=8", "evaluation.features=none", "training.reduction=elastic"]
    keys += ["training.reduction_slots=4"]
    config = load_config(RunConfig, None, ["name=a", "data.url=d", *CONTRASTIVE, *keys])
    assert config.traits.embeds
    assert config.architecture == "contrastive"


@pytest.mark.parametrize(
    "key, line",
    [
        (
            "text.encoder=none",
            "text.encoder is none; a contrastive model reads the captions of its images: set "
            "text.encoder=transformer",
        ),
        ("schedule.num_steps=50", "schedule.num_steps is 50; a contrastive model has none"),
        ("model.num_classes=3", "model.num_classes is 3; a contrastive model has none"),
        ("autoencoder.kl_weight=0.5", "autoencoder.kl_weight is 0.5; only task=autoencoder uses"),
        (
            "training.grid_every_steps=5",
            "training.grid_every_steps is 5; a contrastive model draws no images: set it to 0",
        ),
        (
            "evaluation.validation_every_steps=5",
            "evaluation.validation_every_steps is 5; a contrastive model draws no images",
        ),
        (
            "evaluation.precision=bf16_weights",
            "evaluation.precision is bf16_weights; a contrastive model draws no samples",
        ),
        ("training.gradient_checkpointing=true", "training.gradient_checkpointing is true, which"),
        ("contrastive.channel_mults=[]", "contrastive.channel_mults is []; it needs one factor"),
        ("contrastive.base_channels=33", "contrastive.groups is 32; it must divide every level's"),
    ],
)
def test_what_a_contrastive_model_does_not_have_is_refused(key: str, line: str) -> None:
    (found,) = complaints(*CONTRASTIVE, key)
    assert found.startswith(line)


@pytest.mark.parametrize("task", [(), CLASSIFIER, AUTOENCODER], ids=["none", "cls", "ae"])
def test_an_option_of_contrastive_models_is_refused_for_other_tasks(task: tuple[str, ...]) -> None:
    assert complaints(*task, "contrastive.width=5") == [
        "contrastive.width is 5; only task=contrastive uses it: leave it out"
    ]


@pytest.mark.parametrize(
    "keys, line",
    [
        (
            ("model.transformer_depth=2",),
            "model.transformer_depth is 2; a spatial transformer attends to a text: set "
            "text.encoder=transformer, or model.transformer_depth=0",
        ),
        (
            ("model.transformer_depth=2", "model.network=dit", "text.encoder=transformer"),
            "model.transformer_depth is 2, which model.network=dit does not read; leave it out, or "
            "set model.transformer_depth=0",
        ),
        (
            (*CONTRASTIVE, "text.pooled=false"),
            "text.pooled is false; a contrastive model needs the vector of the whole text: leave "
            "it out",
        ),
        (
            ("text.pooled=false",),
            "text.pooled is False, which text.encoder=none does not read; leave it out, or set "
            "text.encoder=transformer",
        ),
    ],
)
def test_options_of_stable_diffusion_need_a_text(keys: tuple[str, ...], line: str) -> None:
    assert complaints(*keys) == [line]


def test_a_frozen_text_encoder_takes_the_options_of_stable_diffusion() -> None:
    text = ["text.encoder=transformers", "text.model=models/clip", "text.length=77"]
    keys = ["name=a", "data.url=d", *text, "text.pooled=false", "model.transformer_depth=1"]
    config = load_config(RunConfig, None, keys)
    assert (config.model.transformer_depth, config.text.pooled) == (1, False)
