"""The built-in chat templates against texts written by hand, against `transformers` and, where there are some, against
the models' own templates; and what is said where a tokenizer lacks their tokens."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from posttrain.config import Config
from posttrain.data.builtin_templates import BUILTIN_TEMPLATES, fitting_template
from posttrain.data.chat import encode_rows, template_marks
from posttrain.data.rows import Row
from posttrain.data.template import RenderError
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError

FIXTURE = Path(__file__).parent.parent / "fixtures" / "chat"
SYSTEM = {"role": "system", "content": " Be brief.\n"}
USER = {"role": "user", "content": " Who are you? "}
ANSWER = {"role": "assistant", "content": "A model.\n"}
AGAIN = {"role": "user", "content": "And\n\nthen?"}
LAST = {"role": "assistant", "content": " 'Nothing' <b>."}
CHAT = [SYSTEM, USER, ANSWER, AGAIN, LAST]

EXPECTED = {
    "chatml": (
        "<|im_start|>system\n Be brief.\n<|im_end|>\n<|im_start|>user\n Who are you? <|im_end|>\n"
        "<|im_start|>assistant\n{A model.\n<|im_end|>}\n<|im_start|>user\nAnd\n\nthen?<|im_end|>\n"
        "<|im_start|>assistant\n{ 'Nothing' <b>.<|im_end|>}\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\n Be brief.\n\n\nWho are you?<end_of_turn>\n"
        "<start_of_turn>model\n{A model.<end_of_turn>}\n<start_of_turn>user\nAnd\n\nthen?<end_of_turn>\n"
        "<start_of_turn>model\n{'Nothing' <b>.<end_of_turn>}\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{A model.<|eot_id|>}"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd\n\nthen?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{'Nothing' <b>.<|eot_id|>}"
    ),
    "minimal": (
        "<s><START> Be brief.\n<USER> Who are you? <ASSISTANT>{A model.\n<END>}"
        "<USER>And\n\nthen?<ASSISTANT>{ 'Nothing' <b>.<END>}"
    ),
}
"""`CHAT` with the trained stretches in braces; `<s>` is the tokenizer's BOS."""

WITHOUT_SYSTEM = {
    "chatml": "<|im_start|>user\n Who are you? <|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n",
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "minimal": "<s><START><USER> Who are you? <ASSISTANT>",
}

REAL = {"chatml": ("qwen2_5",), "gemma": ("gemma", "gemma3"), "llama3": ("llama3",)}
"""Templates of TRL's package that mean the same where there are no tools."""


def load(name: str) -> Tokenizer:
    template = BUILTIN_TEMPLATES[name]
    return Tokenizer.load(str(FIXTURE), add_special_tokens=template.tokens, chat_template=name, eos_token=template.stop)


def test_every_file_is_a_built_in_template_and_has_its_expectation_here() -> None:
    files = {path.stem for path in (Path(__file__).parents[2] / "posttrain" / "data" / "templates").glob("*")}
    assert files == BUILTIN_TEMPLATES.keys() == EXPECTED.keys() == WITHOUT_SYSTEM.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_rendering_is_as_written_by_hand_and_as_in_transformers(name: str, tmp_path: Path) -> None:
    tokenizer = load(name)
    tokenizer.save(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    text = EXPECTED[name].replace("{", "").replace("}", "")
    assert tokenizer.render(CHAT) == hf.apply_chat_template(CHAT, tokenize=False) == text
    prompt = tokenizer.render([USER], add_generation_prompt=True)
    assert prompt == hf.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == WITHOUT_SYSTEM[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_masks_of_ours_of_transformers_and_by_hand_agree(name: str, tmp_path: Path) -> None:
    tokenizer = load(name)
    tokenizer.save(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    expected_ids: list[int] = []
    expected_mask: list[int] = []
    # The special tokens at the borders keep the pieces apart.
    for i, piece in enumerate(part for half in EXPECTED[name].split("{") for part in half.split("}")):
        ids = hf(piece, add_special_tokens=False)["input_ids"]
        expected_ids += ids
        expected_mask += [i % 2] * len(ids)
    theirs = hf.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert (theirs["input_ids"], theirs["assistant_masks"]) == (expected_ids, expected_mask)
    row = Row("chats.jsonl", 1, "messages", messages=tuple(CHAT))
    ((sample,),) = encode_rows([row], tokenizer, ("assistant",))
    assert sample.tokens.tolist() == expected_ids
    assert sample.loss_weights.tolist() == expected_mask
    marks = template_marks(row, tokenizer)
    assert marks is not None and marks[1].tolist() == [bool(m) for m in expected_mask]
    assert tokenizer.stop_ids == (hf.convert_tokens_to_ids(BUILTIN_TEMPLATES[name].stop),)


def call(name: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name}}]}


@pytest.mark.parametrize(
    ("name", "messages", "said"),
    [
        *((name, [USER, call("f")], f"the built-in {name} template has no form for tool_calls") for name in EXPECTED),
        ("gemma", [SYSTEM], "a system message is part of the user turn behind it"),
        ("gemma", [USER, AGAIN], "turns must go user, assistant, user.*role user"),
        ("gemma", [ANSWER], "turns must go user, assistant, user.*role assistant"),
        ("gemma", [USER, SYSTEM], "turns must go user, assistant, user.*role system"),
        ("minimal", [USER, SYSTEM], "one system message first.*this one is system"),
        ("minimal", [USER, {"role": "tool", "content": "4"}], "one system message first.*this one is tool"),
    ],
)
def test_what_a_template_has_no_form_for_is_refused(name: str, messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(RenderError, match=said):
        load(name).render(messages)


@pytest.mark.parametrize("name", EXPECTED)
def test_tools_are_refused(name: str) -> None:
    with pytest.raises(RenderError, match="no form for tools"):
        load(name).render([USER], tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_any_role_has_its_header(name: str) -> None:
    text = load(name).render([{"role": "developer", "content": "Rules."}, USER, {"role": "tool", "content": "4"}])
    assert [role for role in ("developer", "user", "tool") if f">{role}" in text] == ["developer", "user", "tool"]


# ---- tokenizers that lack the tokens --------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """The fixture's tokenizer without any special token, but for what a test adds."""
    content = json.loads((FIXTURE / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [], "post_processor": None}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(tmp_path)


def section(error: UserError) -> dict[str, Any]:
    """The config lines that an error asks for, checked by the config itself."""
    lines = yaml.safe_load(str(error).split("  ")[-1])
    return Config.model_validate(lines).tokenizer.model_dump(exclude_unset=True)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_lacking_token_is_an_error_whose_lines_are_the_fix(name: str, bare: str) -> None:
    template = BUILTIN_TEMPLATES[name]
    with pytest.raises(UserError, match=f"tokenizer.chat_template: '{name}' writes .* does not have") as caught:
        Tokenizer.load(bare, chat_template=name, add_special_tokens=("<mine>", template.tokens[0]))
    fix = section(caught.value)
    missing = template.tokens[1:]
    assert fix["add_special_tokens"] == ("<mine>", *template.tokens) and fix["eos_token"] == template.stop
    assert all(repr(token)[1:-1] in str(caught.value).split("writes")[1].split("which")[0] for token in missing)
    tokenizer = Tokenizer.load(bare, **fix)
    assert tokenizer.render(CHAT) == EXPECTED[name].replace("<s>", "").replace("{", "").replace("}", "")


def test_without_a_template_the_error_has_the_lines_of_one_that_suits_the_vocabulary(bare: str) -> None:
    with pytest.raises(UserError, match=r"no chat template.*tokenizer\.chat_template.*chatml.*llama3") as caught:
        Tokenizer.load(bare).render([USER])
    fix = section(caught.value)
    assert fix == {
        "chat_template": "minimal",
        "add_special_tokens": BUILTIN_TEMPLATES["minimal"].tokens,
        "eos_token": "<END>",
    }
    assert (
        Tokenizer.load(bare, **fix).render([USER, LAST]) == "<START><USER> Who are you? <ASSISTANT> 'Nothing' <b>.<END>"
    )
    with pytest.raises(UserError) as caught:
        Tokenizer.load(bare, add_special_tokens=BUILTIN_TEMPLATES["llama3"].tokens).render([USER])
    assert section(caught.value) == {"chat_template": "llama3", "eos_token": "<|eot_id|>"}


def test_the_template_that_fits() -> None:
    for name, template in BUILTIN_TEMPLATES.items():
        assert fitting_template([*template.tokens, "<x>"]) == name
    assert fitting_template(["<|im_start|>", "<|eot_id|>"]) == "minimal"


# ---- the models' own templates --------------------------------------------------------------------------------------


@pytest.mark.acceptance
@pytest.mark.parametrize(("name", "real"), [(name, real) for name, reals in REAL.items() for real in reals])
def test_chats_without_tools_render_as_the_real_template_does(name: str, real: str) -> None:
    folder = Path(os.environ.get("POSTTRAIN_TEMPLATES") or "/nonexistent") / "trl"
    if not folder.is_dir():
        pytest.skip("POSTTRAIN_TEMPLATES names no folder with a folder trl, the chat_templates of its wheel")
    file = folder / f"{real}.jinja"
    ours = load(name)
    theirs = Tokenizer.load(str(FIXTURE), add_special_tokens=BUILTIN_TEMPLATES[name].tokens, chat_template=str(file))
    # Gemma 1 and 2 have no system role; Qwen writes a system message of its own where there is none.
    chats = [CHAT[1:], [USER]] if real == "gemma" else [CHAT, CHAT[:2], CHAT[:4]]
    chats += [CHAT[1:], [USER]] if real in ("gemma3", "llama3") else []
    for messages in chats:
        for prompt in (False, True):
            expected = theirs.render(messages, add_generation_prompt=prompt)
            assert ours.render(messages, add_generation_prompt=prompt) == expected
