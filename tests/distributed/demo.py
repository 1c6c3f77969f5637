"""`make cluster-demo`: data, a training and a sweep go through a real cluster's job server.

    python -m tests.distributed.demo

Each Ray node has one CPU and a network of its own on this machine, so that the two workers of the
training, and trials that run at once, must lie on different nodes. Prints what ran where and checks
it: exit code 0, all is as it should be; 1, something is not, and the logs are named; 2, this
machine cannot hold the nodes.
"""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter

from tests.distributed.node import NodeError, lacking
from tests.distributed.nodes import Nodes, TrackedRun
from tests.runs.job import TINY_RUN

AS_ROOT = "unshare", "--user", "--map-root-user"
STEPS, TRIAL_STEPS, TRIALS = 150, 60, 4
SWEEP = (
    "python",
    "jobs/sweep.py",
    "conf/sweep/quick.yaml",
    *(f"run.{key}" for key in TINY_RUN),
    "run.data.url=s3://bucket/digits",
    "run.storage=s3://bucket/runs",
    "space=[{schedule.kind: [cosine, sigmoid], schedule.num_steps: [1000, 250]}]",
    "stopping.every_steps=20",
    f"run.training.steps={TRIAL_STEPS}",
    "run.training.grid_every_steps=20",
    "run.training.checkpoint_every_steps=20",
)


def training(steps: int, checkpoint_every_steps: int) -> tuple[str, ...]:
    """The command of a run of two workers from the bucket, where digits are packed at need."""
    return (
        "python",
        "jobs/train.py",
        "conf/train/digits.yaml",
        *TINY_RUN,
        "data.url=s3://bucket/digits",
        "storage=s3://bucket/runs",
        "cluster.num_workers=2",
        f"training.steps={steps}",
        f"training.checkpoint_every_steps={checkpoint_every_steps}",
        "training.log_every_steps=25",
        "training.grid_every_steps=50",
    )


class Demo:
    """The jobs, one after the other, and what turned out not to be as it should."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.report: list[str] = []
        self.wrong: list[str] = []

    def expect(self, right: object, what: str) -> None:
        """Note `what`, unless it is right."""
        if not right:
            self.wrong.append(what)

    def job(self, name: str, *command: str) -> None:
        """Submit a job, show its own lines as they come, report how it ended."""
        print(f"\n{name}: ray job submit --working-dir . -- {' '.join(command)}", flush=True)
        began, own = time.monotonic(), False

        def show(line: str) -> None:
            nonlocal own  # the lines before are Ray's: what it uploads, how to ask for logs
            if own:
                print(f"  {line}", flush=True)
            own = own or line.startswith("Running entrypoint")

        code = self.nodes.submit(name, *command, watch=show)
        self.report.append(f"{name:<8}exit code {code} after {time.monotonic() - began:.0f} s")
        self.expect(code == 0, f"{name} ended with exit code {code}")

    def places(self, job: str, workers: int) -> None:
        """Report and check on which nodes the job's workers were, at least so many of them."""
        actors = [actor for actor in self.nodes.actors() if actor.job == job]
        places = Counter(str(a.address) for a in actors if a.kind == "RayTrainWorker")
        reported = ", ".join(f"{count} on {address}" for address, count in sorted(places.items()))
        self.report.append(f"        {places.total()} workers: {reported}")
        self.expect(places.total() >= workers, f"{job} had {places.total()} workers, not {workers}")
        self.expect(len(places) == 2, f"the workers of {job} were on {len(places)} nodes, not on 2")

    def runs(self, job: str) -> list[TrackedRun]:
        """Report what MLflow has of the job's run and of those below it, which is the first."""
        own = self.nodes.result(job).get("run_id", "none")
        found = [run for run in self.nodes.runs() if own in (run.id, run.parent)]
        self.expect(found, f"{job} left no run in MLflow")
        for run in found:
            rows, whole = len(run.steps), run.steps == list(range(1, len(run.steps) + 1))
            reported = f"{rows} rows of train/loss" if rows else ""
            self.report.append(
                f"        {run.id}  {run.status:<8}  {run.name}  {reported}".rstrip()
            )
            self.expect(whole, f"{run.name}: a row of train/loss is missing, or is there twice")
        return found


def show(nodes: Nodes) -> Demo:
    """Run the three jobs; what they did stands in the Demo that is returned."""
    demo = Demo(nodes)
    demo.job("pack", "python", "jobs/pack_shards.py", "digits", "s3://bucket/digits")
    demo.expect((nodes.bucket / "digits" / "manifest.json").exists(), "the bucket has no digits")
    demo.job("train", *training(STEPS, 50))
    demo.places("train", workers=2)
    for run in demo.runs("train"):
        demo.expect(run.status == "FINISHED", f"the training is {run.status}, not FINISHED")
        demo.expect(len(run.steps) == STEPS, f"the training has {len(run.steps)} rows, not {STEPS}")
    checkpoint = nodes.result("train").get("checkpoint", "")
    kept = nodes.bucket / checkpoint.removeprefix("s3://bucket/")
    demo.expect(any(kept.glob("*.safetensors")), f"no checkpoint in the bucket: {checkpoint}")
    demo.job("sweep", *SWEEP)
    demo.places("sweep", workers=TRIALS)
    runs = demo.runs("sweep")
    trials = [run for run in runs if run.parent]
    demo.expect(len(trials) == TRIALS, f"the sweep has {len(trials)} trials' runs, not {TRIALS}")
    for run in runs:
        ends = "FINISHED" if len(run.steps) in (0, TRIAL_STEPS) else "KILLED"
        demo.expect(run.status == ends, f"{run.name} is {run.status}, not {ends}")
    finished = [run for run in trials if run.status == "FINISHED"]
    demo.expect(finished, "no trial of the sweep was trained to its end")
    return demo


def _may_be_root() -> bool:
    """Whether this user can be root of namespaces of his own."""
    return bool(shutil.which(AS_ROOT[0])) and not subprocess.run([*AS_ROOT, "true"]).returncode


def main() -> int:
    """The exit code of the demo."""
    if why := lacking():
        if os.geteuid() and _may_be_root():
            os.execvp(AS_ROOT[0], [*AS_ROOT, sys.executable, "-m", "tests.distributed.demo"])
        print(f"error: this machine cannot hold several nodes: {why}", file=sys.stderr)
        return 2
    began = time.monotonic()
    try:
        with Nodes(cpus=(1, 1)) as nodes:
            addresses = [f"{node.address}{' (head)' * (node is nodes.head)}" for node in nodes]
            print(f"nodes up after {time.monotonic() - began:.0f} s, logs in {nodes.logs}")
            demo = show(nodes)
            print(f"\nnodes   {', '.join(addresses)}", *demo.report, sep="\n")
            if demo.wrong:
                raise NodeError("; ".join(demo.wrong))
    except (NodeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"all as it should be, after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
