"""Where MLflow is, is one absolute place for all processes of a job, whatever was written."""

import logging
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service.utils import _tracking_store_registry

from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.runs.absolute_paths import with_absolute_paths
from ddpm_ray.tracking import tracking_uri as tracking_place_module
from ddpm_ray.tracking.tracking_uri import (
    NAMES,
    SCHEMES,
    artifact_root,
    database_file,
    require_database_folder,
    resolve_tracking_uri,
    source_of,
    warn_of_another_host,
)
from tests.limits import ENDS_S

HOME = Path("/the/home")


@pytest.mark.parametrize(
    "written, meant",
    [
        ("sqlite:///my.db", "sqlite:////the/home/my.db"),
        ("sqlite:///./a/../my.db", "sqlite:////the/home/my.db"),
        ("sqlite:///~/my.db", "sqlite:////users/me/my.db"),
        ("sqlite:////abs/my.db", "sqlite:////abs/my.db"),
        ("sqlite:///my.db?timeout=30", "sqlite:////the/home/my.db?timeout=30"),
        ("sqlite:///file:my.db?uri=true", "sqlite:///file:/the/home/my.db?uri=true"),
        ("sqlite+pysqlite:///my.db", "sqlite+pysqlite:////the/home/my.db"),
        ("mlruns", "/the/home/mlruns"),
        ("~/mlruns", "/users/me/mlruns"),
        ("file:mlruns", "file:/the/home/mlruns"),
        ("file:///abs/mlruns", "file:///abs/mlruns"),
        ("http://host:5000/path", "http://host:5000/path"),
        ("postgresql+psycopg2://host/mlflow", "postgresql+psycopg2://host/mlflow"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
        ("uc:http://host", "uc:http://host"),
    ],
)
@pytest.mark.parametrize("by", ["config", "variable"])
def test_a_relative_place_lies_below_home(
    written: str, meant: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set in the config or the environment; what was resolved once stays as it is."""
    monkeypatch.setenv("HOME", "/users/me")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", written if by == "variable" else "http://other")
    place = resolve_tracking_uri(HOME, written if by == "config" else "")
    assert place == meant
    assert resolve_tracking_uri(Path("/elsewhere"), place) == meant


@pytest.mark.parametrize("by", ["tracking.uri", "$MLFLOW_TRACKING_URI"])
def test_a_scheme_that_mlflow_does_not_know_is_refused(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On commit d926ba0 MLflow's own list was cut off, and the remedy "correct tracking.*"."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://x")
    says = re.escape(
        f"{by} is 'htp://x', and MLflow does not support htp://; name a server (http://, "
    )
    with pytest.raises(ConfigError, match=says):
        resolve_tracking_uri(HOME, "htp://x" if by == "tracking.uri" else "")


def test_the_schemes_are_those_of_mlflow_and_its_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {*SCHEMES, *NAMES, "", "file", "sqlite"}
    assert known == set(_tracking_store_registry._registry)
    plugin = EntryPoint("ours", "a_package:store", "mlflow.tracking_store")
    monkeypatch.setattr(tracking_place_module, "entry_points", lambda group: (plugin,))
    assert resolve_tracking_uri(HOME, "ours://x") == "ours://x"


def test_the_run_s_config_holds_the_absolute_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the workers read, and experiments keep their files beside the database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for given in ([], ["tracking.uri=sqlite:///mlflow.db"]):
        config = load_config(RunConfig, None, ["name=a", "data.url=b", *given])
        config = with_absolute_paths(config, HOME)
        assert config.tracking.uri == "sqlite:////the/home/mlflow.db"
        assert artifact_root(config.tracking.uri) == "/the/home/mlartifacts"
    assert artifact_root("http://host") is None
    assert database_file("sqlite:////a/b.db?timeout=3") == Path("/a/b.db")


@pytest.mark.parametrize(
    "uri, said",
    [
        ("sqlite://my.db", "three slashes: sqlite:///my.db"),
        ("sqlite://", "a database in memory; .* sqlite:///mlflow.db"),
        ("sqlite:///:memory:", "a database in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "a database in memory"),
    ],
)
def test_a_place_that_workers_cannot_see_is_refused(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tracking\.uri is .*{said}"):
        resolve_tracking_uri(HOME, uri)


@pytest.mark.parametrize(
    "uri, variable, password, warns",
    [
        ("http://theirs:5000", "http://ours:5000", "hush", True),
        ("http://ours:5001", "http://ours:5000", "hush", False),
        ("http://theirs:5000", "http://ours:5000", "", False),
        ("http://theirs:5000", "", "hush", False),
        ("sqlite:////a/b.db", "http://ours:5000", "hush", False),
    ],
)
def test_a_password_for_another_host_is_reported(
    uri: str,
    variable: str,
    password: str,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A config names its own server, and the environment's password would be sent there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    warn_of_another_host(uri)
    assert ("$MLFLOW_TRACKING_PASSWORD is sent to theirs" in caplog.text) is warns
    assert "hush" not in caplog.text
    assert len(caplog.records) == warns


def test_a_notebook_keeps_its_own_settings_of_mlflow() -> None:
    """Loading a model neither sets MLflow's variables nor silences its loggers; a job does."""
    code = """
import logging, os
import ddpm_ray.runs.load_model, ddpm_ray.tracking.mlflow_runs
import ddpm_ray.tracking.model_registry
print(sorted(key for key in os.environ if key.startswith("MLFLOW_")))
print(logging.getLogger("urllib3").level)
from ddpm_ray.tracking import mlflow_settings
mlflow_settings.apply()
print(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"], logging.getLogger("urllib3").level)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment | {"DO_NOT_TRACK": "true"},
        capture_output=True,
        text=True,
        check=True,
        timeout=ENDS_S,
    )
    lines = done.stdout.splitlines()
    assert lines == ["[]", str(logging.NOTSET), f"10 {logging.ERROR}"]


def test_the_folder_of_a_database_is_made_or_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow tries for two minutes to open a database whose folder does not exist."""
    require_database_folder(f"sqlite:///{tmp_path}/new/folder/mlflow.db", "tracking.uri")
    assert (tmp_path / "new/folder").is_dir()
    require_database_folder("http://mlflow.example.com", "tracking.uri")
    (tmp_path / "file").touch()
    place = f"sqlite:///{tmp_path}/file/below/mlflow.db"
    for option, variable, says in (
        (place, "http://other", "tracking.uri"),
        ("", place, r"\$MLFLOW_TRACKING_URI"),
        ("", "", "the default of tracking.uri"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
        uri = resolve_tracking_uri(tmp_path / "file/below", option)
        with pytest.raises(ConfigError, match=rf"^{says} is {place}, and the folder of that data"):
            require_database_folder(uri, source_of(option))
