"""The loader of a model that MLflow holds: a checkpoint folder in, an object that samples out."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_ray.assembly import checkpoint_loading
from ddpm_ray.sampling.pipeline import TrainedModel


class ServedModel:
    """`predict` for mlflow.pyfunc: images instead of predictions."""

    def __init__(self, model: TrainedModel) -> None:
        self.model = model

    def predict(
        self, model_input: Any, params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.uint8]:
        """uint8 images [N, H, W, C]: `model_input` holds the arguments of TrainedModel.sample.

        As in {"num_images": 16, "steps": 50, "seed": 3}, or a table of one such row, which is what
        MLflow's server makes of a request. Raises ValueError as `sample` does.
        """
        wanted = model_input if isinstance(model_input, dict) else model_input.to_dict("records")[0]
        return self.model.sample(**wanted, **(params or {}))


def _load_pyfunc(path: str) -> ServedModel:
    """What MLflow calls with the folder that was logged."""
    return ServedModel(checkpoint_loading.trained_model(path))
