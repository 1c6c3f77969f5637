"""Load trained models from a checkpoint folder or from MLflow."""

import atexit
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch

from ddpm_ray.assembly import cascades, checkpoint_loading, classifier_loading
from ddpm_ray.assembly.checkpoint_loading import Model
from ddpm_ray.assembly.image_encoders import NamedImageEncoder
from ddpm_ray.assembly.newest_checkpoint import usable_device
from ddpm_ray.config.guidance import GuidanceConfig
from ddpm_ray.config.jobs.edit import EditConfig
from ddpm_ray.config.loading import Checked, ConfigError
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.sampling import guidance_models
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.sampling import sampling_plan
from ddpm_ray.storage import object_store
from ddpm_ray.tracking.model_uri import IN_MLFLOW, require_whole_name, resolve_model_uri
from ddpm_ray.tracking.tracking_uri import resolve_tracking_uri
from ddpm_ray.training.checkpoint_folder import CheckpointError

# Downloads of `as_trained`, reused by the next `load` of the same model. Key: tracking URI and
# model URI; value: temporary folder, and path of the checkpoint in it.
_downloads: dict[tuple[str, str], tuple[tempfile.TemporaryDirectory[str], str]] = {}


def load(
    uri: str,
    device: torch.device | str | None = None,
    tracking_uri: str = "",
    home: Path | None = None,
    autoencoder: str = "",
    text_model: str = "",
) -> TrainedModel:
    """Load the model at a folder's URL, `runs:/<run id>/model` or `models:/<name>@<alias>`.

    The latter two are looked up at `tracking_uri`; if it is empty, at the default of
    `resolve_tracking_uri` for `home` or the working directory. `autoencoder` is the URL of the
    autoencoder of a model of latents, `text_model` that of a frozen text encoder, if it has moved.
    Raises CheckpointError, StorageError, TrackingError.
    """
    device = usable_device(device)  # fail before a download
    with _local(uri, home or Path.cwd(), tracking_uri) as folder:
        model = checkpoint_loading.trained_model(
            folder, device, autoencoder=autoencoder, text_model=text_model
        )
        if folder != uri:
            _load_image_encoder(model)
    return model


def load_to_draw(
    uri: str,
    device: torch.device | str | None = None,
    home: Path | None = None,
    autoencoder: str = "",
    text_model: str = "",
    tracking_uri: str = "",
) -> DrawingModel:
    """Load a model as `load` does, or a cascade from a folder or from MLflow."""
    device = usable_device(device)
    with _local(uri, home or Path.cwd(), tracking_uri) as folder:
        model: DrawingModel
        if cascades.is_cascade(folder):
            for key, moved in (("autoencoder", autoencoder), ("text_model", text_model)):
                if moved:
                    raise ConfigError(f"{key} is {moved}, but {uri} holds a cascade: leave it out")
            model = cascades.trained_cascade(folder, device)
        else:
            model = checkpoint_loading.trained_model(
                folder, device, autoencoder=autoencoder, text_model=text_model
            )
        if folder != uri:
            _load_image_encoder(model)
    return model


def cascade_of_uri(uri: str, device: torch.device | str | None = None) -> Cascade:
    """Load the cascade at `uri` as `load_to_draw` does; raises ConfigError for another model."""
    model = load_to_draw(uri, device)
    if not isinstance(model, Cascade):
        raise ConfigError(f"{uri} holds no cascade: load it with ddpm_ray.load")
    return model


def _load_image_encoder(model: DrawingModel) -> None:
    """Load the encoder of a model's image embeddings while its downloaded copy is there."""
    encoder = model.denoiser.takes.image_encoder
    if isinstance(encoder, NamedImageEncoder):
        with suppress(CheckpointError):  # logged without it: then it makes no variations
            _ = encoder.encoders


class SamplingJob(Checked, Protocol):
    """Config of a job that samples from a trained run."""

    @property
    def sampling(self) -> SamplingSettings:
        """The plan and settings of sampling."""
        ...

    def sampling_problems(self) -> Iterator[str]:
        """Yield a line for each invalid combination in `sampling`."""
        ...


Job = TypeVar("Job", bound=SamplingJob)


def as_trained(config: Job, uri: str, given: Collection[str], home: Path) -> Job:
    """Return `config` with the sampling settings of the run at `uri`, except the `given` keys.

    RePaint uses the ancestral sampler unless `given` says otherwise. Label names become numbers.
    Folders of guidance models, autoencoder and text encoder are relative to `home`. The next `load`
    reuses a download from MLflow. Raises ConfigError for invalid combinations, and what `load`
    raises.
    """
    with _local(uri, home, keep=True) as folder:
        run, facts = checkpoint_loading.run_facts(cascades.decoder_url(folder))
    if isinstance(config, EditConfig):
        try:
            config = cast(Job, config.for_model(conditioned=run.objective.inpainting_masks))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    repaints = isinstance(config, EditConfig) and config.repaints
    own = run.sampling.for_repaint() if repaints else run.sampling
    names = [key.removeprefix("sampling.") for key in given if key.startswith("sampling.")]
    values = {name: getattr(config.sampling, name) for name in names}
    try:
        sampling = own.overridden(values, run.schedule.num_steps)
        if sampling.has_names:
            known = checkpoint_loading.label_names(run, facts)
            sampling = replace(sampling, labels=sampling.numbered(known))
    except ValueError as error:
        raise ConfigError(f"sampling.{error}") from error
    changes: dict[str, Any] = {"sampling": sampling}
    if (guidance := getattr(config, "guidance", None)) is not None:
        weak, classifier = (
            resolve_model_uri(place, home) if place else ""
            for place in (guidance.autoguidance_model, guidance.classifier)
        )
        changes["guidance"] = replace(guidance, autoguidance_model=weak, classifier=classifier)
    for key in ("autoencoder", "text_model"):
        if place := getattr(config, key, ""):
            changes[key] = object_store.absolute(place, home)
    config = replace(cast(Any, config), **changes)
    if problems := [*config.problems(), *config.sampling_problems()]:
        raise ConfigError("\n".join(problems))
    return config


@contextmanager
def _local(uri: str, home: Path, tracking_uri: str = "", *, keep: bool = False) -> Iterator[str]:
    """Yield the folder of the checkpoint of `uri`; a model in MLflow is downloaded.

    With `keep` the download stays until the next call for it, or until the process ends.
    """
    if not uri.startswith(IN_MLFLOW):
        yield uri
        return
    require_whole_name(uri)
    key = resolve_tracking_uri(home, tracking_uri), uri
    scratch, folder = _downloads.pop(key) if key in _downloads else _download(*key)
    try:
        yield folder
    except BaseException:
        scratch.cleanup()
        raise
    if keep:
        _downloads[key] = scratch, folder
    else:
        scratch.cleanup()


def _download(where: str, uri: str) -> tuple[tempfile.TemporaryDirectory[str], str]:
    """Download model `uri` from MLflow at `where`; return a temporary folder and its checkpoint."""
    from ddpm_ray.tracking import model_registry  # imports MLflow, which takes seconds

    scratch = tempfile.TemporaryDirectory(prefix="ddpm-ray-model-")
    atexit.register(scratch.cleanup)
    return scratch, str(model_registry.download_model(where, uri, Path(scratch.name)))


def configured(
    model: Model,
    sampling: SamplingSettings,
    guidance: GuidanceConfig,
    tracking_uri: str = "",
    home: Path | None = None,
) -> Model:
    """`model` with these sampling settings, guided by the configured network.

    The network is loaded as by `load`. Raises ConfigError with a line for each setting that the
    model does not support.
    """
    knows = bool(guidance.classifier)
    model = checkpoint_loading.with_sampling(model, sampling, guided_by_model=knows)
    of = model.denoiser
    if uri := guidance.autoguidance_model:
        try:
            with _local(uri, home or Path.cwd(), tracking_uri) as folder:
                weak = checkpoint_loading.trained_model(folder, model.device, guides=of.codec)
            guide = guidance_models.autoguidance(of, weak.denoiser, guidance.autoguidance_scale)
        except ValueError as error:
            raise ConfigError(f"guidance.autoguidance_model is {uri!r}: {error}") from error
        return replace(model, denoiser=replace(of, guidance_model=guide))
    if not guidance.classifier:
        return model
    try:
        classifier = classifier_loading.trained_classifier(
            guidance.classifier, model.device, guides=of.codec
        )
    except ValueError as error:
        given = f"guidance.classifier is {guidance.classifier!r}"
        raise ConfigError(f"{given}: {error}") from error
    plan = sampling_plan(sampling, of.schedule)
    guide = guidance_models.classifier_guidance(
        classifier,
        of,
        guidance.classifier_scale,
        steps=plan.steps if guidance.classifier_form == "mean" else None,
        variance="fixed_large" if sampling.variance == "fixed_large" else "fixed_small",
    )
    guided = replace(of, guidance_model=guide, guidance_classes=classifier.num_classes)
    return checkpoint_loading.with_sampling(replace(model, denoiser=guided), sampling)
