"""Adapters between the config and the model: what is wrong with the settings, the decoder with its adapter, and what
the commands that take a model make of an adapter's directory. `experiment.py` builds with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from posttrain.config import Config, LoraConfig, ModelConfig
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from posttrain.models import hf
from posttrain.models.architecture import DecoderConfig
from posttrain.models.decoder import AbstractDecoder
from posttrain.models.directory import HUB_ID
from posttrain.models.embeddings import NewRows
from posttrain.models.lora import attach, choose, with_dropout
from posttrain.models.peft import base_of, is_adapter, peft_modules, read_adapter, short_names
from posttrain.models.quantize import Quantization, check_available, quantize_decoder
from posttrain.train.setup import LoraSetup


def lora_problems(config: Config) -> list[str]:
    """Settings that contradict each other, or that nothing would read."""
    lora, problems = config.model.lora, []
    default, off = LoraConfig(), config.reference.logps == "adapter_off"
    changed = [name for name in LoraConfig.model_fields if getattr(lora, name) != getattr(default, name)]
    if not lora.enabled:
        problems += [f"model.lora.{name} is set, but there is no adapter: give model.lora.r too" for name in changed]
        if off:
            problems.append("reference.logps = adapter_off: there is no adapter; give model.lora.r, or use online")
        return problems
    if lora.path is not None:
        given = [name for name in ("r", "alpha", "use_rslora", "target_modules") if name in changed]
        problems += [f"model.lora.{name}: the adapter of model.lora.path tells it; leave it out" for name in given]
    if not lora.target_modules:
        problems.append("model.lora.target_modules is empty: nothing would be trained; all-linear is the default")
    if config.optimizer.only_new_tokens:
        problems.append("optimizer.only_new_tokens: model.lora trains the adapter alone; leave one of them out")
    if off and config.reference.path is not None:
        problems.append(
            f"reference.path = {config.reference.path!r}: reference.logps adapter_off is the trained model without its "
            "adapter; leave one of them out"
        )
    return problems


def setup_lora(
    config: ModelConfig, decoder_config: DecoderConfig, family: hf.Family, plain: AbstractDecoder, new_rows: NewRows
) -> tuple[AbstractDecoder, LoraSetup, Quantization | None]:
    """The decoder with its adapter, what is known of that, and how the kernels are quantised. Raises `UserError` for
    targets that name nothing, and for an adapter that does not fit."""
    chosen = config.lora
    if new_rows:
        raise UserError(
            f"model.lora: {', '.join(new_rows.tokens)} would be new rows of the embedding, which an adapter does not "
            "hold. Train them first (optimizer.only_new_tokens without model.lora) and start from that export, or "
            "leave them out of tokenizer.add_special_tokens"
        )
    modules = peft_modules(family, decoder_config, plain)
    if chosen.path is None:
        adapter = choose(chosen, plain, short_names(modules))
    else:
        adapter = replace(read_adapter(chosen.path, modules, plain)[0], dropout=chosen.dropout)
    decoder, base, quantized = attach(plain, adapter, jnp.dtype(config.params_dtype)), plain, None
    if chosen.quantize is not None:
        check_available(chosen.quantize)
        decoder, base = (quantize_decoder(described, chosen.quantize) for described in (decoder, plain))
        quantized = Quantization(chosen.quantize, plain)
    local = Path(config.path)
    lora = LoraSetup(
        adapter,
        base,
        plain,
        modules,
        with_dropout(decoder, adapter),
        path=None if chosen.path is None else Path(chosen.path),
        base_name=str(local.resolve()) if local.is_dir() else config.path,
        base_revision=config.revision,
    )
    return decoder, lora, quantized


def named_model(path: str, base: str | None, revision: str | None, **options: Any) -> ModelConfig:
    """The config of a model that a command names: a Hugging Face directory, a hub id, or the directory of an adapter,
    whose model is `base` or else the one that its config names. Raises `UserError` where there is none."""
    if not is_adapter(path):
        if base is not None:
            raise UserError(f"--base {base}: {path} is a model, not an adapter; leave --base out")
        return ModelConfig(path=path, revision=revision, **options)
    named, named_revision = (base, revision) if base is not None else base_of(path)
    if not named:
        raise UserError(f"{path}: its adapter_config.json names no base model; name it with --base")
    if base is None and not Path(named).is_dir() and not HUB_ID.fullmatch(named):
        raise UserError(f"{path}: its base model {named} is not there; name it with --base")
    return ModelConfig(path=named, revision=named_revision, lora=LoraConfig(path=path), **options)


def named_tokenizer(config: ModelConfig, **options: Any) -> Tokenizer:
    """The tokenizer of such a model: that which lies beside an adapter, or else the model's."""
    if config.lora.path is not None and (Path(config.lora.path) / "tokenizer_config.json").is_file():
        return Tokenizer.load(config.lora.path, **options)
    return Tokenizer.load(config.path, revision=config.revision, **options)
