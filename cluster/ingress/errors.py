"""The one table from Penstock's errors to what an HTTP client sees: status, type, code, headers, body.

Used by everything in this folder. Bodies are `{"error": {"message", "type", "param", "code"}}`, as OpenAI clients
expect. Nothing internal (paths, addresses, tracebacks) leaves through here: unknown exceptions become one fixed text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import FailureCode

DEFAULT_RETRY_AFTER_S = 1.0
_WITH_RETRY_AFTER = {429, 503}


@dataclass(eq=False)  # not frozen: an exception's traceback is set while it travels
class HttpProblem(Exception):  # noqa: N818 - the answer itself, raised to leave early
    """An answer that is not 200. `close`: the connection is in no state to be reused."""

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    may_retry: bool | None = None  # None: let the client decide by the status
    allow: str = ""
    close: bool = False

    def body(self) -> bytes:
        """The JSON error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers beside content type and length."""
        found: list[tuple[bytes, bytes]] = []
        wait_s = self.retry_after_s
        if wait_s is None and self.status in _WITH_RETRY_AFTER:
            wait_s = DEFAULT_RETRY_AFTER_S
        if wait_s is not None:
            found.append((b"retry-after", str(max(1, math.ceil(wait_s))).encode()))
        if self.may_retry is not None:
            found.append((b"x-should-retry", b"true" if self.may_retry else b"false"))
        if self.allow:
            found.append((b"allow", self.allow.encode()))
        if self.close:
            found.append((b"connection", b"close"))
        return found


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    kind: str
    code: str
    may_retry: bool | None = None


_UNAVAILABLE = "service_unavailable"
_BY_CODE = {
    FailureCode.BAD_REQUEST: _Answer(400, "invalid_request_error", "bad_request"),
    FailureCode.TOO_LARGE: _Answer(400, "invalid_request_error", "context_length_exceeded"),
    FailureCode.QUEUE_FULL: _Answer(503, _UNAVAILABLE, "queue_full"),
    FailureCode.DRAINING: _Answer(503, _UNAVAILABLE, "draining"),
    FailureCode.GRAMMAR: _Answer(400, "invalid_request_error", "grammar", may_retry=False),
    FailureCode.ADAPTER: _Answer(503, _UNAVAILABLE, "adapter_unavailable"),
    FailureCode.DEADLINE: _Answer(504, "timeout", "deadline", may_retry=False),
    FailureCode.LEASE_EXPIRED: _Answer(503, _UNAVAILABLE, "lease_expired"),
    FailureCode.TRANSFER_FAILED: _Answer(503, _UNAVAILABLE, "transfer_failed"),
    FailureCode.KV_DAMAGED: _Answer(503, _UNAVAILABLE, "kv_damaged"),
    FailureCode.WORKER_LOST: _Answer(503, _UNAVAILABLE, "worker_lost"),
    FailureCode.INCOMPATIBLE: _Answer(503, _UNAVAILABLE, "incompatible"),
    FailureCode.NO_WORKER: _Answer(503, _UNAVAILABLE, "no_worker"),
    FailureCode.OVERLOADED: _Answer(503, _UNAVAILABLE, "overloaded"),
    FailureCode.TENANT_LIMIT: _Answer(429, "rate_limit_exceeded", "tenant_limit"),
    FailureCode.POISONED: _Answer(500, "server_error", "poisoned", may_retry=False),
    FailureCode.CANCELLED: _Answer(499, "cancelled", "cancelled"),
    FailureCode.INTERNAL: _Answer(500, "server_error", "internal", may_retry=False),
}


def problem_of(error: BaseException) -> HttpProblem:
    """The answer for any exception. Those that Penstock did not raise on purpose are a 500 without details."""
    if isinstance(error, HttpProblem):
        return error
    if isinstance(error, RequestError):
        return HttpProblem(400, "invalid_request_error", str(error), error.field, error.code or "invalid_value")
    if isinstance(error, RefusedError):
        answer = _BY_CODE[error.code]
        retry = error.retry_after_s
        return HttpProblem(
            answer.status, answer.kind, str(error), code=answer.code, retry_after_s=retry, may_retry=answer.may_retry
        )
    message = "internal error; the server's log has the details"
    return HttpProblem(500, "server_error", message, code="internal", may_retry=False)


def model_not_found(name: str) -> HttpProblem:
    """404 for a model that is not served here; the name is cut, it is the caller's."""
    return HttpProblem(404, "not_found_error", f"the model {name[:128]!r} does not exist", "model", "model_not_found")
