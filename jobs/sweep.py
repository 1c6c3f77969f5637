"""Run the job sweep, as `ddpm-ray sweep` does, from a clone or by `ray job submit`."""

import sys

from ddpm_ray.cli.main import main
from ddpm_ray.jobs.sweep import JOB

if __name__ == "__main__":
    sys.exit(main(JOB))
