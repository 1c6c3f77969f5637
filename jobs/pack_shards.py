"""Pack images into shards that training streams.

    python jobs/pack_shards.py SOURCE DESTINATION [key=value ...]

SOURCE is a folder of images (flat, or one sub-folder per class), a folder or file of WebDataset
tars, or one of digits, mnist, fashion-mnist, cifar10. DESTINATION is a folder on any fsspec URL.
Options: --help, --print-config. The last line of stdout is a JSON object with the results.
Interrupted, killed or out of disk: the same command goes on with the shards that are done.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.command_line import ProgressLine, home_folder, main
from ddpm_ray.job_config import PackConfig
from ddpm_ray.telling import told


def pack(config: PackConfig, arguments: Namespace) -> dict[str, Any]:
    """What the data set is, and the images that were left out."""
    from ddpm_ray.cluster import packing  # heavy: after the config is checked
    from ddpm_ray.data import storage

    destination = storage.absolute(arguments.destination, home_folder())
    packed = packing.pack(arguments.source, destination, config, ProgressLine("shards"))
    for line in packed.skipped:
        print(f"skipped: {told(line)}", file=sys.stderr)
    manifest = packed.dataset.manifest
    return {
        "destination": packed.dataset.url,
        "samples": manifest.samples,
        "shards": len(packed.dataset.counts),
        "image_shape": list(manifest.image_shape),
        "skipped": len(packed.skipped),
        "fingerprint": packed.dataset.fingerprint,
    }


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", PackConfig, pack, "source", "destination"))
