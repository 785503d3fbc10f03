"""What accumulating gradients over micro-batches costs in memory, in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.config import MeshConfig, OptimizerConfig
from posttrain.models.decoder import ComputeOptions, DecoderConfig, abstract_decoder
from posttrain.objectives.supervised import sft
from posttrain.parallel.mesh import make_mesh
from posttrain.parallel.sharding import batch_sharding, flatten, place, replicated, unflatten
from posttrain.records import Batch, TrainState
from posttrain.train.optim import make_optimizer
from posttrain.train.step import LossSums, make_train_step

# Parameters are nearly all of what the step holds: 8 rows of 8 tokens on 8 devices.
CONFIG = DecoderConfig(256, 256, 1024, 4, 2, 1, 128)
ROWS, T = 8, 8


def temporaries(accumulation: int) -> tuple[int, int]:
    """(bytes of a device's temporaries, bytes of its share of the parameters, in f32)."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    decoder = abstract_decoder(CONFIG, options=ComputeOptions("reference", "full"))
    shapes = flatten(decoder.shapes)
    placed = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place(decoder.axes[path], leaf.shape, mesh).sharding
        )
        for path, leaf in shapes.items()
    }
    optimizer = make_optimizer(OptimizerConfig(), {path: leaf.shape for path, leaf in shapes.items()}, 10)
    params, whole = unflatten(placed), replicated(mesh)
    state = TrainState(
        params,
        optimizer.abstract_state(params, whole),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole),
    )
    ints, floats = (
        jax.ShapeDtypeStruct((accumulation, ROWS, T), dtype, sharding=batch_sharding(mesh))
        for dtype in (np.int32, np.float32)
    )
    step = make_train_step(LossSums(decoder, sft(), jnp.float32), optimizer)
    with jax.set_mesh(mesh):
        found = (
            jax.jit(step, donate_argnums=0).lower(state, Batch(ints, ints, ints, floats)).compile().memory_analysis()
        )
    assert found is not None
    share = sum(4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in placed.values())
    return found.temp_size_in_bytes, share


def test_accumulation_adds_no_buffer_of_gradients_but_the_sum() -> None:
    """The sum is one buffer; what a micro-batch adds to it is there without accumulation too."""
    single, share = temporaries(1)
    several, many = temporaries(4)[0], temporaries(16)[0]
    assert share > 500_000
    assert several - single < 1.1 * share, (single, several, share)
    assert many - several < 0.05 * share, (several, many, share)
