"""`posttrain import` and `posttrain export`: from a GGUF file to a Hugging Face directory, from a run to another."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
import yaml
from etils import epath

from posttrain.config import MeshConfig, parse_config
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from posttrain.experiment import load_tokenizer, setup_model
from posttrain.models.gguf import import_gguf
from posttrain.models.peft import is_adapter
from posttrain.records import Params
from posttrain.train.adapters import named_model, named_tokenizer
from posttrain.train.checkpoint import Checkpoints
from posttrain.train.resume import check_model
from posttrain.train.setup import ModelSetup
from posttrain.train.step import merge


@dataclass(frozen=True)
class ImportOptions:
    """Turns a GGUF file into a Hugging Face directory (config, tokenizer, chat template, safetensors)."""

    source: Annotated[str, tyro.conf.Positional]
    """The .gguf file."""
    out: Annotated[str, tyro.conf.Positional]
    """The directory to write; must not exist or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the written weights."""


def import_model(options: ImportOptions) -> None:
    """The command."""
    import_gguf(options.source, options.out, options.dtype)
    print(f"wrote {options.out}")


@dataclass(frozen=True)
class ExportOptions:
    """Writes a checkpoint of a run as a Hugging Face directory, or of an adapter as PEFT's."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory (run.dir of its config), or with --merge the directory of an adapter."""
    out: Annotated[str, tyro.conf.Positional]
    """The directory to write; must not exist or be empty."""
    step: int | None = None
    """Which checkpoint; default: the last one."""
    merge: bool = False
    """Add an adapter to its model's weights and write the whole model."""
    base: str | None = None
    """Of an adapter directory: the model that it belongs to; default: the one that it names."""
    dtype: Literal["original", "float32", "bfloat16", "float16"] = "original"
    """Dtype of the written weights; original: that of the model that the run started from."""
    mesh: MeshConfig = field(default_factory=MeshConfig)


def export_run(options: ExportOptions) -> None:
    """The command."""
    model, params, tokenizer, what = _from_adapter(options) if is_adapter(options.run) else _from_run(options)
    model.export(params, options.out, tokenizer, dtype=options.dtype, merged=options.merge)
    if jax.process_index() == 0:
        print(f"wrote {options.out} ({what})")


def _from_run(options: ExportOptions) -> tuple[ModelSetup, Params, Tokenizer, str]:
    run_dir = epath.Path(options.run)
    saved = run_dir / "config.yaml"
    if not saved.exists():
        raise UserError(f"{saved}: not there, so {options.run} is no run directory; name the run.dir of its config")
    config = parse_config(yaml.safe_load(saved.read_text()), str(saved))
    if options.merge:  # into the weights as they are in the files
        lora = config.model.lora.model_copy(update={"quantize": None})
        config = config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})
    if options.base is not None:
        raise UserError(f"--base {options.base}: {options.run} is a run, whose config names its model; leave it out")
    if options.merge and not config.model.lora.enabled:
        raise UserError(f"--merge: the run in {options.run} has no adapter; leave it out")
    checkpoints = Checkpoints(run_dir, config.checkpoint, read_only=True)
    step = checkpoints.latest_step() if options.step is None else options.step
    if step is None or step not in checkpoints.steps():
        raise UserError(f"{run_dir}: no checkpoint of step {options.step}; there are {checkpoints.steps() or 'none'}")
    tokenizer = load_tokenizer(config)
    meta = checkpoints.read_meta(step)
    model = setup_model(config.model, options.mesh, tokenizer, head=meta.get("head", "lm"))
    check_model(run_dir, meta, model)
    params = checkpoints.restore_params(step, model.split(model.abstract_params)[0])
    if options.merge:
        model = model.in_dtype(np.float32)  # the sum is rounded once, to the dtype that is written
        params = merge(params, model.base.load())
    return model, params, tokenizer, f"step {step}"


def _from_adapter(options: ExportOptions) -> tuple[ModelSetup, Params, Tokenizer, str]:
    if not options.merge:
        raise UserError(f"{options.run}: an adapter, already in PEFT's format; --merge adds it to its model")
    if options.step is not None:
        raise UserError(f"--step {options.step}: {options.run} is an adapter, not a run; leave it out")
    config = named_model(options.run, options.base, None)
    model = setup_model(config, options.mesh).in_dtype(np.float32)
    return model, model.load(), named_tokenizer(config), f"{options.run} merged into {config.path}"
