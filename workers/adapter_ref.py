"""Which low-rank adapter a request is for: plain data: a part of `protocol.GenerateRequest`.

The ingress writes it out of its list of adapters (`cluster/ingress/adapters.py`), it travels with the request, and each
worker that computes the request loads exactly these bytes (`lora/`). Knows neither files nor tensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
REVISION_BYTES = 32


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter of one content: who changes its files makes another one of it."""

    name: str  # as callers and operators say it; see ADAPTER_NAME
    folder: str  # below `adapters.directory`
    revision: bytes  # SHA-256 over its files, 32 bytes
