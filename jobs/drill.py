"""Fault-injection drill: train a short run without faults, then once with each fault.

    python jobs/drill.py conf/drill/digits.yaml [key=value ...]
    ray job submit --working-dir . -- python jobs/drill.py conf/drill/digits.yaml run.storage=s3://a/b

Options: --help, --print-config. The last line of stdout is a JSON object with the results. Exit
code 0: each run ended with the same weights and loss rows as the one without a fault; 3: not all.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli import PartlyFailedError, ProgressLine, home_folder, main
from ddpm_ray.config.fault_drill import DrillConfig


def drill(config: DrillConfig, _: Namespace) -> dict[str, Any]:
    """Run the drill, print a table on stderr, and return the results."""
    from ddpm_ray.runs.fault_drill import run_drill, show_table  # heavy: after the config is read

    done = run_drill(config, home_folder(), ProgressLine("runs"))
    clean, *faulted = done
    show_table(done)
    report = {
        "seconds": clean.seconds,
        "faults": [
            {
                "fault": one.fault, "starts": one.starts, "repeated_steps": one.repeated_steps,
                "seconds_lost": one.seconds - clean.seconds, "equal": one.equals(clean),
                "reason": one.reason,
            }
            for one in faulted
        ],
    }  # fmt: skip
    if different := [one.fault for one in faulted if not one.equals(clean)]:
        message = f"{len(different)} of {len(faulted)} ended differently: {', '.join(different)}"
        raise PartlyFailedError(message, report)
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", DrillConfig, drill, "config"))
