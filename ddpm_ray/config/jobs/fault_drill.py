"""Options of the fault-injection drill: a short run to repeat, and the faults to inject."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ddpm_ray.config.option_fields import group, option
from ddpm_ray.config.run import RunConfig
from ddpm_ray.fault_injection import FaultSyntaxError, parse_faults
from ddpm_ray.redaction import counted


@dataclass(frozen=True)
class DrillConfig:
    """One fault-injection drill: a short run that is repeated under faults."""

    shipped_in: ClassVar = "drill"  # folder of conf/

    faults: tuple[str, ...] = option(
        (),
        "one run per entry: faults as ACTION@POINT[:STEP][/RANK], several separated by spaces",
    )
    run: RunConfig = group(RunConfig, whole_config=True)

    def problems(self) -> Iterator[str]:
        """Yield a line for faults that are invalid or can never occur, and the run's problems."""
        if not self.faults:
            yield "faults is empty; name some, as in faults='[kill@gradient:30/1,kill@commit:20]'"
        for entry in self.faults:
            try:
                faults = parse_faults(f"/ {entry}")
            except FaultSyntaxError as error:
                yield f"faults: {error}"
                continue
            steps, workers = self.run.training.steps, self.run.cluster.num_workers
            for fault in faults:
                if fault.step > steps:
                    yield f"faults: {entry!r} is at step {fault.step}, the run has {steps}"
                if (fault.rank or 0) >= workers:
                    yield f"faults: {entry!r} is for worker {fault.rank}, the run has {workers}"
            if len(faults) > (most := self.run.cluster.max_failures):
                yield (
                    f"faults: {entry!r} has {counted(len(faults), 'fault')}, "
                    f"run.cluster.max_failures is {most}; raise it"
                )
        for problem in self.run.problems():
            yield f"run.{problem}"
