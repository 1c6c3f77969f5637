"""The operations of a run on its device, as small separate cases, for a fake and a real GPU.

A case takes a device and raises where something does not work on it.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.embedding_cases import STEPS, embedding_cases
from benchmarks.gpu.tiny import SHAPE, SIDE, Notes, config_of, denoiser_of, packed, pixels, run_of
from benchmarks.gpu.tiny_keys import (
    ADVERSARY,
    AUTOENCODER,
    BF16,
    CONTRASTIVE,
    LATENTS,
    PRIOR,
    STORED,
    TEXT,
    TRANSFORMER,
)
from ddpm_ray.assembly import checkpoint_loading, diffusion, networks, scoring, training_run
from ddpm_ray.assembly.inputs_of_data import with_inputs_of_data
from ddpm_ray.collectives import Workers
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.evaluation import memorisation, probability_flow_likelihood, sample_quality
from ddpm_ray.evaluation.feature_metrics import OptionalMetrics
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.likelihood_over_dataset import flow_likelihood
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.evaluation.vlb_over_dataset import vlb_bits_per_dim
from ddpm_ray.models.classifier import NoisyClassifier
from ddpm_ray.sampling import guidance_models
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import SamplingPlan, draw
from ddpm_ray.training import validation_loss
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.ema_snapshots import SNAPSHOTS, SnapshotStore, averaged
from ddpm_ray.training.loop import report, save, take_step
from ddpm_ray.training.rejected_steps import handle_rejected
from ddpm_ray.training.run import Run
from ddpm_ray.training.sample_grids import SampleGridLogger

DIT = ["model.network=dit"]
LABELS = ["model.num_classes=4"]
LEARNED = ["objective.variance=learned_range", "objective.loss=hybrid"]
VLB = ["objective.variance=learned", "objective.loss=vlb"]

Case: TypeAlias = Callable[[torch.device], None]

OBJECTIVES: dict[str, list[str]] = {
    "plain": [],
    "bf16": ["training.precision=bf16"],
    "bf16 channels_last": ["training.precision=bf16", "training.channels_last=true"],
    "bf16_weights": [BF16],
    "bf16_weights channels_last micro batches": [
        BF16,
        "training.channels_last=true",
        "training.micro_batch_size=4",
    ],
    "bf16_weights uncertainty elastic": [
        BF16,
        "objective.weighting=uncertainty",
        "training.reduction=elastic",
        "training.reduction_slots=4",
    ],
    "dropout": ["model.dropout=0.1"],
    "labels": [*LABELS, "objective.label_dropout=0.1"],
    "low_discrepancy": ["objective.timesteps=low_discrepancy"],
    "antithetic": ["objective.timesteps=antithetic"],
    "log_normal": ["objective.timesteps=log_normal"],
    "second_moment": ["objective.timesteps=second_moment", *VLB],
    "offset_noise": ["objective.offset_noise=0.1"],
    "input_perturbation": ["objective.input_perturbation=0.1"],
    "self_conditioning": ["objective.self_conditioning=true"],
    "low_resolution": ["objective.low_resolution_pixels=4", "objective.low_resolution_noise=0.1"],
    "low_resolution crops and blur": [
        "objective.low_resolution_pixels=4",
        "objective.low_resolution_blur=0.6",
        "objective.low_resolution_crop=4",
    ],
    "inpainting_masks": ["objective.inpainting_masks=true"],
    "learned_range hybrid": LEARNED,
    "learned vlb": VLB,
    "uncertainty": ["objective.weighting=uncertainty"],
    "min_snr": ["objective.weighting=min_snr"],
    "soft_min_snr": ["objective.weighting=soft_min_snr"],
    "p2": ["objective.weighting=p2"],
    "edm": ["objective.prediction=edm", "objective.weighting=edm"],
    "x_0": ["objective.prediction=x_0"],
    "v zero_terminal_snr": ["objective.prediction=v", "schedule.zero_terminal_snr=true"],
    "mean": ["objective.prediction=mean"],
    "score": ["objective.prediction=score"],
    "elastic": ["training.reduction=elastic", "training.reduction_slots=4"],
    "micro batches": ["training.micro_batch_size=4"],
    "gradient_checkpointing": ["training.gradient_checkpointing=true"],
    "classifier": [
        "task=classifier",
        *LABELS,
        "training.grid_every_steps=0",
        "evaluation.num_images=0",
        "evaluation.validation_every_steps=0",
    ],
    "classifier bf16_weights": [
        BF16,
        "task=classifier",
        *LABELS,
        "training.grid_every_steps=0",
        "evaluation.num_images=0",
        "evaluation.validation_every_steps=0",
    ],
    "head_channels": ["model.head_channels=4"],
    "dit": DIT,
    "dit bf16 channels_last": [*DIT, "training.precision=bf16", "training.channels_last=true"],
    "dit bf16_weights gradient_checkpointing": [
        *DIT,
        BF16,
        "training.gradient_checkpointing=true",
    ],
    "dit dropout labels gradient_checkpointing": [
        *DIT,
        *LABELS,
        "model.dropout=0.1",
        "training.gradient_checkpointing=true",
    ],
    "dit self_conditioning uncertainty elastic": [
        *DIT,
        "objective.self_conditioning=true",
        "objective.weighting=uncertainty",
        "training.reduction=elastic",
        "training.reduction_slots=4",
    ],
    "text": [*TEXT, "objective.label_dropout=0.5"],
    "text dit bf16_weights": [*DIT, *TEXT, BF16],
    "text transformer bf16_weights": [*TEXT, *TRANSFORMER, BF16],
    "text transformer bf16 channels_last gradient_checkpointing": [
        *TEXT,
        *TRANSFORMER,
        "training.precision=bf16",
        "training.channels_last=true",
        "training.gradient_checkpointing=true",
    ],
    "contrastive": CONTRASTIVE,
    "contrastive infonce bf16_weights micro batches": [
        *CONTRASTIVE,
        "contrastive.loss=infonce",
        BF16,
        "training.micro_batch_size=4",
    ],
    "three averages": ["training.ema_more_decays=[0.999,0.99]"],
    "autoencoder": AUTOENCODER,
    "autoencoder bf16 channels_last": [
        *AUTOENCODER,
        "training.precision=bf16",
        "training.channels_last=true",
    ],
    "autoencoder adversary bf16_weights": [*AUTOENCODER, *ADVERSARY, BF16],
    "autoencoder adversary": [*AUTOENCODER, *ADVERSARY],
    "autoencoder adversary elastic": [
        *AUTOENCODER,
        *ADVERSARY,
        "training.reduction=elastic",
        "training.reduction_slots=4",
    ],
}

SAMPLERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "ddim": ([], {}),
    "ddim eta": ([], {"eta": 0.5}),
    "ddim eta 1 fixed_large": ([], {"eta": 1.0, "variance": "fixed_large"}),
    "ddim unclipped": ([], {"clip": False}),
    "ddim quantile": ([], {"dynamic_quantile": 0.99}),
    "ancestral fixed_small": ([], {"sampler": "ancestral"}),
    "ancestral fixed_large": ([], {"sampler": "ancestral", "variance": "fixed_large"}),
    "ancestral learned": (VLB, {"sampler": "ancestral", "variance": "learned"}),
    "ancestral learned_range": (LEARNED, {"sampler": "ancestral", "variance": "learned"}),
    "ancestral beside learned": (LEARNED, {"sampler": "ancestral"}),
    "dpm_solver_pp": ([], {"sampler": "dpm_solver_pp"}),
    "dpm_solver_pp_sde": ([], {"sampler": "dpm_solver_pp_sde"}),
    "unipc": ([], {"sampler": "unipc"}),
    "heun": ([], {"sampler": "heun"}),
    "plms": ([], {"sampler": "plms"}),
    "edm heun": (["objective.prediction=edm"], {"sampler": "heun"}),
    "v ddim": (["objective.prediction=v", "schedule.zero_terminal_snr=true"], {}),
    "self_conditioned": (["objective.self_conditioning=true"], {}),
    "dit ancestral learned": (
        [*DIT, *LEARNED],
        {"sampler": "ancestral", "variance": "learned"},
    ),
    "dit classifier-free": ([*DIT, *LABELS], {"labels": (1, 2), "guidance_scale": 3.0}),
    "labels in turn": (LABELS, {}),
    "classifier-free": (LABELS, {"labels": (1, 2), "guidance_scale": 3.0}),
    "classifier-free rescale": (LABELS, {"guidance_scale": 3.0, "guidance_rescale": 0.7}),
    "classifier-free interval": (
        [*LABELS, *LEARNED],
        {
            "guidance_scale": 3.0,
            "guidance_rescale": 0.7,
            "guidance_above_sigma": 0.1,
            "guidance_below_sigma": 5.0,
            "sampler": "ancestral",
            "variance": "learned",
        },
    ),
}


def cases() -> dict[str, Case]:
    """All cases by name, `<group>: <setting>`."""
    found: dict[str, Case] = {}
    for name, keys in (OBJECTIVES | STEPS).items():
        found[f"step: {name}"] = partial(_steps, keys)
    found["step: spike skipped"] = _skipped_step
    for name, (keys, plan) in SAMPLERS.items():
        found[f"sampler: {name}"] = partial(_sample, keys, plan)
    for spacing in ("uniform", "quadratic", "log_snr"):
        found[f"spacing: {spacing}"] = partial(_spacing, spacing)
    found |= {
        "guidance: classifier": partial(_classifier_guidance, False),
        "guidance: classifier, algorithm 1": partial(_classifier_guidance, True),
        "guidance: weaker model": _autoguidance,
    }
    for name, edit in EDITS.items():
        found[f"edit: {name}"] = partial(_edit, edit)
    return (
        found
        | embedding_cases()
        | {
            "edit: enlarge": _enlarge,
            "edit: inpaint conditioned": _inpaint_conditioned,
            "score: evaluation": partial(_evaluation, 24),
            "score: evaluation of few samples": partial(_evaluation, 4),
            "score: nearest images": _nearest,
            "score: bits per dimension": partial(_bits_per_dim, []),
            "score: bits per dimension, learned": partial(_bits_per_dim, LEARNED),
            "score: flow likelihood": _flow_likelihood,
            "score: flow likelihood, exact": _exact_likelihood,
            "picture: validation loss": _validation_loss,
            "picture: denoising strip": _strip,
            "picture: grid of enlarged images": _grid,
            "checkpoint: loaded to sample": _loaded,
            "checkpoint: averages of another width": _averaged,
            "checkpoint: save and restore": partial(_checkpoint, []),
            "checkpoint: decoder of latents": partial(_checkpoint, [*LATENTS, *STORED]),
            "checkpoint: prior": partial(_checkpoint, PRIOR),
            "checkpoint: autoencoder adversary": partial(_checkpoint, [*AUTOENCODER, *ADVERSARY]),
            "checkpoint: autoencoder adversary bf16_weights": partial(
                _checkpoint, [*AUTOENCODER, *ADVERSARY, BF16]
            ),
            "checkpoint: second_moment, averages, channels_last": partial(
                _checkpoint,
                [
                    *OBJECTIVES["second_moment"],
                    *OBJECTIVES["three averages"],
                    "training.channels_last=true",
                ],
            ),
        }
    )


def _steps(keys: list[str], device: torch.device) -> None:
    """A step and its row."""
    run = run_of(config_of(keys), device, 24 if AUTOENCODER[0] in keys else SIDE)
    take_step(run)
    report(run)
    assert isinstance(run.sink, Notes)
    losses = [row.metrics["train/loss"] for row in run.sink.taken]
    _require(all(map(math.isfinite, losses)), f"losses are {losses}")


def _skipped_step(device: torch.device) -> None:
    run = run_of(config_of(["training.on_divergence=skip"]), device)
    take_step(run)  # weights and their average differ
    kept = [part.clone() for part in _weights(run)]
    next(run.state.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    take_step(run)
    handle_rejected(run, run.log.read())
    report(run)
    _require(run.guard.skipped == 1, "a gradient that is no number was not skipped")
    _require(all(map(torch.equal, kept, _weights(run))), "a skipped step changed weights")


def _weights(run: Run) -> list[Tensor]:
    return [*run.state.model.parameters(), *run.state.ema.model.parameters()]


def _sample(keys: list[str], plan: dict[str, Any], device: torch.device) -> None:
    """Three images, finite and on the device."""
    config = config_of(keys)
    _, denoiser = denoiser_of(config, device)
    sampling = replace(config.sampling, sampler=plan.get("sampler", "ddim"))
    steps = diffusion.sampling_plan(sampling, denoiser.schedule).steps
    if plan.get("variance") in ("fixed_large", "learned"):  # known of every step alone
        steps = tuple(range(denoiser.schedule.num_steps, -1, -1))
    images = draw(
        denoiser, SamplingPlan(steps, replace(sampling, **plan)), torch.arange(3), SHAPE, device
    )
    _require(images.device.type == device.type, f"images lie on {images.device}")
    _require(bool(images.isfinite().all()), "images are not finite")


def _spacing(spacing: str, device: torch.device) -> None:
    """A run's own plan, made of a schedule on the device: the same as of one on the CPU."""
    config = config_of([f"sampling.spacing={spacing}"])
    _, denoiser = denoiser_of(config, device)
    there = diffusion.sampling_plan(config.sampling, denoiser.schedule)
    here = diffusion.sampling_plan(config.sampling, denoiser.schedule.to("cpu"))
    _require(there == here, f"steps are {there.steps} on {device}, {here.steps} on the CPU")


def _classifier_guidance(steps: bool, device: torch.device) -> None:
    config = config_of([])
    _, denoiser = denoiser_of(config, device)
    network = networks.network(config_of(OBJECTIVES["classifier"]), ImageShape(SIDE, SIDE, 3)).to(
        device
    )
    assert isinstance(network, NoisyClassifier)
    network.eval().requires_grad_(False)
    plan = diffusion.sampling_plan(config.sampling, denoiser.schedule)
    plan = replace(plan, settings=replace(plan.settings, labels=(1, 2), sampler="ancestral"))
    guidance_model = guidance_models.classifier_guidance(
        network, denoiser, 2.0, steps=plan.steps if steps else None
    )
    with torch.inference_mode():
        images = draw(
            replace(denoiser, guidance_model=guidance_model), plan, torch.arange(3), SHAPE, device
        )
    _require(bool(images.isfinite().all()), "images are not finite")


def _autoguidance(device: torch.device) -> None:
    config = config_of(LABELS)
    (_, strong), (_, weak) = denoiser_of(config, device), denoiser_of(config, device)
    plan = diffusion.sampling_plan(config.sampling, strong.schedule)
    guidance_model = guidance_models.autoguidance(strong, weak, 2.0)
    draw(replace(strong, guidance_model=guidance_model), plan, torch.arange(3), SHAPE, device)


def _model(keys: list[str], device: torch.device) -> TrainedModel:
    _, denoiser = denoiser_of(config_of(keys), device)
    return TrainedModel(denoiser, SHAPE, {}, device=device)


def _known(images: int = 2, side: int = SIDE) -> Any:
    return pixels(images, side).numpy()


def _mask(side: int = SIDE) -> Any:
    return np.arange(side * side).reshape(side, side) % 3 == 0


EDITS: dict[str, Callable[[TrainedModel], Any]] = {
    "inpaint": lambda model: model.inpaint(_known(), _mask(), steps=3, resamples=2, jump_length=1),
    "inpaint by replacement": lambda model: model.inpaint(
        _known(), _mask(), steps=3, method="replacement"
    ),
    "inpaint a larger image": lambda model: model.inpaint(
        _known(1, 12), _mask(12), steps=3, method="replacement"
    ),
    "outpaint": lambda model: model.outpaint(
        _known(1), left=4, steps=3, resamples=2, jump_length=1
    ),
    "image_to_image": lambda model: model.image_to_image(_known(), 0.5, steps=4),
    "interpolate": lambda model: model.interpolate(0, 1, 3, steps=3),
    "reconstruct": lambda model: model.reconstruct(_known(), steps=3, iterations=2),
}


def _edit(edit: Callable[[TrainedModel], Any], device: torch.device) -> None:
    images = edit(_model([], device))
    _require(images.dtype == np.uint8, f"images are {images.dtype}")


def _inpaint_conditioned(device: torch.device) -> None:
    model = _model(OBJECTIVES["inpainting_masks"], device)
    model.inpaint(_known(1, 12), _mask(12), steps=3)


def _enlarge(device: torch.device) -> None:
    model = _model(OBJECTIVES["low_resolution"], device)
    model.enlarge(_known(2, 4), steps=3)


def feature_net(device: torch.device) -> FeatureNet:
    """Six features of an image, and three classes: a fixed network of a few numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * SIDE * SIDE, 6, generator=generator).to(device)

    def extract(images: Tensor) -> dict[int, Tensor]:
        return {6: images.flatten(1).float() / 255 @ weight}

    return FeatureNet("digits", (6,), extract, {"weights_sha256": ""}, lambda f: f[6][:, :3])


def _evaluation(num_images: int, device: torch.device) -> None:
    """Every score of samples against data, and what the numbers depend on."""
    config, workers, net = config_of([]), Workers(0, 1, device), feature_net(device)
    _, denoiser = denoiser_of(config, device)
    with tempfile.TemporaryDirectory() as folder:
        known = reference(packed(folder), net, workers, kernel_images=8, batch_size=10)
    scores = sample_quality.evaluate_samples(
        sample_quality.SampleSet(
            denoiser,
            diffusion.sampling_plan(config.sampling, denoiser.schedule),
            image_shape=SHAPE,
            num_images=num_images,
            batch_size=10,
            weights=scoring.ema_provenance(config, 0),
        ),
        net,
        known,
        workers,
        optional_metrics=OptionalMetrics(num_images > 4, num_images > 4),
        held_out=known,
    )
    _require(all(map(math.isfinite, scores.metrics.values())), f"scores are {scores.metrics}")


def _nearest(device: torch.device) -> None:
    workers, net = Workers(0, 1, device), feature_net(device)
    with tempfile.TemporaryDirectory() as folder:
        dataset = packed(folder)
        samples = memorisation.spread(dataset, 4, workers)
        for of_features in (None, net):
            found = memorisation.nearest_images(samples, dataset, workers, of_features)
            own = torch.arange(4) * 24 // 4
            _require(torch.equal(found.position[:, 0], own), "an image is not its own nearest")


def _batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    index = torch.arange(3)
    return [(index, pixels(3), index % 4)]


def _bits_per_dim(keys: list[str], device: torch.device) -> None:
    _, denoiser = denoiser_of(config_of(keys), device)
    variance = "fixed_small" if denoiser.variance == "fixed" else denoiser.variance
    workers = Workers(0, 1, device)
    vlb_bits_per_dim(denoiser, _batches(), variance=variance, workers=workers, terms=3)


def _flow_likelihood(device: torch.device) -> None:
    _, denoiser = denoiser_of(config_of([]), device)
    flow_likelihood(denoiser, _batches(), steps=3, workers=Workers(0, 1, device))


def _exact_likelihood(device: torch.device) -> None:
    """The trace of the Jacobian without a probe, of images of four numbers."""
    _, denoiser = denoiser_of(config_of([]), device)
    x = torch.linspace(-1, 1, 8).view(2, 1, 2, 2).to(device)
    bits, _ = probability_flow_likelihood.bits_per_dim(
        denoiser.schedule, lambda x_t, t: x_t * t.view(-1, 1, 1, 1).to(x_t) / 10, x, (1, 5, 10)
    )
    _require(bool(bits.isfinite().all()), "bits are not finite")


def _validation_loss(device: torch.device) -> None:
    state, denoiser = denoiser_of(config_of([]), device)
    count = 2 * len(validation_loss.LEVELS)
    labels = torch.zeros(count, dtype=torch.int64)
    workers = Workers(0, 1, device)
    validation_loss.Validator(
        state, denoiser, Batch(pixels(count), labels), 0, 0.25, workers, None, 32
    ).validate(5)
    _require(math.isfinite(state.validation_losses[0]["loss"]), "the common loss is not finite")


def _strip(device: torch.device) -> None:
    from ddpm_ray.sampling import image_grid  # needs Pillow, the only case that does

    _, denoiser = denoiser_of(config_of([]), device)
    plan = SamplingPlan((10, 5, 0))
    image_grid.denoising_strip(denoiser, plan, torch.arange(2), SHAPE, device)


def _grid(device: torch.device) -> None:
    """A run's grid, of a network for super-resolution, which enlarges images of the data."""
    config = config_of(OBJECTIVES["low_resolution"])
    _, denoiser = denoiser_of(config, device)
    plan = diffusion.sampling_plan(config.sampling, denoiser.schedule)
    with tempfile.TemporaryDirectory() as folder:
        data = replace(config.data, cache_dir=folder)
        shown = with_inputs_of_data(denoiser, data, packed(folder), 4, device)
        SampleGridLogger(shown, plan, SHAPE, Workers(0, 1, device), folder, Notes()).log_grid(0)


def _loaded(device: torch.device) -> None:
    """Images of a run's newest checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(config_of(LABELS), device, url=f"{folder}/checkpoints")
        report(run)
        save(run)
        run.checkpoints.wait()
        images = checkpoint_loading.trained_model(folder, device).sample(2, steps=2)
    _require(len(images) == 2, f"{len(images)} images")


def _averaged(device: torch.device) -> None:
    """An average of any width, of two that a run keeps on its way."""
    keys = ["training.ema_snapshot_widths=[0.05,0.1]", "training.ema_snapshot_every_steps=1"]
    config = config_of(keys)
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(config, device, url=f"{folder}/checkpoints")
        keep = training_run.ema_snapshotter(config, run.state, run.checkpoints, folder, run.workers)
        for _ in range(2):
            take_step(run)
            keep(run.state.step)
        run.checkpoints.wait()
        store = SnapshotStore(f"{folder}/{SNAPSHOTS}")
        tensors, _ = averaged(store, run.state.ema_snapshot_steps, [0.05, 0.1], 0.07, 2)
    run.state.ema.load_state_dict(tensors)


def _checkpoint(keys: list[str], device: torch.device) -> None:
    """A step after a restart from a checkpoint ends in the bits of the run that was not ended."""
    with tempfile.TemporaryDirectory() as folder:
        side = 24 if AUTOENCODER[0] in keys else SIDE
        whole = run_of(config_of(keys), device, side, folder)
        take_step(whole)
        report(whole)
        save(whole)
        whole.checkpoints.wait()
        take_step(whole)
        again = run_of(config_of(keys), device, side, folder)
        found = CheckpointStore(folder).load()
        _require(found is not None, "no checkpoint was found")
        assert found is not None
        again.state.restore(found[1])
        take_step(again)
    pairs = zip(whole.state.model.parameters(), again.state.model.parameters(), strict=True)
    apart = [i for i, (one, other) in enumerate(pairs) if not torch.equal(one, other)]
    where = {parameter.device.type for parameter in again.state.model.parameters()}
    _require(where == {device.type}, f"restored weights lie on {where}")
    if device.type == "cpu" or not torch.cuda.is_initialized():  # a GPU promises no equal bits
        _require(not apart, f"{len(apart)} tensors differ after a restart")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise AssertionError(problem)
