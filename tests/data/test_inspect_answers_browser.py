"""The page of pairs and of labelled answers in headless Chromium: prompts once, answers side by side, their lengths."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.inspect import Inspection, InspectOptions
from posttrain.data.inspect_page import write_page
from tests.data import browsers
from tests.data.browsers import ActionChains, By, Keys, WebDriverWait, button, card, contrast, search, set_screen, texts
from tests.data.inspect_cases import (
    HOSTILE,
    HOSTILE_PAIR,
    LOST,
    SIDE_CUT,
    inspected_answers,
    write_labelled,
    write_pairs,
)

pytestmark = pytest.mark.browser
OPTIONS = InspectOptions(samples=200)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from browsers.chromium(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def pairs(directory: Path) -> Inspection:
    write_pairs(directory)
    found = inspected_answers(directory, "sigmoid", "answers.jsonl", OPTIONS)
    write_page(found, str(directory / "pairs.html"), name="pairs")
    return found


@pytest.fixture(scope="module")
def labelled(directory: Path) -> Inspection:
    write_labelled(directory)
    found = inspected_answers(directory, "kto", "labelled.jsonl", OPTIONS)
    write_page(found, str(directory / "labelled.html"), name="labelled")
    return found


@pytest.fixture
def page(browser: Any, directory: Path, pairs: Inspection) -> Iterator[Any]:
    yield from browsers.open_page(browser, (directory / "pairs.html").as_uri())


@pytest.fixture
def labels_page(browser: Any, directory: Path, labelled: Inspection) -> Iterator[Any]:
    yield from browsers.open_page(browser, (directory / "labelled.html").as_uri())


def units(element: Any, selector: str) -> list[dict[str, Any]]:
    return browsers.tokens_of(element.find_element(By.CSS_SELECTOR, selector))


def show_all(page: Any) -> None:
    while (more := page.find_element(By.ID, "more")).is_displayed():
        more.click()


def check_segments(element: Any, sample: Any) -> None:
    """The prompt and each answer, end to end, are the sample's segments, with their weights and positions."""
    prompt = units(element, ".prompt")
    for name, segment in zip(sample.names, sample.segments, strict=True):
        shown = prompt + units(element, f".{name}")
        assert [id for unit in shown for id in unit["ids"]] == segment.tokens.tolist()
        weights = np.array([weight for unit in shown for weight in unit["weights"]], np.float32)
        assert np.array_equal(weights, segment.loss_weights)
        assert [unit["position"] for unit in shown] == np.cumsum([0, *(len(u["ids"]) for u in shown)])[:-1].tolist()
        assert all(("w1" in unit["classes"]) == any(unit["weights"]) for unit in shown)


def test_pairs_are_drawn(page: Any, pairs: Inspection) -> None:
    show_all(page)
    samples = [sample for sample in pairs.samples if sample.line not in (LOST, SIDE_CUT)]
    assert len(samples) == 23
    for sample in samples:
        found = card(page, f":{sample.line}")
        assert len(found.find_elements(By.CSS_SELECTOR, ".prompt")) == 1
        check_segments(found, sample)
        counts = [segment.trained for segment in sample.segments]
        assert texts(found, "h3") == ["Prompt", f"Chosen {counts[0]} trained", f"Rejected {counts[1]} trained"]
    assert "margin 2.5" in card(page, ":5").text and "margin" not in card(page, ":6").text
    tops = [s.rect["y"] for s in card(page, ":1").find_elements(By.CSS_SELECTOR, ".pair > div")]
    assert tops[0] == tops[1], "side by side"


def test_cut_and_lost_sides(page: Any) -> None:
    search(page, f"answers.jsonl:{SIDE_CUT}")
    found = card(page, f":{SIDE_CUT}")
    chosen, rejected = found.find_elements(By.CSS_SELECTOR, ".pair > div")
    assert "✂" not in chosen.text and "tokens cut off here" in rejected.text and "truncated" in found.text
    page.find_element(By.ID, "search").clear()
    search(page, f"answers.jsonl:{LOST}")
    found = card(page, f":{LOST}")
    assert "without a token to train on after truncation" in found.text
    marks = [
        part.text.count("data.max_length would cut before")
        for part in found.find_elements(By.CSS_SELECTOR, ".pair > div")
    ]
    assert marks == [1, 1]


def test_answers_and_their_lengths(page: Any, pairs: Inspection) -> None:
    assert pairs.answers is not None
    assert "the longer one in" in page.find_element(By.ID, "answers-text").text
    assert [row.split()[:2] for row in texts(page, "#answers-table tbody tr")][1:] == [
        *(["Chosen", "answers"], ["Rejected", "answers"])
    ]
    script = "return [...document.querySelectorAll('#answers rect title')].map(t => t.textContent)"
    counted = [title.split(": ")[1].split(" ", 1) for title in page.execute_script(script)]
    for kind in ("chosen", "rejected"):
        assert sum(int(count) for count, of in counted if of.startswith(kind)) == pairs.answers.counts[kind] == 24
    assert texts(page, "#headline dt")[0] == "Pairs per epoch"
    assert page.find_element(By.ID, "samples-title").text == "Pairs, token by token"
    assert "chosen answer of each pair" in page.find_element(By.CSS_SELECTOR, "header").text


def test_search_and_keyboard_in_both_answers(page: Any, pairs: Inspection) -> None:
    search(page, "no 😀 idea 7")
    found = card(page, ":8")
    assert not found.find_elements(By.CSS_SELECTOR, ".chosen .hit")
    assert "".join(texts(found, ".rejected .hit")).replace(" ", "").startswith("No😀idea7")
    tip = page.find_element(By.ID, "tip")
    last = units(found, ".rejected")[-2]
    span = found.find_elements(By.CSS_SELECTOR, ".rejected .t")[-2]
    ActionChains(page).move_to_element(span).perform()
    assert tip.text.split("\n")[0] == json.dumps("<|im_end|>") and f"position {last['position']}" in tip.text
    (rejected,) = (sample.segments[1] for sample in pairs.samples if sample.line == 8)
    assert last["position"] == len(rejected.tokens) - 2, "counted in its own side, prompt included"
    block = found.find_element(By.CSS_SELECTOR, ".rejected .tokens")
    assert block.get_attribute("aria-label").startswith("Rejected")
    block.send_keys(Keys.HOME)
    assert f"position {units(found, '.rejected')[0]['position']}" in tip.text


def test_hostile_answers_are_text(page: Any) -> None:
    search(page, "hostile?")
    found = card(page, f":{HOSTILE_PAIR}")
    assert HOSTILE in "".join(unit["text"] for unit in units(found, ".chosen"))
    assert page.execute_script("return arguments[0].querySelectorAll('img, script').length", found) == 0


def test_packed_pairs(page: Any, pairs: Inspection) -> None:
    assert len(page.find_elements(By.CSS_SELECTOR, "#packing svg g")) == sum(
        2 * len(row.samples) for row in pairs.packed[:15]
    )
    details = page.find_element(By.CSS_SELECTOR, "#rows details")
    details.find_element(By.TAG_NAME, "summary").click()
    WebDriverWait(page, 10).until(lambda _: details.find_elements(By.CSS_SELECTOR, ".segment-head"))
    prompts, sides = (details.find_elements(By.CSS_SELECTOR, selector) for selector in (".prompt", ".pair"))
    assert len(prompts) == len(sides) == len(pairs.packed[0].samples)
    for sample, prompt, both in zip(pairs.packed[0].samples, prompts, sides, strict=True):
        start = [id for unit in browsers.tokens_of(prompt) for id in unit["ids"]]
        for name, segment in zip(sample.names, sample.segments, strict=True):
            answer = [id for unit in units(both, f".{name}") for id in unit["ids"]]
            assert start + answer == segment.tokens.tolist()


def test_labelled_answers(labels_page: Any, labelled: Inspection) -> None:
    page = labels_page
    assert "8 (33%) are desirable" in page.find_element(By.ID, "answers-text").text
    for label, count in (("desirable", 8), ("undesirable", 16)):
        button(page, label).click()
        assert page.find_element(By.ID, "count").text.startswith(f"{count} of 24 ")
        button(page, label).click()
    details = page.find_element(By.CSS_SELECTOR, "#rows details")
    details.find_element(By.TAG_NAME, "summary").click()
    WebDriverWait(page, 10).until(lambda _: details.find_elements(By.CSS_SELECTOR, ".segment-head"))
    assert len(details.find_elements(By.CSS_SELECTOR, ".mismatched")) == len(labelled.packed[0].samples)
    assert all("measured" in text for text in texts(details, ".mismatched h3"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_can_be_read(page: Any, dark: bool) -> None:
    set_screen(page, 1200, dark=dark)
    for selector in (".chosen h3", ".rejected h3", ".prompt h3", "h3 .quiet", "#answers-table th", "#answers-text"):
        assert contrast(page, selector) >= 4.5, selector
    style = "return getComputedStyle(document.querySelector(arguments[0])).borderLeftStyle"
    assert [page.execute_script(style, side) for side in (".chosen", ".rejected")] == ["solid", "dashed"]


def test_narrow_window(page: Any, directory: Path) -> None:
    set_screen(page, 400, 800)
    page.get((directory / "pairs.html").as_uri())
    assert page.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [400, 400]
    chosen, rejected = page.find_elements(By.CSS_SELECTOR, "#list article .pair")[0].find_elements(By.XPATH, "./div")
    assert rejected.rect["y"] >= chosen.rect["y"] + chosen.rect["height"], "one under the other"
    assert page.execute_script("return document.querySelector('#answers svg').getBoundingClientRect().right") <= 400
