"""Mixture of experts in the place of a layer's MLP: a router, a dispatch that drops no token, the experts.

`block.py` builds `MoE` where `DecoderConfig.moe` is set. Routing is per token and never sees padding: a padded token
goes to no expert, gets zero, and counts in no statistic. The statistics leave through `Decoder.hidden_and_router`;
`objectives/router.py` makes losses of them.

On a mesh the layer runs inside `shard_map`, every device sorting its own tokens. Experts are split over `expert`,
their width F over `tensor` and D over `fsdp` (gathered for the layer, so that its gradient is reduce-scattered). The
devices of an `expert` axis gather each other's tokens, compute what falls to their own experts, and reduce-scatter the
results: exact whatever the balance, since there is room for every token to go to the same device. Against an
all-to-all, which sends a token only where it goes, the wire carries `axis size / num_experts_per_tok` times the bytes:
no more for 8 experts a token on an axis of up to 8, four times as much for 2 on 8. The room is
`axis size * num_experts_per_tok` rows of D and F for each token of a device, in either scheme; what is multiplied is
what was routed there.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from posttrain.models.architecture import DecoderConfig, MoEConfig
from posttrain.models.contract import gather_shards
from posttrain.models.grouped import grouped_matmul
from posttrain.models.layers import ACTIVATIONS, Linear, parameter
from posttrain.parallel.sharding import split_axes
from posttrain.records import RouterStats

Parts = dict[str, Array]
"""The arrays of an `ExpertLinear`, by name."""


class ExpertLinear(nnx.Module):
    """A matrix W for each expert, `[E, in, out]`.

    As beside a `Linear`, `lora.py` may put an adapter beside every one: `y = x W + scale x A B`; W may be quantised.
    """

    def __init__(
        self, experts: int, inputs: dict[str, int], outputs: dict[str, int], *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        dims = {"experts": experts, **inputs, **outputs}
        self.kernel = parameter(rngs, list(dims.values()), list(dims), "normal", dtype)
        self.quantized: Callable[[Array, Array], Array] | None = None
        """With it, `kernel` is made of `kernel_q` and `kernel_scale`."""
        self.kernel_q = self.kernel_scale = None
        self.lora_a = self.lora_b = None
        """`[E, in, r]` and `[E, r, out]`."""
        self.lora_scale = 1.0

    def weight(self) -> Float[Array, "E C O"]:
        """W."""
        if self.quantized is None or self.kernel_q is None or self.kernel_scale is None:
            return self.kernel[...]
        return self.quantized(self.kernel_q[...], self.kernel_scale[...])

    def parts(self) -> Parts:
        """What `_product` needs."""
        if self.lora_a is None or self.lora_b is None:
            return {"kernel": self.weight()}
        a = self.lora_a[...]
        a = a * jnp.asarray(self.lora_scale, a.dtype)
        return {"kernel": self.weight(), "lora_a": a, "lora_b": self.lora_b[...]}


class MoE(nnx.Module):
    """`sum over the chosen experts of weight * down(act(gate(x)) * up(x))` (Shazeer et al. 2017; Mixtral, 2024)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        moe = config.moe
        assert moe is not None
        self.config, self.activation = moe, config.hidden_act
        embed, width = {"expert_embed": config.hidden_size}, {"mlp": moe.moe_intermediate_size}
        make = functools.partial(ExpertLinear, moe.num_experts, rngs=rngs, dtype=dtype)
        router = {"router": moe.num_experts}
        self.router = Linear({"embed": config.hidden_size}, router, bias=False, rngs=rngs, dtype=dtype)
        self.gate, self.up, self.down = make(embed, width), make(embed, width), make(width, embed)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], implementation: str
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """What the experts make of the real tokens (zero for the others), and what the router did with them.

        `implementation` is one of `grouped.IMPLEMENTATIONS`.
        """
        # In f32 whatever the compute dtype: rounded logits choose other experts.
        logits = jnp.einsum("btd,de->bte", x, self.router.weight(), preferred_element_type=jnp.float32)
        experts = self.gate.parts(), self.up.parts(), self.down.parts()
        place = _layout(x, experts[0]["kernel"])
        mix = functools.partial(_mix, self.config, ACTIVATIONS[self.activation], implementation, place)
        if place.on_mesh:
            tokens = PartitionSpec(place.rows, place.tokens)
            within, out = place.specs(place.embed, place.width), place.specs(place.width, place.embed)
            specs = tuple({n: s[n] for n in parts} for s, parts in zip((within, within, out), experts, strict=True))
            # Not checked for replication: kernels do not say over which axes their results vary.
            mix = jax.shard_map(
                mix, in_specs=(tokens, tokens, tokens, specs), out_specs=(tokens, tokens), check_vma=False
            )
        mixed, chosen = mix(x, logits, real, experts)
        return mixed, _router_stats(logits, chosen, real)


# ---- on one device, among others ------------------------------------------------------------------------------------

Axes = tuple[str, ...]


class _Layout(NamedTuple):
    """Over which mesh axes dims are split; nothing is without a mesh."""

    on_mesh: bool = False
    rows: Axes = ()
    tokens: Axes = ()
    experts: Axes = ()
    embed: Axes = ()
    width: Axes = ()

    def specs(self, inputs: Axes, outputs: Axes) -> dict[str, PartitionSpec]:
        """Of an `ExpertLinear`'s parts."""
        return {
            "kernel": PartitionSpec(self.experts, inputs, outputs),
            "lora_a": PartitionSpec(self.experts, inputs, None),
            "lora_b": PartitionSpec(self.experts, None, outputs),
        }


def _layout(x: Float[Array, "B T D"], gate: Float[Array, "E D F"]) -> _Layout:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _Layout()
    dims = {"rows": x.shape[0], "tokens": x.shape[1]}
    dims |= dict(zip(("experts", "expert_embed", "mlp"), gate.shape, strict=True))
    return _Layout(True, *(split_axes(name, size, mesh) for name, size in dims.items()))


def _mix(
    config: MoEConfig,
    activation: Callable[[Array], Array],
    implementation: str,
    place: _Layout,
    x: Float[Array, "B T D"],
    logits: Float32[Array, "B T E"],
    real: Bool[Array, "B T"],
    experts: tuple[Parts, Parts, Parts],
) -> tuple[Float[Array, "B T D"], Int32[Array, "B T k"]]:
    """The experts' sum for this device's tokens, and which experts these are.

    All arrays are the device's part of the whole, as `place` splits it.
    """
    weights, chosen = _route(logits, config)
    gate, up, down = (
        _gather_embed(parts, dims, place.embed)
        for parts, dims in zip(experts, (INTO_WIDTH, INTO_WIDTH, OUT_OF_WIDTH), strict=True)
    )
    tokens = (x, weights, jnp.where(real[..., None], chosen, config.num_experts))
    exchange = bool(place.experts) and set(place.experts) <= set(place.rows)
    if exchange:
        tokens = tuple(lax.all_gather(part, place.experts, axis=0, tiled=True) for part in tokens)
    held = gate["kernel"].shape[0]
    first = lax.axis_index(place.experts) * held if place.experts else 0
    local = tokens[2] - first
    local = jnp.where((local >= 0) & (local < held), local, held)
    product = functools.partial(_product, implementation)

    def expert(rows: Float[Array, "M D"], sizes: Int[Array, " e"]) -> Float[Array, "M D"]:
        return product(activation(product(rows, gate, sizes)) * product(rows, up, sizes), down, sizes)

    out = _dispatched(expert, tokens[0], tokens[1], local, held)
    if exchange:
        out = lax.psum_scatter(out, place.experts, scatter_dimension=0, tiled=True)
    elif place.experts:
        out = lax.psum(out, place.experts)
    return lax.psum(out, place.width) if place.width else out, chosen


INTO_WIDTH, OUT_OF_WIDTH = {"kernel": 1, "lora_a": 1}, {"kernel": 2, "lora_b": 2}
"""Which dim of an `ExpertLinear`'s parts is the model width."""


def _gather_embed(parts: Parts, dims: dict[str, int], axes: Axes) -> Parts:
    """The parts with the whole model width; their gradient is summed over the axes and split again."""
    if not axes:
        return parts
    whole = {name: gather_shards(parts[name], axes, dim) for name, dim in dims.items() if name in parts}
    return parts | {name: checkpoint_name(part, "gathered") for name, part in whole.items()}


def _product(
    implementation: str, rows: Float[Array, "M C"], parts: Parts, sizes: Int[Array, " e"]
) -> Float[Array, "M O"]:
    """Each row times its expert's matrix."""
    out = grouped_matmul(rows, parts["kernel"], sizes, implementation=implementation)
    if "lora_a" in parts:
        low = grouped_matmul(rows, parts["lora_a"], sizes, implementation=implementation)
        out = out + grouped_matmul(checkpoint_name(low, "lora"), parts["lora_b"], sizes, implementation=implementation)
    return checkpoint_name(out, "experts")


def _route(logits: Float32[Array, "B T E"], config: MoEConfig) -> tuple[Float32[Array, "B T k"], Int32[Array, "B T k"]]:
    """The experts of each token, the best first, and their weights.

    The weights are the softmax over all experts, or over the chosen ones only with `norm_topk_prob`.
    """
    weights, chosen = lax.top_k(jax.nn.softmax(logits, axis=-1), config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


def _dispatched(
    expert: Callable[[Array, Array], Array],
    x: Float[Array, "B T D"],
    weights: Float32[Array, "B T k"],
    chosen: Int32[Array, "B T k"],
    held: int,
) -> Float[Array, "B T D"]:
    """`sum over k of weights * expert(x)`, `expert` being given rows sorted by expert. Choice `held` is no expert."""
    tokens = x.reshape(-1, x.shape[-1])
    choices = chosen.reshape(-1)
    order = jnp.argsort(choices, stable=True)
    place = jnp.argsort(order)
    # Compared and summed: a histogram would scatter.
    sizes = jnp.sum(choices[:, None] == jnp.arange(held)[None], axis=0, dtype=jnp.int32)
    rows = expert(_take_sorted(tokens, order, place), sizes)
    back = _take_back(rows, order, place).astype(jnp.float32)
    summed = jnp.einsum("mkd,mk->md", back.reshape(len(tokens), -1, x.shape[-1]), weights.reshape(len(tokens), -1))
    return summed.astype(x.dtype).reshape(x.shape)


# A permutation's transpose is its inverse: JAX would scatter.


@jax.custom_vjp
def _take_sorted(tokens: Float[Array, "M D"], order: Int[Array, "Mk"], place: Int[Array, "Mk"]) -> Float[Array, "Mk D"]:
    """Each token once for each of its choices, in this order."""
    return tokens[order // (len(order) // len(tokens))]


def _take_sorted_forward(tokens: Array, order: Array, place: Array) -> tuple[Array, tuple[Array, int]]:
    return _take_sorted(tokens, order, place), (place, len(tokens))


def _take_sorted_backward(residuals: tuple[Array, int], d_rows: Array) -> tuple[Array, None, None]:
    place, count = residuals
    return d_rows[place].reshape(count, -1, d_rows.shape[-1]).sum(1), None, None


_take_sorted.defvjp(_take_sorted_forward, _take_sorted_backward)


@jax.custom_vjp
def _take_back(rows: Float[Array, "Mk D"], order: Int[Array, "Mk"], place: Int[Array, "Mk"]) -> Float[Array, "Mk D"]:
    """The rows in the order of the tokens."""
    return rows[place]


def _take_back_forward(rows: Array, order: Array, place: Array) -> tuple[Array, Array]:
    return rows[place], order


def _take_back_backward(order: Array, d_rows: Array) -> tuple[Array, None, None]:
    return d_rows[order], None, None


_take_back.defvjp(_take_back_forward, _take_back_backward)


def _router_stats(
    logits: Float32[Array, "B T E"], chosen: Int32[Array, "B T k"], real: Bool[Array, "B T"]
) -> RouterStats:
    weight = real.astype(jnp.float32)
    experts = jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32).sum(2)
    return RouterStats(
        load=jnp.einsum("bte,bt->e", experts, weight),
        probability=jnp.einsum("bte,bt->e", jax.nn.softmax(logits, axis=-1), weight),
        squared_lse=jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * weight),
    )
