"""What all pages of this program share: one file, no network, one style, and a policy (CSP) that says so.

`page.css` is the style of what they have in common: colours of light and dark, headline
numbers, notices, tables, plots.
"""

import base64
import hashlib
from importlib import resources

from etils import epath

from posttrain.errors import UserError


def resource(package: str, name: str) -> str:
    """A text file beside the code."""
    return resources.files(package).joinpath(name).read_text("utf-8")


def base_style() -> str:
    """What comes before a page's own style."""
    return resource("posttrain.data", "page.css")


def policy(style: str, script: str | None = None) -> str:
    """Lets run exactly this script and this style, told by their hashes, and load nothing."""
    scripts = "" if script is None else f"script-src '{_hash(script)}'; "
    return (
        f"default-src 'none'; {scripts}style-src '{_hash(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def write(path: str, page: str) -> None:
    """Writes a page to any path that epath opens. Raises `UserError`."""
    target = epath.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(page.encode("utf-8", "replace"))
    except (OSError, ValueError, ImportError, LookupError) as error:
        raise UserError(f"--html {path}: cannot be written: {error}") from error


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
