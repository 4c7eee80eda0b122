"""Manifests against the published schemas: Kubernetes' and JobSet's, as kubeflow-trainer-api carries them."""

import re

import pytest
import shell
import yaml
from kubeflow_trainer_api import models

from launch import gke_jobset
from launch.config import check, defaults
from launch.sweep import runs
from launch.tpu import TPUS
from t5x_domain.errors import UserError

# What the models leave as text: enumerations of the JobSet API (jobset.x-k8s.io/v1alpha2) and of batch/v1.
JOB_SET_ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob"}
POD_FAILURE_ACTIONS = {"FailIndex", "FailJob", "Ignore", "Count"}
# Kubernetes, pkg/controller/job/pod_failure_policy.go: the message of a Job that a rule has failed.
MESSAGE = "Container {} for pod default/trial-slice-0-1-abcde failed with exit code {} matching FailJob rule at index 0"


@pytest.fixture
def config():
    config = defaults("gke_jobset")
    config.name = "trial"
    config.accelerator = "v5p"
    config.topology = "4x4x4"
    config.slices = 2
    config.gin_files = ("gin/models/tiny.gin", "gin/runs/pretrain.gin")
    config.storage = "gs://bucket/runs"
    config.image = "registry/image:1"
    config.compilation_cache = "gs://bucket/compiled"
    return config


def manifests(config):
    (run,) = runs(config)
    return list(yaml.safe_load_all(gke_jobset.manifest(config, run)))


def job_of(config):
    return manifests(config)[1]["spec"]["replicatedJobs"][0]["template"]["spec"]


def strictly(model, manifest):
    """A manifest that the model reads and writes back whole: it knows every key and type."""
    assert model.from_dict(manifest).to_dict() == manifest


@pytest.mark.parametrize("accelerator", TPUS)
@pytest.mark.parametrize("more", [{}, {"service_account": "trainer", "queue": "users", "spot": True}])
def test_the_schemas_hold(config, accelerator, more):
    config.accelerator = accelerator
    config.topology = "4x4x4"[: 2 * TPUS[accelerator].axes - 1]
    config.gke_jobset.update(more)
    check(config)
    config_map, job_set = manifests(config)
    strictly(models.JobsetV1alpha2JobSet, job_set)
    assert set(config_map) == {"apiVersion", "kind", "metadata", "immutable", "data"}  # core/v1 ConfigMap
    assert all(re.fullmatch(r"[-._a-zA-Z0-9]+", key) for key in config_map["data"])
    assert {rule["action"] for rule in job_set["spec"]["failurePolicy"]["rules"]} <= JOB_SET_ACTIONS
    assert {rule["action"] for rule in job_of(config)["podFailurePolicy"]["rules"]} <= POD_FAILURE_ACTIONS


def test_the_check_of_schemas_can_fail(config):
    _, job_set = manifests(config)
    job_set["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError):
        strictly(models.JobsetV1alpha2JobSet, job_set)
    _, job_set = manifests(config)
    job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "sixteen"
    with pytest.raises(ValueError, match="parallelism"):
        strictly(models.JobsetV1alpha2JobSet, job_set)


def test_a_job_for_each_slice_a_pod_for_each_host(config):
    # A v5p slice of 4x4x4 has 16 machines (https://cloud.google.com/tpu/docs/v5p, "Configurations").
    _, job_set = manifests(config)
    assert job_set["spec"]["replicatedJobs"][0]["replicas"] == 2
    job = job_of(config)
    assert job["parallelism"] == job["completions"] == 16
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": "4"}


@pytest.mark.parametrize(
    ("ended", "action"),
    [
        ([(0.0, 2)], "FailJobSet"),
        ([(0.0, 75)], "RestartJobSetAndIgnoreMaxRestarts"),
        ([(0.0, 1)], None),
        ([(0.0, 137), (66.0, 75)], None),  # killed, and noticed by the others after their heartbeat
        ([(0.0, 1), (2.0, 1)], None),  # a crash: its peers leave first, with its status (parallel/peers.py)
        ([(2.0, 2), (0.0, 2)], "FailJobSet"),
        ([(1.0, 75), (0.0, 75)], "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_what_becomes_of_the_set_when_programs_end(config, ended, action):
    """As the two controllers decide it, by the first of [(seconds, status)]; None is a restart that counts."""
    _, status = min(ended)  # backoffLimit is 0: the Job has failed then, and its other pods are ended
    job = job_of(config)
    (container,) = job["template"]["spec"]["containers"]
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (rule["containerName"], rule["operator"]) == (container["name"], "In")
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    by_rule = status in rule["values"]
    reason = "PodFailurePolicy" if by_rule else "BackoffLimitExceeded"
    message = MESSAGE.format(container["name"], status) if by_rule else "Job has reached the specified backoff limit"
    _, job_set = manifests(config)
    for rule in job_set["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            assert rule["action"] == action
            return
    assert action is None
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == config.max_restarts


def test_a_lost_node_is_a_preemption(config):
    drained = job_of(config)["podFailurePolicy"]["rules"][1]
    assert drained == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_the_gin_files_go_along_in_their_order(config, tmp_path):
    own = tmp_path / "my run.gin"
    own.write_text("include 'gin/models/tiny.gin'\nTRAIN_STEPS = 3  # 'quoted' $HOME: {x}\n")
    config.gin_files = (str(own), "gin/models/tiny.gin", str(own))
    config_map, job_set = manifests(config)
    assert list(config_map["data"]) == ["0-my_run.gin", "1-tiny.gin", "2-my_run.gin"]
    assert config_map["data"]["0-my_run.gin"] == own.read_text()
    pod = job_of(config)["template"]["spec"]
    (container,) = pod["containers"]
    assert [word for word in container["command"] if word.startswith("--gin_file")] == [
        f"--gin_file=/etc/t5x_domain/{key}" for key in config_map["data"]
    ]
    assert container["volumeMounts"][0]["mountPath"] == "/etc/t5x_domain"
    assert pod["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"]


def test_pods_that_start_again_read_what_the_first_have_read(config, tmp_path):
    own = tmp_path / "own.gin"
    own.write_text("TRAIN_STEPS = 3")
    config.gin_files = (str(own),)
    names = set()
    for text in ("TRAIN_STEPS = 3", "TRAIN_STEPS = 3", "TRAIN_STEPS = 4"):
        own.write_text(text)
        config_map, job_set = manifests(config)
        assert config_map["immutable"] is True
        assert job_set["metadata"]["name"] == "trial"
        names.add(config_map["metadata"]["name"])
    assert len(names) == 2 and all(re.fullmatch(r"trial-[0-9a-f]{8}", name) for name in names)


def test_one_that_is_there_already_is_not_taken_for_started(config, tmp_path, monkeypatch, capfd):
    """`kubectl create` refuses it; `kubectl apply` would leave one that has ended as it is."""
    config.logs = str(tmp_path)
    shell.put(tmp_path, "kubectl", "[[ $1 == create ]] && exit 1")
    monkeypatch.setenv("PATH", shell.environment(tmp_path)["PATH"])
    assert gke_jobset.plan(config).carry_out() == 1
    said = capfd.readouterr().err
    assert f"kubectl create --filename={tmp_path}/trial.yaml ended with status 1" in said
    assert "kubectl delete --ignore-not-found" in said


def expanded(text):
    """As Kubernetes expands `command`: `$$` is a dollar, `$(NAME)` a variable."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda found: "$" if found[0] == "$$" else f"<{found[1]}>", text)


def test_bindings_arrive_word_for_word(config):
    config.overrides = (shell.NASTY,)
    config.env = {"FLAG": "$(HOME) $$"}
    (container,) = job_of(config)["template"]["spec"]["containers"]
    assert [expanded(word) for word in container["command"]][-1] == f"--gin.{shell.NASTY}"
    assert {entry["name"]: expanded(entry["value"]) for entry in container["env"]} == {
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compiled",
        "FLAG": "$(HOME) $$",
    }


def test_a_manifest_for_each_run_is_created(config):
    config.sweep = (("Run.seed=1",), ("Run.seed=2",))
    plan = gke_jobset.plan(config)
    assert [command[-1] for command in plan.commands] == [f"--filename={path}" for path in plan.files]
    names = {yaml.safe_load(text.split("---\n")[1])["metadata"]["name"] for text in plan.files.values()}
    assert len(names) == 2
    # <set>-<job>-<index>-<pod>-<5 letters> is a pod's name, and a DNS label has at most 63 letters.
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) for name in names)
    assert all(len(f"{name}-slice-99-9999-abcde") <= 63 for name in names)


def test_wrong_use(config):
    for field, value, message in (
        ("image", "", "config.image is empty"),
        ("storage", "runs", "config.storage = 'runs': TPU hosts share no disk"),
        ("topology", "8x8", "v5p has 3 axes"),
        ("slices", 0, "config.slices = 0"),
        ("accelerator", "h100", "config.accelerator = 'h100'"),
    ):
        before, config[field] = config[field], value
        with pytest.raises(UserError, match=re.escape(message)):
            check(config)
        config[field] = before
