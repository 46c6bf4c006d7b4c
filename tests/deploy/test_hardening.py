"""Every sample under deploy/ ships safe: tokens, no root, read-only root file systems, policies, no host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from repo.source_tree import ROOT

MANIFESTS = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
OF_THE_HOST = {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}
RAYS_PORTS = {6379, 8265, 10001}  # whoever reaches them runs code, but for the tokens


def objects(path: Any) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def pods(path: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of a file, wherever it stands."""

    def walk(node: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(node, dict):
            if "containers" in node:
                yield place, node
            for name, value in node.items():
                yield from walk(value, f"{place}.{name}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from walk(value, f"{place}[{index}]")

    for one in objects(path):
        yield from walk(one, one["kind"])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_pods_have_no_rights(path: Any) -> None:
    found = list(pods(path))
    assert len(found) >= 2
    for place, pod in found:
        assert not OF_THE_HOST & pod.keys(), place
        assert pod["securityContext"]["runAsNonRoot"] is True, place
        assert pod["securityContext"]["runAsUser"] > 0, place
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, place
        assert not any("hostPath" in volume for volume in pod.get("volumes", ())), place
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False, place
            assert rights["readOnlyRootFilesystem"] is True, place
            assert rights["capabilities"] == {"drop": ["ALL"]}, place
            assert not rights.get("privileged"), place
            assert not any("hostPort" in port for port in container.get("ports", ())), place
            secrets = [v for v in container.get("env", ()) if any(w in v["name"] for w in ("KEY", "PASSWORD", "TOKEN"))]
            assert all("secretKeyRef" in variable["valueFrom"] for variable in secrets), place


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_ray_asks_for_its_token_and_only_its_own_pods_reach_it(path: Any) -> None:
    (service,) = [one for one in objects(path) if one["kind"] == "RayService"]
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    policies = [one["spec"] for one in objects(path) if one["kind"] == "NetworkPolicy"]
    for place, pod in pods(path):
        assert policies, place
        assert pod["containers"], place
    groups = service["spec"]["rayClusterConfig"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        labels = group["template"]["metadata"]["labels"].items()
        chosen = [policy for policy in policies if policy["podSelector"]["matchLabels"].items() <= labels]
        assert any({"Ingress", "Egress"} <= set(policy["policyTypes"]) for policy in chosen)
        for rule in (rule for policy in chosen for rule in policy.get("ingress", ())):
            own = [one.get("podSelector", {}).get("matchLabels", {}) for one in rule.get("from", ())]
            ours = bool(own) and all(one.items() and one.items() <= labels for one in own)
            operator = bool(own) and all(one.get("app.kubernetes.io/name") == "kuberay-operator" for one in own)
            ports = {port["port"] for port in rule.get("ports", ())}
            assert ours or operator or (ports and not ports & RAYS_PORTS), rule


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_what_operators_ask_for_is_not_on_the_port_of_callers(path: Any) -> None:
    (service,) = [one for one in objects(path) if one["kind"] == "RayService"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    front = application["args"]["front"]
    assert front.get("admin", "apart") == "apart"
    reached = {
        port["port"]
        for one in objects(path)
        if one["kind"] == "NetworkPolicy"
        for rule in one["spec"].get("ingress", ())
        if "from" not in rule
        for port in rule["ports"]
    }
    assert reached == {front["port"]}


def test_the_image_runs_without_rights() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"
    assert not any("--privileged" in line or "sudo" in line for line in lines)
