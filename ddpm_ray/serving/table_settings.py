"""Limits of the job table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TableSettings:
    """Bounds of open and of kept jobs, and how often a lost job runs again."""

    max_jobs: int = 1000  # that have not ended
    max_uploads: int = 256 * 2**20  # bytes of the uploads of these
    kept_s: float = 3600.0  # images stay so long
    kept_bytes: int = 256 * 2**20  # of images that stay; the oldest go first
    lease_s: float = 20.0  # a job that nobody reads for so long is cancelled, unless it is kept
    sweep_s: float = 5.0  # between two looks for such jobs, and for images to be forgotten
    # A job whose replica was lost so often runs alone: it may be the reason. The others of that
    # replica are innocent, and are not lost with it again.
    suspected_losses: int = 2
    max_losses: int = 5  # a job fails when its replica is lost once more
    retry_s: float = 0.2  # pause before a lost job runs again, doubled each time
    most_retry_s: float = 10.0

    def pause_s(self, losses: int) -> float:
        """Pause before a job that was lost so often runs again."""
        return float(min(self.retry_s * 2 ** (losses - 1), self.most_retry_s))
