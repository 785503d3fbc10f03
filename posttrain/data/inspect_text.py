"""An `Inspection` in the terminal: numbers first, then what needs attention, then rows as the model sees them.

With colours trained text is blue and underlined, special tokens are reversed; without (a pipe, a file, NO_COLOR)
trained text stands in brackets. Line ends, tabs and characters that are invisible, reorder text or steer a terminal
are shown, not sent.
"""

import math
import re
import unicodedata
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.data.inspect import Inspection, InspectOptions, PackedRow
from posttrain.data.inspect_lengths import (
    Histogram,
    answer_histogram,
    answer_table,
    answers_text,
    lengths_text,
    packing_text,
    sample_text,
)
from posttrain.data.inspect_rows import Part, Reject, ShownSample, parts
from posttrain.data.inspect_summary import (
    LEVEL_WORDS,
    Cell,
    Level,
    NumberTable,
    headline,
    marks_text,
    notices,
    plural,
    source_table,
    tokenizer_facts,
)
from posttrain.data.tokenizer import Tokenizer

TRAINED, OTHER_WEIGHT, SPECIAL, MARK = "underline dodger_blue1", "underline dark_orange3", "reverse", "dim"
_LEVEL_STYLES: dict[Level, str] = {
    "stop": "bold red",
    "warn": "bold dark_orange3",
    "info": "bold",
    "good": "bold green",
}
_SHOWN_REJECTS = 5
_BAR = 24
"""Places of the longest bar."""
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_JOINERS = "\u200c\u200d"
"""Format characters that belong to words and emoji."""


def show(inspection: Inspection, options: InspectOptions, console: Console | None = None) -> None:
    """Prints it to standard output."""
    printer = console or Console(highlight=False)
    for part in (_summary, _answers, _attention, _rejects):
        part(inspection, printer)
    if options.find is not None:
        matches = f"{plural(inspection.matches or 0, inspection.noun)} with {visible(options.find)!r}"
        _title(printer, f"{matches}, {min(options.rows, len(inspection.samples))} shown")
        _legend(printer)
        for sample in inspection.samples[: options.rows]:
            _sample(sample, inspection.tokenizer, printer)
    elif options.rows and inspection.packed:
        _title(printer, "Packed rows, token by token")
        _legend(printer)
        for row in inspection.packed[: options.rows]:
            _packed_row(row, inspection, printer)


def _title(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _print(console: Console, text: Text) -> None:
    """In lines of the terminal's width; of a file as long as they are."""
    console.print(text, soft_wrap=not console.is_terminal, overflow="fold" if console.is_terminal else None)


def _is_plain(console: Console) -> bool:
    return console.no_color or console.color_system is None


# ---- numbers --------------------------------------------------------------------------------------------------------


def _summary(inspection: Inspection, console: Console) -> None:
    table = source_table(inspection)
    _title(console, "Sources")
    keys = [of.key for of in inspection.stats]
    paths = [visible(of.path) + (f" ({plural(of.files, 'file')})" if of.files > 1 else "") for of in inspection.stats]
    _grid(console, [(Text(key), Text(path)) for key, path in zip(keys, paths, strict=True)])
    console.print()
    _print_numbers(console, table, names=("", *keys, "all to train on"))
    console.print()
    facts = [(name, f"{value}  {remark}".rstrip()) for name, value, remark in headline(inspection)]
    facts += [("Lengths", lengths_text(inspection)), ("Packing", packing_text(inspection))]
    facts += tokenizer_facts(inspection)
    facts += [("Template's marks", marks_text(inspection))] if inspection.marks.compared else []
    _grid(console, [(Text(name, MARK), Text(visible(value))) for name, value in facts])


def _answers(inspection: Inspection, console: Console) -> None:
    table = answer_table(inspection)
    if table is None:
        return
    _title(console, "Answers")
    _print(console, Text(answers_text(inspection)))
    console.print()
    _print_numbers(console, table, names=(table.columns[0], *(cells[0][0] for cells in table.rows)))
    console.print()
    _print_table(console, _histogram(answer_histogram(inspection, per_doubling=1), table))


def _histogram(histogram: Histogram, table: NumberTable) -> Table:
    """A bar for each bucket and kind of answer; the kinds are the table's last rows."""
    most = max(map(max, histogram.counts))
    bars = Table(box=None, padding=(0, 2, 0, 0), header_style=MARK)
    bars.add_column("Trained tokens", justify="right")
    for name, _, *_ in table.rows[-len(histogram.counts) :]:
        bars.add_column(name[0], min_width=_BAR + 6)
    for low, behind, *counts in zip(histogram.edges, histogram.edges[1:], *histogram.counts, strict=False):
        length = f"{low:,} to {behind - 1:,}" if behind - low > 1 else f"{low:,}"
        bars.add_row(length, *(f"{'█' * math.ceil(_BAR * count / most)} {count:,}".strip() for count in counts))
    return bars


def _print_numbers(console: Console, table: NumberTable, names: Sequence[str]) -> None:
    """A table of numbers; `names` are those of its first column, of its rows, and of a total."""
    numbers = Table(box=None, padding=(0, 2, 0, 0), header_style=MARK)
    for column, name in enumerate((names[0], *table.columns[1:])):
        numbers.add_column(Text(name), justify="right" if column else "left", overflow="fold")
    rows = [*table.rows, *([] if table.total is None else [table.total])]
    for name, cells in zip(names[1:], rows, strict=False):
        numbers.add_row(Text(name), *(_number(cell) for cell in cells[1:]))
    _print_table(console, numbers)


def _number(cell: Cell) -> Text:
    """A number with its share, without longer remarks."""
    text, small = cell
    return Text.assemble(text, (f" {small:>4}", MARK) if small.endswith("%") else "")


def _grid(console: Console, rows: Sequence[tuple[Text, Text]]) -> None:
    """Two columns, the second as wide as the terminal lets it; in a file as wide as its text."""
    if not console.is_terminal:
        width = max((len(name) for name, _ in rows), default=0) + 2
        for name, text in rows:
            _print(console, Text.assemble(name.plain.ljust(width), text.plain.replace("\n", "\n" + " " * width)))
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    _print_table(console, grid)


def _print_table(console: Console, table: Table) -> None:
    if not console.is_terminal:  # a file is as wide as its lines
        table.width = console.measure(table, options=console.options.update(width=10_000)).maximum
    console.print(table, crop=False)


def _attention(inspection: Inspection, console: Console) -> None:
    _title(console, "What needs attention")
    rows = []
    for notice in notices(inspection):
        joint = "" if notice.text.endswith("\n") else " "
        fix = (f"{joint}{notice.fix}" if notice.fix else "", MARK)
        word = Text(LEVEL_WORDS[notice.level], _LEVEL_STYLES[notice.level])
        rows.append((word, Text.assemble(visible(notice.text), fix)))
    _grid(console, rows)


def _rejects(inspection: Inspection, console: Console) -> None:
    if not inspection.rejects:
        return
    shown = min(_SHOWN_REJECTS, len(inspection.rejects))
    _title(console, f"Bad rows: {shown} of {inspection.bad_rows:,}")
    for reject in inspection.rejects[:shown]:
        _print(console, _reject(reject))


def _reject(reject: Reject) -> Text:
    what = f"{reject.place}: {reject.reason}" if reject.place else reject.reason
    raw = re.sub(r"\s+", " ", reject.raw)
    text = Text.assemble((visible(f"{reject.file}:{reject.line}"), "bold"), f": {visible(what)}")
    return text.append(f"\n    {visible(raw[:160])}{' …' if len(raw) > 160 else ''}", "dim") if raw else text


# ---- rows and samples -----------------------------------------------------------------------------------------------


def _legend(console: Console) -> None:
    if _is_plain(console):
        text = "⟦trained on⟧, ⟦0.5: trained with another weight⟧; the rest is only read. ↵ ends a line, ⇥ is a tab."
        console.print(Text(text), soft_wrap=True)
        return
    parts = [("trained on", TRAINED), "  ", ("trained, weight not 1", OTHER_WEIGHT), "  only read  "]
    console.print(Text.assemble(*parts, ("special token", SPECIAL), "  ↵ ends a line, ⇥ is a tab"), soft_wrap=True)


def _packed_row(row: PackedRow, inspection: Inspection, console: Console) -> None:
    padding = row.row_length - row.tokens
    console.print()
    head = f"Step {row.step}, row {row.row}: {plural(len(row.samples), inspection.noun)}, {row.tokens:,} tokens"
    console.print(Text(f"{head}, {padding:,} of padding", style="bold"), soft_wrap=True)
    for sample in row.samples:
        _sample(sample, inspection.tokenizer, console)
    if padding:
        console.print(Text(f"[{plural(padding, 'place')} of padding]", style=MARK))


def _sample(sample: ShownSample, tokenizer: Tokenizer, console: Console) -> None:
    """A border that says where the sample comes from, and its tokens: of a pair the prompt, then both answers."""
    head = f"{visible(f'{sample.file}:{sample.line}')}  {sample_text(sample)}"
    flags = [sample.fate if flag in ("dropped", "left out") else flag for flag in sample.flags]
    head += f"  ({', '.join(flags)})" if flags else ""
    border = f"── {head} "
    border += "─" * (console.width - cell_len(border) if console.is_terminal else 2)
    _print(console, Text(border, MARK))
    for part in parts(sample, tokenizer):
        if part.name:
            _print(console, Text(f"┌ {part.name.capitalize()}", "bold"))
        _print(console, tokens_text(part, plain=_is_plain(console)))


def tokens_text(part: Part, *, plain: bool) -> Text:
    """A part's tokens; `plain` marks what is trained with brackets instead of colours."""
    text = Text()
    if part.cut_before:
        text.append(f"✂ {plural(part.cut_before, 'token')} cut off before this\n", MARK)
    weights: list[float] = part.segment.loss_weights.tolist()
    before = 0.0
    for piece in part.pieces:
        weight = weights[piece.start + len(piece.ids) - 1]
        if plain and weight != before:
            text.append(("⟧" if before else "") + ("" if not weight else "⟦" if weight == 1 else f"⟦{weight:.4g}: "))
            before = weight
        style = "" if not weight else TRAINED if weight == 1 else OTHER_WEIGHT
        if piece.special:
            style = f"{style} {SPECIAL}".strip()
        _append(text, piece.text, "" if plain else style)
    text.append("⟧" if plain and before else "")
    if part.cut_behind:
        text.append(f"\n✂ {plural(part.cut_behind, 'token')} cut off here", MARK)
    return text


def _append(text: Text, shown: str, style: str) -> None:
    for number, line in enumerate(shown.split("\n")):
        if number:
            text.append("↵", f"{style} {MARK}").append("\n")
        text.append(visible(line), style)


def visible(text: str) -> str:
    """The text with its hidden characters shown, and nothing in it but line ends that a terminal obeys."""
    if text.isprintable():
        return text
    return "".join(
        "⇥" if char == "\t" else f"⟨U+{ord(char):04X}⟩" if char != "\n" and _is_hidden(char) else char for char in text
    )


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN and char not in _JOINERS
