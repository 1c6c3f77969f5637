"""Pack images into shards that training streams.

    python jobs/pack_shards.py SOURCE DESTINATION [key=value ...]

SOURCE is one of: a folder of images (flat, one sub-folder per class, or with a metadata.csv);
WebDataset tars (a folder or one file); Parquet or Arrow files with a column of images (a folder or
one file); digits, mnist, fashion-mnist or cifar10. DESTINATION is a folder on any fsspec URL.
docs/packing.md says which files are packed, which are left out or refused, and why.
Options: --help, --print-config. The last lines of stderr list skipped files, everything else that
was not packed, the number of samples, and the classes; the last line of stdout is a JSON object
with the same. After an interruption, a kill or a full disk the same command continues: finished
shards are kept.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli import ProgressLine, home_folder, main
from ddpm_ray.config.pack import PackConfig


def pack(config: PackConfig, arguments: Namespace) -> dict[str, Any]:
    """What the data set is, and what became of every file of its source."""
    from ddpm_ray.data.packing import pack_report
    from ddpm_ray.runs import pack as packing  # heavy: after the config is checked
    from ddpm_ray.storage import object_store

    destination = object_store.absolute(arguments.destination, home_folder())
    packed = packing.pack(arguments.source, destination, config, ProgressLine("shards"))
    for line in pack_report.lines(*packed):
        print(line, file=sys.stderr)
    return pack_report.summary(*packed)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", PackConfig, pack, "source", "destination"))
