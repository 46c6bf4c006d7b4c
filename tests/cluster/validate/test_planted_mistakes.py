"""Every planted mistake, one edit of a shipped file, is found: in its file, at its line and key, for its reason."""

# ruff: noqa: E501 - a table of cases is read line by line
from __future__ import annotations

from pathlib import Path

import pytest
from repo.source_tree import ROOT

from penstock.cluster.validate.checker import check_files
from penstock.cluster.validate.findings import Finding, Severity
from penstock.cluster.validate.schemas import SchemaBook

pytestmark = pytest.mark.timeout(120)

DEV = "deploy/kuberay/rayservice-cpu-dev.yaml"
GPU = "deploy/kuberay/rayservice-gpu-split.yaml"
TENSOR = "deploy/kuberay/rayservice-gpu-tensor-parallel.yaml"
HA = "deploy/kuberay/rayservice-high-availability.yaml"
SERVE = "deploy/serve/serve-config.yaml"
OWN = "deploy/penstock.yaml"
CLUSTER = "spec.rayClusterConfig"
WORKER = f"{CLUSTER}.workerGroupSpecs[0]"
POD = f"{WORKER}.template.spec"
RAY = f"{POD}.containers[0]"
APP = "spec.serveConfigV2.applications[0]"

# file, text that stands there (its first place is changed), what it becomes, the key told, part of the reason
MISTAKES = [
    # our own configuration
    (OWN, "  decode: 2", "  decoed: 2", "pools.decoed", "did you mean 'decode'"),
    (OWN, "pools:", "pool:", "pool", "did you mean 'pools'"),
    (OWN, "  block_size: 16 ", "  block_size: 24 ", "kv.block_size", "power of two"),
    (OWN, "  block_size: 16 ", "  block_size: 4096 ", "kv.block_size", "more than 1024"),
    (OWN, "  prefill: 1", "  prefill: -1", "pools.prefill", "zero or more"),
    (OWN, "  decode: 2", "  decode: two", "pools.decode", "not of type int"),
    (OWN, "  decode: 2", "  decode: 0", "pools.decode", "need at least one decode"),
    (OWN, "  dtype: auto", "  dtype: float8", "runner.dtype", "none of auto"),
    (OWN, "  port: 8000", "  port: 80000", "front.port", "more than 65535"),
    (OWN, "  host: 127.0.0.1", "  host: everywhere", "front.host", "not an IP address"),
    (OWN, "  transport: auto", "  transport: rdma", "transfer.transport", "none of auto, shared_memory, tcp"),
    (OWN, "  max_num_seqs: 256 ", "  max_num_seqs: 1024 ", "scheduler.max_num_batched_tokens", "less than max_num_seqs"),
    (OWN, "  max_waiting: 1024", "  block_size: 16", "scheduler.block_size", "did you mean 'kv.block_size'"),
    (OWN, "  port: 8000", "  host: ::1", "front.host", "stands here twice; the first is on line"),
    (OWN, "pools:", "\tpools:", "", "a tab where YAML wants spaces"),
    (OWN, "  prefix_caching: true", "  prefix_caching: maybe", "kv.prefix_caching", "not of type bool"),
    # Serve configuration
    (SERVE, "route_prefix: /", "route_prefix: api", "applications[0].route_prefix", "must start with '/'"),
    (SERVE, "        num_replicas: 1", "        num_replica: 1", "applications[0].deployments[0].num_replica", "ignore"),
    (SERVE, "proxy_location: EveryNode", "proxy_location: Everywhere", "proxy_location", "EveryNode"),
    (SERVE, "http_options:", "http_option:", "http_option", "did you mean 'http_options'"),
    (SERVE, "serve_app:build", "serve_app:bild", "applications[0].import_path", "no 'penstock.cluster.serve_app:bild'"),
    (SERVE, "- name: ingress", "- name: ingres", "applications[0].deployments[0].name", "did you mean 'ingress'"),
    (SERVE, "        memory_bytes: 1G", "        memory_byte: 1G", "applications[0].args.kv.memory_byte", "memory_bytes"),
    (SERVE, "        port: 8100", "        port: 8000", "applications[0].args.front.port", "proxies listen on 8000"),
    (SERVE, "            decode: 1", "            decode: -1", "applications[0].deployments[0].user_config", "pools.decode"),
    (SERVE, "        num_replicas: 1", "        num_replicas: 0", "applications[0].deployments[0].num_replicas", "than 0"),
    # inside serveConfigV2
    (DEV, "            num_replicas: 1", "            num_replica: 1", f"{APP}.deployments[0].num_replica", "num_replicas"),
    (DEV, "route_prefix: /", "route_prefix: nope", f"{APP}.route_prefix", "must start with '/'"),
    (DEV, "            drain_s: 30", "            drain: 30", f"{APP}.args.health.drain", "did you mean 'drain_s'"),
    (DEV, "            host: 0.0.0.0\n            port", "            host: 127.0.0.1\n            port", f"{APP}.args.front.host", "other pod"),
    (DEV, "      - name: penstock\n", "      - nam: penstock\n", f"{APP}.nam", "did you mean 'name'"),
    (HA, "graceful_shutdown_timeout_s: 130", "graceful_shutdown_timeout_s: 20", f"{APP}.deployments[0].graceful_shutdown_timeout_s", "drain_s"),
    (HA, "max_replicas_per_node: 1", "max_replicas_per_node: 0", f"{APP}.deployments[0].max_replicas_per_node", "1 to 100"),
    # sums
    (GPU, "                decode: 6", "                decode: 7", f"{APP}.args", "7 decode workers"),
    (GPU, "worker_num_gpus: 1", "worker_num_gpus: 2", f"{APP}.args", "GPU"),
    (GPU, "decode_resources: {decode: 1}", "decode_resources: {decod: 1}", f"{APP}.args", "did you mean 'decode'"),
    (TENSOR, "tensor_parallel_size: 2", "tensor_parallel_size: 4", f"{APP}.args", "4 ranks of prefill workers (1 of 4)"),
    (TENSOR, "tensor_parallel_size: 2", "tensor_parallel_size: 3", f"{APP}.args.pools.tensor_parallel_size", "does not divide the 4 attention heads"),
    (TENSOR, "tensor_parallel_size: 2", "tensor_parallel_size: two", f"{APP}.args.pools.tensor_parallel_size", "not of type int"),
    (TENSOR, "tensor_parallel_size: 2", "tensor_parallel_sizes: 2", f"{APP}.args.pools.tensor_parallel_sizes", "did you mean 'tensor_parallel_size'"),
    (TENSOR, "worker_num_gpus: 1", "worker_num_gpus: 0.5", f"{APP}.args.ray.worker_num_gpus", "cannot share a GPU"),
    (TENSOR, "device: cuda", "device: cuda:0", f"{APP}.args.runner.device", "one GPU for all of"),
    (TENSOR, "                - name: shared-memory\n                  mountPath: /dev/shm\n", "", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].volumeMounts", "the ranks of one worker need it"),
    (DEV, "            worker_num_cpus: 1", "            worker_num_cpus: 9", f"{APP}.args", "9 CPU"),
    (HA, "            num_replicas: 2", "            num_replicas: 5", f"{APP}.args", "5 ingress replicas at 1 per node"),
    # schema
    (DEV, "  excludeHeadPodFromServeSvc", "  excludeHeadPodFromServeSvcs", "spec.excludeHeadPodFromServeSvcs", "unknown key"),
    (DEV, "minReplicas: 1", "minReplica: 1", f"{WORKER}.minReplica", "did you mean 'minReplicas'"),
    (DEV, 'num-cpus: "0"', "num-cpus: 0", f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus", "quote it"),
    (DEV, 'rayVersion: "2.60.0"', "rayVersion: 2.60", f"{CLUSTER}.rayVersion", "not text; quote it"),
    (DEV, "memory: 8Gi", "memory: 8GB", f"{RAY}.resources.limits.memory", "right form"),
    (DEV, "mode: token", "mode: tokn", f"{CLUSTER}.authOptions.mode", "did you mean 'token'"),
    (DEV, "kind: RayService", "kind: RayServise", "kind", "did you mean 'RayService'"),
    (DEV, "apiVersion: ray.io/v1", "apiVersion: ray.io/v2", "apiVersion", "did you mean 'ray.io/v1'"),
    (DEV, "                    path: /ready", "                    paths: /ready", f"{RAY}.readinessProbe.httpGet.paths", "path"),
    (DEV, "  rayClusterConfig:", "  rayClusterSpec:", "spec.rayClusterSpec", "did you mean 'rayClusterConfig'"),
    (HA, "kind: PodDisruptionBudget", "kind: PodDisruptionBuget", "kind", "PodDisruptionBudget"),
    (HA, "  policyTypes: [Ingress, Egress]", "  policyTypes: [Ingress, Egres]", "spec.policyTypes[1]", "none of Ingress, Egress"),
    # versions
    (DEV, 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', f"{CLUSTER}.headGroupSpec.template.spec.containers[0].image", "holds Ray 2.60.0"),
    (DEV, 'rayVersion: "2.60.0"', 'rayVersion: "2.51.0"', f"{CLUSTER}.authOptions.mode", "needs Ray 2.52.0"),
    (DEV, 'rayVersion: "2.60.0"', 'rayVersion: "2.54.0"', f"{CLUSTER}.rayVersion", "Penstock needs 2.55.0"),
    (DEV, "penstock:0.1.0-ray2.60.0", "penstock:latest", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].image", "changes under its name"),
    (DEV, "penstock:0.1.0-ray2.60.0", "penstock", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].image", "no tag"),
    # the operator's rules
    (DEV, "    type: NewCluster", "    type: NewClusters", "spec.upgradeStrategy.type", "did you mean 'NewCluster'"),
    (DEV, "    type: NewCluster", "    type: NewClusterWithIncrementalUpgrade", f"{CLUSTER}.enableInTreeAutoscaling", "autoscaler"),
    (DEV, "name: penstock-dev\n", f"name: penstock-{'x' * 50}\n", "metadata.name", "at most 47"),
    (DEV, "name: penstock-dev\n", "name: Penstock_dev\n", "metadata.name", "lower-case"),
    (DEV, "minReplicas: 1", "minReplicas: 3", f"{WORKER}.minReplicas", "more than maxReplicas"),
    (DEV, "        replicas: 1", "        replicas: 4", f"{WORKER}.replicas", "outside minReplicas"),
    (DEV, "        rayStartParams: {}", "        rayStartParams: {labels: a=b}", f"{WORKER}.rayStartParams.labels", "own field"),
    (DEV, "        rayStartParams: {}", "        rayStartParams: {num-gpu: '1'}", f'{WORKER}.rayStartParams.num-gpu', "num-gpus"),
    (DEV, "        rayStartParams: {}", "        rayStartParams: {num-cpus: '4'}\n        resources: {CPU: '4'}", f"{WORKER}.resources", "use one"),
    (DEV, "        rayStartParams: {}", "        rayStartParams: {num-gpus: '2'}", f"{WORKER}.rayStartParams.num-gpus", "container has 0"),
    (GPU, "resources: '\"{", "resources: '\"[", f"{WORKER}.rayStartParams.resources", "no JSON object"),
    (DEV, "            terminationGracePeriodSeconds: 60", "            terminationGracePeriodSeconds: 40", f"{POD}.terminationGracePeriodSeconds", "preStop 10 s + drain 30 s"),
    (DEV, "rayClusterDeletionDelaySeconds: 60", "rayClusterDeletionDelaySeconds: 10", "spec.rayClusterDeletionDelaySeconds", "drained"),
    (HA, "groupName: decode", "groupName: prefill", f"{CLUSTER}.workerGroupSpecs[2].groupName", "two groups"),
    (HA, "redisAddress: penstock-redis:6379", "redisAddress: penstock-redis", f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress", "host:port"),
    (HA, "redisAddress: penstock-redis:6379", "redisAddress: penstock-redis:6380", f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress", "no port 6380"),
    (HA, "            name: penstock-redis\n            key: password", "            name: penstock-reddis\n            key: password", f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.name", "did you mean 'penstock-redis'"),
    # pods
    (DEV, "                medium: Memory", '                medium: ""', f"{CLUSTER}.headGroupSpec.template.spec.volumes[0].emptyDir", "must lie in memory"),
    (DEV, "                sizeLimit: 1Gi", "                sizeLimit: 100Gi", f"{CLUSTER}.headGroupSpec.template.spec.volumes[0].emptyDir.sizeLimit", "memory limit"),
    (DEV, "                - name: ray-files\n                  mountPath", "                - name: ray-file\n                  mountPath", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].volumeMounts[1].name", "no volume 'ray-file'"),
    (DEV, "                    path: /ready", "                    path: ready", f"{RAY}.readinessProbe.httpGet.path", "start with '/'"),
    (DEV, "                    port: direct", "                    port: driect", f"{RAY}.readinessProbe.httpGet.port", "did you mean 'direct'"),
    (DEV, "                    cpu: \"4\"\n                    memory: 8Gi\n                  requests:\n                    cpu: \"4\"", "                    cpu: \"4\"\n                    memory: 8Gi\n                  requests:\n                    cpu: \"8\"", f"{RAY}.resources.requests.cpu", "more than the limit"),
    (GPU, "nvidia.com/gpu: \"8\"\n                  requests", "nvidia.com/gpu: \"7.5\"\n                  requests", f'{RAY}.resources.limits["nvidia.com/gpu"]', "7.5 GPUs"),
    (GPU, "operator: Exists", "operator: Exists\n                value: present", f"{POD}.tolerations[0].value", "no value"),
    (DEV, "- name: PENSTOCK_API_KEY", "- name: PENSTOCK_APIKEY", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].env[0].name", "did you mean 'PENSTOCK_API_KEY'"),
    (HA, "                  valueFrom:\n                    secretKeyRef:\n                      name: penstock-api-key\n                      key: api-key", "                  value: abc", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].env[0].value", "plain text"),
    (DEV, "            runAsUser: 1000", "            runAsUser: 0", f"{CLUSTER}.headGroupSpec.template.spec.securityContext.runAsUser", "as root"),
    # other objects, and objects against each other
    (DEV, "      targetPort: direct", "      targetPort: driect", "spec.ports[0].targetPort", "did you mean 'direct'"),
    (DEV, "    app.kubernetes.io/component: ingress\n  ports", "    app.kubernetes.io/component: ingres\n  ports", "spec.selector", "did you mean 'ingress'"),
    (HA, "  maxUnavailable: 1", "  maxUnavailable: 1\n  minAvailable: 1", "spec", "exactly one of"),
    (HA, "    matchLabels:\n      app.kubernetes.io/name: penstock-redis\n  template", "    matchLabels:\n      app.kubernetes.io/name: redis\n  template", 'spec.selector.matchLabels["app.kubernetes.io/name"]', "not labelled"),
    (HA, "  name: penstock-ha-prefill", "  name: penstock-ha-ingress", "metadata.name", "stands here already"),
    (HA, "    - ports:\n        - protocol: TCP\n          port: 8100", "    - port:\n        - protocol: TCP\n          port: 8100", "spec.ingress[0].port", "did you mean 'ports'"),
    # who listens where
    (DEV, "            port: 8100", "            port: 8200", f"{APP}.args.front.port", "nobody listens on 8100 (direct)"),
    (DEV, "            port: 8100", "            port: 8265", f"{APP}.args.front.port", "Ray's own dashboard"),
    (DEV, "            port: 8100", "            port: 8100\n            grpc_port: 8000", f"{APP}.args.front.grpc_port", "proxies listen on 8000"),
    (DEV, "      port: 8000\n    applications", "      port: 9999\n    applications", "spec.serveConfigV2.http_options.port", "'serve' is 8000"),
    (DEV, "      host: 0.0.0.0", "      host: 127.0.0.1", "spec.serveConfigV2.http_options.host", "no other pod"),
    (DEV, "proxy_location: EveryNode", "proxy_location: HeadOnly", "spec.serveConfigV2.proxy_location", "excludeHeadPodFromServeSvc"),
    (DEV, "path: /ready\n                    port: direct", "path: /ready\n                    port: 9999", f"{RAY}.readinessProbe.httpGet.port", "nobody listens on 9999"),
    (DEV, "path: /ready", "path: /redy", f"{RAY}.readinessProbe.httpGet.path", "did you mean '/ready'"),
    (DEV, "dashboard-host: 0.0.0.0", "dashboard-host: 127.0.0.1", f"{CLUSTER}.headGroupSpec.rayStartParams.dashboard-host", "another pod"),
    (DEV, "dashboard-host: 0.0.0.0", "dashboard-port: '8266'", f"{CLUSTER}.headGroupSpec.rayStartParams.dashboard-port", "'dashboard' is 8265"),
    (SERVE, "  port: 8000", "  port: 80000", "http_options.port", "outside 1 to 65535"),
    # memory, devices, placement
    (DEV, "memory_bytes: 512M", "memory_bytes: 16G", f"{APP}.args.kv.memory_bytes", "the largest pod's memory"),
    (DEV, "            worker_num_cpus: 1", "            worker_accelerator_type: H100", f"{APP}.args.ray.worker_accelerator_type", "no group"),
    (DEV, "            worker_num_cpus: 1", "            prefill_resources: {CPU: 1}", f"{APP}.args.ray.prefill_resources", "no custom resource"),
    (GPU, 'nvidia.com/gpu: "8"', 'nvidia.com/gpus: "8"', f'{RAY}.resources.limits["nvidia.com/gpus"]', "did you mean 'nvidia.com/gpu'"),
    (GPU, "        maxReplicas: 1", "        maxReplicas: 1\n        suspend: true", f"{APP}.args", "no group has such a pod"),
    (DEV, "        rayStartParams: {}", "        rayStartParams: {}\n        resources: {GPU: '2'}", f"{WORKER}.resources.GPU", "container has 0"),
    (DEV, "        rayStartParams: {}", "        rayStartParams: {}\n        resources: {CPU: four}", f"{WORKER}.resources.CPU", "no amount"),
    (DEV, "        rayStartParams: {}", "        rayStartParams: {object-store-memory: '99000000000'}", f"{WORKER}.rayStartParams.object-store-memory", "the container has"),
    (DEV, "            terminationGracePeriodSeconds: 60", "            terminationGracePeriodSeconds: -1", f"{POD}.terminationGracePeriodSeconds", "less than 0"),
    (HA, "graceful_shutdown_timeout_s: 130", "graceful_shutdown_timeout_s: 600", f"{CLUSTER}.workerGroupSpecs[0].template.spec.terminationGracePeriodSeconds", "graceful_shutdown_timeout_s 600"),
    (HA, "sleep 15; ray stop", "sleep 2m; ray stop", f"{CLUSTER}.workerGroupSpecs[0].template.spec.terminationGracePeriodSeconds", "preStop 120 s"),
    (HA, "maxSkew: 1", "maxSkew: 0", f"{CLUSTER}.workerGroupSpecs[1].template.spec.topologySpreadConstraints[0].maxSkew", "less than 1"),
    # inside texts, and what Serve only notices later
    (DEV, "            num_replicas: 1", "            num_replicas: two", f"{APP}.deployments[0].num_replicas", "must be an int"),
    (DEV, "        args:", "        runtime_env: {pips: [x]}\n        args:", f"{APP}.runtime_env.pips", "did you mean 'pip'"),
    (DEV, "        args:", "        runtime_env: {env_vars: {A: 1}}\n        args:", f"{APP}.runtime_env.env_vars.A", "quote it"),
    (SERVE, "        num_replicas: 1", "        placement_group_strategy: PACKED", "applications[0].deployments[0].placement_group_strategy", "did you mean 'PACK'"),
    (SERVE, "  host: 0.0.0.0", "  ssl_keyfile: /k", "http_options.ssl_keyfile", "needs ssl_certfile"),
    (SERVE, "  - name: penstock", "  - {name: b, route_prefix: /b, import_path: 'penstock.cluster.serve_app:build', args: {front: {port: 8100}}}\n  - name: penstock", "applications[1].args.front.port", "listens on 8100 too"),
    (OWN, "  dtype: auto", "  device: gpu", "runner.device", "none of cpu"),
    (OWN, '  address: ""', "  address: nope", "ray.address", "host:port"),
    # secrets in plain text
    (HA, "--requirepass, $(REDIS_PASSWORD)", "--requirepass, hunter2", "spec.template.spec.containers[0].args[2]", "plain text"),
    (DEV, "                env:\n", "                env:\n                  - {name: X, value: hf_abcdefghijabcdefghij}\n", f"{RAY}.env[0].value", "a key in plain text"),
    (HA, "      app.kubernetes.io/component: decode\n---", "      ray.io/group: decod\n---", "spec.selector.matchLabels", "did you mean 'decode'"),
    # what the autoscaler's pod may hold; names and versions
    (DEV, "    authOptions:", "    enableInTreeAutoscaling: true\n    autoscalerOptions: {resources: {limits: {cpu: 1}, requests: {cpu: 2}}}\n    authOptions:", f"{CLUSTER}.autoscalerOptions.resources.requests.cpu", "more than the limit"),
    (DEV, "    authOptions:", "    enableInTreeAutoscaling: true\n    autoscalerOptions: {idleTimeoutSeconds: -5}\n    authOptions:", f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds", "less than 0"),
    (DEV, '    rayVersion: "2.60.0"\n', "", f"{CLUSTER}.rayVersion", "asks for Ray's version"),
    (HA, "apiVersion: networking.k8s.io/v1", "apiVersion: networking/v1", "apiVersion", "did you mean 'networking.k8s.io/v1'"),
    (HA, "accessModes: [ReadWriteOnce]", "accessModes: [ReadWriteOne]", "spec.volumeClaimTemplates[0].spec.accessModes[0]", "did you mean 'ReadWriteOnce'"),
    (HA, "          port: 8265", "          port: '8265'", "spec.ingress[1].ports[0].port", "a port's name"),
]  # fmt: skip


# What works, but is hardly meant; `--strict` makes errors of these.
DOUBTS = [
    (DEV, "    authOptions:\n      mode: token\n", "", f"{CLUSTER}.headGroupSpec.rayStartParams.dashboard-host", "authOptions.mode"),
    (HA, "            runAsNonRoot: true\n", "", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].securityContext", "as root"),
    (DEV, "mountPath: /dev/shm", "mountPath: /dev/sham", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].volumeMounts", "/dev/shm"),
    (DEV, 'num-cpus: "0"', 'num-cpus: "1"', f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus", "lands on the head"),
    (DEV, "excludeHeadPodFromServeSvc: true", "excludeHeadPodFromServeSvc: false", "spec.excludeHeadPodFromServeSvc", "pass the head"),
    (DEV, "        maxReplicas: 1\n", "", f"{WORKER}.maxReplicas", "not stated"),
    (GPU, "secret/penstock-api-key", "secret/another", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].env[0].valueFrom.secretKeyRef.name", "no secret"),
    (DEV, "                allowPrivilegeEscalation: false\n", "", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].securityContext.allowPrivilegeEscalation", "false"),
    (HA, "      redisPassword:\n        valueFrom:\n          secretKeyRef:\n            name: penstock-redis\n            key: password\n", "", f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword", "set a password"),
    (DEV, "registry.example/penstock:0.1.0-ray2.60.0", "rayproject/ray:2.60.0-py311", f"{CLUSTER}.headGroupSpec.template.spec.containers[0].image", "no Penstock"),
    (HA, "        - protocol: UDP\n          port: 53\n        - protocol: TCP\n          port: 53\n", "        - protocol: TCP\n          port: 443\n", "spec.egress", "port 53"),
    (OWN, 'model_dir: ""', "model_dir: /models/nowhere", "runner.model_dir", "not on this machine"),
    (SERVE, "route_prefix: /", "route_prefix: /llm", "applications[0].route_prefix", "base URL"),
    (HA, "  maxUnavailable: 1", "  maxUnavailable: 0", "spec.maxUnavailable", "no node can be drained"),
    (HA, "  maxUnavailable: 1", "  minAvailable: 2", "spec.minAvailable", "2 of 2 pods"),
    (HA, "serviceName: penstock-redis", "serviceName: redis-of-others", "spec.serviceName", "no service"),
    (DEV, "        maxReplicas: 1", "        maxReplicas: 1\n        idleTimeoutSeconds: 60", f"{WORKER}.idleTimeoutSeconds", "only the autoscaler"),
    (DEV, "path: /ready", "path: /v1/models", f"{RAY}.readinessProbe.httpGet.path", "asks for a key"),
    (DEV, "        rayStartParams: {}", "        rayStartParams: {num-cpus: '64'}", f"{WORKER}.rayStartParams.num-cpus", "the container has 4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def book() -> SchemaBook:
    return SchemaBook(installed=False)  # what a user without further packages and definitions has


def plant(tmp_path: Path, file: str, old: str, new: str) -> tuple[Path, int]:
    """The changed copy, and the line on which the change stands."""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert old in text, f"{file} has changed: {old!r} is not there"
    at = text.index(old)
    copy = tmp_path / Path(file).name
    copy.write_text(text[:at] + new + text[at + len(old) :], encoding="utf-8")
    first_difference = next(i for i, (a, b) in enumerate(zip(old + "\0", new + "\1", strict=False)) if a != b)
    return copy, text[: at + first_difference].count("\n") + 1


def errors(file: Path, book: SchemaBook) -> list[Finding]:
    return [one for one in check_files([file], book) if one.severity is Severity.ERROR]


@pytest.mark.parametrize(("file", "old", "new", "key", "reason"), DOUBTS, ids=[f"{d[0]}-{d[2]}"[:90] for d in DOUBTS])
def test_doubted(tmp_path: Path, book: SchemaBook, file: str, old: str, new: str, key: str, reason: str) -> None:
    copy, _ = plant(tmp_path, file, old, new)
    found = check_files([copy], book)
    told = "\n".join(map(str, found))
    assert [one for one in found if one.key == key and reason in str(one)], f"wanted {key}; found:\n{told}"
    assert not [one for one in found if one.severity is Severity.ERROR], told


@pytest.mark.parametrize(
    ("file", "old", "new", "key", "reason"), MISTAKES, ids=[f"{m[0]}-{m[2]}"[:90] for m in MISTAKES]
)
def test_found(tmp_path: Path, book: SchemaBook, file: str, old: str, new: str, key: str, reason: str) -> None:
    copy, line = plant(tmp_path, file, old, new)
    found = errors(copy, book)
    told = "\n".join(map(str, found))
    mine = [one for one in found if one.key == key and reason in str(one)]
    assert mine, f"wanted {key}: ...{reason}...; found:\n{told}"
    assert mine[0].file == str(copy)
    # A sum is told where the application asks, a missing thing where its parent stands.
    if new.strip().split(":")[0].strip("- ") in key:
        assert abs(mine[0].line - line) <= new.count("\n") + 2, f"planted on line {line}:\n{told}"


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 60
    assert len({(m[0], m[2]) for m in MISTAKES}) == len(MISTAKES)
