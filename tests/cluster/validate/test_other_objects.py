"""Objects that come beside a RayService, clusters and jobs without one, and what a ConfigMap carries."""

# ruff: noqa: E501 - a table of cases is read line by line
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.cluster.validate.checker import check_files
from penstock.cluster.validate.findings import Severity
from penstock.cluster.validate.schemas import SchemaBook

pytestmark = pytest.mark.timeout(60)

WEB = """apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        image: nginx:1.27.0
        ports: [{name: http, containerPort: 8080}]
"""
SCALER = """apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: web}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: web}
  minReplicas: 1
  maxReplicas: 4
  metrics:
  - type: Resource
    resource: {name: cpu, target: {type: Utilization, averageUtilization: 60}}
"""
JOB = "apiVersion: batch/v1\nkind: CronJob\nmetadata: {name: a}\nspec: {schedule: '@daily', jobTemplate: {spec: {template: {spec: {restartPolicy: Never, containers: [{name: a, image: 'b:1'}]}}}}}\n"
SERVICE = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {selector: {a: b}, ports: [{name: x, port: 80}]}\n"
INGRESS = "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: i}\nspec: {rules: [{http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: a, port: {number: 80}}}}]}}]}\n---\n"
CLAIM = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: a}\nspec: {accessModes: [ReadWriteMany], resources: {requests: {storage: 1Gi}}}\n"
CARRIER = (
    "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  penstock.yaml: |\n    pools:\n      decode: 2\n"
)

MISTAKES = [
    (WEB, "replicas: 2", "strategy: {type: Rolling}", "spec.strategy.type", "did you mean 'RollingUpdate'"),
    (WEB, "replicas: 2", "strategy: {type: Recreate, rollingUpdate: {maxSurge: 1}}", "spec.strategy.rollingUpdate", "has none"),
    (WEB, "{matchLabels: {app: web}}", "{}", "spec.selector", "empty selector"),
    (WEB, "      containers:", "      restartPolicy: Never\n      containers:", "spec.template.spec.restartPolicy", "have Always"),
    (WEB, "- name: web", "- name: Web_1", "spec.template.spec.containers[0].name", "lower-case"),
    (WEB, "        ports", "        envFrom: [{}]\n        ports", "spec.template.spec.containers[0].envFrom[0]", "exactly one of"),
    (WEB, "        ports", "        env: [{name: A, valueFrom: {}}]\n        ports", "spec.template.spec.containers[0].env[0].valueFrom", "exactly one of"),
    (WEB, "        ports", "        env: [{name: A, valueFrom: {fieldRef: {fieldPath: status.podIPx}}}]\n        ports", "spec.template.spec.containers[0].env[0].valueFrom.fieldRef.fieldPath", "status.podIP"),
    (WEB, "        ports", "        args: [--api-key=abc]\n        ports", "spec.template.spec.containers[0].args[0]", "plain text"),
    (WEB, "        ports", "        resources: {limits: {cpu: -1}}\n        ports", "spec.template.spec.containers[0].resources.limits.cpu", "less than 0"),
    (WEB, "        ports", "        resources: {limits: {nvidia/gpu: 1}}\n        ports", 'spec.template.spec.containers[0].resources.limits["nvidia/gpu"]', "nvidia.com/gpu"),
    (WEB, "8080}]", "8080}, {name: b, containerPort: 8080}]", "spec.template.spec.containers[0].ports[1].containerPort", "stands twice"),
    (WEB, "      containers:", "      affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: In}]}]}}}\n      containers:", "spec.template.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].values", "there must be values"),
    (WEB, "kind: Deployment", "kind: DaemonSet", "spec.replicas", "unknown key"),
    (SCALER, "minReplicas: 1", "minReplicas: 8", "spec.minReplicas", "more than maxReplicas"),
    (SCALER, "minReplicas: 1", "minReplica: 1", "spec.minReplica", "minReplicas"),
    (SCALER, "averageUtilization: 60", "value: 60", "spec.metrics[0].resource.target.averageUtilization", "needs"),
    (SCALER, "kind: Deployment", "kind: Deploymnt", "spec.scaleTargetRef.kind", "Deployment"),
    (SCALER, "autoscaling/v2", "autoscaling/v2beta2", "apiVersion", "autoscaling/v2"),
    (SCALER + "---\n" + WEB, "name: web}\n  min", "name: webb}\n  min", "spec.scaleTargetRef.name", "did you mean 'web'"),
    (JOB, "restartPolicy: Never, ", "", "spec.jobTemplate.spec.template.spec.restartPolicy", "OnFailure or Never"),
    (JOB, "'@daily'", "every day", "spec.schedule", "five fields"),
    (SERVICE, "port: 80}", "port: 80}, {name: y, port: 80}", "spec.ports[1].port", "stands twice"),
    (SERVICE, "port: 80}", "port: 80, targetPort: 99999}", "spec.ports[0].targetPort", "outside"),
    (SERVICE, "selector", "type: LoadBalancer, clusterIP: None, selector", "spec.clusterIP", "address of its own"),
    (INGRESS + SERVICE, "path: /", "path: x", "spec.rules[0].http.paths[0].path", "start with"),
    (INGRESS + SERVICE, "number: 80", "number: 81", "spec.rules[0].http.paths[0].backend.service.port.number", "no port 81"),
    (CLAIM, "accessModes: [ReadWriteMany], ", "", "spec.accessModes", "one or more"),
    (CLAIM, ", resources: {requests: {storage: 1Gi}}", "", "spec.resources.requests.storage", "no size"),
    (CARRIER, "decode: 2", "decod: 2", 'data["penstock.yaml"].pools.decod', "did you mean 'decode'"),
    (CARRIER, "decode: 2", "decode: [", 'data["penstock.yaml"]', "not YAML"),
    (CARRIER, "    pools:\n      decode: 2", "    applications: [{import_path: 'penstock.cluster.serve_app:bild'}]", 'data["penstock.yaml"].applications[0].import_path', "no 'penstock"),
    ("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\ntype: kubernetes.io/tls\ndata: {tls.crt: YQ==, tls.key: YQ==}\n", "tls.key", "key", 'data["tls.key"]', "needs 'tls.key'"),
    ("apiVersion: v1\nkind: List\nitems: []\n", "[]", "{}", "items", "a list"),
]  # fmt: skip


def told(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    found = check_files([file], SchemaBook(installed=False))
    return [str(one).split(": error: ", 1)[1] for one in found if one.severity is Severity.ERROR]


@pytest.mark.parametrize(("text", "old", "new", "key", "reason"), MISTAKES, ids=[f"{m[3]} {m[4]}" for m in MISTAKES])
def test_found(tmp_path: Path, text: str, old: str, new: str, key: str, reason: str) -> None:
    assert old in text
    found = told(tmp_path, text.replace(old, new, 1))
    assert [line for line in found if line.startswith(f"{key}: ") and reason in line], found


@pytest.mark.parametrize("text", [WEB, SCALER + "---\n" + WEB, JOB, INGRESS + SERVICE, CLAIM, CARRIER])
def test_nothing_is_wrong_before(tmp_path: Path, text: str) -> None:
    assert told(tmp_path, text) == []


def cluster(head: list[dict[str, Any]], worker: list[dict[str, Any]], **spec: Any) -> str:
    """A RayCluster whose head and worker have these environments."""

    def template(env: list[dict[str, Any]]) -> dict[str, Any]:
        return {"spec": {"containers": [{"name": "ray", "image": "rayproject/ray:2.60.0-py311", "env": env}]}}

    groups = [{"groupName": "w", "replicas": 1, "minReplicas": 1, "maxReplicas": 1, "template": template(worker)}]
    own = {"rayVersion": "2.60.0", "headGroupSpec": {"template": template(head)}, "workerGroupSpecs": groups, **spec}
    return yaml.safe_dump({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "c"}, "spec": own})


MODE = {"name": "RAY_AUTH_MODE", "value": "token"}
TOKEN = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "t", "key": "token"}}}
HEAD = "spec.headGroupSpec.template.spec.containers[0].env"
WORKER = "spec.workerGroupSpecs[0].template.spec.containers[0].env"


@pytest.mark.parametrize(
    ("head", "worker", "spec", "says"),
    [
        ([MODE, TOKEN], [], {}, f"{WORKER}: RAY_AUTH_MODE is token in other pods"),
        ([], [MODE, TOKEN], {}, f"{HEAD}: RAY_AUTH_MODE is token in other pods"),
        ([MODE, TOKEN], [MODE], {}, f"{WORKER}: RAY_AUTH_MODE is token, but there is neither"),
        ([{**MODE, "value": "tokens"}], [], {}, f"{HEAD}[0].value: RAY_AUTH_MODE 'tokens' is none of"),
        ([MODE, TOKEN], [MODE, TOKEN], {"rayVersion": "2.51.0"}, "spec.rayVersion: RAY_AUTH_MODE needs Ray 2.52.0"),
        ([MODE], [], {"authOptions": {"mode": "token"}}, f"{HEAD}[0]: authOptions sets RAY_AUTH_MODE already"),
    ],
)
def test_tokens_by_hand(tmp_path: Path, head: list[Any], worker: list[Any], spec: dict[str, Any], says: str) -> None:
    found = told(tmp_path, cluster(head, worker, **spec))
    assert [line for line in found if line.startswith(says)], found


def test_tokens_in_every_pod_are_enough(tmp_path: Path) -> None:
    assert told(tmp_path, cluster([MODE, TOKEN], [MODE, TOKEN])) == []


def test_another_python_cannot_join(tmp_path: Path) -> None:
    text = cluster([], [], authOptions={"mode": "token"})
    at = text.rindex("py311")
    found = told(tmp_path, text[:at] + "py312" + text[at + 5 :])
    assert [line for line in found if "holds Python py312" in line], found
