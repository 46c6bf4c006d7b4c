"""Many prompts through one handle: bounded concurrency, patient retries, a progress bar.

Called by `Handle.batch` and `Handle.abatch`. A prompt is sent again only where the server says that it was not served
and that coming back helps (429, 503), after as long as it asks for, within bounds. Tokens are never generated twice for
one answer: a prompt that failed on the way is asked anew as a whole.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from penstock.cluster.client_answers import Completion
from penstock.cluster.client_async import AsyncHandle
from penstock.cluster.client_calls import Options, Prompt, listed
from penstock.workers.errors import PenstockError, RefusedError, RequestError
from penstock.workers.protocol import FailureCode

MAX_ATTEMPTS = 8
MAX_WAIT_S = 60.0  # a server that asks for more is believed, and the prompt has failed
FIRST_BACKOFF_S = 0.5
RETRIED = frozenset(
    {
        FailureCode.TENANT_LIMIT,
        FailureCode.OVERLOADED,
        FailureCode.QUEUE_FULL,
        FailureCode.DRAINING,
        FailureCode.NO_WORKER,
        FailureCode.WORKER_LOST,
        FailureCode.LEASE_EXPIRED,
        FailureCode.TRANSFER_FAILED,
        FailureCode.KV_DAMAGED,
        FailureCode.ADAPTER,
    }
)
Outcome = Completion | PenstockError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a batch is run. `ordered`: outcomes stand where their prompts stood, else as they ended."""

    max_concurrency: int = 32
    progress: bool = True
    ordered: bool = True
    return_exceptions: bool = False

    def __post_init__(self) -> None:
        if type(self.max_concurrency) is not int or self.max_concurrency < 1:
            raise RequestError("max_concurrency: must be an integer of at least 1", field="max_concurrency")


async def run_batch(handle: AsyncHandle, prompts: Iterable[Prompt], options: Options, plan: BatchPlan) -> list[Outcome]:
    """One outcome per prompt. The first failure ends the batch and is raised, unless exceptions are to be returned."""
    waiting = listed(prompts, "prompts", "a list of prompts")
    ended: list[tuple[int, Outcome]] = []
    source = iter(enumerate(waiting))
    with BatchProgress(len(waiting), shown=plan.progress) as progress:

        async def work(source: Iterator[tuple[int, Prompt]]) -> None:
            for index, prompt in source:
                try:
                    outcome: Outcome = await ask_patiently(handle, prompt, options)
                except PenstockError as error:
                    if not plan.return_exceptions:
                        raise
                    outcome = error
                ended.append((index, outcome))
                progress.note(outcome)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(plan.max_concurrency, len(waiting))):
                    group.create_task(work(source))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
    if plan.ordered:
        ended.sort(key=lambda pair: pair[0])
    return [outcome for _, outcome in ended]


async def ask_patiently(handle: AsyncHandle, prompt: Prompt, options: Options) -> Completion:
    """One answer, asked for again while the server says to come back, `MAX_ATTEMPTS` times at most."""
    backoff_s = FIRST_BACKOFF_S
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await handle.generate(prompt, **options)
        except RefusedError as error:
            asked_s = error.retry_after_s or 0.0
            if error.code not in RETRIED or asked_s > MAX_WAIT_S:
                raise
            # Spread out, or all of a batch would come back at once.
            await asyncio.sleep(max(asked_s, min(backoff_s, MAX_WAIT_S)) * random.uniform(1.0, 1.25))
            backoff_s *= 2
    return await handle.generate(prompt, **options)


class BatchProgress:
    """A bar on standard error: prompts done, tokens per second, time left. A context manager."""

    def __init__(self, total: int, *, shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._progress.add_task("prompts", total=total, rate="")
        self._tokens = 0
        self._failed = 0

    def note(self, outcome: Outcome) -> None:
        """One prompt has ended."""
        if isinstance(outcome, Completion):
            self._tokens += outcome.usage.completion_tokens
        else:
            self._failed += 1
        elapsed = self._progress.tasks[0].elapsed or 0.0
        rate = f"{self._tokens / elapsed:,.0f} tokens/s" if elapsed else ""
        failed = f", {self._failed} failed" if self._failed else ""
        self._progress.update(self._task, advance=1, rate=rate + failed)

    def __enter__(self) -> BatchProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
