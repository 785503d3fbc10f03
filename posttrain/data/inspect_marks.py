"""What is trained of conversations against the marks of a chat template that has some.

Under `inspect.py`. The rows are read once more from their files.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int32

from posttrain.data.chat import encode_rows, template_marks
from posttrain.data.files import BadRow
from posttrain.data.inspect_rows import read_again
from posttrain.data.inspect_samples import Place, SourceFile
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer

_SHOWN_ENDS = 3
"""Rows whose marks differ only in the tokens that end turns: they are all alike."""


@dataclass(frozen=True)
class MarkedRow:
    """A conversation rendered whole: what is trained of it, and what the template's `{% generation %}` marks cover."""

    key: str
    file: str
    line: int
    tokens: Int32[np.ndarray, "n"]
    ours: Bool[np.ndarray, "n"]
    theirs: Bool[np.ndarray, "n"]


@dataclass(frozen=True)
class Marks:
    """The template's own marks against what is trained."""

    compared: int = 0
    equal: int = 0
    ends_only: int = 0
    """Rows that differ only in the tokens that end turns: stop tokens and whitespace."""
    incomparable: int = 0
    """Rows that are split, so that no sample is the whole conversation, or that cannot be trained on."""
    rows: tuple[MarkedRow, ...] = ()
    """Some that differ; first those that differ in more than ends."""


def compare_marks(files: Sequence[SourceFile], places: Sequence[Place], tokenizer: Tokenizer, *, shown: int) -> Marks:
    """Compares the rows of the samples, each once; at most `shown` of those that differ are kept.

    What is trained is that of `loss_on: assistant`, without the row's own weights: what marks speak of. Nothing is
    compared where the template has no marks.
    """
    if tokenizer.chat_template is None or not tokenizer.template().has_marks:
        return Marks()
    wanted: dict[int, set[int]] = defaultdict(set)
    for number, sample in places:
        wanted[number].add(int(files[number].cache.lines[sample]))
    outcomes = [
        _compare(files[number], row, tokenizer)
        for number, lines in wanted.items()
        for found in read_again(files[number], lines).values()
        for _, row in found.rows
        if row.messages
    ]
    rows = [row for row in outcomes if row is not None]
    differ = [row for row in rows if not np.array_equal(row.ours, row.theirs)]
    ends = [_differs_in_ends(row, tokenizer) for row in differ]
    order = sorted(range(len(differ)), key=lambda i: (ends[i], len(differ[i].tokens)))
    return Marks(
        compared=len(rows),
        equal=len(rows) - len(differ),
        ends_only=sum(ends),
        incomparable=len(outcomes) - len(rows),
        rows=tuple(differ[i] for i in order[: max(_SHOWN_ENDS, min(shown, len(differ) - sum(ends)))]),
    )


def _compare(file: SourceFile, row: Row, tokenizer: Tokenizer) -> MarkedRow | None:
    marked = template_marks(row, tokenizer)
    (samples,) = encode_rows([replace(row, kind="messages", prompt_length=0, weights=())], tokenizer, ("assistant",))
    if marked is None or isinstance(samples, BadRow) or len(samples) != 1:
        return None
    tokens, theirs = marked
    if not np.array_equal(samples[0].tokens, tokens):
        return None
    return MarkedRow(file.key, row.file, row.line, tokens, samples[0].loss_weights != 0, theirs)


def _differs_in_ends(row: MarkedRow, tokenizer: Tokenizer) -> bool:
    others = row.tokens[row.ours != row.theirs].tolist()
    return all(token in tokenizer.stop_ids or not tokenizer.decode([token]).strip() for token in others)
