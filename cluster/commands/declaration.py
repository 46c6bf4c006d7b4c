"""Gives a function of keywords the signature that typer reads, from a table of parameters.

Used by the commands whose options live in a table, so that code, help and tests share one list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def declare(function: Callable[..., None], parameters: Mapping[str, tuple[Any, object]]) -> None:
    """`parameters` maps each name to its `Annotated` type and its default."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    declared = [inspect.Parameter(n, kind, default=d, annotation=a) for n, (a, d) in parameters.items()]
    function.__annotations__ = {name: annotation for name, (annotation, _) in parameters.items()}
    function.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
