"""May this config go on in this run directory? Nothing restarts at step 0, and nothing is written over, unasked."""

import json
from datetime import date, datetime, time
from typing import Any

import yaml
from etils import epath

from posttrain.config import Config, dump_config
from posttrain.errors import UserError, UserErrors
from posttrain.train.setup import ModelSetup

CLOCK_FILE = "template_clock.txt"

FREE_KEYS = (
    "run.dir",
    "run.resume",
    "mesh.",
    "checkpoint.",
    "log.",
    "evaluate.",
    "train.micro_batch_size",
    "train.on_nonfinite",
    "train.xla_options",
    "model.attention",
    "model.remat",
    "optimizer.memory",
    "data.cache_dir",
)
"""What may differ on resume: it changes how the run is carried out, not which run it is."""


def config_diff(saved: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, saved value, current value) of every leaf that differs."""
    old, new = _leaves(saved), _leaves(current)
    return [
        (key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def check_resume(run_dir: epath.Path, config: Config, latest: int | None) -> list[tuple[str, Any, Any]]:
    """Compares with the config that lies in the run directory; returns the harmless differences.

    Raises `UserError` when `run.resume` forbids what is there, and `UserErrors` listing every difference that would
    make it another run.
    """
    if latest is None:
        if config.run.resume == "must":
            raise UserError(
                f"run.resume = must: there is no checkpoint in {run_dir / 'checkpoints'}; "
                "check run.dir, or use run.resume auto to start at step 0"
            )
        if (run_dir / "export").exists():
            raise UserError(
                f"{run_dir} has an export but no checkpoint: its run cannot go on, and nothing is written over; "
                "use another run.dir, or move the export away"
            )
        return []
    if config.run.resume == "never":
        raise UserError(
            f"run.resume = never: {run_dir} has a checkpoint of step {latest}; "
            "use another run.dir, or run.resume auto to go on from it"
        )
    saved_file = run_dir / "config.yaml"
    if not saved_file.exists():
        raise UserError(f"{saved_file} is missing beside the checkpoints: cannot tell which run this is; restore it")
    differences = config_diff(yaml.safe_load(saved_file.read_text()), config.model_dump(mode="json"))
    fatal = [item for item in differences if not item[0].startswith(FREE_KEYS)]
    if fatal:
        raise UserErrors(
            [f"{key}: the run in {run_dir} has {old!r}, this config has {new!r}" for key, old, new in fatal]
            + [f"so this would be another run than the one at step {latest}: restore the values or use another run.dir"]
        )
    return [item for item in differences if item[0] != "run.resume"]


def check_model(where: epath.Path, meta: dict[str, Any], model: ModelSetup) -> None:
    """Raises `UserError` where the meta of a checkpoint says that it belongs to another model than this config's."""
    check_vocabulary(where, meta["vocabulary"], model.vocabulary)
    if model.lora is not None and meta["base"] != model.fingerprint:
        raise UserError(
            f"{where}: the checkpoint holds an adapter alone, and the model that it was trained on is not the one that "
            f"is now in {model.directory} (other weights or config.json); restore it there, or name it in model.path"
        )


def check_vocabulary(where: epath.Path, saved: str, current: str) -> None:
    """Raises `UserError` where a checkpoint's embedding rows belong to other tokens than this config's; both as
    `ModelSetup.vocabulary` writes them. Padding in memory hides it from a comparison of shapes."""
    if saved == current:
        return
    described = []
    for text in (saved, current):
        vocabulary = json.loads(text)
        new = ", ".join(f"{id} {token}" for token, id in vocabulary["new_tokens"].items())
        described.append(f"{vocabulary['size']} rows, new tokens {new or 'none'}")
    raise UserError(
        f"{where}: the checkpoint's embedding has {described[0]}; with this config it has {described[1]}; "
        "restore tokenizer.add_special_tokens and the model and tokenizer that the run started from"
    )


def save_config(run_dir: epath.Path, config: Config, clock: datetime | None) -> None:
    """Puts the resolved config into the run directory, and the date that its chat template writes, if it writes one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / "config.yaml", dump_config(config))
    if clock is not None and not (run_dir / CLOCK_FILE).exists():
        _write(run_dir / CLOCK_FILE, clock.isoformat() + "\n")


def run_clock(run_dir: epath.Path) -> datetime:
    """The time that chat templates see: that of the run's first start, so that a resumed run renders the same text;
    today, for a new one."""
    file = run_dir / CLOCK_FILE
    if file.exists():
        return datetime.fromisoformat(file.read_text().strip())
    return datetime.combine(date.today(), time())


def _write(file: epath.Path, text: str) -> None:
    """Whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)
