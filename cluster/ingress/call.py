"""One parsed request, as plain frozen data: what the caller asked for, with every default resolved.

The parsers of this folder build it, `choices.py` runs it, the formats of this folder answer it.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.protocol import SamplingParams, Tokens


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How the caller wants to be answered."""

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    skip_special_tokens: bool = True
    include_stop: bool = False
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A completions or chat request. `prompts[i]` may give `max_tokens[i]` tokens, `n` times over."""

    model: str
    prompts: tuple[Tokens, ...]
    max_tokens: Tokens
    n: int
    sampling: SamplingParams  # of choice 0; `max_tokens` is replaced per prompt
    output: OutputOptions
    cache_salt: str = ""

    @property
    def num_choices(self) -> int:
        """Choices over all prompts; choice index = prompt index x n + number."""
        return len(self.prompts) * self.n
