"""Pictures and scores of stored EMA weights, by a spare process or the workers of a later start.

The same objects as in a training step draw and score, so the results are the same.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ddpm_ray import fault_injection
from ddpm_ray.assembly import latents, run_config, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import from_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.distributed.fatal_errors import is_transient
from ddpm_ray.distributed.spare_actor import SpareActor
from ddpm_ray.redaction import brief
from ddpm_ray.reporting import Sink
from ddpm_ray.runs.training_outputs import TrainingOutputs, training_outputs
from ddpm_ray.runs.worker_process import configure_process, facts_of_run, opened_data
from ddpm_ray.storage import object_store
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.evaluation_queue import EvaluationQueue, Request
from ddpm_ray.training.evaluation_store import EVALUATIONS, EvaluationResult, EvaluationStore
from ddpm_ray.training.optimizer_moments import Tensors
from ddpm_ray.training.shared_reading import agreed
from ddpm_ray.training.spare_evaluations import SpareEvaluations
from ddpm_ray.training.state import TrainingState

log = logging.getLogger(__name__)

SPARE_RANK = -1  # of a process that is no worker, for fault injection


def evaluation_store(folder: str) -> EvaluationStore:
    """The evaluations of the run in `folder`."""
    return EvaluationStore(object_store.join(folder, EVALUATIONS))


def spare_evaluations(
    config: RunConfig,
    settings: dict[str, Any],
    state: TrainingState,
    workers: Workers,
    writer: CheckpointWriter,
    sink: Sink | None,
) -> SpareEvaluations | None:
    """The evaluations of a run with evaluation.where=spare; None for others."""
    if config.evaluation.where != "spare":
        return None
    store, queue = evaluation_store(settings["folder"]), None
    if workers.is_main:
        needed = evaluator_settings(settings)
        environment = settings.get("environment", {})
        actor = SpareActor(spare_evaluator, needed, config.cluster, environment)
        queue = EvaluationQueue(actor, store, is_transient, config.cluster.max_failures)
    return SpareEvaluations(
        state=state,
        workers=workers,
        store=store,
        writer=writer,
        history=run_config.run_history(state.facts),
        has_scores=config.evaluation.num_images > 0,
        queue=queue,
        sink=sink,
        check_lease=writer.store.check_lease,
    )


def evaluator_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the workers that `spare_evaluator` needs."""
    needed = {key: settings.get(key) for key in ("config", "folder", "identity")}
    named = ("fingerprints", "tokenizer", "image_encoder", "alignment_checkpoint")
    needed |= {key: settings.get(key, {}) for key in named}
    return needed | {"held_out_prompts": settings.get("held_out_prompts", ())}


def spare_evaluator(
    settings: dict[str, Any], report: Callable[[str], None] = lambda _: None
) -> Callable[[Request], str]:
    """Build the function that evaluates requests in a process of its own; see SpareActor.

    `report` takes what it does, in words.
    """
    config = from_dict(RunConfig, settings["config"])
    configure_process(config)
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    workers, result = Workers(device=device), EvaluationResult()
    fault_injection.set_position(SPARE_RANK, 0)
    dataset = opened_data(config, settings)
    codec = latents.codec_of_data(config.data, dataset, device)
    facts = facts_of_run(settings, dataset, codec)
    state = training_run.training_state(config, dataset.manifest.diffused_shape, device, facts)
    # Validation losses are the workers'; without them their images are not read here.
    without = replace(config, evaluation=replace(config.evaluation, validation_every_steps=0))
    outputs = training_outputs(without, settings, dataset, codec, state, workers, result)
    store = evaluation_store(settings["folder"])
    return partial(_evaluate, config, state, outputs, result, store, report)


def _evaluate(
    config: RunConfig,
    state: TrainingState,
    outputs: TrainingOutputs,
    result: EvaluationResult,
    store: EvaluationStore,
    report: Callable[[str], None],
    request: Request,
) -> str:
    """Evaluate the stored weights of a step and store the result, unless it is there.

    Returns the digest of the result.
    """
    configure_process(config)  # torch's number of threads is one of each thread
    step = request["step"]
    fault_injection.set_position(SPARE_RANK, step)
    digest = store.digest(step, {"config": state.facts["config"], "request": request})
    if store.has_result(step, digest):
        return digest
    state.ema.load_state_dict(store.weights(step))
    state.facts = _with_history(state.facts, request)
    state.step = step
    result.clear()
    draw_requested(outputs, request, report)
    result.scores = state.scores if "scores" in request["outputs"] else {}
    store.save_result(step, digest, result)
    return digest


def draw_requested(
    outputs: TrainingOutputs, request: Request, report: Callable[[str], None] = lambda _: None
) -> None:
    """Draw and score what `request` asks for; `report` takes what is done, before it is done."""
    acts = {
        "grid": ("draws the grid", outputs.draw_grid),
        "strip": ("draws the strip", outputs.draw_strip),
        "scores": ("computes scores", outputs.evaluate),
    }
    for output in request["outputs"]:
        activity, act = acts[output]
        report(activity)
        act(request["step"])


def evaluate_on_workers(
    state: TrainingState,
    outputs: TrainingOutputs,
    workers: Workers,
    writer: CheckpointWriter,
    folder: str,
    commit: Callable[[], None],
) -> None:
    """Evaluate what an earlier start with evaluation.where=spare left; all workers call it.

    `folder`: of the run. `commit` commits a checkpoint on all workers; after it, stored weights and
    results are deleted by the `writer`. An evaluation whose weights one of the workers finds
    missing or damaged is given up with a line. Raises StorageError in an outage, on all workers.
    """
    store = evaluation_store(folder)
    if state.outstanding:
        _evaluate_outstanding(state, outputs, workers, store)
        commit()

    def delete() -> None:
        writer.store.check_lease()
        store.delete_finished(set())

    if workers.is_main:
        writer.start(delete)


def _evaluate_outstanding(
    state: TrainingState, outputs: TrainingOutputs, workers: Workers, store: EvaluationStore
) -> None:
    """Evaluate all requests of the state; its own weights and facts are put back."""
    own = {name: one.clone() for name, one in state.ema.state_dict().items()}
    facts, requests = state.facts, state.outstanding
    try:
        for request in requests:
            weights = own  # of the run's step; they need not be read
            if request["step"] != state.step:
                found = _read_by_all(workers, store, request)
                if found is None:
                    continue
                weights = found
            state.ema.load_state_dict(weights)
            state.facts = _with_history(facts, request)
            draw_requested(outputs, request)
    finally:
        state.ema.load_state_dict(own)
        state.facts = facts
    state.outstanding = []


def _read_by_all(workers: Workers, store: EvaluationStore, request: Request) -> Tensors | None:
    """The weights of a request; None, with a line, where a worker finds them missing or damaged.

    Else one of them would raise alone, and the others wait for it.
    """
    weights: Tensors = {}

    def read() -> None:
        weights.update(store.weights(request["step"]))

    try:
        agreed(workers, read)
    except CheckpointError as error:
        if workers.is_main:
            log.warning(
                "evaluation of step %d is given up: %s; the run goes on without its %s",
                request["step"],
                brief(error),
                " and ".join(request["outputs"]),
            )
        return None
    return weights


def _with_history(facts: dict[str, Any], request: Request) -> dict[str, Any]:
    """Facts of the run, with initial weights and changes as they were at the request."""
    own = {key: value for key, value in facts.items() if key not in run_config.run_history(facts)}
    return {**own, **request["history"]}
