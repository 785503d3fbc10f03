"""The page in a real browser, headless Chromium: drawn from its data without errors or requests, searched, filtered,
walked through by mouse and keyboard, and safe whatever the data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.inspect import Inspection, InspectOptions
from posttrain.data.inspect_page import write_page
from tests.data import browsers
from tests.data.browsers import (
    ActionChains,
    By,
    Keys,
    WebDriverWait,
    button,
    card,
    contrast,
    search,
    set_screen,
    texts,
    tokens_of,
)
from tests.data.chat_cases import TEMPLATES
from tests.data.inspect_cases import HOSTILE, inspected

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from browsers.chromium(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    directory = tmp_path_factory.mktemp("inspect")
    template = directory / "marks.jinja"  # its marks leave out the stop token
    source = (TEMPLATES / "generation_marks.jinja").read_text()
    inside = "{{- message['content'] + '<|im_end|>' -}}\n{%- endgeneration -%}"
    assert inside in source
    template.write_text(
        source.replace(inside, "{{- message['content'] -}}\n{%- endgeneration -%}\n{{- '<|im_end|>' -}}")
    )
    return inspected(directory, InspectOptions(samples=200), tokenizer={"chat_template": str(template)})


@pytest.fixture(scope="module")
def url(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(inspection, str(path), name="<script>window.hacked = 1</script>")
    return path.as_uri()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, freshly opened; whatever a test does must cause no message in the console and no request."""
    yield from browsers.open_page(browser, url)


def test_sections_are_drawn(page: Any, inspection: Inspection) -> None:
    assert page.title == "<script>window.hacked = 1</script>: training data"
    assert inspection.datasets is not None
    numbers = dict(zip(texts(page, "#headline dt"), texts(page, "#headline .value"), strict=True))
    train = inspection.datasets.train
    assert numbers["Samples per epoch"] == f"{len(train.table):,}"
    assert numbers["Packed rows"] == f"{train.num_rows:,}"
    assert numbers["Optimizer steps"] == f"{train.num_steps:,}"
    assert texts(page, "#attention .level")[0] == "Error" and "4 of 65 rows" in texts(page, "#attention .text")[0]
    rows = [row.split() for row in texts(page, "#sources tbody tr:not(.remark)")]
    assert "1 left out: without a token to train on" in texts(page, "#sources .remark")[0]
    assert rows[0][0] == "chats.jsonl" and {"60", "54"} <= set(rows[0]) and rows[1][0] == "pairs.json"
    assert len(page.find_elements(By.CSS_SELECTOR, "#packing svg g")) == sum(
        len(row.samples) for row in inspection.packed[:15]
    )
    counted = page.execute_script(
        "return [...document.querySelectorAll('#lengths rect title')].map(t => t.textContent)"
    )
    assert sum(int(title.split(": ")[1].split()[0].replace(",", "")) for title in counted) == 61
    assert page.execute_script("return document.querySelectorAll('#lengths rect.over').length") > 0
    assert "generation" in page.execute_script("return document.getElementById('template').textContent")
    assert any("<|im_end|>" in fact for fact in texts(page, "#tokenizer dd"))


def test_tokens_are_those_of_the_samples(page: Any, inspection: Inspection) -> None:
    page.find_element(By.ID, "more").click()
    shown = {
        c.find_element(By.CSS_SELECTOR, ".place").text: c for c in page.find_elements(By.CSS_SELECTOR, "#list article")
    }
    assert len(shown) == 30
    whole = [s for s in inspection.samples if f"{s.file}:{s.line}" in shown][:10]
    assert len(whole) == 10
    for sample in whole:
        units = tokens_of(shown[f"{sample.file}:{sample.line}"])
        assert [id for unit in units for id in unit["ids"]] == sample.tokens.tolist()
        weights = [weight for unit in units for weight in unit["weights"]]
        assert np.array_equal(np.array(weights, np.float32), sample.loss_weights)
        for unit in units:
            trained, other = set(unit["weights"]) == {1}, not set(unit["weights"]) <= {0, 1}
            assert ("w1" in unit["classes"], "wx" in unit["classes"]) == (trained, other)
            assert ("sp" in unit["classes"]) == (unit["ids"][0] in inspection.tokenizer.added_ids)


def test_search(page: Any, inspection: Inspection) -> None:
    decoded = [inspection.tokenizer.decode(sample.tokens.tolist()) for sample in inspection.samples]
    expected = sum("what is 4" in text.lower() for text in decoded)
    assert expected > 5
    assert search(page, "WHAT IS 4").startswith(f"{expected} of 65 ")
    assert len(page.find_elements(By.CSS_SELECTOR, "#list article")) == expected
    assert "".join(texts(page, "#list article:first-child .t.hit")).strip().startswith("What is 4")
    page.find_element(By.ID, "search").clear()
    assert search(page, "no such text").startswith("0 of 65 ")
    assert texts(page, "#list article") == []
    page.find_element(By.ID, "search").clear()
    assert search(page, "unknown role").startswith("1 of 65 "), "a rejected row, by its reason"
    page.find_element(By.ID, "search").clear()
    assert search(page, "chats.jsonl:56").startswith("1 of 65 ")


def test_a_match_far_into_a_sample_is_shown(page: Any) -> None:
    search(page, "lost.")
    (found,) = page.find_elements(By.CSS_SELECTOR, "#list article")
    assert "Lost" in "".join(texts(page, "#list .t.hit")) and "tokens more" in found.text
    before = len(tokens_of(found))
    found.find_element(By.CSS_SELECTOR, ".gap button").click()
    assert len(tokens_of(found)) > before and "tokens more" not in found.text
    assert "data.max_length would cut here" in found.text


def test_filters(page: Any, inspection: Inspection) -> None:
    flags = [flag for sample in inspection.samples for flag in sample.flags] + ["rejected"] * 4
    assert {text.rsplit(" ", 1)[0]: int(text.rsplit(" ", 1)[1]) for text in texts(page, "#filters button")} == {
        flag: flags.count(flag) for flag in flags
    }
    for flag in ("rejected", "dropped", "truncated", "duplicate", "other weights"):
        button(page, flag).click()
        assert button(page, flag).get_attribute("aria-pressed") == "true"
        assert page.find_element(By.ID, "count").text.startswith(f"{flags.count(flag)} of 65 ")
        assert all(flag in element.text for element in page.find_elements(By.CSS_SELECTOR, "#list article > header"))
        assert page.find_element(By.ID, "more").is_displayed() == (flags.count(flag) > 15)
        button(page, flag).click()
    page.find_element(By.CSS_SELECTOR, "#source option[value='1']").click()
    assert page.find_element(By.ID, "count").text.startswith("5 of 65 ")
    button(page, "rejected").click()
    assert page.find_element(By.ID, "count").text.startswith("0 of 65 ")


def test_rejected_rows_and_the_way_to_them(page: Any) -> None:
    page.find_element(By.CSS_SELECTOR, "#attention button").click()
    assert page.find_element(By.ID, "count").text.startswith("4 of 65 ")
    first = card(page, "chats.jsonl:51")
    assert "not valid JSON" in first.find_element(By.CSS_SELECTOR, ".reason").text
    assert first.find_element(By.TAG_NAME, "pre").text == '{"messages": [{"role": "us'
    assert "messages[0].role: unknown role 'usr'" in card(page, "chats.jsonl:53").text


def test_hostile_text_is_text(page: Any) -> None:
    search(page, "hostile?")
    found = card(page, "chats.jsonl:60")
    script = "return arguments[0].querySelector('.tokens').textContent"
    assert "</script><script>window.hacked = 1</script><img src=x" in page.execute_script(script, found)
    assert "U+001B" in found.text and "U+202E" in found.text and "U+2028" in found.text
    assert page.execute_script("return arguments[0].querySelectorAll('img, script').length", found) == 0
    units = tokens_of(found)
    assert HOSTILE in "".join(unit["text"] for unit in units)
    assert not page.find_elements(By.CSS_SELECTOR, "main img, main script")


def test_hover_tells_of_a_token(page: Any) -> None:
    search(page, "half?")
    found = card(page, "chats.jsonl:59")
    tip = page.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    spans, units = found.find_elements(By.CSS_SELECTOR, ".t"), tokens_of(found)
    for number in (0, len(units) - 2):
        ActionChains(page).move_to_element(spans[number]).perform()
        unit, lines = units[number], tip.text.split("\n")
        assert lines[0] == json.dumps(unit["text"], ensure_ascii=False)
        assert lines[1] == f"id {unit['ids'][0]}" and lines[3] == f"position {unit['position']}"
        assert lines[2].startswith(f"weight {unit['weights'][0]} (")
        assert ("trained on" in lines[2]) == (unit["weights"][0] != 0)
    assert "weight 0.5 (special token, trained on)" in tip.text
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_several_tokens_of_one_character(page: Any) -> None:
    search(page, "what is 3?")
    unit = next(unit for unit in tokens_of(card(page, "chats.jsonl:4")) if "😀" in unit["text"])
    assert len(unit["ids"]) > 1 and "\ufffd" not in unit["text"]


def test_keyboard(page: Any) -> None:
    page.find_element(By.ID, "search").send_keys("half?")
    tip, block = page.find_element(By.ID, "tip"), page.find_element(By.CSS_SELECTOR, "#list .tokens")
    units = tokens_of(card(page, "chats.jsonl:59"))
    for _ in range(40):
        if page.switch_to.active_element == block:
            break
        page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element == block, "the tokens can be reached with the tabulator key"
    for key, number in (
        (Keys.ARROW_RIGHT, 0),
        (Keys.ARROW_RIGHT, 1),
        (Keys.END, -1),
        (Keys.ARROW_LEFT, -2),
        (Keys.HOME, 0),
    ):
        block.send_keys(key)
        assert f"position {units[number]['position']}" in tip.text
    button(page, "truncated").send_keys(Keys.ENTER)
    assert button(page, "truncated").get_attribute("aria-pressed") == "true"


def test_truncation_is_marked(page: Any, inspection: Inspection) -> None:
    button(page, "truncated").click()
    cut = next(sample for sample in inspection.samples if "truncated" in sample.flags)
    assert f"✂ {cut.segments[0].cut_behind:,} tokens cut off here" in card(page, f":{cut.line}").text


def test_packed_rows(page: Any, inspection: Inspection) -> None:
    for row, details in zip(inspection.packed[:3], page.find_elements(By.CSS_SELECTOR, "#rows details"), strict=True):
        details.find_element(By.TAG_NAME, "summary").click()
        WebDriverWait(page, 10).until(lambda _, d=details: d.find_elements(By.CSS_SELECTOR, ".segment-head"))
        heads = [element.text for element in details.find_elements(By.CSS_SELECTOR, ".segment-head")]
        assert [head.split(" · ")[0] for head in heads] == [f"{s.file}:{s.line}" for s in row.samples]
        ids = [id for unit in tokens_of(details) for id in unit["ids"]]
        assert ids == [id for segment in row.samples for id in segment.tokens.tolist()]
        padding = row.row_length - row.tokens
        assert (f"{padding} place" in details.text) == bool(padding)


def test_template_marks_side_by_side(page: Any, inspection: Inspection) -> None:
    assert "differ only at the ends of turns" in page.find_element(By.ID, "marks-text").text
    articles = page.find_elements(By.CSS_SELECTOR, "#marks article")
    assert len(articles) == len(inspection.marks.rows) == 3
    stop = inspection.tokenizer.added_tokens["<|im_end|>"]
    for article, row in zip(articles, inspection.marks.rows, strict=True):
        ours, theirs = (tokens_of(side) for side in article.find_elements(By.CSS_SELECTOR, ".pair > div"))
        assert [bool(unit["weights"][0]) for unit in ours for _ in unit["ids"]] == row.ours.tolist()
        assert [bool(unit["weights"][0]) for unit in theirs for _ in unit["ids"]] == row.theirs.tolist()
        marked = [unit for unit in ours if "hit" in unit["classes"]]
        assert marked and all(unit["ids"] == [stop] for unit in marked)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_can_be_read(page: Any, dark: bool) -> None:
    set_screen(page, 1200, dark=dark)
    page.execute_script("document.body.offsetHeight")
    red, green, blue = page.execute_script(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (max(red, green, blue) < 60) == dark
    button(page, "other weights").click()
    for selector in (
        *("body", "#subtitle", "#headline .note", "#attention .stop .level", "#attention .warn .level", ".fix"),
        *(".legend .t.w1", ".legend .t.wx", ".legend .t.sp", "#list .tokens", "#filters button[aria-pressed='true']"),
        *("#attention button", "#list .tag", "#count", "th", "#marks .t.hit"),
    ):
        assert contrast(page, selector) >= 4.5, selector
    lines = (
        "const s = getComputedStyle(document.querySelector(arguments[0])); return s.boxShadow + s.textDecorationLine"
    )
    assert "inset" in page.execute_script(lines, ".legend .t.w1"), "trained text is not told by colour alone"
    assert "underline" in page.execute_script(lines, ".legend .t.wx")


def test_narrow_window(page: Any, url: str) -> None:
    set_screen(page, 400, 800)
    page.get(url)
    assert page.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [400, 400]
    search(page, "half?")
    card(page, "chats.jsonl:59").find_elements(By.CSS_SELECTOR, ".t")[3].click()
    tip = page.find_element(By.ID, "tip")
    assert tip.is_displayed() and "position" in tip.text
    box = page.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.left, b.right]", tip)
    assert box[0] >= 0 and box[1] <= 400
    scrolls = "const s = document.querySelector('.scroll'); return s.scrollWidth > s.clientWidth"
    assert page.execute_script(scrolls), "the wide table scrolls in its own box"
    assert page.execute_script("return document.querySelector('#packing svg').getBoundingClientRect().right") <= 400


def test_page_of_data_that_training_refuses(browser: Any, tmp_path: Path) -> None:
    found = inspected(
        tmp_path, data={"train": [{"path": str(tmp_path / "chats.jsonl")}], "max_length": 8, "row_length": 8}
    )
    write_page(found, str(tmp_path / "page.html"), name="run")
    browser.get_log("browser")
    browser.get((tmp_path / "page.html").as_uri())
    assert "drop out" in browser.find_element(By.ID, "attention").text
    assert "no run could be built" in browser.find_element(By.ID, "packing-text").text
    assert not browser.find_element(By.ID, "rows-section").is_displayed()
    assert browser.find_elements(By.CSS_SELECTOR, "#list article") and browser.get_log("browser") == []
