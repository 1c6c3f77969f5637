"""Build the diffusion objects from the options: one `match` per choice."""

from functools import partial
from typing import TypedDict, assert_never

import torch
from torch import Tensor, nn

from ddpm_ray.assembly.compilation import missing_compiler, uses_cuda_graphs
from ddpm_ray.assembly.run_config import saved_codec, saved_tokenizer
from ddpm_ray.config.objective import ObjectiveConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.schedule import ScheduleConfig
from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion import loss_weighting, schedules, timestep_sampling
from ddpm_ray.diffusion.conditioning import Network
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.timestep_sampling import Distribution
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.unet import UNet
from ddpm_ray.sampling.conditioning import ConditioningSpec, ImageEmbedder
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import sampling_plan as sampling_plan
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.noising import ChooseSteps, NoisingRecipe
from ddpm_ray.training.objective import Objective
from ddpm_ray.training.state import TrainingState


def noise_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The noise schedule of the forward process."""
    alpha_bar = _alpha_bar(config)
    if config.zero_terminal_snr:
        alpha_bar = schedules.zero_terminal_snr(alpha_bar)
    return NoiseSchedule(alpha_bar)


def _alpha_bar(config: ScheduleConfig) -> Tensor:
    steps, start, end = config.num_steps, config.beta_start, config.beta_end
    match config.kind:
        case "linear":
            return schedules.linear(steps, start, end, rescale=config.rescale)
        case "scaled_linear":
            return schedules.scaled_linear(steps, start, end, rescale=config.rescale)
        case "constant":
            return schedules.constant(steps, end)
        case "one_over_t":
            return schedules.one_over_t(steps)
        case "warmup":
            return schedules.warmup(steps, start, end, config.warmup_share)
        case "cosine":
            return schedules.cosine(steps, config.offset, config.max_beta)
        case "sigmoid":
            return schedules.sigmoid(
                steps, config.sigmoid_start, config.sigmoid_end, config.sigmoid_tau, config.max_beta
            )
        case "laplace":
            return schedules.laplace(
                steps, config.laplace_mean, config.laplace_scale, config.max_beta
            )
        case "edm":
            return schedules.edm(steps, config.sigma_min, config.sigma_max, config.rho)
        case "betas":
            return schedules.from_betas(config.betas)
        case _:
            assert_never(config.kind)


def model_parameterization(config: ObjectiveConfig, schedule: NoiseSchedule) -> Parameterization:
    """The parameterization of the model output."""
    return Parameterization.of(config.prediction, schedule, config.sigma_data)


def denoiser(
    config: RunConfig,
    network: Network,
    device: torch.device | str,
    codec: Codec,
    tokenizer: Tokenizer | None = None,
    image_encoder: ImageEmbedder | None = None,
) -> Denoiser:
    """The denoiser of `network`, which must be on `device` and diffuses what `codec` encodes."""
    return Denoiser(
        network,
        model_parameterization(config.objective, noise_schedule(config.schedule).to(device)),
        config.objective.variance,
        conditioning_spec(config, tokenizer, image_encoder),
        codec=codec,
    )


def conditioning_spec(
    config: RunConfig,
    tokenizer: Tokenizer | None = None,
    image_encoder: ImageEmbedder | None = None,
) -> ConditioningSpec:
    """The conditioning that the network takes, with the encoders of its texts and images."""
    return ConditioningSpec(
        config.model.num_classes,
        config.objective.self_conditioning,
        config.objective.low_resolution_pixels,
        config.objective.inpainting_masks,
        tokenizer,
        image_encoder,
    )


def memory_format(config: TrainingConfig) -> torch.memory_format:
    """Memory format of images and convolution weights."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


class GradientSettings(TypedDict):
    """Fields of every objective: how its network computes, and how gradients are summed."""

    bf16: bool
    weights: Bf16Weights | None
    slots: int
    cuda_graphs: bool


def gradient_settings(config: TrainingConfig, state: TrainingState) -> GradientSettings:
    """The settings of the objective of `state`'s network."""
    return GradientSettings(
        bf16=config.precision == "bf16",
        weights=state.weights,
        slots=config.reduction_slots if config.reduction == "elastic" else 0,
        cuda_graphs=uses_cuda_graphs(config.compile),
    )


def objective(
    config: RunConfig,
    state: TrainingState,
    device: torch.device,
    image_encoder: ImageEmbedder | None = None,
) -> Objective:
    """The training objective of `state`'s network, which is given embeddings of `image_encoder`."""
    wanted = config.objective
    parameterization = model_parameterization(wanted, noise_schedule(config.schedule).to(device))
    return Objective(
        noising_recipe(config, parameterization, state, image_encoder),
        parameterization,
        loss=wanted.loss,
        variance=wanted.variance,
        vlb_weight=wanted.vlb_weight,
        weight=weight(wanted, parameterization),
        uncertainty=uncertainty(state.model) if wanted.weighting == "uncertainty" else None,
        classifies=config.traits.predicts_labels,
        reseed_dropout=config.model.dropout > 0,
        **gradient_settings(config.training, state),
    )


def uncertainty(network: nn.Module) -> nn.Module:
    """The module of a denoiser that learns the expected loss at each t."""
    assert isinstance(network, UNet | DiT)
    assert network.uncertainty is not None  # built with it
    return network.uncertainty


def noising_recipe(
    config: RunConfig,
    parameterization: Parameterization,
    state: TrainingState,
    image_encoder: ImageEmbedder | None = None,
) -> NoisingRecipe:
    """The recipe that makes noisy training batches from images; `state` names their codec."""
    wanted = config.objective
    return NoisingRecipe(
        config.seed,
        choice_of_steps(config, parameterization.schedule, state),
        conditioning_spec(config, saved_tokenizer(state.facts), image_encoder),
        flip=config.data.flip,
        memory_format=memory_format(config.training),
        label_dropout=0.0 if config.traits.predicts_labels else wanted.label_dropout,
        embedding_dropout=config.embedding.dropout if config.embedding.encoder else 0.0,
        offset_noise=wanted.offset_noise,
        input_perturbation=wanted.input_perturbation,
        low_resolution_noise=wanted.low_resolution_noise,
        low_resolution_blur=wanted.low_resolution_blur,
        low_resolution_crop=wanted.low_resolution_crop,
        codec=saved_codec(state.facts),
        compiled=_compiles_noising(config.training, state),
    )


def _compiles_noising(training: TrainingConfig, state: TrainingState) -> bool:
    """Whether the noising is compiled: on GPUs, where hundreds of launches become a few.

    On a CPU it saves little, and the noise would differ by up to 5e-7 from that of earlier runs.
    """
    device = next(state.model.parameters()).device
    on = training.compile != "off" and device.type == "cuda"
    return on and not missing_compiler(device)


def choice_of_steps(
    config: RunConfig, schedule: NoiseSchedule, state: TrainingState
) -> ChooseSteps:
    """The distribution from which t is drawn at each position of the global batch."""
    wanted, seed, num_steps = config.objective, config.seed, schedule.num_steps
    batch = config.training.global_batch_size
    match wanted.timesteps:
        case "uniform":
            return lambda step, at: (timestep_sampling.uniform(seed, step, at, num_steps), None)
        case "low_discrepancy":
            spread = partial(timestep_sampling.low_discrepancy, num_steps=num_steps, batch=batch)
        case "antithetic":
            spread = partial(timestep_sampling.antithetic, num_steps=num_steps)
        case "log_normal":
            table = timestep_sampling.log_normal(
                schedule, wanted.log_sigma_mean, wanted.log_sigma_deviation
            )
            fixed = Distribution.of(table).to(schedule.alpha_bar.device)
            return lambda step, at: (timestep_sampling.weighted(seed, step, at, fixed)[0], None)
        case "second_moment":
            moments = state.moments
            assert moments is not None  # made with the state
            return lambda step, at: timestep_sampling.weighted(
                seed, step, at, Distribution.of(moments.probability())
            )
        case _:
            assert_never(wanted.timesteps)
    return lambda step, at: (spread(seed, step, at), None)


def weight(config: ObjectiveConfig, parameterization: Parameterization) -> Tensor | None:
    """The loss weight of each t, [T+1] on the schedule's device; None: 1 everywhere."""
    match config.weighting:
        case "unit" | "uncertainty":
            return None
        case "min_snr":
            return loss_weighting.min_snr(parameterization, config.gamma)
        case "soft_min_snr":
            return loss_weighting.soft_min_snr(parameterization, config.gamma)
        case "p2":
            return loss_weighting.p2(parameterization, config.p2_k, config.p2_gamma)
        case "edm":
            return loss_weighting.edm_weight(parameterization, config.sigma_data)
        case _:
            assert_never(config.weighting)
