"""Loss over a whole data set without training: held-out loss in the loop, and the `evaluate` command."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from posttrain.data.packed import PackedDataset
from posttrain.parallel.sharding import global_batch, local_rows
from posttrain.records import Batch, Metric, Params
from posttrain.train.step import LossSums, Scalars, make_eval_step, make_gradient_step, report


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
    if isinstance(part, Metric):
        stacked = Metric(jnp.stack([total.total, part.total]), jnp.stack([total.weight, part.weight]), part.reduction)
        return stacked.over_micro_batches()
    if isinstance(part, dict):
        return {name: _add(total[name], value) for name, value in part.items()}
    return total + part


class DatasetLoss:
    """The loss of whole data sets under one compiled step."""

    def __init__(self, loss: LossSums, mesh: Mesh, rows: int, prepare: Callable[[Batch], Batch] = lambda batch: batch):
        """`prepare` is what every batch passes through first, such as a reference model."""
        self._loss, self._mesh, self._rows, self._prepare = loss, mesh, rows, prepare
        self._step = jax.jit(make_eval_step(loss))
        self._gradient_step = jax.jit(make_gradient_step(loss))
        self._weights = jax.jit(loss.totals)

    def _batches(self, data: PackedDataset) -> Iterator[Batch]:
        """One epoch."""
        for _, batch in global_batches(data, self._mesh, self._rows, stop=data.steps_per_epoch[0]):
            yield self._prepare(batch)

    def __call__(self, params: Params, data: PackedDataset) -> dict[str, float]:
        """`loss`, the terms and the metrics over all rows; every total spans the whole set."""
        sums, totals, metrics = None, None, None
        with jax.set_mesh(self._mesh):
            for batch in self._batches(data):
                parts = jax.block_until_ready(self._step(params, batch))
                sums, totals, metrics = _add(sums, parts[0]), _add(totals, parts[1]), _add(metrics, parts[2])
        return self._report(sums, totals, metrics)

    def gradients(self, params: Params, data: PackedDataset) -> tuple[dict[str, float], Params]:
        """The same, and the gradient of the loss over the whole set, f32, placed as the parameters are."""
        with jax.set_mesh(self._mesh):
            totals = None
            for batch in self._batches(data):
                totals = _add(totals, jax.block_until_ready(self._weights(batch)))
            total, sums, metrics = None, None, None
            for batch in self._batches(data):
                gradients, *parts = jax.block_until_ready(self._gradient_step(params, batch, totals))
                total = _add(total, gradients)
                sums, metrics = _add(sums, parts[0]), _add(metrics, parts[1])
        assert total is not None
        return self._report(sums, totals, metrics), total

    def _report(self, sums: Any, totals: Any, metrics: Any) -> dict[str, float]:
        values: Scalars = report(self._loss.objective, sums, totals, metrics)
        return {name: float(np.asarray(value)) for name, value in values.items()}
