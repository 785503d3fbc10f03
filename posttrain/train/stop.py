"""SIGTERM (preemption) and Ctrl-C end a run cleanly: every process stops after the same step, saves and leaves."""

import signal
from types import FrameType, TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posttrain.parallel.sharding import replicated


class StopRequest:
    """Context in which SIGTERM and SIGINT are noted instead of obeyed. A second Ctrl-C interrupts at once."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._requested = 0
        self._previous: dict[int, object] = {}
        self._any = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._in_flight: jax.Array | None = None

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # it came from signal.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = number

    def agreed(self) -> int | None:
        """The signal that any process got, the same on every process, or None. Call once per step.

        With several processes the answer speaks of the call before, so that nobody waits for the devices.
        """
        if jax.process_count() == 1:
            return self._requested or None
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        local = np.full(1, self._requested, np.int32)
        flags = jax.make_array_from_callback((self._mesh.size,), sharding, lambda _: local)
        before, self._in_flight = self._in_flight, self._any(flags)
        if jax.default_backend() == "cpu":  # unawaited collectives can hang gloo
            jax.block_until_ready(self._in_flight)
        return None if before is None else int(before) or None
