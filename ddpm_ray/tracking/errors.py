"""Errors of MLflow, its libraries and the network as one line with a remedy."""

import contextlib
import re
from collections.abc import Iterator

from ddpm_ray.redaction import brief, sanitize

# Libraries whose exceptions a call to MLflow may raise.
LIBRARIES = {
    "mlflow",
    "sqlalchemy",
    "alembic",
    "sqlite3",
    "psycopg2",
    "requests",
    "urllib3",
    "botocore",
    "boto3",
    "google",
    "azure",
}
DRIVERS = {  # remedies where SQLAlchemy's driver of a database is not installed
    "psycopg": "pip install psycopg2-binary, and write the URI as postgresql+psycopg2://...",
    "psycopg2": "pip install psycopg2-binary",
    "MySQLdb": "pip install mysqlclient, or pymysql with a URI as mysql+pymysql://...",
}
PASSING = "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"
_DELETED = re.compile(r"(run|experiment) '?(\w+)'? must be in the 'active' state", re.IGNORECASE)
_STATUS = re.compile(r"(?:error code|too many|status code:?) (\d{3})\b|^(\d{3}) (?:Client|Server)")
_NO_ALIAS = re.compile(r"model alias .* not found")
_NOT_MLFLOW = re.compile(
    r"not in a valid JSON format|Response body: '\s*<|error code 40[45]\b|^\w+: Response: \{"
    r"|Method Not Allowed|BadStatusLine|Failed to parse|not an MLflow answer"
)
_REFUSED_FILES = re.compile(
    r"credentials|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|NoSuchBucket|Forbidden"
)
_SILENT = re.compile(
    r"timed? ?out|timeout|connection|Max retries|resolve|refused|unreachable|EndpointConnection"
    r"|RemoteDisconnected|no complete answer",
    re.IGNORECASE,
)


class TrackingError(RuntimeError):
    """A failed call to MLflow; args are (location, reason, remedy)."""

    def __str__(self) -> str:
        location, reason, remedy = self.args
        return sanitize(f"{location}: {reason}; {remedy}")


class TrackingOutageError(TrackingError):
    """A server that does not answer; a later call may succeed."""


class TrackingServerError(TrackingOutageError):
    """A server that answers with an internal error, which may be transient or permanent."""


def restore(kind: str, identifier: str, uri: str) -> str:
    """Return the command that restores a deleted run or experiment."""
    option = "--run-id" if kind == "run" else "--experiment-id"
    return f"MLFLOW_TRACKING_URI={uri} mlflow {kind}s restore {option} {identifier}"


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Convert errors of MLflow, its libraries and the network into a TrackingError of one line."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in LIBRARIES and not isinstance(error, OSError | ImportError):
            raise
        raise tracking_error(uri, error) from error


def tracking_error(uri: str, error: Exception) -> TrackingError:
    """Classify an error of a call to the MLflow at `uri`: an outage, or a permanent error."""
    text = " ".join(str(error).split())
    code = str(getattr(error, "error_code", ""))
    status = _status(error, text)

    if isinstance(error, ImportError):
        name = (error.name or "?").partition(".")[0]
        remedy = DRIVERS.get(name, f"install {name}")
        return TrackingError(uri, f"the Python package {name} is not installed", remedy)
    if found := _DELETED.search(text):
        kind, identifier = found[1].lower(), found[2]
        remedy = f"restore it with `{restore(kind, identifier, uri)}`"
        if kind == "experiment":
            remedy += ", or set another tracking.experiment"
        return TrackingError(uri, f"the {kind} {identifier} was deleted in MLflow", remedy)
    if known := _permanent(uri, text, code, status):
        reason, remedy = known
        return TrackingError(uri, f"{reason} ({_cause(error)})", remedy)
    return _by_place(uri, error, text, code, status)


def _permanent(uri: str, text: str, code: str, status: int | None) -> tuple[str, str] | None:
    """Reason and remedy of an error that has one meaning, wherever it comes from."""
    if "Invalid Host header" in text:
        remedy = "start MLflow with --allowed-hosts and that name"
        return "MLflow refuses the host name in this address", remedy
    if status == 401 or code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
        return "MLflow does not accept this user or password (401)", remedy
    if status == 403 or code == "PERMISSION_DENIED":
        remedy = "give this user EDIT on the experiment, or name another tracking.experiment"
        return "MLflow forbids this to this user (403)", remedy
    if code == "RESOURCE_DOES_NOT_EXIST" or _NO_ALIAS.search(text):
        return "not found in MLflow", "check the run's id, or the model's name and alias"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        remedy = "set MLFLOW_TRACKING_SERVER_CERT_PATH to the file of its certificate authority"
        return "its TLS certificate is not trusted", remedy
    if "out-of-date database schema" in text or "locate revision" in text:
        remedy = f"back it up and run `mlflow db upgrade {uri}`, or use its version of MLflow"
        return "the database was created by another version of MLflow", remedy
    return None


def _by_place(
    uri: str, error: Exception, text: str, code: str, status: int | None
) -> TrackingError:
    """Classify errors that mean different things for server, database and artifact store."""
    if type(error).__module__.partition(".")[0] in ("botocore", "boto3"):
        location = f"{uri} (its artifact store)"
        if _REFUSED_FILES.search(text) or "Credentials" in type(error).__name__:
            remedy = "set the store's credentials for this process, or let MLflow serve artifacts"
            return TrackingError(location, f"it refuses files ({_cause(error)})", remedy)
        kind = TrackingOutageError if _SILENT.search(text) else TrackingServerError
        return kind(location, f"it does not accept files ({_cause(error)})", "retrying")
    http = uri.startswith("http")
    if http and _NOT_MLFLOW.search(text):
        remedy = "correct tracking.uri: host, port, and a path where a proxy has one"
        return TrackingError(
            uri, f"the server that answers is not MLflow ({_cause(error)})", remedy
        )
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return TrackingError(uri, f"MLflow refuses it ({_cause(error)})", "see MLflow's log")
    if status is not None and status not in (408, 429, 502, 503, 504):
        reason = f"MLflow answers with an internal error {status} ({_cause(error)})"
        return TrackingServerError(uri, reason, "see MLflow's log")
    passing = not code or code in PASSING
    if passing and (http or (_is_remote(uri) and _SILENT.search(text))):
        reason, remedy = "MLflow does not answer", "start it, or correct tracking.uri"
        return TrackingOutageError(uri, f"{reason} ({_cause(error)})", remedy)
    if passing and isinstance(error, OSError):
        remedy = "check path, permissions and free disk space, or correct tracking.uri"
        return TrackingError(uri, f"it cannot be written ({_cause(error)})", remedy)
    if passing:
        remedy = "check path, permissions and free disk space, or correct tracking.uri"
        return TrackingError(uri, f"MLflow's database cannot be used ({_cause(error)})", remedy)
    return TrackingError(uri, f"MLflow refuses it ({_cause(error)})", "correct tracking.*")


def _cause(error: Exception) -> str:
    """Return the innermost cause in one short line; requests quotes every layer above it."""
    text = " ".join(str(error).split())
    if found := re.search(r"\[Errno -?\d+\] [^'\")]+", text):
        return sanitize(found[0])
    quoted = re.findall(r"['\"]([^'\"]{4,})['\"]", text.partition("(Caused by ")[2])
    if quoted:  # the innermost error
        return sanitize(quoted[-1])
    return brief(error)


def _status(error: Exception, text: str) -> int | None:
    """Return the HTTP status of `error`; MLflow's own 500 stands only in its text."""
    response = getattr(error, "response", None)
    if isinstance(known := getattr(response, "status_code", None), int):
        return known
    found = _STATUS.search(text)
    return int(found[1] or found[2]) if found else None


def _is_remote(uri: str) -> bool:
    """Return whether `uri` is a database on a server."""
    return "://" in uri and not uri.startswith(("sqlite", "file"))
