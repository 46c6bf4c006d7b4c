"""Checkpoints and the transformers models that judge them, each made once per session."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fakes.exactness import CheckpointSpec, Reference, Verdict, make_checkpoint
from fakes.foreign_checkpoints import ForeignReference, ForeignSpec, make_foreign
from fakes.sampled import as_requests, fields
from fakes.threaded_cluster import ThreadedCluster
from fakes.variants import Variant

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `deploy`, which is not part of the installed package

torch.set_num_threads(1)  # the judge shares the cores with the workers it judges, and waiting threads spin

VERDICTS = pytest.StashKey[list[Verdict]]()


@dataclass
class Checkpoint:
    spec: CheckpointSpec | ForeignSpec
    directory: Path
    verdicts: list[Verdict]

    @functools.cached_property
    def reference(self) -> Reference:
        return ForeignReference(self.directory) if isinstance(self.spec, ForeignSpec) else Reference(self.directory)

    def require_exact(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> None:
        """Judge greedy outputs; AssertionError unless every step is right. Counted in the summary of the run."""
        verdict = self.reference.judge(prompts, outputs)
        assert verdict.steps == sum(map(len, outputs)) > 0
        self.verdicts.append(verdict)
        verdict.require_exact()

    @functools.cached_property
    def sampled_alone(self) -> list[list[int]]:
        """The tokens of `fakes.sampled`, each request computed with nothing beside it by one mixed worker."""
        return asyncio.run(self._sample_alone())

    async def _sample_alone(self) -> list[list[int]]:
        variant = Variant(split=False, chunk=0, caching=False, preempt=False)
        async with ThreadedCluster(variant.workers(self.directory), variant.router) as cluster:
            requests = as_requests(fields(self.spec.vocab))
            return [(await cluster.generate([request]))[0].tokens for request in requests]


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[[CheckpointSpec | ForeignSpec], Checkpoint]:
    verdicts = pytestconfig.stash.setdefault(VERDICTS, [])

    @functools.cache
    def make(spec: CheckpointSpec | ForeignSpec) -> Checkpoint:
        directory = tmp_path_factory.mktemp("checkpoints") / spec.name
        made = make_foreign(directory, spec) if isinstance(spec, ForeignSpec) else make_checkpoint(directory, spec)
        return Checkpoint(spec, made, verdicts)

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    verdicts = terminalreporter.config.stash.get(VERDICTS, [])
    steps, ties = sum(verdict.steps for verdict in verdicts), sum(verdict.ties for verdict in verdicts)
    wrong = sum(len(verdict.wrong) for verdict in verdicts)
    if verdicts:
        terminalreporter.write_line(f"greedy steps judged: {steps} in {len(verdicts)} runs, {ties} ties, {wrong} wrong")
