"""Options of optimisation: batches, Adam and AdamW, EMA, precision, checkpoints."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ddpm_ray.config.ema_widths import wrong_decays, wrong_snapshots
from ddpm_ray.config.learning_rate import TO_ZERO, wrong_decay, wrong_warm_up
from ddpm_ray.config.option_fields import option, shown
from ddpm_ray.config.reading.former_keys import Former

CompileMode: TypeAlias = Literal["off", "default", "reduce-overhead", "max-autotune"]
OF_DDP = {"gradient_compression": "none", "ddp_bucket_mb": 0.0, "ddp_static_graph": False}
"""Options without effect unless reduction is mean, with their defaults."""
FORMER_COMPILE = Former(  # a boolean, as values and as text on the command line
    choices=dict.fromkeys((True, "true", "True", "yes", "on"), "default")
    | dict.fromkeys((False, "false", "False", "no"), "off")
)


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation: batches, Adam, EMA, precision and checkpoints."""

    steps: int = option(800_000, "optimiser steps of the whole run, at most", at_least=1)
    core_seconds: float = option(
        0.0,
        "end the run once its steps have taken this many core-seconds: CPU time of all workers, or "
        "wall time on their GPUs, earlier starts included; 0: only `steps` ends it",
        at_least=0,
    )
    init_from: str = option(
        "",
        "trained model to begin with, for fine-tuning: folder of a run or of one checkpoint, or a "
        "local diffusers folder, of a pipeline or of an AutoencoderKL; empty: random weights",
        defines_run=True,
    )
    init_from_ema: str = option(
        "ema", "init_from: the EMA whose weights are taken, as ema-0.999", defines_run=True
    )
    init_from_skip: tuple[str, ...] = option(
        (),
        "init_from: prefixes of tensors that are not taken, as [label.,norm_out.]",
        defines_run=True,
    )
    global_batch_size: int = option(
        128, "images per optimiser step, all workers together", at_least=1, defines_run=True
    )
    micro_batch_size: int = option(
        0,
        "images per forward pass of a worker (gradient accumulation); 0: its whole share",
        at_least=0,
    )
    learning_rate: float = option(
        2e-4, "learning rate of Adam after the warm-up", above=0, defines_run=True, may_change=True
    )
    adam_beta1: float = option(
        0.9,
        "Adam: decay of the mean of gradients",
        at_least=0,
        below=1,
        defines_run=True,
        may_change=True,
    )
    adam_beta2: float = option(
        0.999,
        "Adam: decay of the mean of squared gradients",
        at_least=0,
        below=1,
        defines_run=True,
        may_change=True,
    )
    warmup_steps: int = option(
        0,
        "steps of linear warm-up of the learning rate from 0",
        at_least=0,
        defines_run=True,
        may_change=True,
    )
    warmup_images: int = option(
        0,
        "images of linear warm-up; set this or warmup_steps",
        at_least=0,
        defines_run=True,
        may_change=True,
    )
    learning_rate_decay: Literal["none", "cosine", "inverse_sqrt", "linear"] = option(
        "none",
        "how the learning rate falls after the warm-up; cosine, linear: to 0 at training.steps, "
        "which a continued run must then keep",
        defines_run=True,
        may_change=True,
    )
    learning_rate_reference_images: int = option(
        0,
        "inverse_sqrt: images until the learning rate falls; after n times as many it is divided "
        "by sqrt(n)",
        at_least=0,
        defines_run=True,
        may_change=True,
    )
    weight_decay: float = option(
        0.0,
        "weight decay of AdamW on matrices and convolution kernels; 0: Adam",
        at_least=0,
        defines_run=True,
        may_change=True,
    )
    max_grad_norm: float = option(
        1.0, "global gradient norm to clip to", above=0, defines_run=True, may_change=True
    )
    reduction: Literal["mean", "elastic"] = option(
        "mean",
        "how gradients are averaged; elastic: bit-equal on any number of workers, slower",
        defines_run=True,
    )
    reduction_slots: int = option(
        8,
        "elastic: number of parts of the batch, and the largest number of workers; power of 2",
        at_least=1,
        defines_run=True,
    )
    on_divergence: Literal["stop", "skip", "rewind"] = option(
        "stop",
        "on a gradient spike or NaN, read about once a second: stop the run, skip the step, or "
        "rewind to the checkpoint",
    )
    spike_factor: float = option(
        0.0,
        "a gradient norm above this multiple of the median of 128 steps is a spike; 0: off",
        at_least=0,
    )
    ema_decay_per_step: float = option(
        0.9999,
        "EMA decay per step of the sampling weights; 0: use ema_half_life_images",
        at_least=0,
        below=1,
        defines_run=True,
        may_change=True,
    )
    ema_half_life_images: int = option(
        0,
        "EMA half-life in images; set this or ema_decay_per_step",
        at_least=0,
        defines_run=True,
        may_change=True,
    )
    ema_ramp: bool = option(
        True,
        "limit the EMA decay of early steps to (1 + step) / (10 + step)",
        defines_run=True,
        may_change=True,
    )
    ema_more_decays: tuple[float, ...] = option(
        (),
        "decays per step of additional EMAs, saved in checkpoints as ema-<decay>",
        defines_run=True,
    )
    ema_snapshot_widths: tuple[float, ...] = option(
        (),
        "relative widths (sigma_rel) of the EMA snapshots for the job average, as [0.05,0.1]",
        defines_run=True,
    )
    ema_snapshot_every_steps: int = option(0, "steps between EMA snapshots; 0: none", at_least=0)
    gradient_compression: Literal["none", "bf16"] = option(
        "none",
        "reduction=mean: bf16 halves the bytes that workers exchange, and rounds their sums",
        defines_run=True,
        may_change=True,
    )
    ddp_bucket_mb: float = option(
        0.0,
        "reduction=mean: MB of gradients that workers average in one exchange; 0: DDP's default, "
        "25, and 1 for the first",
        at_least=0,
    )
    ddp_static_graph: bool = option(
        False,
        "reduction=mean: let DDP assume that each step uses the same operations (its static_graph)",
    )
    precision: Literal["fp32", "bf16", "bf16_weights"] = option(
        "fp32",
        "arithmetic of the network; bf16_weights: bf16 copies of the weights, while optimiser and "
        "checkpoints keep fp32, for GPUs with bf16 units; bf16: autocast, for runs that began so",
        defines_run=True,
        may_change=True,
    )
    channels_last: bool = option(False, "NHWC memory layout; faster on GPUs with bf16")
    deterministic: bool = option(
        False,
        "deterministic algorithms of torch, cuDNN and NCCL, for bit-equal GPU runs; slower",
    )
    compile: CompileMode = option(
        "off",
        "mode of torch.compile, faster on GPUs after minutes of compilation; reduce-overhead, "
        "max-autotune: with CUDA graphs, for small batches; true and false mean default and off",
        formerly=FORMER_COMPILE,
    )
    compile_fallback: bool = option(
        False, "compile: train without it, with a warning, on workers without a compiler"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    profile_steps: tuple[int, ...] = option(
        (),
        "first and last step of a torch.profiler trace, as [100,105], which becomes an artifact of "
        "the MLflow run; empty: none",
    )
    log_every_steps: int = option(
        50, "steps per logged row of throughput and of loss by log-SNR band", at_least=1
    )
    grid_every_steps: int = option(
        5000, "steps between sample grids; 0: no grid, not even at the end", at_least=0
    )
    checkpoint_every_steps: int = option(1000, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = option(
        3,
        "number of newest checkpoints to keep, in addition to the one that the run continued from",
        at_least=2,
    )
    keep_every_steps: int = option(
        0,
        "steps between checkpoints that are never deleted, a multiple of checkpoint_every_steps; "
        "0: none",
        at_least=0,
    )

    @property
    def decays_to_zero(self) -> bool:
        """Whether the learning rate is a function of `steps`."""
        return self.learning_rate_decay in TO_ZERO

    def problems(self) -> Iterator[str]:
        """Yield a line for keys that exclude each other, and for invalid slots and EMA widths."""
        yield from wrong_warm_up(
            self.warmup_steps,
            self.warmup_images,
            self.learning_rate_decay,
            self.steps,
            self.global_batch_size,
        )
        if bool(self.ema_decay_per_step) == bool(self.ema_half_life_images):
            yield (
                f"training.ema_half_life_images is {self.ema_half_life_images} and "
                f"training.ema_decay_per_step {self.ema_decay_per_step}; set exactly one of the "
                f"two and the other to 0"
            )
        if not self.init_from and self.init_from_skip:
            yield "training.init_from_skip names tensors, but training.init_from is empty; set both"
        every = max(1, self.checkpoint_every_steps)  # 0 is reported by its range
        if rest := self.keep_every_steps % every:
            near = self.keep_every_steps - rest or every
            yield (
                f"training.keep_every_steps is {self.keep_every_steps}; it must be a multiple of "
                f"training.checkpoint_every_steps {every}: try {near}"
            )
        for key, default in OF_DDP.items():
            if self.reduction == "elastic" and (value := getattr(self, key)) != default:
                yield (
                    f"training.{key} is {shown(value)} and training.reduction elastic, which does "
                    f"not use DDP: set one of the two to its default"
                )
        if self.ddp_static_graph and self.micro_batch_size:
            yield (
                f"training.ddp_static_graph is true and training.micro_batch_size "
                f"{self.micro_batch_size}, whose gradients DDP cannot add up then: set one of the "
                f"two to its default"
            )
        yield from wrong_decay(
            self.learning_rate_decay, self.learning_rate_reference_images, self.core_seconds
        )
        yield from self._profile_problems()
        yield from wrong_decays("training.ema_more_decays", self.ema_more_decays)
        yield from wrong_snapshots(self.ema_snapshot_widths, self.ema_snapshot_every_steps)
        if self.reduction == "elastic" and self.reduction_slots > 0:
            slots, batch = self.reduction_slots, self.global_batch_size
            if slots & (slots - 1) or batch % slots:
                yield (
                    f"training.reduction_slots is {slots}; it must be a power of 2 that divides "
                    f"training.global_batch_size {batch}: try {math.gcd(batch, 2**30)}"
                )

    def _profile_problems(self) -> Iterator[str]:
        match self.profile_steps:
            case ():
                return
            case (first, last) if 1 <= first <= last <= self.steps:
                return
        yield (
            f"training.profile_steps is {list(self.profile_steps)}; it names the first and the "
            f"last step of the trace, of 1 to training.steps {self.steps}: try [100,105]"
        )
