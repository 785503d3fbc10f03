"""Labelled answers to token sequences: the way of `chat.py` for objectives that learn from single good and bad answers.

Each is encoded as the prompt with that answer would be for fine-tuning. A preference row is two of them: its chosen
answer, desirable, and its rejected one, not (TRL's `unpair_preference_dataset`).
"""

from collections.abc import Sequence
from dataclasses import replace

from posttrain.data.chat import Sample, encode_rows
from posttrain.data.files import BadRow
from posttrain.data.pairs import check_pair, sides_of, whole_answer
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer

NOTE_UNPAIRED = "pairs taken apart into two labelled answers"


def encode_labelled(
    rows: Sequence[Row], tokenizer: Tokenizer, loss_on: tuple[str, ...] = ("assistant",)
) -> list[tuple[Sample, ...] | BadRow]:
    """The labelled answer of each row, or both of a pair, as `encode_rows` returns samples; of other rows why not."""
    unfit = [_unfit(row) for row in rows]
    answers = [_answers(row) if bad is None else () for row, bad in zip(rows, unfit, strict=True)]
    encoded = iter(encode_rows([row for of_row in answers for row, _, _ in of_row], tokenizer, loss_on))
    results: list[tuple[Sample, ...] | BadRow] = []
    for row, bad, of_row in zip(rows, unfit, answers, strict=True):
        made = [whole_answer(row, next(encoded), name) for _, _, name in of_row]
        refused = bad or next((part for part in made if isinstance(part, BadRow)), None)
        if refused is not None:
            results.append(refused)
            continue
        samples = [
            replace(part, label=label)
            for part, (_, label, _) in zip(made, of_row, strict=True)
            if isinstance(part, Sample)
        ]
        if len(samples) == 2:
            samples[0] = replace(samples[0], notes=(*samples[0].notes, NOTE_UNPAIRED))
        results.append(tuple(samples))
    return results


def _unfit(row: Row) -> BadRow | None:
    """Why a row is no labelled answer."""
    if row.kind == "preference":
        return check_pair(row)
    if row.kind == "unpaired_preference":
        return None
    reason = f"the row is of the kind {row.kind}, and this objective takes labelled answers; "
    return BadRow(row.file, row.line, "", reason + "fix: columns prompt, completion and label, or chosen and rejected")


def _answers(row: Row) -> tuple[tuple[Row, int, str], ...]:
    """Rows of prompt and completion, each with its label and what it is called in the file."""
    if row.kind == "preference":
        chosen, rejected = sides_of(row)
        return (chosen, 1, "chosen"), (rejected, -1, "rejected")
    return ((replace(row, kind="prompt_completion", label=None), 1 if row.label else -1, "completion"),)
