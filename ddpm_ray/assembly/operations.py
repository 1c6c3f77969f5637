"""The operations of a training step, and how well a worker's device is used."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_ray.assembly.diffusion import conditioning_spec
from ddpm_ray.assembly.networks import network
from ddpm_ray.collectives import Workers
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.models.contrastive import ContrastiveEncoders
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.prior import Prior
from ddpm_ray.models.text_encoder import FrozenTextSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.training.step_clock import StepClock
from ddpm_ray.training.throughput import DeviceUse, peak_tflops

PASSES = 3  # the backward pass multiplies twice for each product of the forward pass


def training_operations(config: RunConfig, image_shape: ImageShape) -> int:
    """Operations of the run's network in a training step, for one image [H, W, C].

    A multiplication and its addition count as two. As usual for model FLOP utilisation (Chowdhery
    et al. 2022, arXiv:2204.02311, appendix B), only matrix products and convolutions count, and
    nothing that is computed twice: no recomputed activations, no self-conditioning pass. A
    discriminator, the network of a perceptual loss and a frozen text encoder do not count either.
    """
    height, width, channels = image_shape
    if crop := config.objective.low_resolution_crop:
        height = width = crop
    with torch.device("meta"):
        model = network(config, image_shape)
        x = torch.empty(1, channels, height, width)
        # Attention as plain products: the counter does not know every fused kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _forward(config, model, x)
    return PASSES * int(counter.get_total_flops())


def _forward(config: RunConfig, model: nn.Module, x: Tensor) -> None:
    """Call the network on a tensor of images of the meta device."""
    if isinstance(model, Autoencoder):
        model.decode(model.encode(x).mean)
    elif isinstance(model, ContrastiveEncoders):
        model(x, model.text.null_tokens[None])
    elif config.traits.predicts_labels:
        model(x, torch.ones(1, dtype=torch.int64))
    else:
        takes = conditioning_spec(config)
        text = model.spec.text if isinstance(model, UNet | DiT | Prior) else None
        states, pooled = None, None
        if isinstance(text, FrozenTextSpec):
            states = torch.empty(1, len(text.null_tokens), text.width)
            pooled = torch.empty(1, text.pooled_width)
        given = Conditioning(
            text_states=states,
            text_pooled=pooled,
            labels=torch.zeros(1, dtype=torch.int64) if takes.num_classes else None,
            estimate=x if takes.self_conditioning else None,
            low_resolution=x if takes.low_resolution_pixels else None,
        )
        model(x, torch.ones(1, dtype=torch.int64), takes.completed(given, x))


def device_use(config: RunConfig, image_shape: ImageShape, workers: Workers) -> DeviceUse | None:
    """The measurement of the main worker's device, on images [H, W, C]; None on other workers."""
    if not workers.is_main:
        return None
    device, stated = workers.device, config.tracking.peak_tflops
    # Counting imports 800 modules of torch, 4.5 s of CPU: not at each start of a run on CPUs.
    counts = device.type == "cuda" or stated > 0
    operations = training_operations(config, image_shape) if counts else 0
    return DeviceUse(StepClock(device), device, operations, peak_tflops(device, stated))
