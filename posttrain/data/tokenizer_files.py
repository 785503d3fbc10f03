"""Where tokenizers and chat templates come from: model directories, remote ones too, the hub, template files; and the
tokens that a run adds.

Below `tokenizer.py`, which wraps what is loaded here. Whatever a user can get wrong about a path ends as a UserError.
"""

import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from posttrain.data.builtin_templates import BUILTIN_TEMPLATES, read_builtin
from posttrain.data.spm import convert_directory
from posttrain.errors import UserError

_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
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


def add_tokens(hf: Any, tokens: Sequence[str], path: str) -> dict[str, int]:
    """Make each of the tokens a special one: its text is cut out of every text, and skipped when decoding.

    One that is special already stays as it is; one that the vocabulary has in another way keeps its id; the others get
    the ids behind the highest, in the order given. Returns these, with their ids. Raises UserError.
    """
    vocab = hf.get_vocab()
    size = max(vocab.values()) + 1
    special = {token.content for token in hf.added_tokens_decoder.values() if token.special}
    wanted = [token for token in dict.fromkeys(tokens) if token not in special]
    if wanted:
        # Without the argument the list of the tokenizer's own extra tokens would be replaced.
        hf.add_special_tokens({"extra_special_tokens": wanted}, replace_extra_special_tokens=False)
    new = [token for token in wanted if token not in vocab]
    ids = {token: int(hf.convert_tokens_to_ids(token)) for token in new}
    if list(ids.values()) != list(range(size, size + len(new))):
        # The library counts the vocabulary instead of looking at its highest id.
        raise UserError(
            f"tokenizer.add_special_tokens: the ids of {path} have gaps below the highest, {size - 1}, so that a new "
            f"token would get the id of another; fix: give the unused ids tokens of their own in its tokenizer.json"
        )
    return ids


def set_eos(hf: Any, eos_token: str, path: str) -> None:
    """Make a token of the vocabulary the end token."""
    if eos_token not in hf.get_vocab():
        near = difflib.get_close_matches(eos_token, list(hf.added_tokens_encoder), n=3, cutoff=0.4)
        raise UserError(
            f"tokenizer.eos_token: {eos_token!r} is no token of {path}"
            + (f"; near: {', '.join(near)}" if near else "")
            + "; fix: one of its tokens, or add it with tokenizer.add_special_tokens"
        )
    # Also where it is in the vocabulary only: its text must then be cut out as one token.
    hf.add_special_tokens({"eos_token": eos_token})


def read_template(name: str, hf: Any, path: str, asked: Sequence[str] = ()) -> str:
    """The chat template with a built-in name, or in a file. `asked` are the tokens that the config adds to those of the
    tokenizer, of `path`. Raises UserError."""
    if name in BUILTIN_TEMPLATES:
        return read_builtin(name, hf.added_tokens_encoder, asked, path)
    try:
        return epath.Path(os.path.expanduser(name)).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer.chat_template: {name} is not UTF-8 text: {error}") from error
    except (OSError, ValueError, ImportError, LookupError) as error:
        known = ", ".join(BUILTIN_TEMPLATES)
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
    elif Path(directory, "tokenizer.model").exists():
        return _from_sentencepiece(directory, path)
    elif not Path(directory, "vocab.json").exists():
        raise UserError(f"{path}: no tokenizer in this directory: tokenizer.json is missing")
    return _auto_tokenizer(directory, path, local_files_only=True)


def _from_hub(path: str, revision: str | None) -> Any:
    if os.path.exists(path):
        hint = "; fix: convert it with posttrain import first" if path.endswith(".gguf") else ""
        raise UserError(f"{path}: a file, not a model directory or hub id{hint}")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
        raise UserError(f"{path}: no such directory, and not a hub id (organisation/name)")
    hf = _auto_tokenizer(path, path, revision=revision)
    model = Path(getattr(hf, "vocab_file", None) or "")
    if model.name == "tokenizer.model" and not model.with_name("tokenizer.json").exists():
        return _from_sentencepiece(str(model.parent), path)
    return hf


def _from_sentencepiece(directory: str, path: str) -> Any:
    """By a conversion of our own: that of transformers forgets what the model does to spaces."""
    with tempfile.TemporaryDirectory() as converted:
        for name in _FILES:
            if (file := Path(directory, name)).exists():
                shutil.copy(file, converted)
        flags = convert_directory(Path(directory), Path(converted), path)
        hf = _auto_tokenizer(converted, path, local_files_only=True)
    for flag, value in flags.items():  # left out of what is loaded beside a tokenizer.json
        setattr(hf, flag, value)
    for id, token in hf.init_kwargs.get("added_tokens_decoder", {}).items():
        if hf.convert_tokens_to_ids(str(token)) != int(id):
            raise UserError(f"{path}: the added token {token} should have id {id}, which the vocabulary does not have")
    return hf


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
