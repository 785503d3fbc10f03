"""`posttrain logprobs MODEL rows.jsonl`: the log-probability of every token, by the very forward that training uses."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jaxtyping import Array, Float

from posttrain.config import MeshConfig, ModelConfig, SourceConfig
from posttrain.data.chat import Sample, encode_rows
from posttrain.data.files import BadRow, Record, read_records
from posttrain.data.formats import to_rows
from posttrain.data.packed import assemble
from posttrain.data.packing import plan_rows
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import setup_model
from posttrain.models.attention_choice import row_unit
from posttrain.objectives.logps import batch_stats
from posttrain.parallel.mesh import row_shards
from posttrain.parallel.sharding import global_batch, local_rows, replicated
from posttrain.records import Batch, Head, Params
from posttrain.train.adapters import named_model, named_tokenizer
from posttrain.train.setup import ModelSetup


@dataclass(frozen=True)
class RowsOptions:
    """What the commands that read a file of rows with a model have in common."""

    model: Annotated[str, tyro.conf.Positional]
    """Hugging Face directory, hub id, or the directory of an adapter."""
    rows: Annotated[str, tyro.conf.Positional]
    """JSONL, JSON or Parquet file."""
    out: str = "-"
    """Where to write; - for standard output."""
    packed: bool = False
    """Several rows share a packed row, as in training. The numbers are the same."""
    row_length: int = 2048
    """Length of a packed row; longer rows widen it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto: bfloat16 on accelerators, float32 on CPU."""
    attention: Literal["auto", "reference", "chunked", "splash"] = "auto"
    base: str | None = None
    """Of an adapter: the model that it belongs to; default: the one that it names."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def setup(self, head: Head) -> ModelSetup:
        """The model, placed but not loaded."""
        return setup_model(self._config(), self.mesh, head=head)

    def tokenizer(self, setup: ModelSetup) -> Tokenizer:
        """That of the model, or of the adapter."""
        tokenizer = named_tokenizer(self._config())
        tokenizer.embedding_rows = setup.config.vocab_size
        return tokenizer

    def _config(self) -> ModelConfig:
        return named_model(
            self.model, self.base, self.revision, dtype=self.dtype, attention=self.attention, remat="none"
        )

    def open_output(self) -> AbstractContextManager[IO[str]]:
        """What process 0 writes to; others get standard output. Raises `UserError` where the file exists."""
        if self.out == "-" or jax.process_index() != 0:
            return nullcontext(sys.stdout)
        if Path(self.out).exists():
            raise UserError(f"--out {self.out}: the file exists; nothing is written over, name another one")
        Path(self.out).parent.mkdir(parents=True, exist_ok=True)
        return open(self.out, "x")


@dataclass(frozen=True)
class LogprobsOptions(RowsOptions):
    """Log-probability of each token given those before it, for rows of `input_ids`, `text` or `messages`.

    Writes one JSON line per row, in order: `input_ids`, `logprobs` (null for the first token) and `trained` (whether
    training on this row would train the token). A row that training splits into several samples, because the chat
    template renders earlier turns differently later, has a line for each.
    """


def logprobs(options: LogprobsOptions) -> None:
    """The command. Raises `UserErrors` with every bad row, before the model is loaded."""
    setup = options.setup("lm")
    tokenizer = options.tokenizer(setup)
    found = read_samples(options.rows, setup.config.vocab_size, lambda rows: encode_rows(rows, tokenizer))
    samples = [sample for of_row in found for sample in of_row]
    out = options.open_output()
    values = token_logps(setup, samples, packed=options.packed, row_length=options.row_length)
    if jax.process_index() == 0:
        with out as file:
            for sample, logps in zip(samples, values, strict=True):
                row = {
                    "input_ids": sample.tokens.tolist(),
                    "logprobs": [None, *(float(x) for x in logps[1:])],
                    "trained": (sample.loss_weights > 0).tolist(),
                }
                file.write(json.dumps(row) + "\n")


Encoded = Sequence[tuple[Sample, ...] | BadRow]


def read_samples(path: str, vocab_size: int, encode: Callable[[list[Row]], Encoded]) -> list[tuple[Sample, ...]]:
    """The samples of every row, in order; `encode` makes them of all rows but those of `input_ids`, which are whole
    samples. Raises `UserErrors` naming every bad row."""
    found: list[Sample | Row | BadRow] = []
    for record in read_records(path):
        if isinstance(record, BadRow):
            found.append(record)
        elif "input_ids" in record.columns:
            found.append(_from_ids(record, vocab_size))
        else:
            found.extend(to_rows(record, SourceConfig()))
    encoded = iter(encode([item for item in found if isinstance(item, Row)]))
    samples: list[tuple[Sample, ...]] = []
    bad: list[str] = []
    for item in found:
        outcome = next(encoded) if isinstance(item, Row) else item
        if isinstance(outcome, BadRow):
            bad.append(str(outcome))
        else:
            samples.append((outcome,) if isinstance(outcome, Sample) else outcome)
    if bad:
        raise UserErrors(bad)
    if not samples:
        raise UserError(f"{path}: no rows")
    return samples


def _from_ids(record: Record, vocab_size: int) -> Sample | BadRow:
    ids = record.columns["input_ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        return BadRow(record.file, record.line, "input_ids", "must be a non-empty list of whole numbers")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        return BadRow(
            record.file, record.line, "input_ids", f"{outside[0]} is outside the vocabulary (0 to {vocab_size - 1})"
        )
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0.0
    return Sample(np.asarray(ids, np.int32), weights, record.file, record.line)


def token_logps(
    setup: ModelSetup, samples: Sequence[Sample], *, packed: bool, row_length: int = 2048
) -> list[Float[np.ndarray, "T"]]:
    """Log-probs of each sample's tokens, f32 `[n]`, 0 for the first; each token is predicted from those before it."""
    results: list[Any] = [None] * len(samples)
    step = partial(_token_logps, setup)
    for groups, logps in run_batches(setup, samples, step, packed=packed, row_length=row_length):
        for row, group in enumerate(groups):
            start = 0
            for i in group:
                results[i] = logps[row, start : start + len(samples[i].tokens)]
                start += len(samples[i].tokens)
    return results


def _token_logps(setup: ModelSetup, params: Params, batch: Batch) -> Float[Array, "B T"]:
    return batch_stats(setup.model(params), batch).logps


def run_batches(
    setup: ModelSetup,
    samples: Sequence[Sample],
    step: Callable[[Params, Batch], Float[Array, "..."]],
    *,
    packed: bool,
    row_length: int,
    max_segments: int | None = None,
) -> Iterator[tuple[list[list[int]], Float[np.ndarray, "..."]]]:
    """Loads the model and passes all samples through `step(params, batch [B, T])`. Yields, for each batch, the numbers
    of the samples in each of its rows, in order, and the result, whole on every process.

    Unpacked rows are grouped by length, so that few shapes are compiled; packed ones hold up to `max_segments` samples.
    """
    params = setup.load()
    rows = row_shards(setup.mesh.shape)
    unit = row_unit(setup.decoder.options.attention, setup.mesh.shape["context"])
    numbers = local_rows(setup.mesh, 1, rows)
    compiled = jax.jit(step, out_shardings=replicated(setup.mesh))
    for width, groups in _batches([len(s.tokens) for s in samples], rows, packed, row_length, max_segments):
        width = -(-width // unit) * unit
        wanted = [groups[number] if number < len(groups) else [] for number in numbers]
        local = assemble([[(samples[i].tokens, samples[i].loss_weights) for i in row] for row in wanted], width)
        with jax.set_mesh(setup.mesh):
            batch = global_batch(local, numbers, setup.mesh, 1, rows)
            result = np.asarray(jax.block_until_ready(compiled(params, jax.tree.map(lambda x: x[0], batch))))
        yield groups, result


def _batches(
    lengths: Sequence[int], rows: int, packed: bool, row_length: int, max_segments: int | None
) -> Iterator[tuple[int, list[list[int]]]]:
    """(row length, samples of each row) for batches of at most `rows` rows."""
    if packed:
        width = max(row_length, *lengths)
        plan = plan_rows(np.asarray(lengths), width, seed=0, epoch=0, shuffle=False, max_segments=max_segments)
        groups = [plan.row(i).tolist() for i in range(plan.num_rows)]
        for start in range(0, len(groups), rows):
            yield width, groups[start : start + rows]
        return
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), rows):
        group = order[start : start + rows]
        longest = lengths[group[-1]]
        yield max(64, 1 << (longest - 1).bit_length()), [[i] for i in group]
