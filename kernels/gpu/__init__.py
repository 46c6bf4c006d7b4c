"""The operations on GPUs, in Triton; chosen by `kernels/dispatch.py`, which imports this room only where Triton is."""

from penstock.kernels.gpu.interpreting import correct_interpreter

correct_interpreter()
