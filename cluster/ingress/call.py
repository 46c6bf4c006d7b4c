"""One parsed request, as plain frozen data: what the caller asked for, with every default resolved.

The parsers of this folder build it, `choices.py` runs it, the formats of this folder answer it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.cluster.ingress.resumption import Resumption
from penstock.cluster.tool_calls.tool_plan import ToolPlan
from penstock.workers.adapter_ref import AdapterRef
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
    logprobs: bool = False  # tell the logprobs of what was generated
    prompt_logprobs: bool = False  # tell those of the prompt, in an object of their own
    echo: bool = False  # the answer begins with the prompt, and so do its logprobs
    hide_generated: bool = False  # max_tokens 0: the one token that had to be generated is not shown


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What a caller's `model` means: the name as it was written, and which adapter stood behind it at that moment."""

    name: str
    adapter: AdapterRef | None = None

    @property
    def right(self) -> str:
        """What a key that is bound to models must list."""
        return self.name if self.adapter is None else self.adapter.name


@dataclass(frozen=True, slots=True)
class Call:
    """A completions or chat request. `prompts[i]` may give `max_tokens[i]` tokens, `runs` times over; the `n` best of
    them are answered."""

    model: str
    prompts: tuple[Tokens, ...]
    max_tokens: Tokens
    n: int
    sampling: SamplingParams  # of choice 0; `max_tokens` is replaced per prompt
    output: OutputOptions
    cache_salt: str = ""
    best_of: int = 0  # 0 = n
    texts: tuple[str, ...] = ()  # of the prompts, where they are echoed
    embed: bool = False
    tools: ToolPlan = field(default_factory=ToolPlan)
    resumption: Resumption = field(default_factory=Resumption)  # of the only choice
    adapter: AdapterRef | None = None  # what `model` meant when it was read, whatever becomes of that name

    @property
    def runs(self) -> int:
        """Choices generated per prompt."""
        return self.best_of or self.n

    @property
    def num_runs(self) -> int:
        """Choices generated over all prompts; run index = prompt index x runs + number."""
        return len(self.prompts) * self.runs

    @property
    def num_choices(self) -> int:
        """Choices answered over all prompts; choice index = prompt index x n + number."""
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        """Over all prompts, each counted once."""
        return sum(map(len, self.prompts))
