"""Runs any decoder of transformers that fits: its own module, with our paged attention in its attention interface.

`workers/runner.py` calls `load_transformers` where `implementation.py` chose it, and then uses the model as any
`DecoderModel`. Packed tokens go in as one batch row with their own position numbers; nothing in a decoder but
attention looks at other tokens, and attention is ours. What this cannot serve exactly is refused at load:
`foreign_config.py` and `transformers_loading.py` by name, `transformers_probe.py` by what the module does, and
`transformers_check.py` by its numbers.
Legend: T packed tokens, S wanted tokens, E hidden size, V vocabulary, B blocks, L layers, C, H, P, D as in `ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.kernels.ragged import AttentionPlan
from penstock.workers.errors import ModelError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.lora.bank import StepAdapters
from penstock.workers.model import transformers_attention, transformers_probe
from penstock.workers.model.foreign_config import ForeignConfig
from penstock.workers.model.loading import TORCH_DTYPES
from penstock.workers.model.port import KVExchange
from penstock.workers.model.transformers_attention import AttentionLayer, PagedAttention
from penstock.workers.model.transformers_check import CHECKED_POSITIONS, require_equal_logits, stock_logits
from penstock.workers.model.transformers_linear import pack_linears, watch_linears
from penstock.workers.model.transformers_loading import ForeignModule, load_module
from penstock.workers.model.transformers_probe import TOKENS, AttentionProbe


class TransformersModel:
    """A `DecoderModel` over a causal language model of transformers; takes the module over."""

    def __init__(self, model: Any, attention: PagedAttention, vocab_size: int) -> None:
        """The module's body is cut out, so that its head can be called with hidden states of our choice."""
        self.vocab_size = vocab_size
        self._attention = attention
        self._body = model.base_model
        self._head = model
        setattr(model, model.base_model_prefix, _GivenHidden())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_BLCHPD: Tensor,
        plan: AttentionPlan,
        wanted: Tensor,
        exchange: KVExchange | None = None,
        adapters: StepAdapters | None = None,
    ) -> Tensor:
        """See `DecoderModel.forward`. Raises TypeError for an `exchange` or `adapters`: both were refused at start."""
        if exchange is not None or adapters is not None:
            raise TypeError("the transformers backend shares no prompt with other ranks, and has no adapters")
        with self._attention.step(kv_BLCHPD, plan):
            hidden_1TE: Tensor = self._body(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False, return_dict=True
            ).last_hidden_state
        return hidden_1TE[0].index_select(0, wanted)

    def logits(self, hidden_SE: Tensor) -> Tensor:
        """See `DecoderModel.logits`; scales and caps are those of the module's own class."""
        if len(hidden_SE) == 0:
            return torch.empty(0, self.vocab_size)
        logits_1SV: Tensor = self._head(inputs_embeds=hidden_SE[None], use_cache=False, return_dict=True).logits
        return logits_1SV[0].float()


class _GivenHidden(nn.Module):
    """Stands in for a model's body: its answer is what it is given."""

    @property
    def decoder(self) -> _GivenHidden:
        """OPT's head calls the decoder inside of its body."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor | None = None, **__: Any) -> _BodyOutput:
        return _BodyOutput(inputs_embeds)


@dataclass(frozen=True)
class _BodyOutput:
    """Looks like any body's output with nothing but hidden states in it."""

    last_hidden_state: Tensor | None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def load_transformers(
    model_dir: Path, config: ForeignConfig, dtype: str, block_size: int, max_positions: int
) -> tuple[TransformersModel, KVLayout]:
    """Load, probe and check a model that is to serve positions below `max_positions`. Raises ModelError."""
    module = load_module(model_dir, config, TORCH_DTYPES[dtype])
    with torch.inference_mode():
        try:
            stock = stock_logits(module.model, config.vocab_size)
            watch_linears(module.model)
            layers = _probe(module, config.vocab_size, max_positions)
            pack_linears(module.model)
            layout = _layout(module, layers, dtype, block_size)
            attention = PagedAttention(layers)
            _use(module.model, transformers_attention.PAGED)
            transformers_attention.bind(module.model, attention)
            model = TransformersModel(module.model, attention, config.vocab_size)
            require_equal_logits(model, layout, stock)
        except ModelError as error:
            raise ModelError(f"{model_dir}: {config.architecture} cannot be served: {error}", str(model_dir)) from error
        # A module that we did not write may fail in any way when it is run as it never was.
        except Exception as error:
            reason = f"transformers' module fails on packed tokens: {type(error).__name__}: {error}"
            raise ModelError(f"{model_dir}: {config.architecture}: {reason}", str(model_dir)) from error
    return model, layout


def _probe(module: ForeignModule, vocab_size: int, max_positions: int) -> dict[int, AttentionLayer]:
    """The attention layers, by the identity of the module that calls."""
    transformers_probe.register()
    transformers_attention.register()
    _use(module.model, transformers_probe.PROBING)
    probe = AttentionProbe(max(max_positions, CHECKED_POSITIONS))
    length = min(TOKENS, max_positions)
    tokens, positions = torch.arange(length) % vocab_size, torch.arange(length)
    with probe.listening(module.model):
        _run(module.model, tokens, positions)
    if len(probe.layers) != module.num_layers:
        raise ModelError(
            f"{len(probe.layers)} of its {module.num_layers} layers use transformers' attention interface; what the "
            "others do (recurrence, convolution, linear attention) is not kept in KV blocks"
        )
    near = probe.keys
    positions[-1] = max_positions - 1
    with probe.listening(module.model, learning=False):
        _run(module.model, tokens, positions)
    for before, after in zip(near, probe.keys, strict=True):
        if not torch.allclose(before[:, :-1].float(), after[:, :-1].float(), rtol=1e-4, atol=1e-6):
            raise ModelError(
                f"with positions up to {max_positions - 1} its rotary embedding depends on the longest sequence of a "
                "step (dynamic or longrope); serve it with a smaller --max-model-len"
            )
    return probe.layers


def _run(model: Any, tokens: Tensor, positions: Tensor) -> None:
    try:
        model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, return_dict=True)
    except IndexError as error:
        raise ModelError(f"it has no position {int(positions[-1])}: {error}") from error


def _use(model: Any, name: str) -> None:
    """Let the module call the attention that is registered as `name`."""
    if not hasattr(model, "set_attn_implementation"):
        raise ModelError("this version of transformers cannot exchange a module's attention")
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError("its attention does not go through transformers' attention interface")


def _layout(module: ForeignModule, layers: dict[int, AttentionLayer], dtype: str, block_size: int) -> KVLayout:
    heads = {layer.num_kv_heads for layer in layers.values()}
    dims = {max(layer.key_dim, layer.value_dim) for layer in layers.values()}
    if len(heads) != 1 or len(dims) != 1:
        raise ModelError(f"its layers differ: {sorted(heads)} kv heads of {sorted(dims)} numbers")
    # The same weights in our own decoder round differently: their blocks must not mix.
    revision = f"{module.revision}-transformers"
    return KVLayout(module.num_layers, heads.pop(), dims.pop(), block_size, dtype, revision)
