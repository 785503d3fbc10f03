"""Chat templates: conversations to text, in the sandbox that `transformers` compiles templates for.

Under `tokenizer.py`, which owns one template. Rendering is that of `apply_chat_template(tokenize=False)`, which the
tests hold it to, but for the clock, which stands still. What a template would silently leave out of a conversation
(`left_out`) is found by rendering the same conversation with words in place of its texts.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2

from posttrain.data.tokenizer_files import import_transformers
from posttrain.errors import UserError

RESERVED_KWARGS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")
"""What `chat_template_kwargs` may not set, because the rendering itself does."""

_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template's own expressions can raise: `raise_exception`, `1 + 'a'`, `messages[9]`, ..."""

_MODES = ({"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}, {"thinking": True})
"""The variables by which templates let a caller choose whether the model is made to think."""

_TAG = r"[<\[\u25c1][^<>\[\]\u25b7\s]*(?:%s)[^<>\[\]\u25b7\s]*[>\]\u25b7]"
_OPEN = rf"(?:{_TAG % 'think|thought|reason'}|<\|channel>thought)"
_OPENED_THINKING = re.compile(rf"{_OPEN}\s*({_TAG % 'think|thought|reason|channel'}\s*)?\Z", re.IGNORECASE)
_STARTED_THINKING = re.compile(rf"\s*{_OPEN}", re.IGNORECASE)
"""How templates write that the model thinks: `<think>`, `[THINK]`, `<seed:think>`, `<|channel>thought`, ..."""

Message = Mapping[str, Any]


class RenderError(UserError):
    """The chat template refuses or fails on a conversation."""


class ChatTemplate:
    """A compiled chat template with the variables that it sees.

    `clock` is the time of `strftime_now` (Llama 3.1's template writes today's date).
    """

    def __init__(
        self, source: str, *, origin: str, special_tokens: Mapping[str, Any], kwargs: Mapping[str, Any], clock: datetime
    ):
        import_transformers()
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.source = source
        try:
            self._compiled: Any = _compile_jinja_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{origin}: the chat template's line {error.lineno} is not valid Jinja: {error.message}"
            ) from error

        def strftime_now(format: str) -> str:
            return clock.strftime(format)

        self._variables = {"documents": None, **special_tokens, **kwargs, "strftime_now": strftime_now}
        self._left_out = lru_cache(maxsize=4096)(self._find_left_out)

    @property
    def has_marks(self) -> bool:
        """Whether the template marks with `{% generation %}` what the assistant writes."""
        return "generation" in self.source and any(
            word.strip("-+ ").startswith("generation") for word in self.source.split("{%")[1:]
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text. Messages and tools are plain JSON values. Raises RenderError."""
        try:
            return self._compiled.render(**self._given(messages, tools, template_kwargs, add_generation_prompt))
        except _FAILURES as error:
            raise RenderError(f"the chat template refuses it: {error}") from error

    def marks(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any] | None
    ) -> list[tuple[int, int]]:
        """The character spans of the whole conversation that the template itself marks as the assistant's."""
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        given = self._given(messages, tools, template_kwargs, False)
        try:
            return _render_with_assistant_indices(self._compiled, **given)[1]
        except _FAILURES as error:
            raise RenderError(f"the chat template refuses it: {error}") from error

    def generation_prompts(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
    ) -> Iterator[str]:
        """What the model may be fed when it is the assistant's turn: the rendering with the generation prompt; then
        those of a caller who decides otherwise whether the model thinks, by a variable that nobody has set. Raises
        RenderError."""
        yield self.render(messages, tools=tools, template_kwargs=template_kwargs, add_generation_prompt=True)
        for mode in _MODES:
            (name,) = mode
            if name in self.source and name not in template_kwargs and name not in self._variables:
                variables = {**template_kwargs, **mode}
                yield self.render(messages, tools=tools, template_kwargs=variables, add_generation_prompt=True)

    def _given(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any] | None,
        add_generation_prompt: bool,
    ) -> dict[str, Any]:
        return {
            **self._variables,
            **(template_kwargs or {}),
            "messages": [self._as_wanted(_plain(message)) for message in messages],
            "tools": list(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }

    # ---- the form that a template wants -----------------------------------------------------------------------------

    def _as_wanted(self, message: dict[str, Any]) -> dict[str, Any]:
        """As given, but where the template cannot take that: content in parts (templates of models that see images),
        arguments as an object or as JSON text, empty content beside tool calls where there is none."""
        if "content" not in message and message.get("tool_calls") and self._needs_content:
            message = {**message, "content": ""}
        if self._wants_parts and isinstance(message.get("content"), str):
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        if not message.get("tool_calls") or self._refuses_arguments is None:
            return message
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"].get("arguments")
            if isinstance(arguments, self._refuses_arguments):
                changed = json.loads(arguments) if isinstance(arguments, str) else json.dumps(arguments, **_READABLE)
                call = {**call, "function": {**call["function"], "arguments": changed}}
            calls.append(call)
        return {**message, "tool_calls": calls}

    @cached_property
    def _wants_parts(self) -> bool:
        parts = [{"type": "text", "text": "contentprobe"}]
        as_string, as_parts = (self._try({"role": "user", "content": content}) for content in ("contentprobe", parts))
        return "contentprobe" not in as_string and "contentprobe" in as_parts and str(parts) not in as_parts

    @cached_property
    def _needs_content(self) -> bool:
        """Whether the template fails on tool calls without content, and not on those with an empty one."""
        call = {"type": "function", "id": "id0000000", "function": {"name": "callprobe", "arguments": {}}}
        if self._refuses_arguments is dict:
            call["function"]["arguments"] = "{}"
        asked = {"role": "user", "content": [{"type": "text", "text": "x"}] if self._wants_parts else "x"}
        calls = {"role": "assistant", "tool_calls": [call]}
        return not self._try(asked, calls) and bool(self._try(asked, {**calls, "content": ""}))

    @cached_property
    def _refuses_arguments(self) -> type | None:
        """The form of a call's arguments (dict or str) that the template fails on or writes wrongly (the dict as Python
        does, the text quoted once more) while it takes the other."""
        arguments = {"key": "valueprobe"}
        fine = {}
        for form in (dict, str):
            given = arguments if form is dict else json.dumps(arguments)
            function = {"name": "callprobe", "arguments": given}
            call = {"type": "function", "id": "id0000000", "function": function}
            text = self._try(
                {"role": "user", "content": "content0probe"}, {"role": "assistant", "content": "", "tool_calls": [call]}
            )
            fine[form] = "valueprobe" in text and str(arguments) not in text and '\\"valueprobe' not in text
        return next((form for form in fine if not fine[form] and any(fine.values())), None)

    def _try(self, *messages: Message) -> str:
        """The rendering, without any change of form; empty where the template fails."""
        variables = {**self._variables, "messages": list(messages), "tools": None, "add_generation_prompt": False}
        try:
            return self._compiled.render(**variables)
        except _FAILURES:
            return ""

    # ---- what a template leaves out ---------------------------------------------------------------------------------

    def left_out(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[tuple[int, str], ...]:
        """What the template, silently, does not write of a conversation: (index of the message, key in it), of the
        tools (-1, "tools"). Looked at are a last assistant message and what is fed to the model before it; of that not
        the earlier assistant messages: what becomes of those is the template's affair.

        Found with words in place of the texts, so that nothing a template trims, escapes or parses hides the answer;
        conversations of one shape share it. Empty also where the template refuses such a conversation of words: the
        conversation's own rendering speaks for itself.
        """
        return self._left_out(tuple(map(_shape, messages)), bool(tools), _frozen(template_kwargs or {}))

    def _find_left_out(self, shape: tuple[Any, ...], has_tools: bool, kwargs: Any) -> tuple[tuple[int, str], ...]:
        messages = [_of_words(number, *parts) for number, parts in enumerate(shape)]
        tools, variables = [_TOOL] if has_tools else [], _thawed(kwargs)
        last, answers = len(messages) - 1, messages[-1]["role"] == "assistant"
        try:
            text = fed = self.render(messages, tools=tools, template_kwargs=variables)
            if answers and last:
                fed = self.render(messages[:-1], tools=tools, template_kwargs=variables, add_generation_prompt=True)
        except RenderError:
            return ()
        wanted = [(-1, "tools", "toolprobe", fed)] if has_tools else []
        for number, message in enumerate(messages):
            if number == last or message["role"] != "assistant":
                keys, where = ("content", "reasoning_content"), text if number == last else fed
                wanted += [(number, key, message[key], where) for key in keys if message.get(key)]
        for call in messages[last].get("tool_calls", ()):
            name = call["function"]["name"]
            wanted += [(last, "tool_calls", name, text), (last, "tool_calls.arguments", f"value{name}", text)]
        return tuple(dict.fromkeys((number, key) for number, key, word, where in wanted if word not in where))


_READABLE: dict[str, Any] = {"ensure_ascii": False}

_TOOL = {
    "type": "function",
    "function": {
        "name": "toolprobe",
        "description": "Finds it.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "What to find."}},
            "required": ["key"],
        },
    },
}


def before_thinking(prompt: str) -> int:
    """Where a generation prompt ends but for the thinking that it opens, and perhaps closes again."""
    opened = _OPENED_THINKING.search(prompt)
    return opened.start() if opened else len(prompt)


def closes_thinking(prompt: str) -> bool:
    """Whether a generation prompt opens the thinking and closes it at once: the model is to answer without."""
    opened = _OPENED_THINKING.search(prompt)
    return opened is not None and opened.group(1) is not None


def starts_thinking(text: str) -> bool:
    """Whether a text begins by opening the thinking."""
    return _STARTED_THINKING.match(text) is not None


def _shape(message: Message) -> tuple[Any, ...]:
    """What decides how a template treats a message, but for its texts."""
    calls = tuple(isinstance(call["function"].get("arguments"), str) for call in message.get("tool_calls") or ())
    content = message.get("content")
    kind = None if content is None else bool(content)
    rest = tuple(key for key in ("name", "tool_call_id", "reasoning") if message.get(key) is not None)
    return message["role"], kind, bool(message.get("reasoning_content")), calls, rest


def _of_words(
    number: int, role: str, content: bool | None, reasoning: bool, calls: tuple[bool, ...], rest: tuple[str, ...]
) -> dict[str, Any]:
    """A message of the shape, its texts replaced by words that no template trims, escapes or parses."""
    message: dict[str, Any] = {"role": role}
    if content is not None:
        message["content"] = f"content{number}probe" if content else ""
    if reasoning:
        message["reasoning_content"] = f"reasoning{number}probe"
    if "reasoning" in rest:
        message["reasoning"] = message["reasoning_content"]
    for k, as_string in enumerate(calls):
        name = f"call{number}x{k}probe"
        arguments = {"key": f"value{name}"}
        function = {"name": name, "arguments": f'{{"key": "value{name}"}}' if as_string else arguments}
        # Mistral's templates want ids of nine letters and digits.
        call = {"type": "function", "id": f"id{number:04d}{k:03d}", "function": function}
        message.setdefault("tool_calls", []).append(call)
    if "name" in rest:
        message["name"] = "nameprobe"
    if "tool_call_id" in rest:
        message["tool_call_id"] = f"id{number:04d}000"
    return message


def _plain(message: Message) -> dict[str, Any]:
    """Without nulls, and with the reasoning under each name that templates read, as `apply_chat_template` passes it."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = plain.get("reasoning_content")
    return plain if reasoning is None else {"thinking": reasoning, **plain}


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ("object", tuple((key, _frozen(item)) for key, item in value.items()))
    return ("list", tuple(map(_frozen, value))) if isinstance(value, list | tuple) else ("value", value)


def _thawed(frozen: Any) -> Any:
    kind, value = frozen
    if kind == "object":
        return {key: _thawed(item) for key, item in value}
    return list(map(_thawed, value)) if kind == "list" else value
