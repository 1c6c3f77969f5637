"""Settings of MLflow's client for the processes of jobs; notebooks keep their own."""

import logging
import os

# Short time-outs: by default a thread waits minutes for a dead server (7 tries of 120 s each).
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # must be set before MLflow is imported
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # jobs print the run's address themselves
}


def chosen() -> dict[str, str]:
    """Return this process's settings, for the environment of its workers."""
    return {key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()}


def apply() -> None:
    """Set them unless the environment does; call this before MLflow is imported."""
    os.environ.update(chosen())
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # hide the creation of a database
    logging.getLogger("mlflow.store.db.utils").setLevel(
        logging.ERROR
    )  # our error says it in one line
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # an outage is logged once, not per try
