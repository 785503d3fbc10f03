"""`posttrain score`: every kind of row, whole, in order; and what is told beside the scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config import MeshConfig, ModelConfig
from posttrain.data.chat import Sample
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import UserError, UserErrors
from posttrain.experiment import setup_model
from posttrain.logprobs import read_samples
from posttrain.models import hf
from posttrain.score import ScoreOptions, encode_answers, sample_scores, score
from tests.tiny import TOKENIZER, write_model

FIXTURES = Path(__file__).parent / "fixtures" / "reward"
CHATML = Tokenizer.load(str(TOKENIZER), chat_template="chatml")
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "No."}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path: str) -> list[list[str]]:
    found = read_samples(path, CHATML.vocab_size, lambda rows: encode_answers(rows, CHATML))
    return [[CHATML.decode(sample.tokens.tolist()) for sample in of_row] for of_row in found]


def test_every_kind_of_row_whole_and_in_order(tmp_path: Path) -> None:
    bos, eos = "<s>", "<|im_end|>"
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"text": "Hello there"},
        {"prompt": "Hi ", "completion": "there"},
        {"prompt": [USER], "completion": [OTHER], "label": False},
        {"input_ids": CHATML.encode("Hello")},
        {"messages": [USER, ANSWER | {"train": False}, USER]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
    )

    def chat(*messages: Any) -> str:
        return CHATML.render(list(messages))

    assert texts(path) == [
        [chat(USER, ANSWER)],
        [chat(USER, ANSWER), chat(USER, OTHER)],
        [bos + "Hello there" + eos],
        [bos + "Hi there" + eos],
        [chat(USER, OTHER)],
        ["Hello"],
        [chat(USER, ANSWER, USER)],
        [chat(USER, ANSWER), chat(USER, ANSWER)],
    ]


def test_bad_rows_are_told_all_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"x": 1}, {"text": "fine"}, {"input_ids": [-1]}, {"prompt": [USER]})
    with pytest.raises(UserErrors) as caught:
        texts(path)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{path}:{i}" for i in (1, 3, 4)]


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1, data=8), MeshConfig(fsdp=4, tensor=2)])
@pytest.mark.parametrize("packed", [False, True])
def test_scores_are_torchs_in_the_order_of_the_rows(packed: bool, mesh: MeshConfig) -> None:
    expected = np.load(FIXTURES / "untied" / "expected.npz")
    setup = ScoreOptions(model=str(FIXTURES / "untied"), rows="", mesh=mesh).setup("score")
    samples = [
        Sample(ids[:n], np.zeros(n, np.float32), "rows.jsonl", 1)
        for ids, n in zip(expected["ids"], expected["lengths"], strict=True)
    ]
    found = sample_scores(setup, samples, packed=packed, row_length=64)
    np.testing.assert_allclose(found, expected["right"], atol=2e-5, rtol=0)


def test_lines_accuracy_and_padding_are_told(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(path=str(write_model(tmp_path / "model")))
    setup = setup_model(model, MeshConfig(fsdp=1, data=8), head="score")
    tokenizer, reward = Tokenizer.load(model.path), tmp_path / "reward"
    hf.export_hf(setup.load(), setup.config, reward, raw_config=setup.raw_config, tokenizer=tokenizer)
    pad = json.loads((reward / "config.json").read_text())["pad_token_id"]
    monkeypatch.setattr("posttrain.score.sample_scores", lambda *_, **__: [0.5, 2.0, 1.0, 1.0, 1.0, 0.0, 3.0, -4.0])
    pair = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}
    rows = write(tmp_path / "rows.jsonl", {"input_ids": [5, pad]}, *([pair] * 3), {"input_ids": [pad, 5]})
    out = tmp_path / "out" / "scores.jsonl"
    score(ScoreOptions(model=str(reward), rows=rows, out=str(out), mesh=MeshConfig(fsdp=1, data=8)))
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"score": 0.5},
        {"score_chosen": 2.0, "score_rejected": 1.0},
        {"score_chosen": 1.0, "score_rejected": 1.0},
        {"score_chosen": 0.0, "score_rejected": 3.0},
        {"score": -4.0},
    ]
    told = capsys.readouterr().err
    # One of three: sqrt(1/3 * 2/3 / 3) = 0.2722.
    assert "accuracy 0.3333, standard error 0.2722, of 3 pairs; 1 of them have equal scores" in told
    assert f"1 of 8 texts end with the token {pad}, the pad_token_id of config.json" in told
    with pytest.raises(UserError, match="the file exists"):
        score(ScoreOptions(model=str(reward), rows=rows, out=str(out), mesh=MeshConfig(fsdp=1, data=8)))
