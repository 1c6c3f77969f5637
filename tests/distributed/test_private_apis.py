"""Every private or unstable thing of other packages that we use, with the signature we rely on.

An upgrade that changes one fails here, by name, instead of in a run. Each row says what degrades.
"""

import importlib
import inspect
import zipfile
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private.runtime_env import packaging
from ray._raylet import PlacementGroupID

from ddpm_ray.distributed import placement_groups

# Where it is, the parameters that our call needs, and what goes wrong if it changes.
CALLED: list[tuple[str, tuple[str, ...], str]] = [
    (
        "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
        (),
        "ray_trainer.py leaves it out; else it removes healthy groups",
    ),
    (
        "ray.train.v2._internal.callbacks.datasets:DatasetsCallback",
        (),
        "ray_trainer.py leaves it out; else each start is 3 s longer",
    ),
    (
        "ray.train.torch:TorchTrainer._create_default_callbacks",
        ("self",),
        "ray_trainer.py overrides it; else both callbacks are back",
    ),
    (
        "ray.train.torch:TorchTrainer._initialize_and_run_controller",
        ("self",),
        "ray_trainer.py passes the elastic policy; else any number of workers",
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy._count_possible_workers",
        ("self", "reserved_resources"),
        "elastic_scaling.py overrides it; else Ray takes any number of workers",
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy"
        "._get_num_workers_for_resource_request",
        ("self",),
        "elastic_scaling.py overrides it; else the workers take the resources of the evaluations",
    ),
    (
        "ray.train:ScalingConfig._resources_per_worker_not_none",
        (),
        "elastic_scaling.py subtracts it; else no elastic run with evaluation.where=spare starts",
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy"
        ".make_decision_for_running_worker_group",
        ("self",),
        "elastic_scaling.py overrides it; else no checkpoint before a resize",
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy"
        ".make_decision_for_non_running_worker_group",
        ("self",),
        "elastic_scaling.py: as above",
    ),
    (
        "ray.train.v2._internal.execution.failure_handling:FailurePolicy.make_decision",
        ("self", "training_failed_error"),
        "failures.py: restarts do not say why",
    ),
    (
        "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError",
        ("failure",),
        "failures.py: a killed worker is a page of Ray's",
    ),
    (
        "ray.train.v2.api.exceptions:WorkerGroupError",
        ("worker_failures",),
        "failures.py: the reason of a failure is Ray's page on it",
    ),
    ("ray.train.v2._internal.execution.scaling_policy:NoopDecision", (), "elastic_scaling.py"),
    ("ray.train.v2._internal.execution.scaling_policy:ResizeDecision", (), "elastic_scaling.py"),
    (
        "ray.train.torch.config:_TorchBackend.on_start",
        ("self", "worker_group", "backend_config"),
        "rendezvous.py overrides it; else torch's store listens on every interface",
    ),
    (
        "ray.train.v2._internal.execution.worker_group:WorkerGroup.get_worker_group_state",
        ("self",),
        "startup.py: no group starts",
    ),
    (
        "ray.train.v2._internal.execution.worker_group:WorkerGroup.get_workers",
        ("self",),
        "startup.py: no group starts",
    ),
    (
        "ray.train.torch.config:get_address_and_port",
        (),
        "rendezvous.py replaces it; else torch's store listens on every interface",
    ),
    ("ray.train.torch:TorchConfig.backend_cls", (), "rendezvous.py: as above"),
    ("torch.distributed:TCPStore", (), "rendezvous.py: as above"),
    (
        "ray._private.state:GlobalState.get_draining_nodes",
        ("self",),
        "placement_groups.py: no checkpoint before a node is removed",
    ),
    (
        "ray._private.state:GlobalState.get_max_resources_from_cluster_config",
        ("self",),
        "capacity.py: a sweep on an autoscaler starts too few trials",
    ),
    (
        "ray.tune.schedulers:MedianStoppingRule.on_trial_result",
        ("self", "tune_controller", "trial", "result"),
        "early_stopping.py: no early stopping",
    ),
    (
        "ray.tune.schedulers:AsyncHyperBandScheduler.on_trial_result",
        ("self", "tune_controller", "trial", "result"),
        "early_stopping.py: no early stopping",
    ),
    ("ray._raylet:PlacementGroupID", (), "placement_groups.py: groups are not removed"),
    (
        "ray.util.placement_group:PlacementGroup",
        ("id",),
        "placement_groups.py: groups are not removed",
    ),
    ("ray.util:placement_group_table", (), "placement_groups.py: leaked groups stay"),
    (
        "ray.util:remove_placement_group",
        ("placement_group",),
        "placement_groups.py: leaked groups stay",
    ),
    ("ray.util:get_current_placement_group", (), "placement_groups.py: a group cannot name itself"),
    ("mlflow.entities:Metric", ("key", "value", "timestamp", "step"), "run_log.py: rows"),
    ("mlflow:MlflowClient.log_batch", ("run_id", "metrics"), "run_log.py: rows"),
    (
        "mlflow.data.dataset:Dataset._to_mlflow_entity",
        ("self",),
        "mlflow_runs.py: the run does not name its data set",
    ),
    (
        "s3fs:S3FileSystem._call_s3",
        ("method",),
        "remote_filesystem.py: s3fs retries by itself, and longer",
    ),
    (
        "s3fs:S3FileSystem._get_s3_method_kwargs",
        ("method",),
        "remote_filesystem.py: checksums of uploads",
    ),
    ("s3fs.errors:translate_boto_error", ("error",), "remote_filesystem.py: no bucket can be read"),
    ("torch:_foreach_lerp_", (), "ema.py: no average of weights"),
    ("torch.backends:cudnn.conv.fp32_precision", (), "feature_extractor.py: FID in TF32"),
    ("torch.backends:cudnn.rnn.fp32_precision", (), "feature_extractor.py: FID in TF32"),
    ("torch.backends:cuda.matmul.fp32_precision", (), "feature_extractor.py: FID in TF32"),
    ("torch.distributed:batch_isend_irecv", ("p2p_op_list",), "collectives.py: elastic reduction"),
]


def found(path: str) -> Any:
    module, _, names = path.partition(":")
    thing: Any = importlib.import_module(module)
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


@pytest.mark.filterwarnings("ignore")  # of packages, as they are imported
@pytest.mark.parametrize("path, needed, degrades", CALLED, ids=[row[0] for row in CALLED])
def test_it_is_there_and_takes_what_we_give_it(
    path: str, needed: tuple[str, ...], degrades: str
) -> None:
    thing = found(path)
    if needed:
        missing = set(needed) - set(inspect.signature(thing).parameters)
        assert not missing, f"{path} takes no {sorted(missing)}: {degrades}"


def test_a_placement_group_ends_with_the_job_that_made_it() -> None:
    """placement_groups.py finds this job's groups by it; else it removes those of other jobs."""
    job = ray.JobID.from_int(7)
    assert PlacementGroupID.of(job).hex()[-placement_groups.JOB_DIGITS :] == job.hex()


def test_the_head_node_s_own_resource_has_the_name_that_we_use() -> None:
    """placement_groups.py: else it takes the trials' drivers' groups for worker groups."""
    assert placement_groups.HEAD == HEAD_NODE_RESOURCE_NAME


@pytest.mark.parametrize(
    "text, degrades",
    [
        ("working_dir_files", "cli/paths.py: a submitted job's data go to a deleted folder"),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "run_tags.py: a run lacks the id of its job"),
    ],
)
def test_ray_still_names_it_so(text: str, degrades: str) -> None:
    """Names that are in no signature: in the package's own source."""
    folder = Path(ray.__file__).parent
    places = (
        "_private/runtime_env",
        "_private/ray_constants.py",
        "dashboard/modules/job",
        "job_config.py",
        "_private/node.py",
        "_private/worker.py",
    )
    files = [file for place in places for file in (folder / place, *(folder / place).glob("*.py"))]
    assert any(text.encode() in file.read_bytes() for file in files if file.is_file()), degrades


def test_mlflow_still_names_images_as_it_did() -> None:
    """run_log.py writes under such names itself; else pictures vanish from the UI."""
    source = inspect.getsource(mlflow.MlflowClient.log_image)
    assert "+timestamp+" in source
    assert "+compressed" in source
    assert MLFLOW_LOGGED_IMAGES == "mlflow.loggedImages"


def test_a_submitted_working_directory_holds_the_shipped_configs(tmp_path: Path) -> None:
    """Ray follows the link ddpm_ray/conf; else a job there finds no config by its name."""
    root = Path(__file__).parents[2] / "ddpm_ray"
    packaging._zip_files(str(root), [], str(tmp_path / "a.zip"), include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "a.zip") as packed:
        assert "conf/train/digits.yaml" in packed.namelist()
