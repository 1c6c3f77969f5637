"""Repeat a short run under injected faults, and check that its weights stay the same.

    ddpm-ray drill digits [key=value ...]
    python jobs/drill.py conf/drill/digits.yaml [key=value ...]
    ray job submit --working-dir . -- python jobs/drill.py conf/drill/digits.yaml run.storage=s3://a/b

The run is trained without a fault first, then once for each entry of `faults`. Exit code 3: a run
ended with other weights or other loss rows than the one without a fault.
"""

from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import CONFIG, Job, PartlyFailedError
from ddpm_ray.cli.paths import home_folder
from ddpm_ray.config.jobs.fault_drill import DrillConfig
from ddpm_ray.jobs.unused_options import warn_of_unused


def drill(config: DrillConfig, _: Namespace) -> dict[str, Any]:
    """Run the drill, print a table on stderr, and return the results."""
    from ddpm_ray.cli.progress import ProgressLine
    from ddpm_ray.runs.fault_drill import run_drill, show_table  # heavy: after the config is read

    warn_of_unused(config.run)
    done = run_drill(config, home_folder(), ProgressLine("runs"))
    clean, *faulted = done
    show_table(done)
    faults = [
        {
            "fault": one.fault,
            "starts": one.starts,
            "repeated_steps": one.repeated_steps,
            "seconds_lost": one.seconds - clean.seconds,
            "equal": one.equals(clean),
            "reason": one.reason,
        }
        for one in faulted
    ]
    report = {"seconds": clean.seconds, "faults": faults}
    if different := [one.fault for one in faulted if not one.equals(clean)]:
        message = f"{len(different)} of {len(faulted)} ended differently: {', '.join(different)}"
        raise PartlyFailedError(message, report)
    return report


JOB = Job("drill", __doc__ or "", DrillConfig, drill, (CONFIG,))
