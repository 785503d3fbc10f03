"""Token caches in memory, for tests of what is made of them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from posttrain.data.cache import TokenCache


def _hash(*parts: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(parts)).digest()[:8], "little")


def fake_cache(
    path: str,
    samples: Sequence[tuple[Sequence[int], Sequence[float]]],
    lines: Sequence[int] | None = None,
    *,
    left_out: int = 0,
    bad_rows: int = 0,
    notes: Mapping[str, int] | None = None,
    splits: Sequence[int] | None = None,
    margins: Sequence[float] | None = None,
    labels: Sequence[int] | None = None,
    begins: Sequence[bool] | None = None,
) -> TokenCache:
    """A cache of these (tokens, loss weights); lines count from 1, and each is a record of its own."""
    lines = range(1, len(samples) + 1) if lines is None else lines
    tokens = [np.array(ids, np.int32) for ids, _ in samples]
    weights = [np.array(values, np.float32) for _, values in samples]
    trained = [np.flatnonzero(values[1:]) + 1 for values in weights]
    prompts = [ids[: places[0]] if len(places) else None for ids, places in zip(tokens, trained, strict=True)]
    return TokenCache(
        path=path,
        directory=Path("nowhere"),
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        loss_weights=np.concatenate([np.zeros(0, np.float32), *weights]),
        offsets=np.cumsum([0, *map(len, tokens)]).astype(np.int64),
        lines=np.array(lines, np.int64),
        begins=np.diff(lines, prepend=-1) != 0 if begins is None else np.array(begins, bool),
        trained=np.array([len(places) for places in trained], np.int32),
        hashes=np.array([_hash(t.tobytes(), w.tobytes()) for t, w in zip(tokens, weights, strict=True)], np.uint64),
        prompt_hashes=np.array([0 if ids is None else _hash(ids.tobytes()) for ids in prompts], np.uint64),
        splits=np.array([0] * len(samples) if splits is None else splits, np.int32),
        margins=np.array([0] * len(samples) if margins is None else margins, np.float32),
        labels=np.array([0] * len(samples) if labels is None else labels, np.int8),
        rows=len(samples) + left_out + bad_rows,
        left_out=left_out,
        notes=notes or {},
        bad_rows=bad_rows,
        checksum=_hash(*(ids.tobytes() for ids in tokens)) % 2**32,
    )


def distinct(count: int, first: int = 0, length: int = 3) -> list[tuple[list[int], list[float]]]:
    """So many samples of tokens that no other has; all but the first token are trained on."""
    starts = range(first, first + count * length, length)
    return [(list(range(start, start + length)), [0.0] + [1.0] * (length - 1)) for start in starts]
