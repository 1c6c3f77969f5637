"""Copies of trained models that load on any machine: checkpoint and frozen encoders in a folder."""

import shutil
from pathlib import Path

from ddpm_ray.assembly import frozen_text, image_encoders, latents
from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import read_checkpoint, sampling_files


def copy_model(checkpoint_url: str, folder: Path) -> list[str]:
    """Copy what sampling reads of a checkpoint to the local `folder`; return what is missing there.

    A model of latents is copied with its autoencoder, one of image embeddings with their encoder,
    one of texts with a text encoder that is trained elsewhere. An encoder that has moved or changed
    is not copied: a line says so, and what the copy cannot do. Raises CheckpointError and
    StorageError.
    """
    for name in sampling_files(checkpoint_url):
        data = object_store.read_bytes(object_store.join(checkpoint_url, name))
        object_store.write_bytes(str(folder / name), data)
    facts = read_checkpoint(str(folder), groups=()).facts
    missing = []
    for copy, name, use in (
        (latents.copy_autoencoder, latents.AUTOENCODER_COPY, "load it with autoencoder=URL"),
        (image_encoders.copy_image_encoder, image_encoders.ENCODER_COPY, "it makes no variations"),
        (frozen_text.copy_text_model, frozen_text.TEXT_ENCODER_COPY, "load it with text_model=URL"),
    ):
        try:
            copy(facts, folder, checkpoint_url)
        except (ValueError, StorageError) as error:
            shutil.rmtree(folder / name, ignore_errors=True)
            missing.append(f"{sanitize(str(error))}. The copy is without it: {use}")
    return missing
