"""Run the job serve, as `ddpm-ray serve` does, from a clone or by `ray job submit`."""

import sys

from ddpm_ray.cli.interrupts import exit_on_interrupt

if __name__ == "__main__":
    with exit_on_interrupt():
        from ddpm_ray.cli.main import main
        from ddpm_ray.jobs.serve import JOB

        sys.exit(main(JOB))
