"""Hugging Face directories in and out: find the family, read the config, load weights straight into their shardings,
export a directory that any serving stack loads.

A family is a module beside this one that defines `MODEL_TYPES`; dropping the file in is the registration.
"""

import importlib
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, Shaped

from posttrain import models
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.models import classifier
from posttrain.models.architecture import DecoderConfig
from posttrain.models.embeddings import NewRows, mean_row
from posttrain.models.family import missing_features
from posttrain.models.weights import (
    MAX_SHARD_BYTES,
    SAFETENSORS_DTYPES,
    WRITABLE_DTYPES,
    CheckpointReader,
    Weight,
    check_free,
    dim_sizes,
    new_directory,
    read_json,
    stored_tensors,
    tensor_problems,
    write_checkpoint,
    write_json,
)
from posttrain.parallel.sharding import flatten, unflatten
from posttrain.records import Params

log = logging.getLogger(__name__)


@runtime_checkable
class Family(Protocol):
    """What a family's module defines. It may also define `ALIASES`: what names begin with in some of its checkpoints,
    and in its table. A name in `IGNORED` may end with `*`."""

    MODEL_TYPES: tuple[str, ...]
    WEIGHTS: tuple[Weight, ...]
    BASE_PREFIX: str
    TIED: tuple[str, str]
    IGNORED: tuple[str, ...]

    def config_from_hf(self, raw: Mapping[str, Any]) -> DecoderConfig: ...

    def config_to_hf(self, config: DecoderConfig, original: Mapping[str, Any] | None) -> dict[str, Any]: ...


def find_family(model_type: object, raw: Mapping[str, Any] | None = None) -> Family:
    """The family that serves this `model_type`; raises `UserError` listing the known ones and, of a config.json `raw`,
    what it names that no family computes."""
    known = []
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        spec = importlib.util.find_spec(module.name)
        # Only families are imported: their neighbours may need what is not installed.
        if spec is None or spec.origin is None or "\nMODEL_TYPES" not in Path(spec.origin).read_text(encoding="utf-8"):
            continue
        family = cast(Family, importlib.import_module(module.name))
        if model_type in family.MODEL_TYPES:
            return family
        known += family.MODEL_TYPES
    missing = missing_features(raw or {})
    lacking = f"; what such a family would need beyond the decoder: {', '.join(missing)}" if missing else ""
    raise UserError(f"model_type: {model_type!r} is not served; served: {', '.join(sorted(known))}{lacking}")


def load_config(model_dir: str | os.PathLike[str]) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder's config and config.json as it is. Raises `UserErrors` with all that is wrong in it."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: missing; a Hugging Face model directory has it")
    raw = read_json(path)
    try:
        labels = int(classifier.is_reward_model(raw))
        config = find_family(raw.get("model_type"), raw).config_from_hf(classifier.as_causal(raw))
        return replace(config, num_labels=labels), raw
    except UserErrors as error:
        raise UserErrors([f"{path}: {problem}" for problem in error.problems]) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_generation_config(model_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """generation_config.json, if there is one."""
    path = Path(model_dir) / "generation_config.json"
    return read_json(path) if path.is_file() else None


def load_params(
    model_dir: str | os.PathLike[str],
    config: DecoderConfig,
    abstract: Params,
    new_rows: NewRows | None = None,
    change: Callable[[str, Array], Mapping[str, Array]] = lambda path, values: {path: values},
) -> Params:
    """Reads weights into `abstract`: a nested dict of `jax.ShapeDtypeStruct`, whose dtypes and shardings (default: the
    first local device) the result has. The files of a language model serve a `config` with a score head too: the score
    is zeros then (`ScoreHead` says why), and their vocabulary projection is not read.

    Each device's part is read by slices, once where several devices hold the same, so the host holds about its
    devices' share of one parameter at a time. Vocabulary padding is zero; `new_rows`, by which the vocabulary of
    `config` may exceed that of the files, are means (`embeddings.py`). All names, shapes and dtypes are checked
    first: raises `UserErrors` that list what is missing, extra or misshapen, and `ValueError` where `abstract` is not
    of this config. `change` says what becomes of each parameter, by path, as soon as it is read.
    """
    model_dir = Path(model_dir)
    family, stored, held = _stored(model_dir, config)
    table = {w.path: w for w in _table(family, config) if w.when(config)}
    leaves = flatten(abstract)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if shapes != {path: weight.shape(config) for path, weight in table.items()}:
        raise ValueError(f"abstract parameters are not those of the config: {shapes}")
    new_rows = NewRows() if new_rows is None else new_rows
    if not new_rows.mask(stored.vocab_size, config.vocab_size).all():
        raise ValueError(f"the files have {stored.vocab_size} of {config.vocab_size} rows, and not all others are new")
    reader = CheckpointReader(model_dir)
    names = _check_tensors(reader, family, stored, held)
    left_out = [name for name in reader.shapes if _is_other_part(name, family)]
    if left_out:
        parts = ", ".join(sorted({name.removeprefix(family.BASE_PREFIX).split(".")[0] for name in left_out}))
        log.info("%s: %d tensors of %s are left out: only the text model is read", model_dir, len(left_out), parts)
    params: dict[str, Array] = {}
    for path, leaf in leaves.items():
        params |= change(path, _load(reader, names, table[path], stored, leaf, new_rows))
    return unflatten(params)


def check_weights(model_dir: str | os.PathLike[str], config: DecoderConfig) -> None:
    """Raises `UserErrors` that list tensors that are missing, extra or misshapen; reads headers only."""
    family, stored, held = _stored(Path(model_dir), config)
    _check_tensors(CheckpointReader(Path(model_dir)), family, stored, held)


def _stored(model_dir: Path, config: DecoderConfig) -> tuple[Family, DecoderConfig, list[Weight]]:
    """The family, the config with the vocabulary of the files, which that of a run may exceed, and what is read of
    them: all but a score that they do not have."""
    stored, raw = load_config(model_dir)
    family = find_family(raw.get("model_type"))
    held = [w for w in _table(family, config) if w is not classifier.SCORE or stored.num_labels]
    return family, replace(config, vocab_size=min(config.vocab_size, stored.vocab_size)), held


def _table(family: Family, config: DecoderConfig) -> tuple[Weight, ...]:
    return classifier.weight_table(family.WEIGHTS, family.TIED[0], config)


def _check_tensors(
    reader: CheckpointReader, family: Family, config: DecoderConfig, held: Sequence[Weight]
) -> dict[str, str]:
    """Name in the table -> name in the files. Raises `UserErrors` unless they are those of the config."""
    expected = stored_tensors(held, config)
    sizes = dim_sizes(config)
    reader.take_apart(expected, sizes)
    layers = range(config.num_hidden_layers)
    ignored = {name.format(layer=layer) for name in family.IGNORED for layer in layers}
    usual = {_usual_name(name, family): name for name in reader.shapes if not _is_other_part(name, family)}
    headless = not any(name.startswith(family.BASE_PREFIX) for name in usual)
    head, embedding = family.TIED
    ignored |= {head} if config.num_labels else set()
    names = {}
    for name, stored in usual.items():
        name = family.BASE_PREFIX + name if headless and name not in (head, classifier.SCORE.name) else name
        if name not in ignored:
            names[name] = stored
    problems = [
        f"{stored}: dtype {reader.dtypes[stored]} is not served; served: {', '.join(SAFETENSORS_DTYPES)}"
        for stored in names.values()
        if reader.dtypes[stored] not in SAFETENSORS_DTYPES
    ]
    doubled = head in names and head not in expected and embedding in names and not problems
    if doubled and not _equal(reader, names.pop(head), names[embedding]):
        problems.append(
            f"{head}: differs from {embedding}, but config.json says tie_word_embeddings: true; "
            "if the head is its own, set it to false"
        )
    shapes = {name: tensor.shape(sizes) for name, tensor in expected.items()}
    problems += tensor_problems(shapes, {name: reader.shapes[stored] for name, stored in names.items()}, names)
    if problems:
        raise UserErrors([f"{reader.directory}: {problem}" for problem in problems])
    return names


def _usual_name(name: str, family: Family) -> str:
    """As the table has it, but for what a headless checkpoint lacks."""
    aliases: Mapping[str, str] = getattr(family, "ALIASES", {})
    return next((ours + name.removeprefix(theirs) for theirs, ours in aliases.items() if name.startswith(theirs)), name)


def _is_other_part(name: str, family: Family) -> bool:
    """Whether a tensor belongs to a part of the checkpoint that is none of the text model."""
    return any(pattern.endswith("*") and name.startswith(pattern[:-1]) for pattern in family.IGNORED)


def _equal(reader: CheckpointReader, name: str, other: str) -> bool:
    """Whether two tensors are equal, compared by blocks of rows."""
    shape = reader.shapes[name]
    if shape != reader.shapes[other]:
        return False
    blocks = [(slice(start, min(start + 4096, shape[0])), slice(0, shape[1])) for start in range(0, shape[0], 4096)]
    return all(np.array_equal(reader.read(name, block), reader.read(other, block)) for block in blocks)


def _load(
    reader: CheckpointReader,
    names: Mapping[str, str],
    weight: Weight,
    config: DecoderConfig,
    leaf: jax.ShapeDtypeStruct,
    new_rows: NewRows,
) -> Shaped[Array, "..."]:
    """One parameter, all layers, on its devices. `config` is that of the files."""
    sizes = dim_sizes(config)
    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # jax asks for addressable devices only
        spans = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
        if spans not in blocks:
            blocks[spans] = read(spans)
        return blocks[spans]

    def read(spans: Sequence[tuple[int, int]]) -> np.ndarray:
        out = np.zeros([high - low for low, high in spans], leaf.dtype)
        if weight is classifier.SCORE and weight.name not in names:
            return out  # a new one
        if not weight.stacked:
            fill(out, names[weight.name], spans)
            return out
        for row, layer in enumerate(range(*spans[0])):
            if not weight.by_expert:
                fill(out[row], names[weight.name.format(layer=layer)], spans[1:])
                continue
            for place, expert in enumerate(range(*spans[1])):
                fill(out[row, place], names[weight.name.format(layer=layer, expert=expert)], spans[2:])
        return out

    def fill(out: np.ndarray, name: str, spans: Sequence[tuple[int, int]]) -> None:
        held = [(low, min(high, sizes[d])) for d, (low, high) in zip(weight.dims, spans, strict=True)]
        if all(low < high for low, high in held):
            inside = tuple(slice(high - low) for low, high in held)
            out[inside] = weight.read(lambda ranges: reader.read(name, ranges), held, sizes)
        if new_rows and weight.dims[0] == "V":
            fill_new(out, name, spans)

    def fill_new(out: np.ndarray, name: str, spans: Sequence[tuple[int, int]]) -> None:
        rows, *rest = spans
        new = new_rows.mask(*rows)

        def known(start: int, stop: int) -> np.ndarray:
            return weight.read(lambda ranges: reader.read(name, ranges), [(start, stop), *rest], sizes)

        if new.any():
            out[new] = mean_row(known, new_rows.known)

    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(leaf.shape, sharding, block)


def export_hf(
    params: Params,
    config: DecoderConfig,
    directory: str | os.PathLike[str],
    *,
    raw_config: Mapping[str, Any],
    dtype: str = "original",
    tokenizer: Tokenizer | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face directory; it appears under its name when it is complete (on an object store, which cannot
    rename, config.json comes last).

    `raw_config` is the config.json that the weights came with; `dtype` original is the one it records (else that of
    the parameters). Sharded parameters are gathered layer by layer. With several processes all of them must call this;
    process 0 writes. Raises `UserError` where the directory exists and is not empty.
    """
    target = epath.Path(directory)
    family = find_family(raw_config.get("model_type"))
    leaves = flatten(params)
    recorded = raw_config.get("dtype") or raw_config.get("torch_dtype") or leaves["embed/embedding"].dtype.name
    name = str(recorded).removeprefix("torch.") if dtype == "original" else dtype
    if name not in WRITABLE_DTYPES:
        raise UserError(f"export dtype: {name!r} is not served; served: original, {', '.join(WRITABLE_DTYPES)}")
    hf_config, pad_id = family.config_to_hf(config, classifier.as_causal(raw_config)), None
    if config.num_labels:
        causal = hf_config.get("architectures") or family.config_to_hf(config, None)["architectures"]
        pad_id = classifier.pad_id(tokenizer)
        hf_config = classifier.exported_config(hf_config, raw_config, causal, pad_id)
    written = _with_stops(_exported_config(hf_config, name), tokenizer)
    generation = _with_stops(dict(generation_config or _ids_of(raw_config)), tokenizer)
    agree_free(target)
    tensors = stored_tensors(_table(family, config), config)
    sizes = dim_sizes(config)
    shapes = {stored: tensor.shape(sizes) for stored, tensor in tensors.items()}

    def values(stored: str) -> np.ndarray:
        tensor = tensors[stored]
        return tensor.join(lambda weight: gather(leaves[weight.path], tensor.layer, tensor.expert), sizes)

    if jax.process_index() != 0:
        write_checkpoint(None, shapes, np.dtype(name), values, max_shard_bytes)
    else:
        with new_directory(target) as temporary:
            write_checkpoint(temporary, shapes, np.dtype(name), values, max_shard_bytes)
            if tokenizer is not None:
                tokenizer.save(temporary, pad_id=pad_id)
            write_json(temporary / "generation_config.json", generation)
            write_json(temporary / "config.json", written)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {target}")


def agree_free(directory: epath.Path) -> None:
    """Process 0's look at the directory, before all gather: one process that stopped would leave the others waiting."""
    problem = None
    if jax.process_index() == 0:
        try:
            check_free(directory)
        except UserError as error:
            problem = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
        raise problem or UserError(f"{directory}: refused by process 0, whose message says why")
    if problem is not None:
        raise problem


def _exported_config(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """With the exported dtype, under the keys that record one; `torch_dtype`, which all versions read, if none does."""
    keys = [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"]
    return {**raw, **dict.fromkeys(keys, dtype)}


def _ids_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: raw[key] for key in keys if raw.get(key) is not None}


def _with_stops(generation: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Adds the tokenizer's stop tokens to those that end a generation: a new EOS must stop the exported model too."""
    known = generation.get("eos_token_id")
    stops = list(known) if isinstance(known, list | tuple) else [] if known is None else [known]
    new = [i for i in (tokenizer.stop_ids if tokenizer else ()) if i not in stops]
    if new:
        stops = [*new, *stops]
        generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return generation


@jax.jit
def _take(values: Shaped[Array, "..."], places: tuple[Int[Array, ""], ...]) -> Shaped[Array, "..."]:
    for place in places:
        values = jax.lax.dynamic_index_in_dim(values, place, axis=0, keepdims=False)
    return values


def gather(
    values: Shaped[Array | np.ndarray, "..."], layer: int | None, expert: int | None = None
) -> Shaped[np.ndarray, "..."]:
    """One layer (all of an unstacked parameter), or one of its experts, on this host; all processes must ask for it
    together."""
    places = tuple(np.int32(place) for place in (layer, expert) if place is not None)
    if isinstance(values, np.ndarray):
        return values[places]
    one = _take(values, places) if places else values
    if one.is_fully_addressable:
        return np.asarray(one)
    return np.asarray(multihost_utils.process_allgather(one, tiled=True))
