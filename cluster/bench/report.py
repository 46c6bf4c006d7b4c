"""Figures of one benchmark run, by the definitions of `vllm bench serve`.

    TTFT      first streamed chunk - send            TPOT   (latency - TTFT) / (output tokens - 1)
    ITL       gap between two chunks of a request    E2EL   last chunk - send
    goodput   requests/s that meet every stated SLO; a request of one token has TPOT 0
    send lag  send - the time the plan wanted; what an open loop is worth is shown by its 99th percentile

Used by `commands/bench.py`. Pure. Times in the result are in milliseconds, rates per second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from penstock.cluster.bench.event_stream import Outcome
from penstock.workers.errors import ConfigError

PERCENTILES = (50, 90, 95, 99)
SLO_NAMES = ("ttft", "tpot", "e2el")

Figures = dict[str, float | int | list[str]]


@dataclass(frozen=True, slots=True)
class Edges:
    """Warm-up and cool-down: requests scheduled in the first and last `share` of the run's span are not counted."""

    share: float = 0.0

    def inner(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes that count."""
        low, span = _span(outcomes)
        if not self.share or not span:
            return list(outcomes)
        return [o for o in outcomes if low + self.share * span <= o.scheduled <= low + (1 - self.share) * span]

    def inner_duration(self, outcomes: Sequence[Outcome], duration_s: float) -> float:
        """Seconds that the inner ones of all outcomes stand for: without edges the whole run with its last answers,
        else the part of the schedule that they fill, so that rates are those of the steady part."""
        _, span = _span(outcomes)
        return span * (1 - 2 * self.share) if self.share and span else duration_s


def _span(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Start and length of the schedule, in seconds."""
    times = [outcome.scheduled for outcome in outcomes]
    return min(times, default=0.0), max(times, default=0.0) - min(times, default=0.0)


def parse_slos(stated: Sequence[str]) -> dict[str, float]:
    """`ttft:200` and the like, in milliseconds. Raises ConfigError."""
    slos: dict[str, float] = {}
    for item in stated:
        name, _, value = item.partition(":")
        try:
            slos[name] = float(value)
        except ValueError:
            slos[name] = -1.0
        if name not in SLO_NAMES or slos[name] < 0:
            raise ConfigError(
                f"--goodput: {item!r} is not NAME:MILLISECONDS with a name of {', '.join(SLO_NAMES)}", "--goodput"
            )
    return slos


def figures(outcomes: Sequence[Outcome], duration_s: float, slos: Mapping[str, float]) -> Figures:
    """Everything the run is summed up in."""
    done = [outcome for outcome in outcomes if not outcome.error]
    found: Figures = {
        "duration_s": duration_s,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": sum(o.input_tokens for o in done),
        "total_output_tokens": sum(o.output_tokens for o in done),
        "total_cached_tokens": sum(o.cached_tokens for o in done),
        "request_throughput": len(done) / duration_s,
        "output_throughput": sum(o.output_tokens for o in done) / duration_s,
        "total_token_throughput": sum(o.input_tokens + o.output_tokens for o in done) / duration_s,
    }
    if slos:
        found["request_goodput"] = sum(meets(o, slos) for o in done) / duration_s
    samples = {
        "ttft": [o.ttft_s for o in done],
        "tpot": [o.tpot_s for o in done if o.output_tokens > 1],
        "itl": [gap for o in done for gap in o.itl_s],
        "e2el": [o.latency_s for o in done],
        "send_lag": [max(0.0, o.sent - o.scheduled) for o in done if o.scheduled],
    }
    for name, values in samples.items():
        found.update(_spread(name, values))
    found["errors"] = sorted({o.error for o in outcomes if o.error})[:10]
    return found


def meets(outcome: Outcome, slos: Mapping[str, float]) -> bool:
    """Whether a request kept every bound."""
    measured = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2el": outcome.latency_s}
    return all(measured[name] * 1000 <= bound for name, bound in slos.items())


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    milliseconds = np.array(values or [0.0]) * 1000
    found = {
        f"mean_{name}_ms": float(milliseconds.mean()),
        f"median_{name}_ms": float(np.median(milliseconds)),
        f"std_{name}_ms": float(milliseconds.std()),
    }
    for percentile in PERCENTILES[1:]:
        found[f"p{percentile}_{name}_ms"] = float(np.percentile(milliseconds, percentile))
    return found
