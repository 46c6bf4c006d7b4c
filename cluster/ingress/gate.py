"""What exists and who may ask for it: the table of routes. Anything not in the table does not exist.

Used by `app.py`; `openapi.py` describes the same table. Paths match exactly as the server decoded them: no doubled,
trailing or dotted variants.

The table is offered on one side or on two: the public one, and one for operators alone (`on_side`), whose listener
stands elsewhere.

Operator routes are for programs: a request that a page makes (`Origin`) is refused there, with whatever verb and key. A
server without keys trusts whoever reaches it, so these routes then also refuse what names a public host (`Host`, DNS
rebinding).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import Enum

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.exchange import Exchange
from penstock.cluster.ingress.keys import Access, Caller

MODEL_PREFIX = "/v1/models/"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]*\]|[A-Za-z0-9_.-]*)(:[0-9]*)?\Z")
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".svc")


class Door(Enum):
    """What a route asks of its caller, where the server has keys at all."""

    OPEN = "open"  # nothing
    KEY = "key"  # any key
    OPERATOR = "operator"  # a key with the right to look at the whole server


class Side(Enum):
    """Which listener a request came by."""

    WHOLE = "whole"  # the only one there is
    PUBLIC = "public"
    OPERATORS = "operators"


@dataclass(frozen=True, slots=True)
class Route:
    """One path. `switched`: exists only where the configuration says so."""

    name: str
    methods: tuple[str, ...]
    door: Door
    switched: bool = False


_READ, _WRITE = ("GET", "HEAD"), ("POST",)
ROUTES: dict[str, Route] = {
    "/v1/completions": Route("completions", _WRITE, Door.KEY),
    "/v1/chat/completions": Route("chat_completions", _WRITE, Door.KEY),
    "/v1/embeddings": Route("embeddings", _WRITE, Door.KEY),
    "/v1/models": Route("models", _READ, Door.KEY),
    "/tokenize": Route("tokenize", _WRITE, Door.KEY),
    "/detokenize": Route("detokenize", _WRITE, Door.KEY),
    "/tokenizer_info": Route("tokenizer_info", _READ, Door.KEY, switched=True),
    "/version": Route("version", _READ, Door.KEY),
    "/openapi.json": Route("openapi", _READ, Door.KEY),
    "/v1/load_lora_adapter": Route("load_lora_adapter", _WRITE, Door.OPERATOR, switched=True),
    "/v1/unload_lora_adapter": Route("unload_lora_adapter", _WRITE, Door.OPERATOR, switched=True),
    "/status": Route("status", _READ, Door.OPERATOR),
    "/metrics": Route("metrics", _READ, Door.OPERATOR),
    "/health": Route("health", _READ, Door.OPEN),
    "/ready": Route("ready", _READ, Door.OPEN),
    "/live": Route("live", _READ, Door.OPEN),
}
ONE_MODEL = Route("model", _READ, Door.KEY)
UNKNOWN = Route("other", (), Door.KEY)
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_LABELS = {
    **{route.name: path for path, route in ROUTES.items()},
    ONE_MODEL.name: f"{MODEL_PREFIX}{{model}}",
    UNKNOWN.name: "other",
}


def labels_of(route: Route, method: str) -> tuple[str, str]:
    """Handler and method as metrics and logs name them: closed sets, whatever callers send."""
    return _LABELS[route.name], method if method in _METHODS else "other"


def route_of(path: str) -> Route:
    """The route of a path; UNKNOWN for all that is not listed."""
    if path.startswith(MODEL_PREFIX) and len(path) > len(MODEL_PREFIX):
        return ONE_MODEL
    return ROUTES.get(path, UNKNOWN)


def on_side(route: Route, side: Side) -> bool:
    """The route is offered there; what tells only that the process lives is offered on both."""
    if side is Side.WHOLE or route.door is Door.OPEN:
        return True
    return (route.door is Door.OPERATOR) is (side is Side.OPERATORS)


def admit(exchange: Exchange, route: Route, access: Access) -> Caller | None:
    """Who asks; None at an open door. Raises HttpProblem 401, 403, 404 or 405, in this order: strangers learn nothing,
    not even what does not exist."""
    caller = None if route.door is Door.OPEN else access.authorise(exchange.headers(b"authorization"))
    if route is UNKNOWN:
        raise HttpProblem(404, "not_found_error", "no such path", code="not_found")
    if caller is not None and route.door is Door.OPERATOR:
        _check_operator(exchange, caller, access)
    if exchange.method not in route.methods:
        allowed = ", ".join(route.methods)
        raise HttpProblem(
            405, "invalid_request_error", f"only {allowed} here", code="method_not_allowed", allow=allowed
        )
    return caller


def _check_operator(exchange: Exchange, caller: Caller, access: Access) -> None:
    if not caller.operator:
        raise HttpProblem(403, "permission_error", "this key is not an operator's", code="operators_only")
    hosts = () if access.asks_for_keys else [value.decode("latin-1") for value in exchange.headers(b"host")]
    if exchange.headers(b"origin") or any(_is_public(host) for host in hosts):
        raise HttpProblem(403, "permission_error", "not from another site's page", code="foreign_origin")


def _is_public(host: str) -> bool:
    """True for a name that public DNS may point anywhere, and for what is no name at all."""
    if not _HOST.match(host):
        return True
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    name = name.strip("[]").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." in name and not name.endswith((*_PRIVATE_SUFFIXES, ".svc.cluster.local"))
    return False
