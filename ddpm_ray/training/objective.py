"""The training objective of denoisers and classifiers: losses of noisy images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ddpm_ray import counter_rng
from ddpm_ray.choices import ModelVariance
from ddpm_ray.collectives import Workers
from ddpm_ray.config.objective import Loss
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.loader import Batch
from ddpm_ray.diffusion import loss_weighting, losses
from ddpm_ray.diffusion.conditioning import NO_LABEL
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule, add_noise
from ddpm_ray.diffusion.x0_estimator import self_conditioning_estimate
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.gradient_accumulation import GradientAccumulation, Losses
from ddpm_ray.training.noising import NoisingRecipe, NoisyBatch


@dataclass(frozen=True)
class Objective:
    """The configured loss and how its gradient is computed."""

    noising: NoisingRecipe
    parameterization: Parameterization
    loss: Loss = "simple"
    variance: ModelVariance = "fixed"
    vlb_weight: float = 0.001
    weight: Tensor | None = None  # [T+1] of the squared error; None: 1
    uncertainty: Callable[[Tensor], Tensor] | None = None  # t -> log of the loss expected there
    classifies: bool = False  # the network is a classifier: cross entropy of its logits
    reseed_dropout: bool = False
    bf16: bool = False  # autocast
    weights: Bf16Weights | None = None  # that the network computes with
    slots: int = 0  # slots of a global batch, see deterministic_allreduce.py; 0: mean over workers
    cuda_graphs: bool = False  # as in GradientAccumulation

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return self.parameterization.schedule

    def backward(
        self,
        network: nn.Module,
        batch: Batch,
        step: int,
        workers: Workers,
        micro_batch: int,
    ) -> Losses:
        """Add the gradient of the global batch's mean loss to the parameters of `network`.

        Arguments are as in `TrainingObjective.backward`.
        """
        return GradientAccumulation(
            network,
            partial(self._part, network, step, workers.device),
            step,
            workers,
            slots=self.slots,
            cuda_graphs=self.cuda_graphs,
            dropout_seed=self.noising.seed if self.reseed_dropout else None,
            weights=[self.weights] if self.weights else (),
        ).backward(batch, micro_batch)

    def log_snr(self, t: Tensor) -> Tensor:
        """Log-SNR [b] float64 at the noise levels of losses."""
        return self.schedule.log_snr(t)

    def _part(
        self,
        network: nn.Module,
        step: int,
        device: torch.device,
        batch: Batch,
        positions: Tensor,
    ) -> tuple[Losses, Tensor]:
        """Losses of a micro-batch of batch `step`, and the values [b] that are minimised."""
        noisy = self.noising.noisy_batch(batch, step, positions, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.losses(network, noisy, step)
            weighted = self.weighted(loss, noisy)
        none = loss.new_empty(len(loss), 0)
        return Losses(loss.detach(), noisy.t, none), weighted

    def losses(self, network: nn.Module, noisy: NoisyBatch, step: int) -> Tensor:
        """Unweighted losses [b] float32 of the images of batch `step`."""
        x_0, t, noise = noisy.x_0, noisy.t, noisy.noise
        if self.classifies:  # (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4)
            labels = noisy.conditioning.labels
            assert labels is not None  # a classifier's config has classes
            logits = network(add_noise(self.schedule, x_0, t, noise), t)
            return F.cross_entropy(  # 0 for an image without a label
                logits.float(), labels, reduction="none", ignore_index=NO_LABEL
            )
        denoise = self._denoise(network, noisy, step)
        if self.loss == "simple" or self.variance == "fixed":
            return losses.simple_loss(
                denoise, self.schedule, x_0, t, noise, parameterization=self.parameterization
            )
        if self.loss == "vlb":
            return losses.vlb_loss(
                denoise, self.parameterization, x_0, t, noise, variance=self.variance
            )
        return losses.hybrid_loss(
            denoise,
            self.parameterization,
            x_0,
            t,
            noise,
            variance=self.variance,
            vlb_weight=self.vlb_weight,
        )

    def weighted(self, loss: Tensor, noisy: NoisyBatch) -> Tensor:
        """Losses [b] times their loss weights and importance weights: what is minimised."""
        if self.uncertainty is not None:
            loss = loss_weighting.uncertain(loss, self.uncertainty(noisy.t))
        if self.weight is not None:
            loss = loss * self.weight[noisy.t].to(loss)
        return loss if noisy.importance is None else loss * noisy.importance.to(loss)

    def _denoise(self, network: nn.Module, noisy: NoisyBatch, step: int) -> Denoise:
        """denoise(x_t, t): the network with its conditioning bound."""
        conditioning = noisy.conditioning
        if self.noising.takes.self_conditioning:
            estimate = self._estimate(network, noisy, step)
            conditioning = replace(conditioning, estimate=estimate)
        schedule, more = self.schedule, noisy.perturbation

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            """Model output for x_t, after input perturbation and input scaling."""
            if more is not None:
                x_t = x_t + (1 - schedule.at(t, x_t)).sqrt().to(x_t) * more
            model_output: Tensor = network(self.parameterization.scaled(x_t, t), t, conditioning)
            return model_output

        return denoise

    def _estimate(self, network: nn.Module, noisy: NoisyBatch, step: int) -> Tensor:
        """Self-conditioning input: an estimate of x_0 in half of the steps (no gradient), else 0.

        (Chen et al. 2022, arXiv:2208.04202, section 3.2 and algorithm 1.) The choice is per step,
        not per image, so that the other half needs no second forward pass.
        """
        zeros = torch.zeros_like(noisy.x_0)
        if counter_rng.derived_seed(self.noising.seed, Purpose.SELF_CONDITIONING, step, 0) % 2:
            return zeros
        inner = network.module if isinstance(network, DistributedDataParallel) else network
        x_t = add_noise(self.schedule, noisy.x_0, noisy.t, noisy.noise)
        with torch.no_grad():
            model_output = inner(
                self.parameterization.scaled(x_t, noisy.t),
                noisy.t,
                replace(noisy.conditioning, estimate=zeros),
            )
        clip = self.noising.codec.clip()
        return self_conditioning_estimate(self.parameterization, x_t, noisy.t, model_output, clip)
