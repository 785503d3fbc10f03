"""`generate` and `chat` end to end on a tiny model directory; answers against greedy search without a cache."""

import io
import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from tokenizers import Tokenizer as Backend

from posttrain.config import MeshConfig
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.generate import ChatOptions, Conversation, GenerateOptions, _interrupt, _slots, chat, generate_file
from posttrain.models import hf
from posttrain.models.decoder import ComputeOptions, DecoderConfig, abstract_decoder, init_params
from posttrain.parallel.mesh import make_mesh
from posttrain.records import Batch
from posttrain.rollout.engine import Delta, Engine, Request
from posttrain.rollout.sampling import SamplingParams
from posttrain.train.setup import ModelSetup

FIXTURE = Path(__file__).parent / "fixtures" / "chat"
TOKENIZER = Tokenizer.load(str(FIXTURE), chat_template="chatml")
BACKEND = Backend.from_file(str(FIXTURE / "tokenizer.json"))
STOP = BACKEND.token_to_id("<|im_end|>")
CONFIG = DecoderConfig(TOKENIZER.vocab_size, 32, 48, 2, 4, 2, 8, max_position_embeddings=128)
DECODER = abstract_decoder(CONFIG, options=ComputeOptions("reference"))
PARAMS = jax.tree.map(
    lambda p: p * 8 if p.ndim > 2 else p, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    raw = hf.find_family("llama").config_to_hf(CONFIG, None)
    hf.export_hf(PARAMS, CONFIG, directory, raw_config=raw, tokenizer=TOKENIZER)
    return str(directory)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"id": "ü", "prompt": "The capital of France", "n": [1, None]},
                {"messages": [{"role": "user", "content": "Who are you?"}]},
                {"input_ids": [60, 61, 62, 63]},
                {"prompt": "1 2 3"},
                {"prompt": [{"role": "user", "content": "你好"}]},
            )
        )
    )
    return str(path)


def read(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@jax.jit
def next_logits(tokens: jax.Array, length: jax.Array) -> jax.Array:
    index = jnp.arange(tokens.shape[1])[None]
    batch = Batch(tokens, (index < length).astype(jnp.int32), index, jnp.zeros(tokens.shape, jnp.float32))
    model = DECODER.merge(PARAMS)
    return model.hidden(batch)[0, length - 1] @ model.head()[: CONFIG.vocab_size].T


def greedy(prompt: list[int], count: int) -> list[int]:
    """One full forward pass for each token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(next_logits(padded, len(tokens)))))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


def ids(text: str) -> list[int]:
    return BACKEND.encode(text, add_special_tokens=False).ids


PROMPTS = [
    [BACKEND.token_to_id("<s>"), *ids("The capital of France")],
    ids("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"),
    [60, 61, 62, 63],
    [BACKEND.token_to_id("<s>"), *ids("1 2 3")],
    ids("<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"),
]


def test_a_file_is_answered_in_order_with_its_own_columns(model: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    generate_file(GenerateOptions(model=model, rows=rows, out=str(out), max_new_tokens=9, logprobs=True, slots=2))
    for row, source, prompt in zip(read(out), read(rows), PROMPTS, strict=True):
        expected = greedy(prompt, 9)
        stopped = expected[-1] == STOP
        assert {key: row[key] for key in source} == source
        assert row["completion_ids"] == expected
        assert row["completion"] == BACKEND.decode(expected[: len(expected) - stopped], skip_special_tokens=False)
        assert row["finish_reason"] == ("stop" if stopped else "length")
        assert len(row["logprobs"]) == len(expected) and all(-20 < x < 0 for x in row["logprobs"])
        assert set(row) == {*source, "completion", "completion_ids", "finish_reason", "logprobs"}


def test_standard_output_has_nothing_but_the_rows(model: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate_file(GenerateOptions(model=model, rows=rows, max_new_tokens=3))
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [len(line["completion_ids"]) for line in lines] == [len(greedy(p, 3)) for p in PROMPTS]
    assert "logprobs" not in lines[0]
    assert "5 rows" in printed.err


def test_sampled_answers_do_not_depend_on_slots(model: str, rows: str, tmp_path: Path) -> None:
    written = []
    for name, slots in (("a", 1), ("b", None)):
        how = {"temperature": 1.2, "top_p": 0.9, "seed": 3, "max_new_tokens": 12, "slots": slots}
        generate_file(GenerateOptions(model=model, rows=rows, out=str(tmp_path / name), **how))
        written.append((tmp_path / name).read_text())
    assert written[0] == written[1]
    assert len({row["completion"] for row in read(tmp_path / "a")}) == 5


def test_nothing_is_written_over_unasked(model: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    options = {"model": model, "rows": rows, "out": str(out), "max_new_tokens": 2}
    with pytest.raises(UserError, match="the file exists; name another one, or replace it with --overwrite"):
        generate_file(GenerateOptions(**options))
    assert out.read_text() == "precious"
    generate_file(GenerateOptions(**options, overwrite=True))
    assert len(read(out)) == 5
    with pytest.raises(UserError, match="a directory"):
        generate_file(GenerateOptions(**options | {"out": str(tmp_path)}))
    with pytest.raises(UserError, match="cannot be written"):
        generate_file(GenerateOptions(**options | {"out": str(out / "below")}))


def test_what_was_answered_stays_when_it_is_stopped(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while row 3 is missing: rows 0 to 2 are there, 4 waits for it."""
    whole = Engine.generate

    def stopped(self: Engine, requests: Any) -> Iterator[Any]:
        done = {c.id: c for c in whole(self, requests)}
        yield from (done[i] for i in (1, 0, 4, 2))
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", stopped)
    with pytest.raises(SystemExit) as exit:
        generate_file(GenerateOptions(model=model, rows=rows, out=str(tmp_path / "out"), max_new_tokens=4))
    assert exit.value.code == 130
    assert [row["completion_ids"] for row in read(tmp_path / "out")] == [greedy(p, 4) for p in PROMPTS[:3]]


def test_wrong_input_is_told_before_the_weights_are_read(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "load_params", lambda *_: pytest.fail("weights were read"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"prompt": ""}\n{"prompt": "fine", "finish_reason": 1}\n')
    out = str(tmp_path / "out")
    with pytest.raises(UserErrors) as error:
        generate_file(GenerateOptions(model=model, rows=str(bad), out=out))
    assert error.value.problems == (
        f"{bad}:3: finish_reason: the answer is written under this name; fix: rename the column",
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1.0, "top_p": 2.0}, "2 problems"),
        ({"slots": 0}, "slots = 0"),
        ({"max_length": 129}, "max_length = 129: must be from 2 to 128"),
        ({"max_length": 10}, r"rows.jsonl:2: messages: has \d+ tokens, and at most 9 leave room"),
        ({"rows": "none.jsonl"}, "none.jsonl: no such file"),
        ({"chat_template": "nowhere.jinja"}, "nowhere.jinja"),
    ]
    for wrong, message in cases:
        with pytest.raises(UserError, match=message):
            generate_file(GenerateOptions(**{"model": model, "rows": rows, "out": out} | wrong))
    assert not Path(out).exists()


def test_slots_fit_the_rows_the_mesh_and_the_memory() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = DecoderConfig(100, 64, 64, 16, 4, 4, 64)
    setup = ModelSetup(Path(), config, {}, abstract_decoder(config), mesh, {}, np.dtype(np.float32))
    assert _slots(None, setup, 256, 1000) == 32
    assert _slots(None, setup, 256, 5) == 8  # rounded up to a multiple of data x fsdp
    assert _slots(6, setup, 256, 1000) == 8
    # A position takes 2 x 16 layers x 4 heads x 64 x 4 bytes = 32 KiB: 2^15 of them make 1 GiB, so two slots a device.
    assert _slots(None, setup, 2**15, 1000) == 2 * 4
    assert _slots(None, setup, 2**20, 1000) == 4


def test_options_are_flags() -> None:
    line = "M r.jsonl --temperature 0.7 --max_new_tokens 64 --out o.jsonl --logprobs --mesh.fsdp 2"
    options = tyro.cli(GenerateOptions, args=line.split(), config=(tyro.conf.FlagCreatePairsOff,))
    expected = GenerateOptions(
        model="M",
        rows="r.jsonl",
        temperature=0.7,
        max_new_tokens=64,
        out="o.jsonl",
        logprobs=True,
        mesh=MeshConfig(fsdp=2),
    )
    assert options == expected
    assert tyro.cli(ChatOptions, args=["M", "--system", "Be short."]) == ChatOptions(model="M", system="Be short.")


class ScriptedEngine(Engine):
    """Answers with given texts, one token at a time, and remembers what it was asked."""

    def __init__(self, *answers: str):
        self.max_length = 100
        self.answers = list(answers)
        self.prompts: list[str] = []

    def stream(self, requests: Iterable[Request]) -> Iterator[Delta]:
        (request,) = requests
        self.prompts.append(BACKEND.decode(list(request.prompt), skip_special_tokens=False))
        tokens = ids(self.answers.pop(0))
        for i, token in enumerate(tokens):
            reason = None if i + 1 < len(tokens) else "stop" if token == STOP else "length"
            nothing = np.zeros(1, np.float32)
            yield Delta(request.id, np.asarray([token], np.int32), nothing, nothing, reason)


def conversation(*answers: str, system: str | None = None) -> tuple[Conversation, ScriptedEngine]:
    engine = ScriptedEngine(*answers)
    return Conversation(engine, TOKENIZER, SamplingParams(), system), engine


def test_an_answer_comes_in_whole_characters() -> None:
    text = "Größe, 你好 🙂 日本語."
    talk, _ = conversation(text + "<|im_end|>")
    assert len(ids("🙂")) > 1
    pieces = list(talk.answer("?"))
    assert "".join(pieces) == text
    assert len(pieces) > 5 and "\ufffd" not in "".join(pieces)
    assert not talk.cut_off


def test_history_is_rendered_as_training_renders_it() -> None:
    talk, engine = conversation("One.<|im_end|>", "Two", "Three.<|im_end|>", system="Be short.")
    assert "".join(talk.answer("First?")) == "One."
    assert "".join(talk.answer("Second?")) == "Two"
    assert talk.cut_off
    start = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n"
    first = start + "First?<|im_end|>\n<|im_start|>assistant\n"
    assert engine.prompts == [
        first,
        first + "One.<|im_end|>\n<|im_start|>user\nSecond?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert talk.messages[-1] == {"role": "assistant", "content": "Two"}
    talk.reset()
    list(talk.answer("Third?"))
    assert engine.prompts[2] == start + "Third?<|im_end|>\n<|im_start|>assistant\n"


def test_a_stopped_answer_is_kept_as_far_as_it_was_shown() -> None:
    talk, _ = conversation("The capital of France<|im_end|>", "Yes.<|im_end|>")
    shown: list[str] = []
    for piece in talk.answer("?", lambda: len(shown) == 2):
        shown.append(piece)
    assert talk.messages == [{"role": "user", "content": "?"}, {"role": "assistant", "content": "".join(shown)}]
    assert 0 < len("".join(shown)) < len("The capital of France")


def test_a_message_without_room_is_forgotten() -> None:
    talk, engine = conversation("Yes.<|im_end|>")
    list(talk.answer("Hi"))
    before = list(talk.messages)
    with pytest.raises(UserError, match=r"grown to \d+ tokens.* max_length = 100; /reset"):
        list(talk.answer("long " * 100))
    assert talk.messages == before and len(engine.prompts) == 1


def test_a_template_without_system_role_says_so_at_once() -> None:
    template = str(FIXTURE / "templates" / "only_user_and_assistant.jinja")
    tokenizer = Tokenizer.load(str(FIXTURE), chat_template=template)
    with pytest.raises(UserError, match="leaves out system messages"):
        Conversation(ScriptedEngine(), tokenizer, SamplingParams(), "Be short.")


def test_a_chat_can_be_scripted(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers only on standard output, equal to greedy search on the rendered history; the input's end ends it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n\n/what\nAnd?\r\n/reset\nWho are you?\n"))
    chat(ChatOptions(model=model, max_new_tokens=6))
    printed = capsys.readouterr()
    first = greedy(PROMPTS[1], 6)
    assert STOP not in first
    said = BACKEND.decode(first, skip_special_tokens=False)
    history = f"<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
    second = greedy(ids(history + "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"), 6)
    assert printed.out == "".join(BACKEND.decode(t, skip_special_tokens=False) + "\n" for t in (first, second, first))
    assert "/what: no such command; known are /reset and /exit" in printed.err
    assert "cut off" in printed.err


def test_exit_ends_a_chat(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\nWho are you?\n"))
    chat(ChatOptions(model=model, max_new_tokens=6))
    assert capsys.readouterr().out == ""


def test_ctrl_c_sets_a_flag_while_an_answer_comes() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _interrupt() as interrupted:
        assert not interrupted.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(5)
    assert signal.getsignal(signal.SIGINT) is before
