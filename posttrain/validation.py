"""What pydantic finds wrong with settings, in lines that say which key, which value and what to write instead."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic
from pydantic import BaseModel


def describe_errors(error: pydantic.ValidationError, model: type[BaseModel], also: Iterable[str] = ()) -> list[str]:
    """One line for each problem: key, value, constraint, and the nearest valid name for an unknown key; `also` are
    names that are valid beside the model's."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            names = [*_field_names(model, item["loc"][:-1]), *also]
            near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
            lines.append(f"{key}: unknown key; {hint}")
        else:
            lines.append(f"{key} = {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}")
    return lines


def _field_names(model: Any, loc: Sequence[int | str]) -> list[str]:
    """Names that are valid at a place inside nested models (list positions are passed through)."""
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = args[0] if args else annotation
    return list(model.model_fields)
