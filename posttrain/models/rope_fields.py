"""Rotary positions in the words of a config.json, both ways. `family.py` reads and writes the rest of the file.

transformers 4 writes `rope_theta` and `rope_scaling`; 5 writes `rope_parameters`, where layers differ one of them for
each layer type.
"""

import math
from collections.abc import Mapping
from typing import Any

from posttrain.models.rope import RopeConfig, Scaling

ROPE_FIELDS: dict[Scaling, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": ((), ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
}
"""Fields that each scaling must and may have, beside theta, the original length and the share of dims that turn."""

WITH_ORIGINAL = ("yarn", "llama3", "longrope")
"""Scalings that look at `original_max_position_embeddings`."""


def typed(values: Mapping[str, Any], key: str, default: Any, kind: type, place: str, problems: list[str]) -> Any:
    """`values[key]` if it is of the kind; null means absent, a whole number is a float too, a bool is never a number.
    Floats must be finite: Python's JSON reads NaN. `place` is what a problem calls it."""
    value = values.get(key)
    if value is None:
        return default
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        problems.append(f"{place}: {value!r} must be of type {kind.__name__}")
        return default
    if kind is float and not math.isfinite(value):
        problems.append(f"{place}: {value!r} must be finite")
        return default
    return kind(value)


def listed(values: Any) -> str:
    """For messages."""
    return ", ".join("null" if v is None else str(v) for v in values)


def rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` of transformers 4."""
    if rope.scaling == "none":
        return None
    required, optional = ROPE_FIELDS[rope.scaling]
    fields = (*required, *optional, "original_max_position_embeddings")
    values = {name: getattr(rope, name) for name in fields}
    defaults = RopeConfig()
    given = {n: v for n, v in values.items() if n not in optional or n == "factor" or v != getattr(defaults, n)}
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return {"rope_type": rope.scaling, **{name: value for name, value in lists.items() if value is not None}}


class RopeFields:
    """What a config.json says of rotary positions: `fields` by name, and in `places` the key that says each."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        problems: list[str],
        *,
        theta_key: str,
        scaling_key: str | None,
        layer_type: str | None,
    ):
        self.problems = problems
        self.fields: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        found: list[tuple[str, str, Any]] = []
        for section in ("rope_parameters", scaling_key):
            entries = (section and raw.get(section)) or {}
            place = str(section)
            if isinstance(entries, Mapping) and isinstance(entries.get(layer_type), Mapping):
                entries, place = entries[layer_type], f"{section}.{layer_type}"
            if not isinstance(entries, Mapping):
                problems.append(f"{place}: {entries!r} must be an object or null")
                continue
            found += [("rope_type" if key == "type" else key, f"{place}.{key}", v) for key, v in entries.items()]
        found.append(("rope_theta", theta_key, raw.get(theta_key)))
        found += [(key, key, raw.get(key)) for key in ("original_max_position_embeddings", "partial_rotary_factor")]
        for name, place, value in found:
            if value is None:
                continue
            if self.fields.setdefault(name, value) != value:
                problems.append(
                    f"{place}: {value!r} contradicts {self.places[name]}: {self.fields[name]!r}; remove the wrong one"
                )
            self.places.setdefault(name, place)

    def read(self, *, head_dim: int, max_positions: int, theta: float, partial: bool) -> RopeConfig:
        """`theta` is what an absent one means; `partial`: whether a share of the dims other than 1 is served."""
        before = len(self.problems)
        kind = self.fields.pop("rope_type", "default")
        served: dict[str, Scaling] = {"default": "none", **{name: name for name in ROPE_FIELDS if name != "none"}}
        if not isinstance(kind, str) or kind not in served:
            self.problems.append(f"{self.places['rope_type']}: {kind!r} is not served; served: {listed(served)}")
            return RopeConfig()
        scaling = served[kind]
        required, optional = ROPE_FIELDS[scaling]
        place = self.places.get("rope_type", "rope_scaling")
        self.problems += [f"{place}: {kind!r} needs {name}" for name in required if name not in self.fields]
        known = ("rope_theta", "original_max_position_embeddings", *required, *optional)
        self.problems += [
            f"{self.places[name]}: {value!r}: {name} is no field of {kind!r} scaling"
            for name, value in self.fields.items()
            if name not in (*known, "partial_rotary_factor", "finetuned")  # the last is a remark
        ]
        rotary_dim = self._rotary_dim(head_dim, partial)
        frequencies = (rotary_dim or head_dim) // 2
        values = {name: self._value(name, frequencies) for name in known if name in self.fields}
        if len(self.problems) > before:
            return RopeConfig()
        theta, original = values.pop("rope_theta", theta), values.pop("original_max_position_embeddings", max_positions)
        if scaling in WITH_ORIGINAL:
            values["original_max_position_embeddings"] = original
        if scaling == "yarn":
            values.setdefault("factor", max_positions / original)
        if scaling == "longrope":
            values.setdefault("factor", max(1.0, max_positions / original))  # below 1 it does nothing
        rope = RopeConfig(theta=theta, scaling=scaling, rotary_dim=rotary_dim, **values)
        self._check(rope, max_positions)
        return rope

    def _check(self, rope: RopeConfig, max_positions: int) -> None:
        """Fields that do not go together."""
        if rope.factor < 1:
            self.problems.append(
                f"max_position_embeddings: {max_positions} is below original_max_position_embeddings: "
                f"{rope.original_max_position_embeddings}, and {rope.scaling!r} states no factor"
            )
        if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
            self.problems.append(
                f"{self.places['high_freq_factor']}: {rope.high_freq_factor} must be above "
                f"low_freq_factor: {rope.low_freq_factor}"
            )

    def _rotary_dim(self, head_dim: int, partial: bool) -> int | None:
        """How many dims turn, if not all."""
        place = self.places.get("partial_rotary_factor", "")
        share = typed(self.fields, "partial_rotary_factor", 1.0, float, place, self.problems)
        if share == 1:
            return None
        if not partial:
            self.problems.append(f"{place}: {share!r} is not served; served: 1, all of a head's dims")
            return None
        turning = int(head_dim * share)
        if not 0 < turning <= head_dim or turning % 2:
            self.problems.append(
                f"{place}: {share!r} makes {turning} of head_dim: {head_dim} dims turn; an even number is needed"
            )
        return turning

    def _value(self, name: str, frequencies: int) -> Any:
        place = self.places[name]
        if name in ("short_factor", "long_factor"):
            return self._factors(name, place, frequencies)
        kinds = {"truncate": bool, "original_max_position_embeddings": int}
        value = typed(self.fields, name, 1, kinds.get(name, float), place, self.problems)
        if name in ("factor", "original_max_position_embeddings") and value < 1:
            self.problems.append(f"{place}: {value} must be at least 1")
        elif name != "truncate" and (value < 0 or (value == 0 and name not in ("mscale", "mscale_all_dim"))):
            self.problems.append(f"{place}: {value} must be above 0")
        return value

    def _factors(self, name: str, place: str, frequencies: int) -> tuple[float, ...]:
        factors = self.fields[name]
        entries = factors if isinstance(factors, list | tuple) else ()
        if len(entries) != frequencies or any(type(f) not in (int, float) or not 0 < f < math.inf for f in entries):
            self.problems.append(f"{place}: must be a list of {frequencies} numbers above 0, half the dims that turn")
            return ()
        return tuple(float(f) for f in entries)
