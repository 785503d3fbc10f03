"""`posttrain score MODEL rows.jsonl`: what a reward model gives each row, by the very forward that training uses."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float

from posttrain.data.chat import Sample, encode_rows
from posttrain.data.files import BadRow
from posttrain.data.pairs import sides_of
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from posttrain.logprobs import RowsOptions, read_samples, run_batches
from posttrain.objectives.reward import segment_scores
from posttrain.records import Batch, Params
from posttrain.train.setup import ModelSetup

MOST_SEGMENTS = 128
"""Rows that share a packed row."""


@dataclass(frozen=True)
class ScoreOptions(RowsOptions):
    """A reward model's score of each row: `messages`, `prompt` and `completion`, `text`, `input_ids`, or a preference.

    Writes one JSON line per row, in order: `score`; for a row with a chosen and a rejected answer `score_chosen` and
    `score_rejected`. How many pairs have the chosen answer's score above the other's is told at the end, on standard
    error. A row is scored at its last token, whole; a ranking is as many rows as it makes pairs.
    """


def score(options: ScoreOptions) -> None:
    """The command. Raises `UserErrors` with every bad row, before the model is loaded."""
    setup = options.setup("score")
    if setup.new_score:
        raise UserError(
            f"{options.model}: a language model, without a score; train a reward model that starts from it with "
            "objective.name reward, or use posttrain logprobs"
        )
    tokenizer = options.tokenizer(setup)
    rows = read_samples(options.rows, setup.config.vocab_size, partial(encode_answers, tokenizer=tokenizer))
    out = options.open_output()
    samples = [sample for of_row in rows for sample in of_row]
    scores = iter(sample_scores(setup, samples, packed=options.packed, row_length=options.row_length))
    if jax.process_index() != 0:
        return
    pairs = []
    with out as file:
        for of_row in rows:
            values = [next(scores) for _ in of_row]
            names = ("score",) if len(values) == 1 else ("score_chosen", "score_rejected")
            file.write(json.dumps(dict(zip(names, values, strict=True))) + "\n")
            if len(values) == 2:
                pairs.append(values)
    for line in (*_accuracy(pairs), *_pooled_elsewhere(setup, samples)):
        print(line, file=sys.stderr)


def encode_answers(rows: Sequence[Row], tokenizer: Tokenizer) -> list[tuple[Sample, ...] | BadRow]:
    """The sample of each row, whole; of a preference row two, with the chosen and with the rejected answer. Of a row
    that cannot be encoded as for training, why not."""
    answers = [_answers(row) for row in rows]
    flat = [answer for of_row in answers for answer in of_row]
    encoded: list[tuple[Sample, ...] | BadRow | None] = [None] * len(flat)
    for loss_on in (("last_assistant",), ("all",)):
        # As in training: a last answer that the template leaves without a stop token gets one.
        chosen = [i for i, row in enumerate(flat) if _ends_with_answer(row) == (loss_on == ("last_assistant",))]
        for i, outcome in zip(chosen, encode_rows([flat[i] for i in chosen], tokenizer, loss_on), strict=True):
            encoded[i] = outcome
    outcomes = iter(encoded)
    results: list[tuple[Sample, ...] | BadRow] = []
    for of_row in answers:
        made = [next(outcomes) for _ in of_row]
        bad = next((outcome for outcome in made if isinstance(outcome, BadRow)), None)
        results.append(bad or tuple(sample for outcome in made if isinstance(outcome, tuple) for sample in outcome))
    return results


def _answers(row: Row) -> tuple[Row, ...]:
    """Weights by message speak of training on the tokens, labels and margins of comparing."""
    row = replace(row, weights=())
    if row.kind == "preference":
        return sides_of(row)
    if row.kind == "unpaired_preference":
        return (replace(row, kind="prompt_completion", label=None),)
    return (row,)


def _ends_with_answer(row: Row) -> bool:
    return bool(row.messages) and row.messages[-1]["role"] == "assistant"


def sample_scores(setup: ModelSetup, samples: Sequence[Sample], *, packed: bool, row_length: int = 2048) -> list[float]:
    """The score of each sample, at its last token, in f32."""
    scores = [math.nan] * len(samples)
    slots = MOST_SEGMENTS if packed else 1
    step = partial(_scores, setup, slots)
    batches = run_batches(setup, samples, step, packed=packed, row_length=row_length, max_segments=slots)
    for groups, values in batches:
        for row, group in enumerate(groups):
            for place, i in enumerate(group):
                scores[i] = float(values[row, place])
    return scores


def _scores(setup: ModelSetup, slots: int, params: Params, batch: Batch) -> Float[Array, "B S"]:
    return segment_scores(setup.model(params), batch, slots)


def _accuracy(pairs: Sequence[Sequence[float]]) -> list[str]:
    """How often the chosen answer has the higher score, with the standard error sqrt(p (1 - p) / n)."""
    if not pairs:
        return []
    chosen, rejected = np.asarray(pairs, np.float64).T
    share, count = float(np.mean(chosen > rejected)), len(pairs)
    ties = int(np.sum(chosen == rejected))
    return [
        f"accuracy {share:.4f}, standard error {math.sqrt(share * (1 - share) / count):.4f}, of {count} pairs"
        + (f"; {ties} of them have equal scores" if ties else "")
    ]


def _pooled_elsewhere(setup: ModelSetup, samples: Sequence[Sample]) -> list[str]:
    """Rows that transformers would score one token earlier, which is no error of theirs or ours but a difference."""
    pad = setup.raw_config.get("pad_token_id")
    count = sum(int(sample.tokens[-1]) == pad for sample in samples)
    if not count:
        return []
    return [
        f"{count} of {len(samples)} texts end with the token {pad}, the pad_token_id of config.json: transformers takes"
        " it for padding and scores them at the token before"
    ]
