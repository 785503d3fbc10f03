"""Where tokenizers and chat templates come from: model directories, remote ones too, the hub, template files.

Below `tokenizer.py`, which wraps what is loaded here. Whatever a user can get wrong about a path ends as a UserError.
"""

import difflib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from posttrain.errors import UserError

BUILT_IN_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
        " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
"""Chat templates by name, for models that come without one."""

_TEMPLATE_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "config.json", "generation_config.json"),
)
"""What a tokenizer, its template and its stop tokens are read from."""


def import_transformers() -> Any:
    """Import `transformers` without its line on the missing PyTorch, which this project does not use."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return transformers


def load_files(path: str, revision: str | None) -> tuple[Any, list[int]]:
    """The `transformers` tokenizer of a model directory or hub id, and the stop ids of its generation_config.json.

    Code from the hub is never run. Raises UserError.
    """
    directory = os.path.expanduser(path)
    if "://" in path:
        with tempfile.TemporaryDirectory() as copy:
            _copy_files(path, copy)
            hf, stop_ids = _from_directory(copy, path), _generation_stop_ids(copy, None)
    elif os.path.isdir(directory):
        hf, stop_ids = _from_directory(directory, path), _generation_stop_ids(directory, None)
    else:
        hf, stop_ids = _from_hub(path, revision), _generation_stop_ids(path, revision)
    if not getattr(hf, "is_fast", False):
        raise UserError(f"{path}: this tokenizer has no tokenizer.json, which exact masks need; fix: convert it")
    return hf, stop_ids


def set_eos(hf: Any, eos_token: str, path: str) -> None:
    """Make a token of the vocabulary the end token."""
    if eos_token not in hf.get_vocab():
        near = difflib.get_close_matches(eos_token, list(hf.added_tokens_encoder), n=3, cutoff=0.4)
        raise UserError(
            f"tokenizer.eos_token: {eos_token!r} is no token of {path}" + (f"; near: {', '.join(near)}" if near else "")
        )
    # Also where it is in the vocabulary only: its text must then be cut out as one token.
    hf.add_special_tokens({"eos_token": eos_token})


def read_template(name: str, hf: Any) -> str:
    """The chat template with a built-in name, or in a file."""
    if name in BUILT_IN_TEMPLATES:
        missing = [token for token in _TEMPLATE_TOKENS[name] if token not in hf.added_tokens_encoder]
        if missing:
            raise UserError(
                f"tokenizer.chat_template: {name!r} writes {' and '.join(missing)}, which this tokenizer does not have "
                "as special tokens; fix: a .jinja file that uses the tokenizer's own"
            )
        return BUILT_IN_TEMPLATES[name]
    try:
        return epath.Path(os.path.expanduser(name)).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer.chat_template: {name} is not UTF-8 text: {error}") from error
    except (OSError, ValueError, ImportError, LookupError) as error:
        known = ", ".join(sorted(BUILT_IN_TEMPLATES))
        raise UserError(
            f"tokenizer.chat_template: {name!r} is neither a readable file nor a built-in template ({known}): {error}"
        ) from error


def _copy_files(path: str, directory: str) -> None:
    try:
        source = epath.Path(path)
        for name in _FILES:
            if (source / name).exists():
                Path(directory, name).write_bytes((source / name).read_bytes())
    except (OSError, ValueError, ImportError, LookupError) as error:  # LookupError: a scheme that epath does not know
        raise UserError(f"{path}: cannot be read: {error}") from error


def _from_directory(directory: str, path: str) -> Any:
    file = Path(directory, "tokenizer.json")
    if file.exists():
        # The tokenizers library answers broken JSON with a bare Exception.
        with file.open("rb") as handle:
            head = handle.read(64).lstrip()
            handle.seek(max(0, file.stat().st_size - 64))
            tail = handle.read().rstrip()
        if not (head.startswith(b"{") and tail.endswith(b"}")):
            hint = "it is a Git LFS pointer: run git lfs pull" if head.startswith(b"version https") else "copy it again"
            raise UserError(f"{path}/tokenizer.json is incomplete or no JSON object; fix: {hint}")
    elif not any(Path(directory, name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise UserError(f"{path}: no tokenizer in this directory: tokenizer.json is missing")
    return _auto_tokenizer(directory, path, local_files_only=True)


def _from_hub(path: str, revision: str | None) -> Any:
    if os.path.exists(path):
        hint = "; fix: convert it with posttrain import first" if path.endswith(".gguf") else ""
        raise UserError(f"{path}: a file, not a model directory or hub id{hint}")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
        raise UserError(f"{path}: no such directory, and not a hub id (organisation/name)")
    return _auto_tokenizer(path, path, revision=revision)


def _auto_tokenizer(name: str, path: str, **options: Any) -> Any:
    transformers = import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, LookupError) as error:
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{path}: the tokenizer cannot be loaded: {reason}") from error


def _generation_stop_ids(path: str, revision: str | None) -> list[int]:
    """`eos_token_id` of generation_config.json: none, one or a list."""
    file = Path(path, "generation_config.json")
    if not os.path.isdir(path):
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            file = Path(huggingface_hub.hf_hub_download(path, file.name, revision=revision))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return []
    if not file.exists():
        return []
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}/generation_config.json is no JSON object: {error}") from error
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
