"""Records to canonical rows: everything that a row of a dataset can be (`rows.py`), told by its columns or by name.

The second stop of the data path, between `files.py` and `chat.py`. The forms are TRL's (in strings or in messages) and
those found beside them; each has a reader in `forms.py`, `pair_forms.py` or `rankings.py`:

    messages              messages
    sharegpt              conversations, perhaps system
    prompt_completion     prompt, completion
    text                  text
    alpaca                instruction, output (or chosen, rejected), perhaps input, system, history, label; or
                          instruction, instances (objects with input and output)
    preference            prompt, chosen, rejected; or chosen, rejected that begin alike; or one message each in chosen
                          and rejected behind conversations or messages; also chosen_messages, rejected_messages
    hh                    chosen, rejected: texts that begin with "\\n\\nHuman:"
    unpaired_preference   prompt, completion, label; or messages (conversations), label
    ranking               prompt, completions, scores or ranks
    stepwise_supervision  prompt, completions, labels
    tree                  prompt: an object with text, role and replies
    prompt                prompt, where the row is nothing else

Of conversations in any form `tools` (or `functions`) and `chat_template_kwargs` are read. Columns that a form has no
use for are ignored, but `label` beside a completion or a conversation always means preference, unless a format is named
that has none. A row of several forms is refused until the source's `format` names one of them; so is what is not known,
and what would be lost.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.config import SourceConfig
from posttrain.data import forms, pair_forms, rankings
from posttrain.data.fields import Fields
from posttrain.data.files import BadRow, Record, read_records
from posttrain.data.messages import MEDIA, NO_MEDIA
from posttrain.data.problems import Problems, is_empty, printable, type_name
from posttrain.data.rows import Row
from posttrain.data.trees import is_hh
from posttrain.errors import UserError

_FORMS: Mapping[str, tuple[Callable[[Fields], list[Row]], tuple[tuple[str, ...], ...]]] = {
    "messages": (forms.read_messages, (("messages",),)),
    "sharegpt": (forms.read_sharegpt, (("conversations",),)),
    "prompt_completion": (forms.read_prompt_completion, (("prompt", "completion"),)),
    "text": (forms.read_text, (("text",),)),
    "alpaca": (
        forms.read_alpaca,
        (("instruction", "output"), ("instruction", "instances"), ("instruction", "chosen", "rejected")),
    ),
    "preference": (pair_forms.read_preference, (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))),
    "hh": (pair_forms.read_hh_pair, (("chosen", "rejected"),)),
    "unpaired_preference": (
        forms.read_unpaired_preference,
        (("prompt", "completion", "label"), ("messages", "label"), ("conversations", "label")),
    ),
    "ranking": (rankings.read_ranking, (("prompt", "completions", "scores"), ("prompt", "completions", "ranks"))),
    "stepwise_supervision": (forms.read_stepwise_supervision, (("prompt", "completions", "labels"),)),
    "tree": (forms.read_tree_rows, (("prompt",),)),
    "prompt": (forms.read_prompt, (("prompt",),)),
}
"""Each form's reader, and the sets of columns of which it needs one."""

COLUMNS = tuple(
    dict.fromkeys(
        (
            *(column for _, sets in _FORMS.values() for columns in sets for column in columns),
            *("input", "system", "history", "margin", "tools", "functions", "chat_template_kwargs"),
        )
    )
)
"""The columns that have a meaning, as a source's `columns` may name them."""

_KNOWN = " | ".join(dict.fromkeys(" + ".join(sets[0]) for _, sets in _FORMS.values()))

UNWANTED = "answers left out, because they are labelled false"

_UNKNOWN_ROWS_HELD = 1000
"""A file that starts with so many rows of no known form is taken for one of something else."""


class _UnknownForm(BadRow):
    """A row with the columns of no known form."""


def read_rows(
    path: str, source: SourceConfig | None = None, records: Iterable[Record | BadRow] | None = None
) -> Iterator[Row | BadRow]:
    """The rows of a file in order, with a BadRow in the place of each that cannot be used.

    `source` says how the file is to be read, `records` are those to read where they are not all of the file's. Rows
    that `to_rows` leaves out are passed over. Raises UserError where the file cannot be read or, read as a whole, holds
    no row or none of a known form.
    """
    source = source or SourceConfig()
    whole = records is None
    count = 0
    recognized = not whole
    held: list[Row | BadRow] = []
    for record in read_records(path) if records is None else records:
        count += 1
        rows = [record] if isinstance(record, BadRow) else to_rows(record, source)
        if not recognized and (_is_unknown(rows) or (held and isinstance(record, BadRow))):
            held.extend(rows)
            if len(held) == _UNKNOWN_ROWS_HELD:
                break
            continue
        if isinstance(record, Record) and not recognized:
            recognized = True
            yield from held
            held.clear()
        yield from rows
    if whole and count == 0:
        raise UserError(f"{path}: the file holds no rows")
    if held and isinstance(held[0], BadRow):
        raise UserError(f"{path}: no row of a known form in {len(held)} rows; the first, {held[0].where}")


def to_rows(record: Record, source: SourceConfig) -> list[Row | BadRow]:
    """The rows of `read_record` alone."""
    return read_record(record, source)[0]


def read_record(record: Record, source: SourceConfig) -> tuple[list[Row | BadRow], Mapping[str, int]]:
    """(the rows of a record, how much of it becomes part of none though nothing is wrong with it, by reason).

    The rows are one, several of a ranking or a message tree, none where nothing of the record is used; or a BadRow.
    With `source.preference` chosen a pair becomes a prompt with the chosen answer as its completion, and so does an
    answer that is labelled true; one labelled false is left out. With error both stay what they are. Raises UserError
    where `source.columns` speaks of a column that has no meaning.
    """
    if not isinstance(record.value, dict):
        return [BadRow(record.file, record.line, "", f"a row is a JSON object, not {type_name(record.value)}")], {}
    columns = _renamed(record, source) if source.columns else record.columns
    if isinstance(columns, BadRow):
        return [columns], {}
    fields = Fields(record, columns, source, Problems(), Counter())
    problems = fields.problems
    for name in MEDIA:
        if name in columns and not is_empty(columns[name]):
            problems.add(fields.key(name), NO_MEDIA)
    form = _form(record, columns, source)
    if isinstance(form, BadRow):
        return [problems.bad_row(record.file, record.line) if problems else form], {}
    try:
        rows = _FORMS[form][0](fields)
    except RecursionError:
        return [BadRow(record.file, record.line, "", "is nested too deeply to be read; fix: leave the row out")], {}
    if problems:
        return [problems.bad_row(record.file, record.line)], {}
    if source.preference == "chosen":
        rows = [made for row in rows for made in _for_training(row, fields.left_out)]
    return list(rows), +fields.left_out


def _is_unknown(rows: Sequence[Row | BadRow]) -> bool:
    return any(isinstance(row, _UnknownForm) for row in rows)


def _for_training(row: Row, left_out: Counter[str]) -> tuple[Row, ...]:
    """What supervised training takes of a row: of preference the wanted answer."""
    if row.kind == "preference":
        chosen = replace(row, kind="prompt_completion", rejected="", rejected_messages=(), rejected_keys=())
        return (replace(chosen, margin=None),)
    if row.kind == "unpaired_preference":
        left_out[UNWANTED] += not row.label
        return (replace(row, kind="prompt_completion", label=None),) if row.label else ()
    return (row,)


# ---- columns and forms ----------------------------------------------------------------------------------------------


def _renamed(record: Record, source: SourceConfig) -> dict[str, Any] | BadRow:
    """The record's columns by their usual names. Every column that the source names has to be there, null or not."""
    for usual in source.columns:
        if usual not in COLUMNS:
            raise UserError(
                f"{source.path or record.file}: columns: {usual!r} is no column that means anything"
                + (_did_you_mean(usual, COLUMNS) or f"; known: {', '.join(COLUMNS)}")
            )
    for usual, name in source.columns.items():
        if name not in record.value:
            has = printable(", ".join(record.value)) or "none"
            reason = f"the row has no such column, which the source's columns name for {usual}; it has {has}"
            return _UnknownForm(record.file, record.line, name, reason + _did_you_mean(name, record.value))
    taken = {*source.columns, *source.columns.values()}
    kept = {name: value for name, value in record.columns.items() if name not in taken}
    named = {usual: record.value[name] for usual, name in source.columns.items()}
    return kept | {usual: value for usual, value in named.items() if value is not None}


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _form(record: Record, columns: Mapping[str, Any], source: SourceConfig) -> str | BadRow:
    """The one form that the row is of, or what is wrong."""
    if source.format == "auto":
        if half := _half_pair(record, columns, source):
            return half
        found = _forms(columns)
        if len(found) > 1:
            reason = f"the row is of several forms ({', '.join(found)}); fix: set the source's format to one of them"
            return BadRow(record.file, record.line, "", reason)
        if found:
            return found[0]
        key, known = "", _KNOWN
    else:
        sets = _FORMS[source.format][1]
        if any(all(name in columns for name in needed) for needed in sets):
            return source.format
        missing = min(([name for name in needed if name not in columns] for needed in sets), key=len)
        key = source.columns.get(missing[0], missing[0])
        known = " | ".join(" + ".join(needed) for needed in sets)
    has = printable(", ".join(record.columns)) or "none"
    return _UnknownForm(
        record.file, record.line, key, f"the row has no known set of columns: it has {has}; known: {known}"
    )


def _half_pair(record: Record, columns: Mapping[str, Any], source: SourceConfig) -> BadRow | None:
    """Refuses a pair of which one side is null: it would be taken for something else."""
    for one, other in (("chosen", "rejected"), ("chosen_messages", "rejected_messages")):
        for present, absent in ((one, other), (other, one)):
            name = source.columns.get(absent, absent)
            if present in columns and absent not in columns and name in record.value:
                reason = f"is null, and {source.columns.get(present, present)} is not; "
                fix = "fix: both, or leave the row out, or set the source's format where they are no pair"
                return BadRow(record.file, record.line, name, reason + fix)
    return None


def _forms(columns: Mapping[str, Any]) -> list[str]:
    """All forms that the columns speak of; `prompt` only where it is all that is known."""
    found = []
    talks = [name for name in ("messages", "conversations") if name in columns]
    pair = "chosen" in columns and "rejected" in columns
    if "instruction" in columns and ("output" in columns or "instances" in columns or pair):
        found.append("alpaca")
    elif pair or ("chosen_messages" in columns and "rejected_messages" in columns):
        is_text = "prompt" not in columns and is_hh(columns.get("chosen")) and is_hh(columns.get("rejected"))
        found.append("hh" if is_text else "preference")
        if isinstance(columns.get("chosen"), dict) and "prompt" not in columns and len(talks) == 1:
            talks = []  # what the two answer
    found += ["sharegpt" if name == "conversations" else name for name in talks]
    if "text" in columns:
        found.append("text")
    if "prompt" in columns:
        if isinstance(columns["prompt"], dict):
            found.append("tree")
        if "completion" in columns:
            found.append("prompt_completion")
        if "completions" in columns and ("scores" in columns or "ranks" in columns):
            found.append("ranking")
        if "completions" in columns and "labels" in columns:
            found.append("stepwise_supervision")
    if found in (["messages"], ["sharegpt"], ["prompt_completion"]) and "label" in columns:
        return ["unpaired_preference"]
    return found or (["prompt"] if "prompt" in columns else [])
