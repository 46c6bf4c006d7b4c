"""Applications over fake generators, for every test of the HTTP front."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.adapters import make_adapter
from fakes.embedded_app import EmbeddedApp, embedded_codec
from fakes.fake_generator import FakeFleet, FakeGenerator
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT

from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.model_directory import GenerationDefaults
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec
from penstock.workers.model.config import DecoderConfig, read_config

LIMITS = LimitSettings(max_body_bytes=200_000, body_timeout_s=1.0, write_timeout_s=2.0)


@pytest.fixture
def settings() -> IngressSettings:
    return IngressSettings(
        model_names=("tiny", "other-name"),
        max_model_len=CONTEXT,
        revision="r1",
        root="tiny",
        defaults=GenerationDefaults(temperature=0.7),
        limits=LIMITS,
    )


@pytest.fixture(scope="module")
def embedded() -> TextCodec:
    """The trained model's, for a module that overrides `codec` with it."""
    return embedded_codec()


@pytest.fixture(scope="module")
def app(embedded: TextCodec) -> EmbeddedApp:
    return EmbeddedApp(embedded)


@pytest.fixture(scope="module")
def server(app: EmbeddedApp) -> Iterator[HttpServer]:
    """The trained model on two workers of this process, over HTTP."""
    with HttpServer(app, graceful=True) as running:
        yield running


@pytest.fixture
def tiny_config(model_dir: Path) -> DecoderConfig:
    return read_config(model_dir)


@pytest.fixture
def home(tmp_path: Path, tiny_config: DecoderConfig) -> Path:
    """A directory with two adapters that can be served."""
    for seed, name in enumerate(("one", "two")):
        make_adapter(tmp_path / name, tiny_config, seed=seed)
    return tmp_path


Serve = Callable[..., HttpServer]


@pytest.fixture
def serve(codec: TextCodec, settings: IngressSettings) -> Iterator[Serve]:
    """`serve(generator, **changed settings)` starts a server that ends with the test."""
    with ExitStack() as stack:

        def start(generator: FakeGenerator, fleet: FakeFleet | None = None, **changes: Any) -> HttpServer:
            text = changes.pop("codec", codec)
            http = changes.pop("http", "httptools")
            app = build_app(replace(settings, **changes), text, generator, Metrics(), fleet or FakeFleet())
            return stack.enter_context(_running(app, http))

        yield start


@contextmanager
def _running(app: Any, http: str) -> Iterator[HttpServer]:
    with HttpServer(app, http) as server:
        yield server
