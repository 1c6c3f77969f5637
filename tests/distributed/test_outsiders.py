"""What listens, as it is shipped, seen by somebody who should not get in."""

import ast
import base64
import contextlib
import http.client
import inspect
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import yaml

from tests.fixtures.mlflow_server import free_port
from tests.fixtures.postgres import postgres_database
from tests.limits import ENDS_S

ROOT = Path(__file__).parents[2]
SHIPPED = ["Makefile", "cluster.yaml", "rayjob.yaml", "rayservice.yaml"]
SHIPPED += ["docs/cluster.md", "docs/serving.md", "README.md"]
CALL = "/api/2.0/mlflow/experiments/search"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports


def outside() -> str:
    """An address of this machine that others could reach."""
    found = [
        one.address
        for interface in psutil.net_if_addrs().values()
        for one in interface
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    ]
    if not found:
        pytest.skip("this machine has no address but its loopback's")
    return str(found[0])


def commands(name: str) -> Iterator[str]:
    """Shell commands of a shipped file, each on one line, whatever it is folded into."""
    text = (ROOT / name).read_text()
    if name.endswith(".md"):
        blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
        text = "\n".join(block for kind, block in blocks if kind == "sh")
        for kind, block in blocks:
            if kind == "yaml":
                yield from of_yaml(yaml.safe_load(block))
    if name.endswith(".yaml"):
        yield from of_yaml(yaml.safe_load(text))
    else:
        yield from text.replace("\\\n", " ").splitlines()


def of_yaml(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from of_yaml(one)


def listeners(word: str) -> list[tuple[str, str]]:
    """File and command of each shipped one that has this text."""
    return [(name, line) for name in SHIPPED for line in commands(name) if word in line]


def option(command: str, name: str, default: str) -> str:
    found = re.search(rf"--{name}[= ](\S+)", command)
    return found[1] if found else default


def test_each_mlflow_server_is_at_loopback_or_asks_for_a_password() -> None:
    found = listeners("mlflow server") + listeners("mlflow ui")
    assert {name for name, _ in found} >= {"Makefile", "cluster.yaml", "docs/cluster.md"}
    for name, command in found:
        host = option(command, "host", "127.0.0.1")
        assert host == "127.0.0.1" or "--app-name basic-auth" in command, (name, command)


def test_each_ray_shows_its_dashboard_at_loopback_and_asks_for_a_token() -> None:
    heads = listeners("ray start --head")
    assert [name for name, _ in heads] == ["cluster.yaml", "docs/cluster.md", "docs/cluster.md"]
    for name, command in heads:
        assert option(command, "dashboard-host", "") == "127.0.0.1", (name, command)
    for name in ("cluster.yaml", "rayjob.yaml", "rayservice.yaml", "docs/cluster.md"):
        text = (ROOT / name).read_text()
        assert "RAY_AUTH_MODE=token" in text or re.search(r"authOptions:.*\n\s+mode: token", text)
    for name in SHIPPED:
        text = (ROOT / name).read_text()
        assert not re.search(r"RAY_AUTH_MODE\W+disabled|ray-client-server-port|NodePort", text)
        assert "LoadBalancer" not in text


def test_the_page_sets_the_token_before_each_ray_is_started() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    for block in re.findall(r"```(?:sh|yaml)\n(.*?)```", page, re.DOTALL):
        if "ray start" in block:
            assert block.index("RAY_AUTH_MODE=token") < block.index("ray start")


def test_a_local_ray_is_started_as_ray_itself_would_guard_it() -> None:
    """Its dashboard at loopback, and a token for all of its ports; nothing of ours changes that."""
    parameters = inspect.signature(ray.init).parameters
    assert parameters["dashboard_host"].default in ("127.0.0.1", "::1")
    script = (
        "import os; from ray._private.authentication import authentication_token_setup as setup\n"
        "assert setup.enable_token_auth_by_default(); print(os.environ['RAY_AUTH_MODE'])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "token\n", done.stderr
    assert "enable_token_auth_by_default()" in inspect.getsource(ray.init)
    for path in (ROOT / "ddpm_ray").rglob("*.py"):
        assert not re.search(r"RAY_AUTH_MODE.*disabled", path.read_text()), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init":
                given = {word.arg for word in node.keywords}
                assert given <= {"address", "num_cpus", "logging_level", "log_to_driver"}, path


def answer(
    host: str, port: int, method: str = "GET", path: str = "/health", **headers: str
) -> tuple[int, str]:
    """Status and body; 0 where nobody listens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(host, port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in named)
        body = b'{"max_results": 1}' if method == "POST" else b""
        sent = {"Content-Type": "application/json", "Content-Length": str(len(body))} | named
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, reply.read().decode(errors="replace")
    except ConnectionRefusedError:
        return 0, ""
    finally:
        connection.close()


@contextlib.contextmanager
def served(command: str, folder: Path, **environment: str) -> Iterator[tuple[int, int]]:
    """Port and process id of a shipped `mlflow server ...`, started but for its port as it is."""
    words = shlex.split(command[command.index("mlflow server") :].partition(" >")[0])
    port = free_port()
    words[words.index("--port") + 1] = str(port)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_"))}
    always = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = folder / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=folder,
            env=kept | always | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + ENDS_S
        while answer("127.0.0.1", port)[0] != 200:
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"the MLflow server did not come up:\n{log.read_text()[-2000:]}")
            threading.Event().wait(0.2)
        yield port, server.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(20)


def test_make_ui_is_for_this_machine_and_its_own_pages_alone(tmp_path: Path) -> None:
    ((_, command),) = (one for one in listeners("mlflow server") if one[0] == "Makefile")
    with served(command, tmp_path) as (port, pid):
        assert answer("127.0.0.1", port, "POST", CALL)[0] == 200
        assert answer(outside(), port)[0] == 0
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        open_ports = {
            connection.laddr.ip
            for one in family
            for connection in one.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert open_ports == {"127.0.0.1"}
        # What the browser of this machine's user would send for a page of somebody else.
        assert answer("127.0.0.1", port, "POST", CALL, Origin="https://evil.example")[0] == 403
        rebound = answer("127.0.0.1", port, "GET", f"{CALL}?max_results=1", Host="evil.example")
        assert rebound[0] == 403


@pytest.mark.slow
def test_the_clusters_mlflow_lets_nobody_in_without_the_password(tmp_path: Path) -> None:
    pytest.importorskip("flask_wtf", reason="pip install 'mlflow[auth]'")
    ((_, command),) = (one for one in listeners("mlflow server") if one[0] == "cluster.yaml")
    command = command.replace("s3://YOUR-BUCKET/mlflow", str(tmp_path / "art"))
    assert '"$database"' in command
    secrets = {
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "0" * 64,
        "MLFLOW_AUTH_ADMIN_PASSWORD": "made-at-start-1",
    }

    def basic(user: str, password: str) -> str:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    with (
        postgres_database(tmp_path / "postgres") as uri,
        served(command.replace('"$database"', uri), tmp_path, **secrets) as (port, _),
    ):
        here, name = outside(), f"10.0.0.5:{port}"  # by a name as nodes of a private network use
        assert answer(here, port, "POST", CALL, Host=name)[0] == 401
        for password in ("password1234", "password", ""):  # the first was MLflow's default once
            guess = basic("admin", password)
            assert answer(here, port, "POST", CALL, Host=name, Authorization=guess)[0] == 401
        right = basic("admin", secrets["MLFLOW_AUTH_ADMIN_PASSWORD"])
        assert answer(here, port, "POST", CALL, Host=name, Authorization=right)[0] == 200
