"""Look at what a run leans on, before it runs: packages, storage, MLflow, Ray, GPUs, clocks.

    python jobs/doctor.py [key=value ...]
    ray job submit --working-dir . -- python jobs/doctor.py storage=s3://bucket/runs

Options: --help, --print-config. The last line of stdout is a JSON object with the findings. Exit
code 0: nothing failed. One small object is written to the storage and deleted; MLflow is only read.
"""

import json
import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli import home_folder, main
from ddpm_ray.config.jobs import DoctorConfig


def doctor(config: DoctorConfig, _: Namespace) -> dict[str, Any]:
    """Print each finding. Raises UnhealthyError with all findings where one is a failure."""
    from ddpm_ray.runs.doctor.doctor import (  # after the config is read
        UnhealthyError,
        examine,
        show,
    )

    findings = examine(config, home_folder())
    show(findings)
    failed = [one.check for one in findings if one.verdict == "fail"]
    report = {"failed": failed, "findings": [vars(one) for one in findings]}
    if failed:
        print(json.dumps(report), flush=True)  # main() prints the results of jobs that succeed
        raise UnhealthyError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", DoctorConfig, doctor))
