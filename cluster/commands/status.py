"""`penstock status`: every worker of a running cluster, as its HTTP server knows them.

Asks `GET /status` of the listener for operators; needs neither Ray nor a place on the cluster.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from penstock.cluster.commands.ask import ask
from penstock.cluster.config import admin_address
from penstock.cluster.status import WorkerStatus

HELP = "Show every worker: role, state, load, KV use."


def fetch_status(url: str | None, api_key: str | None) -> dict[str, Any]:
    """The answer of `/status`. Raises RefusedError when nobody answers, RequestError for a wrong key."""
    address, key = admin_address(url, api_key)
    return ask(address, "/status", key)


def status(
    json_output: Annotated[bool, typer.Option("--json", help="Print the server's JSON.")] = False,
    url: Annotated[str | None, typer.Option("--url", metavar="U", help="Default $PENSTOCK_ADMIN_URL.")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", metavar="K", help="Default $PENSTOCK_API_KEY.")] = None,
) -> None:
    """Print a table, or JSON."""
    found = fetch_status(url, api_key)
    if json_output:
        typer.echo(json.dumps(found, indent=2))
        return
    workers = [WorkerStatus.from_json(worker) for worker in found["workers"]]
    console = Console()
    console.print(_table(workers))
    for worker in workers:
        if worker.placement:
            console.print(f"{worker.id}: {worker.placement}", highlight=False)
    for adapter in found.get("adapters", ()):
        console.print(f"{adapter['name']}: {adapter['problem'] or adapter['revision']}", markup=False, highlight=False)
    state = "ready" if found["ready"] else f"not ready: {found['reason']}"
    console.print(f"{', '.join(found['models'])}: {state}", highlight=False)


def _table(workers: list[WorkerStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("id", "role", "width", "pids", "state", "running", "waiting", "KV use", "heartbeat"):
        table.add_column(name)
    for worker in workers:
        pids = ",".join(map(str, worker.pids))
        age = "never" if worker.age_s is None else f"{worker.age_s:.1f} s ago"
        state = f"{worker.state} ({worker.reason})" if worker.reason else worker.state
        use = f"{worker.kv_use:.0%} of {worker.kv_blocks}"
        counts = [str(worker.running), str(worker.waiting)]
        table.add_row(worker.id, worker.role.value, str(worker.width), pids, state, *counts, use, age)
    return table
