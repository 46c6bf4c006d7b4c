"""Corrections to Triton's interpreter, so that a kernel run on the CPU computes what the same kernel computes on a GPU.

Called once, when `kernels/gpu` is imported; does nothing unless Triton interprets. As of Triton 3.6 the interpreter
takes the bits of bfloat16 for numbers in a product, cuts float32 to bfloat16 without rounding, cannot use a run-time
number as a loop bound with NumPy 2.4, and warns of NaN where a GPU is silent. Knows no kernel. Arithmetic on bfloat16
other than products stays wrong there: kernels compute in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray


def correct_interpreter() -> None:
    """Put the corrections in place; more than once is harmless."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "corrected", False):
        return
    builder.corrected = True
    _correct_loop_bounds(interpreter)
    _correct_rounding(interpreter)
    _correct_products(interpreter)
    _silence_nan(interpreter)


def _correct_loop_bounds(interpreter: Any) -> None:
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _correct_rounding(interpreter: Any) -> None:
    convert = interpreter._convert_float

    def corrected(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return to_bfloat16(np.ascontiguousarray(data))
        if source == tl.bfloat16 and target == tl.float32:
            return np.ascontiguousarray(data).astype(np.uint32) << np.uint32(16)
        return convert(data, source, target, rounding)

    interpreter._convert_float = corrected


def _correct_products(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder
    product = builder.create_dot

    def corrected(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        left, right = (_float32(interpreter, one) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b))
        return product(self, left, right, d, precision, imprecise)

    builder.create_dot = corrected


def _float32(interpreter: Any, handle: Any) -> Any:
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << np.uint32(16)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _silence_nan(interpreter: Any) -> None:
    launch = interpreter.GridExecutor.__call__

    def quiet(self: Any, *arguments: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return launch(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = quiet
