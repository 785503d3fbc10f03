"""HTML and SVG as nested calls: whatever text goes in comes out as text."""

import html
from collections.abc import Sequence


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


VOID = ("link", "meta", "rect", "line", "circle", "path")
"""Elements without content."""


def tag(name: str, /, *children: str | None, **attributes: str | int | float | bool | None) -> Markup:
    """An element. Children that are no `Markup` are escaped, those that are None left out; so are attributes that are
    None or False. `class_` is `class`, and `stroke_width` is `stroke-width`."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        named = key.rstrip("_").replace("_", "-")
        words.append(named if value is True else f'{named}="{html.escape(text)}"')
    inside = join(*children)
    if name in VOID and not inside:
        return Markup(f"<{' '.join(words)}{'' if name in ('link', 'meta') else '/'}>")
    return Markup(f"<{' '.join(words)}>{inside}</{name}>")


def join(*children: str | None) -> Markup:
    """Several pieces behind one another."""
    return Markup(
        "".join(child if isinstance(child, Markup) else html.escape(child) for child in children if child is not None)
    )


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    label: str,
    words: Sequence[str] = (),
    marked: int | None = None,
) -> Markup:
    """A table that scrolls in its own box. The columns in `words` hold text, the others numbers or short names, which
    are never broken; row number `marked` stands out."""
    kinds = ["words" if column in words else None for column in columns]
    head = tag(
        "tr", *(tag("th", column, scope="col", class_=kind) for column, kind in zip(columns, kinds, strict=True))
    )
    body = [
        tag(
            "tr",
            *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)),
            class_="marked" if number == marked else None,
        )
        for number, row in enumerate(rows)
    ]
    return tag(
        "div",
        tag("table", tag("thead", head), tag("tbody", *body)),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=label,
    )


def facts(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Names and what belongs to them."""
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")
