"""Who asks: from the `Authorization` of a request to a `Caller`, the same for HTTP and gRPC.

One `Access` per ingress process, made from its settings; every front calls `authorise` first and hands the `Caller`
on to the service. The presented key is hashed and looked up under a secret of this process, so that neither the
time taken nor this process's memory tells anything about a key.

`replace` exchanges all keys at once. A key that is gone, or past its last day, opens nothing from then on; what it
opened before goes on to its end, as every accepted request does.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.cluster.ingress.call import Call
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
    operator: bool  # may read /metrics and /status, and change the list of adapters
    account: Account
    max_tokens: int | None = None  # of one choice
    not_after: float | None = None  # seconds since the epoch
    ttft_target_s: float | None = None  # None = the router's

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

    def bound(self, call: Call, stated: bool) -> Call:
        """The call within the key's `max_tokens`; where the body has stated more, HttpProblem 403."""
        most = self.max_tokens
        if most is None or call.embed or max(*call.max_tokens, call.sampling.min_tokens) <= most:
            return call
        if stated or call.sampling.min_tokens > most:
            reason = f"this key may ask for at most {most} tokens"
            raise HttpProblem(403, "permission_error", reason, "max_tokens", "max_tokens_not_allowed")
        return replace(call, max_tokens=tuple(min(tokens, most) for tokens in call.max_tokens))


class Access:
    """All keys of one process. Without any, everybody is the one anonymous caller, without limits."""

    def __init__(
        self,
        entries: Sequence[KeyEntry],
        api_key: str = "",
        *,
        clock: Clock = time.monotonic,
        share: float = 1.0,
        most_open: int | None = None,
        calendar: Clock = time.time,
    ) -> None:
        """`api_key`: the single key of `--api-key`; it has no limits and may do all. `share`: see `Account`.

        `most_open`: requests that this process serves at once; of several keys none may have more than half of them.
        `calendar` tells the seconds since the epoch, for `not_after`.
        """
        self._secret = secrets.token_bytes(32)
        self._clock, self._share, self._calendar, self._most_open = clock, share, calendar, most_open
        self._own = (KeyEntry("api-key", key_digest(api_key), operator=True),) if api_key else ()
        self._callers: dict[bytes, tuple[KeyEntry, Caller]] = {}
        anyone = KeyEntry("anonymous", b"", operator=True)
        self._anonymous = None if entries or api_key else _caller(anyone, clock, share)
        if self._anonymous is None:
            self.replace(entries)

    def replace(self, entries: Sequence[KeyEntry]) -> None:
        """From now on these keys and no others, beside the single one. A key that stays as it was keeps its account.

        ValueError on a server without keys: those who were let in without one would be shut out.
        """
        if self._anonymous is not None:
            raise ValueError("this server asks for no keys")
        callers = {}
        keys = (*entries, *self._own)
        half = max(1, self._most_open // 2) if self._most_open is not None and len(keys) > 1 else None
        for entry in keys:
            sealed = self._seal(entry.digest)
            known = self._callers.get(sealed)
            same = known is not None and known[0] == entry
            callers[sealed] = known if known and same else (entry, _caller(entry, self._clock, self._share, half))
        self._callers = callers

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
        _, caller = self._callers.get(self._seal(digest), (None, None))
        expired = caller is not None and caller.not_after is not None and self._calendar() >= caller.not_after
        if caller is None or not bearer or expired:
            raise HttpProblem(401, "authentication_error", "a valid API key is required", code="invalid_api_key")
        return caller

    def _seal(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def _caller(entry: KeyEntry, clock: Clock, share: float, most_open: int | None = None) -> Caller:
    models = frozenset(entry.models) or None
    account = Account(entry, clock, share, most_open)
    return Caller(
        entry.name,
        entry.tenant,
        models,
        entry.operator,
        account,
        entry.max_tokens,
        entry.not_after,
        entry.ttft_target_s,
    )
