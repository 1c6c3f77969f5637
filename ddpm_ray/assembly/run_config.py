"""A run's config and codec as its checkpoints store them, and changes of a continued run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ddpm_ray.assembly import data_order
from ddpm_ray.config.changes import change_problems
from ddpm_ray.config.loading import defining, from_dict
from ddpm_ray.config.option_fields import shown
from ddpm_ray.config.run import OF_TASKS, RunConfig
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.embedding_codec import EmbeddingCodec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.data.latent_preview import PreviewMatrix
from ddpm_ray.data.shard_index import CODECS
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.layers import Variant
from ddpm_ray.models.text_encoder import FrozenTextSpec
from ddpm_ray.storage.file_formats import NewerFormatError, package_version


def saved_config(facts: Mapping[str, Any], where: str = "") -> RunConfig:
    """The run config stored in a checkpoint's facts or in a run's identity.

    `where` is its URL, for errors; an identity contains it. Raises ConfigError, which names the
    version that stored the config, if this version cannot read it.
    """
    where = where or facts.get("folder", "")
    return from_dict(RunConfig, facts["config"], facts.get("version", ""), where)


def saved_codec(facts: Mapping[str, Any], where: str = "") -> Codec:
    """The codec of the data that a checkpoint with these facts was trained on.

    Checkpoints of earlier versions name none: they are of pixels. A codec of latents is not bound
    to an autoencoder (see `latents.bound_codec`). `where` is the checkpoint's URL, for errors.
    Raises NewerFormatError for a codec that this version does not know.
    """
    name = facts.get("codec", "pixels")
    if name not in CODECS:
        here = f"ddpm_ray {package_version()} knows {', '.join(CODECS)}"
        reason = f"its codec is {shown(name)}, and {here}"
        raise NewerFormatError(where, reason, "upgrade ddpm_ray to the version that wrote it")
    if name == "pixels":
        return PIXELS
    if name == "embeddings":
        held, encoder = facts["embeddings"], facts["image_encoder"]
        statistics = tuple(map(float, held["mean"])), tuple(map(float, held["std"]))
        return EmbeddingCodec(held["width"], *statistics, encoder["sha256"], encoder["url"])
    held = facts["latents"]
    statistics = tuple(map(float, held["mean"])), tuple(map(float, held["std"]))
    views, sha256 = tuple(held["views"]), facts["autoencoder"]["sha256"]
    preview = held.get("preview")  # checkpoints of earlier versions hold none
    return LatentCodec(
        held["channels"],
        held["factor"],
        views,
        *statistics,
        autoencoder_sha256=sha256,
        preview=PreviewMatrix.of_json(preview, held["channels"]) if preview else None,
    )


def saved_tokenizer(facts: Mapping[str, Any], where: str = "") -> Tokenizer | None:
    """The tokenizer of the texts of a checkpoint with these facts; None: it takes no text.

    `where` is the checkpoint's URL, for errors. Raises TokenizerError.
    """
    held = facts.get("tokenizer")
    if not held:
        return None
    return Tokenizer(held["json"], held["length"], where or "the tokenizer", held.get("pad"))


def tokenizer_facts(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The facts that a checkpoint holds on the tokenizer of its texts."""
    if tokenizer is None:
        return {}
    held = {"sha256": tokenizer.sha256, "length": tokenizer.length, "json": tokenizer.json}
    if tokenizer.pad is not None:
        held["pad"] = tokenizer.pad
    return {"tokenizer": held}


def saved_frozen_text(
    facts: Mapping[str, Any], tokenizer: Tokenizer | None
) -> FrozenTextSpec | None:
    """The spec of the frozen text encoder of a checkpoint with these facts; None: it has none.

    `tokenizer` is that of its texts.
    """
    held = facts.get("text_encoder")
    if not held or tokenizer is None:
        return None
    return FrozenTextSpec(held["width"], held["pooled_width"], tokenizer.null_tokens)


def saved_variant(facts: Mapping[str, Any], where: str = "") -> Variant:
    """The variant of the network of a checkpoint with these facts.

    Imported networks name one; all others are Ho et al.'s. `where` is the checkpoint's URL, for
    errors. Raises NewerFormatError for a variant that this version does not know.
    """
    try:
        return Variant(**facts.get("variant", {}))
    except TypeError as error:
        here = f"ddpm_ray {package_version()} does not know"
        reason = f"its variant is {shown(facts['variant'])}, which {here}"
        remedy = "upgrade ddpm_ray to the version that wrote it"
        raise NewerFormatError(where, reason, remedy) from error


def for_images(config: RunConfig, image_shape: ImageShape) -> RunConfig:
    """`config` with attention by downsampling factor, for images [H, W, C].

    The config of a task that does not use `model` is returned unchanged. Raises ValueError for a
    resolution in pixels that no level has.
    """
    if config.task not in OF_TASKS["model"]:
        return config
    model = config.model.for_images(image_shape.height, image_shape.width)
    return replace(config, model=model)


def changed_keys(config: RunConfig, saved: Mapping[str, Any], image_shape: ImageShape) -> list[str]:
    """One line for each defining key that differs from the saved config and is not in `change`.

    `saved` is the run's identity, or the facts of the checkpoint that `config` continues; only the
    latter allows the keys in `change` to differ. `image_shape` is that of the data set.
    """
    since = {one["key"]: one["step"] for one in saved.get("changes", [])}
    continues = "step" in saved  # a checkpoint
    lines, may_change = [], []
    for key, (then, now) in _changed(config, saved, image_shape).items():
        if continues and key in config.change:
            continue
        began = f"has {then} since step {since[key]}" if key in since else f"began with {then}"
        lines.append(f"{key} is {now}, but the run {began}")
        if not [*change_problems(config, (key,))]:
            may_change.append(key)
    if may_change and continues:
        step = saved["step"]
        lines.append(f"change=[{','.join(may_change)}] continues under new values from step {step}")
    return lines


def run_changes(
    config: RunConfig, facts: Mapping[str, Any], image_shape: ImageShape
) -> list[dict[str, Any]]:
    """All changes of a run that `config` continues from a checkpoint with these facts, in order.

    Each is {"step", "key", "from", "to"}: from the update after that step on, the key has the
    value "to".
    """
    new = _changed(config, facts, image_shape)
    before: list[dict[str, Any]] = facts.get("changes", [])
    return before + [
        {"step": facts["step"], "key": key, "from": then, "to": now}
        for key, (then, now) in new.items()
    ]


def changes_text(made: Sequence[Mapping[str, Any]]) -> str:
    """The changes as a line of text; empty if there are none."""
    return "; ".join(
        f"{one['key']} {one['from']} -> {one['to']} at step {one['step']}" for one in made
    )


def run_history(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a checkpoint that its config lacks: initial weights and changes."""
    return {key: facts[key] for key in ("init_from", "changes") if facts.get(key)}


def _changed(
    config: RunConfig, saved: Mapping[str, Any], image_shape: ImageShape
) -> dict[str, tuple[Any, Any]]:
    """(saved value, value in `config`) of each key that defines the run and differs."""
    began = saved_config(saved)
    both = data_order.continued(began, config), data_order.continued(config, began)
    then, now = (comparable(one, image_shape) for one in both)
    values = [defining(one) for one in (then, now)]
    if then.training.decays_to_zero or now.training.decays_to_zero:
        for one, of in zip(values, (then, now), strict=True):
            one["training.steps"] = of.training.steps
    return {
        key: (values[0][key], values[1][key])
        for key in values[1]
        if values[0][key] != values[1][key]
    }


def comparable(config: RunConfig, image_shape: ImageShape) -> RunConfig:
    """Return `for_images`, or `config` unchanged if it is for images of another size.

    A sampling.clip of true becomes null, which means the same for pixels and is what earlier
    versions stored as true; latents are never clipped.
    """
    if config.sampling.clip:
        config = replace(config, sampling=replace(config.sampling, clip=None))
    try:
        return for_images(config, image_shape)
    except ValueError:
        return config
