"""From a model directory to a transformers module with its weights, offline and from safetensors only.

Called by `transformers_backend.py`. Our own `Checkpoint` reads every file first, so that a pickled, cut or misplaced
one is named before transformers sees it; transformers then reads the same files, because it alone knows how a family
renames and fuses its tensors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from penstock.workers.errors import ModelError
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.foreign_config import ForeignConfig

logger = logging.getLogger(__name__)

STOCK_ATTENTION = "eager"  # the definition, which every architecture has


@dataclass(frozen=True, slots=True, eq=False)
class ForeignModule:
    """A causal language model of transformers, in evaluation mode. `revision` is of its files."""

    model: Any
    num_layers: int
    revision: str


def load_module(model_dir: Path, config: ForeignConfig, dtype: torch.dtype) -> ForeignModule:
    """Raises ModelError with the reason."""
    checkpoint = Checkpoint(model_dir)
    path = str(model_dir / "config.json")
    model_class, settings = _model_class(model_dir, config, path)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it has no annotations
    try:
        model, report = model_class.from_pretrained(
            model_dir,
            config=settings,
            dtype=dtype,
            attn_implementation=STOCK_ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # A module that we did not write may fail in any way on a directory that does not fit it.
    except Exception as error:
        raise ModelError(f"{model_dir}: transformers cannot load it: {type(error).__name__}: {error}", path) from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelError(f"{checkpoint.source}: {len(absent)} tensors are missing, such as {absent[0]}", path)
    if report["unexpected_keys"]:
        logger.warning("%s: tensors without use: %s", checkpoint.source, sorted(report["unexpected_keys"])[:5])
    return ForeignModule(model.eval().requires_grad_(False), settings.num_hidden_layers, checkpoint.revision)


def _model_class(model_dir: Path, config: ForeignConfig, path: str) -> tuple[Any, Any]:
    """(class, configuration) that `architectures` and `model_type` agree on."""
    try:
        settings = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        found: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    # Configuration classes check their values in ways of their own.
    except Exception as error:
        known = f"transformers {transformers.__version__}"
        reason = f"{known} has no decoder for it ({type(error).__name__}: {error})"
        raise ModelError(f"{path}: architectures: {config.architecture}: {reason}", path) from error
    classes = found if isinstance(found, tuple | list) else (found,)
    model_class = next((one for one in classes if one.__name__ == config.architecture), None)
    if model_class is None:
        raise ModelError(
            f"{path}: architectures: {config.architecture!r} is not {classes[0].__name__}, the causal language model "
            f"of model_type {settings.model_type!r}",
            path,
        )
    if getattr(model_class, "_is_stateful", False):
        raise ModelError(
            f"{path}: architectures: {config.architecture}: recurrent layers (state-space or linear attention) keep "
            "a state that is not in KV blocks",
            path,
        )
    if "position_ids" not in _parameters(model_class):
        raise ModelError(f"{path}: architectures: {config.architecture} takes no position_ids", path)
    settings.use_cache = False
    settings.output_router_logits = False  # the loss of a mixture of experts is for training
    return model_class, settings


def _parameters(model_class: type[nn.Module]) -> tuple[str, ...]:
    code = getattr(model_class.forward, "__wrapped__", model_class.forward).__code__
    return tuple(code.co_varnames[: code.co_argcount])
