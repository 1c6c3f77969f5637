"""`serve deploy` on a cluster of several nodes, one of which is lost; and an update."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.node import lacking
from tests.distributed.nodes import HEAD, Nodes
from tests.limits import ENDS_S
from tests.noise import pack_noise
from tests.test_cascade_job import trained
from tests.training.test_loop import TINY_UNET

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
TOKEN = "t" * 32
LONG = {"kind": "generation", "steps": 1000, "n": 4, "seed": 5}
# Ask until there is an answer of that status: proxies start, and lose the processes of a node.
CLIENT = f"""
import json, sys, time, requests
method, path, wanted, body = sys.argv[1:]
until_s, seen = time.monotonic() + {ENDS_S}, ""
while time.monotonic() < until_s:
    try:
        answer = requests.request(
            method, f"http://{HEAD}:8000/{{path}}", json=json.loads(body), timeout={ENDS_S},
            headers={{"Authorization": "Bearer {TOKEN}"}},
        )
        seen = f"{{answer.status_code}} {{answer.text[:500]}}"
        if answer.status_code == int(wanted):
            print(answer.text)
            sys.exit()
    except requests.ConnectionError as error:
        seen = str(error)
    time.sleep(0.5)
sys.exit(f"no {{wanted}}: {{seen}}")
"""


@pytest.fixture(autouse=True)
def _machine_can() -> None:
    if why := lacking():
        pytest.skip(why)


def answer(nodes: Nodes, method: str, path: str, body: Any = None, status: int = 200) -> str:
    """The text of an answer with that status, to a client on the head."""
    words = [method, path, str(status), json.dumps(body)]
    return nodes.head.run("python", "-c", CLIENT, *words, timeout_s=2 * ENDS_S)


def ask(nodes: Nodes, *request: Any) -> Any:
    """The same, of JSON."""
    return json.loads(answer(nodes, *request))


def metrics(nodes: Nodes) -> str:
    """Prometheus' text."""
    return answer(nodes, "GET", "metrics")


def images(nodes: Nodes, job: str) -> list[str]:
    while (found := ask(nodes, "GET", f"v1/jobs/{job}?wait=20"))["status"] != "succeeded":
        assert found["status"] in ("queued", "running"), found
    return [one["b64_json"] for one in found["data"]]


def deploy(nodes: Nodes, run: Path, *options: str) -> None:
    """The config of docs/serving.md, with this model, and tokens for this application alone."""
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "ddpm-ray",
                "route_prefix": "/",
                "import_path": "ddpm_ray.serving.ray_serve.application:build",
                "args": {"model_uri": str(run), "options": list(options)},
                "runtime_env": {"env_vars": {"DDPM_RAY_TOKENS": f"alice={TOKEN}"}},
            }
        ],
    }
    file = nodes.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    nodes.head.run("serve", "deploy", str(file))


def test_a_lost_node_loses_no_job_and_an_update_is_taken(tmp_path: Path) -> None:
    pack_noise(str(tmp_path / "data"), 8, 4)
    run = tmp_path / "digits"
    trained(run, str(tmp_path / "data"), *TINY_UNET, "schedule.num_steps=1000")
    sizes = ("replicas.min=2", "replicas.max=2", "replicas.cpus=1")
    with Nodes((0, 1, 1)) as nodes:  # the head runs no model
        deploy(nodes, run, *sizes)
        ask(nodes, "PUT", "v1/jobs/alone", LONG, 202)
        wanted = images(nodes, "alone")
        jobs = [f"job-{number}" for number in range(6)]
        for job in jobs:
            ask(nodes, "PUT", f"v1/jobs/{job}", LONG, 202)
        tables = [one.address for one in nodes.actors() if one.alive and "table" in one.kind]
        lost = next(one.address for one in nodes if one.address not in (HEAD, *tables))
        nodes.at(lost).kill("raylet")
        assert all(images(nodes, job) == wanted for job in jobs)
        (restarted,) = re.findall(r"^ddpm_ray_restarted_jobs_total (\S+)", metrics(nodes), re.M)
        assert float(restarted) > 0
        nodes.rejoin(lost)
        deploy(nodes, run, *sizes, "limits.max_steps=9")
        error = ask(nodes, "POST", "v1/images/generations", {"steps": 10}, 400)["error"]
        assert error["message"] == "steps is 10; this server allows at most 9"
