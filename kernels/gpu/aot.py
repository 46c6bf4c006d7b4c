"""The list of kernel configurations in use, in the form in which Triton compiles them with no GPU in sight.

Every module of `kernels/gpu` that holds a kernel exposes `AOT_CASES`, one `AotCase` per configuration that serving can
choose; `all_cases` collects them. Called by the ahead-of-time test and by the tuner, never while serving. Knows no
figures: `resource_usage.py` reads those from what was compiled.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import penstock.kernels.gpu as room

ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class AotCase:
    """One configuration of one kernel.

    `signature` names every run-time argument with its Triton type ("*bf16", "*fp32", "*i32", "*i64", "i32", "i64",
    "fp32"), in any order; `constexprs` every compile-time one. Arguments in `divisible` are promised to be multiples
    of 16 (addresses: bytes), as the launcher would find them: without the promise wide loads vanish. None stands for
    all pointers, which is what torch's allocator gives. `may_spill` admits configurations outside the attention and
    matrix kernels whose spilled registers were judged harmless. `targets` names the machines that it serves, where it
    does not serve all: an operand of type e4m3 needs sm_90.
    """

    name: str
    kernel: Any  # the function under @triton.jit
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] | None = None
    may_spill: bool = False
    targets: tuple[str, ...] = ()

    def serves(self, target: str) -> bool:
        """Whether the configuration is used on this target; all of them where none is named."""
        return not self.targets or target in self.targets

    def aligned(self) -> tuple[str, ...]:
        """The arguments that are promised to be multiples of 16."""
        if self.divisible is not None:
            return self.divisible
        return tuple(name for name, kind in self.signature.items() if kind.startswith("*"))


def all_cases() -> dict[str, AotCase]:
    """ "module/case" -> case, over every module of `kernels/gpu`. Raises ValueError when a name is taken twice."""
    found: dict[str, AotCase] = {}
    for info in sorted(pkgutil.iter_modules(room.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{room.__name__}.{info.name}")
        for case in getattr(module, "AOT_CASES", ()):
            name = f"{info.name}/{case.name}"
            if name in found:
                raise ValueError(f"two ahead-of-time cases are called {name!r}")
            found[name] = case
    return found
