"""`penstock serve`: flags and file into a configuration, then a running cluster until Ctrl-C.

The command's parameters are built from `flags.SERVE_FLAGS`. Ray and torch are imported only once the configuration
has been read and found good, so that mistakes are told in a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock.cluster.commands.declaration import declare
from penstock.cluster.commands.flags import SERVE_FLAGS, Flag, flag_values
from penstock.cluster.config import Sourced, load_config
from penstock.cluster.model_directory import describe
from penstock.cluster.settings import ClusterConfig
from penstock.cluster.text import load_text

HELP = "Bring a cluster up on this machine (or on a Ray cluster) and serve a model over HTTP until interrupted."


def configure(model_dir: str | None, config_file: Path | None, given: dict[str, object]) -> ClusterConfig:
    """The configuration that a command line means."""
    flags = flag_values(given)
    if model_dir is not None:
        flags["runner.model_dir"] = Sourced(model_dir, "MODEL_DIR")
    config = load_config(file=config_file, flags=flags)
    # Read once here what the front will read, so that a bad tokenizer or template is told before anything starts.
    load_text(
        describe(config.runner, config.weights),
        config.front.skip_tokenizer_init,
        config.scheduler.max_model_len,
        config.front.tool_call_parser,
    )
    return config


def serve_command() -> Callable[..., None]:
    """The function that typer makes a command of."""

    def serve(model_dir: str | None, config: Path | None, **given: object) -> None:
        configuration = configure(model_dir, config, given)
        # Ray takes seconds to import; nobody should wait for it to learn of a wrong flag.
        from penstock.cluster.launch import serve as run

        run(configuration)

    path = Annotated[
        str | None, typer.Argument(metavar="[MODEL_DIR]", help="A Hugging Face directory; none: built in.")
    ]
    file = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML; flags win over it.")]
    flags = {flag.parameter: (_annotation(flag), None) for flag in SERVE_FLAGS}
    declare(serve, {"model_dir": (path, None), "config": (file, None), **flags})
    return serve


def _annotation(flag: Flag) -> Any:
    kind: Any = (list[str] if flag.many else str) if flag.metavar else bool
    return Annotated[kind | None, typer.Option(flag.spelling, metavar=flag.metavar or None, help=flag.help)]
