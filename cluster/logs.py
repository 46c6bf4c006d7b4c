"""The logs of the processes in this room, and the access log: one line per HTTP request, and what may stand in it.

The ingress and the controller begin theirs here; `ingress/stopwatch.py` writes a line when an exchange is over. A line
holds names of ours, numbers, and a request id with every unusual character replaced; never text, tokens or keys. The
format is that of `workers/logs.py`.
"""

from __future__ import annotations

import logging
import re

from penstock.workers.logs import configure
from penstock.workers.settings import LogSettings

MAX_ID_CHARS = 128
_access = logging.getLogger("penstock.access")
_UNUSUAL = re.compile(r"[^A-Za-z0-9._:/-]")


def begin_logs(settings: LogSettings, part: str) -> None:
    """Set this process's log up. `part` is its name there."""
    configure(settings, part)
    _access.disabled = not settings.access


def write_access(
    request_id: str, method: str, handler: str, status: int, *, tenant: str, **account: str | int | float
) -> None:
    """Note one request that is over. `handler` and `method` are of closed sets; `account` holds figures and ids."""
    if not _access.isEnabledFor(logging.INFO):
        return
    fields = {
        "id": harmless(request_id) or "-",
        "method": method,
        "route": handler,
        "status": status,
        "tenant": harmless(tenant),
        **account,
    }
    _access.info("request", extra={"fields": fields})


def harmless(identifier: str) -> str:
    """An id that can neither break a line nor pass for another field."""
    return _UNUSUAL.sub("?", identifier[:MAX_ID_CHARS])
