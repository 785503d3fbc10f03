"""An `Inspection` as one HTML page: no network, no other file, and no text of the data ever read as HTML or script.

The page is drawn by `inspect_page.js` from JSON that is made here. Its policy (CSP) lets run exactly that script and
that style, told by their hashes, and load nothing. Tokens are numbers into a list of distinct pieces of text, weights
are run lengths, so that hundreds of samples take a few megabytes.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from posttrain.data.inspect import Inspection, PackedRow
from posttrain.data.inspect_answers import LABELS
from posttrain.data.inspect_lengths import (
    Histogram,
    answer_histogram,
    answer_table,
    answers_text,
    length_histogram,
    lengths_text,
    packing_text,
    sample_text,
    trained_text,
)
from posttrain.data.inspect_marks import MarkedRow
from posttrain.data.inspect_rows import MISMATCHED, Part, Reject, ShownSample, parts
from posttrain.data.inspect_summary import (
    Cell,
    NumberTable,
    headline,
    marks_text,
    notices,
    plural,
    source_table,
    tokenizer_facts,
)
from posttrain.data.page import base_style, policy, resource, write
from posttrain.data.token_text import Piece, pieces
from posttrain.data.tokenizer import Tokenizer

_SAMPLE_TOKENS = 3000
"""Tokens of one sample on the page; of a longer one its start and its end."""
_PAGE_TOKENS = 400_000
"""Tokens of all samples; what comes behind is left out, and the page says so."""
_PAGE_RAW = 2_000_000
"""Characters of raw rows."""
_PACKED_ROWS = 3
_PACKED_TOKENS = 60_000
_PICTURED_ROWS = 15
_FLAGS = (
    *("dropped", "rejected", "left out", "truncated", "split", "duplicate", *LABELS),
    *("held out", "has tools", "other weights"),
)


def write_page(inspection: Inspection, path: str, *, name: str) -> None:
    """Writes the page to `path` (any path that epath opens); `name` is what the run is called. Raises UserError."""
    write(path, page_html(inspection, name=name))


def page_html(inspection: Inspection, *, name: str) -> str:
    """The page."""
    html_file, script, own = (resource("posttrain.data", f"inspect_page.{kind}") for kind in ("html", "js", "css"))
    style = base_style() + own
    parts = {
        "CSP": policy(style, script),
        "TITLE": html.escape(f"{name}: training data"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _embed(_payload(inspection, name)),
    }
    return re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], html_file)


def _embed(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever the data."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


# ---- tokens ---------------------------------------------------------------------------------------------------------


class _Vocabulary:
    """Distinct pieces of text, in the order in which they are first used."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[tuple[int, ...], str], int] = {}
        self.rows: list[tuple[list[int], str, int]] = []

    def _number(self, piece: Piece) -> int:
        key = (piece.ids, piece.text)
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            self.rows.append((list(piece.ids), piece.text, int(piece.special)))
        return self._numbers[key]

    def encode(
        self, found: Sequence[Piece], weights: Float32[np.ndarray, "n"] | Bool[np.ndarray, "n"], limit: int
    ) -> dict[str, Any]:
        """Pieces with the weights of their tokens: of a long text its start and its end only."""
        start = found[0].start if found else 0
        count = len(weights)
        head, tail, gap = list(found), [], slice(0, 0)
        if count > limit:
            head = [piece for piece in found if piece.start + len(piece.ids) - start <= 2 * limit // 3]
            tail = [piece for piece in found if piece.start - start >= count - limit // 3]
            first = head[-1].start + len(head[-1].ids) - start if head else 0
            gap = slice(first, tail[0].start - start if tail else count)
        return {
            "pieces": [self._number(piece) for piece in head + tail],
            "weights": _weights(weights, gap),
            "start": start,
            "gap": [len(head), gap.stop - gap.start] if count > limit else [0, 0],
        }


def _runs(values: Sequence[int | float]) -> list[int | float]:
    """Run lengths: [how often, value, how often, value, ...]."""
    return [number for value, run in groupby(values) for number in (sum(1 for _ in run), value)]


def _weights(values: Float32[np.ndarray, "n"] | Bool[np.ndarray, "n"], gap: slice) -> list[int | float]:
    """Run lengths without the gap; weights as short as float32 can be told apart."""
    shown = np.delete(values, np.arange(gap.start, gap.stop))
    return _runs([int(v) if float(v).is_integer() else float(str(v)) for v in shown])


# ---- the page's data ------------------------------------------------------------------------------------------------


def _payload(inspection: Inspection, name: str) -> dict[str, Any]:
    vocabulary = _Vocabulary()
    keys = [of.key for of in inspection.stats]
    samples = _samples(inspection, vocabulary, keys)
    flags = Counter(flag for sample in samples for flag in sample["flags"])
    data = inspection.data
    return {
        "rows_of": inspection.rows,
        "noun": inspection.noun,
        "subtitle": _subtitle(inspection, name),
        "headline": headline(inspection),
        "attention": [
            {"level": n.level, "text": n.text, "fix": n.fix, "flag": n.flag if flags[n.flag] else ""}
            for n in notices(inspection)
        ],
        "sources": _table(source_table(inspection)),
        "source_names": [f"{of.key}: {of.path}" for of in inspection.stats],
        "lengths": {
            "title": "Lengths of both sides" if inspection.rows == "pairs" else "Sample lengths",
            "text": lengths_text(inspection),
            **_histogram(length_histogram(inspection), ["side" if inspection.rows == "pairs" else "sample"]),
            "over": data.max_length,
            "limits": [["data.max_length", data.max_length], ["data.row_length", data.row_length]],
        },
        "answers": _answers(inspection),
        "packing": {
            "text": _packing(inspection),
            "row_length": data.row_length,
            "rows": [_bars(row) for row in inspection.packed[:_PICTURED_ROWS]],
        },
        "samples": samples,
        "samples_text": _samples_text(inspection, samples),
        "flags": [[flag, flags[flag]] for flag in _FLAGS if flags[flag]],
        "rows": _packed(inspection, vocabulary),
        "marks": {
            "text": marks_text(inspection),
            "rows": [_marked(row, vocabulary, inspection.tokenizer) for row in inspection.marks.rows],
        },
        "tokenizer": {"facts": tokenizer_facts(inspection), "template": inspection.tokenizer.chat_template or ""},
        "pieces": vocabulary.rows,
    }


def _table(table: NumberTable | None) -> dict[str, Any] | None:
    return table and {
        "columns": table.columns,
        "rows": [_cells(row) for row in table.rows],
        "remarks": table.remarks,
        "total": [] if table.total is None else [_cells(table.total)],
    }


def _histogram(histogram: Histogram, kinds: Sequence[str]) -> dict[str, Any]:
    return {"edges": histogram.edges, "kinds": list(kinds), "counts": histogram.counts, "over": None, "limits": []}


def _answers(inspection: Inspection) -> dict[str, Any] | None:
    """How long the answers of each kind are; None where the objective tells none from others."""
    answers = inspection.answers
    if answers is None:
        return None
    kinds = [f"{kind} answer" for kind in answers.counts]
    text, table = answers_text(inspection), _table(answer_table(inspection))
    return {"text": text, "table": table, **_histogram(answer_histogram(inspection), kinds)}


def _cells(cells: Sequence[Cell]) -> list[str | list[str]]:
    return [[text, small] if small else text for text, small in cells]


def _subtitle(inspection: Inspection, name: str) -> str:
    return f"{name} · tokenizer {inspection.tokenizer.source} · trained on: {', '.join(inspection.data.loss_on)}"


def _packing(inspection: Inspection) -> str:
    text = packing_text(inspection)
    shown = min(len(inspection.packed), _PICTURED_ROWS)
    if not shown:
        return text
    first = inspection.packed[0]
    boxes = "a sample, blue is trained on"
    if inspection.answers is not None:
        boxes = "a prompt and its answer, {} in thick blue, {} in thin orange".format(*inspection.answers.counts)
        boxes += ", mismatched in grey" if MISMATCHED in first.samples[0].names else ""
    return f"{text} Below, {plural(shown, 'row')} from step {first.step}: each box is {boxes}."


def _bars(row: PackedRow) -> list[dict[str, Any]]:
    """Of each segment how many tokens are only read, trained on, only read, ...; and what it is."""
    bars = []
    for sample in row.samples:
        for name, segment in zip(sample.names, sample.segments, strict=True):
            runs = [(on, sum(1 for _ in run)) for on, run in groupby((segment.loss_weights != 0).tolist())]
            lengths = [0] * bool(runs and runs[0][0]) + [length for _, length in runs]
            place = f"{sample.file}:{sample.line}"
            bars.append({"place": f"{place} ({name})" if name else place, "runs": lengths, "name": name})
    return bars


def _samples(inspection: Inspection, vocabulary: _Vocabulary, keys: list[str]) -> list[dict[str, Any]]:
    """Samples, then rejected rows, as far as the page's limits go."""
    found, tokens, raw = [], 0, 0
    for sample in inspection.samples:
        tokens += sum(min(len(segment.tokens), _SAMPLE_TOKENS) for segment in sample.segments)
        if tokens > _PAGE_TOKENS and found:
            break
        raw += len(sample.raw)
        shown = _sample(sample, vocabulary, inspection.tokenizer)
        found.append(shown | {"source": keys.index(sample.key), "row": sample.raw if raw <= _PAGE_RAW else ""})
    for reject in inspection.rejects:
        raw += len(reject.raw)
        shown = _reject(reject)
        found.append(shown | {"source": keys.index(reject.key), "row": reject.raw if raw <= _PAGE_RAW else ""})
    return found


def _sample(sample: ShownSample, vocabulary: _Vocabulary, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "place": f"{sample.file}:{sample.line}",
        "key": "",
        "reason": sample.fate if {"dropped", "left out"} & set(sample.flags) else "",
        "flags": sample.flags,
        "notes": sample.notes,
        "numbers": sample_text(sample),
        "parts": [_part(part, vocabulary) for part in parts(sample, tokenizer)],
    }


def _part(part: Part, vocabulary: _Vocabulary) -> dict[str, Any]:
    return {
        "name": part.name,
        "numbers": trained_text(part.name, part.segment),
        **vocabulary.encode(part.pieces, part.weights, _SAMPLE_TOKENS),
        "cut": [part.cut_before, part.cut_behind],
        "border": part.segment.border,
    }


def _reject(reject: Reject) -> dict[str, Any]:
    return {
        **{"place": f"{reject.file}:{reject.line}", "key": reject.place, "reason": reject.reason},
        **{"flags": ["rejected"], "notes": [], "numbers": "", "parts": []},
    }


def _samples_text(inspection: Inspection, samples: Sequence[dict[str, Any]]) -> str:
    rejected = sum("rejected" in sample["flags"] for sample in samples)
    shown, asked, noun = len(samples) - rejected, len(inspection.samples), inspection.noun
    of_all = sum(file.cache.num_samples for file in inspection.files)
    if inspection.matches is not None:
        text = f"Shown are {shown:,} of {plural(inspection.matches, noun)} with the text that was searched for"
    else:
        text = f"Shown are {shown:,} of {plural(of_all, noun)}, some of every source and of everything remarkable"
    text += f", and {rejected:,} of {plural(inspection.bad_rows, 'rejected row')}." if inspection.bad_rows else "."
    if shown < asked:
        text += f" {asked - shown:,} more were asked for, but would make the page too large."
    how = "Point at a token, tap it, or walk with the arrow keys, to see its id and weight."
    return f"{text} {how}"


def _packed(inspection: Inspection, vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    found, tokens = [], 0
    for row in inspection.packed[:_PACKED_ROWS]:
        tokens += row.tokens
        if tokens > _PACKED_TOKENS and found:
            break
        padding = row.row_length - row.tokens
        count = plural(len(row.samples), inspection.noun)
        title = f"Step {row.step}, row {row.row}: {count}, {row.tokens:,} tokens, {padding:,} of padding"
        samples = [_sample(sample, vocabulary, inspection.tokenizer) for sample in row.samples]
        found.append({"title": title, "samples": samples, "padding": padding})
    return found


def _marked(row: MarkedRow, vocabulary: _Vocabulary, tokenizer: Tokenizer) -> dict[str, Any]:
    found = pieces(tokenizer, row.tokens)
    uncut = {"cut": [0, 0], "border": 0}
    return {
        "place": f"{row.file}:{row.line}",
        "differ": int(np.count_nonzero(row.ours != row.theirs)),
        "ours": uncut | vocabulary.encode(found, row.ours, _SAMPLE_TOKENS),
        "theirs": uncut | vocabulary.encode(found, row.theirs, _SAMPLE_TOKENS),
    }
