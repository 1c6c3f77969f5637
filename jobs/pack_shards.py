"""Pack images into shards that training streams.

    python jobs/pack_shards.py SOURCE DESTINATION [key=value ...]

SOURCE is a folder of images (flat, or one sub-folder per class, or with a metadata.csv), a folder
or file of WebDataset tars, or of Parquet or Arrow tables with a column of images, or one of digits,
mnist, fashion-mnist, cifar10. DESTINATION is a folder on any fsspec URL. docs/packing.md says which
files are packed, named or refused, and why.
Options: --help, --print-config. The last lines of stderr tell samples, skipped files, whatever else
was not packed, and the classes; the last line of stdout is a JSON object with all of it.
Interrupted, killed or out of disk: the same command goes on with the shards that are done.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.command_line import ProgressLine, home_folder, main
from ddpm_ray.job_config import PackConfig


def pack(config: PackConfig, arguments: Namespace) -> dict[str, Any]:
    """What the data set is, and what became of every file of its source."""
    from ddpm_ray.cluster import packing  # heavy: after the config is checked
    from ddpm_ray.data import pack_report, storage

    destination = storage.absolute(arguments.destination, home_folder())
    packed = packing.pack(arguments.source, destination, config, ProgressLine("shards"))
    for line in pack_report.lines(*packed):
        print(line, file=sys.stderr)
    return pack_report.summary(*packed)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", PackConfig, pack, "source", "destination"))
