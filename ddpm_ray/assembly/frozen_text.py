"""Text encoders that are trained elsewhere: loaded, named by checkpoints, bound to networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from ddpm_ray.assembly import run_config
from ddpm_ray.assembly.continued_encoder import UNLOADABLE
from ddpm_ray.assembly.encoder_loading import encoder_files, trained_encoders
from ddpm_ray.assembly.model_copies import copy_files, copy_in
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.text import FROZEN, FrozenTextKind
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.frozen_text import ContrastiveText, FrozenText
from ddpm_ray.models.interop import open_clip_text, transformers_text
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.transformers_text import TOKENIZER, TextFolder, text_folder
from ddpm_ray.models.prior import Prior
from ddpm_ray.models.text_encoder import FrozenTextSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.training.checkpoint_folder import CheckpointError

TEXT_ENCODER_COPY = "text_encoder"  # folder in that of a copied checkpoint
NOT_LOADED = "the text encoder of this model does not load"


@dataclass(frozen=True, eq=False)
class TextModel:
    """A text encoder that was found: its tokenizer, its sizes, and what identifies it."""

    load: Callable[[], FrozenText]  # on the CPU; raises UnsupportedModelError
    spec: FrozenTextSpec
    tokenizer: Tokenizer
    kind: FrozenTextKind
    url: str  # of its checkpoint or folder
    sha256: str  # of its weights; of a folder of transformers, of all its files

    def facts(self) -> dict[str, Any]:
        """The facts by which a checkpoint names it."""
        return {
            "kind": self.kind,
            "url": self.url,
            "sha256": self.sha256,
            "width": self.spec.width,
            "pooled_width": self.spec.pooled_width,
        }


def text_model(kind: FrozenTextKind, url: str, length: int) -> TextModel:
    """Find the text encoder at `url`, for texts of `length` tokens if the model leaves it open.

    Raises ConfigError and UnsupportedModelError for a model of another kind, CheckpointError,
    TokenizerError, StorageError.
    """
    match kind:
        case "contrastive":
            return _of_contrastive(url)
        case "transformers":
            return _of_transformers(url, length)
        case never:
            assert_never(never)


def text_facts(tokenizer: Tokenizer | None, model: TextModel | None) -> dict[str, Any]:
    """The facts that a checkpoint holds on its texts: tokenizer and frozen text encoder, if any."""
    held = run_config.tokenizer_facts(tokenizer)
    return held | {"text_encoder": model.facts()} if model else held


def bind_text_model(
    network: nn.Module, facts: Mapping[str, Any], where: str = "", moved: str = ""
) -> None:
    """Give `network` the text encoder that the facts of a checkpoint name, on its device.

    `moved` is its URL if it has moved; `where` is the checkpoint's URL. A copy in that folder
    (`copy_text_model`) is taken before the one that the facts name. Does nothing for a network that
    has no frozen one. Raises CheckpointError unless it has the same sha256 and tokenizer, and
    ConfigError if one is given for a model that has none.
    """
    held = facts.get("text_encoder")
    if held is None:
        if moved:
            raise ConfigError(
                f"text_model is {moved!r}, but {where} holds a model without a frozen text "
                "encoder: leave it out"
            )
        return
    try:
        encoder = _checked(facts, moved or copy_in(where, TEXT_ENCODER_COPY) or held["url"]).load()
    except ValueError as error:
        key = "text_model" if where else "text.model"  # of a job, or of the run itself
        remedy = f"name the one that it was trained with, as in {key}={FROZEN[held['kind']]}"
        raise CheckpointError(where or held["url"], str(error), remedy) from error
    assert isinstance(network, UNet | DiT | Prior)
    assert network.text is not None  # built with the facts
    network.text.bind(encoder)


def copy_text_model(facts: Mapping[str, Any], folder: Path, where: str = "") -> None:
    """Copy the text encoder of a checkpoint with these facts into the local `folder` of its copy.

    A copy in the checkpoint's own folder `where` is taken before the one that the facts name.

    So the copy loads on any machine. Does nothing for a model that has no frozen one. Raises
    ValueError unless it is the one that the model was trained with, and StorageError.
    """
    if (held := facts.get("text_encoder")) is None:
        return
    url = copy_in(where, TEXT_ENCODER_COPY) or held["url"]
    try:
        files = _files(held["kind"], url)
    except (CheckpointError, ConfigError, UnsupportedModelError) as error:
        raise ValueError(f"{NOT_LOADED}: {error}") from error
    # The copy is verified: the encoder's run may commit another checkpoint at any time.
    _checked(facts, copy_files(files, folder / TEXT_ENCODER_COPY), url)


def _checked(facts: Mapping[str, Any], url: str, named: str = "") -> TextModel:
    """Load the text encoder at `url`, called `named` in errors, if that is given.

    Raises ValueError unless it is the one that the facts name, with the tokenizer that they hold.
    """
    held = facts["text_encoder"]
    try:
        found = text_model(held["kind"], url, facts["tokenizer"]["length"])
    except UNLOADABLE as error:
        raise ValueError(f"{NOT_LOADED}: {error}") from error
    wanted = (held["sha256"], facts["tokenizer"]["sha256"])
    here = (found.sha256, found.tokenizer.sha256)
    for what, trained, own in zip(("text encoder", "tokenizer"), wanted, here, strict=True):
        if own != trained:
            raise ValueError(
                f"this model was trained with the {what} of sha256 {trained[:12]}, and that of "
                f"{named or url} is {own[:12]}"
            )
    return found


def _files(kind: FrozenTextKind, url: str) -> dict[str, str]:
    """URLs of the files that `text_model(kind, url)` reads, by their names in one folder."""
    match kind:
        case "contrastive":
            return encoder_files(url)
        case "transformers":
            found = frozen_text_folder(url)
            return {name: str(found.path / name) for name in found.files}
        case never:
            assert_never(never)


def _of_contrastive(url: str) -> TextModel:
    found = trained_encoders(url)
    spec = FrozenTextSpec(
        found.model.spec.text.width, found.model.spec.width, found.tokenizer.null_tokens
    )
    encoder = FrozenText(ContrastiveText(found.model), spec)
    return TextModel(lambda: encoder, spec, found.tokenizer, "contrastive", found.url, found.sha256)


def frozen_text_folder(path: str) -> TextFolder:
    """Look at the text encoder in a local folder, of transformers or of open_clip.

    A folder with the files of both is read as one of transformers. UnsupportedModelError.
    """
    folder = Path(path)
    if (folder / transformers_text.CONFIG).is_file():
        return text_folder(path)
    is_open_clip = (folder / open_clip_text.CONFIG).is_file()
    return open_clip_text.open_clip_folder(path) if is_open_clip else text_folder(path)


def _of_transformers(url: str, length: int) -> TextModel:
    found = frozen_text_folder(url)
    tokenizer = Tokenizer.read(str(found.path / TOKENIZER), length)
    if found.pad_token is not None:
        tokenizer = replace(tokenizer, pad=found.pad_token)
    end = tokenizer.end_token
    found.require_tokens(end, tokenizer.vocabulary, length)
    spec = FrozenTextSpec(found.width, found.pooled_width, tokenizer.null_tokens)

    def load() -> FrozenText:
        """Read the weights; in bfloat16 on GPUs."""
        return FrozenText(found.load(end), spec, torch.bfloat16)

    return TextModel(load, spec, tokenizer, "transformers", url, found.sha256())
