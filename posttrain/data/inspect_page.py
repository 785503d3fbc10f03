"""An `Inspection` as one HTML page: no network, no other file, and no text of the data ever read as HTML or script.

The page is drawn by `inspect_page.js` from JSON that is made here. Its policy (CSP) lets run exactly that script and
that style, told by their hashes, and load nothing. Tokens are numbers into a list of distinct pieces of text, weights
are run lengths, so that hundreds of samples take a few megabytes.
"""

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float32

from posttrain.data.inspect import Inspection, PackedRow
from posttrain.data.inspect_rows import MarkedRow, Reject, ShownSample
from posttrain.data.inspect_summary import (
    Cell,
    headline,
    length_histogram,
    lengths_text,
    marks_text,
    notices,
    packing_text,
    plural,
    source_table,
    tokenizer_facts,
)
from posttrain.data.token_text import Piece, pieces
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError

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
    *("dropped", "rejected", "left out", "truncated", "split", "duplicate"),
    *("held out", "has tools", "other weights"),
)


def write_page(inspection: Inspection, path: str, *, name: str) -> None:
    """Writes the page to `path` (any path that epath opens); `name` is what the run is called. Raises UserError."""
    page = page_html(inspection, name=name)
    target = epath.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(page.encode("utf-8", "replace"))
    except (OSError, ValueError, ImportError, LookupError) as error:
        raise UserError(f"--html {path}: cannot be written: {error}") from error


def page_html(inspection: Inspection, *, name: str) -> str:
    """The page."""
    files = {
        kind: resources.files("posttrain.data").joinpath(f"inspect_page.{kind}").read_text("utf-8") for kind in _KINDS
    }
    script, style = files["js"], files["css"]
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "CSP": policy,
        "TITLE": html.escape(f"{name}: training data"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _embed(_payload(inspection, name)),
    }
    return re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], files["html"])


_KINDS = ("html", "css", "js")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _embed(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever the data."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


# ---- tokens ---------------------------------------------------------------------------------------------------------


class _Vocabulary:
    """Distinct pieces of text, in the order in which they are first used."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._numbers: dict[tuple[tuple[int, ...], str], int] = {}
        self.rows: list[tuple[list[int], str, int]] = []

    def _number(self, piece: Piece) -> int:
        key = (piece.ids, piece.text)
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            self.rows.append((list(piece.ids), piece.text, int(piece.special)))
        return self._numbers[key]

    def encode(self, tokens: np.ndarray, limit: int) -> tuple[list[int], list[int], slice]:
        """(piece numbers, [pieces before a gap, tokens in it], the gap): of a long text its start and its end only."""
        found = pieces(self._tokenizer, tokens)
        if len(tokens) <= limit:
            return [self._number(piece) for piece in found], [0, 0], slice(0, 0)
        head = [piece for piece in found if piece.start + len(piece.ids) <= 2 * limit // 3]
        tail = [piece for piece in found if piece.start >= len(tokens) - limit // 3]
        gap = slice(head[-1].start + len(head[-1].ids) if head else 0, tail[0].start if tail else len(tokens))
        return [self._number(piece) for piece in head + tail], [len(head), gap.stop - gap.start], gap


def _runs(values: Sequence[int | float]) -> list[int | float]:
    """Run lengths: [how often, value, how often, value, ...]."""
    return [number for value, run in groupby(values) for number in (sum(1 for _ in run), value)]


def _weights(values: Float32[np.ndarray, "n"] | Bool[np.ndarray, "n"], gap: slice) -> list[int | float]:
    """Run lengths without the gap; weights as short as float32 can be told apart."""
    shown = np.delete(values, np.arange(gap.start, gap.stop))
    return _runs([int(v) if float(v).is_integer() else float(str(v)) for v in shown])


# ---- the page's data ------------------------------------------------------------------------------------------------


def _payload(inspection: Inspection, name: str) -> dict[str, Any]:
    vocabulary = _Vocabulary(inspection.tokenizer)
    keys = [of.key for of in inspection.stats]
    samples = _samples(inspection, vocabulary, keys)
    flags = Counter(flag for sample in samples for flag in sample["flags"])
    table = source_table(inspection)
    histogram = length_histogram(inspection)
    data = inspection.data
    return {
        "subtitle": _subtitle(inspection, name),
        "headline": headline(inspection),
        "attention": [
            {"level": n.level, "text": n.text, "fix": n.fix, "flag": n.flag if flags[n.flag] else ""}
            for n in notices(inspection)
        ],
        "sources": {
            "columns": table.columns,
            "rows": [_cells(row) for row in table.rows],
            "remarks": table.remarks,
            "total": [] if table.total is None else [_cells(table.total)],
        },
        "source_names": [f"{of.key}: {of.path}" for of in inspection.stats],
        "lengths": {
            "text": lengths_text(inspection),
            "edges": histogram.edges,
            "counts": histogram.counts,
            "over": data.max_length,
            "limits": [["data.max_length", data.max_length], ["data.row_length", data.row_length]],
        },
        "packing": {
            "text": _packing(inspection),
            "row_length": data.row_length,
            "rows": [_bars(row) for row in inspection.packed[:_PICTURED_ROWS]],
        },
        "samples": samples,
        "samples_text": _samples_text(inspection, samples),
        "flags": [[flag, flags[flag]] for flag in _FLAGS if flags[flag]],
        "rows": _packed(inspection.packed, vocabulary, keys),
        "marks": {
            "text": marks_text(inspection),
            "rows": [_marked(row, vocabulary, keys) for row in inspection.marks.rows],
        },
        "tokenizer": {"facts": tokenizer_facts(inspection), "template": inspection.tokenizer.chat_template or ""},
        "pieces": vocabulary.rows,
    }


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
    return f"{text} Below, {plural(shown, 'row')} from step {first.step}: each box is a sample, blue is trained on."


def _bars(row: PackedRow) -> list[dict[str, Any]]:
    """Of each segment how many tokens are only read, trained on, only read, ..."""
    bars = []
    for segment in row.segments:
        runs = [(on, sum(1 for _ in run)) for on, run in groupby((segment.loss_weights != 0).tolist())]
        lengths = [0] * bool(runs and runs[0][0]) + [length for _, length in runs]
        bars.append({"place": f"{segment.file}:{segment.line}", "runs": lengths})
    return bars


def _samples(inspection: Inspection, vocabulary: _Vocabulary, keys: list[str]) -> list[dict[str, Any]]:
    """Samples, then rejected rows, as far as the page's limits go."""
    found, tokens, raw = [], 0, 0
    for sample in inspection.samples:
        tokens += min(len(sample.tokens), _SAMPLE_TOKENS)
        if tokens > _PAGE_TOKENS and found:
            break
        raw += len(sample.raw)
        found.append(_sample(sample, vocabulary, keys, with_raw=raw <= _PAGE_RAW))
    for reject in inspection.rejects:
        raw += len(reject.raw)
        found.append(_reject(reject, keys, with_raw=raw <= _PAGE_RAW))
    return found


def _sample(sample: ShownSample, vocabulary: _Vocabulary, keys: list[str], *, with_raw: bool) -> dict[str, Any]:
    numbers, gap, left_out = vocabulary.encode(sample.tokens, _SAMPLE_TOKENS)
    return {
        "source": keys.index(sample.key),
        "place": f"{sample.file}:{sample.line}",
        "key": "",
        "reason": sample.fate if {"dropped", "left out"} & set(sample.flags) else "",
        "flags": sample.flags,
        "notes": sample.notes,
        "total": len(sample.tokens),
        "trained": int(np.count_nonzero(sample.loss_weights)),
        "pieces": numbers,
        "weights": _weights(sample.loss_weights, left_out),
        "gap": gap,
        "cut": [sample.cut_before, sample.cut_behind],
        "border": sample.border,
        "row": sample.raw if with_raw else "",
    }


def _reject(reject: Reject, keys: list[str], *, with_raw: bool) -> dict[str, Any]:
    return {
        **{"source": keys.index(reject.key), "place": f"{reject.file}:{reject.line}", "key": reject.place},
        **{"reason": reject.reason, "flags": ["rejected"], "notes": [], "total": 0, "trained": 0, "pieces": []},
        **{"weights": [], "gap": [0, 0], "cut": [0, 0], "border": 0, "row": reject.raw if with_raw else ""},
    }


def _samples_text(inspection: Inspection, samples: Sequence[dict[str, Any]]) -> str:
    rejected = sum("rejected" in sample["flags"] for sample in samples)
    shown, asked = len(samples) - rejected, len(inspection.samples)
    of_all = sum(file.cache.num_samples for file in inspection.files)
    if inspection.matches is not None:
        text = f"Shown are {shown:,} of {plural(inspection.matches, 'sample')} with the text that was searched for"
    else:
        text = f"Shown are {shown:,} of {plural(of_all, 'sample')}, some of every source and of everything remarkable"
    text += f", and {rejected:,} of {plural(inspection.bad_rows, 'rejected row')}." if inspection.bad_rows else "."
    if shown < asked:
        text += f" {asked - shown:,} more were asked for, but would make the page too large."
    how = "Point at a token, tap it, or walk with the arrow keys, to see its id and weight."
    return f"{text} {how}"


def _packed(rows: Sequence[PackedRow], vocabulary: _Vocabulary, keys: list[str]) -> list[dict[str, Any]]:
    found, tokens = [], 0
    for row in rows[:_PACKED_ROWS]:
        tokens += row.tokens
        if tokens > _PACKED_TOKENS and found:
            break
        padding = row.row_length - row.tokens
        title = f"Step {row.step}, row {row.row}: {plural(len(row.segments), 'sample')}, {row.tokens:,} tokens"
        segments = [_sample(segment, vocabulary, keys, with_raw=False) for segment in row.segments]
        found.append({"title": f"{title}, {padding:,} of padding", "segments": segments, "padding": padding})
    return found


def _marked(row: MarkedRow, vocabulary: _Vocabulary, keys: list[str]) -> dict[str, Any]:
    numbers, gap, left_out = vocabulary.encode(row.tokens, _SAMPLE_TOKENS)
    return {
        "source": keys.index(row.key),
        "place": f"{row.file}:{row.line}",
        "differ": int(np.count_nonzero(row.ours != row.theirs)),
        "pieces": numbers,
        "gap": gap,
        "cut": [0, 0],
        "border": 0,
        "ours": _weights(row.ours, left_out),
        "theirs": _weights(row.theirs, left_out),
    }
