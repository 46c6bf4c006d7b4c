"""The tiny model directory and its codec, for every test of the outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.tiny_model import CONTEXT, write_tiny_model

from penstock.cluster.model_directory import describe
from penstock.cluster.text import TextCodec, load_text
from penstock.workers.settings import RunnerSettings


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def codec(model_dir: Path) -> TextCodec:
    return load_text(describe(RunnerSettings(model_dir=str(model_dir))), False, CONTEXT)
