"""Loss over a whole data set without training: held-out loss in the loop, and the `evaluate` command."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from posttrain.data.packed import PackedDataset
from posttrain.parallel.sharding import global_batch, local_rows
from posttrain.records import Batch, Difference, Metric, Params, Scalars, Statistics
from posttrain.train.step import LossSums, make_eval_step, make_gradient_step, report


def global_batches(
    data: PackedDataset, mesh: Mesh, rows: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Batch]]:
    """(step, device batch `[A, rows, T]`) of steps `start` to `stop`; every process reads only its devices' rows."""
    accumulation = data.global_batch_size // rows
    numbers = local_rows(mesh, accumulation, rows)
    for step, local in data.loader(numbers, start, stop):
        yield step, global_batch(local, numbers, mesh, accumulation, rows)


def _add(total: Any, part: Any) -> Any:
    """Adds up sums and combines metrics; `None` is nothing yet."""
    if total is None:
        return part
    if isinstance(part, Metric | Difference):
        return total.plus(part)
    if isinstance(part, dict):
        return {name: _add(total[name], value) for name, value in part.items()}
    return total + part


class DatasetLoss:
    """The loss of whole data sets under one compiled step."""

    def __init__(
        self,
        loss: LossSums,
        mesh: Mesh,
        rows: int,
        prepare: Callable[[Params, Batch], Batch] = lambda params, batch: batch,
        split: Callable[[Params], tuple[Params, Params]] = lambda params: (params, {}),
    ):
        """`prepare` is what every batch passes through first, such as a reference model; `split` says which parameters
        have a gradient."""
        self._loss, self._mesh, self._rows, self._prepare = loss, mesh, rows, prepare
        self._step = jax.jit(make_eval_step(loss))
        self._gradient_step = jax.jit(make_gradient_step(loss, split))
        self._weights = jax.jit(loss.totals)
        self._statistics_step = jax.jit(loss.statistics)

    def _batches(self, params: Params, data: PackedDataset) -> Iterator[Batch]:
        """One epoch."""
        for _, batch in global_batches(data, self._mesh, self._rows, stop=data.steps_per_epoch[0]):
            yield self._prepare(params, batch)

    def _statistics(self, params: Params, data: PackedDataset) -> Statistics:
        """What the objective must know of the whole set; nothing, for most."""
        total = None
        for batch in self._batches(params, data) if self._loss.objective.needs_statistics else ():
            total = _add(total, jax.block_until_ready(self._statistics_step(params, batch)))
        return {name: metric.value() for name, metric in (total or {}).items()}

    def __call__(self, params: Params, data: PackedDataset) -> dict[str, float]:
        """`loss`, the terms and the metrics over all rows; every total spans the whole set."""
        sums, totals, metrics = None, None, None
        with jax.set_mesh(self._mesh):
            statistics = self._statistics(params, data)
            for batch in self._batches(params, data):
                parts = jax.block_until_ready(self._step(params, batch, statistics))
                sums, totals, metrics = _add(sums, parts[0]), _add(totals, parts[1]), _add(metrics, parts[2])
        return self._report(sums, totals, metrics)

    def gradients(self, params: Params, data: PackedDataset) -> tuple[dict[str, float], Params]:
        """The same, and the gradient of the loss over the whole set, f32, placed as the parameters are."""
        with jax.set_mesh(self._mesh):
            totals = None
            for batch in self._batches(params, data):
                totals = _add(totals, jax.block_until_ready(self._weights(batch)))
            statistics = self._statistics(params, data)
            total, sums, metrics = None, None, None
            for batch in self._batches(params, data):
                gradients, *parts = jax.block_until_ready(self._gradient_step(params, batch, totals, statistics))
                total = _add(total, gradients)
                sums, metrics = _add(sums, parts[0]), _add(metrics, parts[1])
        assert total is not None
        return self._report(sums, totals, metrics), total

    def _report(self, sums: Any, totals: Any, metrics: Any) -> dict[str, float]:
        values: Scalars = report(self._loss.objective, sums, totals, metrics)
        return {name: float(np.asarray(value)) for name, value in values.items()}
