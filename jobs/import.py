"""Run the job import, as `ddpm-ray import` does, from a clone or by `ray job submit`."""

import sys

from ddpm_ray.cli.main import main
from ddpm_ray.jobs.import_model import JOB

if __name__ == "__main__":
    sys.exit(main(JOB))
