"""All files under deploy/ pass every schema there is, with no finding at all; and the tables agree with the schemas."""

from __future__ import annotations

import tomllib
import warnings
from typing import Any

import pytest
import yaml
from repo.source_tree import ROOT

from penstock.cluster.config import load_config
from penstock.cluster.validate import version_rules
from penstock.cluster.validate.checker import check_files
from penstock.cluster.validate.schemas import RAY_KINDS, TABLES, SchemaBook
from penstock.cluster.validate.start_parameters import OPTIONS
from penstock.cluster.validate.structural import Schema

pytestmark = pytest.mark.timeout(120)

MANIFESTS = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
CONFIGURATIONS = [ROOT / "deploy" / "penstock.yaml", *sorted((ROOT / "deploy" / "serve").glob("*.yaml"))]
CRDS = ROOT.parent / "shared" / "data" / "kuberay_crds"
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"KubeRay's resource definitions are not at {CRDS}")


def serve_configs() -> list[dict[str, Any]]:
    found = [yaml.safe_load((ROOT / "deploy" / "serve" / "serve-config.yaml").read_text())]
    objects = [one for manifest in MANIFESTS for one in yaml.safe_load_all(manifest.read_text())]
    found += [yaml.safe_load(one["spec"]["serveConfigV2"]) for one in objects if one["kind"] == "RayService"]
    return found


@pytest.mark.parametrize("installed", [True, False], ids=["with the optional package", "without"])
def test_nothing_is_found(installed: bool) -> None:
    assert len(MANIFESTS) >= 3
    found = check_files([*MANIFESTS, *CONFIGURATIONS], SchemaBook(installed=installed))
    assert [str(one) for one in found] == []


@needs_crds
def test_nothing_is_found_by_the_resource_definitions() -> None:
    assert [str(one) for one in check_files(MANIFESTS, SchemaBook(CRDS))] == []


def test_serve_itself_takes_the_configurations() -> None:
    from ray.serve.schema import ServeDeploySchema

    configs = serve_configs()
    assert len(configs) == 5
    for config in configs:
        ServeDeploySchema.model_validate(config)


def test_the_sample_configuration_loads() -> None:
    assert load_config(file=ROOT / "deploy" / "penstock.yaml", environment={}).pools.decode == 2


def test_every_sample_asks_for_tokens_and_runs_one_image() -> None:
    for manifest in MANIFESTS:
        text = manifest.read_text()
        (service,) = [one for one in yaml.safe_load_all(text) if one["kind"] == "RayService"]
        cluster = service["spec"]["rayClusterConfig"]
        assert cluster["authOptions"] == {"mode": "token"}
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
        assert images == {"registry.example/penstock:0.1.0-ray" + cluster["rayVersion"]}
        assert all("maxReplicas" in group for group in cluster["workerGroupSpecs"])


def keys_of(schema: Schema, skip: tuple[str, ...] = ("status", "template")) -> dict[str, set[str]]:
    """Names of the fields of every object, by its path; pod templates and status left out."""
    found: dict[str, set[str]] = {}

    def walk(node: Schema, path: str) -> None:
        node = node.resolved()
        if node.properties:
            found[path] = set(node.properties)
        for name, raw in node.properties.items():
            if name not in skip:
                walk(node.child(raw), f"{path}.{name}")
        for part in ("items", "additionalProperties"):
            if isinstance(node.raw.get(part), dict):
                walk(node.child(node.raw[part]), path)

    walk(schema, "")
    return found


@needs_crds
@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_our_tables_know_the_same_fields(kind: str) -> None:
    (ours,) = SchemaBook(installed=False).find("ray.io/v1", kind)
    theirs = SchemaBook(CRDS, installed=False).find("ray.io/v1", kind)[0]
    mine, given = keys_of(ours), keys_of(theirs)
    differing = {path: mine[path] ^ given[path] for path in mine if path in given and mine[path] != given[path]}
    assert differing == {}, "ours against the definitions"
    assert set(mine) >= {path for path in given if path.count(".") <= 3 and not path.startswith(".metadata")}


@needs_crds
def test_our_pod_table_knows_the_same_fields() -> None:
    cluster = SchemaBook(CRDS, installed=False).find("ray.io/v1", "RayCluster")[0]
    template = cluster
    for name in ("spec", "headGroupSpec", "template", "spec"):
        template = template.child(template.properties[name])
    given = keys_of(template)
    (ours,) = SchemaBook(installed=False).find("v1", "Pod")
    mine = keys_of(ours.child(ours.properties["spec"]))
    differing = {path: mine[path] ^ given[path] for path in mine if path in given and mine[path] != given[path]}
    assert differing == {}


def test_our_tables_know_no_field_that_kubernetes_does_not() -> None:
    book, bare = SchemaBook(), SchemaBook(installed=False)
    for api_version, kind in TABLES:
        (ours,) = bare.find(api_version, kind)
        theirs = book.find(api_version, kind)
        if len(theirs) < 2:
            pytest.skip("kubernetes-validate is not installed")
        mine, given = keys_of(ours, ()), keys_of(theirs[0], ("status", "managedFields", "ownerReferences"))
        for path in mine:
            if path in given and not path.startswith(".metadata"):
                assert mine[path] <= given[path] | {"status"}, f"{kind}{path}"


def test_kuberays_kinds_are_known_without_anything() -> None:
    assert all(SchemaBook(installed=False).find("ray.io/v1", kind) for kind in RAY_KINDS)


def test_the_options_of_ray_start_are_these() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.scripts.scripts import start
    real = {name.lstrip("-") for option in start.params for name in option.opts if name.startswith("--")}
    assert real == OPTIONS


def test_the_oldest_ray_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [one for one in project["dependencies"] if one.startswith("ray[")]
    least = ".".join(map(str, version_rules.MINIMUM[:2]))
    assert requirement.endswith(f">={least}")


def test_the_version_in_the_images_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    (ray,) = [line.partition("==")[2] for line in constraints if line.startswith("ray==")]
    for manifest in MANIFESTS:
        assert f"penstock:{project['version']}-ray{ray}" in manifest.read_text()
