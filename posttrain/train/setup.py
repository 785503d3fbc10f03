"""What a run is made of: described, placed and ready to load. `experiment.py` builds these from a config."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from posttrain.config import Config
from posttrain.data.pipeline import Datasets
from posttrain.data.tokenizer import Tokenizer
from posttrain.models import hf
from posttrain.models.classifier import is_reward_model
from posttrain.models.decoder import AbstractDecoder, Decoder, DecoderConfig
from posttrain.models.embeddings import NewRows
from posttrain.parallel.sharding import Placement, flatten, replicated, unflatten
from posttrain.records import Params, TrainState
from posttrain.train.optim import Optimizer
from posttrain.train.step import LossSums


@dataclass(frozen=True)
class ModelSetup:
    """A model that is described, placed on a mesh and ready to be loaded."""

    directory: Path
    config: DecoderConfig
    raw_config: dict[str, Any]
    decoder: AbstractDecoder
    mesh: Mesh
    placements: dict[str, Placement]
    compute_dtype: Any
    new_rows: NewRows = field(default_factory=NewRows)
    """Embedding rows of tokens that this run adds; `config` has them."""

    @property
    def vocabulary(self) -> str:
        """What a checkpoint must agree with beside shapes, as JSON."""
        return json.dumps({"size": self.config.vocab_size, "new_tokens": dict(self.new_rows.tokens)})

    @property
    def new_score(self) -> bool:
        """Whether it is a reward model that starts from a language model."""
        return bool(self.config.num_labels) and not is_reward_model(self.raw_config)

    @property
    def new_row_masks(self) -> dict[str, Bool[np.ndarray, "V"]]:
        """Which rows are of new tokens, by the paths of the input embedding and of an untied head."""
        shapes = flatten(self.decoder.shapes)
        tables = [path for path, axes in self.decoder.axes.items() if axes[0] == "vocab"]
        return {path: self.new_rows.mask(0, shapes[path].shape[0]) for path in tables}

    @property
    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the parameters."""
        leaves = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.placements[path].sharding)
            for path, leaf in flatten(self.decoder.shapes).items()
        }
        return unflatten(leaves)

    def load(self) -> Params:
        """The pretrained parameters, read straight into their places."""
        return hf.load_params(self.directory, self.config, self.abstract_params, self.new_rows)

    def model(self, params: Params) -> Decoder:
        """The decoder with these parameters in the compute dtype; call under jit."""
        return self.decoder.merge(jax.tree.map(lambda p: p.astype(self.compute_dtype), params))


@dataclass(frozen=True)
class Experiment:
    """A config, built."""

    config: Config
    model: ModelSetup
    tokenizer: Tokenizer
    data: Datasets
    loss: LossSums
    optimizer: Optimizer
    accumulation: int
    """Accumulation steps per optimizer step."""
    micro_rows: int
    """Rows of one accumulation step, over all devices."""
    reference: ModelSetup | None = None
    """The model that the objective compares with, if it needs one."""

    @property
    def mesh(self) -> Mesh:
        return self.model.mesh

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of all that training changes."""
        params, whole = self.model.abstract_params, replicated(self.mesh)
        trained, _ = self.optimizer.split(params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
        opt_state = jax.eval_shape(self.optimizer.init, trained)
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            opt_state,
            self.optimizer.state_shardings(trained, shardings, whole),
        )
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return TrainState(params, placed, step, jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole))

    def initial_state(self) -> TrainState:
        """The pretrained weights, a fresh optimizer, step 0."""
        abstract = self.abstract_state()
        params = self.model.load()

        def fresh(params: Params) -> tuple[Any, Any, Any]:
            key = jax.random.key_data(jax.random.key(self.config.run.seed))
            return self.optimizer.init(self.optimizer.split(params)[0]), jnp.int32(0), key

        rest = (abstract.opt_state, abstract.step, abstract.key)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, rest)
        opt_state, step, key = jax.jit(fresh, out_shardings=shardings)(params)
        return TrainState(params, opt_state, step, key)
