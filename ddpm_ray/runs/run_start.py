"""Start of a run's driver: claim the run, and find what it continues or begins from."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from ddpm_ray.assembly import data_order, initial_weights, run_config
from ddpm_ray.assembly.frozen_text import TextModel
from ddpm_ray.assembly.image_encoders import settled_embedding
from ddpm_ray.assembly.initial_weights import InitialWeights
from ddpm_ray.config.loading import ConfigError, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.dataset_codec import codec_of
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.runs import run_identity
from ddpm_ray.runs.run_identity import claim
from ddpm_ray.storage import object_store
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore

log = logging.getLogger(__name__)

ENCODER_KEYS = {"text_encoder": "text.model", "image_encoder": "embedding.encoder"}


@dataclasses.dataclass(frozen=True)
class RunStart:
    """Facts that a driver has of its run before the workers start."""

    identity: str
    step: int = 0  # of the newest checkpoint
    history: dict[str, Any] = dataclasses.field(default_factory=dict)  # see run_config.run_history
    initial_weights: InitialWeights | None = None  # of a run without a checkpoint


def settled_config(config: RunConfig, dataset: Dataset, folder: str) -> RunConfig:
    """`config` for the images of the data set, with lanes and shuffle window.

    These are those of the run in `folder`, or defaults for a new one. Warns if several workers read
    each shard. Raises ConfigError for a stored config that this version cannot read.
    """
    stored = stored_start(folder)
    if "config" in stored:
        config = data_order.continued(config, run_config.saved_config(stored))
    config = run_config.for_images(config, dataset.manifest.diffused_shape)
    config = data_order.settled(config, dataset.manifest.sample_bytes)
    for line in data_order.lane_warnings(config):
        log.warning("%s", line)
    return config


def settled_run(
    config: RunConfig, dataset: Dataset, folder: str
) -> tuple[RunConfig, dict[str, Any]]:
    """Return `settled_config`, and the facts of `settled_embedding`."""
    settled = settled_config(config, dataset, folder)
    return settled_embedding(settled, dataset, stored_start(folder))


def stored_start(folder: str) -> dict[str, Any]:
    """The identity of the run in `folder` or, if that is lost, the facts of its checkpoint.

    Empty for a new run.
    """
    if stored := run_identity.stored_identity(folder):
        return stored
    found = CheckpointStore(object_store.join(folder, CHECKPOINTS)).load(groups=())
    return found[1].facts if found else {}


def begin_run(
    config: RunConfig,
    dataset: Dataset,
    folder: str,
    tokenizer: Tokenizer | None = None,
    encoder: Mapping[str, Any] | None = None,
    text_model: TextModel | None = None,
) -> RunStart:
    """Claim the run in `folder` and find what `config` continues or begins from.

    `tokenizer` is that of its texts, `encoder` the facts of its image encoder and embeddings,
    `text_model` a text encoder that is trained elsewhere. Raises ConfigError if another run is
    there, and the errors of `initial_weights.py` for a new run's weights.
    """
    shape = dataset.manifest.diffused_shape
    found = CheckpointStore(object_store.join(folder, CHECKPOINTS)).load(groups=())
    facts = found[1].facts if found else None

    def changed_keys(begun: dict[str, Any]) -> list[str]:
        """One line for each option that differs from the stored one and may not."""
        if "config" not in begun:
            return [f"name is {config.name!r}, which is the name of a sweep in this folder"]
        return run_config.changed_keys(config, begun if facts is None else facts, shape)

    begun = {"config": to_dict(config), "data_fingerprint": dataset.fingerprint}
    encoders = dict(encoder or {})
    if text_model is not None:
        encoders["text_encoder"] = text_model.facts()
    begun |= encoders
    if facts is not None:
        identity = claim(folder, begun, changed_keys)
        made = run_config.run_changes(config, facts, shape)
        for one in made[len(facts.get("changes", [])) :]:
            log.info("change: %s", run_config.changes_text([one]))
        return RunStart(identity, facts["step"], run_config.run_history(facts | {"changes": made}))
    if not config.training.init_from:
        identity = claim(folder, begun, changed_keys)
        _require_agreement(folder, encoders)
        return RunStart(identity)
    known = run_identity.stored_identity(folder).get("init_from")
    source = (
        InitialWeights(**known) if known else initial_weights.find_initial_weights(config.training)
    )
    of_images = encoders.get("image_encoder", {}).get("sha256", "")
    initial_weights.check_initial_weights(
        source, config, shape, codec_of(dataset.manifest), tokenizer, text_model, of_images
    )
    identity = claim(folder, begun | {"init_from": vars(source)}, changed_keys)
    _require_agreement(folder, encoders)
    # Of drivers that start at once, the first one's choice counts; another may have found a later
    # checkpoint.
    source = InitialWeights(**run_identity.stored_identity(folder)["init_from"])
    return RunStart(identity, 0, {"init_from": vars(source)}, source)


def _require_agreement(folder: str, encoders: Mapping[str, Any]) -> None:
    """Raise ConfigError if another driver that started at once found another encoder.

    The run that trains it may have committed a checkpoint in between.
    """
    stored = run_identity.stored_identity(folder)
    for key, option in ENCODER_KEYS.items():
        mine = encoders.get(key)
        if mine and key in stored and stored[key]["sha256"] != mine["sha256"]:
            raise ConfigError(
                f"{option}: {mine['url']} is not the checkpoint that another driver "
                f"found when it started this run at once: run the same command again"
            )
