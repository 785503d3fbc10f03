"""What a run is made of: described, placed and ready to load. `experiment.py` builds these from a config."""

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from posttrain.config import Config
from posttrain.data.packed import segment_slots
from posttrain.data.pipeline import Datasets
from posttrain.data.tokenizer import Tokenizer
from posttrain.models import hf
from posttrain.models.architecture import DecoderConfig
from posttrain.models.classifier import is_reward_model
from posttrain.models.decoder import AbstractDecoder, Decoder
from posttrain.models.embeddings import NewRows
from posttrain.models.lora import Adapter, Dropout, initial_values, merge_adapter
from posttrain.models.peft import PeftModule, read_adapter, write_adapter
from posttrain.models.quantize import Quantization
from posttrain.parallel.sharding import Placement, batch_sharding, flatten, replicated, unflatten
from posttrain.records import Batch, Params, TrainState
from posttrain.train.checkpoint import Checkpoints
from posttrain.train.optim import Optimizer
from posttrain.train.step import LossSums, cast, merge

_CHUNK = 1 << 24


@dataclass(frozen=True)
class LoraSetup:
    """The adapter of a model, which trains while everything else is frozen."""

    adapter: Adapter
    base: AbstractDecoder
    """The decoder without it."""
    plain: AbstractDecoder
    """The same, with kernels as they are in the files: `base` may have them quantised."""
    modules: dict[str, PeftModule]
    """What PEFT calls what can be adapted."""
    dropout: Dropout | None = None
    path: Path | None = None
    """Where it starts from; None: a new one."""
    base_name: str = ""
    """Path or hub id of the model that it belongs to."""
    base_revision: str | None = None


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
    lora: LoraSetup | None = None
    quantized: Quantization | None = None
    """How the kernels are quantised, if they are; under LoRA only."""

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
        return self._abstract(self.decoder)

    def _abstract(self, decoder: AbstractDecoder) -> Params:
        leaves = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.placements[path].sharding)
            for path, leaf in flatten(decoder.shapes).items()
        }
        return unflatten(leaves)

    @property
    def base(self) -> "ModelSetup":
        """The model without its adapter."""
        return self if self.lora is None else replace(self, decoder=self.lora.base, lora=None)

    def in_dtype(self, dtype: Any) -> "ModelSetup":
        """The same, with all parameters of another dtype."""

        def other(decoder: AbstractDecoder) -> AbstractDecoder:
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), decoder.shapes)
            return replace(decoder, shapes=shapes)

        assert self.quantized is None
        lora = self.lora and replace(self.lora, base=other(self.lora.base), plain=other(self.lora.plain))
        return replace(self, decoder=other(self.decoder), lora=lora)

    def split(self, params: Params) -> tuple[Params, Params]:
        """(what belongs into a checkpoint, what `model.path` has): the adapter and the rest, or everything and
        nothing."""
        return (params, {}) if self.lora is None else self.lora.adapter.split(params)

    def load(self, seed: int = 0) -> Params:
        """The pretrained parameters, read straight into their places; `seed` is that of a new adapter."""
        if self.lora is not None:
            return merge(self.load_adapter(seed), self.base.load())
        if self.quantized is None:
            return hf.load_params(self.directory, self.config, self.abstract_params, self.new_rows)
        shardings = {path: placement.sharding for path, placement in self.placements.items()}
        change = partial(self.quantized.change, shardings=shardings)
        abstract = self._abstract(self.quantized.plain)
        return hf.load_params(self.directory, self.config, abstract, self.new_rows, change)

    def load_adapter(self, seed: int) -> Params:
        """The adapter alone, as it starts."""
        assert self.lora is not None
        abstract = flatten(self.split(self.abstract_params)[0])
        if self.lora.path is None:
            return unflatten(initial_values(self.lora.adapter, abstract, self.lora.plain, seed))
        _, values = read_adapter(self.lora.path, self.lora.modules, self.lora.plain)
        placed = {
            path: jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index, path=path, leaf=leaf: values[path][index].astype(leaf.dtype)
            )
            for path, leaf in abstract.items()
        }
        return unflatten(placed)

    def export(
        self,
        params: Params,
        directory: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        dtype: str = "original",
        merged: bool = False,
    ) -> None:
        """Writes a Hugging Face directory, or that of the adapter unless it is to be merged. All processes must call
        this. Raises `UserError` where the directory holds anything."""
        if self.lora is not None and not merged:
            write_adapter(
                directory,
                self.lora.adapter,
                params,
                self.lora.modules,
                base=self.lora.base_name,
                revision=self.lora.base_revision,
                dtype=dtype,
                tokenizer=tokenizer,
            )
            return
        if self.lora is not None:
            params = merge_adapter(params, self.lora.adapter, self.lora.plain)
        hf.export_hf(
            params,
            self.config,
            directory,
            raw_config=self.raw_config,
            dtype=dtype,
            tokenizer=tokenizer,
            generation_config=hf.load_generation_config(self.directory),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's config and weights: the files' content, about 1 s per GB."""
        digest = hashlib.sha256()
        for path in sorted([self.directory / "config.json", *self.directory.glob("*.safetensors")]):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()

    def model(self, params: Params) -> Decoder:
        """The decoder with these parameters in the compute dtype; call under jit."""
        return self.decoder.merge(cast(params, self.compute_dtype))


@dataclass(frozen=True)
class StepSetup:
    """All that the train step is compiled from: no data, no weights."""

    config: Config
    model: ModelSetup
    loss: LossSums
    optimizer: Optimizer
    accumulation: int
    """Accumulation steps per optimizer step."""
    micro_rows: int
    """Rows of one accumulation step, over all devices."""

    @property
    def mesh(self) -> Mesh:
        return self.model.mesh

    @property
    def adapter_weights(self) -> int | None:
        """Parameters of the adapter that a token is multiplied with; None without adapter."""
        lora, moe = self.model.lora, self.model.config.moe
        return None if lora is None else lora.adapter.weights(lora.plain, 1 if moe is None else moe.num_experts_per_tok)

    def abstract_batch(self) -> Batch:
        """Shapes and sharding of what the train step is fed."""
        objective, length = self.loss.objective, self.config.data.row_length
        slots = segment_slots(objective.rows, length, mismatched=objective.mismatched)
        sharding = batch_sharding(self.mesh)

        def shaped(dtype: Any, size: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.accumulation, self.micro_rows, size), dtype, sharding=sharding)

        ints = shaped(np.int32, length)
        batch = Batch(ints, ints, ints, shaped(np.float32, length))
        if slots is not None:
            batch = replace(batch, sides=shaped(np.int32, slots), margins=shaped(np.float32, slots))
        return replace(batch, ref_logps=shaped(np.float32, length)) if objective.needs_reference else batch

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of all that training changes."""
        params, whole = self.model.abstract_params, replicated(self.mesh)
        opt_state = self.optimizer.abstract_state(self.optimizer.split(params)[0], whole)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return TrainState(params, opt_state, step, jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole))


@dataclass(frozen=True)
class Experiment(StepSetup):
    """A config, built."""

    tokenizer: Tokenizer
    data: Datasets
    reference: ModelSetup | None = None
    """The model that the objective compares with, if it needs one."""

    def initial_state(self) -> TrainState:
        """The pretrained weights, a fresh optimizer, step 0."""
        params, whole = self.model.load(self.config.run.seed), replicated(self.mesh)

        def fresh() -> tuple[jax.Array, jax.Array]:
            return jnp.int32(0), jax.random.key_data(jax.random.key(self.config.run.seed))

        step, key = jax.jit(fresh, out_shardings=whole)()
        return TrainState(params, self.optimizer.init(self.optimizer.split(params)[0], whole), step, key)

    def saved(self, state: TrainState) -> TrainState:
        """What a checkpoint holds: under LoRA not the frozen weights."""
        return replace(state, params=self.model.split(state.params)[0])

    def restore(self, checkpoints: Checkpoints, step: int) -> tuple[TrainState, dict[str, Any]]:
        """State and meta of a checkpoint; what it does not hold is read from `model.path`."""
        state, meta = checkpoints.restore(step, self.saved(self.abstract_state()))
        if self.model.lora is not None:
            state = replace(state, params=merge(state.params, self.model.base.load()))
        return state, meta
