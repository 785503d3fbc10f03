"""The JobSet that launch/gke.sh applies: valid by the schemas of JobSet and Kubernetes, and meaning what it should."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
SCHEMA = json.loads((ROOT / "tests/fixtures/jobset.schema.json").read_text())
COMMAND = [
    "posttrain",
    "train",
    "configs/sft.yaml",
    "--run.dir",
    "gs://bucket/run",
    "--objective.name",
    'a "b" \\c & @NAME@\nd',
]


def gke(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "launch/gke.sh", *words], capture_output=True, text=True)


def jobset(*options: str, topology: str = "v6e:4x4") -> dict[str, Any]:
    done = gke("run", "my-run", "--topology", topology, "--image", "img:1", *options, "--dry-run", *COMMAND)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("# kubectl create --filename=-\n")
    return yaml.safe_load(done.stdout)


def job(manifest: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


EVERYTHING = ("--slices", "2", "--spot", "--queue", "q", "--restarts", "7", "--grace", "60")


@pytest.mark.parametrize("options", [(), EVERYTHING], ids=["one slice", "everything"])
def test_the_manifest_is_valid(options: tuple[str, ...]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(jobset(*options))


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (lambda m: m["spec"]["failurePolicy"]["rules"][0], "action", "Restart"),
        (lambda m: m["spec"]["failurePolicy"], "maxRestart", 3),
        (lambda m: job(m)["template"]["spec"], "terminationGracePeriod", 3),
        (lambda m: job(m)["podFailurePolicy"]["rules"][0]["onExitCodes"], "values", "2"),
        (lambda m: job(m)["template"]["spec"]["containers"][0], "command", "posttrain train"),
    ],
)
def test_the_schema_refuses_what_is_wrong(place: Any, key: str, value: Any) -> None:
    manifest = jobset(*EVERYTHING)
    place(manifest)[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_a_slice_is_a_job_and_a_host_a_pod() -> None:
    manifest = jobset("--slices", "3", topology="v5p:4x4x4")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    pod = job(manifest)["template"]["spec"]
    assert replicated["replicas"] == 3 and job(manifest)["parallelism"] == job(manifest)["completions"] == 16
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == COMMAND
    names = {entry["name"]: entry for entry in container["env"]}
    described = {
        name: entry["valueFrom"]["fieldRef"]["fieldPath"] for name, entry in names.items() if "value" not in entry
    }
    assert described == {
        "MEGASCALE_NUM_SLICES": "metadata.annotations['jobset.sigs.k8s.io/global-replicas']",
        "MEGASCALE_SLICE_ID": "metadata.annotations['jobset.sigs.k8s.io/job-global-index']",
        "MEGASCALE_COORDINATOR_ADDRESS": "metadata.annotations['jobset.sigs.k8s.io/coordinator']",
    }
    assert manifest["spec"]["coordinator"]["replicatedJob"] == replicated["name"]


def test_one_slice_is_not_told_of_others() -> None:
    manifest = jobset()
    assert "coordinator" not in manifest["spec"]
    (container,) = job(manifest)["template"]["spec"]["containers"]
    assert [entry["name"] for entry in container["env"]] == ["PYTHONUNBUFFERED"]


# As Kubernetes words them: pkg/controller/job/pod_failure_policy.go.
EXITED = (
    "Container posttrain for pod default/my-run-slice-0-1 failed with exit code {} matching FailJob rule at index {}"
)
DISRUPTED = "Pod default/my-run-slice-0-1 has condition DisruptionTarget matching FailJob rule at index {}"


def what_happens(manifest: dict[str, Any], code: int, *, disrupted: bool = False) -> str:
    """JobSet's action for a pod that ended so, by the rules of Kubernetes and JobSet: the first that matches."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job(manifest)["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
            reason, message = "PodFailurePolicy", EXITED.format(code, index)
            break
        if "onPodConditions" in rule and disrupted:
            reason, message = "PodFailurePolicy", DISRUPTED.format(index)
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_what_happens_after_each_exit_code() -> None:
    """A wrong config ends the run, preemption costs no restart, a crash costs one of a bounded number."""
    manifest = jobset("--restarts", "7")
    assert what_happens(manifest, 2) == what_happens(manifest, 127) == "FailJobSet"
    assert what_happens(manifest, 143) == "RestartJobSetAndIgnoreMaxRestarts"
    assert what_happens(manifest, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    for crashed in (1, 75, 134, 137):
        assert what_happens(manifest, crashed) == "RestartJobSet"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert job(manifest)["backoffLimit"] == 0  # any pod's end is the Job's end
    pod = job(manifest)["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes allows podFailurePolicy with no other
    exits = [rule["onExitCodes"] for rule in job(manifest)["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    for rule in exits:  # as Kubernetes wants them
        assert rule["values"] == sorted(set(rule["values"])) and 0 not in rule["values"] and rule["operator"] == "In"
        assert rule["containerName"] in [container["name"] for container in pod["containers"]]


def test_the_other_verbs_say_what_they_would_run() -> None:
    pools = gke(
        *("pools", "run", "--topology", "v6e:4x4", "--slices", "2", "--spot", "--dry-run"),
        *("--cluster", "c", "--location", "us-east5", "--zone", "us-east5-a"),
    )
    assert pools.stdout.splitlines() == [
        f"gcloud container node-pools create run-{i} --cluster=c --location=us-east5 --node-locations=us-east5-a "
        "--machine-type=ct6e-standard-4t --num-nodes=4 --tpu-topology=4x4 --spot --scopes=cloud-platform"
        for i in (0, 1)
    ]
    assert gke("stop", "run", "--dry-run").stdout == "kubectl delete jobset run --cascade=foreground\n"
    selector = "--selector=jobset.sigs.k8s.io/jobset-name=run"
    assert (
        gke("logs", "run", "--dry-run").stdout == f"kubectl logs {selector} --prefix --tail=20 --max-log-requests=100\n"
    )
    saved = gke("logs", "run", "--save", "d", "--dry-run").stdout
    assert saved == "mkdir -p d\nkubectl logs pod/POD >d/POD.log\n"
    status = gke("status", "run", "--dry-run").stdout
    assert status == f"kubectl get jobset run\nkubectl get jobs\\,pods {selector} --output=wide\n"


def test_slices_of_tpu7x_are_placed_by_a_policy() -> None:
    where = ("--cluster", "c", "--location", "us-east5-a", "--zone", "us-east5-a", "--account", "me@p.iam", "--dry-run")
    policy, pool = gke("pools", "r", "--topology", "tpu7x:2x2x2", *where).stdout.splitlines()
    assert policy == (
        "gcloud compute resource-policies create workload-policy r --type=HIGH_THROUGHPUT "
        "--accelerator-topology=2x2x2 --region=us-east5"
    )
    assert pool.endswith(
        "--machine-type=tpu7x-standard-4t --num-nodes=2 --tpu-topology=2x2x2 --placement-policy=r "
        "--scopes=cloud-platform --service-account=me@p.iam"
    )
    (pool,) = gke("pools", "r", "--topology", "tpu7x:2x2x1", *where).stdout.splitlines()
    assert "--num-nodes=1 --scopes" in pool


KUBECTL = """#!/usr/bin/env bash
case "$*" in
    "get pods "*) printf 'pod/a\\npod/b\\npod/c\\n' ;;
    "logs pod/b") echo 'container "posttrain" is waiting to start' >&2; exit 1 ;;
    "logs "*) echo "$2 says" ;;
    "create "*) echo 'Error from server (AlreadyExists): jobsets "x" already exists' >&2; exit 1 ;;
esac
"""


def test_with_a_stand_in_for_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    saved = gke("logs", "x", "--save", str(tmp_path / "d"))  # one pod has no log yet
    assert saved.returncode == 1 and (tmp_path / "d/c.log").read_text() == "pod/c says\n"
    again = gke("run", "x", "--topology", "v6e:4x4", "--image", "i", "c")
    assert again.returncode == 2 and "launch/gke.sh stop x" in again.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "x", "--topology", "v6e-16", "--image", "i", "c"), "--topology 'v6e-16': give a chip and its shape"),
        (("run", "x", "--topology", "v5p:3x1x2", "--image", "i", "c"), "6 chips are no whole number of hosts"),
        (("run", "x", "--topology", "v6e:4x4", "c"), "--image: name the image"),
        (("run", "x", "--topology", "v6e:2x2", "--slices", "2", "--image", "i", "c"), "slices of several hosts only"),
        (("run", "x", "--topology", "v6e:4x4", "--slices", "two", "--image", "i", "c"), "--slices 'two'"),
        (("run", "X_1", "--topology", "v6e:4x4", "--image", "i", "c"), "NAME 'X_1'"),
        (("run", "x", "--topolgy", "v6e:4x4", "c"), "--topolgy: no such option"),
        (("run", "x", "--topology", "v6e:0x4", "--image", "i", "c"), "--topology 'v6e:0x4': give a chip and its shape"),
        (("run", "x", "--topology"), "--topology: give a value"),
        (("walk", "x"), "walk: no such verb"),
    ],
)
def test_wrong_options_are_refused(words: tuple[str, ...], said: str) -> None:
    done = gke(*words, *(() if words[-1] in ("x", "--topology") else ("--dry-run",)))
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""
