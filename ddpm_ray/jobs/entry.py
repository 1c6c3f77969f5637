"""The entry point of the command `ddpm-ray`."""

import sys

from ddpm_ray.cli.interrupts import exit_on_interrupt


def start() -> None:
    """Run the job that the command line names, and exit with its code."""
    with exit_on_interrupt():
        from ddpm_ray.jobs.command import main

        sys.exit(main())
