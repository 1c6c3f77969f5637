"""Run the job train, as `ddpm-ray train` does, from a clone or by `ray job submit`."""

import sys

from ddpm_ray.cli.main import main
from ddpm_ray.jobs.train import JOB

if __name__ == "__main__":
    sys.exit(main(JOB))
