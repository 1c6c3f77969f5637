"""Checks of the Ray cluster: nodes, State API, authentication, GPUs, clocks."""

import contextlib
import http.client
import ipaddress
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_nodes

from ddpm_ray.distributed.ray_address import require_listener
from ddpm_ray.runs.doctor.checks import ANSWER_S, INSTALL, Clock, Finding, clock, versions
from ddpm_ray.runs.doctor.local_checks import gpus_agree, named, torch_gpus

CLOCK_S = 1.0


def ray_answers(address: str, until: float) -> Iterator[Finding | Clock]:
    """Join the cluster as a driver and check it; nodes may answer until `until` (monotonic)."""
    try:
        require_listener(address, ANSWER_S)
        context = ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except Exception as error:  # noqa: BLE001 - Ray raises many kinds
        yield Finding("Ray", "fail", f"{address}: {_brief(error)}", _remedy(error))
        return
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    total = ray.cluster_resources()
    have = f"nodes {len(nodes)}, CPUs {total.get('CPU', 0):g}, GPUs {total.get('GPU', 0):g}"
    yield Finding("Ray", "ok", f"{address}: {have}")
    tasks = {node: _on(node, _report) for node in nodes}  # they run during the next checks
    yield _state_api(set(nodes), context.dashboard_url)
    addresses = [node["NodeManagerAddress"] for node in nodes.values()]
    yield _authentication(context.dashboard_url, addresses)
    yield from _nodes(nodes, tasks, until)


def _remedy(error: Exception) -> str:
    """Remedy for an error of ray.init."""
    if "dashboard" in str(error):
        return "submit this job there (`ray job submit`), or give the head's host:6379"
    if "oken" in str(error):
        return "set RAY_AUTH_MODE=token and copy the head's ~/.ray/auth_token (or RAY_AUTH_TOKEN)"
    if "ersion mismatch" in str(error):
        return f"install the cluster's versions: {INSTALL}"
    return (
        "start it with `ray start --head`, correct the address, or leave it empty for a local Ray"
    )


def _state_api(nodes: set[str], dashboard: str) -> Finding:
    """Check that the State API that Ray Train finds answers, and belongs to this cluster."""
    remedy = "pip install 'ray[default]' on the head"
    if dashboard:
        remedy += f", and set RAY_API_SERVER_ADDRESS=http://{dashboard}"
    consequence = "trials that are stopped early would keep their workers"
    try:
        listed = {
            state.node_id
            for state in list_nodes(timeout=int(ANSWER_S), raise_on_missing_output=False)
        }
    except Exception as error:  # noqa: BLE001 - requests', Ray's and RuntimeError
        return Finding("State API", "fail", f"{_brief(error)}: {consequence}", remedy)
    if not listed & nodes:
        found = f"it belongs to another cluster: {consequence}"
        return Finding("State API", "fail", found, remedy)
    return Finding("State API", "ok", f"answers at http://{dashboard}")


def _authentication(dashboard: str, addresses: list[str]) -> Finding:
    """Check that calls need a token; warn if they do not and others can reach the cluster."""
    needed = own_mode = os.environ.get("RAY_AUTH_MODE") == "token"
    if dashboard:
        connection = http.client.HTTPConnection(dashboard, timeout=ANSWER_S)
        try:
            connection.request("GET", "/api/v0/nodes?limit=1")
            needed = connection.getresponse().status in (401, 403)
        except (OSError, http.client.HTTPException):
            needed = (
                own_mode  # it listens on another node's loopback; assume one mode for the cluster
            )
        finally:
            connection.close()
    open_to = sorted({one for one in addresses if not ipaddress.ip_address(one).is_loopback})
    if needed:
        return Finding("authentication", "ok", "a token is required")
    if not open_to:
        return Finding("authentication", "ok", "none, and none required: all nodes are on loopback")
    found = f"none: anyone who reaches {named(open_to)} can run code there"
    remedy = (
        "`ray get-auth-token --generate` on the head, copy ~/.ray/auth_token to every node, and "
        "set RAY_AUTH_MODE=token before each `ray start`"
    )
    return Finding("authentication", "warn", found, remedy)


def _nodes(
    nodes: dict[str, dict[str, Any]], tasks: dict[str, Any], until: float
) -> Iterator[Finding | Clock]:
    """Compare packages, GPUs and clock of each node."""
    ray.wait(
        list(tasks.values()), num_returns=len(tasks), timeout=max(0.0, until - time.monotonic())
    )
    mine, wrong, silent = versions(), [], []
    gpus: list[tuple[str, int, int]] = []
    for node, task in tasks.items():
        name = str(nodes[node]["NodeManagerAddress"])
        try:
            theirs, seen = ray.get(task, timeout=0)
        except ray.exceptions.GetTimeoutError:
            silent.append(name)
            continue
        except Exception as error:  # noqa: BLE001 - any error of the node
            wrong.append(f"{name}: {_brief(error)}")
            continue
        mismatches = [
            f"{key} {theirs[key]} for {mine[key]}" for key in mine if theirs[key] != mine[key]
        ]
        wrong += [f"{name} has {', '.join(mismatches)}"] if mismatches else []
        gpus.append((name, seen, int(nodes[node]["Resources"].get("GPU", 0))))
        before = time.time()
        asked = _on(node, _now)  # in a worker process that exists by now: a few ms
        with contextlib.suppress(ray.exceptions.RayError):  # it answered before
            yield clock(name, ray.get(asked, timeout=CLOCK_S), before, time.time())
    if silent:
        found = f"{named(silent)} did not answer in time"
        remedy = "see `ray status`; busy nodes may need longer: timeout_s=60"
        yield Finding("nodes", "fail", found, remedy)
    if wrong:
        yield Finding("nodes", "fail", named(wrong, "; "), f"on these nodes: {INSTALL}")
    if not (silent or wrong):
        yield Finding("nodes", "ok", "all have this machine's packages")
    if gpus:
        yield gpus_agree(gpus)


def _on(node: str, function: Any) -> Any:
    """Run `function()` as a task on `node`, without a CPU resource."""
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.options(scheduling_strategy=strategy).remote()


def _report() -> tuple[dict[str, str], int]:
    """Versions on this node, and the number of GPUs that torch sees."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides GPUs from a task without GPU resources
    return versions(), torch_gpus()


def _now() -> float:
    return time.time()


def _brief(error: Exception) -> str:
    """The informative line of Ray's message, without colours and traces."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0] if lines else ""
    return (line or type(error).__name__)[:200]
