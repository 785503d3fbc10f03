"""Which content a data file has: what names its token cache (`sources.py`), and whether it changed while it was read.

Local files are known by their bytes, remote ones by what their store says changes with the content, or else by their
bytes too.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.storage import file_system, local_path, reading
from posttrain.errors import UserError

_REMOTE_VERSION_FACTS = (
    *("etag", "ETag", "md5Hash", "crc32c", "generation", "version_id", "sha256", "blob_id"),
    *("mtime", "updated", "LastModified", "last_modified", "created"),
)
_BY_BYTES = "sha256 of all bytes"


@dataclass(frozen=True)
class FileVersion:
    """A file's content, told apart from any other content that its path may have had."""

    path: str
    identity: Mapping[str, str]
    """The same on every machine that sees the file."""
    size: int
    """Bytes."""
    stat: tuple[int, int] | None
    """Size and modification time of a local file, to notice changes."""

    @classmethod
    def of(cls, path: str) -> "FileVersion":
        """Reads local files, and remote ones of which the store says too little. Raises UserError."""
        with reading(path):
            stat = _stat(path)
            if stat is None and (facts := _remote_facts(path)):
                return cls(path, facts, int(facts["size"]), None)
            files, name = file_system(path)
            digest, size = hashlib.sha256(), 0
            with files.open(name, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    size += len(chunk)
        return cls(path, {_BY_BYTES: digest.hexdigest()}, size, stat)

    def check_unchanged(self) -> None:
        """Raises UserError when the file is not the one that was identified any more, as far as can be told cheaply."""
        with reading(self.path):
            changed = _stat(self.path) != self.stat
            if _BY_BYTES not in self.identity:
                file_system(self.path)[0].invalidate_cache()
                changed |= _remote_facts(self.path) != self.identity
        if changed:
            raise UserError(f"{self.path}: changed while it was read; start again when it is complete")


def _stat(path: str) -> tuple[int, int] | None:
    local = local_path(path)
    if local is None:
        return None
    stat = local.stat()
    return stat.st_size, stat.st_mtime_ns


def _remote_facts(path: str) -> dict[str, str]:
    """Empty where nothing in them would change with the content."""
    files, name = file_system(path)
    info: Mapping[str, Any] = files.info(name)
    facts = {fact: str(info[fact]) for fact in _REMOTE_VERSION_FACTS if info.get(fact) is not None}
    return {"path": path, "size": str(info.get("size") or 0), **facts} if facts else {}
