"""The wanted children of a ring service: a StatefulSet and a headless Service for each group, and what they share."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvplane_api import names
from kvplane_api.service import LLMServiceSpec
from kvplane_operator.plan import record as records
from kvplane_operator.plan.children import config_map, disruption_budget, finished, manifest, service
from kvplane_operator.plan.ring import pods
from kvplane_operator.plan.ring.groups import Group, set_name
from kvplane_operator.plan.ring.scale import Scale
from kvplane_operator.plan.snapshot import Kind, Manifest, Ref, Snapshot


@dataclass(frozen=True)
class Wanted:
    """Children as they should be, and those that stay as they are for now."""

    children: Mapping[Ref, Manifest] = field(default_factory=dict)
    kept: frozenset[Ref] = field(default_factory=frozenset)


def wanted_children(
    snapshot: Snapshot,
    spec: LLMServiceSpec,
    *,
    record: records.Record,
    config: str,
    size: int,
    groups: Sequence[Group],
    scale: Scale,
    failed: Collection[int],
    take: Collection[int],
    gone: Collection[int],
    clients: Mapping[str, str],
    long_down: bool,
) -> Wanted:
    """All children that should exist.

    A group that was given up asks for no pods; its StatefulSet then tells of the template that it failed with. One whose turn
    in a rollout has not come (it is not in ``take``) keeps the StatefulSet that it has, as does one that still drains (it
    is not in ``gone``). ``clients``: labels of the pods that clients are led to. ``long_down``: no ring has served for longer
    than one takes to load.
    """
    name = snapshot.name
    current = {group.number for group in groups if group.template == pods.template_hash(record.template)}
    to_free = set(failed) & {group.number for group in groups if group.size}
    children = [
        config_map(snapshot, config, record, ring=True),
        service(name, clients),
        service(f"{name}-pods", clients, clusterIP="None"),
    ]
    if spec.disruption.pdb == "Auto" and spec.replicas > 0:
        # One budget over all ranks of all groups: while one group is short of a rank, no other loses one to a drain. A rank
        # that is not Ready may hold KV in a ring that just forms anew, so it is no free game as other pods are, unless rings
        # do not form at all: then a drain would wait without end.
        unhealthy = "AlwaysAllow" if long_down else "IfHealthyBudget"
        children.append(disruption_budget(name, pods.selector(name), unhealthy=unhealthy))
    kept: set[Ref] = set()
    for number in (*scale.staying, *scale.made):
        ranks = 0 if number in failed else size
        children.append(_headless(name, number))
        if number in scale.made or number in to_free or number in current or number in take:
            children.append(_stateful_set(name, number, ranks=ranks, template=record.template))
        else:
            kept.add(Ref(Kind.STATEFUL_SET, set_name(name, number)))
    for number in set(scale.leaving) - set(gone):
        kept |= {Ref(kind, set_name(name, number)) for kind in (Kind.STATEFUL_SET, Kind.SERVICE)}
    return Wanted(finished(children, snapshot), frozenset(kept))


def _stateful_set(name: str, number: int, *, ranks: int, template: dict[str, Any]) -> Manifest:
    return _of_group(
        number,
        manifest(
            Kind.STATEFUL_SET,
            set_name(name, number),
            spec={
                "replicas": ranks,
                "serviceName": set_name(name, number),
                # Ranks wait for each other, so none may wait for another to be Ready, neither at the start nor in a rollout.
                "podManagementPolicy": "Parallel",
                "updateStrategy": {"type": "OnDelete"},
                "revisionHistoryLimit": 1,
                "selector": {"matchLabels": pods.group_selector(name, number)},
                "template": pods.for_group(template, number, service=name),
            },
        ),
    )


def _headless(name: str, number: int) -> Manifest:
    """The addresses of a group's ranks, by which they find rank 0 long before they are Ready."""
    return _of_group(
        number,
        manifest(
            Kind.SERVICE,
            set_name(name, number),
            spec={
                "clusterIP": "None",
                "type": "ClusterIP",
                "publishNotReadyAddresses": True,
                "selector": pods.group_selector(name, number),
                "ports": [
                    {
                        "name": "rendezvous",
                        "port": names.PORT_RING_STORE,
                        "protocol": "TCP",
                        "targetPort": names.PORT_RING_STORE,
                    }
                ],
            },
        ),
    )


def _of_group(number: int, child: Manifest) -> Manifest:
    child["metadata"]["labels"] = {names.LABEL_POOL: names.POOL_RING, names.LABEL_GROUP: str(number)}
    return child
