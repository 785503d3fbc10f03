"""Checkpoints: the whole train state by step number, written in the background, restored onto any mesh.

A checkpoint is complete or not listed: it is written under a temporary name and renamed when all processes are done.
The position in the data is the step itself (see `data/pipeline.py`).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1

from posttrain.config import CheckpointConfig
from posttrain.errors import UserError, UserErrors
from posttrain.records import Params, TrainState

_policies = v1.training.preservation_policies
# It warns whenever a save waits for the one before it, which is what a save is meant to do.
logging.getLogger("absl").addFilter(lambda record: "Waiting for previous save" not in record.getMessage())

BEST_METRIC = "eval_loss"


class Checkpoints:
    """The checkpoints of one run, in `<run dir>/checkpoints/<step>`."""

    def __init__(self, run_dir: epath.Path, config: CheckpointConfig, *, read_only: bool = False):
        # The library wants absolute paths; those with a scheme are.
        self.directory = (run_dir if "://" in str(run_dir) else run_dir.resolve()) / "checkpoints"
        best = _policies.BestN(
            get_metric_fn=lambda metrics: metrics[BEST_METRIC],
            reverse=True,  # it keeps the end of the order: the lowest loss comes last
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        keep = [_policies.LatestN(config.keep_last)] + ([best] if config.keep_best else [])
        keep_any: Any = _policies.AnyPreservationPolicy(keep)  # its annotations disagree with each other
        self._checkpointer = v1.training.Checkpointer(
            self.directory,
            preservation_policy=keep_any,
            cleanup_tmp_directories=not read_only,
        )

    def latest_step(self) -> int | None:
        """The last complete checkpoint, if there is one."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        """All complete checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts writing; returns once the state's arrays may be changed. Waits for the save before it, and raises
        that one's error if it failed."""
        if step == self.latest_step():
            return
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": _as_dict(state), "meta": dict(meta)},
            force=True,
            metrics=None if metrics is None else dict(metrics),
        )

    def read_meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state. Raises `UserError` for a checkpoint that cannot be read."""
        with self._readable(step):
            return self._checkpointer.load_checkpointables(step, {"meta": None})["meta"]

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and meta of a checkpoint, placed by the shardings of `abstract`.

        Raises `UserErrors` naming every array that is missing, extra or of another shape, and `UserError` for one that
        cannot be read.
        """
        loaded = self._load(step, _as_dict(abstract), partial=False)
        return TrainState(**loaded["state"]), loaded["meta"]

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The parameters alone; errors as in `restore`."""
        return self._load(step, {"params": abstract}, partial=True)["state"]["params"]

    def _load(self, step: int, tree: dict[str, Any], *, partial: bool) -> dict[str, Any]:
        loading = v1.options.PyTreeOptions.Loading(partial_load=partial)
        with self._readable(step):
            found = self._checkpointer.checkpointables_metadata(step).metadata["state"]
            problems = _disagreements(tree, {name: found[name] for name in tree})
            if problems:
                raise UserErrors([f"{self.directory / str(step)}: {problem}" for problem in problems])
            with v1.Context(pytree_options=v1.options.PyTreeOptions(loading=loading)):
                return self._checkpointer.load_checkpointables(step, {"state": tree, "meta": None})

    @contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.directory / str(step)}: the checkpoint cannot be read: {error}\n"
                "If it is damaged, move that directory away: the run then goes on from the checkpoint before it."
            ) from error

    def wait(self) -> None:
        """Until everything is on disk. Raises the error of a save that failed."""
        self._checkpointer.wait()

    def close(self) -> None:
        """`wait`, then release the background threads."""
        self._checkpointer.close()


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step, "key": state.key}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {"/".join(_part(key) for key in path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _part(key: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def _disagreements(wanted: Any, found: Any) -> list[str]:
    want, have = _shapes(wanted), _shapes(found)
    missing = [f"{path}: not in the checkpoint" for path in want.keys() - have.keys()]
    extra = [f"{path}: in the checkpoint but not in this run" for path in have.keys() - want.keys()]
    other = [
        f"{path}: shape {have[path]} in the checkpoint, {want[path]} in this run"
        for path in want.keys() & have.keys()
        if want[path] != have[path]
    ]
    return sorted(missing) + sorted(extra) + sorted(other)
