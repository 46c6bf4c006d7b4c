"""What `GET /v1/models` and `GET /v1/models/{model}` tell: the model under each of its names, then its adapters.

Used by `service.py`. A caller sees what its key may use.
"""

from __future__ import annotations

import time
from typing import Any

from penstock.cluster.ingress.keys import Caller
from penstock.cluster.ingress.sampling_fields import named_model
from penstock.cluster.ingress.settings import IngressSettings
from penstock.workers.adapter_ref import AdapterRef


class ModelList:
    """Remembers when this process began to serve."""

    def __init__(self, settings: IngressSettings, vocab_size: int) -> None:
        self._settings = settings
        self._vocab_size = vocab_size
        self._created = int(time.time())

    def all(self, caller: Caller) -> dict[str, Any]:
        """The models that the caller may use."""
        names = [name for name in self._settings.model_names if caller.may_use(name)]
        served = [each.ref for each in self._settings.adapters.listed() if each.ref is not None]
        adapters = [self._adapter(ref) for ref in served if caller.may_use(ref.name)]
        return {"object": "list", "data": [*map(self._base, names), *adapters]}

    def one(self, name: str, caller: Caller) -> dict[str, Any]:
        """One model. Raises HttpProblem 403 or 404."""
        choice = named_model(name, self._settings)
        caller.check_model(choice.right)
        return self._base(name) if choice.adapter is None else self._adapter(choice.adapter)

    def _base(self, name: str) -> dict[str, Any]:
        return self._row(name, self._settings.root or name, None)

    def _adapter(self, ref: AdapterRef) -> dict[str, Any]:
        return self._row(ref.name, ref.name, self._settings.model_names[0])

    def _row(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "penstock",
            "root": root,
            "parent": parent,
            "max_model_len": self._settings.max_model_len,
            "vocab_size": self._vocab_size,
            "block_size": self._settings.block_size,
        }
