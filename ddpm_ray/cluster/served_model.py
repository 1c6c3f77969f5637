"""The loader of a model that MLflow holds: a checkpoint folder in, an object that samples out."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_ray import build
from ddpm_ray.generation.sample import TrainedModel


class ServedModel:
    """`predict` for mlflow.pyfunc: images instead of predictions."""

    def __init__(self, model: TrainedModel) -> None:
        self.model = model

    def predict(
        self, model_input: Any, params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.uint8]:
        """uint8 images [N, H, W, C], one per row of `model_input`.

        A column `seed`, where there is one, must hold one value: images are numbered within a
        seed. Keyword arguments of TrainedModel.sample may stand in a dict of one row, or in
        `params`, as in {"num_images": 16, "steps": 50, "seed": 3}.
        """
        wanted = dict(params or {})
        if isinstance(model_input, dict):
            wanted |= model_input
        elif model_input is not None:
            row = model_input.iloc[0].to_dict() if hasattr(model_input, "iloc") else {}
            wanted = {"num_images": len(model_input)} | row | wanted
        plain = {key: getattr(value, "item", lambda v=value: v)() for key, value in wanted.items()}
        return self.model.sample(plain.pop("num_images", 1), **plain)


def _load_pyfunc(path: str) -> ServedModel:
    """What MLflow calls with the folder that was logged."""
    return ServedModel(build.trained_model(path))
