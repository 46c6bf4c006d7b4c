"""`penstock bench`: load on a running server, and its figures by vLLM's definitions.

Lengths are fixed or from a trace; arrivals at a rate, or as fast as a concurrency allows. Prints a table, writes JSON.
The first request is a warm-up and not counted.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from penstock.cluster.bench.report import Figures, figures, parse_slos
from penstock.cluster.bench.runner import Target, run_load
from penstock.cluster.bench.workload import Planned, Scaling, arrival_times, fixed_plan, read_trace
from penstock.cluster.commands.declaration import declare
from penstock.cluster.commands.status import fetch_status
from penstock.cluster.config import server_address
from penstock.workers.errors import ConfigError

HELP = "Send load to a running server and report TTFT, TPOT, ITL, throughput and goodput."


def _option(kind: Any, spelling: str, metavar: str, text: str) -> Any:
    return Annotated[kind, typer.Option(spelling, metavar=metavar, help=text)]


PARAMETERS: dict[str, tuple[Any, object]] = {
    "url": (_option(str | None, "--url", "U", "Server; default $PENSTOCK_URL."), None),
    "api_key": (_option(str | None, "--api-key", "K", "Default $PENSTOCK_API_KEY."), None),
    "model": (_option(str | None, "--model", "S", "Name in the API; default the server's first."), None),
    "num_prompts": (_option(int, "--num-prompts", "N", "Requests to send."), 100),
    "request_rate": (_option(float, "--request-rate", "R", "Requests per second; inf: all at once."), math.inf),
    "burstiness": (_option(float, "--burstiness", "B", "Shape of the arrivals; 1: Poisson."), 1.0),
    "max_concurrency": (_option(int | None, "--max-concurrency", "C", "Most requests in flight."), None),
    "input_len": (_option(int, "--input-len", "T", "Prompt tokens."), 256),
    "output_len": (_option(int, "--output-len", "T", "Generated tokens."), 64),
    "trace": (_option(Path | None, "--trace", "FILE", "Lengths and times: Mooncake .jsonl, Azure .csv."), None),
    "length_divisor": (_option(float, "--length-divisor", "F", "Divide a trace's lengths."), 1.0),
    "time_stretch": (_option(float, "--time-stretch", "F", "Stretch a trace's time."), 1.0),
    "goodput": (_option(list[str] | None, "--goodput", "NAME:MS", "SLO: ttft, tpot, e2el; repeatable."), None),
    "seed": (_option(int, "--seed", "N", "Of prompts and arrivals."), 0),
    "json_file": (_option(Path | None, "--json", "FILE", "Write the figures here; - prints them."), None),
}


def bench_command() -> Callable[..., None]:
    """The function that typer makes a command of."""

    def bench(**given: Any) -> None:
        slos = parse_slos(given["goodput"] or ())
        scaling = Scaling(_positive(given, "length_divisor"), _positive(given, "time_stretch"))
        plan = _plan(given, scaling)
        target = _target(given, scaling)
        found = {**_stated(given), **_run(target, plan, slos)}
        if given["json_file"] is not None and str(given["json_file"]) != "-":
            given["json_file"].write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if str(given["json_file"]) == "-":
            typer.echo(json.dumps(found))
        else:
            Console().print(_table(found))
        if found["failed"]:
            raise typer.Exit(1)

    declare(bench, PARAMETERS)
    return bench


def _plan(given: dict[str, Any], scaling: Scaling) -> list[Planned]:
    count = int(_positive(given, "num_prompts"))
    if given["trace"] is not None:
        return read_trace(given["trace"], count, scaling)
    _positive(given, "input_len"), _positive(given, "output_len")
    arrivals = arrival_times(count, _positive(given, "request_rate"), _positive(given, "burstiness"), given["seed"])
    return fixed_plan(count, given["input_len"], given["output_len"], arrivals)


def _positive(given: dict[str, Any], name: str) -> float:
    value = given[name]
    if not value > 0:
        raise ConfigError(f"--{name.replace('_', '-')}: {value} must be more than zero", key=f"--{name}")
    return float(value)


def _target(given: dict[str, Any], scaling: Scaling) -> Target:
    status = fetch_status(given["url"], given["api_key"])
    url, key = server_address(given["url"], given["api_key"])
    return Target(
        url=url,
        model=given["model"] or status["models"][0],
        vocab_size=status["vocab_size"],
        api_key=key,
        max_concurrency=given["max_concurrency"],
        seed=given["seed"],
        scaling=scaling,
    )


def _run(target: Target, plan: list[Planned], slos: dict[str, float]) -> Figures:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=len(plan))

        async def both() -> Figures:
            first = Planned(0.0, plan[0].input_tokens, min(4, plan[0].output_tokens))
            await run_load(target, [first], lambda outcome: None)
            outcomes, duration_s = await run_load(target, plan, lambda outcome: progress.advance(task))
            return figures(outcomes, duration_s, slos)

        return asyncio.run(both())


def _stated(given: dict[str, Any]) -> dict[str, Any]:
    """The settings a result is worth nothing without."""
    names = "num_prompts burstiness max_concurrency input_len output_len length_divisor time_stretch seed".split()
    rate = given["request_rate"]
    trace = given["trace"].name if given["trace"] is not None else None
    return {**{n: given[n] for n in names}, "request_rate": None if math.isinf(rate) else rate, "trace": trace}


def _table(found: dict[str, Any]) -> Table:
    table = Table("figure", "value", box=None, pad_edge=False)
    for name, value in found.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else str(value)
        table.add_row(name, shown)
    return table
