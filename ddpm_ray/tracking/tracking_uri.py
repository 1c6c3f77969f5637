"""Where a job's MLflow is: one absolute URI, resolved in the driver for all of its processes."""

import logging
import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from ddpm_ray.config.loading import ConfigError
from ddpm_ray.redaction import NO_SECRET, has_secret, redacted
from ddpm_ray.storage import object_store

log = logging.getLogger(__name__)

VARIABLE = "MLFLOW_TRACKING_URI"
SECRETS = "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
NAMES = "databricks", "databricks-uc", "uc"  # URIs of MLflow's that look like a folder's name
SCHEMES = "http", "https", "postgresql", "mysql", "mssql"  # but for those that have rules here
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?)://(.*)", re.DOTALL)


def tracking_place(home: Path, uri: str = "") -> str:
    """`uri`, or $MLFLOW_TRACKING_URI, or the database in `home`; relative ones lie below `home`.

    Ray's workers run in folders of their own, where a relative place would be another one. Raises
    ConfigError where the variable holds a password (runs save where they are tracked), or where
    only one process could see the place.
    """
    key = "tracking.uri"
    if not uri:
        key, uri = f"${VARIABLE}", os.environ.get(VARIABLE) or f"sqlite:///{home / 'mlflow.db'}"
    if has_secret(uri):
        raise ConfigError(f"{key} is {redacted(uri)}: {NO_SECRET}")
    if found := _SQLITE.fullmatch(uri):
        return f"{found[1]}:///{_database(key, uri, found[2], home)}"
    if uri.startswith("file:"):
        path = uri.removeprefix("file:")
        return uri if path.startswith("//") else f"file:{object_store.absolute(path, home)}"
    if uri in NAMES or uri.partition(":")[0] in NAMES:
        return uri
    _require_known_scheme(key, uri)
    return object_store.absolute(uri, home)


def _require_known_scheme(key: str, uri: str) -> None:
    """Raise ConfigError for a URI of a scheme that MLflow, with its plugins, does not know."""
    scheme, mark, _ = uri.partition("://")
    if not mark or scheme.partition("+")[0] in SCHEMES:
        return
    if scheme not in {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}:
        raise ConfigError(
            f"{key} is {uri!r}, and MLflow knows no {scheme}://; name a server (http://, https://),"
            f" a database (sqlite:///, postgresql://, mysql://, mssql://) or a folder"
        )


def database_file(uri: str) -> Path | None:
    """The file of the SQLite database at `uri`; None where `uri` is something else."""
    found = _SQLITE.fullmatch(uri)
    return Path(found[2].removeprefix("/").partition("?")[0]) if found else None


def warn_of_another_host(uri: str) -> None:
    """Warn where the environment's MLflow password would go to a host that it does not name.

    A config that somebody else wrote may name a server of theirs.
    """
    known = urlsplit(os.environ.get(VARIABLE, "")).hostname
    host = urlsplit(uri).hostname if uri.startswith("http") else None
    secrets = [name for name in SECRETS if os.environ.get(name)]
    if secrets and known and host and host != known:
        log.warning(
            "tracking.uri names the host %s, and $%s names %s: $%s is sent to %s",
            host, VARIABLE, known, secrets[0], host,
        )  # fmt: skip


def _database(key: str, uri: str, rest: str, home: Path) -> str:
    """The absolute path, with its query, of `sqlite://{rest}`."""
    path, mark, query = rest.partition("?")
    if path and not path.startswith("/"):
        raise ConfigError(f"{key} is {uri!r}; a database file has three slashes: sqlite:///{rest}")
    path = path[1:]
    if not path or ":memory:" in path or "mode=memory" in query:
        remedy = "each process would see its own; name a file: sqlite:///mlflow.db"
        raise ConfigError(f"{key} is {uri!r}, a database in memory; {remedy}")
    scheme = "file:" if path.startswith("file:") else ""  # SQLite's own URIs: `uri=true` in query
    return scheme + object_store.absolute(path.removeprefix(scheme), home) + mark + query
