"""Who may ask for what: the table of routes, and the check of the key. Anything not in the table does not exist.

Used by `app.py`. Paths match exactly as the server decoded them: no doubled, trailing or dotted variants.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.exchange import Exchange

MODEL_PREFIX = "/v1/models/"


@dataclass(frozen=True, slots=True)
class Route:
    """One path. `open`: served without the key. `name` is its label in metrics."""

    name: str
    methods: tuple[str, ...]
    open: bool = False


ROUTES: dict[str, Route] = {
    "/v1/completions": Route("completions", ("POST",)),
    "/v1/chat/completions": Route("chat_completions", ("POST",)),
    "/v1/models": Route("models", ("GET", "HEAD")),
    "/status": Route("status", ("GET", "HEAD")),
    "/metrics": Route("metrics", ("GET", "HEAD")),
    "/health": Route("health", ("GET", "HEAD"), open=True),
    "/ready": Route("ready", ("GET", "HEAD"), open=True),
}
ONE_MODEL = Route("model", ("GET", "HEAD"))
UNKNOWN = Route("other", ())


def route_of(path: str) -> Route:
    """The route of a path; UNKNOWN for all that is not listed."""
    if path.startswith(MODEL_PREFIX) and len(path) > len(MODEL_PREFIX):
        return ONE_MODEL
    return ROUTES.get(path, UNKNOWN)


class Gate:
    """Checks the key, if there is one, in constant time."""

    def __init__(self, api_key: str) -> None:
        self._expected = hashlib.sha256(b"Bearer " + api_key.encode()).digest() if api_key else b""

    def admit(self, exchange: Exchange, route: Route) -> None:
        """Raises HttpProblem 401, 404 or 405."""
        if self._expected and not route.open:
            stated = exchange.headers(b"authorization")
            digest = hashlib.sha256(stated[0] if len(stated) == 1 else b"").digest()
            if not hmac.compare_digest(digest, self._expected):
                raise HttpProblem(401, "authentication_error", "a valid API key is required", code="invalid_api_key")
        if route is UNKNOWN:
            raise HttpProblem(404, "not_found_error", "no such path", code="not_found")
        if exchange.method not in route.methods:
            allowed = ", ".join(route.methods)
            raise HttpProblem(
                405, "invalid_request_error", f"only {allowed} here", code="method_not_allowed", allow=allowed
            )
