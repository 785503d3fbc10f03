"""The page as a file: one that loads nothing and runs nothing but its own script, whatever the data; small enough."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data import inspect_page
from posttrain.data.inspect import Inspection, InspectOptions
from posttrain.data.inspect_page import page_html, write_page
from posttrain.errors import UserError
from tests.data.inspect_cases import HOSTILE, inspected


class Page(HTMLParser):
    """The elements of a page with their attributes and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=False)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.open = True
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open = True

    def handle_endtag(self, tag: str) -> None:
        self.open = False

    def handle_data(self, data: str) -> None:
        number = len(self.elements) - 1
        self.texts[number] = self.texts.get(number, "") + (data if self.open else "")

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(a, self.texts.get(i, "")) for i, (name, a) in enumerate(self.elements) if name == tag]


def data_of(page: Page) -> dict[str, Any]:
    (text,) = [text for attributes, text in page.all("script") if attributes.get("id") == "data"]
    return json.loads(text)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def inspection(directory: Path) -> Inspection:
    return inspected(directory, InspectOptions(samples=200))


@pytest.fixture(scope="module")
def page(inspection: Inspection) -> Page:
    return Page(page_html(inspection, name="</title><script>alert(1)</script>"))


def test_hostile_text_makes_no_element(inspection: Inspection, page: Page) -> None:
    plain = Page(page_html(replace(inspection, samples=(), rejects=(), packed=()), name="run"))
    assert [element for element in page.elements if element[0] != "meta"] == [
        element for element in plain.elements if element[0] != "meta"
    ]
    assert len(page.all("script")) == 2 and not page.all("img")


def test_loads_and_runs_nothing_else(page: Page) -> None:
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("style", "src") for name in attributes), tag
        assert attributes.get("href", "#") in ("data:,", "#samples", "#")
    (policy,) = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    script = next(text for attributes, text in page.all("script") if not attributes)
    for name, text in (("script-src", script), ("style-src", page.all("style")[0][1])):
        assert directives[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for outside in ("http:", "https:", "//cdn", "@import", "url("):
        assert outside not in script.replace("http://www.w3.org/2000/svg", "") + page.all("style")[0][1]
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "eval(" not in script


def test_data_is_complete(inspection: Inspection, page: Page) -> None:
    data = data_of(page)
    samples = [sample for sample in data["samples"] if "rejected" not in sample["flags"]]
    assert len(samples) == len(inspection.samples) and len(data["samples"]) - len(samples) == 4
    for shown, sample in zip(samples, inspection.samples, strict=True):
        (part,) = shown["parts"]
        pieces = [data["pieces"][number] for number in part["pieces"]]
        assert [id for ids, _, _ in pieces for id in ids] == sample.tokens.tolist()
        assert "".join(text for _, text, _ in pieces) == inspection.tokenizer.decode(sample.tokens.tolist())
        runs = part["weights"]
        weights = [value for n, value in zip(runs[::2], runs[1::2], strict=True) for _ in range(n)]
        assert np.array_equal(np.array(weights, np.float32), sample.loss_weights)
        trained, tokens = np.count_nonzero(sample.loss_weights), len(sample.tokens)
        assert shown["numbers"].startswith(f"{tokens:,} tokens, {trained} trained (")
        assert shown["place"] == f"{sample.file}:{sample.line}" and shown["row"] == sample.raw
    assert HOSTILE in "".join(
        data["pieces"][n][1] for n in next(s for s in samples if s["place"].endswith(":60"))["parts"][0]["pieces"]
    )
    for flag, count in data["flags"]:
        assert count == sum(flag in sample["flags"] for sample in data["samples"]) > 0


def test_bars_are_the_packed_rows(inspection: Inspection, page: Page) -> None:
    bars = data_of(page)["packing"]["rows"]
    assert len(bars) == len(inspection.packed[:15]) > 0
    for bar, row in zip(bars, inspection.packed, strict=False):
        assert [sum(segment["runs"]) for segment in bar] == [len(segment.tokens) for segment in row.samples]
        assert [sum(segment["runs"][1::2]) for segment in bar] == [
            int(np.count_nonzero(segment.loss_weights)) for segment in row.samples
        ]


def test_long_samples_keep_start_and_end(inspection: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_page, "_SAMPLE_TOKENS", 30)
    data = data_of(Page(page_html(inspection, name="run")))
    sample = next(s for s in inspection.samples if "truncated" in s.flags)
    (shown,) = next(s for s in data["samples"] if s["place"] == f"{sample.file}:{sample.line}")["parts"]
    ids = [id for number in shown["pieces"] for id in data["pieces"][number][0]]
    before, left_out = shown["gap"]
    head = sum(len(data["pieces"][number][0]) for number in shown["pieces"][:before])
    assert len(ids) + left_out == len(sample.tokens) and 10 <= len(ids) <= 30
    assert ids == [*sample.tokens[:head].tolist(), *sample.tokens[head + left_out :].tolist()]
    assert sum(shown["weights"][::2]) == len(ids)


def test_what_is_left_out_is_said(inspection: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_page, "_PAGE_TOKENS", 500)
    data = data_of(Page(page_html(inspection, name="run")))
    shown = [sample for sample in data["samples"] if "rejected" not in sample["flags"]]
    assert 0 < sum(sum(part["weights"][::2]) for sample in shown for part in sample["parts"]) <= 500
    assert f"{len(inspection.samples) - len(shown)} more were asked for" in data["samples_text"]
    assert f"Shown are {len(shown)} of 61 samples" in data["samples_text"]
    monkeypatch.setattr(inspect_page, "_PAGE_RAW", 0)
    assert not any(sample["row"] for sample in data_of(Page(page_html(inspection, name="run")))["samples"])


def test_any_text_can_be_embedded() -> None:
    text = "<!-- </SCRIPT ]]> & \u2028\u2029 \ud800 \x00 @DATA@ \\u003c"
    embedded = inspect_page._embed([text])
    assert json.loads(embedded) == [text] and not set(embedded) & set("<>&\u2028\u2029\ud800")
    embedded.encode("utf-8")


def test_placeholders_in_the_data_are_text(inspection: Inspection) -> None:
    assert page_html(inspection, name="@DATA@ @CSP@").count("<title>@DATA@ @CSP@: training data</title>") == 1


def test_a_place_that_cannot_be_written(inspection: Inspection, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(f"--html {tmp_path}/file/page.html: cannot be written")):
        write_page(inspection, f"{tmp_path}/file/page.html", name="run")
