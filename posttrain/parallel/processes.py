"""The processes of a run: found in the environment, joined before the first use of a device, and kept in step.

A run is one process on one host, or one on each of many. Who the others are is told by the variables
`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or by what started them: Open MPI, SLURM, GKE or
Cloud TPU. Whatever the variables leave out is taken from there. docs/launch.md tells how to start them.
"""

import itertools
import logging
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import jax
from jax._src import cloud_tpu_init, distributed, xla_bridge  # what they are used for has no public name
from jax._src import config as jax_config
from jax._src.clusters import cloud_tpu_cluster, ompi_cluster, slurm_cluster

from posttrain.config import MeshConfig
from posttrain.errors import UserErrors
from posttrain.parallel.ending import end_alone_after_failures
from posttrain.parallel.mesh import axis_sizes, slice_count

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PORT, OWN_DEVICES = "JAX_COORDINATOR_PORT", "JAX_LOCAL_DEVICE_IDS"
"""Read by JAX: process 0's port where the environment tells its host alone; the GPUs of this process."""
TIMEOUT = "POSTTRAIN_PEER_TIMEOUT"
"""Seconds that a process waits for the others to come; 600 unless set."""
NO_PEERS = 75
"""Exit code when they do not come: EX_TEMPFAIL, so that a launcher tries again."""

logger = logging.getLogger(__name__)

_barriers = itertools.count()
"""Every barrier needs a name of its own; all processes come to the same ones in the same order."""


@dataclass(frozen=True)
class Peers:
    """This process among those of its run."""

    found: str
    """What told of them, as the log names it."""
    count: int
    index: int
    coordinator: str = ""
    """`host:port` where process 0 listens; empty when it was not told."""
    gpus: tuple[int, ...] | None = None
    """Which of the GPUs that it sees are its own; None: all. Other devices are not split between processes."""


def start_processes(mesh: MeshConfig) -> None:
    """Joins the processes of this run and, on CPU, emulates as many devices as the mesh asks for.

    Must run before the first use of a device; later calls do nothing. Raises `UserErrors` naming every setting that is
    missing or wrong; ends the process with the code `NO_PEERS` when the others do not come in time.
    """
    if jax.distributed.is_initialized():
        return
    peers, seconds = find_peers(), _timeout()
    _emulate_devices(mesh, 1 if peers is None else peers.count)
    if peers is not None:
        _join(peers, seconds)


def find_peers() -> Peers | None:
    """What the environment says about the processes of this run; None for a single one. Touches no device."""
    problems: list[str] = []
    count, index = _number(COUNT, problems, low=1), _number(INDEX, problems)
    address = os.environ.get(ADDRESS, "")
    if address and not re.fullmatch(r".+:\d+", address):
        problems.append(f"{ADDRESS} = {address!r}: give host:port, a port that is free on the host of process 0")
    _number(PORT, problems, low=1)
    own = os.environ.get(OWN_DEVICES, "")
    if own and not re.fullmatch(r"\d+(,\d+)*", own):
        problems.append(f"{OWN_DEVICES} = {own!r}: give the numbers of this process's GPUs, like 0,1")
    peers = None
    if count != 1 and not (count and index is not None and address):  # three variables need nobody else's word
        peers = next((found for tell in ENVIRONMENTS if (found := tell(problems)) is not None), None)
    if peers is None and (count == 1 or not _given()):
        if index:
            problems.append(f"{INDEX} = {index}: a single process has the number 0")
        return _checked(None, problems)
    peers = peers or Peers(ADDRESS, 0, -1)
    peers = replace(
        peers,
        count=count or peers.count,
        index=peers.index if index is None else index,
        coordinator=address or peers.coordinator,
    )
    return _checked(peers, problems + _gaps(peers))


def _given() -> list[str]:
    return [name for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)]


def _gaps(peers: Peers) -> list[str]:
    """What is still not known, or does not fit together."""
    known = {ADDRESS: bool(peers.coordinator), COUNT: peers.count > 0, INDEX: peers.index >= 0}
    missing = [name for name in known if not known[name] and name not in _given()]
    if missing:
        told = " and ".join(_given()) or peers.found
        return [
            f"{told}: not enough to find the other processes; set {' and '.join(missing)} too "
            f"({ADDRESS}: host:port of process 0; {COUNT}: how many there are; {INDEX}: from 0, one for each)"
        ]
    if known[COUNT] and peers.index >= peers.count:
        whose = INDEX if INDEX in _given() else f"{peers.found}: the number of this process"
        return [f"{whose} = {peers.index}: with {peers.count} processes it is one of 0 to {peers.count - 1}"]
    return []


def _checked(peers: Peers | None, problems: list[str]) -> Peers | None:
    if problems:
        raise UserErrors(problems)
    return peers


def _number(name: str, problems: list[str], low: int = 0) -> int | None:
    """The variable's value; None where it is not set, or no such number, which is a problem."""
    text = os.environ.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < low:
        problems.append(f"{name} = {text!r}: give a whole number, at least {low}")
        return None
    return int(text)


def _needed(name: str, why: str, problems: list[str]) -> int:
    """As `_number`, but it is a problem too where it is not set."""
    if not os.environ.get(name):
        problems.append(f"{name} is not set, though {why}")
    return _number(name, problems) or 0


def _timeout() -> int:
    problems: list[str] = []
    seconds = _number(TIMEOUT, problems, low=1)
    _checked(None, problems)
    return seconds or 600


# --- Environments ---------------------------------------------------------------------------------------------------


def _open_mpi(problems: list[str]) -> Peers | None:
    """Version 4 tells where process 0 may listen; version 5 does not."""
    count = _number("OMPI_COMM_WORLD_SIZE", problems)
    if count is None or count < 2:
        return None
    why = f"OMPI_COMM_WORLD_SIZE is {count}"
    index = _needed("OMPI_COMM_WORLD_RANK", why, problems)
    rank = _needed("OMPI_COMM_WORLD_LOCAL_RANK", why, problems)
    here = _number("OMPI_COMM_WORLD_LOCAL_SIZE", problems) or rank + 1
    cluster, address = ompi_cluster.OmpiCluster, ""
    if cluster.is_env_present():
        address = cluster.get_coordinator_address(None, os.environ.get(PORT))
    return Peers("Open MPI", count, index, address, _own_gpus(rank, here, problems))


def _slurm(problems: list[str]) -> Peers | None:
    """The tasks of a job step, as `srun` starts them."""
    count = _number("SLURM_NTASKS", problems)
    if count is None or count < 2:
        return None
    if "SLURM_STEP_NODELIST" not in os.environ:
        problems.append(
            f"SLURM_NTASKS is {count}, but this process is not one of the tasks: start it with srun; "
            f"to run it alone, set {COUNT}=1"
        )
        return None
    why = f"SLURM_NTASKS is {count}"
    _needed("SLURM_JOB_ID", why, problems)
    index, rank = (_needed(name, why, problems) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    if problems:
        return None
    address = slurm_cluster.SlurmCluster.get_coordinator_address(None, os.environ.get(PORT))
    return Peers("SLURM", count, index, address, _own_gpus(rank, _slurm_tasks_here(count, problems), problems))


def _slurm_tasks_here(count: int, problems: list[str]) -> int:
    """How many tasks of the step run on this node; `SLURM_STEP_TASKS_PER_NODE` is written as in `4(x2),3`."""
    node = _number("SLURM_NODEID", problems) or 0
    tasks: list[int] = []
    for each, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        tasks += [int(each)] * int(times or 1)
    if node < len(tasks):
        return tasks[node]
    return math.ceil(count / (_number("SLURM_STEP_NUM_NODES", problems) or 1))


def _gke(problems: list[str]) -> Peers | None:
    """A pod of GKE on TPUs, of one slice or several: GKE sets these variables itself, for pods of a JobSet too."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if not (_on_tpu() and hosts):
        return None
    names = hosts.split(",")
    slices, slice_index = _number("MEGASCALE_NUM_SLICES", problems, low=1) or 1, 0
    if len(names) * slices == 1:
        return None
    worker = 0 if len(names) == 1 else _needed("TPU_WORKER_ID", f"TPU_WORKER_HOSTNAMES names {len(names)}", problems)
    first = names[0]
    if slices > 1:
        why = f"MEGASCALE_NUM_SLICES is {slices}"
        slice_index = _needed("MEGASCALE_SLICE_ID", why, problems)
        first = os.environ.get("MEGASCALE_COORDINATOR_ADDRESS", "")
        if not first:
            problems.append(f"MEGASCALE_COORDINATOR_ADDRESS is not set, though {why}")
    found = "GKE" if slices == 1 else f"GKE, slice {slice_index} of {slices}"
    return Peers(found, len(names) * slices, worker + slice_index * len(names), _tpu_coordinator(first))


def _tpu_vm(problems: list[str]) -> Peers | None:
    """A Cloud TPU VM, of one slice or several, which asks the metadata server."""
    if not _on_tpu():
        return None
    try:
        import requests
    except ImportError:
        problems.append("to find the other hosts of this TPU, JAX needs `requests`: pip install 'posttrain[tpu]'")
        return None
    cluster = cloud_tpu_cluster.GceTpuCluster
    try:
        if not cluster.is_env_present() or (count := cluster.get_process_count()) < 2:
            return None
        slices, slice_index = cluster._get_num_slices(), cluster._get_slice_id()
        first = cloud_tpu_cluster.get_tpu_env_value("MEGASCALE_COORDINATOR_ADDRESS") if slices > 1 else None
        index, hosts = cluster.get_process_id(), cluster._get_worker_list_in_slice()
    except requests.exceptions.ConnectionError:
        logger.info("no metadata server here: taken as a single host, set %s to join others", ADDRESS)
        return None
    found = "Cloud TPU" if slices == 1 else f"Cloud TPU, slice {slice_index} of {slices}"
    return Peers(found, count, index, _tpu_coordinator(first or hosts[0]))


ENVIRONMENTS: tuple[Callable[[list[str]], Peers | None], ...] = (_open_mpi, _slurm, _gke, _tpu_vm)


def _on_tpu() -> bool:
    """Whether this machine has TPUs and nobody told JAX to use something else."""
    platforms = jax_config.jax_platforms.value
    return cloud_tpu_init.running_in_cloud_tpu_vm and (not platforms or "tpu" in platforms.split(","))


def _tpu_coordinator(host: str) -> str:
    """JAX's port, not that of whatever else the host serves."""
    return f"{host.split(':')[0]}:{os.environ.get(PORT, cloud_tpu_cluster.coordinator_port)}"


def _own_gpus(rank: int, here: int, problems: list[str]) -> tuple[int, ...] | None:
    """An even share of the GPUs that all `here` processes of this host see; this one is number `rank` of them.

    None where each sees its own alone, or where it is the only one and takes all (JAX by itself would take just one).
    """
    if here < 2 or os.environ.get(OWN_DEVICES):
        return None
    visible = next((value for name in _VISIBLE if (value := os.environ.get(name)) is not None), None)
    seen = _number("SLURM_GPUS_ON_NODE", problems) if visible is None else len(visible.split(",")) if visible else 0
    if seen is None:
        return (rank,)
    if seen < 2:
        return None
    if seen % here:
        problems.append(
            f"{here} processes on this host see {seen} GPUs, which cannot be shared evenly: "
            f"start 1 process, {seen}, or another number that divides {seen}; or set {OWN_DEVICES} for each"
        )
        return None
    share = seen // here
    return tuple(range(rank * share, (rank + 1) * share))


_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


# --- Joining --------------------------------------------------------------------------------------------------------


def _join(peers: Peers, seconds: int) -> None:
    """Returns when all processes have come.

    JAX's own preemption service is left out: it would swallow every SIGTERM, also those before training, when there is
    nothing to save and the process had better end. `train/stop.py` handles them during training.
    """
    begin = time.monotonic()
    reminder = threading.Timer(min(30, seconds / 2), _still_waiting, (peers, seconds))
    # JAX's own time limit ends the process too, but with a stack trace and no word on what is wrong.
    limit = threading.Timer(seconds, _give_up, (peers, seconds))
    for timer in (reminder, limit):
        timer.daemon = True
        timer.start()
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=peers.coordinator,
        num_processes=peers.count,
        process_id=peers.index,
        local_device_ids=peers.gpus,
        cluster_detection_method="deactivate",
        initialization_timeout=seconds + 60,
    )
    reminder.cancel()
    limit.cancel()
    end_alone_after_failures()
    joined = time.monotonic() - begin
    devices = jax.devices()
    slices = slice_count(devices)
    logger.info(
        f"process {peers.index} of {peers.count} ({peers.found}) joined {peers.coordinator} in {joined:.1f} s: "
        f"{jax.local_device_count()} of {len(devices)} devices ({devices[0].device_kind})"
        + (f" in {slices} slices" if slices > 1 else "")
    )


def _still_waiting(peers: Peers, seconds: int) -> None:
    logger.info(
        f"process {peers.index} of {peers.count} ({peers.found}) waits at {peers.coordinator} for the others to come, "
        f"up to {seconds} s"
    )


def _give_up(peers: Peers, seconds: int) -> NoReturn:
    """Ends the process from beside the call that hangs, saying why."""
    print(
        f"process {peers.index} of {peers.count} ({peers.found}) waited {seconds} s at {peers.coordinator}: "
        f"{_what_is_wrong(peers)}. {TIMEOUT} sets how long to wait, in seconds.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(NO_PEERS)


def _what_is_wrong(peers: Peers) -> str:
    host, port = peers.coordinator.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except socket.gaierror:
        return f"no host of the name {host} is known here, where process 0 should run"
    except OSError as error:
        return (
            f"nothing answers there ({error}): process 0 has not started, has ended, runs on another host, or a "
            f"firewall closes port {port}"
        )
    return (
        "process 0 is there, but not all others are: look for the process whose log is missing or ends with an error, "
        f"and check that all are told the same number of processes, {peers.count}"
    )


def _emulate_devices(mesh: MeshConfig, processes: int) -> None:
    """Only the CPU backend reads this setting: accelerators are left as they are."""
    sizes = [size for size in axis_sizes(mesh).values() if size != -1]
    wanted = math.prod(sizes)
    chosen_by_user = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if wanted > processes and wanted % processes == 0 and not chosen_by_user and not _backend_started():
        jax.config.update("jax_num_cpu_devices", wanted // processes)


def _backend_started() -> bool:
    return xla_bridge.backends_are_initialized()


# --- Keeping in step ------------------------------------------------------------------------------------------------


def barrier(name: str) -> None:
    """Waits, for a day if need be, until every process has come here; ends with an error when one of them dies.

    Asks the coordination service, not the devices: their collectives time out while one process tokenizes.
    """
    if jax.process_count() > 1:
        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(f"{name} {next(_barriers)}", 24 * 3600 * 1000)


def gather_texts(text: str) -> list[str]:
    """Every process's text, by process number. All must call it, in the same order; waits as `barrier` does."""
    if jax.process_count() == 1:
        return [text]
    client = distributed.global_state.client
    assert client is not None
    key = f"texts {next(_barriers)}"
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    return [client.blocking_key_value_get(f"{key}/{i}", 24 * 3600 * 1000) for i in range(jax.process_count())]
