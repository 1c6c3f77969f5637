"""Placement groups of the workers: which ones this job holds, on which nodes, and their removal.

Ray keeps a placement group until the job ends, however its workers end. Ray Train's controller
removes it unless the controller itself is killed. A sweep is one long job, in which groups that are
left over would use up the cluster.
"""

import contextlib

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

HEAD = "node:__internal_head__"  # a resource of the head node alone, held by the trials' drivers
JOB_DIGITS = 8  # the last hex digits of a group's id are the id of the job that created it


def same_node_strategy() -> NodeAffinitySchedulingStrategy:
    """Schedule an actor on the node of this process; without that node both are lost anyway.

    By default Ray puts an actor that needs no resources on any node, also on a spot instance.
    """
    here = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(here, soft=False)


def current_group() -> str:
    """Id (hex) of the placement group that this process runs in; empty if none."""
    group = get_current_placement_group()
    return group.id.hex() if group is not None else ""


def worker_groups() -> set[str]:
    """Ids of the worker groups' placement groups of this job, created or pending.

    Without the groups that Ray Tune creates for the trials' drivers. Queries the head node alone.
    """
    job = ray.get_runtime_context().get_job_id()
    return {
        group
        for group, facts in placement_group_table().items()
        if group[-JOB_DIGITS:] == job
        and facts["state"] != "REMOVED"
        and not any(HEAD in bundle for bundle in facts["bundles"].values())
    }


def nodes_of(group: str) -> set[str]:
    """Ids of the nodes that hold the bundles of placement group `group`; empty if it is gone."""
    with contextlib.suppress(ValueError, KeyError):  # not an id, or a removed group
        facts = placement_group_table(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
        return set(facts["bundles_to_node_id"].values())
    return set()


def draining_nodes() -> set[str]:
    """Ids of the nodes whose removal was announced to Ray: spot instances, scaling down."""
    return set(ray._private.state.state.get_draining_nodes())


def remove(group: str) -> None:
    """Remove placement group `group`, and with it its workers; a no-op if it is removed already."""
    with contextlib.suppress(ValueError):  # not an id
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
