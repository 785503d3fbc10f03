"""The page of a plan and of a search: valid HTML that says what the JSON says, whatever the names in it; and in a real
browser, headless Chromium, without errors or requests, in light and dark, on a narrow screen."""

import html.parser
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.errors import UserError
from posttrain.plan import search
from posttrain.plan.markup import VOID, Markup, join, tag
from posttrain.plan.page import plan_html, write_plan
from posttrain.plan.search_report import as_data
from tests.plan import search_cases as cases

HOSTILE = "</title><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>&amp;\"'`"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a search prints as JSON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(search, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))
        base = cases.config(train={"global_batch_size": 4})
        patch.setattr(search, "Compilation", cases.Compiler(base, 4))
        outcome = search.search(base, "v5p:2x2x1", 1, rows_per_device=(), jobs=1, budget=None)
    return json.loads(json.dumps(as_data(outcome, tokens=1e9, price=2.5)))


class Checked(html.parser.HTMLParser):
    """Every element is closed, in order; no id twice; nothing that could run or load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        assert all(not name.startswith("on") and name not in ("src", "style") for name, _ in attrs)
        assert all(value == "data:," for name, value in attrs if name == "href")
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def read(page: str) -> Checked:
    checked = Checked()
    checked.feed(page)
    checked.close()
    assert checked.open == [] and len(checked.ids) == len(set(checked.ids))
    assert not checked.tags & {"script", "img", "iframe", "object", "form", "base"}
    return checked


def page_of(found: dict[str, Any], name: str = "model", title: str = "v5p:2x2x1") -> str:
    return plan_html(found["best"], name=name, title=title, search=found["search"])


def test_markup_escapes():
    text = tag("p", HOSTILE, title=HOSTILE)
    assert "<script" not in text and "<img" not in text and text.count("<") == 2
    assert tag("p", join("a<b", tag("b", "&")), None) == "<p>a&lt;b<b>&amp;</b></p>"
    assert tag("rect", x=1.5, class_="c", hidden=None) == '<rect x="1.5" class="c"/>'
    assert tag("rect", tag("title", "t"), x=1) == '<rect x="1"><title>t</title></rect>'
    assert isinstance(tag("p"), Markup) and "script" not in VOID


def test_the_page_says_what_the_json_says(found: dict[str, Any]):
    text = " ".join(read(page_of(found)).text)
    best, prediction = found["best"], found["best"]["prediction"]
    for key, scale, unit in (("step_seconds", 1000, " ms"), ("cost", 1, ""), ("hours", 1, " h")):
        low, high = (scale * end for end in prediction[key])
        assert f"{low:,.4g} to {high:,.4g}{unit}" in text, key
    gib = 2**30
    for key in ("params", "optimizer", "activations", "gradients", "other"):
        assert f"{best['memory'][key] / gib:,.2f} GiB" in text, key
    assert f"{best['memory']['peak'] / gib:.2f} of 95.00 GiB a device" in text and "Fits" in text
    for wire in prediction["wires"]:
        assert f"{wire['wire_bytes'] / 1e9:,.3f}" in text and f"{1000 * wire['seconds']:,.3f}" in text
    for parameter in best["sharding"]:
        assert parameter["name"] in text and f"{parameter['bytes'] / 2**20:,.2f}" in text
    for one in found["search"]["candidates"]:
        if one["rank"]:
            assert f"{1e6 * one['seconds_per_token'][1]:,.4g}" in text
    assert found["search"]["yaml"] in text and found["search"]["flags"] in text
    assert best["calibration"]["note"] in text
    assert all(line in text for line in (*best["assumptions"], *best["not_modelled"]))
    for key in ("executed_flops", "useful_flops"):
        assert f"{prediction[key] / 1e12:,.4g} TFLOP" in text, key
    assert f"{best['cost']['hbm_bytes'] / 1e9:.2f} GB" in text


def test_every_compiled_candidate_is_a_point(found: dict[str, Any]):
    """As far right as its memory, as high as its time; what fits is told apart, and so is the config as it stands."""
    page = page_of(found)
    points = re.findall(r'<g class="point (\w+)">(.*?)</g>', page)
    compiled = [one for one in found["search"]["candidates"] if "memory_bytes" in one]
    assert len(points) == len(compiled)
    placed = {}
    for kind, inside in points:
        title = re.search(r"<title>(.*?): ([\d.]+) GiB, ([\d.e+-]+) to ([\d.e+-]+) µs", inside)
        circle = re.search(r'<circle cx="([\d.]+)%" cy="([\d.]+)"', inside)
        assert title is not None and circle is not None
        placed[title[1]] = (kind, float(circle[1]), float(circle[2]), "ring" in inside)
    for one in compiled:
        kind, _, _, ring = placed[one["text"]]
        assert kind == ("first" if one["rank"] == 1 else "fits" if one["rank"] else "misfit")
        assert ring == one["as_configured"]
    by_memory = sorted(compiled, key=lambda one: one["memory_bytes"])
    assert [placed[one["text"]][1] for one in by_memory] == sorted(point[1] for point in placed.values())
    by_time = sorted(compiled, key=lambda one: -one["seconds_per_token"][1])
    assert [placed[one["text"]][2] for one in by_time] == sorted(point[2] for point in placed.values())


def test_bars_are_as_long_as_their_amounts(found: dict[str, Any]):
    page, memory = page_of(found), found["best"]["memory"]
    widths = dict(re.findall(r'width="([\d.]+)%"[^>]*><title>([^:<]+): [\d.,]+ [GM]iB</title>', page))
    shares = {name: float(width) for width, name in widths.items()}
    assert shares["parameters"] / shares["gradients"] == pytest.approx(memory["params"] / memory["gradients"], rel=1e-3)
    assert shares["optimizer"] / shares["parameters"] == pytest.approx(2.0, rel=1e-3)


def test_a_plan_without_a_search(found: dict[str, Any]):
    too_large = json.loads(json.dumps(found["best"]))
    too_large["prediction"]["fits"] = False
    too_large["memory"] |= {"activations": None, "gradients": None, "other": None, "host": 2**30}
    too_large["cost"]["host_bytes"] = 5e9
    too_large["prediction"] |= {"host_seconds": 0.25, "epoch_hours": [1.5, 2.5], "untimed": ["a_kernel"]}
    too_large["length"] = {"steps": 1234, "epoch_steps": 617, "epoch_tokens": 10_000, "filled": 0.987}
    text = " ".join(read(plan_html(too_large, name="m", title="v5p:2x2x1")).text)
    assert "Does not fit" in text and "The search" not in text
    assert "temporaries together" in text and "1.00 GiB a device are on the host" in text
    assert "5.00 GB" in text and "to and from the host 250 ms" in text and "1.5 to 2.5 h" in text and "a_kernel" in text
    assert "1,234 steps, 617 an epoch of 10,000 tokens" in text and "98.7%" in text


def test_nothing_fits(found: dict[str, Any]):
    none = {**found["search"], "settings": None}
    none["candidates"] = [
        {**one, "rank": None, "status": "does not fit"} if one["rank"] else one for one in none["candidates"]
    ]
    text = " ".join(read(plan_html(None, name="m", title="v5p:2x2x1", search=none)).text)
    assert "Nothing that was compiled fits" in text and "Settings of the first" not in text


def test_hostile_names_are_text(found: dict[str, Any]):
    hostile = json.loads(json.dumps(found))
    best = hostile["best"]
    best["sharding"][0]["name"] = HOSTILE
    best["sharding"][0]["kept_whole"] = [HOSTILE]
    best["versions"][HOSTILE] = HOSTILE
    best["cost"]["loops"] = [{"name": HOSTILE, "op_name": HOSTILE, "trips": None, "executed": 1.0}]
    best["prediction"]["wires"][0] |= {"kind": HOSTILE, "axes": [HOSTILE]}
    best["prediction"]["untimed"] = best["not_modelled"] = [HOSTILE]
    for one in hostile["search"]["candidates"]:
        one["text"], one["reason"] = HOSTILE, HOSTILE
    hostile["search"] |= {"yaml": HOSTILE, "flags": HOSTILE}
    checked = read(page_of(hostile, name=HOSTILE, title=HOSTILE))
    assert " ".join(checked.text).count(HOSTILE) >= 10


def test_a_page_that_cannot_be_written(found: dict[str, Any], tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--html .*cannot be written"):
        write_plan(found["best"], str(tmp_path / "file" / "page.html"), name="m", title="v5p:2x2x1")


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.data import browsers

    yield from browsers.chromium(tmp_path_factory.mktemp("chromium"))


@pytest.fixture
def page(browser: Any, found: dict[str, Any], tmp_path: Path) -> Iterator[Any]:
    """The page, freshly opened; it must cause no message in the console and no request."""
    from tests.data import browsers

    path = tmp_path / "page.html"
    write_plan(found["best"], str(path), name=HOSTILE, title="v5p:2x2x1", search=found["search"])
    yield from browsers.open_page(browser, path.as_uri())


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read(page: Any, dark: bool) -> None:
    from tests.data.browsers import contrast, set_screen

    set_screen(page, 1200, dark=dark)
    page.execute_script("document.body.offsetHeight")
    red, green, blue = page.execute_script(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (max(red, green, blue) < 60) == dark
    assert page.title.startswith("</title><script>")
    for selector in ("body", "p.quiet", "#headline .note", ".yes", "th", "td", "tr.marked td", "pre", "summary", "li"):
        assert contrast(page, selector) >= 4.5, selector
    script = """
      const rgb = text => text.match(/[\\d.]+/g).map(Number);
      const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(c[i] / 255), 0);
      const back = light(rgb(getComputedStyle(document.body).backgroundColor));
      return [...document.querySelectorAll('.part, .point circle, .legend rect, svg text')].map(node => {
        const outlined = node.parentNode.classList.contains('misfit') || node.matches('.ring');
        const style = getComputedStyle(node);
        const [a, b] = [light(rgb(outlined ? style.stroke : style.fill)), back].sort((x, y) => y - x);
        return [node.tagName, (a + 0.05) / (b + 0.05)];
      });
    """
    ratios = page.execute_script(script)
    assert len(ratios) > 30
    assert all(ratio >= (4.5 if name == "text" else 3) for name, ratio in ratios), "text 4.5, plots 3 (WCAG 1.4.11)"


@pytest.mark.browser
def test_on_a_narrow_screen(page: Any) -> None:
    from tests.data.browsers import set_screen

    set_screen(page, 400, 800)
    page.execute_script("document.querySelector('details').open = true")
    assert page.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [400, 400]
    script = """
      const boxes = [...document.querySelectorAll('svg > *, svg g > *')].map(node => node.getBoundingClientRect());
      return boxes.map(box => [box.left, box.right]);
    """
    for left, right in page.execute_script(script):
        assert left >= -1 and right <= 401
