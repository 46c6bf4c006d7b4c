"""Our paged attention behind transformers' attention interface: one registered function, and who answers it.

`transformers_backend.py` binds a `PagedAttention` to every module of a model; `transformers_probe.py` binds its own
recorder first. transformers calls the registered function with a layer's queries, keys and values, and it passes the
call on to whatever is bound to that layer. Knows nothing of sequences: the step's plan says who attends to what.
Legend: T packed tokens, Hq query heads, H kv heads, D head dim, B blocks, L layers, C = 2 (key, value), P slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn, stack
from transformers import AttentionInterface

from penstock.kernels import ops
from penstock.kernels.ragged import AttentionPlan
from penstock.workers.errors import ModelError

PAGED = "penstock_paged"  # no mask function is registered under it: transformers then makes no mask and passes None
_BOUND = "penstock_attention"  # the attribute of a module that holds what answers for it


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What the probe learned of one layer, and each of its calls must keep to."""

    number: int  # in the order in which layers are called
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int  # keys that a query sees, itself included; 0 = all before it


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call: query [1, Hq, T, D], key [1, H, T, D], value [1, H, T, Dv], the mask, and named options."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        stated = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if stated is None else stated)

    @property
    def soft_cap(self) -> float:
        """Bound of the scores; 0 = none."""
        return float(self.options.get("softcap") or 0.0)


class Answers(Protocol):
    """Computes a layer's attention."""

    def attend(self, call: AttentionCall) -> Tensor:
        """The attended values [1, T, Hq, Dv]."""
        ...


def register() -> None:
    """Make `PAGED` known to transformers. Harmless when repeated."""
    AttentionInterface.register(PAGED, attend)


def bind(model: nn.Module, answers: Answers) -> None:
    """Let `answers` compute the attention of every layer of `model` from now on."""
    for module in model.modules():
        setattr(module, _BOUND, answers)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The function that transformers calls. Raises ModelError for a module that nothing is bound to."""
    bound: Answers | None = getattr(module, _BOUND, None)
    if bound is None:
        raise ModelError(f"{type(module).__name__} calls for attention but is no part of the model that was loaded")
    return bound.attend(AttentionCall(module, query, key, value, attention_mask, options)), None


class PagedAttention:
    """Stores the new keys and values and attends over the blocks. One step at a time, in one thread."""

    def __init__(self, layers: Mapping[int, AttentionLayer]) -> None:
        """`layers` by the identity of the module that calls, which the model keeps alive."""
        self._layers = layers
        self._dim = max(max(layer.key_dim, layer.value_dim) for layer in layers.values())
        self._step: tuple[Tensor, AttentionPlan] | None = None

    @contextmanager
    def step(self, kv_BLCHPD: Tensor, plan: AttentionPlan) -> Iterator[None]:
        """The blocks and the plan that calls mean while this is open."""
        self._step = (kv_BLCHPD, plan)
        try:
            yield
        finally:
            self._step = None

    def attend(self, call: AttentionCall) -> Tensor:
        """See `Answers.attend`. Keys and values of different sizes are stored with zeros behind the smaller."""
        layer = self._layers.get(id(call.module))
        if layer is None or self._step is None:
            raise ModelError(f"{type(call.module).__name__} calls for attention where its probe did not")
        kv, plan = self._step
        query, key, value = (_packed(x, self._dim) for x in (call.query, call.key, call.value))
        ops.write_kv(kv, layer.number, stack((key, value), dim=1), plan)
        attended = ops.paged_attention(
            query.contiguous(), kv, layer.number, plan, call.scale, window=layer.window, soft_cap=call.soft_cap
        )
        return attended[None, :, :, : layer.value_dim]


def _packed(x: Tensor, dim: int) -> Tensor:
    """[1, heads, T, D] as [T, heads, `dim`]."""
    x = x[0].transpose(0, 1)
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))
