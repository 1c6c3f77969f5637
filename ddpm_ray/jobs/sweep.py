"""Train many runs that differ in noise schedule, T or other options and compare them.

    ddpm-ray sweep quick [key=value ...]
    python jobs/sweep.py conf/sweep/quick.yaml [key=value ...]
    ray job submit --working-dir . -- python jobs/sweep.py conf/sweep/schedules.yaml

The same command continues an interrupted sweep. Ctrl-C once commits a checkpoint of each running
trial and exits; twice exits at once. SIGTERM and SIGHUP (a closed terminal) count as Ctrl-C. A
trial that is stopped early or rejected for its schedule has not failed; if a trial fails, the
others are compared all the same and the exit code is 3.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import CONFIG, InterruptedRunError, Job, PartlyFailedError
from ddpm_ray.cli.paths import home_folder
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.jobs.unused_options import warn_of_unused


def sweep(config: SweepConfig, _: Namespace) -> dict[str, Any]:
    """Run the sweep, print a table of its trials on stderr, and return the report."""
    from ddpm_ray.cli.progress import ProgressLine
    from ddpm_ray.sweep.driver import run_sweep  # heavy: after the config is checked
    from ddpm_ray.sweep.leaderboard import as_text
    from ddpm_ray.sweep.standings import standings
    from ddpm_ray.tracking.tracking_uri import way_to_see

    warn_of_unused(config.run)
    outcome = run_sweep(config, home_folder(), ProgressLine("trials"))
    report, score = outcome.report, config.score
    champion, winner = report["champion"], report["winner"]
    print(
        as_text(standings(outcome.trials, score), score),
        f"winner       {winner['values'] if winner else 'none: no trial finished'}",
        f"checkpoint   {winner['checkpoint'] if winner else '-'}",
        f"champion     {_champion_text(champion) if champion else '-'}",
        f"MLflow run   {report['run_id']} in {report['tracking_uri']}",
        f"to see it    {way_to_see(report['tracking_uri'], report['page'])}",
        sep="\n",
        file=sys.stderr,
    )
    if not outcome.finished:
        raise InterruptedRunError("stopped, checkpoints committed; the same command continues")
    if failed := report["trials"]["failed"]:
        raise PartlyFailedError(f"{failed} of {len(outcome.trials)} trials failed", report)
    return report


def _champion_text(champion: dict[str, Any]) -> str:
    name = f"models:/{champion['name']}@champion"
    return f"{name}, version {champion['version']}: {champion['reason']}"


JOB = Job("sweep", __doc__ or "", SweepConfig, sweep, (CONFIG,), continues=True)
