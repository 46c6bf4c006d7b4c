"""Who asks: from the `Authorization` of a request to a `Caller`, the same for HTTP and gRPC.

One `Access` per ingress process, made from its settings; every front calls `authorise` first and hands the `Caller`
on to the service. The presented key is hashed and looked up under a secret of this process, so that neither the
time taken nor this process's memory tells anything about a key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.rate_limits import Account, Clock, Lease
from penstock.cluster.key_file import KeyEntry, key_digest

_SCHEME = b"Bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who may ask. `tenant` feeds fairness and the prefix caches' separation."""

    name: str
    tenant: str
    models: frozenset[str] | None  # None = all
    operator: bool  # may read /metrics and /status
    account: Account

    def lease(self) -> Lease:
        """Begin one request against the key's limits; a context manager. Raises HttpProblem 429."""
        return self.account.lease()

    def may_use(self, model: str) -> bool:
        """True where the key has the right to the model."""
        return self.models is None or model in self.models

    def check_model(self, model: str) -> None:
        """Raises HttpProblem 403 where the key lacks the right to the model."""
        if not self.may_use(model):
            raise HttpProblem(
                403, "permission_error", f"this key may not use the model {model[:128]!r}", "model", "model_not_allowed"
            )


class Access:
    """All keys of one process. Without any, everybody is the one anonymous caller, without limits."""

    def __init__(
        self, entries: Sequence[KeyEntry], api_key: str = "", *, clock: Clock = time.monotonic, share: float = 1.0
    ) -> None:
        """`api_key`: the single key of `--api-key`; it has no limits and may do all. `share`: see `Account`."""
        keys = [*entries]
        if api_key:
            keys.append(KeyEntry("api-key", key_digest(api_key), operator=True))
        self._secret = secrets.token_bytes(32)
        self._callers = {self._seal(entry.digest): _caller(entry, clock, share) for entry in keys}
        anyone = KeyEntry("anonymous", b"", operator=True)
        self._anonymous = None if keys else _caller(anyone, clock, share)

    @property
    def asks_for_keys(self) -> bool:
        """False: everybody is let in."""
        return self._anonymous is None

    def authorise(self, authorization: Sequence[bytes]) -> Caller:
        """The caller behind all values of the `authorization` header (HTTP) or metadata (gRPC) of one request.

        Exactly one `Bearer <key>`, spelled so, is accepted. Raises HttpProblem 401.
        """
        if self._anonymous is not None:
            return self._anonymous
        stated = authorization[0] if len(authorization) == 1 else b""
        bearer = stated.startswith(_SCHEME)
        digest = hashlib.sha256(stated[len(_SCHEME) :]).digest()
        caller = self._callers.get(self._seal(digest))
        if caller is None or not bearer:
            raise HttpProblem(401, "authentication_error", "a valid API key is required", code="invalid_api_key")
        return caller

    def _seal(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def _caller(entry: KeyEntry, clock: Clock, share: float) -> Caller:
    models = frozenset(entry.models) or None
    return Caller(entry.name, entry.tenant, models, entry.operator, Account(entry, clock, share))
