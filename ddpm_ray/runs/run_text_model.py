"""The text encoder of a run that is trained elsewhere, the same at each start."""

from typing import Any, NamedTuple

from ddpm_ray.assembly.frozen_text import NOT_FOUND, TextModel, text_model
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.text import FrozenTextKind
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.redaction import sanitize
from ddpm_ray.runs.run_start import stored_start
from ddpm_ray.runs.run_tokenizer import run_tokenizer, text_settings
from ddpm_ray.storage.errors import StorageError


class RunTexts(NamedTuple):
    """Tokenizer and frozen text encoder of a run, as its driver finds them."""

    tokenizer: Tokenizer | None  # None: the run has no text
    model: TextModel | None  # its text encoder, if that is trained elsewhere
    settings: dict[str, Any]  # of its workers


def run_texts(config: RunConfig, dataset: Dataset, folder: str) -> RunTexts:
    """Find frozen text encoder and tokenizer of the run in `folder`; raises what both do."""
    model = run_text_model(config, folder)
    tokenizer = run_tokenizer(config, dataset, folder, model)
    return RunTexts(tokenizer, model, text_settings(config, dataset, tokenizer, model))


def run_text_model(config: RunConfig, folder: str) -> TextModel | None:
    """The frozen text encoder of the run in `folder`, found but not loaded; None: it has none.

    A new run has the one that text.model names: of a run, that of its newest checkpoint. A
    continued run has that same checkpoint, even if its run went on, and looks for an equal one in
    text.model if it is gone or text.model names another place. Raises ConfigError if there is none.
    """
    kind, url, length = config.text.frozen, config.text.model, config.text.length
    if kind is None:
        return None
    stored = stored_start(folder)
    held = stored.get("text_encoder")
    if held is None:
        return _named(kind, url, length)
    if stored["config"]["text"].get("model") == url:
        try:
            found = text_model(kind, held["url"], length)
        except (*NOT_FOUND, StorageError):
            pass  # it was deleted, or is not readable
        else:
            if found.sha256 == held["sha256"]:
                return found
    found = _named(kind, url, length)
    if found.sha256 != held["sha256"]:
        raise ConfigError(
            f"text.model is {sanitize(url)}, whose text encoder has sha256 {found.sha256[:12]}, "
            f"but the run began with {held['sha256'][:12]}: name the place of that one, or start a "
            f"run with another name="
        )
    return found


def _named(kind: FrozenTextKind, url: str, length: int) -> TextModel:
    """The text encoder that text.model names; raises ConfigError."""
    try:
        return text_model(kind, url, length)
    except NOT_FOUND as error:
        raise ConfigError(f"text.model: {error}") from error
