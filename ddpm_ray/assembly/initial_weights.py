"""Initial weights of a run that are those of a trained model, for fine-tuning.

The driver looks up the model once and stores its checkpoint and the sha256 of its weights in the
run's identity. So a run that is killed before its first checkpoint begins from the same weights
again, even if the model has been trained further.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.assembly import checkpoint_loading, networks
from ddpm_ray.assembly.checkpoint_loading import TrainedWeights
from ddpm_ray.assembly.frozen_text import TextModel
from ddpm_ray.assembly.init_compatibility import first_layer, incompatibilities, learned_anew
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.layers import HO
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.redaction import counted, sanitize
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.state import TrainingState

log = logging.getLogger(__name__)

MOST_NAMES = 5  # of tensors in a line


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run begins with: plain values, stored in its identity and checkpoints."""

    url: str  # training.init_from
    checkpoint: str  # folder of the checkpoint, or of a diffusers model
    ema: str  # EMA group of the checkpoint
    step: int  # of the checkpoint
    sha256: str  # of its weights


@dataclass(frozen=True)
class TensorMatch:
    """Which tensors of a network are taken from a model."""

    taken: dict[str, Tensor]
    skipped: list[str]  # of the network, named by training.init_from_skip
    missing: list[str]  # of the network, not in the model
    unused: list[str]  # of the model, not in the network
    widened: list[str] = field(default_factory=list)  # a line for each tensor of `widened_layer`

    def __str__(self) -> str:
        said = [f"{counted(len(self.taken), 'tensor')} taken", *self.widened]
        for what, names in (
            ("left as they are (training.init_from_skip)", self.skipped),
            ("not in the model", self.missing),
            ("of the model not in this network", self.unused),
        ):
            if names:
                more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
                said.append(f"{len(names)} {what}: {', '.join(names[:MOST_NAMES])}{more}")
        return "; ".join(said)


def find_initial_weights(config: TrainingConfig) -> InitialWeights:
    """The weights that `init_from` names at this time: for a run, those of its newest checkpoint.

    Raises CheckpointError, StorageError, and UnsupportedModelError for a diffusers folder.
    """
    found = checkpoint_loading.trained_weights(config.init_from, config.init_from_ema)
    return InitialWeights(
        config.init_from, found.checkpoint, config.init_from_ema, found.step, found.sha256
    )


def check_initial_weights(
    source: InitialWeights,
    config: RunConfig,
    image_shape: ImageShape,
    codec: Codec = PIXELS,
    tokenizer: Tokenizer | None = None,
    text_model: TextModel | None = None,
    image_encoder: str = "",
) -> None:
    """Read the weights, check that they fit the network, and log what is taken from them.

    `image_shape`, `codec` and `tokenizer` are those of the run's data, `text_model` its text
    encoder that is trained elsewhere, `image_encoder` the sha256 of that of its image embeddings.
    Raises ConfigError for another network or inputs of another meaning, and what `_read` and
    `matched` raise.
    """
    found, text = _read(source), text_model.spec if text_model else None
    spec = networks.network_spec(config, image_shape, tokenizer=tokenizer, frozen_text=text)
    where = sanitize(source.checkpoint)
    if lines := [*incompatibilities(found, spec, config, codec, tokenizer)]:
        raise ConfigError("\n".join(f"training.init_from: {where} {line}" for line in lines))
    texts = text_model.sha256 if text_model else ""
    for line in learned_anew(found, config, codec, texts, image_encoder):
        log.warning("training.init_from: %s %s", where, line)
    with torch.device("meta"):
        network = networks.network(config, image_shape, tokenizer=tokenizer, frozen_text=text)
    taken = matched(network, found.tensors, config.training, source.checkpoint)
    log.info(
        "initial weights from %s (%s of step %d, sha256 %s): %s",
        sanitize(source.checkpoint),
        source.ema,
        source.step,
        source.sha256[:12],
        taken,
    )


def load_initial_weights(
    state: TrainingState, source: InitialWeights, config: TrainingConfig
) -> None:
    """Set the weights and all EMAs of a `state` that was not trained yet."""
    taken = matched(state.model, _read(source).tensors, config, source.checkpoint).taken
    begun = state.model.state_dict() | taken
    state.model.load_state_dict(begun)
    for mean in (state.ema, *state.averages.means.values()):
        mean.load_state_dict(begun)


def matched(
    network: nn.Module, model: Mapping[str, Tensor], config: TrainingConfig, where: str
) -> TensorMatch:
    """Match a network's tensors with those of a model, whose first layer may be widened.

    Raises ConfigError as `match_tensors` does.
    """
    wide = widened_layer(network, model)
    match = match_tensors(network.state_dict(), {**model, **wide}, config, where)
    lines = [
        f"{name} widened from {model[name].shape[1]} to {weight.shape[1]} input channels, the new "
        f"ones at 0"
        for name, weight in wide.items()
        if name in match.taken
    ]
    return replace(match, widened=lines)


def widened_layer(network: nn.Module, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first layer's weights of a model without conditioning images, for a network with them.

    They are 0 for these images, which are the last input channels, so that the network begins with
    the predictions of the model. (As Stable Diffusion's inpainting models began: model card of
    runwayml/stable-diffusion-inpainting.) Empty if the network takes no conditioning images, or if
    the model does: the order of its input channels may be another one.
    """
    if not isinstance(network, UNet | DiT) or not network.spec.condition_channels:
        return {}
    name = f"{first_layer(network.spec)}.weight"
    weight = model.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] != network.spec.image_channels:
        return {}
    return {name: F.pad(weight, (0, 0, 0, 0, 0, network.spec.condition_channels))}


def match_tensors(
    network: Mapping[str, Tensor], model: Mapping[str, Tensor], config: TrainingConfig, where: str
) -> TensorMatch:
    """Match the tensors of a network with those of a model, by name.

    Raises ConfigError with a line for each tensor of another shape and each unused prefix, and if
    no tensor is taken.
    """
    skip: Sequence[str] = config.init_from_skip
    lines = [
        f"training.init_from_skip holds {prefix!r}, but no tensor of the network has that prefix; "
        f"the first tensor is {next(iter(network))}"
        for prefix in skip
        if not any(name.startswith(prefix) for name in network)
    ]
    skipped = [name for name in network if name.startswith(tuple(skip))]
    wanted = {name: tensor for name, tensor in network.items() if name not in skipped}
    taken = {name: model[name] for name in wanted if name in model}
    lines += [
        f"training.init_from: {name} is {list(taken[name].shape)} in {sanitize(where)} and "
        f"{list(wanted[name].shape)} in this network; to leave it as it is, add it to "
        f"training.init_from_skip"
        for name in taken
        if taken[name].shape != wanted[name].shape
    ]
    if not taken:
        lines.append(
            f"training.init_from: no tensor of {sanitize(where)} is taken: name fewer tensors in "
            f"training.init_from_skip, or another model"
        )
    if lines:
        raise ConfigError("\n".join(lines))
    missing = [name for name in wanted if name not in model]
    return TensorMatch(taken, skipped, missing, [name for name in model if name not in network])


def _read(source: InitialWeights) -> TrainedWeights:
    """Read the weights; raises CheckpointError if they are gone or have another sha256.

    Raises ConfigError for a network of another variant, whose tensors have the same names and
    shapes as ours, but another function.
    """
    found = checkpoint_loading.trained_weights(source.checkpoint, source.ema)
    if found.sha256 != source.sha256:
        raise CheckpointError(
            source.checkpoint,
            f"its weights have sha256 {found.sha256[:12]}, and the run began with "
            f"{source.sha256[:12]}",
            "restore those weights, or start a run with another name=",
        )
    if isinstance(found.spec, UNetSpec):
        ours = asdict(HO) | {"head_channels": found.spec.variant.head_channels}  # an option
        held = asdict(found.spec.variant)
        if other := {key: value for key, value in held.items() if value != ours[key]}:
            raise ConfigError(
                f"training.init_from: {sanitize(source.checkpoint)} is a U-Net with {other}, which "
                f"a run cannot train; choose a network of Ho et al.'s form"
            )
    return found
