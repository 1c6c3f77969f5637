"""Mutation test of the fault tests: each of these defects must make at least one test fail.

    python -m tests.faults.mutations          prints a line for each; exit code 1 if one survives

A complete run writes mutations.md, next to this file: the list and the results. Works on a copy of
the tree, whose tests must pass before a defect is injected: otherwise their failure would prove
nothing. A defect whose text is no longer in the source is an error.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".md")
LIMIT_S = 300  # of the tests of one defect


@dataclass(frozen=True)
class Mutation:
    """One defect: `old` in `file` becomes `new`, and `tests` are run."""

    what: str
    file: str
    old: str
    new: str
    tests: str


LOOP, SAVES = "tests/training/test_loop.py", "tests/training/test_checkpoints.py"
ENDS, LEASE = "tests/faults/test_same_end.py", "tests/training/test_writer_lease.py"
CHECKPOINTS, STATE = "ddpm_ray/training/checkpoints.py", "ddpm_ray/training/state.py"
ACCUMULATION = "ddpm_ray/training/gradient_accumulation.py"
ADVERSARY = "ddpm_ray/training/adversary.py"
NOISING = "ddpm_ray/training/noising.py"
MASKED, NO_WAITING = "ddpm_ray/training/masked_updates.py", "tests/training/test_no_waiting.py"
DAMAGE = "tests/training/test_damaged_checkpoints.py"
FENCING = "tests/training/test_fencing.py"
SHARED_SAVES = "tests/training/test_shared_writing.py"

MUTATIONS = (
    Mutation(
        "noise is not keyed by the step", NOISING, "Purpose.NOISE, step,", "Purpose.NOISE, 0,", LOOP
    ),
    Mutation(
        "t is not keyed by the position",
        NOISING,
        "self.steps(step, positions)",
        "self.steps(step, positions * 0)",
        LOOP,
    ),
    Mutation(
        "dropout is not keyed at all",
        ACCUMULATION,
        "if self.dropout_seed is not None:",
        "if False:",
        LOOP,
    ),
    Mutation(
        "dropout is keyed by the worker instead of the slot",
        ACCUMULATION,
        "Purpose.DROPOUT, self.step, slot)",
        "Purpose.DROPOUT, self.step, self.workers.rank)",
        "tests/faults/test_resized.py",
    ),
    Mutation(
        "slots are summed in sequence",
        "ddpm_ray/training/deterministic_allreduce.py",
        "while pairs % 2 == 0:",
        "while self._sums:",
        "tests/training/test_deterministic_allreduce.py",
    ),
    Mutation(
        "losses are summed in order of arrival",
        "ddpm_ray/training/metrics_buffer.py",
        "(values.double() * 2.0**bits).round_() * 2.0**-bits",
        "values.double()",
        "tests/training/test_metrics_buffer.py",
    ),
    Mutation(
        "a rewound run repeats the same samples",
        "ddpm_ray/training/rejected_steps.py",
        "state.step, state.scores, state.validation_losses = step, scores, losses",
        "state.scores, state.validation_losses = scores, losses",
        LOOP,
    ),
    Mutation(
        "rewinding restores a later checkpoint",
        "ddpm_ray/training/rejected_steps.py",
        "store.at((step - 1) // every * every)",
        "store.at(step - 1)",
        LOOP,
    ),
    Mutation(
        "a run that was created twice stays twice",
        "ddpm_ray/tracking/run_lookup.py",
        "for twin in twins:",
        "for twin in []:",
        "tests/tracking/test_mlflow_runs.py",
    ),
    Mutation(
        "a NaN is not seen by the other workers",
        ACCUMULATION,
        "torch.where(finite, 1.0, math.nan)",
        "1.0",
        LOOP,
    ),
    Mutation(
        "the EMA is not restored",
        STATE,
        'self.ema.load_state_dict(snapshot.tensors["ema"])',
        "pass",
        LOOP,
    ),
    Mutation(
        "Adam's moments are not restored",
        STATE,
        'load_moments(self.model, self.optimizer, snapshot.tensors["optimizer"])',
        "pass",
        LOOP,
    ),
    Mutation(
        "an update does not wait for the copy of a checkpoint",
        STATE,
        "self.background_copy.before_update()\n        step_optimizer(",
        "step_optimizer(",
        "tests/training/test_state.py",
    ),
    Mutation(
        "the adversarial weight is not restored",
        ADVERSARY,
        "self.weight.copy_(weights.pop(WEIGHT))",
        "weights.pop(WEIGHT)",
        LOOP,
    ),
    Mutation(
        "the moments of the discriminator's Adam are not restored",
        ADVERSARY,
        'load_moments(self.discriminator, self.optimizer, groups["discriminator-optimizer"])',
        "pass",
        LOOP,
    ),
    Mutation(
        "a restored run starts one step late",
        STATE,
        "self.step = snapshot.step",
        "self.step = snapshot.step + 1",
        LOOP,
    ),
    Mutation(
        "a rejected step changes the weights",
        MASKED,
        "(~accepted).float()",
        "(~accepted).float() * 0",
        NO_WAITING,
    ),
    Mutation(
        "a rejected step changes the EMA",
        MASKED,
        "share = accepted * weight",
        "share = torch.tensor(weight)",
        NO_WAITING,
    ),
    Mutation(
        "steps after a diverged one are taken until the host knows of it",
        "ddpm_ray/training/divergence_guard.py",
        " & (self.rejected <= self.most_rejected)",
        "",
        NO_WAITING,
    ),
    Mutation(
        "steps after a diverged one are not taken again",
        "ddpm_ray/training/rejected_steps.py",
        "state.step, state.shown = step, min",
        "state.shown = min",
        NO_WAITING,
    ),
    Mutation(
        "earlier gradient norms are not restored",
        "ddpm_ray/training/divergence_guard.py",
        'list(facts["norms"])',
        "[]",
        "tests/training/test_divergence_guard.py",
    ),
    Mutation(
        "loss bands of a window are not restored",
        "ddpm_ray/runs/train_worker.py",
        'log.resume(snapshot.facts["bands"], snapshot',
        "log.resume(log.window(), snapshot",
        ENDS,
    ),
    Mutation(
        "rows that MLflow has not acknowledged are not saved",
        "ddpm_ray/training/loop.py",
        "for row in run.sink.unsent()",
        "for row in []",
        ENDS,
    ),
    Mutation(
        "rows have the time of the clock",
        "ddpm_ray/tracking/run_log.py",
        "start_ms + step, step) for key, value, step",
        '__import__("time").time_ns() // 10**6, step) for key, value, step',
        "tests/tracking/test_mlflow_runs.py",
    ),
    Mutation(
        "rates are sent again on replay",
        "ddpm_ray/tracking/row_queue.py",
        "if row.step > self._stored.get(key, -1)",
        "if True",
        ENDS,
    ),
    Mutation(
        "bytes are not compared with their sha256",
        "ddpm_ray/storage/checksummed.py",
        "if found == sha256:\n            return data",
        "if True:\n            return data",
        SAVES,
    ),
    Mutation(
        "a changed object is not read again",
        "ddpm_ray/storage/checksummed.py",
        "READS = 5",
        "READS = 1",
        "tests/faults/test_bad_weather.py",
    ),
    Mutation(
        "the checksum of JSON is not compared",
        "ddpm_ray/storage/checksummed_json.py",
        'if stored["sha256"] == _digest(stored["value"], number):',
        "if True:",
        "tests/storage/test_checksummed_json.py",
    ),
    Mutation(
        "no request is retried",
        "ddpm_ray/storage/retry.py",
        "if not is_retryable(error) or elapsed_s + pause_s > timeout_s:",
        "if True:",
        "tests/faults/test_bad_weather.py",
    ),
    Mutation(
        "the manifest is written before its data",
        "ddpm_ray/training/checkpoint_folder.py",
        "    entries = write_tensors(url, snapshot.tensors)\n",
        "    entries = described(tensor_files(snapshot.tensors))\n"
        "    object_store.write_bytes(object_store.join(url, MANIFEST), _json(entries))\n"
        "    write_tensors(url, snapshot.tensors)\n",
        SAVES,
    ),
    Mutation(
        "the manifest is written before the files of other workers",
        "ddpm_ray/training/shared_writing.py",
        "            if not late:\n                return sizes\n",
        "            return dict.fromkeys(sum(awaited.values(), []), 0) | sizes\n",
        SHARED_SAVES,
    ),
    Mutation(
        "files of other workers are not compared with their sizes",
        "ddpm_ray/training/shared_writing.py",
        "if written != {name: sizes[name] for name in names if name != _record(rank)}:",
        "if False:",
        SHARED_SAVES,
    ),
    Mutation(
        "a folder that a later start deleted is an error of the storage",
        "ddpm_ray/training/shared_writing.py",
        "            check()  # a later start deletes folders without manifest\n",
        "",
        SHARED_SAVES,
    ),
    Mutation(
        "a lost pointer is not replaced",
        CHECKPOINTS,
        "known = _by_step([*named, *self._unnamed(named)[0]])",
        "known = list(named)",
        DAMAGE,
    ),
    Mutation(
        "complete checkpoints without a pointer are not recovered",
        CHECKPOINTS,
        "known = _by_step([*named, *unnamed])",
        "known = list(named)",
        DAMAGE,
    ),
    Mutation(
        "the last verified checkpoint may be deleted",
        CHECKPOINTS,
        "planned[:1], self._verified]",
        "planned[:1]]",
        LEASE,
    ),
    Mutation(
        "an incomplete checkpoint is not deleted",
        CHECKPOINTS,
        "for folder in unfinished:",
        "for folder in list[str]():",
        LEASE,
    ),
    Mutation(
        "the lease is not checked before a commit",
        CHECKPOINTS,
        'fault_injection.at("commit")\n        self.check_lease()',
        'fault_injection.at("commit")',
        LEASE,
    ),
    Mutation(
        "a recovered checkpoint is not copied",
        CHECKPOINTS,
        "taken_over = reference in self._taken_over",
        "taken_over = False",
        FENCING,
    ),
    Mutation(
        "the pointer that was written last is used",
        "ddpm_ray/training/checkpoint_pointers.py",
        "elif latest is not None and (found is None or latest.rank > found.rank):",
        "elif latest is not None:",
        FENCING,
    ),
    Mutation(
        "two owners share one lease number",
        "ddpm_ray/training/writer_lease.py",
        '["token"] != self.token',
        '["token"] == ""',
        LEASE,
    ),
    Mutation(
        "two jobs take over a run from each other",
        "ddpm_ray/training/writer_lease.py",
        "_next(refuse_others=True)",
        "_next(refuse_others=False)",
        LEASE,
    ),
    Mutation(
        "a frozen worker is not detected",
        "ddpm_ray/distributed/heartbeat.py",
        "silent = [one for one in heartbeats if one.is_silent(limit_s)]",
        "silent: list[Heartbeat] = []",
        "tests/distributed/test_heartbeat.py",
    ),
)


def survives(mutation: Mutation, tree: Path) -> bool:
    """Whether all tests pass although `tree` is broken."""
    file = tree / mutation.file
    whole = file.read_text()
    if whole.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file} does not hold {mutation.old!r} once; mend the list")
    file.write_text(whole.replace(mutation.old, mutation.new))
    try:
        return pass_in(tree, mutation.tests)
    finally:
        file.write_text(whole)


def pass_in(tree: Path, tests: str) -> bool:
    """Whether `tests` all pass in `tree`; raises SystemExit if pytest could not run them."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", tests]
    try:
        ended = subprocess.run(
            command,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False  # a run that never ends is not green
    if ended.returncode > 1:  # 0: all pass, 1: one fails, above: no test was found, a usage error
        raise SystemExit(f"pytest {tests} ended with {ended.returncode}:\n{ended.stdout[-2000:]}")
    return ended.returncode == 0


def main() -> int:
    """Try all, or those whose words are given as arguments."""
    wanted = [m for m in MUTATIONS if all(word in m.what for word in sys.argv[1:])]
    alive: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "data", ".*_cache", "mlflow.db")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for name in ("ddpm_ray/data", "tests/data", "ddpm_ray/runs", "tests/runs"):
            shutil.copytree(ROOT / name, tree / name)
        for tests in sorted({mutation.tests for mutation in wanted}):
            if not pass_in(tree, tests):
                raise SystemExit(f"{tests} fails with nothing broken; mend it first")
        for mutation in wanted:
            if survives(mutation, tree):
                alive.add(mutation.what)
            verdict = "SURVIVES" if mutation.what in alive else "killed  "
            print(f"{verdict}  {mutation.what}", flush=True)
    print(f"{len(wanted) - len(alive)} of {len(wanted)} killed")
    if len(wanted) == len(MUTATIONS):
        TABLE.write_text(table(alive))
    return int(bool(alive))


def table(alive: set[str]) -> str:
    """The list in Markdown, with the result of each."""
    rows = [
        f"| {one.what} | `{one.file}` | `{one.tests}` | "
        f"{'**SURVIVES**' if one.what in alive else 'killed'} |"
        for one in MUTATIONS
    ]
    head = "| defect | file | tests | result |\n| --- | --- | --- | --- |"
    reported = (
        "Each row is a defect that `python -m tests.faults.mutations` puts into a copy of the "
        "code, and the tests that must fail because of it. A complete run writes this page."
    )
    return "\n".join(
        ["# Injected defects, and whether tests find them", "", reported, "", head, *rows, ""]
    )


if __name__ == "__main__":
    sys.exit(main())
