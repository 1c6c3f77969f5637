"""Runs on several nodes, each with its own network and folders: spread out, and a node killed."""

import pytest

from tests.distributed.demo import show, training
from tests.distributed.node import lacking
from tests.distributed.nodes import HEAD, Nodes
from tests.runs.job import shown

SECOND = "10.77.0.2"

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(autouse=True)
def _machine_can() -> None:
    if why := lacking():
        pytest.skip(why)


def addresses(nodes: Nodes, *, alive: bool) -> list[str]:
    """Where the workers of training lie, or lay."""
    workers = [actor for actor in nodes.actors() if actor.kind == "RayTrainWorker"]
    return sorted(str(worker.address) for worker in workers if worker.alive or not alive)


def test_two_workers_on_two_nodes_share_a_run() -> None:
    """One CPU a node, so neither could train alone; they meet in Gloo, the bucket and MLflow."""
    with Nodes(cpus=(1, 1)) as nodes:
        assert nodes.submit("train", *training(60, 30)) == 0, nodes.reported("train")
        assert addresses(nodes, alive=False) == [node.address for node in nodes]
        (run,) = nodes.runs()
        assert run.status == "FINISHED"
        assert run.steps == list(range(1, 61))
        assert nodes.result("train")["run_id"] == run.id
        assert list(nodes.bucket.glob("runs/digits/checkpoints/step-00000060-*/*.safetensors"))
        kinds = {actor.kind for actor in nodes.actors()}
        assert kinds >= {"TrainController", "RayTrainWorker"}
        # See distributed/ray_trainer.py.
        assert not kinds & {"PlacementGroupCleaner", "DatasetManager"}


def test_a_run_outlives_a_node() -> None:
    """The raylet under one of two workers is killed; the third node takes the worker in."""
    killed: list[str] = []

    def strike(line: str) -> None:
        if killed or not line.startswith("step ") or shown(line) < 100:
            return
        places = addresses(nodes, alive=True)
        assert len(places) == 2
        killed.append(next(place for place in places if place != nodes.head.address))
        nodes.at(killed[0]).kill("raylet")

    with Nodes(cpus=(1, 1, 1)) as nodes:
        code = nodes.submit("train", *training(600, 50), watch=strike)
        assert killed, nodes.reported("train")
        assert code == 0, nodes.reported("train")
        (run,) = nodes.runs()
        assert run.status == "FINISHED"
        assert run.steps == list(range(1, 601))
        places = addresses(nodes, alive=False)
        assert len(places) == 4  # two starts of two workers
        assert set(places) == {node.address for node in nodes}


@pytest.mark.timeout(750)  # on a busy machine it was at step 939 of 1,000 after 420 s
def test_a_run_goes_on_with_fewer_workers_and_again_with_more() -> None:
    """One of two nodes is announced to go and goes, then it is back; not a step is told twice."""
    gone: list[int] = []  # the step shown when the node went
    back: list[int] = []

    def strike(line: str) -> None:
        if "saving a checkpoint now" in line:
            nodes.at(SECOND).kill("raylet")
        if not line.startswith("step "):
            return
        if not gone and shown(line) >= 100:
            gone.append(shown(line))
            nodes.announce_loss(SECOND)
        if gone and not back and addresses(nodes, alive=True) == [HEAD]:
            back.append(shown(line))
            nodes.rejoin(SECOND)

    elastic = "cluster.min_workers=1", "cluster.resize_every_s=5", "training.reduction=elastic"
    with Nodes(cpus=(1, 1)) as nodes:
        code = nodes.submit("train", *training(1000, 500), *elastic, watch=strike, timeout_s=650)
        assert code == 0, nodes.reported("train")
        (run,) = nodes.runs()
        assert run.status == "FINISHED"
        assert run.steps == list(range(1, 1001))
        assert addresses(nodes, alive=False) == [HEAD] * 3 + [SECOND] * 2  # 2, then 1, then 2
        lost, resized = (
            line for line in nodes.reported("train") if "worker group restarted at step" in line
        )
        began = int(lost.partition("at step ")[2].split()[0])
        assert "with 1 worker (worker " in lost
        assert "with 2 workers (resized to 2 workers)" in resized
        assert gone[0] <= began  # by the checkpoint that the announcement brought about


def test_a_sweep_spreads_its_trials_over_nodes() -> None:
    """Two at once on a CPU each; early stopping frees a place that the next trial takes."""
    with Nodes(cpus=(1, 1)) as nodes:
        assert not show(nodes).wrong


@pytest.mark.timeout(1000)
def test_a_drill_of_two_nodes_finds_equal_ends() -> None:
    """All faults of conf/drill/digits.yaml; the second node has half of the workers."""
    places = "run.storage=s3://bucket/runs", "run.data.url=s3://bucket/digits"
    command = ("python", "jobs/drill.py", "conf/drill/digits.yaml", *places)
    with Nodes(cpus=(1, 1)) as nodes:
        code = nodes.submit("drill", *command, timeout_s=900)
        print(*nodes.reported("drill"), sep="\n")
        assert code == 0
        found = nodes.result("drill")["faults"]
        assert all(one["equal"] for one in found)
        # Markers of fired faults are local to a node: a worker that moves may meet a fault again.
        assert all(len(one["starts"]) in (2, 3) for one in found)
        assert set(addresses(nodes, alive=False)) == {HEAD, SECOND}
