"""The run, top to bottom, for every method: resume or start, compile once, step, evaluate, save, export."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
from etils import epath

from posttrain.errors import UserError
from posttrain.models.peft import CONFIG_FILE
from posttrain.parallel.processes import barrier
from posttrain.records import Params, Scalars, TrainState
from posttrain.train.checkpoint import BEST_METRIC, Checkpoints
from posttrain.train.chips import chip_of
from posttrain.train.flops import StepFlops, peak_flops
from posttrain.train.heldout import DatasetLoss, global_batches
from posttrain.train.metrics import Console, MetricsLog, Throughput
from posttrain.train.reference import with_reference
from posttrain.train.resume import check_model, check_resume, save_config
from posttrain.train.setup import Experiment, StepSetup
from posttrain.train.step import make_train_step
from posttrain.train.stop import StopRequest


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    stopped_by: int | None
    """The signal that ended it before its last step."""
    run_dir: epath.Path
    export_dir: epath.Path | None


class OneShape:
    """A function compiled once, ahead of time. A call with other shapes is an error that says which changed."""

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: jax.sharding.Mesh,
        *arguments: Any,
        donate: tuple[int, ...],
        options: Mapping[str, bool | int | float | str] = MappingProxyType({}),
    ):
        self._expected = [_shapes(argument) for argument in arguments]
        with jax.set_mesh(mesh):
            lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
            self.compiled = _compile(lowered, options)

    def __call__(self, *arguments: Any) -> Any:
        for position, (argument, expected) in enumerate(zip(arguments, self._expected, strict=True)):
            found = _shapes(argument)
            if found != expected:
                changed = [f"{k}: {found.get(k)} instead of {v}" for k, v in expected.items() if found.get(k) != v]
                raise RuntimeError(
                    f"argument {position} of the compiled step changed shape, which would compile a second time: "
                    + "; ".join(changed)
                )
        return self.compiled(*arguments)


def _compile(lowered: Any, options: Mapping[str, Any]) -> Any:
    try:
        return lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if not options or not reason.startswith("INVALID_ARGUMENT"):
            raise
        raise UserError(f"train.xla_options: {reason}; correct it or leave it out") from error


def _shapes(tree: Any) -> dict[str, tuple[Any, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def compile_step(setup: StepSetup) -> OneShape:
    """The train step, compiled for its mesh, with the config's options over those of the chip; the state is donated."""
    step = make_train_step(setup.loss, setup.optimizer)
    arguments, chip = (setup.abstract_state(), setup.abstract_batch()), chip_of(setup.mesh.devices.flat[0].device_kind)
    options = {**(chip.xla_options if chip else {}), **setup.config.train.xla_options}
    return OneShape(step, setup.mesh, *arguments, donate=(0,), options=options)


def run(experiment: Experiment) -> RunResult:
    """Trains from wherever the run directory stands to its last step, or until it is asked to stop."""
    config, data, mesh = experiment.config, experiment.data, experiment.mesh
    run_dir = epath.Path(config.run.dir)
    is_main = jax.process_index() == 0
    last_step = data.train.num_steps

    # --- The model to compare with, if the objective has one; unless online, it is gone before the other comes -------
    attach_reference = with_reference(experiment)

    checkpoints = Checkpoints(run_dir, config.checkpoint)
    console = Console(total_steps=last_step, is_main=is_main)
    start, state, meta = _where_it_stands(experiment, run_dir, checkpoints, console)
    tokens_seen = int(meta["num_tokens"])
    if is_main:
        save_config(run_dir, config, experiment.tokenizer.clock if experiment.tokenizer.writes_date else None)
    log = MetricsLog(run_dir, tensorboard=config.log.tensorboard, is_main=is_main, resume_step=start)

    # --- Compile, once ----------------------------------------------------------------------------------------------
    heldout_loss = DatasetLoss(experiment.loss, mesh, experiment.micro_rows, attach_reference)
    train_step = None
    if start < last_step:
        compile_start = time.monotonic()
        train_step = compile_step(experiment)
        console.note(f"compiled the train step in {time.monotonic() - compile_start:.1f} s")
        console.note(f"attention: {experiment.model.decoder.options.attention}")
    peak, peak_source = peak_flops(jax.devices())
    console.note(f"MFU is relative to {peak_source}")
    throughput = Throughput(total_steps=last_step - start, peak_flops=peak)
    flops = StepFlops(experiment.model.config, experiment.adapter_weights)

    def evaluate(step: int, params: Params) -> dict[str, float] | None:
        if data.heldout is None:
            return None
        values = {f"eval_{name}": value for name, value in heldout_loss(params, data.heldout).items()}
        log.log(step, values | {"epoch": data.train.epoch(step)})
        console.heldout(step, values)
        throughput.pause()
        return values

    def save(step: int, state: TrainState, values: dict[str, float] | None) -> None:
        log.sync()
        best = None if values is None else {BEST_METRIC: values[BEST_METRIC]}
        meta = {
            "num_tokens": tokens_seen,
            "data": data.fingerprint,
            "vocabulary": experiment.model.vocabulary,
            "base": experiment.model.fingerprint if experiment.model.lora else "",
            "head": experiment.loss.objective.head,
            "evaluated": values is not None,
        }
        checkpoints.save(step, experiment.saved(state), meta, best)
        throughput.pause()

    def is_due(step: int) -> bool:
        return step % config.checkpoint.every == 0 or step == last_step

    def is_evaluated(step: int) -> bool:
        return (
            step % config.evaluate.every == 0
            or step == last_step
            or (is_due(step) and bool(config.checkpoint.keep_best))
        )

    def read(step: int, logged: Scalars, work: float) -> None:
        """Waits for a step that was dispatched, and logs it."""
        nonlocal tokens_seen
        values = {name: float(value) for name, value in jax.device_get(logged).items()}
        tokens = int(values.pop("num_tokens"))
        tokens_seen += tokens
        if not values.pop("finite"):
            _on_nonfinite(experiment, run_dir, step, values, console)
        speed = throughput.step(tokens, work)
        if step % config.log.every == 0 or step == last_step:
            position = {"num_tokens": tokens_seen, "epoch": data.train.epoch(step), "global_step": step}
            log.log(step, values | position | speed)
        console.step(step, values | {"epoch": data.train.epoch(step)} | speed)

    # --- Train --------------------------------------------------------------------------------------------------------
    step, pending, stopped_by = start, None, None
    on_cpu = jax.default_backend() == "cpu"
    batches = global_batches(data.train, mesh, experiment.micro_rows, start)
    profile = _Profile(config.log.profile_steps, run_dir)
    with StopRequest(mesh) as stop, console, log, profile, contextlib.closing(checkpoints):
        if start == 0 or (is_evaluated(start) and not meta["evaluated"]):
            evaluate(start, state.params)
        for step, (index, batch) in enumerate(batches, start + 1):
            assert train_step is not None and index == step - 1
            profile.after(step - 1)
            state, logged = train_step(state, attach_reference(state.params, batch))
            if pending is not None:
                read(*pending)
            pending = (step, logged, flops(data.train, step - 1))
            stopped_by = stop.agreed()
            ends_here = stopped_by is not None or is_due(step) or is_evaluated(step)
            # Emulated devices share the cores: run-ahead buys nothing, and collectives that nobody awaits can hang.
            if on_cpu or ends_here:
                read(*pending)
                pending = None
            if ends_here:
                values = evaluate(step, state.params) if is_evaluated(step) and stopped_by is None else None
                if stopped_by is not None or is_due(step):
                    save(step, state, values)
            if stopped_by is not None:
                break

    # --- End ------------------------------------------------------------------------------------------------------
    finished = step >= last_step
    export_dir = None
    if finished and config.checkpoint.export_at_end:
        export_dir = export_once(experiment, state.params, run_dir / "export")
        console.note(f"exported to {export_dir}")
        if experiment.model.lora is not None:
            console.note(f"it holds the adapter alone; merged into its model: posttrain export {run_dir} OUT --merge")
    if not finished:
        console.note(f"stopped after step {step} of {last_step}, saved; the same command goes on from there")
    return RunResult(step, None if finished else stopped_by, run_dir, export_dir)


def _where_it_stands(
    experiment: Experiment, run_dir: epath.Path, checkpoints: Checkpoints, console: Console
) -> tuple[int, TrainState, dict[str, Any]]:
    """(steps done, state, what was saved beside it), from the last checkpoint or from the beginning. Raises `UserError`
    for a checkpoint of another run."""
    last_step = experiment.data.train.num_steps
    start = checkpoints.latest_step()
    differences = check_resume(run_dir, experiment.config, start)
    barrier("resume checked")
    for key, old, new in differences:
        console.note(f"resume: {key} was {old!r}, is {new!r}")
    if start is None:
        state = experiment.initial_state()
        console.note(f"starting at step 0 of {last_step} in {run_dir}")
        if asked := experiment.config.tokenizer.add_special_tokens:
            console.note(f"new tokens: {experiment.model.new_rows.describe(asked)}")
        if experiment.model.new_score:
            path = experiment.config.model.path
            console.note(f"the score head is new, so all scores start at 0: {path} is a language model")
        return 0, state, {"num_tokens": 0}
    check_model(run_dir, checkpoints.read_meta(start), experiment.model)
    state, meta = experiment.restore(checkpoints, start)
    if meta["data"] != experiment.data.fingerprint:
        raise UserError(
            f"{run_dir}: the training data is not what it was at step {start} (other files, rows or tokenizer); "
            "restore it, or use another run.dir"
        )
    console.note(f"resumed at step {start} of {last_step} from {run_dir}")
    return start, state, meta


def export_once(experiment: Experiment, params: Params, directory: epath.Path) -> epath.Path:
    """The directory of a finished run; one that is there already was written whole and is left alone."""
    if not any((directory / name).exists() for name in ("config.json", CONFIG_FILE)):
        experiment.model.export(params, directory, experiment.tokenizer)
    return directory


def _on_nonfinite(
    experiment: Experiment, run_dir: epath.Path, step: int, values: dict[str, float], console: Console
) -> None:
    """The step changed nothing; saves which rows it saw, then stops or goes on, as configured."""
    data, rows = experiment.data.train, experiment.config.train.global_batch_size
    described = {str(row): data.describe(step - 1, row) for row in range(rows)}
    file = run_dir / f"nonfinite-step-{step}.json"
    if jax.process_index() == 0:
        logged = {name: repr(value) for name, value in values.items()}
        file.write_text(json.dumps({"step": step, "logged": logged, "rows": described}))
    message = (
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: not finite; "
        f"parameters and optimizer were left as they were; the rows of the step are in {file}"
    )
    if experiment.config.train.on_nonfinite == "stop":
        raise UserError(f"{message}. To pass over such steps: train.on_nonfinite skip")
    console.note(message)


class _Profile(contextlib.AbstractContextManager):
    """A profile of some steps, `(first, last)` by how many were done before; shorter where the run ends earlier."""

    def __init__(self, steps: tuple[int, int] | None, run_dir: epath.Path):
        self._first, self._last = steps or (None, None)
        self._directory = run_dir / "profile"
        self._open = False

    def after(self, done: int) -> None:
        """Starts or ends it, before the next step."""
        if done == self._last:
            self._stop()
        elif done == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._open = True

    def _stop(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False

    def __exit__(self, *_: object) -> None:
        self._stop()
