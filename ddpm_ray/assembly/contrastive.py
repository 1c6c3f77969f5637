"""Build the objective of a run with task=contrastive."""

from ddpm_ray.assembly.diffusion import gradient_settings, memory_format
from ddpm_ray.config.run import RunConfig
from ddpm_ray.training.contrastive_objective import ContrastiveObjective
from ddpm_ray.training.state import TrainingState


def contrastive_objective(config: RunConfig, state: TrainingState) -> ContrastiveObjective:
    """The training objective of `state`'s encoders."""
    return ContrastiveObjective(
        config.seed,
        config.contrastive.loss,
        flip=config.data.flip,
        memory_format=memory_format(config.training),
        **gradient_settings(config.training, state),
    )
