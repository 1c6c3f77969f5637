"""Loader of a model that was logged in MLflow: from its checkpoint folder to a sampler."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_ray.assembly import checkpoint_loading
from ddpm_ray.sampling.pipeline import TrainedModel


class ServedModel:
    """Model for mlflow.pyfunc whose `predict` draws samples."""

    def __init__(self, model: TrainedModel) -> None:
        self.model = model

    def predict(
        self, model_input: Any, params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Draw uint8 images [N, H, W, C]; `model_input` has the arguments of TrainedModel.sample.

        For example {"num_images": 16, "steps": 50, "seed": 3}, or a table with one such row, as
        MLflow's server passes a request. A table with a column `prompt` gives one image for each
        row, with the other columns of its first row as settings. Raises ValueError as `sample`
        does.
        """
        rows = [model_input] if isinstance(model_input, dict) else model_input.to_dict("records")
        if not rows:
            raise ValueError("the table has no rows; give one, with the arguments of sample")
        wanted = dict(rows[0])
        if "prompt" in wanted:
            prompts = [row["prompt"] for row in rows]
            del wanted["prompt"]
            wanted = {"num_images": len(prompts), "prompts": prompts} | wanted
        return self.model.sample(**wanted, **(params or {}))


def _load_pyfunc(path: str) -> ServedModel:
    """Load the logged folder; called by MLflow."""
    return ServedModel(checkpoint_loading.trained_model(path))
