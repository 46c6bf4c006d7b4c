"""`penstock roll`: replace every worker of a running cluster by a fresh one, one by one, through its controller.

For workers that should take up another image, environment or driver, or that should simply start anew. Each pool gets
one worker more for a moment; where there is no room for it, the old one goes first. Old workers drain: what they run
goes on elsewhere.
"""

from __future__ import annotations

from typing import Annotated

import typer

from penstock.cluster.commands.scale import ask_controller

HELP = "Replace all workers of a running cluster, one by one; no request is lost."


def roll(
    cluster: Annotated[str, typer.Option("--cluster", metavar="ID", help="Which one, where several run.")] = "",
    address: Annotated[str, typer.Option("--address", metavar="RAY", help="The Ray cluster; default: found.")] = "",
) -> None:
    """Tell the controller; `penstock status` shows how it gets on."""
    count: int = ask_controller(lambda controller: controller.roll.remote(), cluster, address)
    typer.echo(f"{cluster or 'the cluster'}: {count} workers are being replaced, one after the other")
