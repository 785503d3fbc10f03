"""Tokenized samples as arrays: the pieces of which token caches are written (`cache.py`), also by way of shards.

A block is some rows of a data file in order: the samples they gave, what was said of the bad ones, and the counts. As
bytes it carries a checksum, and the same rows give the same bytes on every machine.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.data.chat import Sample

COLUMNS: Mapping[str, str] = {
    "tokens": "<i4",
    "loss_weights": "<f4",
    "lengths": "<i8",
    "lines": "<i8",
    "trained": "<i4",
    "hashes": "<u8",
    "prompt_hashes": "<u8",
    "splits": "<i4",
    "labels": "<i1",
    "margins": "<f4",
    "begins": "|b1",
}
"""The arrays of a block: the first two have an element for each token, the others one for each sample."""

_COUNTS = ("rows", "left_out", "lines_read")


class DamagedBlock(ValueError):
    """Bytes that are no block any more."""


def _empty_columns() -> dict[str, np.ndarray]:
    return {name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one data file, tokenized."""

    columns: Mapping[str, np.ndarray] = field(default_factory=_empty_columns)
    """By the names and dtypes of `COLUMNS`."""
    rejects: Sequence[Mapping[str, Any]] = ()
    """JSON objects with the `line` of each row that could not be used, in order."""
    rows: int = 0
    """Records read, those with bad rows included."""
    left_out: int = 0
    """Records that give nothing, though nothing is wrong with them."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What is worth counting about samples, and about what is left out."""
    lines_read: int = 0
    """By how much the lines of all later blocks count up."""

    @property
    def num_samples(self) -> int:
        return len(self.columns["lines"])

    @property
    def num_tokens(self) -> int:
        return len(self.columns["tokens"])

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        rejects: Sequence[Mapping[str, Any]],
        *,
        rows: int,
        left_out: int = 0,
        notes: Mapping[str, int] | None = None,
    ) -> "Block":
        """The block of some samples; `notes` beside those of the samples."""
        notes = Counter(notes or {}) + Counter(note for sample in samples for note in sample.notes)
        if not samples:
            return cls(rejects=rejects, rows=rows, left_out=left_out, notes=notes)
        hashes = [_hashes(sample) for sample in samples]
        values = {
            "tokens": np.concatenate([sample.tokens for sample in samples]),
            "loss_weights": np.concatenate([sample.loss_weights for sample in samples]),
            "lengths": [len(sample.tokens) for sample in samples],
            "lines": [sample.line for sample in samples],
            "trained": [np.count_nonzero(sample.loss_weights[1:]) for sample in samples],
            "hashes": [whole for whole, _ in hashes],
            "prompt_hashes": [prompt for _, prompt in hashes],
            "splits": [sample.split for sample in samples],
            "labels": [sample.label for sample in samples],
            "margins": [sample.margin for sample in samples],
            "begins": [sample.begins for sample in samples],
        }
        columns = {name: np.asarray(values[name], dtype) for name, dtype in COLUMNS.items()}
        return cls(columns, rejects, rows, left_out, notes)

    @classmethod
    def join(cls, blocks: Iterable["Block"]) -> "Block":
        """Blocks of one part in order as one, by whose first block's lines all count."""
        blocks = [cls(), *blocks]
        return cls(
            {name: np.concatenate([block.columns[name] for block in blocks]) for name in COLUMNS},
            [reject for block in blocks for reject in block.rejects],
            notes=sum((Counter(block.notes) for block in blocks), Counter()),
            **{name: sum(getattr(block, name) for block in blocks) for name in _COUNTS},
        )

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads."""
        parts = [self.columns[name].astype(dtype, copy=False).tobytes() for name, dtype in COLUMNS.items()]
        payload = b"".join([*parts, json.dumps(list(self.rejects)).encode()])
        head = {
            "crc32": zlib.crc32(payload),
            "bytes": [len(part) for part in parts],
            "counts": {"tokens": self.num_tokens, "samples": self.num_samples, "bad_rows": len(self.rejects)},
            "notes": dict(sorted(self.notes.items())),
            **{name: getattr(self, name) for name in _COUNTS},
        }
        return json.dumps(head).encode() + b"\n" + payload

    @classmethod
    def from_bytes(cls, data: bytes) -> "Block":
        """Raises DamagedBlock."""
        try:
            line, payload = data.split(b"\n", 1)
            head = json.loads(line)
            if zlib.crc32(payload) != head["crc32"]:
                raise DamagedBlock("its checksum is another than when it was written")
            ends = np.cumsum([0, *head["bytes"]]).tolist()
            columns = {
                name: np.frombuffer(payload[start:end], dtype)
                for (name, dtype), start, end in zip(COLUMNS.items(), ends[:-1], ends[1:], strict=True)
            }
            counts = {name: head[name] for name in _COUNTS}
            return cls(columns, json.loads(payload[ends[-1] :]), notes=head["notes"], **counts)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedBlock(str(error)) from error


def counts_in(head: bytes) -> dict[str, int]:
    """`tokens`, `samples` and `bad_rows` by the first line of a block's bytes; none where that is damaged."""
    try:
        return {name: int(count) for name, count in json.loads(head)["counts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _hashes(sample: Sample) -> tuple[int, int]:
    """(of tokens, weights and label; of the tokens before the first trained one, or 0), each the first 8 bytes of
    BLAKE2b.

    As in `trained`, a sample's first token is never trained on: nothing predicts it.
    """
    tokens = sample.tokens.astype("<i4", copy=False)
    label = bytes([sample.label + 1]) if sample.label else b""
    whole = _blake2b(tokens.tobytes() + sample.loss_weights.astype("<f4", copy=False).tobytes() + label)
    (trained,) = np.nonzero(sample.loss_weights[1:])
    return whole, _blake2b(tokens[: 1 + trained[0]].tobytes()) if len(trained) else 0


def _blake2b(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data).digest()[:8], "little")
