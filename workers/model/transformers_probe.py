"""What a transformers module does with attention, learned by running it on a few tokens instead of from its names.

Called by `transformers_backend.py` at load. The probe answers the module's attention calls with plain causal attention
and writes down shapes, options and masks. transformers describes a mask by a function of (query, key) positions; the
probe evaluates it up to the longest position that will be served, so that a sliding window is known exactly and any
other pattern is refused. Everything that paged attention cannot do exactly is a ModelError that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from penstock.workers.errors import ModelError
from penstock.workers.model.transformers_attention import AttentionCall, AttentionLayer, attend, bind

PROBING = "penstock_probe"
TOKENS = 8
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Options that say nothing about the result, or that the probe checks by themselves.
_KNOWN_OPTIONS = frozenset(
    {"scaling", "softcap", "sliding_window", "is_causal", "position_ids", "position_embeddings", "cache_position"}
    | {"return_dict", "layer_idx", "logits_to_keep"}
)
_ACTIVE: ContextVar[AttentionProbe | None] = ContextVar("attention_probe", default=None)


def register() -> None:
    """Make `PROBING` and its mask function known to transformers. Harmless when repeated."""
    AttentionInterface.register(PROBING, attend)
    AttentionMaskInterface.register(PROBING, _mark_mask)


class AttentionProbe:
    """Answers attention calls and writes down what they were, in the order of the layers."""

    def __init__(self, max_positions: int) -> None:
        self._max_positions = max_positions
        self._masks: list[int | ModelError] = []  # window of each mask seen, or why it cannot be served
        self._learning = True
        self.layers: dict[int, AttentionLayer] = {}
        self.keys: list[Tensor] = []  # [H, T, D] of each layer in the last run

    @contextmanager
    def listening(self, model: nn.Module, *, learning: bool = True) -> Iterator[None]:
        """Calls of `model` come here while this is open. Without `learning` only keys are kept."""
        bind(model, self)
        token = _ACTIVE.set(self)
        self.keys, self._learning = [], learning
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def mark(self, mask_function: MaskFunction) -> float:
        """A number for the mask that `mask_function` describes."""
        if not self._learning:
            return 0.0
        try:
            self._masks.append(causal_window(mask_function, self._max_positions))
        except ModelError as error:  # only a mask that a layer uses matters
            self._masks.append(error)
        return float(len(self._masks))

    def attend(self, call: AttentionCall) -> Tensor:
        """See `Answers.attend`."""
        if self._learning:
            self._refuse_unknown(call)
            if id(call.module) in self.layers:
                raise ModelError(f"{type(call.module).__name__} calls for attention more than once per token")
            self.layers[id(call.module)] = self._layer(call)
        self.keys.append(call.key[0])
        grouped = call.query.shape[1] != call.key.shape[1]
        attended = F.scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=True, scale=call.scale, enable_gqa=grouped
        )
        return attended.transpose(1, 2).contiguous()

    def _layer(self, call: AttentionCall) -> AttentionLayer:
        heads, kv_heads, tokens = call.query.shape[1], call.key.shape[1], call.query.shape[2]
        expected = (1, kv_heads, tokens)
        if call.key.shape[:3] != expected or call.value.shape[:3] != expected or heads % kv_heads:
            raise ModelError(
                f"attention over other tokens than its own: query {list(call.query.shape)}, key "
                f"{list(call.key.shape)}, value {list(call.value.shape)}"
            )
        return AttentionLayer(len(self.keys), kv_heads, call.key.shape[3], call.value.shape[3], self._window(call.mask))

    def _window(self, mask: Tensor | None) -> int:
        """The window that a marked mask stands for."""
        if mask is None:
            raise ModelError("its attention mask does not come from transformers' mask interface")
        marks = torch.unique(mask).tolist()
        if len(marks) != 1 or marks[0] not in range(1, len(self._masks) + 1):
            raise ModelError(
                "it adds a bias (such as ALiBi) to the attention mask, which paged attention does not take"
            )
        found = self._masks[int(marks[0]) - 1]
        if isinstance(found, ModelError):
            raise found
        return found

    def _refuse_unknown(self, call: AttentionCall) -> None:
        options = call.options
        if options.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
            raise ModelError("its attention is not causal")
        for name, value in options.items():
            given = isinstance(value, Tensor) or bool(value)
            if given and name not in _KNOWN_OPTIONS:
                raise ModelError(f"its attention takes {name!r}, which paged attention does not")


def causal_window(mask_function: MaskFunction, length: int) -> int:
    """Keys that a query at any position below `length` sees, itself included; 0 = all before it.

    Raises ModelError where the pattern is neither.
    """
    try:
        seen = int(_row(mask_function, length - 1, length).sum())
        window = seen if seen < length else 0
        right = all(
            torch.equal(_row(mask_function, query, length), _expected(query, length, window))
            for query in _sampled_positions(length)
        )
    # A mask function of an unknown architecture may fail in any way; then it is none that we can judge.
    except Exception as error:
        raise ModelError(f"its attention mask cannot be evaluated: {type(error).__name__}: {error}") from error
    if not right:
        raise ModelError("its attention mask is neither causal nor a sliding window (chunked or blockwise attention)")
    return window


def _row(mask_function: MaskFunction, query: int, length: int) -> Tensor:
    zero = torch.zeros(1, 1, dtype=torch.int64)
    keys = torch.arange(length)[None, :]
    row = mask_function(zero, zero, torch.full((1, 1), query), keys)
    return row.expand(1, length)[0].bool()


def _expected(query: int, length: int, window: int) -> Tensor:
    keys = torch.arange(length)
    allowed = keys <= query
    return allowed & (keys > query - window) if window else allowed


def _sampled_positions(length: int) -> list[int]:
    """All short ones, then around every power of two and its threefold, and the last."""
    powers = [base << shift for base in (1, 3) for shift in range(5, length.bit_length() + 1)]
    around = {power + step for power in powers for step in (-1, 0, 1)}
    return sorted(position for position in {*range(64), *around, length - 1} if 0 <= position < length)


def _mark_mask(**call: Any) -> Tensor:
    """Stands in for transformers' mask functions: a mask of one number, by which the attention call is recognised."""
    probe = _ACTIVE.get()
    try:
        function, shape = call["mask_function"], (call["batch_size"], 1, call["q_length"], call["kv_length"])
    except KeyError as error:
        raise ModelError(f"this version of transformers does not tell mask functions their {error}") from error
    if probe is None:
        raise ModelError(f"{PROBING!r} is not for use outside of the probe")
    return torch.full(shape, probe.mark(function))
