"""Run the job encode, as `ddpm-ray encode` does, from a clone or by `ray job submit`."""

import sys

from ddpm_ray.cli.main import main
from ddpm_ray.jobs.encode import JOB

if __name__ == "__main__":
    sys.exit(main(JOB))
