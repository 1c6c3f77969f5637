"""The tokenizer of a run: trained on its captions or taken from a file, and kept in its folder.

<run>/tokenizer.json    written at the first start, before any checkpoint
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ddpm_ray.assembly.frozen_text import TextModel, text_facts
from ddpm_ray.assembly.prompts import held_out_prompts
from ddpm_ray.config.jobs.tokenize_captions import TokenizeConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.text import TextConfig
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.data.loader import read_captions
from ddpm_ray.data.tokenizer import Tokenizer, warn_of_cut_prompts, warn_of_cuts
from ddpm_ray.redaction import counted
from ddpm_ray.runs.scored_captions import require_scored_captions
from ddpm_ray.storage import object_store

log = logging.getLogger(__name__)

FILE = "tokenizer.json"
PACK_CAPTIONS = "pack them with captions (docs/packing.md)"
SAMPLED_CAPTIONS = 10_000  # of which too long ones are counted
MOST_CAPTIONS = 1_000_000  # that a tokenizer is trained on: more change few of its tokens


def run_tokenizer(
    config: RunConfig, dataset: Dataset, folder: str, text_model: TextModel | None = None
) -> Tokenizer | None:
    """The tokenizer of the run in `folder`; None for a run without text.

    A new run gets that of `text_model`, its frozen text encoder, the one that `text.tokenizer`
    names, or one that is trained on the captions of `dataset`; it is a function of them, so drivers
    that start at once write the same file. Warns of prompts that it cuts and, at the first start,
    of captions. Raises ConfigError for a data set without captions and for a run that began with
    another tokenizer, DatasetError if its captions cannot be scored as the run is to,
    TokenizerError, StorageError.
    """
    if not config.takes_text:
        return None
    kept = object_store.join(folder, FILE)
    if not dataset.manifest.captions:
        raise ConfigError(
            f"text.encoder is {config.text.encoder}, but the images in {config.data.url} have no "
            f"captions: {PACK_CAPTIONS}, or set text.encoder=none"
        )
    given = _given(config.text, text_model)
    if object_store.exists(kept):
        found = Tokenizer.read(kept, given.length if given else config.text.length)
        if given is not None:  # the file does not say what fills rows
            found = replace(found, pad=given.pad)
        if given is not None and given.sha256 != found.sha256:
            named = f"text.tokenizer is {config.text.tokenizer}"
            if text_model is not None:
                named = f"text.model is {config.text.model}, whose tokenizer is"
            raise ConfigError(
                f"{named} of sha256 {given.sha256[:12]}, but the run began with "
                f"{found.sha256[:12]}: {'restore that one' if text_model else 'leave it out'}, or "
                f"start a run with another name="
            )
        warn_of_cut_prompts(found, config.sampling.prompts)
        require_scored_captions(config, dataset, found)
        return found
    if given is None:
        given = Tokenizer.trained(_captions(dataset), config.text.vocabulary, config.text.length)
        log.info(
            "tokenizer of %s trained on the captions of %s",
            counted(given.vocabulary, "token"),
            config.data.url,
        )
    _warn_of_cut_captions(given, dataset)
    warn_of_cut_prompts(given, config.sampling.prompts)
    require_scored_captions(config, dataset, given)  # a run that cannot be scored leaves no file
    object_store.write_bytes(kept, given.json.encode())
    return given


def _given(config: TextConfig, text_model: TextModel | None) -> Tokenizer | None:
    """The tokenizer that the options name; None: it is trained on the captions."""
    if text_model is not None:
        return text_model.tokenizer
    return Tokenizer.read(config.tokenizer, config.length) if config.tokenizer else None


def text_settings(
    config: RunConfig,
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    text_model: TextModel | None = None,
) -> dict[str, Any]:
    """Return what workers know of texts: facts on tokenizer and frozen text encoder, and prompts.

    The prompts are those that the data lacks.

    The driver looks for those prompts, as it may read all shards: the workers would wait for one of
    them, until their collectives time out. A run that draws no grids does not look. StorageError.
    """
    draws = config.traits.draws_images and config.training.grid_every_steps > 0
    asked = config.sampling.prompts if draws else ()
    return {
        "tokenizer": text_facts(tokenizer, text_model),
        "held_out_prompts": sorted(held_out_prompts(asked, dataset)),
    }


def write_tokenizer(url: str, config: TokenizeConfig, file: str) -> dict[str, Any]:
    """Train a tokenizer on the captions of the data set at `url`, as a run does, and write `file`.

    Returns what identifies it, and how many of the first captions it cuts. Raises ConfigError for a
    set without captions, DatasetError, TokenizerError, StorageError.
    """
    dataset = open_dataset(url)
    if not dataset.manifest.captions:
        raise ConfigError(f"data is {url}, whose images have no captions: {PACK_CAPTIONS}")
    made = Tokenizer.trained(_captions(dataset), config.vocabulary, config.length)
    looked_at, cut = _warn_of_cut_captions(made, dataset)
    object_store.write_bytes(file, made.json.encode())
    return {
        "tokenizer": file,
        "tokens": made.vocabulary,
        "sha256": made.sha256,
        "data_fingerprint": dataset.fingerprint,
        "captions": dataset.manifest.captions,
        "captions_looked_at": looked_at,
        "captions_cut": cut,
    }


def _warn_of_cut_captions(tokenizer: Tokenizer, dataset: Dataset) -> tuple[int, int]:
    """The numbers of first captions and of those that are cut; logs a warning of these."""
    captions = list(islice(_captions(dataset), SAMPLED_CAPTIONS))
    which = f"the first {counted(len(captions), 'caption')}"
    return len(captions), warn_of_cuts(tokenizer, captions, which)


def _captions(dataset: Dataset) -> Iterator[str]:
    """Yield the captions of the first shards, up to MOST_CAPTIONS and the end of a shard."""
    seen = 0
    for number in range(len(dataset.counts)):
        if seen >= MOST_CAPTIONS:
            log.info("the tokenizer is trained on the first %s", counted(seen, "caption"))
            return
        for texts in read_captions(dataset, [number]):
            seen += len(texts)
            yield from texts
