"""The error of the kernels' door: an argument that no implementation can serve, told by operation and argument.

Raised by `kernels/ops.py` and the backends' wrappers, before any memory is touched. Knows nothing of tensors.
"""

from __future__ import annotations


class KernelInputError(ValueError):
    """An operation was given something it cannot serve: `op` names the operation, `argument` what was wrong."""

    def __init__(self, op: str, argument: str, problem: str) -> None:
        super().__init__(f"{op}: {argument}: {problem}")
        self.op = op
        self.argument = argument
        self.problem = problem

    def __reduce__(self) -> tuple[type[KernelInputError], tuple[str, str, str]]:
        """Rebuilt from its three parts, since an error may cross a process border."""
        return KernelInputError, (self.op, self.argument, self.problem)
