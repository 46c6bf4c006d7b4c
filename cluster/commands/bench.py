"""`penstock bench`: load on a running server, and its figures by vLLM's definitions.

Lengths are fixed or from a trace; arrivals by a process at a rate, or as fast as a concurrency allows; prompts may
share prefixes and be turns of conversations. Prints a table, writes JSON. The first request is a warm-up, not counted.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from penstock.cluster.bench.arrivals import SHAPES
from penstock.cluster.bench.ideal_cache import infinite_cache_tokens
from penstock.cluster.bench.record import write_record
from penstock.cluster.bench.report import Edges, Figures, figures, parse_slos
from penstock.cluster.bench.runner import Run, Target, run_load
from penstock.cluster.bench.sessions import SessionShape, with_shared_prefixes, with_turns
from penstock.cluster.bench.traces import Scaling, Slice, read_trace
from penstock.cluster.bench.workload import Planned, fixed_plan
from penstock.cluster.commands.ask import ask
from penstock.cluster.commands.declaration import declare
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
    "arrival": (_option(str, "--arrival", "SHAPE", f"How the rate varies: {', '.join(SHAPES)}."), "gamma"),
    "max_concurrency": (_option(int | None, "--max-concurrency", "C", "Most requests in flight."), None),
    "input_len": (_option(int, "--input-len", "T", "Prompt tokens."), 256),
    "output_len": (_option(int, "--output-len", "T", "Generated tokens."), 64),
    "shared_prefix_len": (_option(int, "--shared-prefix-len", "T", "Tokens of a system prompt before each."), 0),
    "shared_prefixes": (_option(int, "--shared-prefixes", "N", "Different system prompts."), 1),
    "turns": (_option(int, "--turns", "N", "Turns of a conversation; each carries all before it."), 1),
    "think_time": (_option(float, "--think-time", "S", "Mean seconds between answer and next turn."), 1.0),
    "trace": (_option(Path | None, "--trace", "FILE", "Mooncake .jsonl, Azure or BurstGPT .csv."), None),
    "trace_start": (_option(float, "--trace-start", "S", "Leave out the trace's first seconds."), 0.0),
    "trace_duration": (_option(float, "--trace-duration", "S", "Seconds of the trace to send."), math.inf),
    "length_divisor": (_option(float, "--length-divisor", "F", "Divide a trace's lengths."), 1.0),
    "time_stretch": (_option(float, "--time-stretch", "F", "Stretch a trace's time."), 1.0),
    "trace_keep": (_option(float, "--trace-keep", "F", "Share of a trace's requests to send."), 1.0),
    "edges": (_option(float | None, "--edges", "F", "Uncounted first and last share; traces: 0.1, else 0."), None),
    "goodput": (_option(list[str] | None, "--goodput", "NAME:MS", "SLO: ttft, tpot, e2el; repeatable."), None),
    "seed": (_option(int, "--seed", "N", "Of prompts and arrivals."), 0),
    "record": (_option(Path | None, "--record", "FILE", "One JSON line per request."), None),
    "json_file": (_option(Path | None, "--json", "FILE", "Write the figures here; - prints them."), None),
}


def bench_command() -> Callable[..., None]:
    """The function that typer makes a command of."""

    def bench(**given: Any) -> None:
        slos = parse_slos(given["goodput"] or ())
        _check(given)
        target, limits = _target(given)
        plan, left_out = _plan(given, limits)
        run = _run(target, plan)
        found = {**_stated(given), **left_out, **_figures(run, slos, _edges(given), limits.block_size)}
        if given["record"] is not None:
            write_record(given["record"], run.outcomes)
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


@dataclass(frozen=True, slots=True)
class _Limits:
    """What the server can take, and how it cuts prompts into cache blocks."""

    max_model_len: int | None
    block_size: int


POSITIVE = (
    "num_prompts request_rate burstiness input_len output_len turns trace_duration length_divisor time_stretch "
    "trace_keep shared_prefixes"
).split()


def _check(given: dict[str, Any]) -> None:
    """Mistakes that need no server to be seen."""
    for name in POSITIVE:
        if not given[name] > 0:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag}: {given[name]} must be more than zero", key=flag)
    _edges(given)
    if given["arrival"] not in SHAPES:
        raise ConfigError(f"--arrival: {given['arrival']!r} is not one of {', '.join(SHAPES)}", key="--arrival")
    if given["trace"] is not None and not given["trace"].is_file():
        raise ConfigError(f"--trace: {given['trace']}: no such file", key="--trace")


def _plan(given: dict[str, Any], limits: _Limits) -> tuple[list[Planned], dict[str, int]]:
    """The requests, and how many rows of a trace were left out."""
    count, seed = given["num_prompts"], given["seed"]
    if given["trace"] is not None:
        scaling = Scaling(given["length_divisor"], given["time_stretch"], given["trace_keep"])
        part = Slice(count, given["trace_start"], given["trace_duration"], limits.max_model_len)
        trace = read_trace(given["trace"], part, scaling, seed)
        return list(trace.plan), {"rows_without_output": trace.without_output, "rows_too_long": trace.too_long}
    arrivals = SHAPES[given["arrival"]](count, given["request_rate"], given["burstiness"], seed)
    plan = fixed_plan(count, given["input_len"], given["output_len"], arrivals)
    plan = with_turns(plan, SessionShape(given["turns"], given["think_time"]), seed)
    return with_shared_prefixes(plan, given["shared_prefixes"], given["shared_prefix_len"], seed), {}


def _edges(given: dict[str, Any]) -> Edges:
    stated = given["edges"]
    share = (0.1 if given["trace"] is not None else 0.0) if stated is None else stated
    if not 0.0 <= share < 0.5:
        raise ConfigError(f"--edges: {share} must be from 0 to less than 0.5", key="--edges")
    return Edges(share)


def _target(given: dict[str, Any]) -> tuple[Target, _Limits]:
    url, key = server_address(given["url"], given["api_key"])
    served = _served_model(url, key, given["model"])
    target = Target(
        url=url,
        model=served["id"],
        vocab_size=served["vocab_size"],
        api_key=key,
        max_concurrency=given["max_concurrency"],
        seed=given["seed"],
    )
    return target, _Limits(served["max_model_len"], served["block_size"])


def _served_model(url: str, key: str, name: str | None) -> dict[str, Any]:
    """What `/v1/models` says of the model that was named, or of the first."""
    models: list[dict[str, Any]] = ask(url, "/v1/models", key)["data"]
    found = next((model for model in models if name in (None, "", model["id"])), None)
    if found is None:
        raise ConfigError(f"--model: {name!r} is none of {', '.join(model['id'] for model in models)}", key="--model")
    return found


def _run(target: Target, plan: list[Planned]) -> Run:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=len(plan))

        async def both() -> Run:
            first = Planned(0.0, plan[0].input_tokens, min(4, plan[0].output_tokens))
            await run_load(replace(target, seed=target.seed + 1), [first], lambda outcome: None)
            return await run_load(target, plan, lambda outcome: progress.advance(task))

        return asyncio.run(both())


def _figures(run: Run, slos: dict[str, float], edges: Edges, block_size: int) -> Figures:
    """Figures of the counted requests; cache hits are judged over all of them, since each feeds the next."""
    found = figures(edges.inner(run.outcomes), edges.inner_duration(run.outcomes, run.duration_s), slos)
    order = sorted(range(len(run.prompts)), key=lambda number: run.outcomes[number].sent)
    ideal, total = infinite_cache_tokens((run.prompts[number] for number in order), block_size)
    found["failed"] = sum(bool(outcome.error) for outcome in run.outcomes)
    found["cache_hit_rate"] = sum(outcome.cached_tokens for outcome in run.outcomes) / max(1, total)
    found["infinite_cache_hit_rate"] = ideal / max(1, total)
    return found


def _stated(given: dict[str, Any]) -> dict[str, Any]:
    """The settings a result is worth nothing without."""
    names = (
        "num_prompts burstiness arrival max_concurrency input_len output_len shared_prefix_len shared_prefixes turns "
        "think_time trace_start length_divisor time_stretch trace_keep seed"
    ).split()
    rate = given["request_rate"]
    trace = given["trace"].name if given["trace"] is not None else None
    return {**{n: given[n] for n in names}, "request_rate": None if math.isinf(rate) else rate, "trace": trace}


def _table(found: dict[str, Any]) -> Table:
    table = Table("figure", "value", box=None, pad_edge=False)
    for name, value in found.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else str(value)
        table.add_row(name, shown)
    return table
