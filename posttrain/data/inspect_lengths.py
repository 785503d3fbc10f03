"""The lengths and the packing of an `Inspection` in words and numbers: of samples, and of answers where the objective
tells some from others.

Beside `inspect_summary.py`, shared by `inspect_text.py` and `inspect_page.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from posttrain.data.inspect import Inspection
from posttrain.data.inspect_rows import MISMATCHED, Segment, ShownSample
from posttrain.data.inspect_summary import Cell, NumberTable, percent, plural


@dataclass(frozen=True)
class Histogram:
    """How many things of each kind have `edges[i]` to `edges[i + 1] - 1` tokens."""

    edges: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    """One row for each kind."""


def histogram(kinds: Sequence[Int[np.ndarray, "_"]], border: int | None = None, *, per_doubling: int = 2) -> Histogram:
    """Buckets that grow with the length, one or two to each doubling; one begins at the border."""
    kinds = [np.sort(lengths) for lengths in kinds]
    longest = max((int(lengths[-1]) for lengths in kinds if len(lengths)), default=0)
    if not longest:
        return Histogram((), ())
    powers = [2**k for k in range(longest.bit_length() + 2)]
    edges = sorted({*powers, *(3 * power // 2 for power in powers[1:] if per_doubling == 2)})
    if border is not None:
        edges = sorted({border, *(edge for edge in edges if abs(edge - border) > 0.12 * border)})
    counts = np.array([np.diff(np.searchsorted(lengths, edges)) for lengths in kinds])
    filled = np.flatnonzero(counts.any(axis=0))
    first, last = int(filled[0]), int(filled[-1])
    return Histogram(tuple(edges[first : last + 2]), tuple(map(tuple, counts[:, first : last + 1].tolist())))


# ---- samples --------------------------------------------------------------------------------------------------------


def length_histogram(inspection: Inspection) -> Histogram:
    """Of all samples, of pairs of all their sides; no bucket reaches over `data.max_length`."""
    return histogram([inspection.lengths], inspection.data.max_length + 1)


def lengths_text(inspection: Inspection) -> str:
    """The lengths in a sentence."""
    lengths, limit = inspection.lengths, inspection.data.max_length
    if not len(lengths):
        return f"There are no {inspection.noun}s."
    what = "sides, each with its prompt," if inspection.rows == "pairs" else "samples"
    half, most = _quantile(lengths, 0.5), _quantile(lengths, 0.95)
    over = len(lengths) - int(np.searchsorted(lengths, limit, side="right"))
    text = f"Half of the {what} have up to {plural(half, 'token')}, 95% up to {most:,}, the longest {lengths[-1]:,}."
    if not over:
        return text
    text += f" {f'{over:,} are' if over != 1 else '1 is'} over data.max_length = {limit:,}"
    if inspection.answers is not None:
        text += f": {', '.join(f'{count:,} {kind}' for kind, count in inspection.answers.over_long.items())}"
    return f"{text}."


def sample_text(sample: ShownSample) -> str:
    """How long a sample is, and how much of it is trained."""
    if len(sample.segments) == 1:
        (segment,) = sample.segments
        of_all = percent(segment.trained, len(segment.tokens))
        return f"{plural(len(segment.tokens), 'token')}, {segment.trained:,} trained ({of_all})"
    named = zip(sample.names, sample.segments, strict=True)
    trained = ", ".join(f"{name} {trained_text(name, segment)}" for name, segment in named)
    text = f"{plural(len(sample.tokens), 'token')}: {trained}"
    return f"{text}; margin {sample.margin:g}" if sample.margin else text


def trained_text(name: str, segment: Segment) -> str:
    """How many tokens of an answer count; a mismatched one is no answer to learn."""
    return f"{segment.trained:,} {'measured' if name == MISMATCHED else 'trained'}"


def _quantile(lengths: Int[np.ndarray, "_"], share: float) -> int:
    """Of ascending lengths."""
    return int(lengths[int(share * (len(lengths) - 1))])


def packing_text(inspection: Inspection) -> str:
    """The packing in a sentence."""
    if inspection.datasets is None:
        return "There are no packed rows: no run could be built of this data."
    train, noun = inspection.datasets.train, inspection.noun
    text = (
        f"{plural(train.num_rows, 'row')} of {train.row_length:,} tokens hold {plural(train.num_samples, noun)}: "
        f"{train.num_samples / train.num_rows:.1f} a row, {percent(train.efficiency, 1)} filled."
    )
    mismatched = " Each sample has a second segment, its prompt with the answer to another: the point of reference."
    return text if train.table.partners is None else text + mismatched


# ---- answers --------------------------------------------------------------------------------------------------------


def answer_histogram(inspection: Inspection, *, per_doubling: int = 2) -> Histogram:
    """Trained tokens of the answers of each kind."""
    trained = {} if inspection.answers is None else inspection.answers.trained
    return histogram([*trained.values()], per_doubling=per_doubling)


def answers_text(inspection: Inspection) -> str:
    """What tells answers apart at first sight, in a few sentences; empty where the objective tells none from others."""
    answers = inspection.answers
    if answers is None or not sum(answers.counts.values()):
        return ""
    measured = len(answers.prompts)
    if inspection.rows == "pairs":
        available = answers.counts["chosen"]
        chosen, rejected = answers.longer
        equal = measured - chosen - rejected
        text = (
            f"The chosen answer is the longer one in {percent(chosen, measured)} of {plural(measured, 'pair')}, the "
            f"rejected one in {percent(rejected, measured)}; in {percent(equal, measured)} both are equally long."
        )
    else:
        available = sum(answers.counts.values())
        shares = [f"{n:,} ({percent(n, available)}) are {kind}" for kind, n in answers.counts.items()]
        text = f"Of {plural(available, 'answer')} {' and '.join(shares)}."
    if answers.different_prompts < available:
        text += f" They answer {plural(answers.different_prompts, 'different prompt')}."
    if len(margins := answers.margins):
        spread = f"from {margins.min():.3g} to {margins.max():.3g}, {margins.mean():.3g} on average"
        text += f" Margins, in {plural(len(margins), 'pair')}: {spread}."
    elif inspection.rows == "pairs":
        text += " No row gives a margin."
    if measured < available:
        text += f" Lengths are those of {measured:,} of {available:,} {inspection.noun}s, evenly spread."
    return text


def answer_table(inspection: Inspection) -> NumberTable | None:
    """Lengths of prompts and of the answers of each kind; None where there are none."""
    answers = inspection.answers
    if answers is None or not len(answers.prompts):
        return None
    kinds = {"Prompts": answers.prompts}
    kinds |= {f"{kind.capitalize()} answers": trained for kind, trained in answers.trained.items()}
    columns = ("Tokens of", "Mean", "5% up to", "Half up to", "95% up to", "Longest")
    return NumberTable(columns, tuple(_length_cells(name, np.sort(of)) for name, of in kinds.items()))


def _length_cells(name: str, lengths: Int[np.ndarray, "_"]) -> tuple[Cell, ...]:
    if not len(lengths):
        return (name, ""), *[("", "")] * 5
    quantiles = [_quantile(lengths, share) for share in (0.05, 0.5, 0.95, 1.0)]
    return (name, ""), (f"{lengths.mean():,.1f}", ""), *((f"{quantile:,}", "") for quantile in quantiles)
