"""Export of a trained model or autoencoder to a folder that diffusers loads."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ddpm_ray.assembly import checkpoint_loading, diffusers_export
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.config.jobs.export import ExportConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.runs import load_model
from ddpm_ray.runs.evaluation.evaluate_autoencoder import autoencoder_run
from ddpm_ray.storage import object_store


def export_run(
    model_uri: str, config: ExportConfig, given: Collection[str], out: Path, home: Path
) -> dict[str, Any]:
    """Write the new folder `out`, and return what it holds and how diffusers samples from it.

    `given` are the keys that the user set. Raises ConfigError for keys that do not fit the model,
    and the errors of `load_model.load` and `diffusers_export`; then nothing is left of it.
    """
    try:
        return _export(model_uri, config, given, out, home)
    except (Exception, KeyboardInterrupt):
        object_store.delete_folder(str(out))
        raise


def _export(
    model_uri: str, config: ExportConfig, given: Collection[str], out: Path, home: Path
) -> dict[str, Any]:
    """Write the folder `out`; see `export_run`."""
    if autoencoder_run(model_uri) is not None:
        if given:
            raise ConfigError(
                f"{', '.join(given)}: an autoencoder is exported without options: leave them out"
            )
        return _export_autoencoder(model_uri, out)
    model = load_model.load(
        model_uri, "cpu", home=home, autoencoder=config.autoencoder, text_model=config.text_model
    )
    model = checkpoint_loading.with_sampling(model, config.sampling)
    export = diffusers_export.write_diffusers(model, config.sampling, out)
    found = model.provenance
    return {
        "folder": str(out),
        "pipeline": export.pipeline,
        "parts": list(export.parts),
        "scheduler": export.scheduler["_class_name"],
        "call": export.call,
        "no_equivalent": list(export.no_equivalent),
        **{key: found[key] for key in ("checkpoint", "step", "weights_sha256")},
        "average": found.get("average"),
    }


def _export_autoencoder(model_uri: str, out: Path) -> dict[str, Any]:
    model = trained_autoencoder(model_uri)
    _, facts = checkpoint_loading.run_facts(model.url)
    diffusers_export.write_autoencoder(model, out)
    return {
        "folder": str(out),
        "model": autoencoder_kl.CLASS,
        "no_equivalent": [],
        "checkpoint": model.url,
        "step": facts.get("step"),  # None: a folder of diffusers, which does not name it
        "weights_sha256": model.sha256,
    }
