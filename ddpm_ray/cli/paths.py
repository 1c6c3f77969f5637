"""Files and folders that a job reads and writes: checked before it works; no work is lost."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ddpm_ray.config.loading import ConfigError

MANIFEST = "manifest.json"  # of a data set: written last
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def home_folder() -> Path:
    """Base of relative paths: the working directory; $DDPM_RAY_HOME or ~/ddpm-ray if submitted.

    A submitted job runs in a copy of the working directory, which Ray deletes afterwards.
    """
    here = Path.cwd()
    if "working_dir_files" not in here.parts:
        return here
    home = Path(os.environ.get("DDPM_RAY_HOME", "~/ddpm-ray")).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    return home


def input_file(option: str, path: str, home: Path) -> str:
    """The path of a file that a submitted job brings along, or finds at `home`.

    Raises ConfigError, which names `option`, where there is none.
    """
    if Path(path).exists():
        return path
    if not (home / path).exists():
        raise ConfigError(f"{option} is {path}: there is no such file")
    return str(home / path)


def require_folder(option: str, url: str, remedy: str = "") -> str:
    """The absolute URL of a folder to be read; relative ones lie below `home_folder()`.

    Raises ConfigError, which names `option`, for a local one that does not exist or
    that this user may not read.
    """
    from ddpm_ray.storage import object_store  # fsspec: after the config is read

    where = object_store.absolute(url, home_folder())
    if not object_store.is_local(where):
        return where
    problem = "there is no such folder"
    try:
        if object_store.local_path(where).is_dir():
            return where
    except OSError as error:  # is_dir() raises those of a path that may exist
        problem = f"it cannot be read ({error.strerror})"
    hint = f"; {remedy}" if remedy else ""
    raise ConfigError(f"{option} is {where}: {problem}{hint}")


def output_file(option: str, path: str, home: Path, suffixes: Sequence[str]) -> str:
    """The absolute path of a file to be written; relative ones lie below `home`.

    Raises ConfigError, which names `option`, where no such file can be written there.
    """
    where = _local(option, path, home)
    if where.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} is {path}; end it in one of {', '.join(suffixes)}")
    if where.is_dir():
        raise ConfigError(f"{option} is {path}, which is a folder; name a file in it")
    _require_writable(option, path, where.parent)
    return str(where)


def output_folder(option: str, path: str, home: Path) -> str:
    """The absolute path of a folder to be written, likewise."""
    where = _local(option, path, home)
    _require_writable(option, path, where)
    return str(where)


def output_url(option: str, url: str, home: Path, *, data_set: bool = False) -> str:
    """The absolute URL of a folder to be written; a local one is checked as by `output_folder`.

    A complete `data_set` is not checked: it is not written again.
    """
    if "://" in url and not url.startswith("file://"):
        return url
    path = url.removeprefix("file://")
    if not path:
        raise ConfigError(f"{option} is empty; name a folder or URL")
    where = _local(option, path, home).resolve()
    if not (data_set and (where / MANIFEST).is_file()):
        output_folder(option, path, home)
    return str(where)


def new_folder(option: str, path: str, home: Path) -> str:
    """The absolute path of a folder to be written, likewise; it holds no file yet."""
    where = Path(output_folder(option, path, home))
    # Folders without a file do not count: a job that failed on a full disk may leave them.
    files = (one.relative_to(where) for one in where.rglob("*") if not one.is_dir())
    if held := sorted({file.parts[0] for file in files}):
        raise ConfigError(
            f"{option} is {path}, which holds {', '.join(held[:3])}: name a new folder"
        )
    return str(where)


def made_ready(*files: str) -> None:
    """Make the folders of these files, where they are missing; raises ConfigError."""
    for folder in (Path(file).parent for file in files if file):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from error


def _local(option: str, path: str, home: Path) -> Path:
    if "://" in path:
        raise ConfigError(f"{option} is {path}; it is written to this machine: name a local path")
    return home / Path(path).expanduser()


def _require_writable(option: str, path: str, folder: Path) -> None:
    """Raise ConfigError unless `folder`, or what is there of its parents, takes new files."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"{option} is {path}, but {there} is a file; name another folder")
    try:
        with tempfile.TemporaryFile(dir=there):  # root may write anywhere but in /proc and its kind
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} is {path}, but nothing can be written in {there} ({error.strerror}); name "
            f"another"
        ) from error
