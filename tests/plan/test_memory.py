"""What temporaries are for: programs whose arrays are counted by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from posttrain.plan.memory import temporaries

HLO = Path(__file__).parent.parent / "fixtures" / "hlo"
HEAD = "HloModule m, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, num_partitions=1\n"
FORWARD, BACKWARD = 'metadata={op_name="jit(f)/jvp()/mul"}', 'metadata={op_name="jit(f)/transpose(jvp())/mul"}'


def test_a_step_compiled_for_a_chip() -> None:
    """Six layers of 4096 rows a device, gradients in shards: at the most, within the backward pass."""
    found = temporaries((HLO / "step.txt").read_text(), {6 * 1024 * 4096})
    assert found.activations == 6 * 4096 * 4096 * 2, "every layer's input, in bf16"
    assert found.gradients == 6 * 1024 * 4096 * 4
    # Besides, the weights in bf16 (as many elements as the gradients), a layer's input and what comes back into it.
    weights, layer = 6 * 1024 * 4096 * 2, 4096 * 4096 * 2
    assert found.live == pytest.approx(found.activations + found.gradients + weights + 2 * layer, abs=1024)
    # XLA's own: its `peak_memory_in_bytes` less the arguments.
    assert found.live == pytest.approx(419_451_904, rel=1e-3)


def test_nothing_is_a_gradient_of_what_is_not_trained() -> None:
    found = temporaries((HLO / "step.txt").read_text(), set())
    assert (found.activations, found.gradients) == (6 * 4096 * 4096 * 2, 0)


def test_what_lies_in_vector_memory_is_not_counted() -> None:
    """All that this small program makes, so that XLA finds no temporaries; what is sliced into it is no second one."""
    found = temporaries((HLO / "fsdp.txt").read_text(), {6 * 256 * 1024})
    assert (found.activations, found.gradients) == (0, 0)
    assert found.live == pytest.approx(0, abs=1024)


@pytest.mark.parametrize("remat", [False, True])
def test_layers_on_cpu(remat: bool) -> None:
    """With rematerialization each layer's input is kept. Without it also the result of `tanh`, for the product behind
    it, and its derivative, and the last layer's result, which the loss squares."""
    L, B, D, F = 5, 512, 64, 192

    def layer(h: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    def loss(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0] ** 2)

    def step(w: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        gradients = jax.grad(loss)(w, x)
        norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients))
        return jax.tree.map(lambda w, g: w - g * jax.lax.rsqrt(norm), w, gradients)

    w = {"up": jax.ShapeDtypeStruct((L, D, F), jnp.float32), "down": jax.ShapeDtypeStruct((L, F, D), jnp.float32)}
    x = jax.ShapeDtypeStruct((B, D), jnp.float32)
    compiled = jax.jit(step, donate_argnums=0).lower(w, x).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    found = temporaries(text, {L * D * F})
    inputs, hidden = 4 * L * B * D, 4 * L * B * F
    assert found.activations == (inputs if remat else inputs + 2 * hidden + 4 * B * D)
    assert found.gradients == 2 * 4 * L * D * F
    assert found.activations + found.gradients <= found.live
    assert found.live == pytest.approx(memory.temp_size_in_bytes, rel=0.1)


def test_only_what_lives_at_once_counts() -> None:
    """`a` is read for the last time by `c`, which is no fusion and takes memory of its own; `d` writes over `c`."""
    found = temporaries(
        HEAD
        + f"""
ENTRY %main (p: f32[100], x: f32[100]) -> f32[100] {{
  %p = f32[100] parameter(0)
  %x = f32[100] parameter(1)
  %a = f32[100] sort(%x), dimensions={{0}}, {FORWARD}
  %b = f32[50] slice(%a), slice={{[0:50]}}, {FORWARD}
  %c = f32[100] reverse(%a), dimensions={{0}}, {BACKWARD}
  %d = f32[100] negate(%c), {BACKWARD}
  %e = f32[100] concatenate(%b, %b), dimensions={{0}}, {BACKWARD}
  ROOT %r = f32[100] add(%d, %e)
}}
""",
        {100},
    )
    # a, b and c; later b, d and e, which are as many: the first counts
    assert found.live == 400 + 200 + 400
    assert found.activations == 400 + 200
    assert found.gradients == 400


def test_weights_that_wait_for_the_backward_pass_are_no_activations() -> None:
    found = temporaries(
        HEAD
        + f"""
ENTRY %main (p: f32[100], x: f32[100]) -> f32[100] {{
  %p = f32[100] parameter(0)
  %x = f32[100] parameter(1)
  %gathered = f32[700] concatenate(%p, %p, %p, %p, %p, %p, %p), dimensions={{0}}, {FORWARD}
  %hidden = f32[300] concatenate(%x, %x, %x), dimensions={{0}}, {FORWARD}
  %back = f32[1000] concatenate(%gathered, %hidden), dimensions={{0}}, {BACKWARD}
  ROOT %r = f32[100] slice(%back), slice={{[0:100]}}
}}
""",
        set(),
    )
    assert (found.activations, found.live) == (4 * 300, 4 * 2000)


def test_a_loop_has_its_state_and_what_its_body_needs() -> None:
    found = temporaries(
        HEAD
        + """
%body (s: (f32[100], f32[10])) -> (f32[100], f32[10]) {
  %s = (f32[100], f32[10]) parameter(0)
  %x = f32[100] get-tuple-element(%s), index=0
  %y = f32[10] get-tuple-element(%s), index=1
  %t = f32[300] concatenate(%x, %x, %x), dimensions={0}
  %z = f32[100] slice(%t), slice={[7:107]}
  ROOT %n = (f32[100], f32[10]) tuple(%z, %y)
}

%condition (s: (f32[100], f32[10])) -> pred[] {
  %s = (f32[100], f32[10]) parameter(0)
  ROOT %never = pred[] constant(false)
}

ENTRY %main (p: f32[100]) -> f32[100] {
  %p = f32[100] parameter(0)
  %a = f32[100] sort(%p), dimensions={0}
  %b = f32[10] slice(%a), slice={[0:10]}
  %i = (f32[100], f32[10]) tuple(%a, %b)
  %w = (f32[100], f32[10]) while(%i), condition=%condition, body=%body
  %o = f32[100] get-tuple-element(%w), index=0
  ROOT %r = f32[100] reverse(%o), dimensions={0}
}
""",
        set(),
    )
    assert found.live == 400 + 40 + 1200


def test_a_program_without_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="not scheduled"):
        temporaries("HloModule m\n\nENTRY %main () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n", set())
