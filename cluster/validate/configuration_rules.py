"""Rules for Penstock's own configuration: a file, or the `args` of its Serve application.

The same steps as `config.load_config` (known keys, types, ranges, keys against each other), but each key by itself, so
that one mistake does not hide the next. A model directory that is not on this machine is told, not held against the
file: what the model decides is then left unchecked. Used by `checker.py` and `serve_rules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

from penstock.cluster.config import Sourced, build, known_keys
from penstock.cluster.derived import derive
from penstock.cluster.settings import ClusterConfig
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validation import check_values, check_whole
from penstock.workers.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class Stated:
    """A configuration as a document states it: its values by dotted key, and where each stands."""

    values: Mapping[str, object]
    places: Mapping[str, Path]

    def config(self) -> ClusterConfig:
        """The tree with defaults where nothing usable is stated."""
        layers: dict[str, Sourced] = {}
        for key, value in self.values.items():
            if _value_problem(key, value) is None:
                layers[key] = Sourced(value, "")
        return build(layers)


def section_names() -> frozenset[str]:
    """The keys that may stand at the top of a configuration."""
    return frozenset(key.split(".")[0] for key in known_keys())


def read_stated(raw: object, base: Path, spellings: Mapping[str, str]) -> tuple[Stated, list[Problem]]:
    """Flatten a document. `spellings` are further names for keys, at the top: those of the command line's flags."""
    values: dict[str, object] = {}
    places: dict[str, Path] = {}
    found: list[Problem] = []
    known = known_keys()
    sections = {key[: i.start()] for key in known for i in re.finditer(r"\.", key)}

    def walk(tree: object, prefix: str, path: Path) -> None:
        if tree is None:
            return
        if not isinstance(tree, dict):
            found.append(Problem(path, f"expected keys and values, not {tree!r}"))
            return
        for name, value in tree.items():
            key, place = f"{prefix}{name}", (*path, name)
            if spellings and not prefix:
                key = spellings.get(name.lstrip("-").replace("-", "_"), key)
            if key in sections:
                walk(value, f"{key}.", place)
            elif key not in known:
                found.append(_unknown(key, place, prefix, [*known, *sections, *([] if prefix else spellings)]))
            elif key in places:
                found.append(Problem(place, f"{key} is stated twice in this document, under two names"))
            else:
                values[key], places[key] = value, place

    walk(raw, "", base)
    return Stated(values, places), found


def check_configuration(raw: object, base: Path = ()) -> Iterator[Problem]:
    """Everything wrong with a configuration file for this machine."""
    stated, found = read_stated(raw, base, {})
    yield from found
    yield from check_stated(stated, base)


def check_stated(stated: Stated, base: Path, elsewhere: bool = False) -> Iterator[Problem]:
    """What is wrong with known keys. `elsewhere`: its paths are those of another machine."""
    wrong = [problem for key in stated.values if (problem := _problem_of(stated, key, base))]
    yield from wrong
    directory = stated.values.get("runner.model_dir")
    absent = isinstance(directory, str) and bool(directory) and not FilePath(directory).is_dir()
    if absent and not elsewhere:
        yield warning(stated.places["runner.model_dir"], f"{directory} is not on this machine; its model is unchecked")
    if absent and elsewhere and not FilePath(str(directory)).is_absolute():
        yield Problem(stated.places["runner.model_dir"], f"{directory!r} is not an absolute path within the container")
    if not wrong:
        yield from _whole(stated, base, absent)
    if isinstance(stated.values.get("front.api_key"), str) and stated.values["front.api_key"]:
        yield warning(stated.places["front.api_key"], "a key in a file; give it as $PENSTOCK_API_KEY from a secret")


def _unknown(key: str, place: Path, prefix: str, candidates: list[str]) -> Problem:
    """Names the nearest key of the same section, or the section that has the same name."""
    same_name = [one for one in candidates if one.split(".")[-1] == key.split(".")[-1]]
    here = [one[len(prefix) :] for one in candidates if one.startswith(prefix)]
    hint = nearest(key[len(prefix) :], here) or (same_name[0] if same_name else nearest(key, candidates))
    return Problem(place, f"unknown key {key!r}", hint)


def _problem_of(stated: Stated, key: str, base: Path) -> Problem | None:
    reason = _value_problem(key, stated.values[key])
    return Problem(stated.places.get(key, base), reason) if reason else None


def _value_problem(key: str, value: object) -> str | None:
    """Why one value cannot stand under its key, whatever the others are."""
    try:
        check_values(build({key: Sourced(value, "")}), [key])
    except ConfigError as error:
        return _reason(error) if error.key in (key, None) or str(error.key).startswith(key) else None
    return None


def _whole(stated: Stated, base: Path, absent_model: bool) -> Iterator[Problem]:
    config = stated.config()
    if absent_model:
        # The oracle has a model's place without its files; what a model would decide stays open.
        config = replace(config, runner=replace(config.runner, kind="oracle"))
    try:
        check_whole(derive(config))
    except ConfigError as error:
        place = stated.places.get(str(error.key)) or _section(stated, str(error.key)) or base
        yield Problem(
            place,
            f"{error.key}: {_reason(error)}" if str(error.key) not in stated.places and error.key else _reason(error),
        )
    except ModelError as error:
        yield Problem(stated.places.get("runner.model_dir", base), str(error))


def _section(stated: Stated, key: str) -> Path | None:
    """Where a key of the same section stands."""
    prefix = key.rpartition(".")[0] + "."
    return next((place for name, place in stated.places.items() if name.startswith(prefix)), None)


def _reason(error: ConfigError) -> str:
    text = str(error).removeprefix(": ")
    return text.removeprefix(f"{error.key}: ") if error.key else text
