"""The inspect page in headless Chromium, for its tests: start it, open a page, read what is drawn."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium: pip install selenium")
from selenium.webdriver.common.action_chains import ActionChains as ActionChains  # noqa: E402  # only where selenium is
from selenium.webdriver.common.by import By as By  # noqa: E402
from selenium.webdriver.common.keys import Keys as Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait as WebDriverWait  # noqa: E402

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-dev-shm-usage"),
)


def program(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        reason = f"the browser test needs {' or '.join(names)}, e.g. apt-get install chromium chromium-driver"
        if os.environ.get("POSTTRAIN_NEEDS_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def chromium(profile: Path) -> Iterator[Any]:
    """A browser that keeps its files in the directory `profile`."""
    binary, driver = program("chromium", "chromium-browser", "google-chrome"), program("chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def set_screen(browser: Any, width: int, height: int = 900, *, dark: bool = False) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def open_page(browser: Any, url: str) -> Iterator[Any]:
    """The page, freshly opened; whatever is done with it must cause no message in the console and no request."""
    set_screen(browser, 1200)
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # forgets what was there
    browser.get(url)
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert requests and {address.split("#")[0] for address in requests} <= {url, "data:,"}


def texts(page: Any, selector: str) -> list[str]:
    return [element.text for element in page.find_elements(By.CSS_SELECTOR, selector)]


def search(page: Any, text: str) -> str:
    """Types a search; the count of matches."""
    page.find_element(By.ID, "search").send_keys(text)
    return page.find_element(By.ID, "count").text


def button(page: Any, flag: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, f"#filters button[data-flag='{flag}']")


def card(page: Any, place: str) -> Any:
    """The card of a sample."""
    cards = page.find_elements(By.CSS_SELECTOR, "#list article")
    return next(c for c in cards if c.find_element(By.CSS_SELECTOR, ".place").text.endswith(place))


def tokens_of(element: Any) -> list[dict[str, Any]]:
    script = (
        "return [...arguments[0].querySelectorAll('.t')].map(t => ({...t.unit, classes: [...t.classList], shown: "
        "t.innerText}))"
    )
    return element.parent.execute_script(script, element)


def contrast(page: Any, selector: str) -> float:
    """Contrast ratio (WCAG 2) of an element's text with the nearest background that is drawn."""
    script = """
      const rgb = text => text.match(/[\\d.]+/g).map(Number);
      const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(c[i] / 255), 0);
      let node = document.querySelector(arguments[0]);
      const ink = light(rgb(getComputedStyle(node).color));
      let back = rgb(getComputedStyle(node).backgroundColor);
      while (back.length === 4 && back[3] === 0) {
        node = node.parentElement;
        back = rgb(getComputedStyle(node).backgroundColor);
      }
      const [a, b] = [ink, light(back)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    """
    return page.execute_script(script, selector)
