"""Finished spans as plain values, and where they go; used by `tracing.py` here and in `cluster/`.

Spans are made when they are over, out of times that were noted anyway, so tracing costs nothing while a request runs.
The tracing library is imported only where an endpoint is configured (`span_export.py`).

Attribute names follow OpenTelemetry's conventions for generative AI, with vLLM's older spellings beside them where
they mean the same. Never in a span: prompts, outputs, keys.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from penstock.workers.errors import ConfigError
from penstock.workers.settings import TracingSettings
from penstock.workers.trace_context import TraceContext

Value = str | int | float | bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """One finished span. Times are monotonic seconds of this machine; `parent_id` 0: the trace begins here."""

    name: str
    context: TraceContext
    parent_id: int
    began: float
    ended: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    events: tuple[tuple[str, float], ...] = ()  # name, monotonic seconds
    error: str = ""  # why it failed, out of a closed set; empty = it did not
    server: bool = False  # answers a call from outside


class SpanSink(Protocol):
    """Takes finished spans; never blocks, drops them when too many wait."""

    dropped: int  # so far

    def take(self, span: Span) -> None:
        """Queue one span."""
        ...

    def close(self) -> None:
        """Send what waits, for a short time."""
        ...


def below(parent: TraceContext, name: str, began: float, ended: float, label: str = "", **more: object) -> Span:
    """A span under `parent`; `label` names it among spans of equal name. `more`: further fields of `Span`."""
    context = parent.child(f"{name}/{label}")
    return Span(name, context, parent.span_id, began, ended, **more)  # type: ignore[arg-type]


def open_sink(settings: TracingSettings, part: str) -> SpanSink | None:
    """Where spans of this process go; None where tracing is off. `part` is the process's role in the cluster.

    Raises ConfigError when an endpoint is set and the tracing packages are not installed.
    """
    if not settings.endpoint:
        return None
    try:
        # Late: half a second to import, and only where somebody wants traces.
        from penstock.workers.span_export import OtlpSink
    except ImportError as error:
        raise ConfigError(
            f"tracing needs the packages of penstock[tracing]: {error}", key="tracing.endpoint"
        ) from error
    return OtlpSink(settings, part)


def wall_offset() -> float:
    """What to add to monotonic seconds for seconds since 1970."""
    return time.time() - time.monotonic()
