"""From the `objective` section of a config to the loss that it names: the name of a function in this package, or in a
file of the user's own. Dropping a function in is its registration, and its parameters are its config keys.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_type_hints

import pydantic

from posttrain.config import ObjectiveConfig, describe_errors
from posttrain.errors import UserError, UserErrors
from posttrain.objectives import preference, supervised
from posttrain.objectives.pairs import PreferenceObjective
from posttrain.records import Objective, PairLogps, PolicyPairs

MODULES = (supervised, preference)


def build_objective(config: ObjectiveConfig) -> Objective:
    """The named loss with the parameters that stand beside its name. Raises `UserErrors`."""
    makers = dict(_losses(MODULES if config.file is None else (*MODULES, _load(config.file))))
    if config.name not in makers:
        raise UserErrors([f"objective.name = {config.name!r}: known are {', '.join(sorted(makers))}"])
    maker = makers[config.name]
    hints = get_type_hints(maker, include_extras=True)
    of_pairs = hints.get("return") is not Objective
    parameters = list(inspect.signature(maker).parameters.values())[of_pairs:]
    fields: dict[str, Any] = {parameter.name: (hints[parameter.name], parameter.default) for parameter in parameters}
    if of_pairs:
        fields["sft_weight"] = (Annotated[float, pydantic.Field(ge=0)], getattr(maker, "sft_weight", 0.0))
    forbid = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    schema = pydantic.create_model(f"objective {config.name}", __config__=forbid, **fields)
    try:
        values = dict(schema.model_validate(config.model_extra or {}))
    except pydantic.ValidationError as error:
        raise UserErrors([f"objective.{line}" for line in describe_errors(error, schema)]) from error
    if not of_pairs:
        return maker(**values)
    sft_weight = values.pop("sft_weight")
    return PreferenceObjective(
        partial(maker, **values),
        needs_reference=_compares(maker) is PairLogps,
        whole_batch=getattr(maker, "whole_batch", False),
        reward_scale=values.get("beta", 1.0),
        sft_weight=sft_weight,
    )


def _losses(modules: Iterable[ModuleType]) -> Iterable[tuple[str, Callable[..., Any]]]:
    """Makers of objectives, and losses of pairs, by name."""
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and (get_type_hints(function).get("return") is Objective or _compares(function)):
                yield name, function


def _compares(function: Callable[..., Any]) -> type | None:
    """What a loss of pairs takes first; None for any other function."""
    first = next(iter(inspect.signature(function).parameters), "")
    hint = get_type_hints(function).get(first)
    return hint if hint in (PairLogps, PolicyPairs) else None


def _load(path: str) -> ModuleType:
    """The user's own file as a module."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserErrors([f"objective.file = {path!r}: no such file; name a Python file with loss functions"])
    spec = importlib.util.spec_from_file_location(f"objective_file_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, NameError) as error:
        raise UserError(f"objective.file = {path!r} cannot be imported: {error}") from error
    return module
