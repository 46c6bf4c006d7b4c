"""Field names of KubeRay's resources (`ray.io/v1`) in `compact_schema` notation.

Used where no resource definitions are given with `--crds`: the same keys, required keys, types, enumerations and
defaults, nothing of the descriptions. A test compares the names with the definitions where those are at hand.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.validate import core_tables as core

_RULES = {"egressRules": "any", "ingressRules": "any"}
_COLLECTOR = {"env": [core.ENVIRONMENT], "image": "str", "imagePullPolicy": "str", "resources": core.RESOURCES}
_METADATA = {"annotations": "map", "finalizers": "strs", "labels": "map", "name": "str", "namespace": "str"}
_CREDENTIAL = {"value": "str", "valueFrom": core.ENVIRONMENT["valueFrom"]}


_AUTOSCALER: dict[str, Any] = {
    "version": "=v1|v2",
    "upscalingMode": "=Default|Aggressive|Conservative",
    "idleTimeoutSeconds": "int",
    "image": "str",
    "imagePullPolicy": "=Always|IfNotPresent|Never",
    "args": "strs",
    "command": "strs",
    "env": [core.ENVIRONMENT],
    "envFrom": [core.ENVIRONMENT_FROM],
    "resources": core.RESOURCES,
    "securityContext": core.SECURITY,
    "volumeMounts": [core.VOLUME_MOUNT],
}
_FAULT_TOLERANCE: dict[str, Any] = {
    "backend": "=redis|rocksdb",
    "externalStorageNamespace": "str",
    "redisAddress": "str",
    "redisPassword": _CREDENTIAL,
    "redisUsername": _CREDENTIAL,
    "storage": {
        "accessModes": "strs",
        "claimName": "str",
        "deletionPolicy": "=DeleteWithCluster|Retain",
        "size": "quantity",
        "storageClassName": "str",
        "subPath": "str",
    },
}
_HEAD_SERVICE: dict[str, Any] = {
    "apiVersion": "str",
    "kind": "str",
    "metadata": _METADATA,
    "spec": core.SERVICE_SPEC,
    "status": "any",
}


def cluster_spec(pod_template: object) -> dict[str, Any]:
    """`RayCluster.spec`; `pod_template` is the table of a pod template."""
    group: dict[str, Any] = {
        "template!": pod_template,
        "rayStartParams": "map",
        "resources": "map",
        "labels": "map",
    }
    return {
        "headGroupSpec!": {
            **group,
            "serviceType": "=ClusterIP|NodePort|LoadBalancer",
            "enableIngress": "bool",
            "headService": _HEAD_SERVICE,
            "ingressOptions": {
                "host": "str",
                "path": "str",
                "pathType": "=Exact|Prefix|ImplementationSpecific",
                "tls": "any",
            },
        },
        "workerGroupSpecs": [
            {
                **group,
                "groupName!": "str",
                **dict.fromkeys(
                    "replicas minReplicas maxReplicas numOfHosts priority idleTimeoutSeconds".split(), "int"
                ),
                "suspend": "bool",
                "scaleStrategy": {"workersToDelete": "strs"},
            }
        ],
        "rayVersion": "str",
        "suspend": "bool",
        "enableInTreeAutoscaling": "bool",
        "autoscalerOptions": _AUTOSCALER,
        "authOptions": {"mode": "=disabled|token", "enableK8sTokenAuth": "bool", "secretName": "str"},
        "gcsFaultToleranceOptions": _FAULT_TOLERANCE,
        "headServiceAnnotations": "map",
        "historyServerOptions": {"collectorOptions": _COLLECTOR},
        "managedBy": "=ray.io/kuberay-operator|kueue.x-k8s.io/multikueue",
        "networkPolicy": {
            "mode": "=DenyAll|DenyAllIngress|DenyAllEgress",
            "head": _RULES,
            "worker": _RULES,
            "workerGroups": [{"groupName!": "str", **_RULES}],
        },
        "tlsOptions": {"enabled": "bool"},
        "upgradeStrategy": {"type": "=Recreate|None"},
    }


def service_spec(pod_template: object) -> dict[str, Any]:
    """`RayService.spec`."""
    return {
        "rayClusterConfig!": cluster_spec(pod_template),
        "serveConfigV2": "str",
        "serveService": {
            "apiVersion": "str",
            "kind": "str",
            "metadata": _METADATA,
            "spec": core.SERVICE_SPEC,
            "status": "any",
        },
        "excludeHeadPodFromServeSvc": "bool",
        "suspend": "bool",
        "managedBy": "=ray.io/kuberay-operator|kueue.x-k8s.io/multikueue",
        "upgradeStrategy": {
            "type": "str",  # `service_rules.py` knows the words; the resource definition does not
            "clusterUpgradeOptions": {
                "gatewayClassName!": "str",
                "intervalSeconds!": "int",
                "stepSizePercent!": "int",
                "maxSurgePercent": "int",
            },
        },
        **dict.fromkeys(
            "rayClusterDeletionDelaySeconds deploymentUnhealthySecondThreshold serviceUnhealthySecondThreshold".split(),
            "int",
        ),
    }


def job_spec(pod_template: object) -> dict[str, Any]:
    """`RayJob.spec`."""
    policy = {"policy": "=DeleteCluster|DeleteWorkers|DeleteSelf|DeleteNone"}
    condition = {"jobStatus": "=SUCCEEDED|FAILED", "jobDeploymentStatus": "=Failed", "ttlSeconds": "int"}
    return {
        "entrypoint": "str",
        "rayClusterSpec": cluster_spec(pod_template),
        "clusterSelector": "map",
        "submitterPodTemplate": pod_template,
        "submitterConfig": {"backoffLimit": "int"},
        "submissionMode": "=K8sJobMode|HTTPMode|InteractiveMode|SidecarMode",
        "metadata": "map",
        "managedBy": "=ray.io/kuberay-operator|kueue.x-k8s.io/multikueue",
        "deletionStrategy": {
            "onSuccess": policy,
            "onFailure": policy,
            "deletionRules": [{**policy, "condition": condition}],
        },
        "shutdownAfterJobFinishes": "bool",
        "suspend": "bool",
        **dict.fromkeys("runtimeEnvYAML jobId entrypointResources schedule".split(), "str"),
        **dict.fromkeys("entrypointNumCpus entrypointNumGpus".split(), "num"),
        **dict.fromkeys(
            "activeDeadlineSeconds preRunningDeadlineSeconds backoffLimit ttlSecondsAfterFinished".split(), "int"
        ),
    }
