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
    """The path of the copy `name` in a checkpoint's folder; empty if it has none.

    Copies are made for MLflow, whose models are downloaded: other folders have none.
    """
    if not where or not object_store.is_local(where):
        return ""
    place = object_store.local_path(where) / name
    return str(place) if place.is_dir() and any(place.iterdir()) else ""
