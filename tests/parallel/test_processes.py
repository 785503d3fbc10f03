"""Who the processes of a run are: as each environment tells it, compared with JAX's own finding; real ones joined."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster, ompi_cluster, slurm_cluster

from posttrain.errors import UserErrors
from posttrain.parallel.processes import NO_PEERS, Peers, find_peers

ROOT = Path(__file__).parent.parent.parent
PREFIXES = (
    "JAX_CO",
    "JAX_NUM_P",
    "JAX_PROC",
    "JAX_LOCAL",
    "SLURM",
    "OMPI",
    "TPU_",
    "MEGASCALE",
    "CUDA",
    "POSTTRAIN_PEER",
)
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "run-slice-1-0.run,run-slice-1-1.run", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run:8080",
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, *variables: dict[str, str]) -> None:
    for name, value in [item for some in variables for item in some.items()]:
        monkeypatch.setenv(name, value)


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with TPUs, on which JAX may use them."""
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    platforms = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", platforms)


def problems(monkeypatch: pytest.MonkeyPatch, *variables: dict[str, str]) -> list[str]:
    set_all(monkeypatch, *variables)
    with pytest.raises(UserErrors) as refused:
        find_peers()
    return list(refused.value.problems)


# --- Plain hosts ------------------------------------------------------------------------------------------------------


def test_nothing_set_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_peers() is None
    set_all(monkeypatch, {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"})
    assert find_peers() is None


def test_three_variables_tell_all_and_go_before_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"JAX_COORDINATOR_ADDRESS": "a:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    set_all(monkeypatch, SLURM, told)
    assert find_peers() == Peers("JAX_COORDINATOR_ADDRESS", 3, 2, "a:1234")


def test_a_single_process_within_a_job_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM, {"JAX_NUM_PROCESSES": "1"})
    assert find_peers() is None


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "set JAX_COORDINATOR_ADDRESS too"),
        ({"JAX_PROCESS_ID": "1"}, "set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES too"),
    ],
)
def test_half_settings_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], missing: str
) -> None:
    (problem,) = problems(monkeypatch, given)
    assert problem.startswith(" and ".join(given)) and missing in problem


def test_all_problems_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "-1"}
    wrong |= {"JAX_COORDINATOR_PORT": "http", "JAX_LOCAL_DEVICE_IDS": "0;1"}
    text = "\n".join(problems(monkeypatch, wrong))
    assert "JAX_COORDINATOR_ADDRESS = 'a': give host:port" in text
    assert "JAX_NUM_PROCESSES = '0': give a whole number, at least 1" in text
    assert "JAX_PROCESS_ID = '-1': give a whole number, at least 0" in text
    assert "JAX_COORDINATOR_PORT = 'http': give a whole number, at least 1" in text
    assert "JAX_LOCAL_DEVICE_IDS = '0;1': give the numbers of this process's GPUs, like 0,1" in text


def test_a_number_beyond_the_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}
    assert problems(monkeypatch, told) == ["JAX_PROCESS_ID = 2: with 2 processes it is one of 0 to 1"]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert problems(monkeypatch) == ["JAX_PROCESS_ID = 2: a single process has the number 0"]


# --- Schedulers -------------------------------------------------------------------------------------------------------


def test_slurm_as_jax_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM)
    jax_finds = slurm_cluster.SlurmCluster
    address = jax_finds.get_coordinator_address(None, None)
    assert address.startswith("gpu07:")
    assert find_peers() == Peers("SLURM", jax_finds.get_process_count(), jax_finds.get_process_id(), address, (1,))


@pytest.mark.parametrize(
    ("tasks", "rank", "visible", "own"),
    [
        ("1(x2)", 0, {"SLURM_GPUS_ON_NODE": "8"}, None),  # a process a node takes all
        ("8(x2)", 3, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (3,)),
        ("8(x2)", 3, {"SLURM_GPUS_ON_NODE": "8"}, (3,)),
        ("8(x2)", 3, {"CUDA_VISIBLE_DEVICES": "3", "SLURM_GPUS_ON_NODE": "8"}, None),  # bound by SLURM already
        ("2(x2)", 1, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        ("2(x2)", 1, {}, (1,)),
        ("2(x2)", 1, {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
    ],
)
def test_gpus_are_shared_among_the_tasks_of_a_node(
    monkeypatch: pytest.MonkeyPatch, tasks: str, rank: int, visible: dict[str, str], own: tuple[int, ...] | None
) -> None:
    placed = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "16"}
    set_all(monkeypatch, SLURM, placed, visible)
    peers = find_peers()
    assert peers is not None and peers.gpus == own


def test_gpus_that_cannot_be_shared_evenly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems(monkeypatch, SLURM, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert "3 processes on this host see 4 GPUs" in problem and "JAX_LOCAL_DEVICE_IDS" in problem


def test_a_process_beside_the_tasks_of_slurm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems(monkeypatch, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert "start it with srun" in problem and "set JAX_NUM_PROCESSES=1" in problem


def test_missing_slurm_variables_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(monkeypatch, {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]"})
    assert [text.split()[0] for text in found] == ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"]


def test_open_mpi_as_jax_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, OPEN_MPI)
    jax_finds = ompi_cluster.OmpiCluster
    address = jax_finds.get_coordinator_address(None, None)
    assert find_peers() == Peers("Open MPI", jax_finds.get_process_count(), jax_finds.get_process_id(), address, (1,))


def test_open_mpi_5_needs_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, OPEN_MPI)
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    (problem,) = problems(monkeypatch)
    assert problem.startswith("Open MPI: not enough") and "set JAX_COORDINATOR_ADDRESS too" in problem
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    assert find_peers() == Peers("Open MPI", 4, 3, "a:1", (1,))


# --- TPUs -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tpu")
@pytest.mark.parametrize("slices", [{}, SLICES], ids=["one slice", "two"])
def test_gke_as_jax_finds_it(monkeypatch: pytest.MonkeyPatch, slices: dict[str, str]) -> None:
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    set_all(monkeypatch, GKE, slices)
    jax_finds, peers = cloud_tpu_cluster.GkeTpuCluster, find_peers()
    assert jax_finds.is_env_present() and peers is not None
    address = jax_finds.get_coordinator_address(1, None)
    assert (peers.count, peers.index) == (jax_finds.get_process_count(), jax_finds.get_process_id())
    assert peers.coordinator == address == ("run-slice-0-0.run:8482" if slices else "run-slice-1-0.run:8482")
    assert peers.found == ("GKE, slice 1 of 2" if slices else "GKE") and peers.gpus is None


@pytest.mark.usefixtures("tpu")
def test_slices_of_one_host_are_joined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"TPU_WORKER_HOSTNAMES": "localhost"})
    assert find_peers() is None
    set_all(monkeypatch, SLICES)
    peers = find_peers()
    assert peers is not None and (peers.count, peers.index) == (2, 1)


@pytest.mark.usefixtures("tpu")
def test_half_told_slices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(monkeypatch, {"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"})
    assert [text.split()[0] for text in found] == [
        "TPU_WORKER_ID",
        "MEGASCALE_SLICE_ID",
        "MEGASCALE_COORDINATOR_ADDRESS",
    ]


def test_tpu_variables_mean_nothing_where_jax_uses_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, GKE)
    assert find_peers() is None  # no TPU here
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert find_peers() is None  # JAX_PLATFORMS=cpu


METADATA = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "x:0:10.0.1.1,x:1:10.0.1.2,x:2:10.0.1.3,x:3:10.0.1.4",
    "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'",
}


@pytest.mark.usefixtures("tpu")
@pytest.mark.parametrize("slices", [1, 2])
def test_cloud_tpu_as_jax_finds_it(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    """The hosts of a Cloud TPU are in its metadata, not in its environment."""
    known = METADATA if slices == 2 else METADATA | {"tpu-env": "ZONE: 'z'"}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (known[key], 200))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: name)
    jax_finds, peers = cloud_tpu_cluster.GceTpuCluster, find_peers()
    assert peers is not None
    assert (peers.count, peers.index) == (jax_finds.get_process_count(), jax_finds.get_process_id())
    assert (peers.count, peers.index) == ((8, 6) if slices == 2 else (4, 2))
    assert peers.coordinator == jax_finds.get_coordinator_address(1, None)


@pytest.mark.usefixtures("tpu")
def test_a_single_tpu_host_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = METADATA | {"tpu-env": "", "worker-network-endpoints": "x:0:10.0.1.1", "agent-worker-number": "0"}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (alone[key], 200))
    assert find_peers() is None


# --- Real processes ---------------------------------------------------------------------------------------------------

JOIN = """
import logging, sys
logging.basicConfig(format="%(message)s")
logging.getLogger("posttrain").setLevel(logging.INFO)
import jax
from posttrain.config import MeshConfig
from posttrain.parallel.processes import barrier, gather_texts, start_processes
start_processes(MeshConfig(fsdp=4))
start_processes(MeshConfig(fsdp=4))
print(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(), flush=True)
barrier("here")
if "late" in sys.argv:
    import time
    time.sleep(600)
print(gather_texts(f"text {jax.process_index()}"), flush=True)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(variables: dict[str, str], *words: str, script: str = JOIN) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith(PREFIXES)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        cwd=ROOT,
        env=kept | {"JAX_PLATFORMS": "cpu"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(i: int, count: int, port: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(i),
    }


def test_four_tasks_of_slurm_join() -> None:
    """As on one node: the host's name is told by SLURM, the port too, chosen so that it is free."""
    port = free_port()
    step = SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "4"}
    step |= {"SLURM_NODEID": "0", "JAX_COORDINATOR_PORT": str(port)}
    started = [start(step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(4)]
    for i, process in enumerate(started):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.splitlines() == [f"{i} 4 1 4", "['text 0', 'text 1', 'text 2', 'text 3']"]
        assert f"process {i} of 4 (SLURM) joined localhost:{port} in" in err and "1 of 4 devices (cpu)" in err


@pytest.mark.parametrize(
    ("index", "said"), [(0, "process 0 is there, but not all others are"), (1, "nothing answers there")]
)
def test_a_peer_that_does_not_come(index: int, said: str) -> None:
    port = free_port()
    begin = time.monotonic()
    with start(told(index, 2, port) | {"POSTTRAIN_PEER_TIMEOUT": "2"}) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == NO_PEERS and out == "" and time.monotonic() - begin < 60
    assert f"process {index} of 2 (JAX_COORDINATOR_ADDRESS) waits at localhost:{port} for the others" in err
    assert f"process {index} of 2 (JAX_COORDINATOR_ADDRESS) waited 2 s at localhost:{port}: {said}" in err


def test_a_wrong_time_limit_is_refused() -> None:
    with start({"POSTTRAIN_PEER_TIMEOUT": "soon"}) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "POSTTRAIN_PEER_TIMEOUT = 'soon': give a whole number, at least 1" in err


FAIL = """
import sys
from posttrain import cli
from posttrain.config import MeshConfig
from posttrain.errors import UserError
from posttrain.parallel.processes import barrier, start_processes
def handle(words):
    start_processes(MeshConfig())
    print("joined", flush=True)
    if sys.argv[1] == "fail":
        raise {error}("wrong")
    barrier("never reached by all")
cli.HANDLERS["train"] = handle
cli.main(["train"])
"""


@pytest.mark.parametrize(
    ("index", "error", "code", "said"),
    [(1, "UserError", 2, "posttrain train: wrong"), (0, "ValueError", 1, "ValueError: wrong")],
)
def test_a_process_that_fails_does_not_wait_for_the_others(index: int, error: str, code: int, said: str) -> None:
    port = free_port()
    script = FAIL.replace("{error}", error)
    started = [start(told(i, 2, port), "fail" if i == index else "wait", script=script) for i in (0, 1)]
    _, err = started[index].communicate(timeout=60)
    assert started[index].returncode == code and said in err
    if index == 0:
        assert started[1].wait(60) not in (0, 2)
    for process in started:
        process.kill()
        process.communicate()


def test_sigterm_outside_training_ends_a_process_at_once() -> None:
    """JAX's preemption service would swallow it, and the launcher would have to kill the process."""
    port = free_port()
    started = [start(told(i, 2, port), "late") for i in (0, 1)]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    started[1].terminate()
    assert started[1].wait(10) == -15
    for process in started:
        process.kill()
        process.communicate()
