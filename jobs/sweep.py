"""Train many runs that differ in beta schedule, T or other keys, and name the best.

    python jobs/sweep.py conf/sweep/quick.yaml [key=value ...]
    ray job submit --working-dir . -- python jobs/sweep.py conf/sweep/schedules.yaml

Options: --help, --print-config. The last line of stdout is a JSON object with the results.
Exit code 0: no trial failed, though some may have been stopped early or pruned; 3: some failed, the
others were compared all the same.
Ctrl-C once commits checkpoints and exits; twice exits now. The same command continues.
SIGTERM and a closed terminal (SIGHUP) count as Ctrl-C.
"""

import sys
from argparse import Namespace
from typing import Any

from ddpm_ray.cli import (
    InterruptedRunError,
    PartlyFailedError,
    ProgressLine,
    home_folder,
    main,
    way_to_see,
)
from ddpm_ray.config.sweep import SweepConfig


def sweep(config: SweepConfig, _: Namespace) -> dict[str, Any]:
    """Return the sweep's report; print the table of its trials to stderr."""
    from ddpm_ray.sweep.driver import sweep as run  # heavy: after the config is read
    from ddpm_ray.sweep.leaderboard import as_text
    from ddpm_ray.sweep.standings import standings

    outcome = run(config, home_folder(), ProgressLine("trials"))
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


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", SweepConfig, sweep, "config"))
