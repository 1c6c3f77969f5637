"""Checks that need no Ray: packages, storage, MLflow.

Without torch and MLflow, so that the doctor starts quickly.
"""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import platform
import sqlite3
import ssl
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ddpm_ray.config.jobs.doctor import DoctorConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.redaction import counted, redacted
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.tracking.tracking_uri import database_file, resolve_tracking_uri

PACKAGES = ("ddpm-ray", "ray", "torch", "mlflow", "numpy", "pyarrow", "fsspec")
MISSING = "none"
ANSWER_S = 5.0  # time-out of an HTTP request
INSTALL = "pip install --constraint constraints.txt ."
SET_CLOCK = "let chrony or ntp set the clocks (`chronyc tracking` shows how far one is off)"


@dataclass(frozen=True)
class Finding:
    """One line of the report: check, verdict, what was found, and the remedy."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Clock:
    """Offset of another clock from this machine's, in seconds, as far as it can be measured."""

    place: str
    ahead_s: float


def clock(place: str, shown: float, before: float, after: float, resolution_s: float = 0) -> Clock:
    """Compare a clock that showed `shown`, rounded down, at a time between `before` and `after`."""
    return Clock(place, max(0.0, shown - after) - max(0.0, before - shown - resolution_s))


def versions() -> dict[str, str]:
    """Versions of Python and the packages that must be equal on all nodes, without `+cpu` etc."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = MISSING
    return found


def packages() -> Iterator[Finding]:
    """Compare the installed packages with the requirements of ddpm-ray."""
    found = versions()
    if found["ddpm-ray"] == MISSING:
        remedy = f"{sys.executable} -m {INSTALL}"
        yield Finding("packages", "fail", f"{sys.executable} has no ddpm-ray", remedy)
        return
    wanted = {one.name: one.specifier for one in map(Requirement, requires("ddpm-ray") or [])}
    wanted["python"] = SpecifierSet(metadata("ddpm-ray")["Requires-Python"])
    wrong = [
        f"{name} {found[name]}, needs {wanted[name]}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] == MISSING or not wanted[name].contains(found[name], prereleases=True)
    ]
    shown = ", ".join(f"{name} {number}" for name, number in found.items())
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), f"{sys.executable} -m {INSTALL}")
    else:
        yield Finding("packages", "ok", shown)


def storage_keeps(config: DoctorConfig, home: Path) -> Iterator[Finding | Clock]:
    """Write, read back, compare and delete a small object in the storage."""
    url = object_store.absolute(config.storage, home)
    local, test_object = (
        object_store.is_local(url),
        object_store.join(url, f"doctor-{uuid.uuid4().hex[:12]}"),
    )
    made = local and not object_store.local_path(url).exists()
    place = url
    if url.startswith("s3") and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        place += f" at {redacted(endpoint)}"
    data, before = os.urandom(4096), time.time()
    aside: list[Finding] = []
    try:
        try:
            object_store.write_bytes(test_object, data)
            after = time.time()
            back = object_store.read_bytes(test_object)
            if not local:
                yield clock(
                    "bucket", object_store.modified_s(test_object), before, after, resolution_s=1
                )
            aside.append(_conditional_put(f"{test_object}.new"))
        finally:
            object_store.delete(test_object)
            if made:
                object_store.delete_empty_folder(url)
    except StorageError as error:
        _, reason, remedy = error.args
        remedy = SET_CLOCK if "TimeTooSkewed" in reason else remedy
        yield Finding("storage", "fail", f"{place}: {reason}", remedy)
        return
    if hashlib.sha256(back).digest() != hashlib.sha256(data).digest():
        remedy = "use another storage: this one alters data"
        yield Finding("storage", "fail", f"{place}: returns other bytes than were written", remedy)
    elif local and _joins_a_cluster(config):
        found = f"{place}: works, but is a folder of this machine only"
        remedy = "give a bucket, as in storage=s3://bucket/runs, or a folder that all nodes mount"
        yield Finding("storage", "warn", found, remedy)
    else:
        yield Finding("storage", "ok", f"{place}: written, read back, deleted")
    yield from aside


def mlflow_answers(config: DoctorConfig, home: Path) -> Iterator[Finding | Clock]:
    """Check that MLflow answers this user; writes nothing."""
    try:
        uri = resolve_tracking_uri(home, config.tracking_uri)
    except ConfigError as error:  # a run would fail with it
        what, _, remedy = str(error).partition(": ")
        yield Finding("MLflow", "fail", what, remedy)
        return
    shown = redacted(uri)
    if uri.startswith(("http://", "https://")):
        yield from _server(uri.rstrip("/"), shown)
    elif file := database_file(uri):
        finding = _database(file)
        if finding.verdict == "ok" and _joins_a_cluster(config):
            found = f"{finding.found}, but on this machine only"
            remedy = "start a server that all nodes reach and give tracking_uri=http://..."
            finding = Finding("MLflow", "warn", found, remedy)
        yield finding
    else:
        remedy = "give an http(s):// server or a sqlite:/// file; no other kind is checked"
        yield Finding("MLflow", "warn", f"{shown}: not checked", remedy)


def _joins_a_cluster(config: DoctorConfig) -> bool:
    return bool(config.address or os.environ.get("RAY_ADDRESS"))


def _conditional_put(name: str) -> Finding:
    """Create an object twice by conditional writes, and delete it, as each start of a run does.

    Most servers ignore the condition, which costs nothing; one that refuses it takes no run. The
    name is new, because where there is a file a folder without hard links answers "exists".
    """
    try:
        object_store.write_new_bytes(name, b"first")
        kept = not object_store.write_new_bytes(name, b"second")
    except StorageError as error:
        found = f"refused ({error.args[1]}), and each start of a run needs one"
        remedy = "use another storage: one that creates new objects, with or without the condition"
        return Finding("conditional put", "fail", found, remedy)
    finally:
        object_store.delete(name)
    found = "honoured" if kept else "ignored by this store; ddpm-ray does not need it"
    return Finding("conditional put", "ok", found)


def _server(uri: str, shown: str) -> Iterator[Finding | Clock]:
    before = time.time()
    try:
        headers, _ = _call(uri, "/api/2.0/mlflow/experiments/search?max_results=1")
    except urllib.error.HTTPError as error:
        remedy = "check that this is an MLflow server: its address, a proxy before it, its log"
        if error.code in (401, 403):
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        yield Finding("MLflow", "fail", f"{shown}: {error.code} {error.reason}", remedy)
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        remedy = "start it, or correct tracking_uri (or $MLFLOW_TRACKING_URI)"
        yield Finding("MLflow", "fail", f"{shown}: no answer ({reason})", remedy)
        return
    if headers["Date"]:
        date = parsedate_to_datetime(headers["Date"]).timestamp()
        yield clock("MLflow", date, before, time.time(), resolution_s=1)
    theirs = "of unknown version"
    with contextlib.suppress(OSError):
        theirs = _call(uri, "/version")[1].decode(errors="replace").strip()
    mine = versions()["mlflow"]
    if theirs[:1].isdigit() and theirs.partition(".")[0] != mine.partition(".")[0]:
        found = f"{shown}: server {theirs}, client {mine}"
        yield Finding("MLflow", "warn", found, f"run the server with mlflow {mine}")
    else:
        yield Finding("MLflow", "ok", f"{shown}: server {theirs} answers")


def _call(uri: str, path: str) -> tuple[Mapping[str, str], bytes]:
    """Send a request as MLflow's client does; return headers and body. An API body must be JSON."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    headers = {}
    if user:
        both = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {both}"
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    context = None
    if uri.startswith("https://"):
        context = ssl.create_default_context(
            cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None
        )
        if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS") == "true":
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = urllib.request.Request(uri + path, headers=headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S, context=context) as answer:
        body = answer.read(65536)
        if path.startswith("/api"):
            json.loads(body)
        return answer.headers, body


def _database(file: Path) -> Finding:
    """Check an SQLite file, or the folder in which it will be created."""
    if not file.exists():
        if file.parent.is_dir() and os.access(file.parent, os.W_OK):
            return Finding("MLflow", "ok", f"{file}: the first run will create it")
        remedy = "create the folder, or correct tracking_uri"
        return Finding(
            "MLflow", "fail", f"{file}: its folder does not exist or is read-only", remedy
        )
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=ANSWER_S)) as database:
            database.execute("BEGIN IMMEDIATE")  # takes the write lock; the rollback releases it
            runs = database.execute("SELECT count(*) FROM runs").fetchone()[0]
            database.rollback()
    except sqlite3.Error as error:
        remedy = "end the process that locks it, or name another file in tracking_uri"
        return Finding("MLflow", "fail", f"{file}: {error}", remedy)
    return Finding("MLflow", "ok", f"{file}: a writable database of {counted(runs, 'run')}")
