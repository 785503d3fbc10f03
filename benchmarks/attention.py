"""Attention on this machine: forward and gradient of every implementation, next to the time its matrix products need.

    python benchmarks/attention.py [--tokens 1024] [--heads 9] [--kv-heads 3] [--head-size 64] [--rows 1] [--repeats 10]

`ideal` is the time of the products over the visible (query, key) pairs alone, 2 forward and 5 backward, at the rate of
a large float32 matrix product timed in the same rounds. Times are minima over interleaved rounds, so what else runs on
the machine disturbs all of them alike; `cpu` is processor time summed over the cores.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from posttrain.models.attention import IMPLEMENTATIONS, attention


def packed_rows(rows: int, tokens: int, segments: int) -> Array:
    """Segment ids of rows of equally long segments."""
    return jnp.tile((jnp.arange(tokens, dtype=jnp.int32) * segments // tokens + 1)[None], (rows, 1))


def visible_pairs(segment_ids: Array) -> int:
    """(query, key) pairs of one segment with the key not after the query."""
    total = 0
    for row in np.asarray(segment_ids):
        lengths = np.bincount(row)[1:].astype(np.int64)
        total += int((lengths * (lengths + 1) // 2).sum())
    return total


def forward_and_gradient(implementation: str) -> Callable[..., tuple[Array, ...]]:
    """`(q, k, v, dout, segment_ids) -> out, dq, dk, dv`, compiled."""

    def run(q: Array, k: Array, v: Array, dout: Array, segment_ids: Array) -> tuple[Array, ...]:
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
        return out, *vjp(dout)

    def dot_product_attention(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)

    own = implementation in IMPLEMENTATIONS
    attend = partial(attention, implementation=implementation) if own else dot_product_attention
    return jax.jit(run)


def fastest(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Least wall and processor seconds of each call, over rounds that run all of them."""
    for call in calls.values():
        jax.block_until_ready(call())
    best = dict.fromkeys(calls, (float("inf"), float("inf")))
    for _ in range(repeats):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            spent = time.perf_counter() - wall, time.process_time() - cpu
            best[name] = min(best[name][0], spent[0]), min(best[name][1], spent[1])
    return best


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(tokens=1024, heads=9, kv_heads=3, head_size=64, rows=1, repeats=10).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    a = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (a.heads, a.kv_heads, a.kv_heads, a.heads)
    arrays = [jax.random.normal(key, (a.rows, a.tokens, n, a.head_size)) for key, n in zip(keys, heads, strict=True)]

    side = 2048
    square = jax.random.normal(keys[0], (side, side))
    calls: dict[str, Callable[[], object]] = {"matmul": partial(jax.jit(jnp.matmul), square, square)}
    layouts, temporary = {count: packed_rows(a.rows, a.tokens, count) for count in (1, 6)}, {}
    for implementation in (*IMPLEMENTATIONS, "jax.nn.dot_product_attention"):
        run = forward_and_gradient(implementation)
        for count, segment_ids in layouts.items():
            name = f"{implementation:30} {count} segment{'s' * (count > 1)}"
            calls[name] = partial(run, *arrays, segment_ids)
            temporary[name] = run.lower(*arrays, segment_ids).compile().memory_analysis().temp_size_in_bytes

    times = fastest(calls, a.repeats)
    rate = 2 * side**3 / times["matmul"][0]
    print(f"B {a.rows}  T {a.tokens}  N {a.heads}  K {a.kv_heads}  H {a.head_size}  float32, forward + gradient")
    print(f"matrix product {side}^3: {rate / 1e9:.0f} GFLOP/s\n")
    print(f"{'':42} {'wall ms':>8} {'cpu ms':>8} {'ideal ms':>9} {'ratio':>6} {'temp MB':>8}")
    for (name, (wall, cpu)), segment_ids in zip(list(times.items())[1:], list(layouts.values()) * 3, strict=True):
        ideal = 14 * visible_pairs(segment_ids) * a.heads * a.head_size / rate
        columns = f"{wall * 1e3:8.1f} {cpu * 1e3:8.1f} {ideal * 1e3:9.1f} {wall / ideal:6.1f}"
        print(f"{name:42} {columns} {temporary[name] / 1e6:8.1f}")


if __name__ == "__main__":
    main()
