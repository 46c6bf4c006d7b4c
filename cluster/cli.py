"""The `penstock` command and its verbs, one file each under `commands/`.

`main` is the console script. Mistakes of the caller end with one line on stderr that names the flag, key or file, and
exit status 2; a cluster that fails, with status 1. Unknown flags name the nearest known one.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from typing import Annotated

import typer

from penstock.cluster.commands import bench, chat, collect_env, roll, scale, serve, status, validate
from penstock.workers.errors import ConfigError, ModelError, PenstockError

CALLER_AT_FAULT = 2
FAILED = 1

app = typer.Typer(
    name="penstock",
    help="Serves large language models with prefill and decode on separate pools of workers.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the framed form cuts long flags at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve", help=serve.HELP)(serve.serve_command())
app.command("status", help=status.HELP)(status.status)
app.command("scale", help=scale.HELP)(scale.scale)
app.command("roll", help=roll.HELP)(roll.roll)
app.command("chat", help=chat.CHAT_HELP)(chat.chat_command())
app.command("complete", help=chat.COMPLETE_HELP)(chat.complete_command())
app.command("bench", help=bench.HELP)(bench.bench_command())
app.command("validate", help=validate.HELP)(validate.validate)
app.command("collect-env", help=collect_env.HELP)(collect_env.collect_env)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {importlib.metadata.version('penstock')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """What may stand before the verb."""
    del version  # acted upon by its callback


def main() -> None:
    """Run the command line; typed errors become one line and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        app()
    except PenstockError as error:
        typer.echo(f"penstock: {type(error).__name__}: {error}", err=True)
        sys.exit(CALLER_AT_FAULT if isinstance(error, (ConfigError, ModelError)) else FAILED)
