"""Descriptions of runs in MLflow, in Markdown: what was trained, its scores, the next commands."""

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from ddpm_ray.assembly import networks
from ddpm_ray.assembly.frozen_text import TextModel
from ddpm_ray.config.reading.option_text import value_text
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.evaluation.score_table import score_table
from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.models.contrastive import ContrastiveEncoders
from ddpm_ray.models.prior import Prior
from ddpm_ray.redaction import counted, sanitize


def run_description(
    config: RunConfig,
    dataset: Dataset,
    folder: str,
    tokenizer: Tokenizer | None,
    continued_by: str,
    scores: Mapping[str, Any],
    text_model: TextModel | None = None,
) -> str:
    """Describe the run in `folder`; `scores` as stored in its checkpoints, empty before the first.

    `tokenizer` is that of its texts, `text_model` its frozen text encoder. `continued_by` is the
    command that continues it; empty: that of its sweep.
    """
    training, cluster = config.training, config.cluster
    lines = _scores(scores) if scores else []  # first: MLflow's page folds the rest
    lines += [
        data_line(config.data.url, dataset),
        *_model_lines(config, dataset.manifest.diffused_shape, tokenizer, text_model),
        f"**Training** {training_length(training)}, "
        f"global_batch_size {training.global_batch_size}, "
        f"learning rate {training.learning_rate:g}, {training.precision}, seed {config.seed}, "
        f"workers {cluster.num_workers}",
    ]
    own = code(continued_by) if continued_by else "by the command of the sweep"
    lines += [f"**Continue** {own}"]
    if config.traits.draws_images:
        lines += [f"**Sample** {code(command('sample', folder, '--out', 'samples.png'))}"]
    return "\n\n".join(lines)


def training_length(training: TrainingConfig) -> str:
    """Describe how long a run is trained."""
    if training.core_seconds:
        return f"{training.core_seconds:,.0f} core-seconds, at most {training.steps:,} steps"
    return f"{training.steps:,} steps"


def _model_lines(
    config: RunConfig,
    image_shape: ImageShape,
    tokenizer: Tokenizer | None,
    text_model: TextModel | None,
) -> list[str]:
    """Describe the network for images [H, W, C] and what it is trained for."""
    text_spec = text_model.spec if text_model else None
    with torch.device("meta"):
        network = networks.network(config, image_shape, tokenizer=tokenizer, frozen_text=text_spec)
    count = sum(parameter.numel() for parameter in network.parameters())
    if isinstance(network, Autoencoder):
        wanted, spec = config.autoencoder, network.spec
        shape = spec.latent_shape(image_shape[:2])
        ratio = math.prod(image_shape) / math.prod(shape)
        start = wanted.discriminator_from_step
        perceptual = "LPIPS" if wanted.perceptual == "lpips" else "perceptual"
        return [
            f"**Latents** {list(shape)} (factor {spec.factor}, {spec.latent_channels} channels), "
            f"1/{ratio:g} of the image's values",
            f"**Network** autoencoder, {count:,} parameters: base_channels {spec.base_channels}, "
            f"channel_mults {list(spec.channel_mults)}, blocks_per_level {spec.blocks_per_level}",
            f"**Loss** {wanted.loss}, gradient difference {wanted.gradient_difference_weight:g}, "
            f"{perceptual} {wanted.perceptual_weight:g}, KL {wanted.kl_weight:g}, "
            + (f"discriminator from step {start:,}" if start else "no discriminator"),
        ]
    if isinstance(network, ContrastiveEncoders):
        image, text = config.contrastive, config.text
        return [
            f"**Embeddings** of width {image.width}; loss {image.loss}",
            f"**Network** image and text encoder, {count:,} parameters: base_channels "
            f"{image.base_channels}, channel_mults {list(image.channel_mults)}, blocks_per_level "
            f"{image.blocks_per_level}; text of {text.length} tokens, width {text.width}, depth "
            f"{text.depth}",
        ]
    model, schedule, objective = config.model, config.schedule, config.objective
    diffusion = (
        f"**Schedule** {schedule.kind}{' rescaled' if schedule.rescale else ''}, "
        f"T = {schedule.num_steps}; prediction {objective.prediction}, loss {objective.loss}, "
        f"weighting {objective.weighting}"
    )
    if isinstance(network, Prior):
        sizes = config.prior
        return [
            diffusion,
            f"**Network** prior of embeddings of width {network.spec.embedding_width}, {count:,} "
            f"parameters: width {sizes.width}, depth {sizes.depth}, heads {sizes.heads}; text of "
            f"{config.text.length} tokens",
        ]
    classes = model.num_classes
    labels = counted(classes, "class", "classes") if classes else "unconditional"
    return [
        diffusion,
        f"**Network** {config.task}, {model.network}, {count:,} parameters, {labels}: "
        + ", ".join(f"{name} {value_text(value)}" for name, value in model.shown_sizes.items()),
        *([_text_encoder_line(text_model)] if text_model else []),
    ]


def _text_encoder_line(model: TextModel) -> str:
    """Name a frozen text encoder."""
    return f"**Text encoder** {code(model.url)}, {model.kind}, frozen, sha256 {model.sha256[:12]}"


def data_line(url: str, dataset: Dataset) -> str:
    """Name the data set, its size, what it holds of the images, labels and fingerprint."""
    manifest = dataset.manifest
    held = {"pixels": "", "latents": f"latents of {manifest.latent_shape}, of "}
    held["embeddings"] = f"embeddings of width {manifest.embedding_width}, of "
    shape, labels = manifest.image_shape, len(manifest.label_names)
    of = counted(labels, "label") if labels else "no labels"
    return (
        f"**Data set** {code(url)}: {held[manifest.codec]}{counted(manifest.samples, 'image')} "
        f"of {shape}, {of}, "
        f"fingerprint {dataset.fingerprint[:12]}"
    )


def with_picture(description: str, key: str, run_id: str, image_path: str) -> str:
    """Add the newest picture `key`, which is the run's artifact `image_path`, to a description."""
    link = f"get-artifact?path={quote(image_path, safe='')}&run_uuid={run_id}"
    title, name = key.capitalize(), f"grid of {key}"
    return f"{description}\n\n**{title}** [{code(image_path)}]({link})\n\n![{name}]({link})"


def score_tags(config: RunConfig, scores: dict[str, Any]) -> dict[str, str]:
    """Return each score with its interval, as text; none if the run has curves of both.

    The ends of the interval of a single score would be two more charts of one point.
    """
    if config.evaluation.every_steps:
        return {}
    table = score_table(scores.get("metrics", {}))
    return {name: f"{value} {spread}" for name, value, spread in table if spread}


def own_command() -> str:
    """Return the command that started this process; the same command continues its run."""
    program, *arguments = sys.argv
    python = ["python"] if program.endswith(".py") else []
    name = program if python else Path(program).name
    return sanitize(shlex.join([*python, name, *arguments]))


def command(job: str, *arguments: str) -> str:
    """Return the command of another job, in the form in which this one was started."""
    is_script = Path(sys.argv[0]).parent.name == "jobs"
    program = ["python", f"jobs/{job}.py"] if is_script else ["ddpm-ray", job]
    return sanitize(shlex.join([*program, *arguments]))


def code(text: str) -> str:
    """Format `text` as code in Markdown."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"


def _scores(scores: Mapping[str, Any]) -> list[str]:
    """Return a line of the scores, with 95 % intervals in brackets, and one of their protocol."""
    shown = [
        f"{name} {value} {spread}".rstrip()
        for name, value, spread in score_table(scores["metrics"])
    ]
    lines = [f"**Scores** of step {scores['step']:,}: {'; '.join(shown)}"]
    protocol = scores.get("certificate", {})
    if drawn := protocol.get("samples"):
        lines += [
            f"**Protocol** {counted(drawn['images'], 'sample')} by {drawn['sampler']} in "
            f"{drawn['steps']} steps (eta {drawn['eta']:g}, seed {drawn['seed']}), EMA weights, "
            f"against {counted(protocol['reference']['images'], 'image')} of the data set; in "
            "brackets: 95 % interval; all details: artifact "
            f"`evaluation/step-{scores['step']:08d}.json`"
        ]
    if scored := protocol.get("retrieval"):
        lines += [
            f"**Protocol** {counted(scored['images'], 'image')} and "
            f"{counted(scored['captions'], 'distinct caption')}, EMA weights; in brackets: 95 % "
            f"interval; all details: artifact `evaluation/step-{scores['step']:08d}.json`"
        ]
    if drawn := protocol.get("reconstructions"):
        lines += [
            f"**Protocol** {counted(drawn['images'], 'image')}, decoded from their posterior "
            "means, EMA weights; in brackets: 95 % interval; all details: artifact "
            f"`evaluation/step-{scores['step']:08d}.json`"
        ]
    return lines
