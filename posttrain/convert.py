"""`posttrain import` and `posttrain export`: from a GGUF file to a Hugging Face directory, from a run to another."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import tyro
import yaml
from etils import epath

from posttrain.config import MeshConfig, parse_config
from posttrain.errors import UserError
from posttrain.experiment import load_tokenizer, setup_model
from posttrain.models import hf
from posttrain.models.gguf import import_gguf
from posttrain.train.checkpoint import Checkpoints
from posttrain.train.resume import check_vocabulary


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
    """Writes a checkpoint of a run as a Hugging Face directory."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory (run.dir of its config)."""
    out: Annotated[str, tyro.conf.Positional]
    """The directory to write; must not exist or be empty."""
    step: int | None = None
    """Which checkpoint; default: the last one."""
    dtype: Literal["original", "float32", "bfloat16", "float16"] = "original"
    """Dtype of the written weights; original: that of the model that the run started from."""
    mesh: MeshConfig = field(default_factory=MeshConfig)


def export_run(options: ExportOptions) -> None:
    """The command."""
    run_dir = epath.Path(options.run)
    saved = run_dir / "config.yaml"
    if not saved.exists():
        raise UserError(f"{saved}: not there, so {options.run} is no run directory; name the run.dir of its config")
    config = parse_config(yaml.safe_load(saved.read_text()), str(saved))
    checkpoints = Checkpoints(run_dir, config.checkpoint, read_only=True)
    step = checkpoints.latest_step() if options.step is None else options.step
    if step is None or step not in checkpoints.steps():
        raise UserError(f"{run_dir}: no checkpoint of step {options.step}; there are {checkpoints.steps() or 'none'}")
    tokenizer = load_tokenizer(config)
    meta = checkpoints.read_meta(step)
    model = setup_model(config.model, options.mesh, tokenizer, head=meta.get("head", "lm"))
    check_vocabulary(run_dir, meta["vocabulary"], model.vocabulary)
    params = checkpoints.restore_params(step, model.abstract_params)
    hf.export_hf(
        params,
        model.config,
        options.out,
        raw_config=model.raw_config,
        dtype=options.dtype,
        tokenizer=tokenizer,
        generation_config=hf.load_generation_config(model.directory),
    )
    if jax.process_index() == 0:
        print(f"wrote {options.out} (step {step})")
