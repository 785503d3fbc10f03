"""The kernel for GPUs: its program, interpreted on CPU, against the formula in numpy float64; what it becomes for CUDA;
and where it is not used. No test here runs on a GPU."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from posttrain.errors import UserError
from posttrain.models import attention as module
from posttrain.models.architecture import DecoderConfig, LayerKind
from posttrain.models.attention import Windows, attention
from posttrain.models.attention_choice import choose_attention
from posttrain.models.gpu_attention import triton_attention
from posttrain.parallel.mesh import AXES
from tests.models.test_attention import LAYOUTS, causal_mask, draw, formula, segments

N, K, H = 4, 2, 8


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attention` with `triton` runs the kernel's program."""

    def interpreted(q: Any, k: Any, v: Any, segment_ids: Any, share: Any, windows: Windows, score: Any) -> Any:
        return triton_attention(q, k, v, segment_ids, scale=score.scale, interpret=True)

    monkeypatch.setitem(module.IMPLEMENTATIONS, "triton", interpreted)


def output_and_gradients(q: Any, k: Any, v: Any, ids: Any, dout: Any, **options: Any) -> list[np.ndarray]:
    @jax.jit
    def compute(q: Any, k: Any, v: Any, ids: Any) -> Any:
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, ids, implementation="triton", **options), q, k, v)
        return out, *vjp(jnp.asarray(dout, out.dtype))

    return [np.asarray(x, np.float64) for x in compute(q, k, v, ids)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_formula(layout: str, on_cpu: None) -> None:
    """Rows of 100 tokens: two blocks, the second one padded."""
    q, k, v, dout = draw(0, (2, 100, N, H), (2, 100, K, H), (2, 100, K, H), (2, 100, N, H))
    ids = segments(LAYOUTS[layout], 100)
    out, vjp = formula(q, k, v, causal_mask(ids), scale=0.3)
    found = output_and_gradients(q, k, v, ids, dout, scale=0.3)
    for value, expected in zip(found, (out, *vjp(dout)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=5e-6 * max(1.0, np.abs(expected).max()))
    assert not found[0][ids == 0].any()


def test_gradients_across_segments_are_exactly_zero(on_cpu: None) -> None:
    q, k, v, dout = draw(1, (1, 100, N, H), (1, 100, K, H), (1, 100, K, H), (1, 100, N, H))
    ids = segments([[30, 50]], 100)
    dout = np.where((ids == 2)[..., None, None], dout, 0).astype(np.float32)
    _, dq, dk, dv = output_and_gradients(q, k, v, ids, dout)
    for gradient in (dq, dk, dv):
        assert not gradient[ids != 2].any() and gradient[ids == 2].any()


def test_bfloat16_is_as_near_to_the_formula_as_its_inputs_are(on_cpu: None) -> None:
    q, k, v, dout = (
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
        for x in draw(2, (1, 100, N, H), (1, 100, K, H), (1, 100, K, H), (1, 100, N, H))
    )
    ids = segments([[60, 30]], 100)
    out, vjp = formula(q, k, v, causal_mask(ids))
    found = output_and_gradients(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), ids, dout)
    for value, expected in zip(found, (out, *vjp(dout)), strict=True):
        error = np.abs(value - expected) / np.abs(expected).max()
        assert error.max() < 2**-7 and error.mean() < 2**-11


def test_on_a_mesh(on_cpu: None) -> None:
    """Rows over `fsdp`, query heads over `tensor`, of which two devices share a key head."""
    q, k, v, dout = draw(3, (2, 64, 8, H), (2, 64, 2, H), (2, 64, 2, H), (2, 64, 8, H))
    ids = segments([[30, 20], [64]], 64)
    out, vjp = formula(q, k, v, causal_mask(ids))
    shape = tuple({"fsdp": 2, "tensor": 4}.get(axis, 1) for axis in AXES)
    with jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))):
        found = output_and_gradients(q, k, v, ids, dout)
    for value, expected in zip(found, (out, *vjp(dout)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=5e-6 * max(1.0, np.abs(expected).max()))


def lowered_for_cuda(policy: Any, dtype: Any = jnp.bfloat16) -> str:
    q, k = (jax.ShapeDtypeStruct((2, 200, heads, 64), dtype) for heads in (8, 2))

    def loss(q: Any, k: Any, v: Any, ids: Any) -> Any:
        attend = partial(attention, segment_ids=ids, implementation="triton")
        return jnp.square(jax.checkpoint(attend, policy=policy)(q, k, v).astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    traced = gradient.trace(q, k, k, jax.ShapeDtypeStruct((2, 200), jnp.int32))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_for_cuda_it_is_three_kernels_that_read_the_segments() -> None:
    text = lowered_for_cuda(jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse"))
    calls = [line for line in text.splitlines() if "custom_call @__gpu$xla.gpu.triton" in line]
    names = [re.search(r'name = "(\w+)"', line) for line in calls]
    assert sorted(name[1] for name in names if name) == ["mha_backward", "mha_forward", "mha_preprocess_backward"]
    with_segments = [name[1] for name, line in zip(names, calls, strict=True) if name and "tensor<2x256xi32>" in line]
    assert sorted(with_segments) == ["mha_backward", "mha_forward"]
    assert all("256x8x64xbf16" in line for line in calls)


def test_what_remat_saves_spares_the_second_forward_pass() -> None:
    policies = jax.checkpoint_policies
    spared = policies.save_only_these_names("attn_out", "attn_lse")
    calls = [len(re.findall(r"call @mha\w*\(", lowered_for_cuda(p))) for p in (spared, policies.nothing_saveable)]
    assert calls == [1, 2]


def config(**options: Any) -> DecoderConfig:
    return replace(DecoderConfig(250, 32, 48, 2, 4, 2, 8), **options)


def test_it_is_the_choice_on_gpus_for_models_that_it_can_serve() -> None:
    assert choose_attention("auto", "gpu", config()) == choose_attention("triton", "gpu", config()) == "triton"
    with pytest.raises(UserError, match="a kernel for GPUs, this is cpu; use auto, chunked"):
        choose_attention("triton", "cpu", config())


@pytest.mark.parametrize(
    ("options", "context", "said"),
    [
        ({"layer_kinds": (LayerKind(4096), LayerKind())}, 1, r"no windows \(this model's layers have 4096\)"),
        ({"attn_softcap": 50.0}, 1, r"no soft-cap \(this model has one of 50\)"),
        ({"head_dim": 256}, 1, r"no heads over 128 \(this model's have 256\)"),
        ({}, 2, r"no rows split over devices \(mesh.context is 2\)"),
    ],
)
def test_it_is_not_used_where_it_cannot_honour_the_model(
    options: dict[str, Any], context: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "posttrain"):
        assert choose_attention("auto", "gpu", config(**options), context) == "chunked"
    assert re.search(f"attention is chunked: the kernel for GPUs has {said}", caplog.text)
    with pytest.raises(UserError, match=f"model.attention = triton: it has {said}; use auto or chunked"):
        choose_attention("triton", "gpu", config(**options), context)
