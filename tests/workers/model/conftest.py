"""Checkpoints, runners and the judging transformers model, each made once per session and spec."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes.exactness import CheckpointSpec, Reference, make_checkpoint
from fakes.in_process import load_runner


@dataclass
class LoadedModel:
    spec: CheckpointSpec
    directory: Path

    @functools.cached_property
    def runner(self):
        return load_runner(self.directory, max_model_len=512)

    @functools.cached_property
    def reference(self):
        return Reference(self.directory)


@pytest.fixture(scope="session")
def load_model(tmp_path_factory):
    """spec -> LoadedModel."""

    @functools.cache
    def load(spec: CheckpointSpec) -> LoadedModel:
        return LoadedModel(spec, make_checkpoint(tmp_path_factory.mktemp("checkpoints") / spec.name, spec))

    return load
