"""The compiled functions of this folder; `scheduler/native_rows.py` and `digests.py` ask whether they are there.

They are compiled at their first use, or by `python -m penstock.workers.native.library` when an environment is made.

The C++ side takes raw addresses: the one caller of each function keeps the arrays alive and checks what could make it
read or write elsewhere. Calls hold the interpreter's lock: they are shorter than giving it away. No torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from pathlib import Path

from penstock.kernels.native.build import BuildError, compiled

log = logging.getLogger(__name__)

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, list[type]] = {
    "penstock_gather_rows": [_ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _SIZE],
    "penstock_ready_rows": [_ADDRESS, _ADDRESS],
    "penstock_advance_rows": [_ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _SIZE],
    "penstock_take_tokens": [_ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS],
    "penstock_chain": [_ADDRESS, _ADDRESS, _SIZE, _SIZE, _ADDRESS],
}


@functools.lru_cache(maxsize=1)
def load() -> ctypes.PyDLL | None:
    """The library, or None where it cannot be had: then why is logged, once."""
    try:
        library = ctypes.PyDLL(str(compiled(Path(__file__).parent, f"workers-{platform.machine()}", _FLAGS)))
    except (BuildError, OSError) as error:
        log.warning("what a worker does in C++ is not available, numpy serves instead: %s", error)
        return None
    for name, arguments in _SIGNATURES.items():
        found = getattr(library, name)
        found.argtypes, found.restype = arguments, _SIZE
    return library


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    load()
