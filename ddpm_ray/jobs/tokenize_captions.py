"""Train a tokenizer on the captions of a packed data set.

    ddpm-ray tokenize DATA --out tokenizer.json [key=value ...]
    python jobs/tokenize_captions.py DATA --out tokenizer.json [key=value ...]

DATA is a data set that was packed with captions. `text.tokenizer=tokenizer.json` gives the result
to a run. A run without that option trains the same tokenizer, byte for byte, on its own data.
"""

from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Argument, Job
from ddpm_ray.cli.paths import home_folder, made_ready, output_file, require_folder
from ddpm_ray.config.jobs.tokenize_captions import TokenizeConfig


def prepare(config: TokenizeConfig, arguments: Namespace) -> TokenizeConfig:
    """Make the paths absolute. Raises ConfigError for local ones that cannot be read or written."""
    arguments.data = require_folder("data", arguments.data, "pack it with jobs/pack_shards.py")
    arguments.out = output_file("--out", arguments.out, home_folder(), (".json",))
    return config


def tokenize(config: TokenizeConfig, arguments: Namespace) -> dict[str, Any]:
    """Train the tokenizer, write it, and return what it holds and what it cuts."""
    made_ready(arguments.out)
    from ddpm_ray.runs.run_tokenizer import write_tokenizer  # heavy: after the paths are checked

    return write_tokenizer(arguments.data, config, arguments.out)


ARGUMENTS = (
    Argument("data", "folder or fsspec URL of the packed images with captions"),
    Argument("--out", "file to write: tokenizer.json"),
)
JOB = Job("tokenize", __doc__ or "", TokenizeConfig, tokenize, ARGUMENTS, prepare)
