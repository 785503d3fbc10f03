"""`posttrain evaluate CONFIG`: loss terms and metrics of a data set, and the gradient's norms, without training."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from posttrain.config import Config
from posttrain.errors import UserError
from posttrain.experiment import build
from posttrain.models.decoder import STACK
from posttrain.parallel.sharding import flatten
from posttrain.records import Params
from posttrain.train.checkpoint import Checkpoints
from posttrain.train.heldout import DatasetLoss
from posttrain.train.reference import with_reference
from posttrain.train.resume import check_model
from posttrain.train.setup import Experiment


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, beside the config."""

    json: bool = False
    """One JSON object on standard output instead of a table."""
    gradient_norms: bool = False
    """Also the norm of every parameter's gradient, layer by layer."""
    split: Literal["auto", "heldout", "train"] = "auto"
    """Which rows: the held-out ones, or one epoch of the training rows; auto: held-out if there are any."""
    checkpoint: Literal["none", "latest"] = "none"
    """none: the weights of model.path; latest: those of the run directory's last checkpoint."""


def evaluate(config: Config, options: EvaluateOptions) -> None:
    """The command."""
    one_epoch = {
        "train": config.train.model_copy(update={"max_steps": None}),
        "data": config.data.model_copy(update={"epochs": 1}),
    }
    experiment = build(config.model_copy(update=one_epoch))
    name, data = _choose_data(experiment, options)
    loss = DatasetLoss(
        experiment.loss, experiment.mesh, experiment.micro_rows, with_reference(experiment), experiment.model.split
    )
    params = _choose_params(experiment, options)
    values: dict[str, Any] = {"split": name, "samples": data.num_samples, "tokens": data.num_tokens}
    if options.gradient_norms:
        scalars, gradients = loss.gradients(params, data)
        values |= scalars | {"gradient_norms": gradient_norms(gradients)}
    else:
        values |= loss(params, data)
    if jax.process_index() != 0:
        return
    if options.json:
        print(json.dumps(values))
    else:
        _print_table(values)


def _choose_data(experiment: Experiment, options: EvaluateOptions) -> tuple[str, Any]:
    heldout = experiment.data.heldout
    if options.split == "heldout" and heldout is None:
        raise UserError("--split heldout: nothing is held out; set data.heldout.path or data.heldout.fraction")
    if options.split == "train" or heldout is None:
        return "train", experiment.data.train
    return "heldout", heldout


def _choose_params(experiment: Experiment, options: EvaluateOptions) -> Params:
    if options.checkpoint == "none":
        return experiment.model.load(experiment.config.run.seed)
    run_dir = epath.Path(experiment.config.run.dir)
    checkpoints = Checkpoints(run_dir, experiment.config.checkpoint)
    step = checkpoints.latest_step()
    if step is None:
        raise UserError(f"--checkpoint latest: there is no checkpoint in {checkpoints.directory}")
    check_model(run_dir, checkpoints.read_meta(step), experiment.model)
    state, _ = experiment.restore(checkpoints, step)
    return state.params


def gradient_norms(gradients: Params) -> dict[str, float]:
    """Euclidean norm of every parameter's gradient; stacked ones layer by layer, as `layers[3]/attn/q/kernel`."""
    norms: dict[str, float] = {}
    for path, leaf in flatten(gradients).items():
        if path.startswith(STACK):
            squares = jax.jit(lambda g: (g * g).reshape(g.shape[0], -1).sum(axis=1))(leaf)
            per_layer = np.sqrt(np.asarray(squares, np.float64))
            norms |= {f"layers[{i}]/{path.removeprefix(STACK)}": float(norm) for i, norm in enumerate(per_layer)}
        else:
            norms[path] = float(np.sqrt(np.asarray(jax.jit(lambda g: (g * g).sum())(leaf), np.float64)))
    return norms


def _print_table(values: dict[str, Any]) -> None:
    console = Console()
    table = Table("value", "number", title=f"{values['split']}: {values['samples']} samples, {values['tokens']} tokens")
    for name, value in values.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.6g}")
    console.print(table)
    if "gradient_norms" in values:
        norms = Table("parameter", "gradient norm")
        for name, value in values["gradient_norms"].items():
            norms.add_row(name, f"{value:.6g}")
        console.print(norms)
