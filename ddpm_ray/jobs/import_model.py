"""Import the weights of another library as a run with one checkpoint.

    ddpm-ray import WEIGHTS DESTINATION layout=guided-diffusion image_size=64 [key=value ...]
    python jobs/import.py WEIGHTS DESTINATION layout=diffusers [key=value ...]

WEIGHTS is a folder that diffusers saved, or a .safetensors or .pt file of a U-Net. From a .pt file
only tensors are read: no code in it is run. The folder holds a U-Net or a DiT, of pixels or with
the autoencoder of its latents, which stays there: keep the folder. DESTINATION is a new folder,
which other jobs take as MODEL_URI; no run can continue it, as it holds no optimizer state. For a
file, give the model.*, guided_diffusion.*, schedule.* and objective.* that it was trained with. An
error names a wrong size; a wrong number of heads, schedule or prediction target shows only in the
samples. Runs of ddpm_ray, and an AutoencoderKL for `ddpm-ray encode`, need no import.

No published weights were tried yet: the tests make networks of each layout.
"""

from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, output_url
from ddpm_ray.config.jobs.import_weights import ImportConfig
from ddpm_ray.config.reading.errors import ConfigError


def prepare(config: ImportConfig, arguments: Namespace) -> ImportConfig:
    """Return `config`; make the paths absolute. Raises ConfigError for options of other layouts."""
    if problems := list(config.unused_keys(arguments.given)):
        raise ConfigError("\n".join(problems))
    from ddpm_ray.storage import object_store  # fsspec: after the config is read
    from ddpm_ray.tracking.model_uri import IN_MLFLOW

    if arguments.weights.startswith(IN_MLFLOW):
        raise ConfigError(
            f"weights is {arguments.weights}, which is a model of ddpm_ray and needs no import: "
            "give it to the other jobs as it is"
        )
    home = home_folder()
    arguments.weights = object_store.absolute(arguments.weights, home)
    arguments.destination = output_url("destination", arguments.destination, home)
    if object_store.is_local(arguments.weights) and not object_store.exists(arguments.weights):
        raise ConfigError(f"weights is {arguments.weights}: there is no such file or folder")
    return config


def import_model(config: ImportConfig, arguments: Namespace) -> dict[str, Any]:
    """Write the run, and return where its checkpoint is and what it holds."""
    from ddpm_ray.runs.import_weights import import_weights  # heavy: after the paths are checked

    return import_weights(arguments.weights, arguments.destination, config, arguments.given)


ARGUMENTS = (
    Argument("weights", "folder of diffusers, or file or fsspec URL of weights"),
    Argument("destination", "folder or fsspec URL of the new run"),
)
JOB = Job("import", __doc__ or "", ImportConfig, import_model, ARGUMENTS, prepare)
