"""The canonical row: what every dataset format becomes (`formats.py`) and what is encoded (`chat.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "messages", "prompt_completion", "text", "prompt", "preference", "unpaired_preference", "stepwise_supervision"
]
"""The dataset types of TRL, under its names: `messages` is conversational, `text` plain language modeling."""

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One row in canonical form.

    A message is a dict of JSON values as `apply_chat_template` takes it: `role` (one of `ROLES`), `content` (a string;
    absent only beside `tool_calls`), `reasoning_content`, `tool_calls`
    (`{"type": "function", "function": {"name": ..., "arguments": ...}}`), `name`, `tool_call_id` and whatever else the
    data had for the template. Keys with null are left out.
    """

    file: str
    line: int
    """As in `Record`."""
    kind: Kind
    messages: tuple[dict[str, Any], ...] = ()
    """The whole conversation; of kinds with a prompt the prompt's messages first, of a pair then the chosen answer."""
    prompt_length: int = 0
    """How many of `messages` are the prompt."""
    weights: tuple[float | None, ...] = ()
    """The weight that the row gives each message, None where it gives none; empty where it gives none at all."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """`chat_template_kwargs`: variables for the chat template."""
    text: str = ""
    prompt: str = ""
    """Of a row in strings; so are the following."""
    completion: str = ""
    """Of a pair the chosen one."""
    rejected: str = ""
    rejected_messages: tuple[dict[str, Any], ...] = ()
    """The whole rejected conversation of a conversational pair, the same prompt first."""
    label: bool | None = None
    """Of unpaired preference: whether the answer is wanted."""
    margin: float | None = None
    """Of a pair: how much better the chosen answer is."""
    completions: tuple[str, ...] = ()
    """Of stepwise supervision: the steps."""
    labels: tuple[bool, ...] = ()
    """Of stepwise supervision: whether each step is right."""
    origin: str = ""
    """What `messages` were called in the file, where not `messages`: `conversations`, `chosen`, ..."""
    keys: tuple[str, ...] = ()
    """Where in the file each of `messages` stands, where they are not one after the other in `origin`."""
    rejected_keys: tuple[str, ...] = ()
    """The same of `rejected_messages`."""

    def message_key(self, index: int) -> str:
        """Where in the file message `index` stands, e.g. `completion[0]`."""
        if self.keys:
            return self.keys[index]
        if self.origin or self.kind in ("messages", "prompt"):
            return f"{self.origin or self.kind}[{index}]"
        answer = "chosen" if self.kind == "preference" else "completion"
        return f"prompt[{index}]" if index < self.prompt_length else f"{answer}[{index - self.prompt_length}]"
