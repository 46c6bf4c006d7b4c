"""What a document is, objects of other kinds, and the command: statuses, JSON, folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repo.source_tree import ROOT

from penstock.cluster import cli
from penstock.cluster.validate.checker import DocumentKind, check_files, kind_of
from penstock.cluster.validate.quantities import duration_s, quantity, version
from penstock.cluster.validate.schemas import SchemaBook

pytestmark = pytest.mark.timeout(60)


def found(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    return [str(one).split(": ", 1)[1] for one in check_files([file], SchemaBook(installed=False))]


@pytest.mark.parametrize(
    ("tree", "kind"),
    [
        ({"pools": {}}, DocumentKind.CONFIGURATION),
        ({"pool": {}}, DocumentKind.CONFIGURATION),
        ({"applications": []}, DocumentKind.SERVE),
        ({"aplications": []}, DocumentKind.SERVE),
        ({"kind": "Service"}, DocumentKind.KUBERNETES),
        ({"apiversion": "v1", "spec": {}}, DocumentKind.KUBERNETES),
        ({"nothing_like_it": 1}, None),
        ([1], None),
    ],
)
def test_what_a_document_is(tree: Any, kind: DocumentKind | None) -> None:
    assert kind_of(tree) is kind


def job(**spec: Any) -> str:
    template = {"spec": {"containers": [{"name": "ray", "image": "rayproject/ray:2.60.0-py311"}]}}
    cluster = {"rayVersion": "2.60.0", "authOptions": {"mode": "token"}, "headGroupSpec": {"template": template}}
    own = {"entrypoint": "python x.py", "shutdownAfterJobFinishes": True, "rayClusterSpec": cluster, **spec}
    return yaml.safe_dump({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "j"}, "spec": own})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"entrypoint": ""}, "spec.entrypoint: there is no command"),
        ({"submissionMode": "HttpMode"}, "spec.submissionMode: 'HttpMode' is none of"),
        ({"backoffLimit": -1}, "spec.backoffLimit: -1 is less than 0"),
        ({"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 5}, "spec.ttlSecondsAfterFinished"),
        ({"submissionMode": "SidecarMode", "submitterConfig": {}}, "spec.submitterConfig: SidecarMode"),
        ({"clusterSelector": {"cluster": "x"}}, "spec.clusterSelector: the cluster is named under"),
        ({"deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}}, "spec.deletionStrategy: either"),
        ({"runtimeEnvYAML": "a: [1"}, "spec.runtimeEnvYAML: not YAML"),
    ],
)
def test_jobs(tmp_path: Path, spec: dict[str, Any], says: str) -> None:
    assert not [line for line in found(tmp_path, job()) if line.startswith("error")]
    told = found(tmp_path, job(**spec))
    assert [line for line in told if line.startswith("error") and says in line], told


def test_kinds_and_lists(tmp_path: Path) -> None:
    assert "unknown kind 'Deploymen' (did you mean 'Deployment'?)" in "\n".join(
        found(tmp_path, "{apiVersion: apps/v1, kind: Deploymen, metadata: {name: a}}")
    )
    assert "no schema for example.com/v1 Thing" in "\n".join(
        found(tmp_path, "{apiVersion: example.com/v1, kind: Thing, metadata: {name: a}}")
    )
    text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: A}}\n"
    assert any("metadata.name: 'A'" in line for line in found(tmp_path, text))
    assert found(tmp_path, "# nothing\n") == ["error: the file holds nothing"]
    assert "holds several" in "\n".join(found(tmp_path, "pools: {}\n---\nkv: {}\n"))


def test_a_file_that_is_not_there() -> None:
    (one,) = check_files([Path("/nowhere.yaml")], SchemaBook(installed=False))
    assert "No such file" in one.reason


def test_numbers() -> None:
    assert [quantity(one) for one in ("500m", "2Gi", 3, "1e3", "x", True)] == [0.5, 2.0**31, 3.0, 1000.0, None, None]
    assert version("2.60.0-py311") == (2, 60, 0)
    assert (duration_s("1h30m"), duration_s("90"), duration_s("soon")) == (5400.0, 90.0, None)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["penstock", "validate", *arguments])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(monkeypatch, str(ROOT / "deploy" / "serve")) == 0
    assert "1 file: 0 errors, 0 warnings" in capsys.readouterr().err
    doubtful = tmp_path / "a.yaml"
    doubtful.write_text("runner: {model_dir: /models/nowhere}\n")
    assert run(monkeypatch, str(doubtful)) == 0
    assert run(monkeypatch, "--strict", str(doubtful)) == 1
    assert f"{doubtful}:1: warning: runner.model_dir" in capsys.readouterr().out
    wrong = tmp_path / "b.yaml"
    wrong.write_text("pools:\n  prefil: 1\n")
    assert run(monkeypatch, "--json", str(wrong), str(doubtful)) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["files"], report["errors"], report["warnings"]) == (2, 1, 1)
    assert report["findings"][0] == {
        "file": str(wrong),
        "line": 2,
        "key": "pools.prefil",
        "severity": "error",
        "reason": "unknown key 'pools.prefil'",
        "did_you_mean": "prefill",
    }
    assert run(monkeypatch, "--kind", "serve", str(wrong)) == 1
    assert run(monkeypatch, "--kind", "helm", str(wrong)) == 2
    assert run(monkeypatch, "--crds", str(tmp_path / "none"), str(wrong)) == 2
    assert run(monkeypatch, str(tmp_path / "absent.yaml")) == 1


def test_folders(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Files of others are left aside where nobody named them; links that lead nowhere are told."""
    (tmp_path / "board.json").write_text('{"title": "x", "version": 1, "annotations": {}, "links": []}')
    (tmp_path / "own.yaml").write_text("pools: {decode: 1}\n")
    assert run(monkeypatch, str(tmp_path)) == 0
    assert "board.json:1: warning: neither" in capsys.readouterr().out
    assert run(monkeypatch, str(tmp_path / "board.json")) == 1
    (tmp_path / "round.yaml").symlink_to("round.yaml")
    assert run(monkeypatch, str(tmp_path)) == 1
    assert "round.yaml:1: error: " in capsys.readouterr().out
    assert run(monkeypatch, str(ROOT / "deploy")) == 0


@pytest.mark.parametrize(
    "text",
    [
        "ray: {prefill_resources: {x: .nan}}",
        "ray: {worker_num_cpus: .inf}",
        "kv: {memory_bytes: 1000000000000000000000000000000}",
        "pools: {decode: []}",
        "health: [{}]",
    ],
)
def test_no_value_breaks_the_sums(tmp_path: Path, text: str) -> None:
    manifest = (ROOT / "deploy" / "kuberay" / "rayservice-cpu-dev.yaml").read_text()
    lines = manifest[manifest.index("          kv:\n") : manifest.index("        deployments:\n")]
    assert any(line.startswith("error") for line in found(tmp_path, manifest.replace(lines, f"          {text}\n")))
