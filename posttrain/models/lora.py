"""Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021): which weights have one, how it starts, how it merges.

An adapter is two parameters beside a linear layer's `kernel`, stacked over the layers as that is: `lora_a`
`[L, *inputs, r]` and `lora_b` `[L, r, *outputs]`, experts' with their dim behind the layers'. `Linear` adds
`scale (x A) B` to its output, so that W + A B is never formed and W has no gradient. `experiment.py` puts adapters into
a described decoder before anything is placed; `peft.py` reads and writes them as PEFT does.

Layers without an adapter, where only a range of them has one, hold zeros, and `Adapter.trained` keeps them so.
"""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped, UInt32

from posttrain.config import LoraConfig
from posttrain.errors import UserError, UserErrors
from posttrain.models.decoder import AbstractDecoder, Decoder
from posttrain.models.layers import Linear
from posttrain.models.moe import ExpertLinear
from posttrain.parallel.sharding import Selection, flatten, select, unflatten
from posttrain.records import Params

ALL = "all-linear"

Adaptable = Linear | ExpertLinear


@dataclass(frozen=True)
class Adapter:
    """Which weights are adapted, and how."""

    ranks: Mapping[str, tuple[int, ...]]
    """By module (`layers/attn/q`): the rank in each layer; 0 where there is no adapter."""
    scales: Mapping[str, float]
    """By module: what the low-rank product is multiplied by."""
    alpha: float
    use_rslora: bool
    dropout: float

    def trained(self) -> dict[str, Selection]:
        """The adapter's parameters, and in which layers they exist."""
        chosen = {}
        for module, ranks in self.ranks.items():
            layers = np.array(ranks) > 0
            for name in ("lora_a", "lora_b"):
                chosen[f"{module}/{name}"] = True if layers.all() else layers
        return chosen

    def split(self, params: Params) -> tuple[Params, Params]:
        """(the adapter's parameters, the others), both nested."""
        leaves, own = flatten(params), self.trained()
        return (
            unflatten({path: leaf for path, leaf in leaves.items() if path in own}),
            unflatten({path: leaf for path, leaf in leaves.items() if path not in own}),
        )

    def weights(self, decoder: AbstractDecoder, experts_per_token: int) -> int:
        """Numbers of the adapter that a token is multiplied with."""
        total = 0
        for path, module in linear_modules(decoder).items():
            sizes, cut = kernel_shape(module), input_stop(module)
            lead = sizes[1 : input_start(module)]
            width = math.prod(sizes[input_start(module) : cut]) + math.prod(sizes[cut:])
            total += sum(self.ranks.get(path, ())) * width * (experts_per_token if lead else 1)
        return total

    def describe(self) -> str:
        """In a line."""
        used = sorted({rank for ranks in self.ranks.values() for rank in ranks} - {0})
        scale = "alpha / sqrt(r)" if self.use_rslora else "alpha / r"
        return f"r {', '.join(map(str, used))}, alpha {self.alpha:g} ({scale}) on {', '.join(self.ranks)}"


def scale_of(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r), which keeps the output's size as r grows (rsLoRA, Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def linear_modules(decoder: AbstractDecoder) -> dict[str, Adaptable]:
    """The layers' linear modules by path, but for routers; stacked, and their parameters are shapes."""
    return linears(nnx.merge(decoder.graph, decoder.shapes))


def linears(model: Decoder) -> dict[str, Adaptable]:
    """The same of a model that is at hand."""
    found = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Adaptable)
        and (module.kernel is None or "router" not in module.kernel.get_metadata("axes"))
    }
    return dict(sorted(found.items()))


def kernel_shape(module: Adaptable) -> tuple[int, ...]:
    """`[L, *inputs, *outputs]`, of experts `[L, E, in, out]`."""
    return tuple(module.kernel.get_value().shape)


def input_start(module: Adaptable) -> int:
    """The first input dim of the stacked kernel."""
    return 2 if isinstance(module, ExpertLinear) else 1


def input_stop(module: Adaptable) -> int:
    """The first output dim."""
    return 3 if isinstance(module, ExpertLinear) else 1 + module.input_count


def choose(config: LoraConfig, decoder: AbstractDecoder, names: Mapping[str, Collection[str]]) -> Adapter:
    """The adapter that a config with a rank describes. `names` says what each module is called in checkpoints.

    Raises `UserErrors` for targets that name nothing.
    """
    assert config.r is not None
    modules = linear_modules(decoder)
    shapes = {path: kernel_shape(module) for path, module in modules.items()}
    known = {name for called in names.values() for name in called}
    named = [word for word in config.target_modules if word == ALL or word in known]
    chosen: dict[str, Selection] = {path: ALL in named or any(n in names[path] for n in named) for path in modules}
    patterns = [word for word in config.target_modules if word not in named]
    try:
        matched = select(patterns, shapes, "model.lora.target_modules")
    except UserErrors as error:
        hint = f"names of this model are {ALL}, {', '.join(sorted(known))}"
        raise UserErrors([f"{problem}; {hint}" for problem in error.problems]) from error
    ranks = {}
    for path, shape in shapes.items():
        layers = np.broadcast_to(chosen[path], shape[:1]) | matched[path]
        if layers.any():
            ranks[path] = tuple(config.r if has else 0 for has in layers)
    if not ranks:
        raise UserErrors(["model.lora.target_modules is empty: nothing would be trained; all-linear is the default"])
    scale = scale_of(config.alpha, config.r, config.use_rslora)
    return Adapter(ranks, dict.fromkeys(ranks, scale), config.alpha, config.use_rslora, config.dropout)


# ---- structure ------------------------------------------------------------------------------------------------------


def attach(decoder: AbstractDecoder, adapter: Adapter, dtype: DTypeLike) -> AbstractDecoder:
    """The decoder with the adapter's parameters, of this dtype, beside its own."""
    model = nnx.merge(decoder.graph, decoder.shapes)
    shapes, axes = flatten(decoder.shapes), dict(decoder.axes)
    for path, module in linears(model).items():
        if path not in adapter.ranks:
            continue
        sizes, names = kernel_shape(module), ("layers", *module.kernel.get_metadata("axes"))
        start, stop, rank = input_start(module), input_stop(module), max(adapter.ranks[path])
        a = ((*sizes[:stop], rank), (*names[:stop], "lora_rank"))
        b = ((*sizes[:start], rank, *sizes[stop:]), (*names[:start], "lora_rank", *names[stop:]))
        for name, (shape, dims) in (("lora_a", a), ("lora_b", b)):
            leaf = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            setattr(module, name, nnx.data(nnx.Param(leaf, axes=dims[1:])))
            shapes[f"{path}/{name}"], axes[f"{path}/{name}"] = leaf, dims
        module.lora_scale = adapter.scales[path]
    return AbstractDecoder(nnx.split(model)[0], unflatten(shapes), axes, decoder.options)


@dataclass(frozen=True)
class Dropout:
    """A decoder that drops adapter inputs, by keys that are merged into its parameters."""

    decoder: AbstractDecoder
    modules: tuple[str, ...]
    layers: int

    def keys(self, key: Array, rows: Int[Array, " B"]) -> Params:
        """Keys for the rows with these numbers within the global batch: they depend on `key`, row, layer and module
        only, so neither the mesh nor the split into micro-batches changes what is dropped."""
        layers = jnp.arange(self.layers, dtype=jnp.uint32)

        def of_module(module: str) -> UInt32[Array, "L B 2"]:
            own = jax.random.fold_in(key, np.uint32(zlib.crc32(module.encode())))
            fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
            return jax.random.key_data(fold(jax.vmap(jax.random.fold_in, (None, 0))(own, layers), rows))

        return unflatten({f"{module}/dropout_keys": of_module(module) for module in self.modules})


def with_dropout(decoder: AbstractDecoder, adapter: Adapter) -> Dropout | None:
    """For training with dropout; None where there is none. `decoder` has the adapter. Raises `UserError` where experts
    have one."""
    if not adapter.dropout:
        return None
    model = nnx.merge(decoder.graph, decoder.shapes)
    for path, module in linears(model).items():
        if path not in adapter.ranks:
            continue
        if isinstance(module, ExpertLinear):
            raise UserError(
                f"model.lora.dropout = {adapter.dropout}: {path} has experts, whose adapters take none (PEFT's do not "
                "either); set it to 0, or leave the experts out of target_modules"
            )
        module.dropout = adapter.dropout
        module.dropout_keys = nnx.data(nnx.Param(jax.ShapeDtypeStruct((), jnp.uint32)))
    layers = len(next(iter(adapter.ranks.values())))
    return Dropout(replace(decoder, graph=nnx.split(model)[0]), tuple(adapter.ranks), layers)


# ---- values ---------------------------------------------------------------------------------------------------------


def initial_values(
    adapter: Adapter, abstract: Mapping[str, jax.ShapeDtypeStruct], decoder: AbstractDecoder, seed: int
) -> dict[str, Shaped[Array, "..."]]:
    """A new adapter of `decoder`, placed as `abstract` says (by path): A uniform within 1 / sqrt(inputs), as PEFT draws
    it (`kaiming_uniform_` with a = sqrt(5)), B zero, so that the model starts as it is without. The same on any mesh.
    """

    modules = linear_modules(decoder)

    def draw() -> dict[str, Array]:
        key = jax.random.key(seed)
        values = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
        for module, ranks in adapter.ranks.items():
            path = f"{module}/lora_a"
            leaf = abstract[path]
            own = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
            bound = 1.0 / math.sqrt(math.prod(leaf.shape[input_start(modules[module]) : -1]))
            drawn = jax.random.uniform(own, leaf.shape, jnp.float32, -bound, bound)
            exists = np.arange(leaf.shape[-1]) < np.array(ranks)[:, None]
            exists = exists.reshape(len(ranks), *(1,) * (len(leaf.shape) - 2), -1)
            values[path] = jnp.where(exists, drawn, 0.0).astype(leaf.dtype)
        return values

    shardings = {path: leaf.sharding for path, leaf in abstract.items()}
    return jax.jit(draw, out_shardings=shardings)()


def merge_adapter(params: Params, adapter: Adapter, decoder: AbstractDecoder) -> Params:
    """The parameters of the model without adapter that computes the same: W + scale A B, added in f32, placed as W is.
    `decoder` is described without the adapter. The arrays of `params` that change are given up."""
    own, base = (flatten(part) for part in adapter.split(params))
    modules = linear_modules(decoder)
    for module in adapter.ranks:
        kernel, experts = base[f"{module}/kernel"], isinstance(modules[module], ExpertLinear)
        merged = jax.jit(_merged, static_argnums=(3, 4), donate_argnums=0, out_shardings=kernel.sharding)
        a, b = own[f"{module}/lora_a"], own[f"{module}/lora_b"]
        base[f"{module}/kernel"] = merged(kernel, a, b, adapter.scales[module], experts)
    return unflatten(base)


def _merged(
    kernel: Float[Array, "L ..."], a: Float[Array, "L ..."], b: Float[Array, "L ..."], scale: float, experts: bool
) -> Float[Array, "L ..."]:
    def one(w: Array, a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32) * scale, b.astype(jnp.float32)
        change = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (w.astype(jnp.float32) + change).astype(w.dtype)

    of_layer = jax.vmap(one) if experts else one
    return jax.lax.map(lambda leaves: of_layer(*leaves), (kernel, a, b))
