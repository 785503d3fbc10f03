"""The chat templates that the package brings, for base models: `templates/NAME.jinja`, and which tokens each needs.

Under `tokenizer_files.py`. A template whose tokens a tokenizer lacks would train on pieces of words in their place, so
it is refused with the lines that the config needs.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources

from posttrain.errors import UserError


@dataclass(frozen=True)
class BuiltinTemplate:
    """What a template writes, beside the conversation."""

    tokens: tuple[str, ...]
    """They must be special tokens of the tokenizer."""
    stop: str
    """The one of them that ends the assistant's turn."""


BUILTIN_TEMPLATES = {
    "chatml": BuiltinTemplate(("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "gemma": BuiltinTemplate(("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "llama3": BuiltinTemplate(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "minimal": BuiltinTemplate(("<START>", "<USER>", "<ASSISTANT>", "<END>"), "<END>"),
}
"""By the name that `tokenizer.chat_template` takes, which is also the file's."""


def read_builtin(name: str, special_tokens: Collection[str], asked: Sequence[str], source: str) -> str:
    """The Jinja source of a built-in template for a tokenizer (of `source`) with these special tokens.

    Raises UserError where the tokenizer lacks some that the template writes, with the config that adds them to those
    `asked` for already.
    """
    missing = [token for token in BUILTIN_TEMPLATES[name].tokens if token not in special_tokens]
    if missing:
        raise UserError(
            f"tokenizer.chat_template: {name!r} writes {' and '.join(missing)}, which {source} does not have as "
            f"special tokens; fix: let the config say  {config_line(name, special_tokens, asked)}"
        )
    return resources.files("posttrain.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def config_line(name: str, special_tokens: Collection[str], asked: Sequence[str] = ()) -> str:
    """The config's `tokenizer` section for a built-in template, as one line of YAML."""
    template = BUILTIN_TEMPLATES[name]
    added = list(dict.fromkeys([*asked, *(token for token in template.tokens if token not in special_tokens)]))
    fields = [f"chat_template: {name}"]
    fields += [f"add_special_tokens: {json.dumps(added, ensure_ascii=False)}"] if added else []
    return f"tokenizer: {{{', '.join([*fields, f'eos_token: {json.dumps(template.stop)}'])}}}"


def fitting_template(special_tokens: Collection[str]) -> str:
    """The name of a built-in template whose tokens are all there, else `minimal`."""
    fitting = [n for n, template in BUILTIN_TEMPLATES.items() if set(template.tokens) <= set(special_tokens)]
    return fitting[0] if fitting else "minimal"


def no_template_message(special_tokens: Collection[str], source: str) -> str:
    """What to tell whoever needs the chat template of a tokenizer that has none."""
    return (
        f"{source}: the tokenizer has no chat template, which conversations need; fix: set tokenizer.chat_template to "
        f"a .jinja file or to a built-in one ({', '.join(BUILTIN_TEMPLATES)}); one that suits this vocabulary:  "
        f"{config_line(fitting_template(special_tokens), special_tokens)}"
    )
