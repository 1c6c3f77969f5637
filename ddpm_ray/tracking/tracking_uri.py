"""The MLflow tracking URI of a job: resolved once, by the driver, for all its processes."""

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
NAMES = "databricks", "databricks-uc", "uc"  # MLflow URIs without a scheme
SCHEMES = "http", "https", "postgresql", "mysql", "mssql"  # sqlite and file are handled below
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?)://(.*)", re.DOTALL)


def resolve_tracking_uri(home: Path, uri: str = "") -> str:
    """Return `uri`, else $MLFLOW_TRACKING_URI, else the database in `home`, as an absolute URI.

    Relative paths are below `home`: Ray's workers run in other folders. Raises ConfigError where
    the URI has a password, because runs save it, or where other processes could not open it.
    """
    key = source_of(uri)
    if not uri:
        uri = os.environ.get(VARIABLE) or f"sqlite:///{home / 'mlflow.db'}"
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


def source_of(uri: str) -> str:
    """Return what defines the tracking URI of a job whose option tracking.uri is `uri`."""
    if uri:
        return "tracking.uri"
    return f"${VARIABLE}" if os.environ.get(VARIABLE) else "the default of tracking.uri"


def _require_known_scheme(key: str, uri: str) -> None:
    """Raise ConfigError for a scheme that neither MLflow nor a plugin supports."""
    scheme, mark, _ = uri.partition("://")
    if not mark or scheme.partition("+")[0] in SCHEMES:
        return
    if scheme not in {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}:
        raise ConfigError(
            f"{key} is {uri!r}, and MLflow does not support {scheme}://; name a server (http://, https://),"
            f" a database (sqlite:///, postgresql://, mysql://, mssql://) or a folder"
        )


def database_file(uri: str) -> Path | None:
    """Return the file of the SQLite database at `uri`; None for other URIs."""
    found = _SQLITE.fullmatch(uri)
    return Path(found[2].removeprefix("/").partition("?")[0]) if found else None


def require_database_folder(uri: str, source: str) -> None:
    """Make the folder of an SQLite database; ConfigError, which names the `source`, if that fails.

    `source` is the `source_of` of the resolved URI. MLflow would try to open the database again
    and again, for two minutes.
    """
    file = database_file(uri)
    try:
        if file is not None and not str(file).startswith("file:"):
            file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{source} is {redacted(uri)}, and the folder of that database cannot be made "
            f"({error.strerror}): name another place"
        ) from error


def warn_of_another_host(uri: str) -> None:
    """Warn if the environment's MLflow password would be sent to a host it does not name.

    The config may come from somebody else, and name their server.
    """
    known = urlsplit(os.environ.get(VARIABLE, "")).hostname
    host = urlsplit(uri).hostname if uri.startswith("http") else None
    secrets = [name for name in SECRETS if os.environ.get(name)]
    if secrets and known and host and host != known:
        log.warning(
            "tracking.uri names the host %s, and $%s names %s: $%s is sent to %s",
            host,
            VARIABLE,
            known,
            secrets[0],
            host,
        )


def way_to_see(uri: str, page: str) -> str:
    """Return the command or URL that shows `page` of the MLflow at `uri`."""
    if uri.startswith("http"):
        return uri.rstrip("/") + page
    command = f"mlflow ui --backend-store-uri {uri}"
    return f"make ui   (elsewhere: {command}), then http://127.0.0.1:5000{page}"


def _database(key: str, uri: str, rest: str, home: Path) -> str:
    """Return the absolute path, with its query, of `sqlite://{rest}`."""
    path, mark, query = rest.partition("?")
    if path and not path.startswith("/"):
        raise ConfigError(f"{key} is {uri!r}; a database file has three slashes: sqlite:///{rest}")
    path = path[1:]
    if not path or ":memory:" in path or "mode=memory" in query:
        remedy = "each process would see its own; name a file: sqlite:///mlflow.db"
        raise ConfigError(f"{key} is {uri!r}, a database in memory; {remedy}")
    scheme = "file:" if path.startswith("file:") else ""  # SQLite's own URIs: `uri=true` in query
    return scheme + object_store.absolute(path.removeprefix(scheme), home) + mark + query


def artifact_root(tracking_uri: str) -> str | None:
    """Artifact folder of a new experiment: next to a database; None: the server decides."""
    file = database_file(tracking_uri)
    return None if file is None else str(file.parent / "mlartifacts")
