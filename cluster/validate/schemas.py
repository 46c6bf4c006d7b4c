"""Which schema belongs to which Kubernetes object: given definitions first, then installed ones, then our tables.

    --crds DIR                   resource definitions (custom kinds, KubeRay's own)
    kubernetes-validate's files  core kinds and pod templates, when the optional package is installed
    core_tables, ray_tables      otherwise

`checker.py` opens one `SchemaBook` per run. Reads files; knows nothing of rules.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from penstock.cluster.validate import core_tables, ray_tables, workload_tables
from penstock.cluster.validate.compact_schema import NUMBER_TOO, QUANTITY, raw_schema, with_quantity
from penstock.cluster.validate.structural import Schema
from penstock.workers.errors import ConfigError

MAX_CRD_BYTES = 16 << 20
TABLES = {**core_tables.KINDS, **workload_tables.KINDS}
RAY_KINDS = ("RayCluster", "RayService", "RayJob")
_QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
_POD_TEMPLATE = "io.k8s.api.core.v1.PodTemplateSpec"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class SchemaBook:
    """Schemas by (apiVersion, kind)."""

    def __init__(self, crd_dir: Path | None = None, installed: bool = True) -> None:
        """`installed=False` leaves the optional package aside. Raises ConfigError for unreadable definitions."""
        self._given = dict(_given(crd_dir)) if crd_dir is not None else {}
        self._definitions = _installed_definitions() if installed else {}
        self._core = {
            (_api_version(one), str(one["kind"])): name
            for name, raw in self._definitions.items()
            for one in raw.get("x-kubernetes-group-version-kind", [])
            if isinstance(one, Mapping)
        }

    def find(self, api_version: str, kind: str) -> tuple[Schema, ...]:
        """What an object of a kind has to satisfy; empty where nobody knows the kind.

        Given and installed schemas know every key; our tables, added with all objects open, know enumerations and
        forms that those leave out.
        """
        place, ray = (api_version, kind), api_version == "ray.io/v1" and kind in RAY_KINDS
        ours = self._ours(place, closed=False) if ray or place in TABLES else ()
        if place in self._given:
            return (_closed_metadata(self._given[place]), *ours)
        if place in self._core:
            definitions = {**self._definitions, _QUANTITY: NUMBER_TOO}
            return (Schema(definitions[self._core[place]], definitions), *ours)
        if ray and self._definitions:
            (table,) = self._ours(place, closed=True)
            template = {"$ref": f"#/$defs/{_POD_TEMPLATE}"}
            return (Schema(_exchanged(table.raw, template), self._definitions), *ours)
        return self._ours(place, closed=True) if ours else ()

    def known(self) -> dict[str, list[str]]:
        """Every kind that has a schema, with its API versions."""
        found: dict[str, list[str]] = {kind: ["ray.io/v1"] for kind in RAY_KINDS}
        for api_version, kind in [*self._given, *self._core, *TABLES]:
            if api_version not in found.setdefault(kind, []):
                found[kind].append(api_version)
        return found

    def _ours(self, place: tuple[str, str], closed: bool) -> tuple[Schema]:
        specs = {
            "RayCluster": ray_tables.cluster_spec,
            "RayService": ray_tables.service_spec,
            "RayJob": ray_tables.job_spec,
        }
        ray = specs.get(place[1])
        table = {"spec!": ray(core_tables.POD_TEMPLATE)} if ray is not None else TABLES[place]
        around = {"apiVersion": "str", "kind": "str", "metadata!": core_tables.METADATA, "status": "any"}
        raw = raw_schema({**around, **table}, closed)
        return (Schema(raw if ray is not None else with_quantity(raw, NUMBER_TOO)),)


def _closed_metadata(raw: Mapping[str, Any]) -> Schema:
    """A definition says of `metadata` only that it is an object; the API server knows more."""
    properties = {**raw.get("properties", {}), "metadata": raw_schema(core_tables.METADATA)}
    return Schema({**raw, "properties": properties})


def _exchanged(raw: Mapping[str, Any], template: dict[str, Any]) -> dict[str, Any]:
    """The same tree with every pod template taken from the installed definitions."""
    result: dict[str, Any] = {}
    for name, part in raw.items():
        if name in ("template", "submitterPodTemplate"):
            result[name] = template
        else:
            result[name] = _exchanged(part, template) if isinstance(part, Mapping) else part
    return result


def _given(folder: Path) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        raise ConfigError(f"{folder}: no .yaml files with resource definitions", key="--crds")
    for file in files:
        try:
            if file.stat().st_size > MAX_CRD_BYTES:
                raise ConfigError(f"{file}: larger than {MAX_CRD_BYTES} bytes", key="--crds")
            for raw in _documents(file.read_text(encoding="utf-8")):
                yield from _versions(raw)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: cannot be read as resource definitions: {error}", key="--crds") from error


def _documents(text: str) -> Iterator[Any]:
    loader = _LOADER(text)
    try:
        while loader.check_data():
            yield loader.get_data()
    finally:
        loader.dispose()


def _versions(raw: Any) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    if not isinstance(raw, dict) or raw.get("kind") != "CustomResourceDefinition":
        return
    spec = raw["spec"]
    for version in spec["versions"]:
        place = (f"{spec['group']}/{version['name']}", str(spec["names"]["kind"]))
        yield place, version["schema"]["openAPIV3Schema"]


def _installed_definitions() -> dict[str, Any]:
    """Kubernetes' own definitions from the optional package, of its newest version; {} where it is absent."""
    found = importlib.util.find_spec("kubernetes_validate")
    if found is None or found.origin is None:
        return {}
    folders = (Path(found.origin).parent / "kubernetes-json-schema").glob("v*-local-strict")
    newest = max(folders, key=_version_of, default=None)
    if newest is None:
        return {}
    raw = json.loads((newest / "_definitions.json").read_text(encoding="utf-8"))
    # They say less of quantities than the API server does.
    return {**raw["$defs"], _QUANTITY: QUANTITY}


def _version_of(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split("-")[0].lstrip("v").split(".") if part.isdigit())


def _api_version(one: Mapping[str, Any]) -> str:
    return f"{one['group']}/{one['version']}" if one["group"] else str(one["version"])
