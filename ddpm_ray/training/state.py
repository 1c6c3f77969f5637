"""The training state that a checkpoint saves, and its snapshot on the CPU.

Weights, EMAs and Adam's moments are tensors, stored under the network's parameter names. All other
values (step, seed, data fingerprint, config, MLflow run, scores, unsent rows) are plain JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ddpm_ray.diffusion.timestep_sampling import SecondMoments
from ddpm_ray.training import checkpoint_parts
from ddpm_ray.training.adversary import Adversary
from ddpm_ray.training.background_copy import BackgroundCopy
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.ema import EMA, Averages
from ddpm_ray.training.masked_updates import step_optimizer
from ddpm_ray.training.optimizer_moments import Tensors, load_moments, moments
from ddpm_ray.training.tensor_file import packed


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state on the CPU: tensors by file name, other values as JSON."""

    # "model", "ema" and "optimizer"; where they exist, "moments", further averages, and
    # "discriminator" with "discriminator-optimizer". In a save by all workers: by file, as
    # checkpoint_parts.py names them, those that one worker writes.
    tensors: dict[str, Tensors]
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimiser steps taken."""
        return int(self.facts["step"])


@dataclass
class TrainingState:
    """One worker's copy of the run; equal on all workers after every step."""

    model: nn.Module  # unwrapped: no DDP, not compiled
    ema: EMA
    optimizer: torch.optim.Optimizer
    facts: dict[str, Any]  # identity of the run: config, seed, data fingerprint, MLflow run
    moments: SecondMoments | None = None  # of losses by t, for objective.timesteps=second_moment
    averages: Averages = field(default_factory=Averages)  # additional EMAs; sampling uses `ema`
    adversary: Adversary | None = None  # of an autoencoder with a discriminator
    weights: Bf16Weights | None = None  # that the network computes with, made from `model`
    step: int = 0
    scores: dict[str, Any] = field(default_factory=dict)  # the newest evaluation
    validation_losses: list[dict[str, Any]] = field(default_factory=list)
    ema_snapshot_steps: list[int] = field(default_factory=list)
    shown: int = 0  # newest step whose sample grids and scores are complete, or outstanding
    # Evaluations of a spare process that are not delivered, oldest first (spare_evaluations.py).
    outstanding: list[dict[str, Any]] = field(default_factory=list)
    background_copy: BackgroundCopy = field(default_factory=BackgroundCopy)  # by start_snapshot

    @property
    def network(self) -> nn.Module:
        """The network that computes the losses: `model`, or its copy with bfloat16 weights."""
        return self.model if self.weights is None else self.weights.network

    def snapshot(self, unsent_rows: list[Any]) -> Snapshot:
        """A copy on the CPU, in memory of its own."""
        groups = self._tensors()
        return Snapshot(
            {name: packed(group) for name, group in groups.items()}, self._facts(unsent_rows)
        )

    def start_snapshot(
        self, unsent_rows: list[Any], files: Mapping[str, Tensors] | None = None
    ) -> Snapshot:
        """A copy on the CPU, complete after `background_copy.finish()`; the next one overwrites it.

        Training goes on meanwhile: the next update waits until the copy is complete. Copies
        those of `files()` that are given.
        """
        wanted = self.files() if files is None else files
        return Snapshot(self.background_copy.start(wanted), self._facts(unsent_rows))

    def files(self) -> dict[str, Tensors]:
        """The tensors of each file of a checkpoint (no copy), by name without suffix."""
        return checkpoint_parts.split(self._tensors())

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint's tensors, with Adam's moments also before the first step."""
        groups = self._tensors()
        sizes = {
            name: sum(tensor.nbytes for tensor in group.values()) for name, group in groups.items()
        }
        sizes["optimizer"] = max(sizes["optimizer"], 2 * sizes["model"])
        return sum(sizes.values())

    def _tensors(self) -> dict[str, Tensors]:
        """The tensor groups of a checkpoint (no copy)."""
        tensors = {
            "model": dict(self.model.state_dict()),
            "ema": dict(self.ema.state_dict()),
            "optimizer": moments(self.model, self.optimizer),
        }
        if self.moments is not None:
            tensors["moments"] = self.moments.state_dict()
        if self.adversary is not None:
            tensors |= self.adversary.tensors()
        return tensors | {name: mean.state_dict() for name, mean in self.averages.means.items()}

    def _facts(self, unsent_rows: list[Any]) -> dict[str, Any]:
        others = {"outstanding": list(self.outstanding)} if self.outstanding else {}
        return self.facts | {
            "step": self.step,
            "scores": self.scores,
            "probes": list(self.validation_losses),  # grows while this is written
            "kept_at": list(self.ema_snapshot_steps),
            "shown": self.shown,
            "unsent_rows": unsent_rows,
            **others,
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from `snapshot`. Raises RuntimeError that names tensors that do not match."""
        self.background_copy.before_update()
        self.model.load_state_dict(snapshot.tensors["model"])
        self.ema.load_state_dict(snapshot.tensors["ema"])
        load_moments(self.model, self.optimizer, snapshot.tensors["optimizer"])
        if self.adversary is not None:
            self.adversary.restore(snapshot.tensors)
        if self.moments is not None:
            self.moments.load_state_dict(snapshot.tensors["moments"])
        for name, mean in self.averages.means.items():
            mean.load_state_dict(snapshot.tensors[name])
        self.step = snapshot.step
        self.scores = snapshot.facts["scores"]
        self.validation_losses = snapshot.facts["probes"]
        self.ema_snapshot_steps = snapshot.facts.get("kept_at", [])  # not in older checkpoints
        self.shown = snapshot.facts.get("shown", self.step)  # older versions saved after drawing
        self.outstanding = list(snapshot.facts.get("outstanding", []))

    def step_optimizers(self, learning_rate: float, accepted: Tensor) -> None:
        """Apply the gradients of all networks where `accepted`, bool [], and drop them."""
        self.background_copy.before_update()
        step_optimizer(self.optimizer, learning_rate, accepted)
        if self.adversary is not None:
            self.adversary.step(learning_rate, accepted)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients of all networks."""
        self.optimizer.zero_grad()
        if self.adversary is not None:
            self.adversary.zero_grad()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Clip each network's gradients to a global norm of `max_norm`; return the model's norm.

        The returned norm is NaN if the discriminator's is not finite.
        """
        norm = clip_grad_norm_(self.model.parameters(), max_norm, foreach=True)
        if self.adversary is not None:
            other = clip_grad_norm_(self.adversary.discriminator.parameters(), max_norm)
            norm = norm + 0 * other  # 0 * inf is NaN
        return norm
