"""Text to token ids and conversations to text: one interface over the fast tokenizers of `transformers`.

Second stop of the data path, after `formats.py`: `chat.py` renders and encodes rows through it, `generate` and `chat`
feed the model through it, and an export writes it next to the weights. Ids and rendering are those of `transformers`
(`apply_chat_template`), which the tests hold it to; what is added here is speed, character offsets, a clock that stands
still, and errors that say what to do.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Int32

from posttrain.data.builtin_templates import no_template_message
from posttrain.data.template import RESERVED_KWARGS, ChatTemplate, Message, RenderError
from posttrain.data.tokenizer_files import add_tokens, load_files, read_template, set_eos
from posttrain.errors import UserError

Offsets = tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n 2"]]


class Tokenizer:
    """A fast tokenizer with its chat template, as `transformers` has them.

    `clock` is the time that templates see through `strftime_now` (Llama 3.1's writes today's date). It stands still, so
    that every rendering by one tokenizer agrees; a run that is resumed on another day passes the first day's again.
    """

    def __init__(
        self,
        hf: Any,
        *,
        source: str,
        generation_stop_ids: Iterable[int] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        new_tokens: Mapping[str, int] | None = None,
        clock: datetime | None = None,
    ):
        self._hf = hf
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(getattr(hf, "split_special_tokens", False))
        self._generation_stop_ids = tuple(generation_stop_ids)
        self._clock_is_pinned = clock is not None
        self.source = source
        self.new_tokens = dict(new_tokens or {})
        """The tokens that were added to the vocabulary as it was loaded, with their ids: its highest."""
        self.embedding_rows: int | None = None
        """Of the model that it is used with, once that is known. Gemma 3's `<image_soft_token>` is a token of text
        models too, which have no row for it: a text that holds such a token cannot be used."""
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        """Variables that the chat template sees in every conversation."""
        if reserved := sorted(set(self.chat_template_kwargs) & set(RESERVED_KWARGS)):
            raise UserError(f"tokenizer.chat_template_kwargs: {reserved[0]} is set by the rendering itself; remove it")
        self.clock = clock or datetime.now()
        self.encode_cached = lru_cache(maxsize=4096)(lambda text: tuple(self.encode(text)))
        """`encode` as a tuple, remembered: for the few texts, such as a turn's header, that come back in every row."""

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: Sequence[str] = (),
        eos_token: str | None = None,
        clock: datetime | None = None,
    ) -> "Tokenizer":
        """Read a tokenizer from a model directory (any path epath opens) or a hub id.

        `add_special_tokens` makes these special tokens, with new ids where the vocabulary lacks them (`new_tokens`).
        `chat_template` replaces the tokenizer's own: a built-in name or the path of a Jinja file. `eos_token` replaces
        the end token. Code from the hub is never run. Raises UserError.
        """
        hf, generation_stop_ids = load_files(path, revision)
        new_tokens = add_tokens(hf, add_special_tokens, path)
        if eos_token is not None:
            set_eos(hf, eos_token, path)
        if chat_template is not None:
            hf.chat_template = read_template(chat_template, hf, path, add_special_tokens)
        return cls(
            hf,
            source=path,
            generation_stop_ids=generation_stop_ids,
            chat_template_kwargs=chat_template_kwargs,
            new_tokens=new_tokens,
            clock=clock,
        )

    # ---- identity -----------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1."""
        return max(self._hf.get_vocab().values()) + 1

    @property
    def bos_id(self) -> int | None:
        return self._hf.bos_token_id

    @property
    def eos_id(self) -> int | None:
        return self._hf.eos_token_id

    @property
    def pad_id(self) -> int | None:
        return self._hf.pad_token_id

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Special and added tokens: their text is cut out before anything else is tokenized."""
        return {token.content: id for id, token in self._backend.get_added_tokens_decoder().items()}

    @cached_property
    def added_texts(self) -> dict[int, str]:
        """`added_tokens` by id."""
        return {id: text for text, id in self.added_tokens.items()}

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of `added_tokens`."""
        return frozenset(self.added_tokens.values())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Those of `added_tokens` that are no text, but control what it is."""
        return {t.content: id for id, t in self._backend.get_added_tokens_decoder().items() if t.special}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Those of `added_ids` that are no text, but control what it is."""
        return frozenset(self.special_tokens.values())

    @cached_property
    def cut_ids(self) -> frozenset[int]:
        """Added tokens at which text falls apart into pieces that are tokenized on their own.

        Left out are those that need more than their own text to be found: normalized text, or whole words.
        """
        normalizer = self._backend.normalizer
        normalizes = normalizer is not None and json.loads(normalizer.__getstate__()).get("normalizers") != []
        tokens = self._backend.get_added_tokens_decoder().items()
        return frozenset(id for id, t in tokens if not t.single_word and not (normalizes and t.normalized))

    @cached_property
    def _is_cut_id(self) -> Bool[np.ndarray, "V"]:
        table = np.zeros(self.vocab_size, bool)
        table[list(self.cut_ids)] = True
        return table

    def is_cut(self, ids: Int32[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        """Which of the tokens are `cut_ids`."""
        return self._is_cut_id[ids]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: eos, those of generation_config.json, and the one that ends a rendered turn."""
        ids = list(self._known_stop_ids)
        if self.chat_template is not None:
            probe = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
            try:
                stop = self._closing(self.render(probe), 0)
            except RenderError:
                stop = None  # a template for another kind of conversation: rows will say so
            ids.extend([] if stop is None else [stop[1]])
        return tuple(dict.fromkeys(ids))

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """The `stop_ids` as they stand in text."""
        return tuple(self.added_texts[id] for id in self.stop_ids if id in self.added_texts)

    @property
    def _known_stop_ids(self) -> tuple[int, ...]:
        return (*(() if self.eos_id is None else (self.eos_id,)), *self._generation_stop_ids)

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source, or None where the model has none."""
        template = self._hf.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template

    @property
    def writes_date(self) -> bool:
        """Whether the template asks for the time."""
        return "strftime_now" in (self.chat_template or "")

    @property
    def tokens_without_row(self) -> dict[str, int]:
        """Tokens that the model has no embedding for, and their ids."""
        if self.embedding_rows is None or self.embedding_rows >= self.vocab_size:
            return {}
        return {token: id for token, id in self._hf.get_vocab().items() if id >= self.embedding_rows}

    @property
    def fingerprint(self) -> str:
        """Hash of all that changes ids or rendering, and what text is refused."""
        return f"{self._own_fingerprint}-{self.embedding_rows}" if self.tokens_without_row else self._own_fingerprint

    @cached_property
    def _own_fingerprint(self) -> str:
        """The clock counts only where it was given."""
        parts = {
            "tokenizer": self._backend.to_str(),
            "split_special_tokens": self._backend.encode_special_tokens,
            "template": self._hf.chat_template,
            "template_kwargs": self.chat_template_kwargs,
            "special_tokens": self._hf.special_tokens_map,
            "clock": self.clock.isoformat() if self._clock_is_pinned else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    # ---- text and ids -------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids; `add_special_tokens` adds what the tokenizer puts around a plain text, such as BOS, but no BOS to
        a text that begins with it."""
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids[1:] if add_special_tokens and self._has_two_bos(ids) else ids

    def encode_with_offsets(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[Offsets]:
        """For each text its ids as of `encode`, int32 [n], and each token's character span [start, end) in the text,
        int32 [n, 2].

        Tokens that share one character have its span each; a token that is in no text (BOS of the post-processor) has
        (0, 0); some tokenizers leave a token's leading space out of its span.
        """
        found = []
        for encoding in self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens):
            first = int(add_special_tokens and self._has_two_bos(encoding.ids))
            ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
            found.append((ids[first:], offsets[first:]))
        return found

    def _has_two_bos(self, ids: Sequence[int]) -> bool:
        return self.bos_id is not None and list(ids[:2]) == [self.bos_id, self.bos_id]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids, spaces as they are."""
        return self._hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    # ---- conversations ------------------------------------------------------------------------------------------

    def template(self, tools: Sequence[Mapping[str, Any]] = ()) -> ChatTemplate:
        """The chat template: of several that for tool use, where there are tools. Raises UserError without one."""
        if self.chat_template is None:
            raise UserError(no_template_message(self.added_tokens, self.source))
        return self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]

    @cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        sources = self._hf.chat_template
        return {
            name: ChatTemplate(
                source,
                origin=self.source,
                special_tokens=self._hf.special_tokens_map,
                kwargs=self.chat_template_kwargs,
                clock=self.clock,
            )
            for name, source in (sources if isinstance(sources, dict) else {"default": sources}).items()
        }

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text, equal to `apply_chat_template(messages, tokenize=False)` but for the clock.

        Messages and tools are plain JSON values; `template_kwargs` win over the tokenizer's own. `{% generation %}`
        marks render as their content. Raises RenderError where the template refuses or fails.
        """
        return self.template(tools).render(
            messages, tools=tools, template_kwargs=template_kwargs, add_generation_prompt=add_generation_prompt
        )

    def stop_at_end(self, text: str, start: int = 0) -> tuple[int, int] | None:
        """The stop token that closes `text`, a conversation that ends with an assistant turn: (its position, its id).

        That is the last added token, with nothing but whitespace behind it. Where several close the turn, as in Phi-3's
        `<|end|>` and `<|endoftext|>`, it is the first that ends a generation. None where none is at or behind `start`,
        and where it is ordinary text that is one token (`</tool_call>`): it ends no generation.
        """
        stop = self._closing(text, start)
        return stop if stop is not None and (stop[1] in self.special_ids or stop[1] in self.stop_ids) else None

    def _closing(self, text: str, start: int) -> tuple[int, int] | None:
        """`stop_at_end`, whatever the token may be."""
        stop = None
        while (last := self._added_at_end(text)) is not None and last[0] >= start:
            if stop is None or last[1] in self._known_stop_ids:
                stop = last
            text = text[: last[0]]
        return stop

    def _added_at_end(self, text: str) -> tuple[int, int] | None:
        text = text.rstrip()
        for length in self._added_lengths:
            id = self.added_tokens.get(text[-length:])
            if id is not None and length <= len(text):
                return len(text) - length, id
        return None

    @cached_property
    def _added_lengths(self) -> tuple[int, ...]:
        # Whitespace can be an added token (Gemma's "\n"), but stops nothing.
        return tuple(sorted({len(text) for text in self.added_tokens if text.strip()}, reverse=True))

    # ---- export -------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str], *, pad_id: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        `transformers` loads them back (4 and 5 alike) with the same ids and rendering. `pad_id` is the token
        that pads; default: the tokenizer's own.
        """
        target = epath.Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            self._hf.save_pretrained(scratch)
            config = json.loads(Path(scratch, "tokenizer_config.json").read_text(encoding="utf-8"))
            special = dict(self._hf.special_tokens_map)
            extra = config.pop("extra_special_tokens", None)
            if extra:  # transformers 4 reads a list under this name only
                config["additional_special_tokens"] = special["additional_special_tokens"] = list(extra)
            if pad_id is not None and pad_id != self.pad_id:
                config["pad_token"] = special["pad_token"] = self._hf.convert_ids_to_tokens(pad_id)
            for key in ("backend", "is_local", "local_files_only"):  # how this process loaded it
                config.pop(key, None)
            if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to 4
                config["tokenizer_class"] = "PreTrainedTokenizerFast"
            (target / "tokenizer_config.json").write_bytes(_json(config))
            (target / "special_tokens_map.json").write_bytes(_json(special))
            for name in ("tokenizer.json", "chat_template.jinja"):
                if (source := Path(scratch, name)).exists():
                    (target / name).write_bytes(source.read_bytes())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
