"""Check what a run needs before it starts: packages, storage, MLflow, Ray, GPUs, clocks.

    ddpm-ray doctor [key=value ...]
    python jobs/doctor.py [key=value ...]
    ray job submit --working-dir . -- python jobs/doctor.py storage=s3://bucket/runs

One small object is written to the storage and deleted; MLflow is only read. Exit code 1: a check
failed; the result lists all findings.
"""

import json
from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Job
from ddpm_ray.cli.paths import home_folder
from ddpm_ray.config.jobs.doctor import DoctorConfig


def doctor(config: DoctorConfig, _: Namespace) -> dict[str, Any]:
    """Return the findings; if a check failed, print them and raise UnhealthyError."""
    from ddpm_ray.runs.doctor.doctor import (  # heavy: after the config is checked
        UnhealthyError,
        examine,
        print_findings,
    )

    findings = examine(config, home_folder())
    print_findings(findings)
    failed = [one.check for one in findings if one.verdict == "fail"]
    report = {"failed": failed, "findings": [vars(one) for one in findings]}
    if failed:
        print(json.dumps(report), flush=True)  # a job that fails has no other result
        raise UnhealthyError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")
    return report


JOB = Job("doctor", __doc__ or "", DoctorConfig, doctor)
