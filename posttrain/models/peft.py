"""Adapters as PEFT writes them: a directory with `adapter_config.json` and `adapter_model.safetensors`, in and out.

PEFT adapts the tensors of a checkpoint, so the family's weight table says what each of our modules is called there. A
tensor that holds several of our weights (`qkv_proj` of Phi-3) has one adapter there and one for each part here. Read,
every part takes the same A and its rows of B. Written, the A's stand one below another and B is block-diagonal: the
same function, at the sum of the ranks. Experts are named one by one, as in the checkpoints of transformers 4, which
PEFT turns into what transformers 5 has.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.models.architecture import DecoderConfig
from posttrain.models.decoder import AbstractDecoder
from posttrain.models.hf import Family, agree_free, gather
from posttrain.models.lora import Adapter, input_start, input_stop, kernel_shape, linear_modules, scale_of
from posttrain.models.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    dim_sizes,
    new_directory,
    read_json,
    stored_tensors,
    write_file,
    write_json,
)
from posttrain.parallel.sharding import flatten
from posttrain.records import Params

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

SERVED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
"""Keys that would change what is computed, and the values under which they do not."""

OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva_whitened")
"""Values of `init_lora_weights` that change the base weights too: the adapter fits those alone."""


@dataclass(frozen=True)
class PeftModule:
    """One linear layer of a checkpoint, in one layer of the model: the parts of ours that it holds."""

    parts: tuple[tuple[str, int, int], ...]
    """(our module, first row, stop row)."""
    layer: int
    expert: int | None

    @property
    def index(self) -> tuple[int, ...]:
        """Its place in our stacked parameters."""
        return (self.layer,) if self.expert is None else (self.layer, self.expert)


def peft_modules(family: Family, config: DecoderConfig, decoder: AbstractDecoder) -> dict[str, PeftModule]:
    """What can be adapted, by its name in checkpoints (`model.layers.0.self_attn.q_proj`)."""
    sizes, ours = dim_sizes(config), linear_modules(decoder)
    found = {}
    for name, stored in stored_tensors(family.WEIGHTS, config).items():
        parts = []
        for weight in stored.weights:
            module = weight.path.removesuffix("/kernel")
            if weight.path.endswith("/kernel") and module in ours:
                row = weight.stored_row(sizes)
                parts.append((module, row, row + weight.stored_shape(sizes)[0]))
        if parts and stored.layer is not None:
            found[name.removesuffix(".weight")] = PeftModule(tuple(parts), stored.layer, stored.expert)
    return found


def short_names(modules: Mapping[str, PeftModule]) -> dict[str, set[str]]:
    """What each of our modules is called in checkpoints, without the layer: `layers/attn/q` -> `q_proj`."""
    names: dict[str, set[str]] = {}
    for name, module in modules.items():
        for ours, *_ in module.parts:
            names.setdefault(ours, set()).add(name.rsplit(".", 1)[-1])
    return names


# ---- in -------------------------------------------------------------------------------------------------------------


def is_adapter(directory: str | os.PathLike[str]) -> bool:
    """Whether it holds an adapter and no model of its own."""
    path = Path(directory)
    return (path / CONFIG_FILE).is_file() and not any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def base_of(directory: str | os.PathLike[str]) -> tuple[str, str | None]:
    """(path or hub id, revision) of the model that an adapter belongs to, as its config says; both may be empty."""
    raw = read_json(Path(directory) / CONFIG_FILE)
    return str(raw.get("base_model_name_or_path") or ""), raw.get("revision")


def read_adapter(
    directory: str | os.PathLike[str], modules: Mapping[str, PeftModule], decoder: AbstractDecoder
) -> tuple[Adapter, dict[str, Float[np.ndarray, "..."]]]:
    """The adapter of a directory and its parameters by path, f32.

    Where ranks differ within one of our stacked parameters the smaller ones are filled up with zeros; where scales do,
    the difference goes into B. Raises `UserErrors` with all that is wrong or not served.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory}: no {CONFIG_FILE}; an adapter in PEFT's format has it")
    raw = read_json(directory / CONFIG_FILE)
    problems = [f"{CONFIG_FILE}: {problem}" for problem in _config_problems(raw)]
    pairs = {} if problems else _read_pairs(directory / WEIGHTS_FILE, modules, problems)
    if problems:
        raise UserErrors([f"{directory}: {problem}" for problem in problems])
    return _assemble(raw, pairs, modules, decoder)


def _config_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type: {raw.get('peft_type')!r} is not served; served: LORA")
    for key, served in SERVED.items():
        if raw.get(key) not in served:
            problems.append(f"{key}: {raw[key]!r} is not served; served: {json.dumps(served[0])}")
    start = str(raw.get("init_lora_weights")).lower()
    if start.startswith(OTHER_BASE):
        problems.append(
            f"init_lora_weights: {start!r} changed the base weights too; "
            "save it with PEFT's path_initial_model_for_weight_conversion first"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(raw.get(key), int | float) or isinstance(raw.get(key), bool) or raw[key] <= 0:
            problems.append(f"{key}: {raw.get(key)!r} must be a number above 0")
    return problems


def _read_pairs(
    file: Path, modules: Mapping[str, PeftModule], problems: list[str]
) -> dict[str, dict[str, Float[np.ndarray, "_ _"]]]:
    """A and B by module name, f32."""
    if not file.is_file():
        problems.append(f"{file.name}: missing (pickled adapters are not read; save it as safetensors)")
        return {}
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        problems.append(f"{file.name}: not a whole safetensors file ({error}); copy it again")
        return {}
    pairs: dict[str, dict[str, Any]] = {}
    strange = []
    for name, values in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        # Adapters of a model without its head lack the prefix of the base.
        module = next((m for m in (match[1], f"model.{match[1]}") if m in modules), None) if match else None
        if match is None or module is None:
            strange.append(name)
        else:
            pairs.setdefault(module, {})[match[2]] = np.asarray(values, np.float32)
    if strange:
        some = ", ".join(strange[:4]) + (" ..." if len(strange) > 4 else "")
        problems.append(f"{file.name}: {len(strange)} tensors are no adapter of a linear layer of this model: {some}")
    for module, pair in pairs.items():
        rows = max(stop for *_, stop in modules[module].parts)
        shapes = {side: values.shape for side, values in pair.items()}
        if set(pair) != {"A", "B"}:
            problems.append(f"{file.name}: {module}: lora_{'B' if 'A' in pair else 'A'} is missing")
        elif shapes["A"][0] != shapes["B"][1] or shapes["B"][0] != rows:
            found = f"A {list(shapes['A'])} and B {list(shapes['B'])}"
            problems.append(f"{file.name}: {module}: {found} do not fit a weight of {rows} rows")
    if not tensors:
        problems.append(f"{file.name}: holds no tensor")
    return pairs


def _assemble(
    raw: Mapping[str, Any],
    pairs: Mapping[str, Mapping[str, Float[np.ndarray, "_ _"]]],
    modules: Mapping[str, PeftModule],
    decoder: AbstractDecoder,
) -> tuple[Adapter, dict[str, Float[np.ndarray, "..."]]]:
    """Stacks what the file has by layer."""
    rslora, alphas = bool(raw.get("use_rslora")), raw.get("alpha_pattern") or {}
    kernels = linear_modules(decoder)
    layers = kernel_shape(next(iter(kernels.values())))[0]
    ranks: dict[str, list[int]] = {}
    for name, pair in pairs.items():
        for ours, *_ in modules[name].parts:
            of_layers = ranks.setdefault(ours, [0] * layers)
            of_layers[modules[name].layer] = max(of_layers[modules[name].layer], pair["A"].shape[0])
    leaves: dict[str, np.ndarray] = {}
    for ours, by_layer in ranks.items():
        shape, start, stop = kernel_shape(kernels[ours]), input_start(kernels[ours]), input_stop(kernels[ours])
        leaves[f"{ours}/lora_a"] = np.zeros((*shape[:stop], max(by_layer)), np.float32)
        leaves[f"{ours}/lora_b"] = np.zeros((*shape[:start], max(by_layer), *shape[stop:]), np.float32)
    scales: dict[str, float] = {}
    for name, pair in sorted(pairs.items(), key=lambda item: modules[item[0]].layer):
        rank, index = pair["A"].shape[0], modules[name].index
        alpha = next((a for p, a in alphas.items() if re.match(rf"(.*\.)?({p})$", name)), raw["lora_alpha"])
        scale = scale_of(float(alpha), rank, rslora)
        for ours, start, stop in modules[name].parts:
            a, b = leaves[f"{ours}/lora_a"][index], leaves[f"{ours}/lora_b"][index]
            a[..., :rank] = pair["A"].T.reshape(*a.shape[:-1], rank)
            b[:rank] = pair["B"][start:stop].T.reshape(rank, *b.shape[1:]) * np.float32(
                scale / scales.setdefault(ours, scale)
            )
    ordered = {ours: tuple(ranks[ours]) for ours in kernels if ours in ranks}
    dropout = float(raw.get("lora_dropout") or 0.0)
    return Adapter(ordered, scales, float(raw["lora_alpha"]), rslora, dropout), leaves


# ---- out ------------------------------------------------------------------------------------------------------------


def write_adapter(
    directory: str | os.PathLike[str],
    adapter: Adapter,
    params: Params,
    modules: Mapping[str, PeftModule],
    *,
    base: str,
    revision: str | None = None,
    dtype: str = "original",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes an adapter directory that PEFT loads; it appears under its name when it is complete. `params` holds the
    adapter's parameters, `base` is where the model is found that it belongs to; `dtype` original is the parameters'.

    With several processes all must call this; process 0 writes. Raises `UserError` where the directory holds anything.
    """
    target, leaves = epath.Path(directory), flatten(params)
    agree_free(target)
    tensors, shapes = {}, {}
    for name, module in modules.items():
        pair = _join(adapter, module, leaves)
        if pair is not None:
            shapes[name] = (pair[0].shape[0], pair[2])
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = pair[:2]
    config = _peft_config(adapter, shapes, modules, base, revision)
    if jax.process_index() == 0:
        written = next(iter(tensors.values())).dtype if dtype == "original" else dtype
        with new_directory(target) as temporary:
            sizes = {name: values.shape for name, values in tensors.items()}
            write_file(temporary / WEIGHTS_FILE, sizes, np.dtype(written), tensors.__getitem__)
            if tokenizer is not None:
                tokenizer.save(temporary)
            write_json(temporary / CONFIG_FILE, config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {target}")


def _join(
    adapter: Adapter, module: PeftModule, leaves: Mapping[str, Any]
) -> tuple[Float[np.ndarray, "r in"], Float[np.ndarray, "out r"], float] | None:
    """(A, B, scale) of a checkpoint's layer, or None where none of its parts is adapted."""
    rows = max(stop for *_, stop in module.parts)
    found = []
    for ours, start, stop in module.parts:
        rank = adapter.ranks.get(ours, (0,) * (module.layer + 1))[module.layer]
        if rank:
            a, b = (gather(leaves[f"{ours}/{name}"], module.layer, module.expert) for name in ("lora_a", "lora_b"))
            a, b = a.reshape(-1, a.shape[-1])[:, :rank].T, b.reshape(b.shape[0], -1)[:rank].T
            found.append((a, b, start, stop, adapter.scales[ours]))
    if not found:
        return None
    first, scale = found[0][0], found[0][4]
    shared = all(np.array_equal(a, first) for a, *_ in found)
    joined = first if shared else np.concatenate([a for a, *_ in found])
    whole, column = np.zeros((rows, joined.shape[0]), first.dtype), 0
    for a, b, start, stop, own in found:
        place = slice(0, a.shape[0]) if shared else slice(column, column + a.shape[0])
        whole[start:stop, place] = b if own == scale else b * b.dtype.type(own / scale)
        column += a.shape[0]
    return joined, whole, scale


def _peft_config(
    adapter: Adapter,
    found: Mapping[str, tuple[int, float]],
    modules: Mapping[str, PeftModule],
    base: str,
    revision: str | None,
) -> dict[str, Any]:
    """`found` has rank and scale of every adapted layer by name."""

    def alpha(rank: int, scale: float) -> float | int:
        value = scale * (math.sqrt(rank) if adapter.use_rslora else rank)
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value

    settings = {name: (rank, alpha(rank, scale)) for name, (rank, scale) in found.items()}
    (rank, usual), _ = Counter(settings.values()).most_common(1)[0]
    ranks = {name: r for name, (r, _) in settings.items() if r != rank}
    alphas = {name: a for name, (_, a) in settings.items() if a != usual}
    targets, layers = _targets(found, modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": usual,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
        "rank_pattern": _shortened(ranks, settings),
        "alpha_pattern": _shortened(alphas, settings),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _targets(found: Mapping[str, Any], modules: Mapping[str, PeftModule]) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform`: short names where every one has the same layers, else whole names."""
    by_short: dict[str, set[int]] = {}
    for name in found:
        by_short.setdefault(name.rsplit(".", 1)[-1], set()).add(modules[name].layer)
    whole = {m.layer for m in modules.values()}
    spans = list(by_short.values())
    # A short name means every module of that name in these layers.
    same = {n for n, m in modules.items() if n.rsplit(".", 1)[-1] in by_short and m.layer in spans[0]}
    if any(span != spans[0] for span in spans) or same != set(found):
        return sorted(found), None
    return sorted(by_short), None if spans[0] == whole else sorted(spans[0])


def _shortened(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A pattern by short name where all modules of that name have it, else by whole name."""
    short: dict[str, Any] = {}
    for name, value in values.items():
        last = name.rsplit(".", 1)[-1]
        members = [n for n in settings if n.rsplit(".", 1)[-1] == last]
        alike = all(values.get(n) == value for n in members)
        short[last if alike else re.escape(name)] = value
    return short
