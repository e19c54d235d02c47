"""The page in a real Chromium, opened from the disk: charts drawn, toggles and filters work, nothing in the console."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.fabricate import fabricate
from scaling_exps import report
from scaling_exps.report import charts, page
from scaling_exps.report.verdict import compare

selenium = pytest.importorskip("selenium", reason="the page's test drives a browser by selenium (extra: dev)")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine (Debian: chromium, chromium-driver)"
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    fabricate(root / "runs", ["experiment=demo"], rules=("sqrt", "none", "linear_scaled"))
    fabricate(root / "runs", ["experiment=demo", "recipe.lr=0.0013"], batches=(4, 16))
    failed = next((root / "runs").iterdir()) / "result.json"
    failed.write_text('{"status": "failed", "reason": "the disk was full"}')
    collection = report.collect([root / "runs"])
    rows = compare(collection)
    return page.write(rows, collection.missing, charts.arrange(rows), root / "out")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def screen(browser: Any, path: Path, width: int, height: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(path.as_uri())
    until(browser, "return document.documentElement.dataset.ready === 'yes'")


def until(browser: Any, question: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not browser.execute_script(question):
        assert time.monotonic() < end, f"never true: {question}; console: {browser.get_log('browser')}"
        time.sleep(0.05)


def draw_all(browser: Any) -> None:
    """Scroll every chart into view: they are drawn when they are seen."""
    until(
        browser,
        "const next = [...document.querySelectorAll('figure')].find(f => !f.hidden && !drawn.has(f));"
        "if (next) next.scrollIntoView(); return !next;",
    )


def tick(browser: Any, key: str, value: str) -> None:
    """Change a check box as the keyboard does: focus and space."""
    from selenium.webdriver.common.keys import Keys

    (box,) = browser.find_elements("css selector", f'input[data-filter="{key}"][value="{value}"]')
    box.send_keys(Keys.SPACE)


def shown(browser: Any, selector: str) -> int:
    return sum(e.is_displayed() for e in browser.find_elements("css selector", selector))


@pytest.mark.slow
def test_charts_toggles_and_filters(browser: Any, path: Path) -> None:
    screen(browser, path, 1280, 900)
    draw_all(browser)
    assert browser.execute_script("return DATA.charts.length") > 20
    count = "return [...document.querySelectorAll('figure')].map(f => f.querySelectorAll(arguments[0]).length)"
    assert min(browser.execute_script(count, ".scatterlayer .trace")) >= 1  # every chart has lines
    assert min(browser.execute_script(count, ".legend .traces")) >= 1  # and a legend, of one arm too

    # the rule filter: by the keyboard, on table, charts and recipes alike
    assert shown(browser, 'tr[data-rule="none"]') == 3
    tick(browser, "rule", "none")
    assert shown(browser, 'tr[data-rule="none"]') == shown(browser, 'details[data-rule="none"]') == 0
    visible = (
        "return [...document.querySelectorAll('figure')].filter(f => drawn.has(f) && !f.hidden).some(f => "
        "f.querySelector('.plot').data.some(t => t.name === 'none' && t.visible !== false))"
    )
    assert not browser.execute_script(visible)
    tick(browser, "rule", "none")
    assert shown(browser, 'tr[data-rule="none"]') == 3 and browser.execute_script(visible)

    tick(browser, "batch", "64")
    assert shown(browser, 'tr[data-batch="64"]') == shown(browser, 'figure[data-batch="64"]') == 0
    assert shown(browser, 'tr[data-batch="16"]') == 5
    tick(browser, "batch", "64")

    second = "resnet8 on digits, adam (lr 0.0013)"
    assert shown(browser, f'section[data-setting="{second}"]') > 0
    tick(browser, "setting", second)
    assert shown(browser, f'[data-setting="{second}"]') == 0
    tick(browser, "setting", second)

    # a legend entry, by the mouse
    entry = browser.find_element("css selector", "figure .legend .traces .legendtoggle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", entry)
    name = browser.execute_script("return document.querySelector('figure .legend .legendtext').textContent")
    state = f"return document.querySelector('figure .plot').data.filter(t => t.name === '{name}').map(t => t.visible)"
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(entry).click().perform()
    until(browser, state + ".every(v => v === 'legendonly')")
    ActionChains(browser).move_to_element(entry).click().perform()
    until(browser, state + ".every(v => v === true)")
    assert browser.get_log("browser") == []


def test_what_is_missing_is_there(browser: Any, path: Path) -> None:
    screen(browser, path, 1280, 900)
    assert "the disk was full" in browser.find_element("tag name", "main").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_dark(browser: Any, path: Path, scheme: str) -> None:
    """No sideways scrolling at 390 pixels; every text on its own background has WCAG's contrast of 4.5."""
    screen(browser, path, 390, 844, scheme)
    draw_all(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    ratios = browser.execute_script(
        """
        const lum = c => { const v = c.map(x => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
          return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
        const rgb = s => s.match(/[\\d.]+/g).map(Number);
        const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
          if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
        const bad = [];
        for (const e of document.querySelectorAll("p, td, th, caption, label, legend, h1, h2, h3, figcaption, summary, "
            + ".small, .verdict, .no-power, a, li")) {
          if (!e.textContent.trim() || !e.offsetParent) continue;
          const [a, b] = [lum(rgb(getComputedStyle(e).color).slice(0, 3)), lum(ground(e))].sort((x, y) => y - x);
          const ratio = (a + 0.05) / (b + 0.05);
          if (ratio < 4.5) bad.push(e.tagName + "." + e.className + " " + ratio.toFixed(2));
        }
        document.querySelectorAll(".legendtext").forEach(e => {
          const both = [lum(rgb(getComputedStyle(e).fill).slice(0, 3)), lum(ground(document.body))];
          const [a, b] = both.sort((x, y) => y - x);
          if ((a + 0.05) / (b + 0.05) < 4.5) bad.push("legend");
        });
        return [...new Set(bad)];
        """
    )
    assert ratios == []
    assert browser.get_log("browser") == []


def test_names_for_those_who_do_not_see(browser: Any, path: Path) -> None:
    """Every chart says in words where its lines end; every check box has a label; every table a header."""
    screen(browser, path, 1280, 900)
    for plot in browser.find_elements("css selector", ".plot"):
        assert "ends at" in plot.get_attribute("aria-label")
    unnamed = "return [...document.querySelectorAll('input')].filter(i => !i.labels.length).length"
    assert browser.execute_script(unnamed) == 0
    assert browser.execute_script("return [...document.querySelectorAll('table')].every(t => t.tHead)")
    assert browser.execute_script("return document.documentElement.lang") == "en"
