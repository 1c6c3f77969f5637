"""The places on the cluster that a group of workers holds, and their way back.

Ray keeps a placement group until the job ends, however its workers end; Ray Train's controller
gives it back unless it is killed itself. In a sweep, which is one long job, such places would be
lost one by one.
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

HEAD = "node:__internal_head__"  # part of the head node alone: what the trials' drivers hold
JOB_DIGITS = 8  # of a group's id, the last ones: the job that made it


def beside_me() -> NodeAffinitySchedulingStrategy:
    """On the node of this process, with which it would be lost anyway.

    Ray puts an actor that asks for nothing on any node, a spot worker's as well.
    """
    here = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(here, soft=False)


def of_this_worker() -> str:
    """The id of the placement group that this process works in, in hex."""
    group = get_current_placement_group()
    return group.id.hex() if group is not None else ""


def of_workers() -> set[str]:
    """Ids of the groups of workers that this job holds or waits for; asks the head alone.

    Not those of other jobs, and not those that Ray Tune makes for the trials' drivers.
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
    """Ids of the nodes on which the group `group` has its places."""
    with contextlib.suppress(ValueError, KeyError):  # not the id of a group, or it is gone
        facts = placement_group_table(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
        return set(facts["bundles_to_node_id"].values())
    return set()


def leaving_nodes() -> set[str]:
    """Ids of the nodes that Ray was told will be taken away: spot instances, scaling down."""
    return set(ray._private.state.state.get_draining_nodes())


def free(group: str) -> None:
    """Give the place back; one that was given back already is fine. Its workers end with it."""
    with contextlib.suppress(ValueError):  # not the id of a group
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
