"""From a config to everything a run needs, built and checked: `train`, `evaluate`, `plan` and `inspect` share it.

Order: what the config alone can tell, then the tokenizer, which may have new tokens, the model's `config.json`, the
devices, the data, the weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from posttrain.config import Config, DataConfig, LoraConfig, MeshConfig, ModelConfig
from posttrain.data.inspect import Inspection, InspectOptions, gather
from posttrain.data.pipeline import Datasets, build_datasets
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.models import classifier, hf
from posttrain.models.attention_choice import check_split, choose_attention
from posttrain.models.decoder import ComputeOptions, Remat, abstract_decoder
from posttrain.models.directory import resolve_model
from posttrain.models.embeddings import NewRows, grow_vocabulary
from posttrain.models.grouped import choose_grouped
from posttrain.objectives.find import build_objective
from posttrain.objectives.router import add_router_losses
from posttrain.parallel.mesh import ROW_AXES, axis_sizes, check_mesh, check_row_length, make_mesh, row_shards
from posttrain.parallel.processes import barrier, gather_texts, start_processes
from posttrain.parallel.sharding import flatten, idle_axes, place
from posttrain.records import Head
from posttrain.train.adapters import lora_problems, setup_lora
from posttrain.train.optim import Optimizer, make_optimizer
from posttrain.train.resume import run_clock
from posttrain.train.setup import Experiment, ModelSetup, StepSetup
from posttrain.train.step import LossSums


def check_config(config: Config) -> list[str]:
    """Problems that need no file and no device: combinations, and what is not served yet."""
    model, problems = config.model, check_mesh(config.mesh)
    unserved = {"log.wandb": config.log.wandb}
    problems += [f"{key} = {value!r}: not served yet; leave it out" for key, value in unserved.items() if value]
    if not model.path:
        problems.append("model.path is empty: give a Hugging Face directory or a hub id")
    problems += check_row_length(axis_sizes(config.mesh), config.data.row_length)
    problems += _token_problems(config)
    problems += lora_problems(config)
    problems += _data_problems(config.data)
    if config.log.profile_steps is not None and not 0 <= config.log.profile_steps[0] < config.log.profile_steps[1]:
        problems.append(f"log.profile_steps = {config.log.profile_steps}: give first < last, counted from 0")
    try:
        objective = build_objective(config.objective)
        name, path = config.objective.name, config.reference.path
        if path is not None and not objective.needs_reference:
            problems.append(f"reference.path = {path!r}: the objective {name} takes no reference; leave it out")
        problems += _row_problems(config.data, objective.rows == "pairs" or objective.mismatched)
        if objective.head == "score" and config.model.lora.enabled:
            problems.append(
                f"model.lora: an adapter of a reward model is not served yet, since the score head (objective {name}) "
                "would not be trained; leave model.lora out"
            )
    except UserErrors as error:
        problems += error.problems
    return problems


def _data_problems(data: DataConfig) -> list[str]:
    problems = []
    for i, source in enumerate(data.train):
        if not source.path:
            problems.append(f"data.train.{i}.path is empty: give a JSONL, JSON or Parquet file")
    if not data.train:
        problems.append("data.train names no source: give at least one path")
    unweighted = [str(i) for i, source in enumerate(data.train) if source.weight is None]
    if 0 < len(unweighted) < len(data.train):
        problems.append(
            f"data.train: {', '.join(unweighted)} of the sources 0 to {len(data.train) - 1} have no weight, the others "
            "have one: give every source a weight, or none"
        )
    if data.max_length > data.row_length:
        problems.append(
            f"data.max_length = {data.max_length} is over data.row_length = {data.row_length}: "
            "a sample must fit into a row; raise row_length or lower max_length"
        )
    if data.heldout.path and "fraction" in data.heldout.model_fields_set and data.heldout.fraction > 0.0:
        problems.append("data.heldout: both path and fraction are given; keep one (fraction: 0 with a path)")
    return problems


def _row_problems(data: DataConfig, pairs: bool) -> list[str]:
    """`pairs`: whether a sample has two segments."""
    if not pairs or 2 * data.max_length <= data.row_length:
        return []
    return [
        f"data.row_length = {data.row_length}: a row must hold a pair, two segments of data.max_length = "
        f"{data.max_length}; raise row_length to {2 * data.max_length} or lower max_length"
    ]


def _token_problems(config: Config) -> list[str]:
    tokens = config.tokenizer.add_special_tokens
    problems = [f"tokenizer.add_special_tokens: {t!r}: a token needs visible text" for t in tokens if not t.strip()]
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    problems += [f"tokenizer.add_special_tokens: {token!r} stands there twice; remove one" for token in twice]
    if config.optimizer.only_new_tokens and not tokens:
        problems.append("optimizer.only_new_tokens: tokenizer.add_special_tokens is empty, so nothing would be trained")
    return problems


def batch_split(config: Config, sizes: dict[str, int]) -> tuple[int, int]:
    """(accumulation steps, rows of one). Raises `UserErrors` when the mesh cannot split the rows so."""
    shards, rows = row_shards(sizes), config.train.global_batch_size
    micro = shards if config.train.micro_batch_size is None else config.train.micro_batch_size
    split = " x ".join(f"{name} {sizes[name]}" for name in ROW_AXES if sizes[name] > 1) or "1 device"
    problems = check_row_length(sizes, config.data.row_length)
    if micro % shards:
        problems.append(
            f"train.micro_batch_size = {micro}: the mesh splits rows over {shards} ({split}), which must divide it; "
            f"the nearest that works is {max(1, round(micro / shards)) * shards}"
        )
    elif rows % micro:
        problems.append(
            f"train.global_batch_size = {rows}: it must be a multiple of the rows of one accumulation step, {micro} "
            f"({split}); the nearest that works is {max(1, round(rows / micro)) * micro}"
        )
    if problems:
        raise UserErrors(problems)
    return rows // micro, micro


def mesh_facts(config: Config) -> dict[str, Any]:
    """What `make_mesh` decides by where the config gives no sizes."""
    rows = config.train.micro_batch_size or config.train.global_batch_size
    return {"rows": rows, "row_length": config.data.row_length}


def setup_model(
    config: ModelConfig,
    mesh_config: MeshConfig,
    tokenizer: Tokenizer | None = None,
    *,
    head: Head = "lm",
    mesh: Mesh | None = None,
    rows: int | None = None,
    row_length: int | None = None,
) -> ModelSetup:
    """Reads the model's `config.json`, starts the devices and places every parameter; loads nothing yet. With a
    tokenizer the embeddings have a row for each of its tokens. With the head `score` it is a reward model, whose score
    head is new where the directory holds a language model; the other way round is refused. With a `mesh` no device is
    started and `config.json` is all that the directory must hold. `rows` and `row_length` are for `make_mesh`."""
    directory = resolve_model(config.path, config.revision, weights=mesh is None)
    decoder_config, raw = hf.load_config(directory)
    decoder_config = classifier.with_head(decoder_config, head, raw, str(directory))
    new_rows = NewRows()
    if tokenizer is not None:
        decoder_config, new_rows = grow_vocabulary(decoder_config, tokenizer)
    if mesh is None:
        start_processes(mesh_config)
        mesh = make_mesh(mesh_config, rows=rows, row_length=row_length)
    platform = mesh.devices.flat[0].platform
    compute = config.dtype
    if compute == "auto":
        compute = "float32" if platform == "cpu" else "bfloat16"
    attention = choose_attention(config.attention, platform, decoder_config, mesh.shape["context"])
    grouped = choose_grouped(config.moe, platform)
    options = ComputeOptions(attention, cast(Remat, config.remat), grouped)
    # Nothing updates frozen parameters: they need no wider dtype than what is computed in.
    dtype = jnp.dtype(compute if config.lora.enabled else config.params_dtype)
    decoder, lora, quantized = abstract_decoder(decoder_config, dtype=dtype, options=options), None, None
    if config.lora.enabled:
        family = hf.find_family(raw["model_type"])
        decoder, lora, quantized = setup_lora(config, decoder_config, family, decoder, new_rows)
    placements = {}
    for described in (decoder, *([quantized.plain] if quantized else [])):
        shapes = flatten(described.shapes)
        placements |= {path: place(axes, shapes[path].shape, mesh) for path, axes in described.axes.items()}
        dims = [dim for path, axes in described.axes.items() for dim in zip(axes, shapes[path].shape, strict=True)]
        if problems := idle_axes(dims, mesh):
            raise UserErrors(problems)
    return ModelSetup(
        directory, decoder_config, raw, decoder, mesh, placements, jnp.dtype(compute), new_rows, lora, quantized
    )


def load_tokenizer(config: Config) -> Tokenizer:
    """The model's tokenizer, or the one that the config names; a template that writes the date writes the run's."""
    chosen = config.tokenizer
    path, revision = (chosen.path, None) if chosen.path else (config.model.path, config.model.revision)
    load = partial(
        Tokenizer.load,
        path,
        revision=revision,
        chat_template=chosen.chat_template,
        chat_template_kwargs=chosen.chat_template_kwargs,
        add_special_tokens=chosen.add_special_tokens,
        eos_token=chosen.eos_token,
    )
    tokenizer = load()
    return load(clock=run_clock(epath.Path(config.run.dir))) if tokenizer.writes_date else tokenizer


def build_data(config: Config, tokenizer: Tokenizer, **options: Any) -> Datasets:
    """The data sets of a run; `options` are those of `build_datasets` that are not the config's. Touches no device."""
    return build_datasets(
        config.data,
        tokenizer,
        global_batch_size=config.train.global_batch_size,
        max_steps=config.train.max_steps,
        seed=config.run.seed,
        **options,
    )


def inspect_data(config: Config, options: InspectOptions) -> Inspection:
    """The data of a run as the model sees it. Needs a tokenizer: no weights, no device."""
    problems = _token_problems(config) + _data_problems(config.data)
    if not (config.tokenizer.path or config.model.path):
        problems.append("model.path and tokenizer.path are empty: name the one whose tokenizer is to be used")
    objective = build_objective(config.objective)
    rows = objective.rows
    problems += _row_problems(config.data, rows == "pairs" or objective.mismatched)
    if problems:
        raise UserErrors(problems)

    def build(data: DataConfig) -> Datasets:
        return build_data(
            config.model_copy(update={"data": data}),
            tokenizer,
            rows=rows,
            mismatched=objective.mismatched,
            rejects_dir=None,
        )

    tokenizer = load_tokenizer(config)
    return gather(config.data, tokenizer, build, options, rows=rows, seed=config.run.seed)


def build(config: Config, *, rejects_dir: str | None = None) -> Experiment:
    """Everything but the weights. Bad rows that are skipped are written to `rejects_dir`, if one is given. Raises
    `UserErrors` with all that the config alone gets wrong, at once."""
    problems = check_config(config)
    if problems:
        raise UserErrors(problems)
    tokenizer = load_tokenizer(config)
    step, optimizer = build_step(config, tokenizer)
    model, objective = step.model, step.loss.objective
    hf.check_weights(model.directory, model.config)
    data = build_data(
        config,
        tokenizer,
        rows=objective.rows,
        mismatched=objective.mismatched,
        heldout_batch_size=step.micro_rows,
        rejects_dir=rejects_dir,
        barrier=barrier,
        gather=gather_texts,
        is_main=jax.process_index() == 0,
    )
    reference = setup_reference(config, model, tokenizer) if objective.needs_reference else None
    return Experiment(
        config,
        model,
        step.loss,
        optimizer(total_steps=data.train.num_steps),
        step.accumulation,
        step.micro_rows,
        tokenizer,
        data,
        reference,
    )


def build_step(
    config: Config, tokenizer: Tokenizer | None, mesh: Mesh | None = None
) -> tuple[StepSetup, Callable[..., Optimizer]]:
    """What the train step is compiled from, and the optimizer by `total_steps`, of which the step has that for one.

    With a `mesh` nothing is started and no weights are needed: it may be of devices that are not here.
    """
    plain = build_objective(config.objective)
    model = setup_model(config.model, config.mesh, tokenizer, head=plain.head, mesh=mesh, **mesh_facts(config))
    objective = add_router_losses(plain, config.model, model.config)
    reduced = config.train.grad_reduce_dtype
    if reduced is not None and reduced != model.compute_dtype.name:
        raise UserError(
            f"train.grad_reduce_dtype = {reduced}: only the compute dtype ({model.compute_dtype.name}) is served yet; "
            "leave it null"
        )
    accumulation, micro_rows = batch_split(config, dict(model.mesh.shape))
    attention, context = model.decoder.options.attention, model.mesh.shape["context"]
    if problems := check_split(attention, config.data.row_length, context):
        raise UserErrors(problems)
    if objective.whole_batch and accumulation > 1:
        raise UserError(
            f"objective.name = {config.objective.name}: it looks at all pairs of a batch together, which cannot be "
            f"accumulated in {accumulation} parts; set train.micro_batch_size to {config.train.global_batch_size}"
        )
    described = [model.decoder, *([model.quantized.plain] if model.quantized else [])]
    shapes = {path: leaf.shape for decoder in described for path, leaf in flatten(decoder.shapes).items()}
    adapter = None if model.lora is None else model.lora.adapter
    optimizer = partial(
        make_optimizer,
        config.optimizer,
        shapes,
        new_rows=model.new_row_masks,
        only=None if adapter is None else adapter.trained(),
    )
    dropout = None if model.lora is None else model.lora.dropout
    loss = LossSums(model.decoder, objective, model.compute_dtype, dropout)
    # The optimizer's patterns are checked here, before the data is read, which tells the number of steps.
    return StepSetup(config, model, loss, optimizer(total_steps=1), accumulation, micro_rows), optimizer


def setup_reference(
    config: Config, model: ModelSetup, tokenizer: Tokenizer | None, mesh: Mesh | None = None
) -> ModelSetup:
    """The model to compare with, on the same mesh: by default the one that is trained, as it was at the start, and
    without its adapter. With a `mesh` as `setup_model` says."""
    chosen = config.reference
    if chosen.path is None:
        return model.base
    path = {"path": chosen.path, "revision": chosen.revision, "lora": LoraConfig()}
    wanted = config.model.model_copy(update=path)
    reference = setup_model(wanted, config.mesh, tokenizer, mesh=mesh, **mesh_facts(config))
    if mesh is None:
        hf.check_weights(reference.directory, reference.config)
    return reference
