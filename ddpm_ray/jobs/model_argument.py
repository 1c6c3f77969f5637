"""The argument MODEL_URI of the jobs that load a trained model."""

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ddpm_ray.cli.job import Argument
from ddpm_ray.cli.paths import home_folder

if TYPE_CHECKING:
    from ddpm_ray.runs.load_model import SamplingJob

T = TypeVar("T", bound="SamplingJob")

MODEL_URI = Argument(
    "model_uri",
    "folder or fsspec URL of a run or of one checkpoint, runs:/<run id>/model, "
    "models:/<name>@<alias>, or a local folder that diffusers saved",
)


# What a job's result says of the model; the last two of a cascade only.
SHOWN = ("checkpoint", "step", "weights_sha256", "prior_sha256", "upsamplers_sha256")


def shown_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a job's result says of the model that drew."""
    return {key: provenance[key] for key in SHOWN if key in provenance}


def with_settings_of_model(config: T, arguments: Namespace, name: str = "model_uri") -> T:
    """Return `config` with the model's own sampling settings, except the keys that were given.

    Makes the URI in the argument `name` absolute. Raises ConfigError.
    """
    home = home_folder()
    from ddpm_ray.tracking.model_uri import resolve_model_uri  # fsspec: after the config is read

    uri = resolve_model_uri(getattr(arguments, name), home)
    setattr(arguments, name, uri)
    from ddpm_ray.runs import load_model  # heavy: after the paths are checked

    return load_model.as_trained(config, uri, arguments.given, home)
