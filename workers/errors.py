"""The exceptions of Penstock, one small tree; every room above `kernels` raises from it.

    PenstockError
    ├── ConfigError          a wrong flag, key, or combination; the process does not start
    ├── ModelError           a model directory that cannot be served; names the file and the key
    ├── WireError            bytes from another process that do not decode to a known message
    ├── IntegrityError       a check of our own bookkeeping failed: a defect of Penstock, never the caller's fault
    ├── DeviceError          the accelerator or the runner is gone for good; the worker process ends, quickly
    │   └── GroupError       a rank of this worker's group is gone, silent or stuck; the others end too, or go on
    ├── PeerError            another worker does not deliver weights (now); they come from elsewhere
    ├── ExpertsGoneError     no rank holds these experts any more; steps go on once they are refilled
    ├── GrammarError         a grammar that cannot be compiled, or not be followed any further
    ├── AdapterError         a low-rank adapter that cannot be served; names its file
    ├── BanksLostError       ranks are gone with their KV blocks, the others go on; this step is to be planned anew
    ├── RequestError         the caller's request is wrong; names the field (HTTP 400 family)
    └── RefusedError         the request was fine, but cannot be served (now); carries a FailureCode

The module knows nothing of HTTP: `cluster/ingress/errors.py` holds the one table from these to status codes.
"""

from __future__ import annotations

from penstock.workers.protocol import FailureCode


class PenstockError(Exception):
    """Root of every error Penstock raises on purpose."""


class ConfigError(PenstockError):
    """A setting is wrong. `key` is the dotted configuration key or flag at fault."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class ModelError(PenstockError):
    """A model directory cannot be served. `path` names the file at fault."""

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class WireError(PenstockError):
    """Bytes from a peer are not a message this version understands."""


class IntegrityError(PenstockError):
    """Blocks, queues or sequences do not add up; raised by `check_integrity` and by misuse of the block pool."""


class DeviceError(PenstockError):
    """Steps cannot be computed any more; the worker ends so that its requests go on elsewhere."""


class GroupError(DeviceError):
    """A rank of this worker's group is gone, silent or stuck; `rank` is the culprit where it is known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class PeerError(PenstockError):
    """A peer does not deliver weights. It may be asked again after `pause_s`; None: not by this load."""

    def __init__(self, message: str, pause_s: float | None = None, referrals: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.pause_s = pause_s
        self.referrals = referrals  # others to ask instead


class ExpertsGoneError(PenstockError):
    """Tokens chose experts that no rank holds; every rank of the group raises it for the same step.

    `experts` are (layer, expert) pairs, the layer counted among those with experts.
    """

    def __init__(self, message: str, experts: tuple[tuple[int, int], ...]) -> None:
        super().__init__(message)
        self.experts = experts


class GrammarError(PenstockError):
    """A grammar that this model's tokens cannot follow, at all or any further; costs its own request only."""


class AdapterError(PenstockError):
    """An adapter's files are missing, changed, or not for this model; costs its own requests only."""


class BanksLostError(PenstockError):
    """Ranks are gone, and the others have met again without them; no step was computed.

    `banks` are those whose KV blocks went with their ranks (`kv/banks.py`).
    """

    def __init__(self, message: str, banks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.banks = banks


class RequestError(PenstockError):
    """The caller's request is at fault; sending it again unchanged cannot help."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class RefusedError(PenstockError):
    """A correct request that is not (or no longer) served; `code` says why, `retry_after_s` when to come back."""

    def __init__(self, code: FailureCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
