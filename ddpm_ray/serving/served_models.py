"""The models that a process serves, by name; a name in the registry is followed as it moves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.serving.engine import Engine
from ddpm_ray.serving.engine_settings import EngineSettings
from ddpm_ray.serving.request_errors import unknown_model

log = logging.getLogger(__name__)


class ModelLoader(Protocol):
    """Finds and loads models."""

    def source(self, uri: str) -> str:
        """The URI of the weights that `uri` means now, which always means the same weights."""
        ...

    def load(self, source: str) -> DrawingModel:
        """Load the model at a source."""
        ...


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A loaded model, with networks that its engine computes."""

    name: str
    source: str
    model: DrawingModel
    engine: Engine

    @property
    def facts(self) -> dict[str, Any]:
        """The model's images and inputs, as JSON: an item of OpenAI's list of models, and more."""
        model, takes = self.model, self.model.denoiser.takes
        height, width, channels = model.drawn_shape
        edits, settings = isinstance(model, TrainedModel), model.settings
        names, has_text = model.label_names, takes.tokenizer is not None
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "ddpm-ray",
            "source": self.source,
            "weights_sha256": model.provenance.get("weights_sha256"),
            "size": f"{width}x{height}",
            "edited_size": f"{model.image_size[1]}x{model.image_size[0]}",
            "channels": channels,
            "takes_text": not edits or has_text,
            "prompt_tokens": takes.tokenizer.length if takes.tokenizer else None,  # more are cut
            "num_classes": takes.num_classes,
            "label_names": None if names is None else list(names),
            "guidance": model.drops_labels and (takes.num_classes > 0 or has_text),
            "edits": edits,
            "variations": takes.image_encoder is not None,
            "num_steps": model.denoiser.schedule.num_steps,
            "steps": settings.steps,
            "sampler": settings.sampler,
            "guidance_scale": settings.guidance_scale,
        }


class ServedModels:
    """Models by name, each with an engine. Close them, or use them in a `with`."""

    def __init__(
        self,
        uris: Mapping[str, str],
        loader: ModelLoader,
        engine: EngineSettings | None = None,
        warm: Callable[[LoadedModel], None] | None = None,
    ) -> None:
        if not uris:
            raise ValueError("models is empty; a server serves at least one")
        self._uris, self._loader, self._warm = dict(uris), loader, warm or (lambda _: None)
        self._engines = {name: Engine(engine or EngineSettings()) for name in uris}
        self._lock = threading.Lock()  # of what follows
        self._current: dict[str, LoadedModel] = {}
        self._earlier: dict[str, LoadedModel] = {}  # the last one of each name
        self._loading = threading.Lock()  # one load at a time: jobs that were lost come together
        try:
            for name, uri in self._uris.items():
                self._current[name] = self._loaded(name, loader.source(uri))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ServedModels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all jobs."""
        for engine in self._engines.values():
            engine.close()

    @property
    def current(self) -> list[LoadedModel]:
        """The models that new requests get, in the order of their names at the start."""
        with self._lock:
            return [*self._current.values()]

    def of_name(self, name: str, source: str = "") -> LoadedModel:
        """The model of a name (empty: the first), at another source if one is given.

        RequestError for an unknown name. A source that is not loaded is loaded, which takes its
        time: jobs that began with it end with it, in whatever process.
        """
        with self._lock:
            name = name or next(iter(self._current))
            found = self._current.get(name)
            if found is None:
                raise unknown_model(name, self._current)
            if source and source != found.source:
                found = None
        return found or self._of_source(name, source)

    def refresh(self) -> list[str]:
        """Load the models whose names have moved in the registry; return these names.

        A name that cannot be looked up or loaded keeps its model, and a warning says why.
        """
        moved = []
        for name, uri in self._uris.items():
            present = self._current[name]
            try:
                source = self._loader.source(uri)
                if source == present.source:
                    continue
                served = self._loaded(name, source)
            except Exception as error:  # noqa: BLE001 - of a registry, a store or a model
                problem = " ".join(str(error).split()) or type(error).__name__
                log.warning("%s: %s stays in use: %s", name, present.source, problem)
                continue
            with self._lock:
                self._earlier[name] = present
                self._current[name] = served
            log.info("%s: new requests get %s", name, source)
            moved.append(name)
        return moved

    def _of_source(self, name: str, source: str) -> LoadedModel:
        """The model at an earlier source of a name, loaded if it is not there."""
        with self._loading:
            with self._lock:
                found = self._earlier.get(name)
            if found is None or found.source != source:
                found = self._loaded(name, source)
                with self._lock:
                    self._earlier[name] = found
        return found

    def _loaded(self, name: str, source: str) -> LoadedModel:
        """Load and warm a model."""
        engine = self._engines[name]
        served = LoadedModel(name, source, engine.shared(self._loader.load(source)), engine)
        self._warm(served)
        return served
