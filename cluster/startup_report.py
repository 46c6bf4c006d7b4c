"""What `penstock serve` says while it starts: configuration and origin of each value, progress, sizes, times, ready.

`launch.py` calls it in the order of the methods. Knows nothing of how a cluster starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from penstock.cluster.model_directory import ModelDescription
from penstock.cluster.settings import ClusterConfig, value_of

SECRET_KEYS = frozenset({"front.api_key"})
GIBIBYTE = 1 << 30


class StartupReport:
    """Writes to one console. Times are in seconds on the monotonic clock."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._began = time.monotonic()
        self._phases: list[tuple[str, float]] = []
        self._progress: Progress | None = None
        self._task: Any = None

    def configuration(self, config: ClusterConfig) -> None:
        """Every value somebody stated or that was derived, and where it came from; defaults are left out."""
        table = Table("setting", "value", "from", title="Configuration", title_justify="left", box=None, pad_edge=False)
        for key, source in config.sources.items():
            value = "(set)" if key in SECRET_KEYS else _shown(value_of(config, key))
            table.add_row(key, value, source)
        self.console.print(table)

    def generation(self, model: ModelDescription, setting: str) -> None:
        """See `generation_lines`."""
        for line in generation_lines(model, setting):
            self.console.print(line, highlight=False)

    def begin_loading(self, steps: int) -> None:
        """Show a bar of so many steps; without a terminal each step is a line."""
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("starting", total=steps)
            self._progress.start()

    def step(self, what: str) -> None:
        """One more step is done."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=what)
        else:
            self.console.print(f"  {what} ({time.monotonic() - self._began:.1f} s)")

    def end_loading(self) -> None:
        """Take the bar away. Harmless when there is none."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside as one phase."""
        began = time.monotonic()
        yield
        self._phases.append((name, time.monotonic() - began))

    def sizes(self, workers: Sequence[Mapping[str, object]], max_model_len: int) -> None:
        """KV pool of each worker, and how many full-length sequences fit."""
        for facts in workers:
            blocks, block_size, width = (
                _int(facts["num_blocks"]),
                _int(facts["block_size"]),
                _int(facts.get("width", 1)),
            )
            tokens = blocks * block_size
            self.console.print(
                f"{facts['worker_id']}: {f'{width} ranks, each with a ' if width > 1 else ''}"
                f"KV pool {_int(facts['kv_bytes']) / GIBIBYTE:.2f} GiB, {blocks:,} blocks of "
                f"{block_size}, {tokens:,} tokens, enough for {tokens / max_model_len:.1f} sequences of "
                f"{max_model_len:,} tokens at once; loaded in {float(str(facts['load_s'])):.1f} s",
                highlight=False,
            )

    def ready(self, url: str, model: str, chat: bool) -> None:
        """Times by phase, the URL and a command to try."""
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._phases)
        total = time.monotonic() - self._began
        self.console.print(f"Start-up took {total:.1f} s: {phases}", highlight=False)
        self.console.print(f"Ready: {url}", style="bold", highlight=False)
        path = "chat/completions" if chat else "completions"
        prompt = '"messages": [{"role": "user", "content": "What is 17 + 25?"}]' if chat else '"prompt": [1, 2, 3]'
        body = f'{{"model": "{model}", {prompt}, "stream": true}}'
        self.console.print("Try:", highlight=False)
        self.console.print(
            f"  curl -N {url}/v1/{path} -H 'Content-Type: application/json' -d '{body}'",
            highlight=False,
            soft_wrap=True,
        )

    def note(self, text: str) -> None:
        """Any other line."""
        self.console.print(text, highlight=False)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _int(value: object) -> int:
    return int(str(value))


def generation_lines(model: ModelDescription, setting: str) -> list[str]:
    """Sampling defaults of the model directory and whether they hold (`front.generation_config`); end tokens."""
    lines = []
    stated = ", ".join(f"{name} {value:g}" for name, value in model.defaults.stated().items())
    if stated:
        holds = "" if setting == "auto" else f" (not applied: --generation-config {setting})"
        lines.append(f"Sampling defaults of generation_config.json: {stated}{holds}")
    if model.eos_token_ids:
        lines.append(f"End tokens of the model directory: {', '.join(map(str, model.eos_token_ids))}")
    return lines
