"""Field names of the core Kubernetes objects that a serving cluster comes with, in `compact_schema` notation.

The fall-back where the schemas of the optional package are not installed: names, required keys, types and the
enumerations that matter; rarely used volume kinds and selectors stay open ("any"). `schemas.py` reads it.
"""

from __future__ import annotations

from typing import Any

METADATA: dict[str, Any] = {
    "name": "str",
    "generateName": "str",
    "namespace": "str",
    "labels": "map",
    "annotations": "map",
    "finalizers": "strs",
    "ownerReferences": "any",
    "managedFields": "any",
    "creationTimestamp": "any",
    "deletionTimestamp": "any",
    "deletionGracePeriodSeconds": "int",
    "generation": "int",
    "resourceVersion": "str",
    "selfLink": "str",
    "uid": "str",
}
_KEY_REFERENCE = {"name": "str", "key!": "str", "optional": "bool"}
_NAME_REFERENCE = {"name": "str", "optional": "bool"}
ENVIRONMENT = {
    "name!": "str",
    "value": "str",
    "valueFrom": {
        "configMapKeyRef": _KEY_REFERENCE,
        "secretKeyRef": _KEY_REFERENCE,
        "fieldRef": {"apiVersion": "str", "fieldPath!": "str"},
        "resourceFieldRef": {"containerName": "str", "divisor": "quantity", "resource!": "str"},
        "fileKeyRef": "any",
    },
}
ENVIRONMENT_FROM = {"configMapRef": _NAME_REFERENCE, "secretRef": _NAME_REFERENCE, "prefix": "str"}
RESOURCES = {"claims": "any", "limits": "quantities", "requests": "quantities"}
VOLUME_MOUNT = {
    "name!": "str",
    "mountPath!": "str",
    "mountPropagation": "str",
    "readOnly": "bool",
    "recursiveReadOnly": "str",
    "subPath": "str",
    "subPathExpr": "str",
}
_HANDLERS = {
    "exec": {"command": "strs"},
    "grpc": {"port!": "int", "service": "str"},
    "httpGet": {"host": "str", "httpHeaders": "any", "path": "str", "port!": "intstr", "scheme": "=HTTP|HTTPS"},
    "tcpSocket": {"host": "str", "port!": "intstr"},
}
_PROBE = {
    **_HANDLERS,
    "failureThreshold": "int",
    "initialDelaySeconds": "int",
    "periodSeconds": "int",
    "successThreshold": "int",
    "terminationGracePeriodSeconds": "int",
    "timeoutSeconds": "int",
}
_HOOK = {**{name: part for name, part in _HANDLERS.items() if name != "grpc"}, "sleep": {"seconds!": "int"}}
_PROFILE = {"localhostProfile": "str", "type!": "=Localhost|RuntimeDefault|Unconfined"}
_IDENTITY: dict[str, Any] = {
    "appArmorProfile": _PROFILE,
    "runAsGroup": "int",
    "runAsNonRoot": "bool",
    "runAsUser": "int",
    "seLinuxOptions": "any",
    "seccompProfile": _PROFILE,
    "windowsOptions": "any",
}
SECURITY = {
    **_IDENTITY,
    "allowPrivilegeEscalation": "bool",
    "capabilities": {"add": "strs", "drop": "strs"},
    "privileged": "bool",
    "procMount": "str",
    "readOnlyRootFilesystem": "bool",
}
CONTAINER: dict[str, Any] = {
    "name!": "str",
    "args": "strs",
    "command": "strs",
    "env": [ENVIRONMENT],
    "envFrom": [ENVIRONMENT_FROM],
    "image": "str",
    "imagePullPolicy": "=Always|IfNotPresent|Never",
    "lifecycle": {"postStart": _HOOK, "preStop": _HOOK, "stopSignal": "str"},
    "livenessProbe": _PROBE,
    "readinessProbe": _PROBE,
    "startupProbe": _PROBE,
    "ports": [
        {"containerPort!": "int", "hostIP": "str", "hostPort": "int", "name": "str", "protocol": "=TCP|UDP|SCTP"}
    ],
    "resizePolicy": "any",
    "resources": RESOURCES,
    "restartPolicy": "=Always|OnFailure|Never",
    "restartPolicyRules": "any",
    "securityContext": SECURITY,
    "stdin": "bool",
    "stdinOnce": "bool",
    "terminationMessagePath": "str",
    "terminationMessagePolicy": "=File|FallbackToLogsOnError",
    "tty": "bool",
    "volumeDevices": "any",
    "volumeMounts": [VOLUME_MOUNT],
    "workingDir": "str",
}
_OPEN_VOLUMES = (
    "awsElasticBlockStore azureDisk azureFile cephfs cinder csi downwardAPI ephemeral fc flexVolume flocker "
    "gcePersistentDisk gitRepo glusterfs image iscsi nfs photonPersistentDisk portworxVolume projected quobyte rbd "
    "scaleIO storageos vsphereVolume"
)
_VOLUME: dict[str, Any] = {
    "name!": "str",
    "configMap": {"name": "str", "defaultMode": "int", "items": "any", "optional": "bool"},
    "secret": {"secretName": "str", "defaultMode": "int", "items": "any", "optional": "bool"},
    "emptyDir": {"medium": "=|Memory|HugePages", "sizeLimit": "quantity"},
    "hostPath": {"path!": "str", "type": "str"},
    "persistentVolumeClaim": {"claimName!": "str", "readOnly": "bool"},
    **dict.fromkeys(_OPEN_VOLUMES.split(), "any"),
}
_EXPRESSION = {"key!": "str", "operator!": "=In|NotIn|Exists|DoesNotExist|Gt|Lt", "values": "strs"}
SELECTOR = {"matchLabels": "map", "matchExpressions": [_EXPRESSION]}
_POD_TERM: dict[str, Any] = {
    "topologyKey!": "str",
    "labelSelector": SELECTOR,
    "namespaceSelector": SELECTOR,
    "namespaces": "strs",
    "matchLabelKeys": "strs",
    "mismatchLabelKeys": "strs",
}
_NODE_TERM = {"matchExpressions": [_EXPRESSION], "matchFields": [_EXPRESSION]}
_POD_AFFINITY = {
    "requiredDuringSchedulingIgnoredDuringExecution": [_POD_TERM],
    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight!": "int", "podAffinityTerm!": _POD_TERM}],
}
_AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms!": [_NODE_TERM]},
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight!": "int", "preference!": _NODE_TERM}],
    },
    "podAffinity": _POD_AFFINITY,
    "podAntiAffinity": _POD_AFFINITY,
}
_TOLERATION = {
    "effect": "=|NoSchedule|PreferNoSchedule|NoExecute",
    "key": "str",
    "operator": "=Exists|Equal|Lt|Gt",
    "tolerationSeconds": "int",
    "value": "str",
}
_SPREAD = {
    "maxSkew!": "int",
    "topologyKey!": "str",
    "whenUnsatisfiable!": "=DoNotSchedule|ScheduleAnyway",
    "labelSelector": SELECTOR,
    "matchLabelKeys": "strs",
    "minDomains": "int",
    "nodeAffinityPolicy": "=Honor|Ignore",
    "nodeTaintsPolicy": "=Honor|Ignore",
}
POD_SPEC: dict[str, Any] = {
    "containers!": [CONTAINER],
    "initContainers": [CONTAINER],
    "ephemeralContainers": "any",
    "volumes": [_VOLUME],
    "affinity": _AFFINITY,
    "tolerations": [_TOLERATION],
    "topologySpreadConstraints": [_SPREAD],
    "nodeSelector": "map",
    "securityContext": {
        **_IDENTITY,
        "fsGroup": "int",
        "fsGroupChangePolicy": "=OnRootMismatch|Always",
        "seLinuxChangePolicy": "str",
        "supplementalGroups": "any",
        "supplementalGroupsPolicy": "str",
        "sysctls": "any",
    },
    "imagePullSecrets": [{"name": "str"}],
    "restartPolicy": "=Always|OnFailure|Never",
    "dnsPolicy": "=ClusterFirst|ClusterFirstWithHostNet|Default|None",
    **dict.fromkeys("activeDeadlineSeconds priority terminationGracePeriodSeconds".split(), "int"),
    **dict.fromkeys(
        "automountServiceAccountToken enableServiceLinks hostIPC hostNetwork hostPID hostUsers setHostnameAsFQDN "
        "shareProcessNamespace".split(),
        "bool",
    ),
    **dict.fromkeys(
        "hostname hostnameOverride nodeName preemptionPolicy priorityClassName runtimeClassName schedulerName "
        "serviceAccount serviceAccountName subdomain".split(),
        "str",
    ),
    **dict.fromkeys(
        "dnsConfig hostAliases os overhead readinessGates resourceClaims resources schedulingGates "
        "schedulingGroup".split(),
        "any",
    ),
}
POD_TEMPLATE = {"metadata": METADATA, "spec": POD_SPEC}
_PEER = {
    "ipBlock": {"cidr!": "str", "except": "strs"},
    "namespaceSelector": SELECTOR,
    "podSelector": SELECTOR,
}
_POLICY_PORT = {"port": "intstr", "endPort": "int", "protocol": "=TCP|UDP|SCTP"}
SERVICE_PORT = {
    "port!": "int",
    "name": "str",
    "targetPort": "intstr",
    "nodePort": "int",
    "protocol": "=TCP|UDP|SCTP",
    "appProtocol": "str",
}
SERVICE_SPEC: dict[str, Any] = {
    "ports": [SERVICE_PORT],
    "selector": "map",
    "type": "=ClusterIP|NodePort|LoadBalancer|ExternalName",
    "sessionAffinity": "=ClientIP|None",
    **dict.fromkeys("allocateLoadBalancerNodePorts publishNotReadyAddresses".split(), "bool"),
    **dict.fromkeys("clusterIPs externalIPs ipFamilies loadBalancerSourceRanges".split(), "strs"),
    **dict.fromkeys(
        "clusterIP externalName externalTrafficPolicy internalTrafficPolicy ipFamilyPolicy loadBalancerClass "
        "loadBalancerIP trafficDistribution".split(),
        "str",
    ),
    "healthCheckNodePort": "int",
    "sessionAffinityConfig": "any",
}
_CLAIM = {
    "accessModes": "strs",
    "resources": {"limits": "quantities", "requests": "quantities"},
    "storageClassName": "str",
    "volumeMode": "=Block|Filesystem",
    "volumeName": "str",
    "selector": SELECTOR,
    "dataSource": "any",
    "dataSourceRef": "any",
    "volumeAttributesClassName": "str",
}
_WORKLOAD: dict[str, Any] = {
    "replicas": "int",
    "selector!": SELECTOR,
    "template!": POD_TEMPLATE,
    "minReadySeconds": "int",
    "revisionHistoryLimit": "int",
}

KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("v1", "Service"): {"spec": SERVICE_SPEC},
    ("v1", "Secret"): {"type": "str", "data": "map", "stringData": "map", "immutable": "bool"},
    ("v1", "ConfigMap"): {"data": "map", "binaryData": "map", "immutable": "bool"},
    ("v1", "Namespace"): {"spec": "any"},
    ("v1", "ServiceAccount"): {"automountServiceAccountToken": "bool", "imagePullSecrets": "any", "secrets": "any"},
    ("v1", "PersistentVolumeClaim"): {"spec": _CLAIM},
    ("v1", "Pod"): {"spec!": POD_SPEC},
    ("apps/v1", "Deployment"): {
        "spec!": {**_WORKLOAD, "paused": "bool", "progressDeadlineSeconds": "int", "strategy": "any"}
    },
    ("apps/v1", "StatefulSet"): {
        "spec!": {
            **_WORKLOAD,
            "serviceName": "str",
            "podManagementPolicy": "=OrderedReady|Parallel",
            "persistentVolumeClaimRetentionPolicy": "any",
            "updateStrategy": "any",
            "ordinals": "any",
            "volumeClaimTemplates": [
                {"apiVersion": "str", "kind": "str", "metadata": METADATA, "spec": _CLAIM},
            ],
        }
    },
    ("policy/v1", "PodDisruptionBudget"): {
        "spec": {
            "minAvailable": "intstr",
            "maxUnavailable": "intstr",
            "selector": SELECTOR,
            "unhealthyPodEvictionPolicy": "=IfHealthyBudget|AlwaysAllow",
        }
    },
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "spec": {
            "podSelector": SELECTOR,
            "policyTypes": ["=Ingress|Egress"],
            "ingress": [{"from": [_PEER], "ports": [_POLICY_PORT]}],
            "egress": [{"to": [_PEER], "ports": [_POLICY_PORT]}],
        }
    },
}
