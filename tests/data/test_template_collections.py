"""Masks under the chat templates of many real models, for chats, tool calls, thinking and system prompts.

The environment variable POSTTRAIN_TEMPLATES names a folder of folders of .jinja files (`make acceptance` fills one
from the packages of TRL and axolotl). What `transformers` renders and would feed at inference is the reference; for
templates with `{% generation %}` marks so are the masks that it derives from them.
"""

import os
import re
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from transformers import AutoTokenizer

from posttrain.data.chat import Sample, encode_rows
from posttrain.data.files import BadRow
from posttrain.data.rows import Row
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import NOTE_PROMPT, NOTE_STOP
from tests.data.chat_cases import FIXTURE

pytestmark = pytest.mark.acceptance

FOLDER = Path(os.environ.get("POSTTRAIN_TEMPLATES") or "/nonexistent")
FILES = sorted(FOLDER.glob("*/*.jinja"))

SPECIAL = (
    r"<\|[^|<>{}\s'\"]+\|>|<[a-z]+_of_[a-z]+>|</?(?:s|think|assistant|role)>|<\|?(?:turn|channel|tool_call)\|?>|\[/?[A-Z_]+\]"
    r"|<\uff5c[^<>{}]+\uff5c>|<seed:[a-z_:]+>|\[\|[a-z]+\|\]|\][~!]b?\[|\[e~\[|<SPECIAL_\d+>|<eo[a-z]+(?::[a-zA-Z0-9]*)?>"
)


def tool(name: str) -> dict[str, Any]:
    city = {"type": "object", "properties": {"city": {"type": "string", "description": "Which."}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": "Looks it up.", "parameters": city}}


def call(name: str, city: str, number: int) -> dict[str, Any]:
    return {"type": "function", "id": f"call{number:05d}", "function": {"name": name, "arguments": {"city": city}}}


def result(content: str, number: int, name: str = "weather") -> dict[str, Any]:
    return {"role": "tool", "name": name, "tool_call_id": f"call{number:05d}", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "You are terse."}
CALLS = [call("weather", "Paris", 1), call("clock", "Paris", 2)]
CHATS: dict[str, tuple[dict[str, Any], ...]] = {
    "question": (user("Who are you?"), answer("A small model.")),
    "system": (SYSTEM, user("Who are you?"), answer("A small model.")),
    "two": (SYSTEM, user("Hi"), answer("Hello!"), user("The capital of France?"), answer("Paris,\n\nI am told.")),
    "thinks": (user("2+2?"), answer("4.", reasoning_content="Two and two make four.")),
    "thinks twice": (
        user("2+2?"),
        answer("4.", reasoning_content="Two and two make four."),
        user("And 3+3?"),
        answer("6.", reasoning_content="Three twice is six."),
    ),
    "ends with the user": (user("Hi"), answer("Hello!"), user("Bye")),
}
TOOL_CHATS: dict[str, tuple[dict[str, Any], ...]] = {
    "call": (user("Weather in Paris?"), answer("", tool_calls=CALLS[:1]), result("21", 1), answer("21 degrees.")),
    "parallel calls": (
        SYSTEM,
        user("Weather and time in Paris?"),
        answer("", tool_calls=CALLS),
        result("21", 1),
        result("noon", 2, "clock"),
        answer("21 degrees, noon."),
        user("Thanks"),
        answer("You are welcome."),
    ),
    "thinks and calls": (
        user("Weather in Paris?"),
        answer("", reasoning_content="I need the tool.", tool_calls=CALLS[:1]),
        result("21", 1),
        answer("21 degrees.", reasoning_content="It said 21."),
    ),
}
CASES = [(name, messages, ()) for name, messages in CHATS.items()]
CASES += [(name, messages, (tool("weather"), tool("clock"))) for name, messages in TOOL_CHATS.items()]

FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
MODES: tuple[dict[str, bool], ...] = (
    {},
    *({name: value} for name, value in product(("enable_thinking", "thinking"), (False, True))),
)


@cache
def with_tokens_of(template: str) -> Tokenizer:
    """The fixture's tokenizer with the special tokens that a template writes."""
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    hf.add_special_tokens({"additional_special_tokens": sorted(set(re.findall(SPECIAL, template)))})
    hf.chat_template = template
    return Tokenizer(hf, source="fixture")


class Reference:
    """What `transformers` makes of a conversation, in the form that the template can take."""

    def __init__(self, tokenizer: Tokenizer, messages: tuple[dict[str, Any], ...], tools: tuple[dict[str, Any], ...]):
        self._hf, self._tools = tokenizer._hf, list(tools) or None
        self.forms = [list(messages)]
        self.forms.append([{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages])
        self.forms += [[with_text_arguments(m) for m in form] for form in self.forms]

    def ids(self, stop: int, **options: Any) -> list[list[int]]:
        """The ids of the first messages, in each form that works."""
        found = []
        for form in self.forms:
            try:
                found.append(self._hf.apply_chat_template(form[:stop], tools=self._tools, return_dict=False, **options))
            except FAILURES:
                continue
        return found

    def marks(self, form: list[dict[str, Any]]) -> Any:
        return self._hf.apply_chat_template(
            form, tools=self._tools, return_dict=True, return_assistant_tokens_mask=True
        )


def with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [f'{{"city": "{function["arguments"]["city"]}"}}' for function in functions]
    calls = [
        {**call, "function": {**call["function"], "arguments": text}}
        for call, text in zip(message["tool_calls"], texts, strict=True)
    ]
    return {**message, "tool_calls": calls}


def check_sample(
    sample: Sample, notes: tuple[str, ...], messages: tuple[dict[str, Any], ...], reference: Reference
) -> list[str]:
    """Ids as `transformers` renders a beginning of the conversation, or feeds it and goes on; and every trained stretch
    behind what it would feed."""
    ids = sample.tokens.tolist()
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    fed = [given for i in turns for mode in MODES for given in reference.ids(i, add_generation_prompt=True, **mode)]
    whole = [given for stop in range(2, len(messages) + 1) for given in reference.ids(stop)]
    problems = []
    if ids not in whole:
        noted = {NOTE_PROMPT, NOTE_STOP} & set(notes)
        goes_on = any(ids[: len(given)] == given for given in fed) or any(ids[:-1] == given for given in whole)
        problems += [] if noted and goes_on else ["other ids than transformers"]
    for start in np.flatnonzero(np.diff(sample.loss_weights, prepend=0) > 0).tolist():
        before = [given for given in fed if ids[: len(given)] == given and len(given) >= start]
        problems += [] if before else [f"no prompt leads to token {start}"]
    return problems


def check_marks(tokenizer: Tokenizer, sample: Sample, reference: Reference) -> list[str]:
    """Where the template's own marks say otherwise, but for stop tokens and whitespace around a turn.

    Conversations that had to be cut or put together anew are left to `check_sample`.
    """
    for form in reference.forms:
        try:
            theirs = reference.marks(form)
        except FAILURES:
            continue
        count = len(sample.tokens) - (NOTE_STOP in sample.notes)  # less the end token that we added
        if theirs["input_ids"][:count] != sample.tokens[:count].tolist():
            continue
        marked, ours = np.array(theirs["assistant_masks"][:count], bool), sample.loss_weights[:count] > 0
        more, less = (sample.tokens[:count][difference].tolist() for difference in (ours & ~marked, marked & ~ours))
        extra = tokenizer.decode([id for id in more if id not in tokenizer.stop_ids]).strip()
        left = tokenizer.decode(less).strip()
        return [f"trained, not marked: {extra}"] * bool(extra) + [f"marked, not trained: {left}"] * bool(left)
    return []


@pytest.mark.skipif(not FILES, reason="POSTTRAIN_TEMPLATES names no folder of folders of .jinja files")
def test_every_template_is_exact_or_refused() -> None:
    accepted, refused, compared, differ, reasons, wrong = 0, 0, 0, {}, [], []
    for file, (name, messages, tools) in product(FILES, CASES):
        template = file.read_text()
        tokenizer = with_tokens_of(template)
        reference = Reference(tokenizer, messages, tools)
        (samples,) = encode_rows([Row("chats.jsonl", 1, "messages", messages=messages, tools=tools)], tokenizer)
        if isinstance(samples, BadRow):
            unable = not reference.ids(len(messages)) or "leaves this" in samples.reason
            refused += not unable
            reasons.append(f"{file.stem} {name}: {samples.reason}")
            continue
        accepted += 1
        wrong += [
            f"{file.stem} {name}: {problem}"
            for sample in samples
            for problem in check_sample(sample, samples[0].notes, messages, reference)
        ]
        texts = [tokenizer.decode(sample.tokens[sample.loss_weights > 0].tolist()) for sample in samples]
        for said in (m["content"] for m in messages if m["role"] == "assistant"):
            assert sum(text.count(said) for text in texts) >= 1, (file, name, said)
        if len(samples) == 1 and "{% generation" in template.replace("{%-", "{%"):
            compared += 1
            differ |= {f"{file.stem} {name}": more for more in check_marks(tokenizer, samples[0], reference)}
    print(*reasons, sep="\n")
    print(f"accepted {accepted}, refused {refused}, with marks {compared}, marks that differ: {differ}")
    assert wrong == []
    assert compared > 150 and differ == {}
    assert accepted / (accepted + refused) >= 0.85
