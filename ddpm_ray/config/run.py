"""Options of a training run. Those of diffusion, sampling and evaluation are in their own files.

Imports nothing heavy: an invalid config is reported within two seconds, before torch or Ray load.
Configs are read by loading.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ddpm_ray.config.diffusion import ObjectiveConfig, SamplingConfig, ScheduleConfig
from ddpm_ray.config.ema_search_rules import wrong_decays, wrong_widths
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.loading import option
from ddpm_ray.config.sampling import Conditioned

MIB = 2**20


@dataclass(frozen=True)
class DataConfig:
    url: str = option("", "folder or fsspec URL of the packed shards")
    source: Literal["", "digits"] = option(
        "", "built-in data set to pack into data.url if it holds no shards yet; empty: none"
    )
    flip: bool = option(
        False, "mirror each image left-right with probability 1/2", defines_run=True
    )
    lanes: int = option(
        8, "fixed number of shard streams that form the batch; must divide it",
        at_least=1, defines_run=True,
    )  # fmt: skip
    shuffle_window_bytes: int = option(
        16 * MIB, "size of the shuffle buffer in decoded bytes, all lanes together",
        at_least=MIB, defines_run=True,
    )  # fmt: skip
    cache_bytes: int = option(
        8192 * MIB,
        "size in bytes of the node-local cache of remote shards; 0: no cache",
        at_least=0,
    )
    cache_dir: str = option("", "folder of that cache; empty: ~/.cache/ddpm-ray")


@dataclass(frozen=True)
class ModelConfig:
    kind: Literal["unet", "classifier"] = option(
        "unet", "unet: a denoiser; classifier: of noisy images, for guidance", defines_run=True
    )
    base_channels: int = option(
        128, "channels of the first resolution level", at_least=1, defines_run=True
    )
    channel_mults: tuple[int, ...] = option(
        (1, 2, 2, 2), "channels of each level as a multiple of base_channels", defines_run=True
    )
    blocks_per_level: int = option(2, "residual blocks per level", at_least=1, defines_run=True)
    attention_resolutions: tuple[int, ...] = option(
        (16,), "image sizes in pixels of the levels with self-attention", defines_run=True
    )
    dropout: float = option(
        0.0, "dropout probability in residual blocks", at_least=0, below=1, defines_run=True
    )
    groups: int = option(
        32,
        "groups of each group normalization; must divide all channel counts",
        at_least=1,
        defines_run=True,
    )
    num_classes: int = option(
        0, "class-conditional model of labels 0 to num_classes - 1; 0: unconditional", at_least=0,
        defines_run=True,
    )  # fmt: skip

    def problems(self) -> Iterator[str]:
        """Yield a line for sizes that do not fit together."""
        if not self.channel_mults or min(self.channel_mults) < 1:
            yield (
                f"model.channel_mults is {list(self.channel_mults)}; it needs one factor of at "
                f"least 1 per level, as in [1,2,2,2]"
            )
            return
        for mult in sorted(set(self.channel_mults)) if self.groups > 0 else ():
            if rest := (self.base_channels * mult) % self.groups:
                yield (
                    f"model.groups is {self.groups}; it must divide every level's channels, and "
                    f"{self.base_channels * mult} leaves {rest}: "
                    f"try {math.gcd(self.groups, self.base_channels)}"
                )
                return


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = option(800_000, "optimiser steps of the whole run", at_least=1)
    global_batch_size: int = option(
        128, "images per optimiser step, all workers together", at_least=1, defines_run=True
    )
    micro_batch_size: int = option(
        0,
        "images per forward pass of a worker (gradient accumulation); 0: its whole share",
        at_least=0,
    )
    learning_rate: float = option(
        2e-4, "learning rate of Adam after the warm-up", above=0, defines_run=True
    )
    adam_beta1: float = option(
        0.9, "Adam: decay of the mean of gradients", at_least=0, below=1, defines_run=True
    )
    adam_beta2: float = option(
        0.999, "Adam: decay of the mean of squared gradients", at_least=0, below=1, defines_run=True
    )
    warmup_steps: int = option(
        0, "steps of linear warm-up of the learning rate from 0", at_least=0, defines_run=True
    )
    warmup_images: int = option(
        0, "images of linear warm-up; set this or warmup_steps", at_least=0, defines_run=True
    )
    max_grad_norm: float = option(1.0, "global gradient norm to clip to", above=0, defines_run=True)
    reduction: Literal["mean", "elastic"] = option(
        "mean", "how gradients are averaged; elastic: bit-equal on any number of workers, slower",
        defines_run=True,
    )  # fmt: skip
    reduction_slots: int = option(
        8, "elastic: slots the batch is split into, also the most workers; power of 2",
        at_least=1, defines_run=True,
    )  # fmt: skip
    on_divergence: Literal["stop", "skip", "rewind"] = option(
        "stop",
        "on a gradient spike or NaN: stop the run, skip the step, or rewind to the checkpoint",
    )
    spike_factor: float = option(
        0.0,
        "a gradient norm above this multiple of the median of 128 steps is a spike; 0: off",
        at_least=0,
    )
    ema_decay_per_step: float = option(
        0.9999, "EMA decay per step of the sampling weights; 0: use ema_half_life_images",
        at_least=0, below=1, defines_run=True,
    )  # fmt: skip
    ema_half_life_images: int = option(
        0, "EMA half-life in images; set this or ema_decay_per_step",
        at_least=0, defines_run=True,
    )  # fmt: skip
    ema_ramp: bool = option(
        True, "limit the EMA decay of early steps to (1 + step) / (10 + step)",
        defines_run=True,
    )  # fmt: skip
    ema_more_decays: tuple[float, ...] = option(
        (),
        "decays per step of additional EMAs, saved in checkpoints as ema-<decay>",
        defines_run=True,
    )
    ema_snapshot_widths: tuple[float, ...] = option(
        (), "sigma_rel of the EMA snapshots for post-hoc EMA (jobs/average.py): [0.05,0.1]",
        defines_run=True,
    )  # fmt: skip
    ema_snapshot_every_steps: int = option(0, "steps between EMA snapshots; 0: none", at_least=0)
    precision: Literal["fp32", "bf16"] = option(
        "fp32", "arithmetic of the network (bf16: autocast); weights stay fp32", defines_run=True
    )
    channels_last: bool = option(False, "NHWC memory layout; faster on GPUs with bf16")
    deterministic: bool = option(
        False,
        "deterministic algorithms of torch, cuDNN and NCCL, for bit-equal GPU runs; slower",
    )
    compile: bool = option(False, "use torch.compile; faster on GPUs after minutes of compilation")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    log_every_steps: int = option(
        50, "steps per logged row of throughput and of loss by log-SNR band", at_least=1
    )
    grid_every_steps: int = option(
        5000, "steps between sample grids; 0: no grid, not even at the end", at_least=0
    )
    checkpoint_every_steps: int = option(1000, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = option(
        3, "newest checkpoints to keep, and the one the run continued from", at_least=2
    )

    def problems(self) -> Iterator[str]:
        """Yield a line for keys that exclude each other, and for invalid slots and EMA widths."""
        if self.warmup_steps and self.warmup_images:
            yield (
                f"training.warmup_images is {self.warmup_images} and training.warmup_steps "
                f"{self.warmup_steps}; set one of the two and leave the other 0"
            )
        if bool(self.ema_decay_per_step) == bool(self.ema_half_life_images):
            yield (
                f"training.ema_half_life_images is {self.ema_half_life_images} and "
                f"training.ema_decay_per_step {self.ema_decay_per_step}; set exactly one of the "
                f"two and the other to 0"
            )
        yield from self._average_problems()
        if self.reduction == "elastic" and self.reduction_slots > 0:
            slots, batch = self.reduction_slots, self.global_batch_size
            if slots & (slots - 1) or batch % slots:
                yield (
                    f"training.reduction_slots is {slots}; it must be a power of 2 that divides "
                    f"training.global_batch_size {batch}: try {math.gcd(batch, 2**30)}"
                )

    def _average_problems(self) -> Iterator[str]:
        yield from wrong_decays("training.ema_more_decays", self.ema_more_decays)
        yield from wrong_widths("training.ema_snapshot_widths", self.ema_snapshot_widths)
        if self.ema_snapshot_every_steps and not self.ema_snapshot_widths:
            yield (
                f"training.ema_snapshot_every_steps is {self.ema_snapshot_every_steps} and "
                f"training.ema_snapshot_widths is empty; name two widths: try [0.05,0.1]"
            )


@dataclass(frozen=True)
class TrackingConfig:
    uri: str = option(
        "", "MLflow server or database file; empty: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db"
    )
    experiment: str = option("ddpm-ray", "MLflow experiment that holds the run")
    every_steps: int = option(
        1, "steps averaged into one logged row of loss, gradient norm and learning rate", at_least=1
    )
    flush_every_s: float = option(2.0, "seconds between uploads of rows", above=0)
    last_rows_s: float = option(
        60, "seconds to wait for MLflow at the end; a continued run sends undelivered rows",
        above=0,
    )  # fmt: skip


@dataclass(frozen=True)
class ClusterConfig:
    num_workers: int = option(1, "Ray Train workers, one process each", at_least=1)
    min_workers: int = option(
        0, "continue with this many workers if nodes are lost; 0: wait for num_workers", at_least=0
    )
    resize_every_s: float = option(
        60, "min_workers: seconds between attempts to scale back up to num_workers", above=0
    )
    cpus_per_worker: float = option(1, "CPUs and torch threads of each worker", above=0)
    gpus_per_worker: float = option(0, "GPUs of each worker; above 0: CUDA and NCCL", at_least=0)
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")
    max_failures: int = option(3, "restarts of the worker group after lost workers", at_least=0)
    timeout_s: float = option(300, "timeout of a collective operation in seconds", above=0)
    stall_timeout_s: float = option(
        25, "seconds without progress or heartbeat of a worker before all are restarted",
        at_least=5,
    )  # fmt: skip
    storage_timeout_s: float = option(
        180, "seconds for which failed storage requests are retried",
        above=0,
    )  # fmt: skip
    start_timeout_s: float = option(
        600, "seconds to wait for the workers' resources while nodes boot or are occupied", above=0
    )


@dataclass(frozen=True)
class RunConfig:
    """One training run: `jobs/train.py`."""

    name: str = option("", "name of the run; the same name in the same storage continues it")
    storage: str = option("runs", "folder or fsspec URL of the runs and their checkpoints")
    seed: int = option(
        0, "random seed of weights, data order, timesteps and noise", at_least=0, defines_run=True
    )
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def conditioned(self) -> Conditioned:
        """What the model is trained with: labels, label dropout, learned variance."""
        objective = self.objective
        learns, drops = objective.variance != "fixed", objective.label_dropout > 0
        return Conditioned(self.model.num_classes, drops, learns)

    @property
    def worker_counts(self) -> list[int]:
        """Allowed numbers of workers, ascending: those that divide the batch evenly."""
        most = self.cluster.num_workers
        elastic = self.training.reduction == "elastic"
        parts = self.training.reduction_slots if elastic else self.training.global_batch_size
        fewest = self.cluster.min_workers or most
        return [count for count in range(fewest, most + 1) if parts % count == 0]

    def problems(self) -> Iterator[str]:
        """Yield the problems of all groups, and of rules about several groups."""
        for key, value in (("name", self.name), ("data.url", self.data.url)):
            if not value:
                yield f"{key} is empty; give it a value, as in {key}=..."
        if "/" in self.name or self.name.startswith("."):
            yield f"name is {self.name!r}; it names a folder: no '/' and no leading '.'"
        yield from self.schedule.problems()
        yield from self.objective.problems(self.schedule)
        yield from self.model.problems()
        yield from self.training.problems()
        yield from self.sampling.problems("sampling", self.schedule.num_steps)
        yield from self.sampling.incompatibilities("sampling", self.conditioned)
        yield from self.evaluation.problems()
        yield from self._classifier_problems()
        batch, workers, lanes = (
            self.training.global_batch_size, self.cluster.num_workers, self.data.lanes
        )  # fmt: skip
        elastic = self.training.reduction == "elastic"
        if elastic and workers > 0 and self.training.reduction_slots % workers:
            yield (
                f"cluster.num_workers is {workers}; with training.reduction=elastic it must divide "
                f"training.reduction_slots {self.training.reduction_slots}"
            )
        if self.cluster.min_workers > workers:
            yield (
                f"cluster.min_workers is {self.cluster.min_workers}; it cannot exceed "
                f"cluster.num_workers {workers}"
            )
        if min(workers, lanes) > 0 and (rest := batch % (unit := math.lcm(workers, lanes))):
            yield (
                f"training.global_batch_size is {batch}; cluster.num_workers={workers} and "
                f"data.lanes={lanes} must divide it: try {batch - rest or unit}"
            )

    def _classifier_problems(self) -> Iterator[str]:
        if self.model.kind != "classifier":
            return
        if self.model.num_classes < 2:
            yield (
                f"model.num_classes is {self.model.num_classes}; a classifier needs the number of "
                f"labels in the data, at least 2"
            )
        for key, value in (
            ("evaluation.num_images", self.evaluation.num_images),
            ("evaluation.spectrum_every_steps", self.evaluation.spectrum_every_steps),
            ("training.grid_every_steps", self.training.grid_every_steps),
        ):
            if value:
                yield f"{key} is {value}; a classifier draws no samples: set it to 0"
