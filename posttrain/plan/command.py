"""`posttrain plan CONFIG [--topology v5p:4x4x4]`: will it fit, how long will it take, what will it cost."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from posttrain.config import Config
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import check_config
from posttrain.plan.compiles import request_of
from posttrain.plan.length import RunLength, run_length
from posttrain.plan.page import write_plan
from posttrain.plan.predict import plan_data, predict
from posttrain.plan.search_command import run_search, search_problems
from posttrain.plan.show import show, show_local, show_sharding
from posttrain.plan.topology import ENVIRONMENT, check_libtpu, check_topology, topology_text
from posttrain.train.chips import chip_of


@dataclass(frozen=True)
class PlanOptions:
    """What to plan for, beside the config."""

    topology: str = ""
    """Chips and how they are connected, of one slice: v5e:4x4, v6e:4x4, v5p:2x2x2, v4:2x2x4, tpu7x:2x2x1. Without
    it: the devices that are here, as training would take them; memory and work, no time."""
    slices: int = 1
    """How many such slices; between them runs mesh.replica, over the network of the hosts (DCN)."""
    tokens: float | None = None
    """Tokens to train on in all, for hours and cost, in rows that are full; default: what the data make, if they are
    there."""
    price: float | None = None
    """Of a chip hour, in any currency: tells the cost of the run, whose length --tokens or the data give."""
    sharding: bool = False
    """Also every parameter: over which axes it is split, and its bytes a device."""
    json: bool = False
    """One JSON object on standard output instead of tables: all that these say, and every parameter, kernel, loop and
    collective of the program."""
    html: str | None = None
    """Also write it as a page to this file (any path that epath opens)."""
    search: bool = False
    """Try meshes, remat policies, micro-batches and collective matmul, and rank what fits by predicted step time. Takes
    minutes for each that is compiled; what was compiled is kept, so that a search that was stopped goes on."""
    rows_per_device: str = ""
    """Of a search: try global batches of so many rows a device, such as 1,2,4, instead of train.global_batch_size."""
    jobs: int | None = None
    """Of a search: compilations at once; default: by the machine's cores and memory."""
    budget: float | None = None
    """Of a search: minutes, after which the best so far is shown; default: until nothing is likely to be better."""


def plan(config: Config, options: PlanOptions) -> None:
    """The command. Needs neither weights nor data nor a TPU: `config.json` is enough. Where the data are there, hours
    and cost are those of the run."""
    if problems := _problems(options):
        raise UserErrors(problems)
    if not options.topology:
        _plan_local(config, options)
        return
    check_libtpu()
    if options.search:
        run_search(config, options)
        return
    length, missing = _length(config, options)
    compiled = compile_in_worker(config, options.topology, options.slices)
    chip = chip_of(compiled["device_kind"])
    if chip is None:
        raise UserError(f"--topology {options.topology}: no published peaks are known for {compiled['device_kind']}")
    tokens = options.tokens if length is None else float(length.steps * compiled["work"]["tokens"])
    epoch = None if length is None else length.epoch_steps
    found = predict(compiled, chip, tokens=tokens, price=options.price, epoch_steps=epoch)
    data = plan_data(compiled, chip, found, topology=options.topology, slices=options.slices, length=length)
    title = topology_text(options.topology, options.slices)
    if options.html is not None:
        write_plan(data, options.html, name=config.model.path, title=title)
    if options.json:
        print(json.dumps(data))
        return
    show(data, found, title, chip.device.hbm_bytes, length=length, missing=missing)
    if options.sharding:
        show_sharding(compiled)


def _problems(options: PlanOptions) -> list[str]:
    """What is wrong with the options themselves."""
    problems = check_topology(options.topology, options.slices) if options.topology else []
    for name in ("tokens", "price"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            problems.append(f"--{name} {value}: must be above 0")
        if value is not None and not options.topology:
            problems.append(f"--{name}: time is predicted for chips only; name them with --topology")
    if not options.topology and options.slices != 1:
        problems.append(f"--slices {options.slices}: of what --topology names")
    if not options.topology and options.html is not None:
        problems.append("--html: the page is of a plan for chips; name them with --topology")
    return problems + search_problems(options)


def _plan_local(config: Config, options: PlanOptions) -> None:
    """For the devices that are here: memory and work, no time."""
    compiled = compile_in_worker(config, "", 1)
    if options.json:
        print(json.dumps(compiled))
        return
    show_local(compiled)
    if options.sharding:
        show_sharding(compiled)


def _length(config: Config, options: PlanOptions) -> tuple[RunLength | None, str]:
    """The run's length by its data, or why it is not known. Not asked for where `--tokens` is given."""
    if options.tokens is not None:
        return None, ""
    if problems := check_config(config):
        raise UserErrors(problems)
    try:
        return run_length(config), ""
    except UserError as error:
        first = error.problems[0] if isinstance(error, UserErrors) else str(error).splitlines()[0]
        if options.price is not None:
            raise UserError(
                f"--price: tells the cost of a run only if its length is known; give --tokens too, or data: {first}"
            ) from error
        return None, first


def compile_in_worker(config: Config, topology: str, slices: int) -> dict[str, Any]:
    """What `worker.compile_plan` says, computed in a process of its own; without a topology, of the devices that are
    here. Raises `UserErrors` with its problems."""
    request = request_of(config, topology, slices)
    what = f"compiling the train step for {topology or 'the devices that are here'}"
    console, started = Console(stderr=True), time.monotonic()
    with console.status(what) as status:
        worker = subprocess.Popen(
            [sys.executable, "-m", "posttrain.plan.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT if topology else None,
        )
        given: str | None = json.dumps(request)
        while True:
            try:
                answer, _ = worker.communicate(given, timeout=1)
                break
            except subprocess.TimeoutExpired:
                given = None  # it is sent
                status.update(f"{what}: {time.monotonic() - started:.0f} s")
            except BaseException:
                worker.kill()
                raise
    if worker.returncode != 0:
        raise UserError(f"{what}: the compiler failed (exit code {worker.returncode}); see above")
    compiled = json.loads(answer)
    if "problems" in compiled:
        raise UserErrors(compiled["problems"])
    return compiled
