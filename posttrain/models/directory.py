"""Where a model's files are: a local directory, or the snapshot of a hub id."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import UserError
from posttrain.models.weights import INDEX_FILE, SINGLE_FILE

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What is fetched from the hub: never pickled weights."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(path: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Path:
    """The local directory of a model: `path` itself, or the snapshot of a hub id; without `weights`, of config.json.

    Raises `UserError` when there is no such directory or hub model, or when it lacks the safetensors that are wanted.
    """
    directory = Path(path)
    if "://" in str(path):
        raise UserError(f"{path}: weights are read by slices from local disk; copy the directory there first")
    if directory.is_dir():
        if weights:
            _check_directory(directory)
        return directory
    if directory.suffix == ".gguf":
        target = directory.with_suffix("")
        raise UserError(f"{path}: a GGUF file is imported first: posttrain import {path} {target.name}")
    if directory.exists():
        raise UserError(f"{path}: is a file; name the directory that holds config.json and the safetensors")
    if not HUB_ID.fullmatch(str(path)):
        raise UserError(f"{path}: no such directory, and not a hub id (owner/name)")
    directory = _download(str(path), revision, HUB_FILES if weights else ("config.json",))
    if weights:
        _check_directory(directory)
    return directory


def _download(hub_id: str, revision: str | None, files: Sequence[str]) -> Path:
    # Imported here: most runs read local directories.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{hub_id}: no such directory here, and it could not be had as a hub model{at}: {reason}"
        ) from error


def _check_directory(directory: Path) -> None:
    names = sorted(p.name for p in directory.iterdir())
    if SINGLE_FILE in names or INDEX_FILE in names:
        return
    wanted = f"{directory}: no {SINGLE_FILE} or {INDEX_FILE}"
    by_suffix = {suffix: [n for n in names if n.endswith(suffix)] for suffix in (".bin", ".pt", ".pth", ".gguf")}
    if by_suffix[".gguf"]:
        gguf = directory / by_suffix[".gguf"][0]
        raise UserError(f"{wanted}, but a GGUF file; import it first: posttrain import {gguf} OUT_DIR")
    pickled = [n for suffix in (".bin", ".pt", ".pth") for n in by_suffix[suffix]]
    if pickled:
        raise UserError(
            f"{wanted}, only {pickled[0]}: pickled weights can run code and are not read; "
            "save the model as safetensors (save_pretrained(..., safe_serialization=True))"
        )
    if "adapter_config.json" in names:
        raise UserError(
            f"{wanted}: an adapter without its model; to train, name the model in model.path and the adapter in "
            "model.lora.path"
        )
    raise UserError(f"{wanted}; it holds: {', '.join(names[:8]) or 'nothing'}")
