"""Settings of MLflow's client in the processes of jobs, and there alone.

A notebook that loads a model keeps its own: see `apply`.
"""

import logging
import os

# A dead server must cost a thread seconds, not the two minutes of the defaults (7 tries of 120 s).
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # read as MLflow is imported
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # jobs print the run's address themselves
}


def chosen() -> dict[str, str]:
    """The settings of this process: for the environment of workers that it starts."""
    return {key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()}


def apply() -> None:
    """Set them where the environment does not; called before MLflow is imported."""
    os.environ.update(chosen())
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # not how a database is made
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.ERROR)  # ours says it in a line
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # an outage is logged once, not per try
