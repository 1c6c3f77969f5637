"""The properties of a trained model that must agree with the run that begins with its weights.

Tensors of the same names and shapes may belong to another function: other inputs in as many
channels, other groups or heads.
"""

from collections.abc import Iterator
from typing import TypeAlias

from ddpm_ray.assembly.checkpoint_loading import TrainedWeights
from ddpm_ray.config.objective import ObjectiveConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.task import TRAITS, Task
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.autoencoder import AutoencoderSpec
from ddpm_ray.models.contrastive import ContrastiveSpec
from ddpm_ray.models.dit import DiTSpec
from ddpm_ray.models.prior import PriorSpec
from ddpm_ray.models.text_encoder import TextEncoderSpec
from ddpm_ray.models.unet_spec import UNetSpec

NetworkSpec: TypeAlias = UNetSpec | DiTSpec | AutoencoderSpec | ContrastiveSpec | PriorSpec
NAMES = {
    UNetSpec: "a U-Net",
    DiTSpec: "a DiT",
    AutoencoderSpec: "an autoencoder",
    ContrastiveSpec: "a contrastive model",
    PriorSpec: "a prior",
}
WITHOUT_IMAGES = AutoencoderSpec | ContrastiveSpec | PriorSpec  # as conditioning
CLASSIFIER = "a classifier"
CONDITIONS = ("self_conditioning", "low_resolution_pixels", "inpainting_masks")  # of an objective


def incompatibilities(
    found: TrainedWeights,
    spec: NetworkSpec,
    config: RunConfig,
    codec: Codec,
    tokenizer: Tokenizer | None = None,
) -> Iterator[str]:
    """Yield a line, which begins with a verb, for each reason why a run cannot begin with a model.

    `spec` is that of the run's network, `codec` that of its data, `tokenizer` that of its texts.
    """
    held, ours = _kind(found.spec, found.task), _kind(spec, config.task)
    # A classifier is the down path of a U-Net, and may begin with that of a denoiser.
    if held != ours and (held, ours) != (NAMES[UNetSpec], CLASSIFIER):
        yield f"holds {held}, and this run trains {ours}: name a model with the same network"
        return
    yield from _other_inputs(found, spec, config, codec)
    theirs, sha256 = found.tokenizer_sha256, tokenizer.sha256 if tokenizer else ""
    rows = "text.token." if isinstance(spec, ContrastiveSpec) else "text.encoder.token."
    trained = not (config.text.frozen or found.text_encoder_sha256)  # has rows of its own
    if trained and theirs and sha256 and theirs != sha256 and not _is_skipped(rows, config):
        yield (
            f"has the tokens of a tokenizer of sha256 {theirs[:12]}, and this run those of "
            f"{sha256[:12]}: begin a run of another name= with text.tokenizer= the tokenizer.json "
            f"of that run, or add {rows} to training.init_from_skip"
        )
    hidden = _hidden_options(spec)
    for key, value in _hidden_options(found.spec).items():
        if value != hidden[key]:
            yield (
                f"has {key}={value:g}, and this run has {hidden[key]:g}; no shape of a tensor "
                f"shows it: set {key}={value:g}"
            )
    yield from _other_activation(found.spec, spec, config)


def _other_activation(theirs: NetworkSpec, ours: NetworkSpec, config: RunConfig) -> Iterator[str]:
    """Yield a line if two text encoders of ours differ in what no shape of a tensor shows."""
    held, wanted = (getattr(one, "text", None) for one in (theirs, ours))
    if not isinstance(held, TextEncoderSpec) or not isinstance(wanted, TextEncoderSpec):
        return
    if held.quick_gelu != wanted.quick_gelu and not _is_skipped("text.", config):
        has, have = (str(one.quick_gelu).lower() for one in (held, wanted))
        yield (
            f"has text.quick_gelu={has}, and this run has {have}; no shape of a tensor shows it: "
            f"set text.quick_gelu={has}"
        )


def learned_anew(
    found: TrainedWeights,
    config: RunConfig,
    codec: Codec,
    text_encoder: str = "",
    image_encoder: str = "",
) -> Iterator[str]:
    """Yield a line for what the model may have to learn again: its target, latents, texts, inputs.

    `text_encoder` is the sha256 of the run's text encoder, if that is trained elsewhere,
    `image_encoder` that of the encoder of its image embeddings, if it has any.
    """
    theirs, ours = found.objective, config.objective.prediction
    if config.traits.draws_images and theirs is not None and theirs.prediction != ours:
        yield (
            f"was trained with objective.prediction={theirs.prediction}, and this run with {ours}, "
            "which it has to learn"
        )
    sha256 = codec.autoencoder_sha256 if isinstance(codec, LatentCodec) else ""
    if found.autoencoder_sha256 and sha256 and found.autoencoder_sha256 != sha256:
        yield (
            f"was trained on latents of the autoencoder of sha256 {found.autoencoder_sha256[:12]}, "
            f"and this run is on those of {sha256[:12]}, which it has to learn"
        )
    theirs_text, ours_text = found.text_encoder_sha256, text_encoder
    if found.tokenizer_sha256 and theirs_text != ours_text:
        yield (
            f"was trained with {_text_encoder(theirs_text)}, and this run with "
            f"{_text_encoder(ours_text)}, whose vectors it has to learn"
        )
    theirs_image = found.image_encoder_sha256
    if theirs_image and image_encoder and theirs_image != image_encoder:
        yield (
            f"was trained on embeddings of the image encoder of sha256 {theirs_image[:12]}, and "
            f"this run is on those of {image_encoder[:12]}, which it has to learn"
        )
    if isinstance(found.spec, WITHOUT_IMAGES):
        return
    yield from _other_text(found.spec, config)
    if _skips_inputs(found.spec, config):
        return
    given = _conditions(config.objective)
    if found.spec.condition_channels and given and not _conditions(found.objective):
        # A folder of diffusers, which has no option for them.
        yield (
            f"does not say which conditioning images its network sees; this run gives it "
            f"{' and '.join(given)}"
        )


def _other_text(spec: UNetSpec | DiTSpec, config: RunConfig) -> Iterator[str]:
    """Yield a line for attentions of another form, and for a pooled text that is not added."""
    ours = config.model.transformer_depth
    if isinstance(spec, UNetSpec) and spec.transformer_depth != ours:
        yield (
            f"has model.transformer_depth={spec.transformer_depth}, and this run {ours}, whose "
            "attentions it has to learn"
        )
    if spec.text is not None and spec.pools_text and config.takes_text and not config.text.pooled:
        yield (
            "adds the vector of the whole text to the embedding of t, and this run has "
            "text.pooled=false, which it has to learn"
        )


def _text_encoder(sha256: str) -> str:
    """A text encoder in words; without `sha256` it is trained with its network."""
    return f"the frozen text encoder of sha256 {sha256[:12]}" if sha256 else "its own text encoder"


def first_layer(spec: UNetSpec | DiTSpec) -> str:
    """The name of the layer that reads x_t and the conditioning images."""
    return "conv_in" if isinstance(spec, UNetSpec) else "patch"


def _skips_inputs(spec: UNetSpec | DiTSpec, config: RunConfig) -> bool:
    """Whether the run draws the layer anew that reads the inputs."""
    return _is_skipped(f"{first_layer(spec)}.", config)


def _is_skipped(prefix: str, config: RunConfig) -> bool:
    return prefix.startswith(config.training.init_from_skip)


def _kind(spec: NetworkSpec, task: Task) -> str:
    """The kind of network; a classifier's spec is that of a U-Net."""
    return CLASSIFIER if TRAITS[task].predicts_labels else NAMES[type(spec)]


def _other_inputs(
    found: TrainedWeights,
    spec: NetworkSpec,
    config: RunConfig,
    codec: Codec,
) -> Iterator[str]:
    """Yield a line for each input of the same shape but another meaning than in this run.

    None if the first layer, which reads the inputs, is not taken.
    """
    if isinstance(spec, WITHOUT_IMAGES) or isinstance(found.spec, WITHOUT_IMAGES):
        return
    if _skips_inputs(spec, config):
        return
    remedy = (
        f"name another model, or add {first_layer(spec)}. to training.init_from_skip to train it "
        "anew"
    )
    if found.codec != codec.name:
        yield f"was trained on {found.codec}, and this run is on {codec.name}: {remedy}"
    held, wanted = _conditions(found.objective), _conditions(config.objective)
    as_many = found.spec.condition_channels == spec.condition_channels
    if as_many and held and held != wanted:
        yield (
            f"sees {' and '.join(held)}, and this run {' and '.join(wanted)}, which have as many "
            f"channels: {remedy}"
        )


def _conditions(objective: ObjectiveConfig | None) -> tuple[str, ...]:
    """Options of `objective` that give the network conditioning images, in their order."""
    if objective is None:
        return ()
    return tuple(f"objective.{key}" for key in CONDITIONS if getattr(objective, key))


def _hidden_options(spec: NetworkSpec) -> dict[str, float]:
    """Options that change a network's function, but not the shapes of its tensors."""
    match spec:
        case UNetSpec():
            return {"model.groups": spec.groups, "model.head_channels": spec.variant.head_channels}
        case DiTSpec():
            return {"model.heads": spec.heads, "model.mlp_norm_eps": spec.mlp_norm_eps}
        case AutoencoderSpec():
            return {"autoencoder.groups": spec.groups}
        case PriorSpec():
            text = {"text.heads": spec.text.heads} if isinstance(spec.text, TextEncoderSpec) else {}
            return {"prior.heads": spec.heads, **text}
        case ContrastiveSpec():
            return {"contrastive.groups": spec.groups, "text.heads": spec.text.heads}
