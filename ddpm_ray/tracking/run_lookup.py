"""The MLflow run of a training run or sweep: found by its identity, or created.

All lookups are by a tag that holds the identity of the run's folder. A lost answer may leave a
second run; it is deleted at the next lookup.
"""

from mlflow.entities import LifecycleStage, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from ddpm_ray.tracking.errors import TrackingError, answering, restore
from ddpm_ray.tracking.mlflow_client import BoundedClient
from ddpm_ray.tracking.run_info import TrackedRun

RUN_TAG = "ddpm_ray.run"  # identity of the run's folder, by which a restarted job finds its run
OWNER_TAG = "ddpm_ray.driver"  # driver that opened the run last: it alone may end the run
TWIN_TAG = "ddpm_ray.twin_of"  # marks a duplicate, created after a lost answer and then deleted
MAX_EXPERIMENTS = 500  # experiments searched in one call


def find_or_create_run(
    uri: str,
    experiment: str,
    name: str,
    identity: str,
    artifacts: str | None,
    parent: str = "",
    owner: str = "",
) -> TrackedRun:
    """Find or create the MLflow run of the training run `identity`, and set it to RUNNING.

    All experiments are searched, because users rename them. `artifacts`, `parent` and `owner` are
    as in RunMetadata. Raises TrackingError, also where the run was deleted: a second one would hold
    only some of its rows.
    """
    with answering(uri):
        client = BoundedClient(uri)
        hits, is_new = runs_of(client, identity, experiment), False
        if not hits:
            _refuse_deleted(client, uri, identity)
            experiment_id = _experiment(client, uri, experiment, artifacts)
            tags = {RUN_TAG: identity} | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
            client.create_run(experiment_id, None, tags, name)
            hits, is_new = runs_with(client, identity, [experiment_id]), True
        # MLflow's client repeats a creation whose answer was lost: keep one run, delete the others.
        run, *twins = sorted(hits, key=lambda hit: str(hit.info.run_id))
        for twin in twins:
            client.set_tag(twin.info.run_id, TWIN_TAG, run.info.run_id)
            client.delete_tag(
                twin.info.run_id, RUN_TAG
            )  # else a deleted twin would look like the deleted run
            client.delete_run(twin.info.run_id)
        if owner:
            client.set_tag(run.info.run_id, OWNER_TAG, owner)
        client.update_run(run.info.run_id, status="RUNNING")
        info = run.info
        return TrackedRun(uri, info.run_id, info.experiment_id, info.start_time, owner, is_new)


def runs_of(client: BoundedClient, identity: str, experiment: str) -> list[Run]:
    """Return the runs with that identity in the named experiment, else in any other."""
    found = client.get_experiment_by_name(experiment)
    if found is not None and (hits := runs_with(client, identity, [found.experiment_id])):
        return hits
    return runs_with(client, identity, _experiments(client, ViewType.ACTIVE_ONLY))


def runs_with(
    client: BoundedClient, identity: str, experiments: list[str], view: int = ViewType.ACTIVE_ONLY
) -> list[Run]:
    """Runs in `experiments` (ids) that are tagged with `identity`."""
    query, hits = f"tags.`{RUN_TAG}` = '{identity}'", []
    for start in range(0, len(experiments), MAX_EXPERIMENTS):
        hits += client.search_runs(experiments[start : start + MAX_EXPERIMENTS], query, view)
    return hits


def _experiments(client: BoundedClient, view: int) -> list[str]:
    """Return the ids of all experiments."""
    ids, token = [], None
    while True:
        page = client.search_experiments(view, MAX_EXPERIMENTS, page_token=token)
        ids += [str(one.experiment_id) for one in page]
        if not (token := page.token):
            return ids


def _refuse_deleted(client: BoundedClient, uri: str, identity: str) -> None:
    """Raise TrackingError if the run `identity`, or its experiment, was deleted."""
    everywhere = _experiments(client, ViewType.ALL)
    deleted = runs_with(client, identity, everywhere, ViewType.DELETED_ONLY)
    if not deleted:
        return
    run_id, of = deleted[0].info.run_id, deleted[0].info.experiment_id
    if client.get_experiment(of).lifecycle_stage == LifecycleStage.DELETED:
        reason = f"the experiment {of}, with the MLflow run of this training run, was deleted"
        raise TrackingError(uri, reason, f"restore it with `{restore('experiment', of, uri)}`")
    raise TrackingError(
        uri,
        f"the MLflow run {run_id} of this training run was deleted",
        f"restore it with `{restore('run', run_id, uri)}`; or, to continue without its rows, "
        f"delete it with `mlflow gc --run-ids {run_id}` on the host of MLflow's database",
    )


def _experiment(client: BoundedClient, uri: str, name: str, artifacts: str | None) -> str:
    """Return the id of the experiment `name`; create it if it does not exist."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except MlflowException as error:  # by another process, or by a call whose answer was lost
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if not found.experiment_id:  # a server that is not MLflow and answers {}
        raise MlflowException("not an MLflow answer: an experiment without an id")
    if found.lifecycle_stage == LifecycleStage.DELETED:
        command = restore("experiment", found.experiment_id, uri)
        remedy = f"restore it with `{command}`, or set another tracking.experiment"
        raise TrackingError(uri, f"the experiment {name!r} was deleted in MLflow", remedy)
    return str(found.experiment_id)
