"""Models for a server: their URIs, as they are now, and the models themselves."""

from __future__ import annotations

from pathlib import Path

from ddpm_ray.assembly import cascades, checkpoint_loading
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.runs.load_model import load_to_draw
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.storage import object_store
from ddpm_ray.tracking.model_uri import IN_MLFLOW
from ddpm_ray.training.checkpoint_folder import CheckpointError


class ModelSources:
    """Finds and loads models; `tracking_uri` is an MLflow server or database."""

    def __init__(self, home: Path, tracking_uri: str, device: str | None = None) -> None:
        self._home, self._tracking_uri, self._device = home, tracking_uri, device

    def source(self, uri: str) -> str:
        """The version that an alias in the registry means now; other URIs as they are.

        Raises TrackingError.
        """
        if uri.startswith("models:/") and "@" in uri:
            from ddpm_ray.tracking import model_registry  # imports MLflow, which takes seconds

            return model_registry.version_uri(self._tracking_uri, uri)
        return uri

    def pinned(self, uri: str) -> str:
        """The newest checkpoint of a run's folder, so that all processes load the same weights.

        Other URIs are returned as they are: names in the registry are followed by `source`. Raises
        StorageError.
        """
        if uri.startswith(IN_MLFLOW):
            return uri
        try:
            checkpoint, _ = newest_checkpoint(object_store.absolute(uri, self._home))
        except CheckpointError:  # a cascade, or a folder of diffusers; or none, which `load` says
            return uri
        return checkpoint

    def require_drawable(self, uri: str) -> None:
        """Raise where nothing that draws images is at `uri`, without a look at its weights.

        ConfigError for another kind of model, CheckpointError, StorageError, TrackingError.
        """
        if uri.startswith(IN_MLFLOW):
            self.source(uri)
            return
        url = object_store.absolute(uri, self._home)
        config, _ = checkpoint_loading.run_facts(cascades.decoder_url(url))
        checkpoint_loading.require_denoiser(config, url)

    def load(self, source: str) -> DrawingModel:
        """Load the model at a source; raises what `load_to_draw` does."""
        return load_to_draw(source, self._device, self._home, tracking_uri=self._tracking_uri)
