"""Loader of a model that was logged in MLflow: from its folder to a sampler."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_ray.assembly import cascades, checkpoint_loading
from ddpm_ray.assembly.prior_loading import trained_prior
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.prior import TrainedPrior


class ServedModel:
    """Model for mlflow.pyfunc whose `predict` draws samples."""

    def __init__(self, model: DrawingModel) -> None:
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


class ServedPrior:
    """Prior for mlflow.pyfunc whose `predict` draws image embeddings."""

    def __init__(self, prior: TrainedPrior) -> None:
        self.prior = prior

    def predict(
        self, model_input: Any, params: dict[str, Any] | None = None
    ) -> npt.NDArray[np.float32]:
        """Draw an embedding of length 1 for each row of a table with a column `prompt`: [N, D].

        Columns or `params` `seed` (0 without one) and `candidates` are settings, columns those of
        the first row.
        Raises ValueError for a table without rows, or with other columns.
        """
        rows = model_input.to_dict("records")
        if not rows:
            raise ValueError("the table has no rows; give one, with a column prompt")
        prompts = [str(row["prompt"]) for row in rows]
        given = {key: value for key, value in rows[0].items() if key != "prompt"}
        wanted = {"seed": 0} | given | (params or {})
        if others := wanted.keys() - {"seed", "candidates"}:
            raise ValueError(f"a prior has no setting {min(others)}; use prompt, seed, candidates")
        found: npt.NDArray[np.float32] = self.prior.embeddings(
            prompts, range(len(prompts)), **wanted
        ).numpy()
        return found


def _load_pyfunc(path: str) -> ServedModel | ServedPrior:
    """Load the logged folder, of a model, a prior or a cascade; called by MLflow."""
    if cascades.is_cascade(path):
        return ServedModel(cascades.trained_cascade(path))
    if checkpoint_loading.run_facts(path)[0].traits.draws_embeddings:
        return ServedPrior(trained_prior(path))
    return ServedModel(checkpoint_loading.trained_model(path))
