"""`posttrain generate` and `posttrain chat`: answers to a file of prompts, and a conversation in the terminal.

Both run the engine of `rollout/` on a Hugging Face directory; sampling is greedy unless asked otherwise, whatever the
model's generation_config.json recommends, so that the same command gives the same answers.
"""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Annotated, Any, Literal

import jax
import tyro
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from posttrain.config import MeshConfig, ModelConfig
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError
from posttrain.experiment import setup_model
from posttrain.parallel.mesh import row_shards
from posttrain.rollout.engine import Completion, Engine, FinishReason, Request
from posttrain.rollout.prompts import Prompt, read_prompts, render_prompt
from posttrain.rollout.sampling import SamplingParams
from posttrain.train.adapters import named_model, named_tokenizer
from posttrain.train.setup import ModelSetup

LENGTH_STEP = 256
"""The cache's length is rounded up to a multiple of it, so that compiled programs are found again."""

MOST_SLOTS = 32
CACHE_BYTES = 2 * 2**30
"""What `slots` is by default, and the device memory that they may take."""

CHAT_LENGTH = 4096
"""Tokens that a chat's history may have, unless said otherwise."""

CHAT_STEPS = 4
"""Tokens that appear together in a chat."""


@dataclass(frozen=True, kw_only=True)
class _ModelOptions:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hugging Face directory, hub id, or the directory of an adapter."""
    base: str | None = None
    """Of an adapter: the model that it belongs to; default: the one that it names."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    chat_template: str | None = None
    """A .jinja file or a built-in one (chatml, gemma, llama3, minimal), instead of the model's own template."""
    max_new_tokens: int = 256
    """Longest answer in tokens, its stop token included."""
    temperature: float = 0.0
    """0 is greedy: always the most probable token. 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens that hold this share of the probability; 1: from all."""
    min_p: float = 0.0
    """Sample from the tokens at least this share as probable as the most probable one; 0: from all."""
    seed: int = 0
    """Seed of sampling. An answer depends on it, the prompt and the row's number alone."""
    max_length: int | None = None
    """Longest sequence in tokens, prompt and answer together; default: what is needed (chat: 4096), up to the model's
    own limit."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto: bfloat16 on accelerators, float32 on CPU."""
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def sampling(self) -> SamplingParams:
        """Raises `UserErrors` for values out of range."""
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.seed)

    def config(self) -> ModelConfig:
        """Raises `UserError` for an adapter without its model."""
        return named_model(self.model, self.base, self.revision, dtype=self.dtype)

    def setup(self) -> ModelSetup:
        """The model, placed but not loaded."""
        return setup_model(self.config(), self.mesh)

    def tokenizer(self) -> Tokenizer:
        return named_tokenizer(self.config(), chat_template=self.chat_template)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(_ModelOptions):
    """Answers each row of a file. Greedy unless --temperature is given.

    A row has a `prompt` (a string, continued as it is, or a list of messages), `messages`, or `input_ids`. It is
    written as one JSON line, in order: its own columns, `completion` (the text without the stop token),
    `completion_ids` (with it) and `finish_reason`: stop, or length where the answer was cut off.
    """

    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS")]
    """JSONL, JSON or Parquet file."""
    out: str = "-"
    """Where to write; - for standard output."""
    overwrite: bool = False
    """Replace the file that --out names."""
    logprobs: bool = False
    """Write `logprobs` too: of each token of `completion_ids`, under the model's own distribution."""
    slots: int | None = None
    """How many rows are answered at the same time; default: 32, or fewer where their key/value cache would take more
    than 2 GiB of a device."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(_ModelOptions):
    """A conversation in the terminal. Greedy unless --temperature is given.

    /reset forgets the conversation, /exit or the end of the input ends it, Ctrl-C stops the current answer. When the
    input is no terminal, each line is a message and only the answers are printed.
    """

    system: str | None = None
    """A system message that starts the conversation."""


def load_engine(setup: ModelSetup, tokenizer: Tokenizer, *, slots: int, max_length: int, steps: int = 16) -> Engine:
    """Reads the weights, in the compute dtype, straight into their places."""
    return Engine(
        setup.decoder,
        setup.in_dtype(setup.compute_dtype).load(),
        slots=slots,
        max_length=max_length,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id or 0,
        dtype=setup.compute_dtype,
        mesh=setup.mesh,
        steps=steps,
    )


# ---- generate -------------------------------------------------------------------------------------------------------


def generate_file(options: GenerateOptions) -> None:
    """The command. Raises `UserErrors` with every bad row before the weights are read.

    Rows are written in order, each as soon as those before it are, so that little is lost when it is stopped.
    """
    sampling = options.sampling()
    if options.slots is not None and options.slots < 1:
        raise UserError(f"slots = {options.slots}: must be at least 1")
    _check_output(options)
    setup, tokenizer = options.setup(), options.tokenizer()
    limit = _length_limit(options.max_length, setup)
    reserved = ("completion", "completion_ids", "finish_reason", *(("logprobs",) if options.logprobs else ()))
    prompts = read_prompts(
        options.rows, tokenizer, vocab_size=setup.config.vocab_size, longest=limit - 1, reserved=reserved
    )
    needed = max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens
    max_length = min(-(-needed // LENGTH_STEP) * LENGTH_STEP, limit)
    slots = _slots(options.slots, setup, max_length, len(prompts))
    engine = load_engine(setup, tokenizer, slots=slots, max_length=max_length)
    completions = engine.generate(Request(i, prompt.ids, sampling) for i, prompt in enumerate(prompts))
    if jax.process_index() != 0:
        for _ in completions:  # takes part in the computation; process 0 writes
            pass
        return
    written = 0
    with _open_output(options) as out:
        try:
            for index, completion in _in_order(_with_progress(completions, len(prompts))):
                out.write(_line(prompts[index], completion, tokenizer, options.logprobs))
                out.flush()
                written += 1
        except KeyboardInterrupt:
            print(f"stopped: {written} of {len(prompts)} rows are written", file=sys.stderr)
            raise SystemExit(130) from None


def _check_output(options: GenerateOptions) -> None:
    if options.out == "-":
        return
    target = epath.Path(options.out)
    if target.is_dir():
        raise UserError(f"--out {options.out}: a directory; name a file in it")
    if target.exists() and not options.overwrite:
        raise UserError(f"--out {options.out}: the file exists; name another one, or replace it with --overwrite")


@contextmanager
def _open_output(options: GenerateOptions) -> Iterator[IO[str]]:
    if options.out == "-":
        yield sys.stdout
        return
    _check_output(options)  # again: reading the weights takes a while
    target = epath.Path(options.out)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be written: {error.strerror or error}") from error
    with file:
        yield file


def _length_limit(asked: int | None, setup: ModelSetup) -> int:
    own = setup.config.max_position_embeddings
    if asked is not None and not 2 <= asked <= own:
        raise UserError(f"max_length = {asked}: must be from 2 to {own}, the model's max_position_embeddings")
    return own if asked is None else asked


def _slots(asked: int | None, setup: ModelSetup, max_length: int, rows: int) -> int:
    """How many, no more than there are rows, and so that the mesh divides them."""
    config, shards = setup.config, row_shards(setup.mesh.shape)
    position = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * setup.compute_dtype.itemsize
    )
    fitting = max(1, CACHE_BYTES // (position * max_length)) * shards
    wanted = min(MOST_SLOTS, fitting) if asked is None else asked
    return -(-min(wanted, rows) // shards) * shards


def _in_order(completions: Iterator[Completion]) -> Iterator[tuple[int, Completion]]:
    """By id, from 0 on; each as soon as all before it have come."""
    waiting: dict[int, Completion] = {}
    following = 0
    for completion in completions:
        waiting[completion.id] = completion
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def _with_progress(completions: Iterator[Completion], total: int) -> Iterator[Completion]:
    """Rows done, tokens per second and time left, on standard error; a summary where that is no terminal."""
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    tokens = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, rate="")
        for completion in completions:
            tokens += len(completion.token_ids)
            elapsed = progress.tasks[0].elapsed or 0.0
            progress.update(task, advance=1, rate=f"{tokens / max(elapsed, 1e-9):,.0f} tokens/s")
            yield completion
        elapsed = progress.tasks[0].elapsed or 0.0
    print(f"{total} rows, {tokens:,} tokens in {elapsed:.1f} s", file=sys.stderr)


def _line(prompt: Prompt, completion: Completion, tokenizer: Tokenizer, logprobs: bool) -> str:
    row = {
        **prompt.columns,
        "completion": tokenizer.decode(_without_stop(completion.token_ids.tolist(), completion.finish_reason)),
        "completion_ids": completion.token_ids.tolist(),
        "finish_reason": completion.finish_reason,
    }
    if logprobs:
        row["logprobs"] = [float(x) for x in completion.logprobs]
    text = json.dumps(row, ensure_ascii=False, default=str)  # Parquet has dates and the like
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate in one of the row's own columns
        text = json.dumps(row, default=str)
    return text + "\n"


def _without_stop(ids: list[int], finish_reason: FinishReason | None) -> list[int]:
    return ids[:-1] if finish_reason == "stop" else ids


# ---- chat -----------------------------------------------------------------------------------------------------------


class Conversation:
    """A history, rendered anew for each answer as training renders it, template and all."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams, system: str | None = None):
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._turns = 0
        self.messages: list[dict[str, Any]] = list(self._start)
        self.cut_off = False
        """Whether the last answer ended for its length."""
        render_prompt(tokenizer, [*self._start, {"role": "user", "content": "Hello"}])  # or say at once what is wrong

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._start)

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer in pieces as they come; it ends early when `stopped()`. What was said becomes history.

        Raises `UserError`, and forgets the message, when the history leaves no room for an answer.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = render_prompt(self._tokenizer, asked)
        if len(prompt) >= self._engine.max_length:
            raise UserError(
                f"the conversation has grown to {len(prompt)} tokens, which leaves no room for an answer within "
                f"max_length = {self._engine.max_length}; /reset forgets it, --max_length allows more"
            )
        ids: list[int] = []
        said, whole, reason = "", "", None
        self._turns += 1
        for delta in self._engine.stream([Request(self._turns, prompt, self._sampling)]):
            ids += delta.token_ids.tolist()
            reason = delta.finish_reason
            whole = self._tokenizer.decode(_without_stop(ids, reason))
            # A character may need several tokens: its first ones decode to a replacement character.
            ready = whole if reason else whole.rstrip("\ufffd")
            if ready.startswith(said):
                yield ready[len(said) :]
                said = ready
            if stopped():
                break
        self.cut_off = reason == "length"
        if said or reason:
            self.messages = [*asked, {"role": "assistant", "content": whole if reason else said}]


def chat(options: ChatOptions) -> None:
    """The command."""
    sampling = options.sampling()
    setup, tokenizer = options.setup(), options.tokenizer()
    if jax.process_count() > 1:
        raise UserError("chat runs in one process; use generate for a model that needs several")
    limit = _length_limit(options.max_length, setup)
    max_length = min(limit, CHAT_LENGTH) if options.max_length is None else limit
    engine = load_engine(setup, tokenizer, slots=1, max_length=max_length, steps=CHAT_STEPS)
    conversation = Conversation(engine, tokenizer, sampling, options.system)
    interactive = sys.stdin.isatty()
    if interactive:
        print("/reset forgets the conversation, /exit ends it, Ctrl-C stops an answer.", file=sys.stderr)
    for line in _messages(interactive):
        word = line.strip()
        if word == "/exit":
            return
        if word == "/reset":
            conversation.reset()
        elif word.startswith("/") and len(word.split()) == 1:
            print(f"{word}: no such command; known are /reset and /exit", file=sys.stderr)
        elif word:
            try:
                _print_answer(conversation, line)
            except UserError as error:
                if not interactive:
                    raise
                print(error, file=sys.stderr)


def _messages(interactive: bool) -> Iterator[str]:
    """Lines until the input ends."""
    if not interactive:
        try:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not {error.encoding} text: {error.reason}") from error
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # editing and history for input(); some platforms lack it
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("  (/exit or Ctrl-D ends the chat)", file=sys.stderr)


def _print_answer(conversation: Conversation, text: str) -> None:
    with _interrupt() as interrupted:
        for piece in conversation.answer(text, interrupted.is_set):
            print(piece, end="", flush=True)
    print(flush=True)
    if interrupted.is_set():
        print("(stopped)", file=sys.stderr)
    elif conversation.cut_off:
        print("(cut off; --max_new_tokens or --max_length allow more)", file=sys.stderr)


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Meanwhile Ctrl-C sets the event instead of breaking off whatever runs."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread hears of signals
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
