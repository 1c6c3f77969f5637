"""Try what this cluster survives: a short training, once without and once with each of some faults.

    python jobs/drill.py conf/drill/digits.yaml [key=value ...]
    ray job submit --working-dir . -- python jobs/drill.py conf/drill/digits.yaml run.storage=s3://a/b

Options: --help, --print-config. The last line of stdout is a JSON object with the results. Exit
code 0: every run ended with the same bytes and rows as the one without a fault; 3: some did not.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli import PartlyFailedError, ProgressLine, home_folder, main
from ddpm_ray.config.fault_drill import DrillConfig


def drill(config: DrillConfig, _: Namespace) -> dict[str, Any]:
    """Each fault with what it cost; the table is told on stderr."""
    from ddpm_ray.runs.fault_drill import drill as run  # heavy: after the config is read
    from ddpm_ray.runs.fault_drill import show_table

    done = run(config, home_folder(), ProgressLine("runs"))
    clean, *struck = done
    show_table(done)
    report = {
        "seconds": clean.seconds,
        "faults": [
            {
                "fault": one.fault, "starts": one.starts, "repeated_steps": one.repeated_steps,
                "seconds_lost": one.seconds - clean.seconds, "equal": one.equals(clean),
                "reason": one.reason,
            }
            for one in struck
        ],
    }  # fmt: skip
    if different := [one.fault for one in struck if not one.equals(clean)]:
        told = f"{len(different)} of {len(struck)} ended otherwise: {', '.join(different)}"
        raise PartlyFailedError(told, report)
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", DrillConfig, drill, "config"))
