"""Where the ranks of one worker go on a Ray cluster: a bundle of resources for each, in one placement group.

`actor_host.py` uses it. All bundles on one node where a node is large enough, since ranks talk in every step; else on
as few nodes as Ray finds, and it is said why. A group that holds resources outlives the actors in it and who made it,
so whoever ends the actors removes it, and a controller that comes back looks for those that are left.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from penstock.cluster.editions import ActorNeeds
from penstock.cluster.widths import times, words_of
from penstock.workers.protocol import Role

log = logging.getLogger(__name__)

ON_ONE_NODE, ON_FEW_NODES = "STRICT_PACK", "PACK"
_LEAST_CPUS = 0.001  # Ray wants something in every bundle
_MARKER = 0.001  # as Ray's own options ask for an accelerator's type


@dataclass(frozen=True, slots=True)
class Placement:
    """One worker's placement group. `words` say why it is spread over nodes; empty: it is not."""

    group: PlacementGroup
    words: str = ""

    def options(self, rank: int) -> dict[str, Any]:
        """What the actor of one rank adds to its options."""
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)}

    def remove(self) -> None:
        """Give the resources back; ends the actors that are still there. Safe to call twice."""
        remove_placement_group(self.group)


def place(needs: ActorNeeds, role: Role, width: int, name: str) -> Placement:
    """Ask Ray for the bundles of a worker of `width` ranks; returns before they are there."""
    amounts = needs.amounts(role)
    strategy, words = choose_strategy(_nodes(needs.label_selector), amounts, width)
    bundle = amounts or {"CPU": _LEAST_CPUS}
    if needs.accelerator_type:
        bundle = {**bundle, f"accelerator_type:{needs.accelerator_type}": _MARKER}
    selectors = [dict(needs.label_selector)] * width if needs.label_selector else None
    group = placement_group(
        [dict(bundle) for _ in range(width)],
        strategy=strategy,
        name=name,
        lifetime="detached",
        bundle_label_selector=selectors,
    )
    if words:
        log.warning("%s: %s", name, words)
    return Placement(group, words)


def choose_strategy(nodes: Sequence[Mapping[str, float]], amounts: Mapping[str, float], width: int) -> tuple[str, str]:
    """Ray's strategy for `width` bundles of `amounts`, and why it is not the one of a single node.

    `nodes` are all resources of those that may be used, free or not: who waits for a large node waits for it alone.
    """
    most = max((times(node, amounts) for node in nodes), default=0)
    if most >= width:
        return ON_ONE_NODE, ""
    return ON_FEW_NODES, (
        f"its {width} ranks may be on several nodes: none has room for {width} x ({words_of(amounts)}), the largest "
        f"for {most}"
    )


def waiting_reason(amounts: Mapping[str, float], width: int = 1, labels: Mapping[str, str] | None = None) -> str:
    """What a worker waits for, in words, from what Ray's nodes have at the moment. `amounts` are of one rank."""
    wanted = words_of(amounts) if width == 1 else f"{width} x ({words_of(amounts)})"
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    if all(free.get(name, 0) >= width * amount for name, amount in amounts.items()):
        return f"waiting for its process ({wanted})" if width == 1 else f"waiting for its processes ({wanted})"
    fitting = sum(min(width, times(node, amounts)) for node in _nodes(labels or {}))
    if fitting >= width:
        return f"waiting for {wanted}: all of it is in use"
    if width == 1:
        return f"waiting for {wanted}: no node has it"
    return f"waiting for {wanted}: the nodes have room for {fitting}"


def find_placements(prefix: str) -> dict[str, Placement]:
    """Placement groups whose name begins so, by name, that have not been removed."""
    found: dict[str, Placement] = {}
    table: Mapping[str, Mapping[str, Any]] = placement_group_table()
    for entry in table.values():
        if str(entry["name"]).startswith(prefix) and entry["state"] != "REMOVED":
            group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(entry["placement_group_id"])))
            words = "" if entry["strategy"] == ON_ONE_NODE else "its ranks may be on several nodes"
            found[str(entry["name"])] = Placement(group, words)
    return found


def _nodes(selector: Mapping[str, str]) -> list[Mapping[str, float]]:
    """Resources of the live nodes that have these labels; what is no plain value in the selector is Ray's to judge."""
    plain = {key: want for key, want in selector.items() if want.replace("-", "").replace("_", "").isalnum()}
    return [
        node["Resources"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and all(node.get("Labels", {}).get(key) == want for key, want in plain.items())
    ]
