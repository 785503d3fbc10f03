"""From the `objective` section of a config to the loss that it names: the name of a function in this package, or in a
file of the user's own. Dropping a function in is its registration, and its parameters are its config keys.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_type_hints

import pydantic

from posttrain.config import ObjectiveConfig
from posttrain.errors import UserError, UserErrors
from posttrain.objectives import preference, reward, supervised
from posttrain.objectives.labelled import LabelledObjective
from posttrain.objectives.pairs import PreferenceObjective
from posttrain.objectives.reward import RewardObjective
from posttrain.records import LabelledLogps, Objective, PairLogps, PairScores, PolicyPairs
from posttrain.validation import describe_errors

MODULES = (supervised, preference, reward)

Maker = Callable[..., Any]
Parameters = Mapping[str, Any]

_RECORDS = (PairLogps, PolicyPairs, PairScores, LabelledLogps)
_SFT = "sft"
_SFT_WEIGHT = (Annotated[float, pydantic.Field(ge=0)], 0.0)
_LOSS_WEIGHTS = (tuple[Annotated[float, pydantic.Field(gt=0)], ...], ())


def build_objective(config: ObjectiveConfig) -> Objective:
    """The named loss, or the weighted sum of several, with the parameters that stand beside the name. Raises
    `UserErrors`."""
    names = (config.name,) if isinstance(config.name, str) else config.name
    makers = dict(_losses(MODULES if config.file is None else (*MODULES, _load(config.file))))
    if unknown := [name for name in names if name not in makers]:
        raise UserErrors([f"objective.name = {name!r}: known are {', '.join(sorted(makers))}" for name in unknown])
    given = config.model_extra or {}
    if len(names) > 1:
        return _weighted_sum({name: makers[name] for name in names}, names, given)
    ((name, maker),) = ((name, makers[name]) for name in names)
    record = _takes(maker)
    extra = {"sft_weight": (_SFT_WEIGHT[0], getattr(maker, "sft_weight", 0.0))} if _is_of_pairs(maker) else {}
    values = _validated(name, {**_fields(maker), **extra}, given)
    if record is None:
        return maker(**values)
    if record is PairScores:
        return RewardObjective(partial(maker, **values))
    scale = values.get("beta", 1.0)
    if record is LabelledLogps:
        mismatched = getattr(maker, "with_kl", False)
        return LabelledObjective(name, partial(maker, **values), mismatched=mismatched, reward_scale=scale)
    sft_weight = values.pop("sft_weight")
    return _of_pairs({name: maker}, {name: partial(maker, **values)}, {name: 1.0}, scale, sft_weight)


def _weighted_sum(makers: Mapping[str, Maker], names: tuple[str, ...], given: Parameters) -> Objective:
    """Several losses of pairs; a parameter goes to each that has it. `sft` among them is that of the chosen answers."""
    if len(makers) < len(names):
        raise UserErrors([f"objective.name = {list(names)}: a loss stands there twice; give it once with its weight"])
    others = [name for name, maker in makers.items() if name != _SFT and not _is_of_pairs(maker)]
    if others:
        raise UserErrors(
            [f"objective.name = {list(names)}: only losses of pairs and sft add up, not {', '.join(others)}"]
        )
    fields = {name: _fields(maker) for name, maker in makers.items() if name != _SFT}
    known = {key for of_loss in fields.values() for key in of_loss}
    shared = {key: value for key, value in given.items() if key not in known}
    weights = _validated(" + ".join(names), {"loss_weights": _LOSS_WEIGHTS}, shared, also=known)["loss_weights"]
    weights = weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserErrors([f"objective.loss_weights = {list(weights)}: give one for each of {', '.join(names)}"])
    losses, problems, scale = {}, [], 1.0
    for name, of_loss in fields.items():
        try:
            values = _validated(name, of_loss, {key: value for key, value in given.items() if key in of_loss})
            losses[name] = partial(makers[name], **values)
            scale = values.get("beta", scale)
        except UserErrors as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserErrors(problems)
    by_name = dict(zip(names, weights, strict=True))
    sft_weight = by_name.pop(_SFT, 0.0)
    return _of_pairs({name: makers[name] for name in losses}, losses, by_name, scale, sft_weight)


def _of_pairs(
    makers: Mapping[str, Maker], losses: Mapping[str, Maker], weights: Mapping[str, float], scale: float, sft: float
) -> PreferenceObjective:
    return PreferenceObjective(
        losses,
        weights,
        needs_reference=any(_takes(maker) is PairLogps for maker in makers.values()),
        whole_batch=any(getattr(maker, "whole_batch", False) for maker in makers.values()),
        reward_scale=scale,
        sft_weight=sft,
    )


def _fields(maker: Maker) -> dict[str, Any]:
    """A loss's config keys: (annotation, default) by name."""
    hints = get_type_hints(maker, include_extras=True)
    parameters = list(inspect.signature(maker).parameters.values())[_takes(maker) is not None :]
    return {parameter.name: (hints[parameter.name], parameter.default) for parameter in parameters}


def _validated(name: str, fields: dict[str, Any], given: Parameters, also: Iterable[str] = ()) -> dict[str, Any]:
    """The given values as the fields want them, with defaults; `also` are keys that are known elsewhere. Raises
    `UserErrors`."""
    forbid = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    schema = pydantic.create_model(f"objective {name}", __config__=forbid, **fields)
    try:
        return dict(schema.model_validate(dict(given)))
    except pydantic.ValidationError as error:
        raise UserErrors([f"objective.{line}" for line in describe_errors(error, schema, also)]) from error


def _losses(modules: Iterable[ModuleType]) -> Iterable[tuple[str, Maker]]:
    """Makers of objectives, and losses, by name."""
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and (get_type_hints(function).get("return") is Objective or _takes(function)):
                yield name, function


def _takes(function: Maker) -> type | None:
    """The record that a loss takes first; None for any other function."""
    first = next(iter(inspect.signature(function).parameters), "")
    hint = get_type_hints(function).get(first)
    return hint if hint in _RECORDS else None


def _is_of_pairs(function: Maker) -> bool:
    """Whether it is a preference loss of two answers to one prompt."""
    return _takes(function) in (PairLogps, PolicyPairs)


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
