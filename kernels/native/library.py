"""The compiled kernels as callable functions; asked by `kernels/dispatch.py` whether they are there.

The C side takes raw addresses: everything that could make it read or write elsewhere is checked by the callers in this
folder, which are the only ones.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

import torch

from penstock.kernels.native.build import BuildError, library_path, machine_level

logger = logging.getLogger(__name__)

_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, list[type]] = {
    "pack": [_ADDRESS, _ADDRESS, _SIZE, _SIZE],
    "linear": [_ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _SIZE, _SIZE],
    "attention": [_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS],
    "norm": [_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _SIZE, ctypes.c_float],
    "norm_wide": [_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _SIZE, ctypes.c_float],
    "gate": [_ADDRESS, _ADDRESS, _SIZE, _SIZE, ctypes.c_int],
    "moe": [_ADDRESS] * 9,
    "lora": [_ADDRESS] * 8,
    "rotate_and_store": [_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS],
}
# Those that answer with a number, under their whole names.
_ANSWERING: dict[str, list[type]] = {
    "shared_sum_f32": [_ADDRESS, _ADDRESS, _SIZE],
    "shared_sum_bf16": [_ADDRESS, _ADDRESS, _SIZE],
    "shared_sum_f64": [_ADDRESS, _ADDRESS, _SIZE],
    "shared_sum_i64": [_ADDRESS, _ADDRESS, _SIZE],
    "shared_gather": [_ADDRESS, _ADDRESS, _SIZE, _SIZE, _ADDRESS],
    "shared_broadcast": [_ADDRESS, _ADDRESS, _SIZE, _SIZE],
    "shared_all_to_all": [_ADDRESS] * 5,
    "shared_barrier": [_ADDRESS],
    "shared_leave": [_ADDRESS],
}
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library, or None where it cannot be had: then why is logged, once."""
    try:
        level = machine_level()
        library = ctypes.CDLL(str(library_path(level)))
    except (BuildError, OSError) as error:
        logger.warning("CPU kernels in C++ are not available, torch's operators serve instead: %s", error)
        return None
    for name, arguments in _SIGNATURES.items():
        for suffix in _SUFFIXES.values():
            found = getattr(library, f"penstock_{name}_{suffix}")
            found.argtypes, found.restype = arguments, None
    for name, arguments in _ANSWERING.items():
        found = getattr(library, f"penstock_{name}")
        found.argtypes, found.restype = arguments, _SIZE
    logger.info("CPU kernels in C++ for %s", level)
    return library


@functools.lru_cache(maxsize=64)
def function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """One kernel for one dtype. The library is there: only then this backend is chosen."""
    library = load()
    if library is None:
        raise RuntimeError("the C++ kernels were chosen but are not available")
    found: Callable[..., None] = getattr(library, f"penstock_{name}_{_SUFFIXES[dtype]}")
    return found


@functools.lru_cache(maxsize=64)
def answering_function(name: str) -> Callable[..., int]:
    """One of the functions that answer with a number. Raises RuntimeError where there is no library."""
    library = load()
    if library is None:
        raise RuntimeError("the C++ kernels are not available")
    found: Callable[..., int] = getattr(library, f"penstock_{name}")
    return found
