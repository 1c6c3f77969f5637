"""Copies of the encoders that a model needs, in the folder of its own copy in MLflow."""

from collections.abc import Mapping
from pathlib import Path

from ddpm_ray.storage import object_store


def copy_files(files: Mapping[str, str], folder: Path) -> str:
    """Copy the objects at the URLs `files` to `folder`, by their names there; return its path.

    Raises StorageError.
    """
    for name, source in files.items():
        object_store.write_bytes(str(folder / name), object_store.read_bytes(source))
    return str(folder)


def copy_in(where: str, name: str) -> str:
    """The URL of the copy `name` in the folder of a checkpoint at `where`; empty if it has none.

    Copies are in models of MLflow and in cascades with copies (portable_models.py). Raises
    StorageError.
    """
    if not where or where.startswith(("http://", "https://")):  # which have no folders
        return ""
    place = object_store.join(where, name)
    return place if object_store.exists(place) and object_store.file_names(place) else ""
