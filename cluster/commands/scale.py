"""`penstock scale`: other pool sizes for a running cluster, through its controller.

Ray is joined for it: the cluster that `--address` names, the one that a `penstock serve` of this user started on this
machine, or the one that Ray itself finds. What is scaled down drains first. A later deployment that states other sizes
wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from penstock.workers.errors import ConfigError

HELP = "Change the number of workers of a running cluster; no request is lost."
ANSWER_TIMEOUT_S = 30.0


def scale(
    prefill: Annotated[int | None, typer.Option("--prefill", metavar="N", help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option("--decode", metavar="N", help="Decode workers.")] = None,
    mixed: Annotated[int | None, typer.Option("--mixed", metavar="N", help="Workers that do both.")] = None,
    cluster: Annotated[str, typer.Option("--cluster", metavar="ID", help="Which one, where several run.")] = "",
    address: Annotated[str, typer.Option("--address", metavar="RAY", help="The Ray cluster; default: found.")] = "",
) -> None:
    """Tell the controller, and print what holds now."""
    stated = {"prefill": prefill, "decode": decode, "mixed": mixed}
    changes = {role: count for role, count in stated.items() if count is not None}
    if not changes:
        raise ConfigError("state at least one of --prefill, --decode, --mixed", "--prefill")
    sizes = change_pools(changes, cluster, address)
    typer.echo(f"{cluster or 'the cluster'}: " + ", ".join(f"{count} {role}" for role, count in sizes.items()))


def change_pools(changes: dict[str, int], cluster: str, address: str) -> dict[str, int]:
    """All pool sizes after the change. Raises ConfigError for sizes that could serve nothing, or if nobody is there."""
    sizes: dict[str, int] = ask_controller(lambda controller: controller.scale.remote(changes), cluster, address)
    return sizes


def ask_controller(call: Callable[[Any], Any], cluster: str, address: str) -> Any:
    """What the cluster's controller answers to a call of one of its methods. Raises ConfigError if nobody is there."""
    # Ray takes seconds to import; nobody should wait for it to learn of a wrong flag.
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    from penstock.cluster.discovery import find_controller, only_cluster
    from penstock.cluster.ray_runtime import join_running

    with join_running(address):
        name = only_cluster(cluster)
        try:
            return ray.get(call(find_controller(name)), timeout=ANSWER_TIMEOUT_S)
        except RayTaskError as error:  # raised by the controller itself; as it was raised, without the way it came
            raise error.cause from None
        except (RayActorError, GetTimeoutError, ValueError) as error:
            raise ConfigError(f"the controller of cluster {name!r} does not answer: {error}", "--cluster") from error
