"""What all tests share: quiet processes, repeatable examples, and the large assets if present."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch, Ray or MLflow load, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores, not four
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # else 8 more processes

# The same examples on each run: a red test is the change's doing; --hypothesis-profile=explore
# draws new ones. No deadline: the first call of a torch kernel is slow, and machines are shared.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of image sets and network weights that DDPM_RAY_ASSETS names; skips without it."""
    folder = os.environ.get("DDPM_RAY_ASSETS")
    if not folder:
        pytest.skip("set DDPM_RAY_ASSETS to the folder of image sets and network weights")
    return Path(folder)
