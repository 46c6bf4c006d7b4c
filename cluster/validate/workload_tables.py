"""Field names of the kinds that come beside a serving cluster: jobs, autoscalers, ways in, permissions.

In `compact_schema` notation, like `core_tables.py`, whose parts are used here; `schemas.py` reads both.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.validate import core_tables as core

_JOB: dict[str, Any] = {
    "template!": core.POD_TEMPLATE,
    "selector": core.SELECTOR,
    "completionMode": "=NonIndexed|Indexed",
    "podReplacementPolicy": "=TerminatingOrFailed|Failed",
    **dict.fromkeys(
        "activeDeadlineSeconds backoffLimit backoffLimitPerIndex completions maxFailedIndexes parallelism "
        "ttlSecondsAfterFinished".split(),
        "int",
    ),
    **dict.fromkeys("manualSelector suspend".split(), "bool"),
    **dict.fromkeys("podFailurePolicy successPolicy scheduling".split(), "any"),
    "managedBy": "str",
}
_TARGET = {
    "type!": "=Utilization|Value|AverageValue",
    "averageUtilization": "int",
    "averageValue": "quantity",
    "value": "quantity",
}
_METRIC = {"name!": "str", "selector": core.SELECTOR}
_OBJECT = {"apiVersion": "str", "kind!": "str", "name!": "str"}
_SCALING = {
    "policies": [{"type!": "=Pods|Percent", "value!": "int", "periodSeconds!": "int"}],
    "selectPolicy": "=Max|Min|Disabled",
    "stabilizationWindowSeconds": "int",
    "tolerance": "quantity",
}
_AUTOSCALER: dict[str, Any] = {
    "scaleTargetRef!": _OBJECT,
    "minReplicas": "int",
    "maxReplicas!": "int",
    "metrics": [
        {
            "type!": "=Resource|Pods|Object|External|ContainerResource",
            "resource": {"name!": "str", "target!": _TARGET},
            "containerResource": {"name!": "str", "container!": "str", "target!": _TARGET},
            "pods": {"metric!": _METRIC, "target!": _TARGET},
            "object": {"describedObject!": _OBJECT, "metric!": _METRIC, "target!": _TARGET},
            "external": {"metric!": _METRIC, "target!": _TARGET},
        }
    ],
    "behavior": {"scaleUp": _SCALING, "scaleDown": _SCALING},
}
_BACKEND = {
    "service": {"name!": "str", "port": {"name": "str", "number": "int"}},
    "resource": {"apiGroup": "str", "kind!": "str", "name!": "str"},
}
_INGRESS: dict[str, Any] = {
    "ingressClassName": "str",
    "defaultBackend": _BACKEND,
    "tls": [{"hosts": "strs", "secretName": "str"}],
    "rules": [
        {
            "host": "str",
            "http": {
                "paths!": [
                    {"path": "str", "pathType!": "=Exact|Prefix|ImplementationSpecific", "backend!": _BACKEND},
                ]
            },
        }
    ],
}
_RULES = [
    {
        "verbs!": "strs",
        "apiGroups": "strs",
        "resources": "strs",
        "resourceNames": "strs",
        "nonResourceURLs": "strs",
    }
]
_SUBJECTS = [{"kind!": "=User|Group|ServiceAccount", "name!": "str", "namespace": "str", "apiGroup": "str"}]
_ROLE = {"apiGroup": "str", "kind!": "=Role|ClusterRole", "name!": "str"}

KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("apps/v1", "DaemonSet"): {
        "spec!": {
            "selector!": core.SELECTOR,
            "template!": core.POD_TEMPLATE,
            "minReadySeconds": "int",
            "revisionHistoryLimit": "int",
            "updateStrategy": "any",
        }
    },
    ("batch/v1", "Job"): {"spec!": _JOB},
    ("batch/v1", "CronJob"): {
        "spec!": {
            "schedule!": "str",
            "jobTemplate!": {"metadata": core.METADATA, "spec": _JOB},
            "timeZone": "str",
            "concurrencyPolicy": "=Allow|Forbid|Replace",
            "suspend": "bool",
            **dict.fromkeys("failedJobsHistoryLimit startingDeadlineSeconds successfulJobsHistoryLimit".split(), "int"),
        }
    },
    ("autoscaling/v2", "HorizontalPodAutoscaler"): {"spec!": _AUTOSCALER},
    ("networking.k8s.io/v1", "Ingress"): {"spec": _INGRESS},
    ("rbac.authorization.k8s.io/v1", "Role"): {"rules": _RULES},
    ("rbac.authorization.k8s.io/v1", "ClusterRole"): {"rules": _RULES, "aggregationRule": "any"},
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): {"roleRef!": _ROLE, "subjects": _SUBJECTS},
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"): {"roleRef!": _ROLE, "subjects": _SUBJECTS},
}
