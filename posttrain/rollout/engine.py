"""Prompts in, completions out: a fixed number of cache slots, each refilled as soon as its sequence ends.

`generate`, `chat`, evaluations and rollouts all sample through this engine, with the decoder that training uses. This
module is its host side: it moves requests into slots and tokens out of them. What runs on the device is in `slots.py`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32

from posttrain.errors import UserError
from posttrain.models.decoder import AbstractDecoder
from posttrain.parallel.mesh import single_device_mesh
from posttrain.records import Params
from posttrain.rollout.sampling import MAX_KEY, RowSampling, Sampled, SamplingParams
from posttrain.rollout.slots import Chunks, SlotPrograms, Slots

BUCKETS = (32, 64, 128, 256, 512)
"""Prompts are padded to the next of these lengths, longer ones cut into pieces. Few lengths, few compilations."""

PREFILL_TOKENS = 512
"""Tokens of one prefill: several short prompts share one, so that the weights are read once for them."""

SMALLEST_WINDOW = 128
"""Attention reads the shortest part of the cache, this times a power of 2, that all sequences fit in."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt to complete. Its sampled completion depends on it, its `id` and the seed alone."""

    id: int
    """From 0 to 2^32 - 1, no two alike at once."""
    prompt: Sequence[int] | Int32[np.ndarray, "n"]
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Delta:
    """Tokens of one request that became known together."""

    id: int
    token_ids: Int32[np.ndarray, "n"]
    logprobs: Float32[np.ndarray, "n"]
    """Under the model's own distribution, untruncated and at temperature 1."""
    sampled_logprobs: Float32[np.ndarray, "n"]
    """Under the tempered and truncated distribution that each token was drawn from; 0 where greedy."""
    finish_reason: FinishReason | None
    """None: more will come. `stop`: the last token is a stop token, even where it is also the last one allowed."""


@dataclass(frozen=True)
class Completion:
    """A whole completion; the fields are those of `Delta`. The stop token is part of it."""

    id: int
    token_ids: Int32[np.ndarray, "n"]
    logprobs: Float32[np.ndarray, "n"]
    sampled_logprobs: Float32[np.ndarray, "n"]
    finish_reason: FinishReason


@dataclass
class _Busy:
    """What the host knows of an occupied slot."""

    request: Request
    position: int
    """Of the latest token."""
    remaining: int
    """How many tokens may still come."""
    later: int
    """How many more, once the whole sequence has been read again."""
    drawn: list[Int32[np.ndarray, "_"]] = field(default_factory=list)
    """The tokens so far, where the sequence will be read again."""


@dataclass(frozen=True)
class _Piece:
    """A part of a prompt that one prefill reads."""

    start: int
    count: int
    bucket: int
    """The length it is padded to."""


class Engine:
    """Generates with continuous batching.

    `slots` sequences run at once, each of at most `max_length` tokens, prompt included. `params` are those of
    `decoder`, on `mesh` (default: one device), and are cast to `dtype` once. `steps` is how many tokens a slot may
    produce before the host looks: few for a chat, more for throughput. `pad_id` fills up prompts and never influences
    anything.

    Where a sequence outgrows the original length of `longrope` scaling, all its keys turn differently: it is then read
    again, as transformers does. `dynamic` scaling turns them with every token beyond the model's own length: raises
    `UserError` where a sequence could get there.
    """

    def __init__(
        self,
        decoder: AbstractDecoder,
        params: Params,
        *,
        slots: int,
        max_length: int,
        stop_ids: Collection[int],
        pad_id: int = 0,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        steps: int = 16,
    ):
        self._programs = SlotPrograms(
            decoder,
            count=slots,
            length=max_length,
            steps=steps,
            stop_ids=stop_ids,
            dtype=jnp.dtype(dtype),
            mesh=single_device_mesh() if mesh is None else mesh,
        )
        self.config = self._programs.config
        own_length = self.config.max_position_embeddings
        if any(rope.scaling == "dynamic" for rope in self.config.ropes) and max_length > own_length:
            raise UserError(
                f"max_length = {max_length}: this model's dynamic RoPE scaling changes all earlier keys beyond "
                f"{own_length} tokens (max_position_embeddings), so they cannot be cached; use at most {own_length}"
            )
        # The longest sequence whose keys turn as those of short ones do.
        originals = [rope.original_max_position_embeddings for rope in self.config.ropes if rope.scaling == "longrope"]
        self._short = min((n or own_length for n in originals), default=max_length)
        self.slots, self.max_length, self.steps = slots, max_length, steps
        self._pad_id, self._dtype, self._stop_ids = pad_id, jnp.dtype(dtype), frozenset(stop_ids)
        self.set_params(params)

    def set_params(self, params: Params) -> None:
        """Generates with these parameters from the next call on."""
        if any(leaf.dtype != self._dtype for leaf in jax.tree.leaves(params)):
            shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
            cast = jax.jit(lambda p: jax.tree.map(lambda leaf: leaf.astype(self._dtype), p), out_shardings=shardings)
            params = cast(params)
        self._params = params

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions in the order in which they end. Requests are taken when a slot becomes free for them."""
        parts: dict[int, list[Delta]] = {}
        for delta in self.stream(requests):
            parts.setdefault(delta.id, []).append(delta)
            if delta.finish_reason is not None:
                deltas = parts.pop(delta.id)
                yield Completion(
                    delta.id,
                    np.concatenate([d.token_ids for d in deltas]),
                    np.concatenate([d.logprobs for d in deltas]),
                    np.concatenate([d.sampled_logprobs for d in deltas]),
                    delta.finish_reason,
                )

    def stream(self, requests: Iterable[Request]) -> Iterator[Delta]:
        """Tokens as they come. Raises `UserError` for a prompt that is empty, too long or not of the vocabulary."""
        incoming = iter(requests)
        upcoming = next(incoming, None)
        busy: dict[int, _Busy] = {}
        running: set[int] = set()
        state = self._programs.fresh()
        while True:
            admitted = {slot: self._outgrown(one) for slot, one in busy.items() if one.remaining == 0}
            for slot in range(self.slots):
                if upcoming is not None and slot not in busy:
                    admitted[slot] = self._admit(upcoming, running)
                    running.add(upcoming.id)
                    upcoming = next(incoming, None)
            if admitted:
                busy |= admitted
                state, drawn = self._run_prefill(state, admitted)
            elif busy:
                state, drawn = self._run_decode(state, busy, waiting=upcoming is not None)
            else:
                return
            for slot in sorted(drawn):
                delta = self._account(busy[slot], drawn[slot])
                if delta.finish_reason is not None:
                    del busy[slot]
                    running.remove(delta.id)
                yield delta

    # ---- host -------------------------------------------------------------------------------------------------------

    def _admit(self, request: Request, running: set[int]) -> _Busy:
        prompt = np.asarray(request.prompt, np.int32)
        where = f"request {request.id}"
        if not 0 <= request.id < MAX_KEY or request.id in running:
            raise UserError(f"{where}: ids are whole numbers from 0 to {MAX_KEY - 1}, no two alike at once")
        if len(prompt) == 0:
            raise UserError(f"{where}: the prompt is empty; give at least one token, such as BOS")
        if len(prompt) >= self.max_length:
            raise UserError(
                f"{where}: the prompt has {len(prompt)} tokens, which leaves no room for an answer within max_length = "
                f"{self.max_length}; shorten it, or raise max_length to at least {len(prompt) + 1}"
            )
        if prompt.min() < 0 or prompt.max() >= self.config.vocab_size:
            wrong = prompt[(prompt < 0) | (prompt >= self.config.vocab_size)][0]
            raise UserError(f"{where}: token id {wrong} is outside the vocabulary (0 to {self.config.vocab_size - 1})")
        allowed = min(request.sampling.max_new_tokens, self.max_length - len(prompt))
        return self._start(replace(request, prompt=prompt), allowed)

    def _start(self, request: Request, allowed: int) -> _Busy:
        """A prompt that `allowed` tokens may follow: at first as many as keep its keys right."""
        length = len(request.prompt)
        now = allowed if length > self._short else min(allowed, self._short + 1 - length)
        return _Busy(request, length - 1, now, allowed - now)

    def _outgrown(self, slot: _Busy) -> _Busy:
        """The same request, its sequence so far as the prompt."""
        prompt = np.concatenate([slot.request.prompt, *slot.drawn])
        return self._start(replace(slot.request, prompt=prompt), slot.later)

    def _account(self, slot: _Busy, drawn: Sampled) -> Delta:
        """Books what a slot produced."""
        count = len(drawn.tokens)
        if not np.isfinite(drawn.logprobs).all():
            raise UserError(
                f"request {slot.request.id}: log-probabilities behind token {slot.position} are not finite: "
                "the weights are broken, or activations overflow in this dtype (try float32)"
            )
        slot.position += count
        slot.remaining -= count
        if slot.later:
            slot.drawn.append(drawn.tokens)
        stopped = int(drawn.tokens[-1]) in self._stop_ids
        ended = slot.remaining == slot.later == 0
        reason: FinishReason | None = "stop" if stopped else "length" if ended else None
        return Delta(slot.request.id, drawn.tokens, drawn.logprobs, drawn.sampled_logprobs, reason)

    def _run_prefill(self, state: Slots, admitted: dict[int, _Busy]) -> tuple[Slots, dict[int, Sampled]]:
        """Reads the admitted prompts; the first new token of each slot."""
        running: list[tuple[list[int], Sampled]] = []
        left = {slot: cut(len(busy.request.prompt)) for slot, busy in admitted.items()}
        while left:
            by_bucket: dict[int, list[int]] = {}
            for slot, pieces in left.items():
                by_bucket.setdefault(pieces[0].bucket, []).append(slot)
            for bucket, members in by_bucket.items():
                for group, rows in groups(members, max(1, min(self.slots, PREFILL_TOKENS // bucket))):
                    pieces = {slot: left[slot][0] for slot in group}
                    chunks = self._chunks(pieces, admitted, rows, bucket)
                    window = self._window(max(piece.start for piece in pieces.values()) + bucket)
                    state, drawn = self._programs.prefill(self._params, state, chunks, window=window)
                    running.append((group, drawn))
            left = {slot: pieces[1:] for slot, pieces in left.items() if len(pieces) > 1}
        # Of a prompt in several pieces the last draw counts: it replaces the earlier ones.
        result = {}
        for group, drawn in running:
            values = jax.device_get(drawn)
            for row, slot in enumerate(group):
                result[slot] = _take(values, slice(row, row + 1))
        return state, result

    def _chunks(self, pieces: dict[int, _Piece], admitted: dict[int, _Busy], rows: int, bucket: int) -> Chunks:
        """Pieces by slot as arrays; rows beyond them are padding."""
        tokens = np.full((rows, bucket), self._pad_id, np.int32)
        starts, allowed, lengths = np.zeros((3, rows), np.int32)
        counts, slots = np.ones(rows, np.int32), np.full(rows, self.slots, np.int32)
        ends = np.zeros(rows, bool)
        for row, (slot, piece) in enumerate(pieces.items()):
            prompt, end = admitted[slot].request.prompt, piece.start + piece.count
            tokens[row, : piece.count] = prompt[piece.start : end]
            starts[row], counts[row], slots[row] = piece.start, piece.count, slot
            lengths[row], ends[row], allowed[row] = len(prompt), end == len(prompt), admitted[slot].remaining
        requests = [admitted[slot].request for slot in pieces]
        requests += [Request(0, ())] * (rows - len(requests))
        sampling = RowSampling.stack([r.sampling for r in requests], [r.id for r in requests])
        return Chunks(tokens, starts, counts, lengths, slots, ends, allowed, sampling)

    def _run_decode(self, state: Slots, busy: dict[int, _Busy], *, waiting: bool) -> tuple[Slots, dict[int, Sampled]]:
        """Up to `steps` tokens for each busy slot."""
        limit = min(self.steps, max(b.remaining for b in busy.values()))
        window = self._window(max(b.position for b in busy.values()) + limit)
        # With many slots one ends at nearly every step; a prefill is then worth its while for several.
        free_wanted = max(1, self.slots // 16) if waiting else self.slots
        state, drawn = self._programs.decode(self._params, state, limit=limit, free_wanted=free_wanted, window=window)
        values = jax.device_get(drawn)
        counts = (values.tokens >= 0).sum(axis=0)
        return state, {slot: _take(values, (slice(counts[slot]), slot)) for slot in busy}

    def _window(self, length: int) -> int:
        """How much of the cache to read so that `length` positions are in it."""
        window = SMALLEST_WINDOW
        while window < length:
            window *= 2
        return min(window, self.max_length)


def _take(values: Sampled, index: Any) -> Sampled:
    return jax.tree.map(lambda x: x[index], values)


def cut(length: int) -> list[_Piece]:
    """A prompt in pieces: whole ones of the largest bucket, then the rest."""
    largest = BUCKETS[-1]
    whole = [_Piece(start, largest, largest) for start in range(0, length - largest, largest)]
    start = len(whole) * largest
    rest = length - start
    return [*whole, _Piece(start, rest, next(bucket for bucket in BUCKETS if bucket >= rest))]


def groups(members: Sequence[int], rows: int) -> Iterator[tuple[list[int], int]]:
    """Members of one prefill each, and its rows. These are all or one, so that few shapes are compiled: `rows` where
    more than half of them are taken."""
    left = list(members)
    while left:
        count = min(rows, len(left)) if 2 * len(left) > rows else 1
        yield left[:count], rows if count > 1 else 1
        del left[:count]
