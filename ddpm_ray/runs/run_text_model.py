"""The text encoder of a run that is trained elsewhere, the same at each start."""

import logging
from functools import partial
from typing import Any, NamedTuple

from ddpm_ray.assembly.continued_encoder import encoder_of_run
from ddpm_ray.assembly.frozen_text import TextModel, text_model
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.redaction import sanitize
from ddpm_ray.runs.run_start import stored_start
from ddpm_ray.runs.run_tokenizer import run_tokenizer, text_settings

log = logging.getLogger(__name__)


class RunTexts(NamedTuple):
    """Tokenizer and frozen text encoder of a run, as its driver finds them."""

    tokenizer: Tokenizer | None  # None: the run has no text
    model: TextModel | None  # its text encoder, if that is trained elsewhere
    settings: dict[str, Any]  # of its workers


def run_texts(config: RunConfig, dataset: Dataset, folder: str) -> RunTexts:
    """Find frozen text encoder and tokenizer of the run in `folder`; raises what both do."""
    model = run_text_model(config, folder)
    embedded_by = dataset.manifest.encoder_sha256
    if model and embedded_by and model.kind == "contrastive" and model.sha256 != embedded_by:
        log.warning(
            "text.model is %s, of sha256 %s, but the embeddings of %s are of the encoder of "
            "sha256 %s: in its own space text and image are near each other; name that run",
            sanitize(config.text.model),
            model.sha256[:12],
            config.data.url,
            embedded_by[:12],
        )
    tokenizer = run_tokenizer(config, dataset, folder, model)
    return RunTexts(tokenizer, model, text_settings(config, dataset, tokenizer, model))


def run_text_model(config: RunConfig, folder: str) -> TextModel | None:
    """The frozen text encoder of the run in `folder`, found but not loaded; None: it has none.

    Raises what `encoder_of_run` does.
    """
    kind, length = config.text.frozen, config.text.length
    if kind is None:
        return None
    load = partial(text_model, kind, length=length)
    return encoder_of_run(
        "text.model", config.text.model, "text_encoder", stored_start(folder), load
    )
