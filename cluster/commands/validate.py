"""`penstock validate`: configuration files, Serve configurations and Kubernetes manifests, checked offline.

Prints one line per finding, `file:line: severity: key: reason`, and ends with status 1 where there is an error (with
`--strict`: or a warning).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from penstock.cluster.validate.checker import DocumentKind, check_files
from penstock.cluster.validate.findings import Severity
from penstock.cluster.validate.schemas import SchemaBook
from penstock.workers.errors import ConfigError

HELP = "Check configuration files, Serve configurations and Kubernetes manifests, without a cluster."
SUFFIXES = (".yaml", ".yml", ".json")
FOUND_ERRORS = 1
STANDARD_INPUT = "-"


def validate(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Files, or folders of .yaml, .yml, .json; -: standard input."),
    ],
    crds: Annotated[
        Path | None, typer.Option("--crds", metavar="DIR", help="Resource definitions to check custom kinds against.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="K", help="configuration, serve or kubernetes; default: by content.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check, print, and tell by the exit status."""
    expected = None
    if kind is not None:
        if kind not in {one.value for one in DocumentKind}:
            raise ConfigError(f"--kind: {kind!r} is none of configuration, serve, kubernetes", key="--kind")
        expected = DocumentKind(kind)
    listed = [one for file in files for one in _files_of(file)]
    met = frozenset(listed) - frozenset(files)
    findings = check_files(listed, SchemaBook(crds), expected, met)
    errors = sum(one.severity is Severity.ERROR for one in findings)
    warnings = len(findings) - errors
    if json_output:
        found = [one.as_json() for one in findings]
        typer.echo(json.dumps({"files": len(listed), "errors": errors, "warnings": warnings, "findings": found}))
    else:
        for one in findings:
            typer.echo(str(one))
        typer.echo(f"{_count(len(listed), 'file')}: {_count(errors, 'error')}, {_count(warnings, 'warning')}", err=True)
    if errors or (strict and warnings):
        raise typer.Exit(FOUND_ERRORS)


def _files_of(path: Path) -> list[Path]:
    """The file itself, or every file of a folder that could be one."""
    if str(path) == STANDARD_INPUT:
        return [Path("/dev/stdin")]
    if not path.is_dir():
        return [path]
    # A link that leads nowhere is told, not passed over.
    found = sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES and (one.is_file() or not one.exists()))
    if not found:
        raise ConfigError(f"{path}: no {', '.join(SUFFIXES)} files in this folder", key="FILE")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
