"""TPU slices on GKE: a JobSet with a child Job for each slice, and a ConfigMap with the gin files.

Which process it is, and of which slice, GKE and JobSet tell JAX through the environment of the pods
(jax/_src/clusters/cloud_tpu_cluster.py), so nothing of that stands here.
https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice, https://jobset.sigs.k8s.io/docs/tasks/failure_policy.
"""

import hashlib
import json
import re
from typing import Any

import yaml
from ml_collections import ConfigDict

from launch.config import find_gin
from launch.plan import Plan
from launch.supervise import EXIT_PREEMPTED, EXIT_USER_ERROR
from launch.sweep import Run, environment, for_kubernetes, runs
from launch.tpu import slice_of

_CONTAINER = "t5x-domain"
_GIN_FOLDER = "/etc/t5x_domain"

# Every failure of a pod ends its Job; the rules, the first that matches, say what becomes of the JobSet. Kubernetes'
# own words in a Job's failure ("… failed with exit code 2 matching FailJob rule at index 0", pod_failure_policy.go)
# tell a user's error from a preemption, since both are of the reason PodFailurePolicy (JobSet 0.10; KEP-262).
_FAILURE_RULES = [
    {
        "name": "userError",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f"failed with exit code {EXIT_USER_ERROR} matching"],
    },
    {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    },
]
_POD_FAILURE_RULES = [
    {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": _CONTAINER,
            "operator": "In",
            "values": [EXIT_USER_ERROR, EXIT_PREEMPTED],
        },
    },
    # The node is drained or taken away: not a failure of the program's.
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
]


# `kubectl apply` would take a JobSet that has ended for one that is there, and start nothing.
_ADVICE = (
    "If the JobSet is there already, running or ended, `kubectl delete --ignore-not-found` with the same --filename, "
    "then launch again: the run goes on from its last checkpoint."
)


def plan(config: ConfigDict) -> Plan:
    """A manifest for each run, and the kubectl that creates what it describes."""
    manifests = {f"{config.logs}/{run.job_name}.yaml": manifest(config, run) for run in runs(config)}
    return Plan(manifests, [["kubectl", "create", f"--filename={path}"] for path in manifests], advice=_ADVICE)


def manifest(config: ConfigDict, run: Run) -> str:
    """The YAML of one run."""
    return yaml.dump_all([config_map(config, run), job_set(config, run)], Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes gin files as they stand, line by line, and shared parts out in full."""

    def ignore_aliases(self, _: Any) -> bool:
        """No anchors: a reader should not have to look them up."""
        return True

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """Text of several lines as a block."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def config_map(config: ConfigDict, run: Run) -> dict[str, Any]:
    """The gin files as they stand on this machine; those that they include come from the image.

    The name has a digest of them, and nothing changes them any more: pods that start again read what the first read.
    """
    texts = [find_gin(file, config.gin_search_paths).read_text(encoding="utf-8") for file in config.gin_files]
    data = dict(zip(_gin_keys(config), texts, strict=True))
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:8]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**_metadata(config, run), "name": f"{run.job_name}-{digest}"},
        "immutable": True,
        "data": data,
    }


def job_set(config: ConfigDict, run: Run) -> dict[str, Any]:
    """The JobSet: a replica of the Job for each slice, a pod for each host of a slice."""
    slice_ = slice_of(config.accelerator, config.topology)
    hosts = slice_.chips // slice_.chips_per_node
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _POD_FAILURE_RULES},
        "template": {"spec": _pod(config, run)},
    }
    metadata = _metadata(config, run)
    # One slice is one node pool, and one Job has it to itself.
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    if config.gke_jobset.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": config.gke_jobset.queue}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": config.max_restarts, "rules": _FAILURE_RULES},
            "replicatedJobs": [{"name": "slice", "replicas": config.slices, "template": {"spec": job}}],
        },
    }


def _pod(config: ConfigDict, run: Run) -> dict[str, Any]:
    slice_ = slice_of(config.accelerator, config.topology)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": slice_.tpu.gke,
        "cloud.google.com/gke-tpu-topology": slice_.topology,
    }
    if config.gke_jobset.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    program = run.program(config, [f"{_GIN_FOLDER}/{key}" for key in _gin_keys(config)])
    chips = {"google.com/tpu": str(slice_.chips_per_node)}
    account = {"serviceAccountName": config.gke_jobset.service_account} if config.gke_jobset.service_account else {}
    return {
        "restartPolicy": "Never",  # or the Job would not see how the program ended
        "terminationGracePeriodSeconds": config.notice_seconds,
        **account,
        # Between slices, the pods' own network is slower than the hosts'. On the latter, Workload Identity does not
        # reach them: buckets see the account of the node pool.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "containers": [
            {
                "name": _CONTAINER,
                "image": config.image,
                # No shell: the program is the container's first process and gets SIGTERM; bindings need no quotes.
                "command": [for_kubernetes(word) for word in program],
                "env": [{"name": key, "value": for_kubernetes(value)} for key, value in environment(config).items()],
                "resources": {"requests": chips, "limits": chips},
                "volumeMounts": [{"name": "gin", "mountPath": _GIN_FOLDER, "readOnly": True}],
            }
        ],
        "volumes": [{"name": "gin", "configMap": {"name": config_map(config, run)["metadata"]["name"]}}],
    }


def _metadata(config: ConfigDict, run: Run) -> dict[str, Any]:
    return {"name": run.job_name, "namespace": config.gke_jobset.namespace}


def _gin_keys(config: ConfigDict) -> list[str]:
    """Names of the gin files in the ConfigMap, in their order: a key may hold no slash."""
    return [
        f"{index}-{re.sub(r'[^-._a-zA-Z0-9]', '_', file.rsplit('/')[-1])}"
        for index, file in enumerate(config.gin_files)
    ]
