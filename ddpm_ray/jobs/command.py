"""The command `ddpm-ray`: one sub-command for each job."""

import sys

from ddpm_ray.cli.job import DONE, WRONG_CONFIG
from ddpm_ray.cli.main import main as run
from ddpm_ray.config.reading.nearest import did_you_mean
from ddpm_ray.jobs import (
    average,
    cascade,
    doctor,
    drill,
    edit,
    encode,
    evaluate,
    export,
    import_model,
    pack,
    sample,
    serve,
    sweep,
    tokenize_captions,
    train,
)
from ddpm_ray.storage.file_formats import package_version

MODULES = (
    pack,
    tokenize_captions,
    encode,
    train,
    sweep,
    cascade,
    sample,
    edit,
    evaluate,
    serve,
    average,
    import_model,
    export,
    drill,
    doctor,
)
JOBS = {module.JOB.name: module.JOB for module in MODULES}


def main() -> int:
    """Run the job that the command line names, and return its exit code."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(job_overview())
        return DONE
    if name == "--version":
        print(f"ddpm-ray {package_version()}")
        return DONE
    if name not in JOBS:
        hint = did_you_mean(name, JOBS) or f"; there are {', '.join(JOBS)}"
        print(f"error: command line: no job is called {name!r}{hint}", file=sys.stderr)
        return WRONG_CONFIG
    return run(JOBS[name], words, f"ddpm-ray {name}")


def job_overview() -> str:
    """Return the text of `ddpm-ray --help`: each job with one line."""
    width = max(map(len, JOBS))
    jobs = [f"  {name:<{width}}  {job.summary}" for name, job in JOBS.items()]
    return "\n".join(
        [
            "usage: ddpm-ray [--version] JOB ...",
            "",
            "Train denoising diffusion models on a Ray cluster, and compare them in MLflow.",
            "",
            *jobs,
            "",
            "`ddpm-ray JOB --help` shows the arguments and options of a job.",
        ]
    )
