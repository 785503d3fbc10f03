"""The tokenizer against `transformers` itself: ids, rendering and what is saved; and what it says to careless users."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from posttrain.data.tokenizer import RenderError, Tokenizer
from posttrain.errors import UserError

FIXTURE = Path(__file__).parent.parent / "fixtures" / "chat"
TEMPLATES = FIXTURE / "templates"
TEXTS = [
    "",
    "Paris",
    "  two  spaces\n\n\nand lines ",
    "Größe 你好 😀\u2028!",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<think>a",
]
CHAT = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A small model 😀."},
    {"role": "user", "content": " And the capital of France?\n"},
    {"role": "assistant", "content": "Paris."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(FIXTURE), chat_template="chatml")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model directory of which tests may change the files."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURE / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("special", [False, True])
def test_ids_are_those_of_transformers(tokenizer: Tokenizer, special: bool) -> None:
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    for text in TEXTS:
        expected = hf(text, add_special_tokens=special)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=special) == expected
    batch = tokenizer.encode_with_offsets(TEXTS, add_special_tokens=special)
    for text, (ids, offsets) in zip(TEXTS, batch, strict=True):
        reference = hf(text, add_special_tokens=special, return_offsets_mapping=True)
        assert ids.dtype == np.int32 and ids.tolist() == reference["input_ids"]
        assert offsets.shape == (len(ids), 2) and [tuple(o) for o in offsets] == reference["offset_mapping"]


def test_decode_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("<|im_start|>Hi .<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi ."


def test_identity(tokenizer: Tokenizer) -> None:
    content = json.loads((FIXTURE / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert tokenizer.vocab_size == max(max(content["model"]["vocab"].values()), *ids.values()) + 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (ids["<s>"], ids["<|im_end|>"], ids["<|im_end|>"])
    assert tokenizer.added_ids == frozenset(ids.values())


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
def test_rendering_is_that_of_transformers(name: str, prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = datetime(2024, 7, 26, 10, 11, 12, 131415)
    ours = Tokenizer.load(str(FIXTURE), chat_template=str(TEMPLATES / f"{name}.jinja"), clock=clock)
    hf = AutoTokenizer.from_pretrained(FIXTURE)
    hf.chat_template = (TEMPLATES / f"{name}.jinja").read_text()

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return clock

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    messages = CHAT if name == "instructions" else [{"role": "system", "content": "Be brief."}, *CHAT]
    expected = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ours.render(messages, add_generation_prompt=prompt) == expected


def test_rendering_drops_null_and_passes_arguments(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ mood }}{{ tools is none }}"
    (tmp_path / "t.jinja").write_text(template)
    tokenizer = Tokenizer.load(str(FIXTURE), chat_template=str(tmp_path / "t.jinja"))
    message = {"role": "user", "content": "<é>", "name": None}
    assert tokenizer.render([message], template_kwargs={"mood": "calm"}) == '{"role": "user", "content": "<é>"}calmTrue'


def test_the_clock_stands_still_and_counts_only_where_given() -> None:
    template = str(TEMPLATES / "date.jinja")
    running = Tokenizer.load(str(FIXTURE), chat_template=template)
    assert running.render(CHAT) == running.render(CHAT)  # microseconds are in it
    pinned = Tokenizer.load(str(FIXTURE), chat_template=template, clock=datetime(2024, 7, 26))
    assert "Today is 26 Jul 2024, 00:00:00.000000." in pinned.render(CHAT)
    later = Tokenizer.load(str(FIXTURE), chat_template=template)
    other = Tokenizer.load(str(FIXTURE), chat_template=template, clock=datetime(2024, 7, 27))
    assert later.clock > running.clock and later.fingerprint == running.fingerprint
    assert len({running.fingerprint, pinned.fingerprint, other.fingerprint}) == 3


def test_the_fingerprint_sees_template_eos_and_ids(model_dir: Path) -> None:
    def fingerprint(**options: str) -> str:
        return Tokenizer.load(str(model_dir), **options).fingerprint

    prints = [fingerprint(), fingerprint(chat_template="chatml"), fingerprint(eos_token="<|eot|>")]
    assert fingerprint() == prints[0]
    content = json.loads((model_dir / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (model_dir / "tokenizer.json").write_text(json.dumps(content))
    assert len({*prints, fingerprint()}) == 4


def test_a_template_that_fails_says_so(tmp_path: Path) -> None:
    for source in ("{{ raise_exception('no tools') }}", "{{ messages[9].content }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}"):
        (tmp_path / "t.jinja").write_text(source)
        tokenizer = Tokenizer.load(str(FIXTURE), chat_template=str(tmp_path / "t.jinja"))
        with pytest.raises(RenderError, match=r"the chat template refuses it: ."):
            tokenizer.render(CHAT)
    (tmp_path / "t.jinja").write_text("{{ ''.__class__ }}{{ messages.append(1) }}")
    with pytest.raises(RenderError):  # the sandbox holds
        Tokenizer.load(str(FIXTURE), chat_template=str(tmp_path / "t.jinja")).render(CHAT)
    (tmp_path / "t.jinja").write_text("\n{% if %}")
    with pytest.raises(UserError, match="line 2 is not valid Jinja"):
        Tokenizer.load(str(FIXTURE), chat_template=str(tmp_path / "t.jinja")).render(CHAT)


def test_no_template_is_an_error_only_when_one_is_needed() -> None:
    tokenizer = Tokenizer.load(str(FIXTURE))
    assert tokenizer.encode("Paris") and tokenizer.stop_ids == (tokenizer.eos_id,)
    with pytest.raises(UserError, match=r"no chat template.*tokenizer\.chat_template.*chatml"):
        tokenizer.render(CHAT)


# ---- stop tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "eos_ids", "stops"),
    [
        ("chatml", None, ["<|im_end|>"]),
        (str(TEMPLATES / "trims_content.jinja"), None, ["<|im_end|>", "<|eot|>"]),
        ("chatml", [459, 458], ["<|im_end|>", 459, 458]),
        ("chatml", 458, ["<|im_end|>", 458]),
        (str(TEMPLATES / "no_stop.jinja"), None, ["<|im_end|>"]),
    ],
)
def test_stop_ids(model_dir: Path, template: str, eos_ids: object, stops: list[str | int]) -> None:
    if eos_ids is not None:
        (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids}))
    tokenizer = Tokenizer.load(str(model_dir), chat_template=template)
    content = json.loads((FIXTURE / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert tokenizer.stop_ids == tuple(ids[stop] if isinstance(stop, str) else stop for stop in stops)


def test_the_first_token_that_ends_generation_closes_a_turn(model_dir: Path) -> None:
    template = str(TEMPLATES / "two_stops.jinja")
    text = "<|assistant|>\nHi<|end|>\n<|im_end|>"
    tokenizer = Tokenizer.load(str(model_dir), chat_template=template)
    assert tokenizer.stop_at_end(text) == (text.index("<|im_end|>"), tokenizer.eos_id)
    end = tokenizer.encode("<|end|>")[0]
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, tokenizer.eos_id]}))
    tokenizer = Tokenizer.load(str(model_dir), chat_template=template)
    assert tokenizer.stop_at_end(text) == (text.index("<|end|>"), end)
    assert tokenizer.stop_at_end(text, text.index("<|im_end|>")) == (text.index("<|im_end|>"), tokenizer.eos_id)
    assert tokenizer.stop_at_end("<|end|>x") is None


# ---- loading and saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_token", [None, "<|eot|>"])
def test_saved_files_load_in_transformers(tmp_path: Path, eos_token: str | None) -> None:
    template = str(TEMPLATES / "default_system.jinja")
    tokenizer = Tokenizer.load(str(FIXTURE), chat_template=template, eos_token=eos_token)
    tokenizer.save(tmp_path / "out")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    hf = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert hf.eos_token == (eos_token or "<|im_end|>") and hf.pad_token == "<|im_end|>"
    rendered = hf.apply_chat_template(CHAT, tokenize=False)
    assert rendered == tokenizer.render(CHAT)
    for text in [*TEXTS, rendered]:
        assert hf(text)["input_ids"] == tokenizer.encode(text, add_special_tokens=True)
    # Transformers 4 knows this name, 5 still does.
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    again = Tokenizer.load(str(tmp_path / "out"))
    assert again.fingerprint == tokenizer.fingerprint
    again.save(tmp_path / "twice")
    for name in names:
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_extra_special_tokens_survive_saving(model_dir: Path) -> None:
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = ["<|im_start|>", "<|eot|>"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.load(str(model_dir)).save(model_dir / "out")
    hf = AutoTokenizer.from_pretrained(model_dir / "out")
    assert set(hf.all_special_tokens) >= {"<|im_start|>", "<|eot|>", "<s>"}
    assert "extra_special_tokens" not in json.loads((model_dir / "out" / "tokenizer_config.json").read_text())


def test_limits_in_the_file_cut_nothing(model_dir: Path) -> None:
    content = json.loads((model_dir / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (model_dir / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(str(model_dir))
    for text in ("Paris is the capital of France", "a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_eos_token_of_the_plain_vocabulary_is_cut_out(model_dir: Path) -> None:
    tokenizer = Tokenizer.load(str(model_dir), eos_token="Ġcapital")
    assert tokenizer.eos_id == json.loads((model_dir / "tokenizer.json").read_text())["model"]["vocab"]["Ġcapital"]
    assert tokenizer.encode("xĠcapitaly")[1] == tokenizer.eos_id


def test_a_remote_directory_is_read(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [7]}')
    buckets = SimpleNamespace(Path=lambda path: Path(path.replace("gs://bucket", str(model_dir))))
    monkeypatch.setattr("posttrain.data.tokenizer_files.epath", buckets)
    tokenizer = Tokenizer.load("gs://bucket/.")
    assert tokenizer.fingerprint == Tokenizer.load(str(FIXTURE)).fingerprint and tokenizer.stop_ids[1:] == (7,)
    with pytest.raises(UserError, match="gs://bucket/no: no tokenizer in this directory"):
        Tokenizer.load("gs://bucket/no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "no/such/dir"}, "no such directory, and not a hub id"),
        ({"path": "/no/such"}, "no such directory, and not a hub id"),
        ({"path": str(FIXTURE / "tokenizer.json")}, "a file, not a model directory"),
        ({"path": "gz://bucket/model"}, "gz://bucket/model: cannot be read"),
        ({"chat_template": "gz://bucket/t.jinja"}, "neither a readable file nor a built-in template"),
        ({"chat_template": "{{ messages }}"}, "neither a readable file nor a built-in template"),
        ({"chat_template": "chatlm"}, r"'chatlm' is neither a readable file nor a built-in template \(chatml, "),
        ({"eos_token": "<|im_stop|>"}, r"'<\|im_stop\|>' is no token.*near: .*<\|im_start\|>"),
    ],
)
def test_careless_arguments(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer.load(**{"path": str(FIXTURE), **change})


def test_careless_directories(model_dir: Path) -> None:
    def refused(message: str, **options: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            Tokenizer.load(str(model_dir), **options)
        assert str(model_dir) in str(caught.value) or "tokenizer." in str(caught.value)

    (model_dir / "generation_config.json").write_text("[1]")
    refused("generation_config.json is no JSON object")
    (model_dir / "generation_config.json").unlink()
    whole = (model_dir / "tokenizer.json").read_bytes()
    (model_dir / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    refused("incomplete or no JSON object; fix: copy it again")
    (model_dir / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("Git LFS pointer")
    (model_dir / "tokenizer.json").unlink()
    refused("tokenizer.json is missing")
    content = json.loads(whole)
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<|im_")]
    (model_dir / "tokenizer.json").write_text(json.dumps(content))
    (model_dir / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refused("'chatml' writes .*which .* does not have as special tokens", chat_template="chatml")


def test_an_unknown_hub_id_offline() -> None:
    with pytest.raises(UserError, match="somebody/some-model: the tokenizer cannot be loaded"):
        Tokenizer.load("somebody/some-model")


def test_loading_prints_nothing() -> None:
    code = f"from posttrain.data.tokenizer import Tokenizer; Tokenizer.load({str(FIXTURE)!r}, chat_template='chatml')"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("", "")
