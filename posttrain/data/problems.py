"""What is wrong with a row, collected while it is read, and the checks that every column needs.

`formats.py`, `messages.py`, `tools.py` and `trees.py` go on after a problem, so that a row's BadRow names all of them.
"""

import json
import math
from typing import Any, NoReturn

from posttrain.data.files import BadRow

Number = int | float

_SHOWN = 3
_MOST = 1e30
"""What float32 can hold, with room to subtract. A number of JSON can be beyond all floats."""


class Problems(list[tuple[str, str]]):
    """(key, reason) of each problem, in the order found."""

    def add(self, key: str, reason: str) -> None:
        """Adds a problem that is not known yet."""
        if (key, reason) not in self:
            self.append((key, reason))

    def bad_row(self, file: str, line: int) -> BadRow:
        """One BadRow, however much is wrong: the first problem leads, the next ones are named, the others counted."""
        (key, reason), others = self[0], self[1:]
        shown = "; ".join(f"{k}: {why.split('; fix:')[0]}" for k, why in others[:_SHOWN])
        more = f"; and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        reason += f" (also: {shown}{more})" if others else ""
        return BadRow(file, line, printable(key), printable(reason))

    def check_text(self, text: str, key: str) -> None:
        """JSON can escape half of a surrogate pair, which no tokenizer takes."""
        if text.isascii():
            return
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            at = text[error.start]
            self.add(key, f"has a lone surrogate {at!r} at character {error.start}; fix: remove it")

    def number(self, value: Any, key: str, *, whole: bool = False) -> Number | None:
        """A finite number that float32 can hold (`whole`: without a fraction); None, with a problem, if it is none."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            self.add(key, f"must be a finite number, not {value!r}")
        elif abs(value) > _MOST:
            self.add(key, f"must be a number from {-_MOST:g} to {_MOST:g}, not {value!r}")
        elif whole and value != int(value):
            self.add(key, f"must be a whole number, not {value!r}")
        else:
            return value
        return None

    def check_json(self, value: Any, key: str) -> None:
        """`check_text` for every string in a JSON value."""
        if isinstance(value, str):
            self.check_text(value, key)
            return
        try:  # far faster than to look at each
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError:
            self._find_surrogates(value, key)

    def _find_surrogates(self, value: Any, key: str) -> None:
        if isinstance(value, str):
            self.check_text(value, key)
        elif isinstance(value, dict):
            for name, item in value.items():
                self.check_text(name, f"{key}.{name!r}")
                self._find_surrogates(item, f"{key}.{name}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self._find_surrogates(item, f"{key}[{index}]")

    def parse_json(self, text: str, key: str) -> Any:
        """The value of a string that holds JSON; None, with a problem, where it does not."""
        try:
            return _JSON.decode(text)
        except (ValueError, RecursionError) as error:
            self.add(key, f"is a string that holds no valid JSON ({error}); fix: correct it")
            return None


def _is_finite(value: Number) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # which takes no integer beyond all floats


def is_empty(value: Any) -> bool:
    """Null, or an empty list, object or string: a key that is there and says nothing."""
    return value is None or (isinstance(value, list | dict | str) and not value)


def type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def printable(text: str) -> str:
    """The text with half surrogate pairs, as a key of the data may hold them, escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_nulls(value: Any) -> Any:
    """The value without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)
