"""Unusual files in which nothing is wrong: no error may be told of them, whichever schemas there are."""

# ruff: noqa: E501 - a table of cases is read line by line
from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import yaml
from repo.source_tree import ROOT

from penstock.cluster.validate.checker import check_files
from penstock.cluster.validate.findings import Severity
from penstock.cluster.validate.runtime_env_rules import KEYS
from penstock.cluster.validate.schemas import SchemaBook

pytestmark = pytest.mark.timeout(60)

DEV = (ROOT / "deploy" / "kuberay" / "rayservice-cpu-dev.yaml").read_text()
HA = (ROOT / "deploy" / "kuberay" / "rayservice-high-availability.yaml").read_text()
POD = (
    "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: a}}\nspec:\n  containers:\n  - name: a\n    image: 'localhost:5000/b@sha256:"
    + "0" * 64
    + "'\n"
)
FOREIGN = "".join(
    f"---\napiVersion: {version}\nkind: {kind}\nmetadata: {{name: a}}\nspec: {{}}\n"
    for version, kind in (
        ("serving.knative.dev/v1", "Service"),
        ("monitoring.coreos.com/v1", "ServiceMonitor"),
        ("cert-manager.io/v1", "Certificate"),
        ("gateway.networking.k8s.io/v1", "Gateway"),
        ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"),
        ("v1", "PersistentVolume"),
    )
)

CORRECT = {
    "a configuration of one key": "pools: {decode: 3}\n",
    "windows line ends": (ROOT / "deploy" / "penstock.yaml").read_text().replace("\n", "\r\n"),
    "a configuration in JSON": json.dumps({"pools": {"prefill": 2, "decode": 2}, "front": {"host": "0.0.0.0"}}),
    "marks and directives": "%YAML 1.2\n---\npools: {decode: 2}\n...\n",
    "empty documents between": "---\n---\n" + DEV + "\n---\n# only a comment\n---\n",
    "a byte order mark": "\ufeff" + HA,
    "a List in JSON": json.dumps({"apiVersion": "v1", "kind": "List", "items": list(yaml.safe_load_all(DEV))}),
    "Serve with what it needs": "applications:\n- import_path: penstock.cluster.serve_app:build\n",
    "Serve with flags": "applications:\n- name: p\n  import_path: penstock.cluster.serve_app:build\n  args: {model: /models/x, max-num-seqs: 64, pools.decode: 2}\n",
    "Serve for others": "http_options: {host: 0.0.0.0, request_timeout_s: 30.5}\napplications:\n- name: t\n  route_prefix: /t\n  import_path: text_ml.app\n  runtime_env: {working_dir: 'https://a/b.zip', pip: [torch], env_vars: {A: b}}\n  args: {anything: [1]}\n  deployments:\n  - {name: T, num_replicas: auto, autoscaling_config: {min_replicas: 0, max_replicas: 9}, ray_actor_options: {num_gpus: 0.25}}\n  - {name: S, placement_group_bundles: [{CPU: 1, GPU: 1}], placement_group_strategy: STRICT_PACK}\n- {name: b, route_prefix: null, import_path: 'b:app'}\n",
    "probes of the proxies": DEV.replace("path: /ready\n                    port: direct", "path: /-/healthz\n                    port: serve"),
    "probes of the raylet": DEV.replace("path: /ready\n                    port: direct", "path: /api/local_raylet_healthz\n                    port: 52365"),
    "another port for Serve everywhere": DEV.replace("containerPort: 8000", "containerPort: 9000").replace("      port: 8000", "      port: 9000"),
    "the Serve configuration as JSON": re.sub(r"serveConfigV2: \|\n((?:    .*\n)+)", lambda m: "serveConfigV2: '" + json.dumps(yaml.safe_load(m[1])) + "'\n", DEV),
    "images by digest": DEV.replace("penstock:0.1.0-ray2.60.0", "penstock@sha256:" + "1" * 64),
    "a sidecar": DEV.replace("            volumes: *volumes\n", "              - {name: logs, image: 'fluent/fluent-bit:3.1.0', securityContext: *container-security}\n            volumes: *volumes\n"),
    "as kubectl gives it back": DEV.replace("  name: penstock-dev\n", "  creationTimestamp: '2026-01-01T00:00:00Z'\n  uid: a-b\n  managedFields: [{manager: kubectl}]\n  name: penstock-dev\n", 1).replace("\n---\n", "\nstatus: {serviceStatus: Running}\n---\n", 1),
    "scaled pools": DEV.replace("    authOptions:", "    enableInTreeAutoscaling: true\n    authOptions:").replace("maxReplicas: 1", "maxReplicas: 4").replace("decode: 1", "decode: 3"),
    "selectors by KubeRay's labels": HA.replace("      app.kubernetes.io/component: decode\n---", "      ray.io/group: decode\n      ray.io/node-type: worker\n---"),
    "a secret like another, made elsewhere": HA.replace("secret/penstock-api-key, secret/penstock-redis", "secret/penstock-redis"),
    "fractions": POD + "    resources: {limits: {cpu: 1.5, memory: 1.5Gi, ephemeral-storage: 2e9}, requests: {cpu: .5, memory: 1073741824}}\n",
    "variables that are no secrets": POD + "    env: [{name: TOKENIZERS_PARALLELISM, value: 'false'}, {name: MAX_TOKENS, value: '4096'}, {name: HF_TOKEN_PATH, value: /t}, {name: API_KEY, value: $(OTHER)}, {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]\n    args: [--api-key, $(API_KEY), --max-tokens, '5']\n",
    "kinds of other APIs": FOREIGN,
    "names of roles": "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {name: 'system:a'}\nroleRef: {kind: ClusterRole, name: x, apiGroup: rbac.authorization.k8s.io}\n",
    "a job with what it may have": "apiVersion: batch/v1\nkind: Job\nmetadata: {generateName: a-}\nspec: {backoffLimit: 0, template: {spec: {restartPolicy: OnFailure, containers: [{name: a, image: 'a:1'}]}}}\n",
    "headless, and outside": "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: None, selector: {a: b}}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: b}\nspec: {type: ExternalName, externalName: redis.example.com}\n",
    "one port, two protocols": "apiVersion: v1\nkind: Service\nmetadata: {name: dns}\nspec: {selector: {k: d}, ports: [{name: u, port: 53, protocol: UDP}, {name: t, port: 53, protocol: TCP}]}\n",
    "files of others in a ConfigMap": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  prometheus.yaml: |\n    global: {scrape_interval: 15s}\n  values.yaml: |\n    a: {{ .Values.x }}\n  empty: ''\n",
    "base64 over several lines": "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\ndata:\n  k: |\n    aGVs\n    bG8=\n",
    "fault tolerance the old way": "apiVersion: ray.io/v1\nkind: RayCluster\nmetadata: {name: c, annotations: {ray.io/ft-enabled: 'true'}}\nspec: {rayVersion: 2.46.0, headGroupSpec: {rayStartParams: {redis-password: $REDIS_PASSWORD}, template: {spec: {containers: [{name: h, image: 'rayproject/ray:2.46.0', env: [{name: RAY_REDIS_ADDRESS, value: 'redis:6379'}]}]}}}}\n",
}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["with the optional package", "without"])
def book(request: pytest.FixtureRequest) -> SchemaBook:
    return SchemaBook(installed=bool(request.param))


@pytest.mark.parametrize("name", CORRECT)
def test_no_error(tmp_path: Path, book: SchemaBook, name: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(CORRECT[name].encode())
    assert [str(one) for one in check_files([file], book) if one.severity is Severity.ERROR] == []


def test_the_keys_of_runtime_environments_are_rays() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.runtime_env import RuntimeEnv
    assert {name for name in RuntimeEnv.known_fields if not name.startswith("_")} == KEYS
