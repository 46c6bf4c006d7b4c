"""Which rows of a long table run in CI; the others are marked slow and run at the hand-over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(step: int, rows: Iterable[Any]) -> list[Any]:
    """All rows, the first and every `step`-th after it as they are. A row of several values is a tuple."""
    return [row if number % step == 0 else _slow(row) for number, row in enumerate(rows)]


def _slow(row: Any) -> Any:
    return pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
