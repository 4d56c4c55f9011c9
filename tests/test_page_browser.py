"""The report's page in a real browser: headless Chromium, driven by Selenium."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pages
import tiny
from catsparse import hub
from catsparse.page import render, write_page

pytest.importorskip("selenium", reason="selenium is not installed")
from browsing import NEEDED, By, Keys, media, resize, settle

pytestmark = NEEDED


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A page with everything on it, and its payload: four layers of different sparsity."""
    root = tmp_path_factory.mktemp("browser")
    config = tiny.llama_config(num_hidden_layers=4)
    made = pages.make_folder(root, config=config, bytes_skipped=0.34, allocation="optimal")
    rows = root / "rows.jsonl"
    lines = [
        pages.evaluate_row(hub.read_artifact(str(made))[0]),
        *(pages.compare_row(bytes_skipped=b, rise=b**2) for b in (0.3, 0.45)),
        *(pages.compare_row(bytes_skipped=b, method="energy", compensate=True) for b in (0.3, 0.4)),
        pages.compare_row(heldout="another text", rise=0.3),
        pages.task_row(variant="dense", value=0.7, method=None, bytes_skipped=0.0),
        *(pages.task_row(bytes_skipped=b, value=0.7 - b / 5) for b in (0.3, 0.45)),
        pages.task_row(method="energy", compensate=True, value=0.69),
        pages.task_row(task="lambada", n=8, method="energy", compensate=True, value=0.2),
        pages.bench_row(impl="dense", sparsity=0.0, vs_dense=0.8, p50=14.0),
        *(pages.bench_row(sparsity=s, limit=8 - 6 * s) for s in (0.0, 0.5, 0.9)),
        pages.bench_row(impl="catsparse_product4", vs_dense=1.9),
        pages.bench_row(what="decode", name="tiny", context=100),
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_page(made, root / "page.html", [rows], progress=False)


def visit(browser: Any, path: Path) -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())
    settle(browser)


@pytest.fixture
def page(browser: Any, shown: tuple[Path, dict[str, Any]]) -> Iterator[Any]:
    """Open afresh, 1,200 wide, light; nothing in the console at the end."""
    media(browser)
    resize(browser, 1200)
    visit(browser, shown[0])
    yield browser
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def payload(shown: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return shown[1]


def text_of(page: Any, selector: str) -> str:
    return str(page.find_element(By.CSS_SELECTOR, selector).get_attribute("textContent"))


def texts_of(page: Any, selector: str) -> list[str]:
    found = page.find_elements(By.CSS_SELECTOR, selector)
    return [str(element.get_attribute("textContent")) for element in found]


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.switch_to.active_element.send_keys(key)
    settle(page)


def focus(page: Any, selector: str) -> None:
    page.execute_script("document.querySelector(arguments[0]).focus()", selector)


def figure(page: Any, section: str, n: int = 0) -> Any:
    return page.find_elements(By.CSS_SELECTOR, f"#{section} .figure")[n]


def lines_at(page: Any, figure_: Any, kind: str) -> float:
    """Where the upright line of a class stands, in the chart's own units."""
    return float(figure_.find_element(By.CSS_SELECTOR, f".canvas line.{kind}").get_attribute("x1"))


def test_it_loads_without_an_error_or_a_request(
    page: Any, shown: tuple[Path, dict[str, Any]]
) -> None:
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = {parameters["request"]["url"] for parameters in sent}
    assert shown[0].as_uri() in urls  # the log is not empty
    assert {url for url in urls if not url.startswith("data:")} == {shown[0].as_uri()}
    assert text_of(page, "h1") == "tiny"
    charts = page.find_elements(By.CSS_SELECTOR, ".canvas svg")
    assert len(charts) == 9  # no section was left out
    assert all(chart.size["height"] > 150 for chart in charts)
    assert page.get_log("browser") == []


def test_nothing_can_be_loaded(page: Any) -> None:
    """The page's own policy: not even a script that ran in it could ask for anything."""
    refused = page.execute_async_script(
        """const done = arguments[0];
        const image = new Image();
        fetch("https://localhost:9/x").then(() => done("fetched"), () => {
          image.onerror = () => done("refused");
          image.onload = () => done("loaded");
          image.src = "https://localhost:9/x.png";
        });"""
    )
    assert refused == "refused"
    logged = [entry["message"] for entry in page.get_log("browser")]
    assert len([line for line in logged if "Content Security Policy" in line]) >= 2


def predicted(payload: dict[str, Any], at: int) -> float:
    return sum(curve[at] for curve in payload["sensitivities"]["predicted"])


def test_the_slider_by_keys(page: Any, payload: dict[str, Any]) -> None:
    start, axis = payload["start"], payload["histograms"]["edges"]
    focus(page, "#sparsity")
    histogram = figure(page, "activations")
    for keys, at in (
        ([], start),
        ([Keys.ARROW_RIGHT] * 3, start + 3),
        ([Keys.ARROW_LEFT], start + 2),
        ([Keys.HOME, Keys.ARROW_UP], 1),
        ([Keys.END], 97),
        ([Keys.ARROW_DOWN] * 7, 90),
    ):
        press(page, *keys)
        level = payload["levels"]["sites"][0]
        assert text_of(page, "#at") == f"{at}%"
        assert text_of(page, "#at-bytes") == f"{100 * payload['levels']['bytes'][at]:.1f}%"
        assert text_of(page, "#threshold-label") == f"{level['middle'][at]:.3g}"
        assert f"T = {level['scalar'][at]:.3g}" in histogram.find_element(By.TAG_NAME, "h3").text
        # The line stands where the threshold is on the log axis.
        box = page.execute_script("const b = charts[0].place.box; return [b.left, b.right]")
        low = max(axis[0], axis[1] / 2)
        share = math.log(level["middle"][at] / low) / math.log(axis[-1] / low)
        x = box[0] + min(max(share, 0.0), 1.0) * (box[1] - box[0])
        assert lines_at(page, histogram, "rule") == pytest.approx(x, abs=0.01)
        spoken = page.find_element(By.ID, "sparsity").get_attribute("aria-valuetext")
        assert spoken.startswith(f"{at}% of neurons dropped")
        if at > 90:  # the table ends there
            assert text_of(page, "#at-loss") == "not measured above 90%"
            assert "loss" not in spoken
        else:
            loss = predicted(payload, at)
            shown_loss = f"{loss:.3g}".replace("e-0", "e-")  # as JavaScript writes it
            rise = f"+{100 * math.expm1(loss):.1f}%"
            assert text_of(page, "#at-loss") == f"{shown_loss} nats (perplexity {rise})"
            assert spoken.endswith(f"predicted loss {shown_loss} nats a token")
    page.find_element(By.ID, "reset").click()
    settle(page)
    assert text_of(page, "#at") == f"{start}%"
    saved = payload["layers"][0]["saved"]["middle"]
    assert lines_at(page, histogram, "saved") == pytest.approx(
        box[0] + math.log(saved / low) / math.log(axis[-1] / low) * (box[1] - box[0]), abs=0.01
    )


def test_predictions_are_those_of_python(page: Any, payload: dict[str, Any]) -> None:
    """All positions at once, against the table of the file."""
    found = page.execute_script("return DATA.levels.positions.map((_, at) => predictedLoss(at))")
    assert found[:91] == pytest.approx([predicted(payload, at) for at in range(91)])
    assert found[91:] == [None] * 7


def test_layers_are_chosen_by_arrows(page: Any, payload: dict[str, Any]) -> None:
    focus(page, ".minis [tabindex='0']")
    for key, layer in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_LEFT, 0), (Keys.ARROW_LEFT, 3)):
        press(page, key)
        assert page.find_element(By.ID, "layer").get_attribute("value") == str(layer)
        middle = payload["levels"]["sites"][layer]["middle"][payload["start"]]
        assert text_of(page, "#activations h3").startswith(f"Layer {layer}: ")
        assert f"median threshold {middle:.3g}" in text_of(page, "#activations h3")
        chosen = page.find_elements(By.CSS_SELECTOR, ".minis [aria-checked='true']")
        assert [element.text.split("\n")[0] for element in chosen] == [str(layer)]
        assert page.switch_to.active_element == chosen[0]


@pytest.mark.parametrize("n", range(9))
def test_charts_are_read_out_by_keys_and_by_pointer(page: Any, n: int) -> None:
    svg = page.find_elements(By.CSS_SELECTOR, ".canvas svg")[n]
    assert "chart" in svg.get_attribute("aria-roledescription")
    assert svg.get_attribute("aria-label")
    state = """const it = charts[arguments[0]];
        return [it.active, it.tip.hidden, it.live.textContent]"""
    page.execute_script("document.querySelectorAll('.canvas svg')[arguments[0]].focus()", n)
    assert page.execute_script(state, n)[:2] == [0, False]
    press(page, Keys.ARROW_RIGHT)
    active, hidden, spoken = page.execute_script(state, n)
    items = page.execute_script("return charts[arguments[0]].spec.items", n)
    one_point = len(items) == 1 or items[1]["series"] != items[0]["series"]
    assert active == (0 if one_point else 1)
    assert not hidden
    assert spoken == ", ".join(items[active]["lines"])
    press(page, Keys.END, Keys.ARROW_DOWN, Keys.HOME, Keys.ESCAPE)
    assert page.execute_script(state, n)[1]
    # The pointer over the last item reads that one, or its twin at the same place.
    x = page.execute_script(
        """const it = charts[arguments[0]]; it.svg.blur(); it.svg.scrollIntoView({block: "center"});
        const item = it.spec.items.at(-1), box = it.svg.getBoundingClientRect();
        const [x, y] = [box.left + it.place.x(item.x), box.top + it.place.y(item.y)];
        it.svg.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: y}));
        return item.x""",
        n,
    )
    active, hidden, _ = page.execute_script(state, n)
    assert not hidden
    assert items[active]["x"] == pytest.approx(x)
    tip = page.execute_script(
        """const it = charts[arguments[0]], t = it.tip.getBoundingClientRect();
        const c = it.canvas.getBoundingClientRect();
        return [t.left - c.left, c.right - t.right, it.tip.textContent]""",
        n,
    )
    assert tip[0] >= -0.5
    assert tip[1] >= -0.5
    assert tip[2] == "".join(items[active]["lines"])


def test_tables_hold_the_charts_numbers(page: Any, payload: dict[str, Any]) -> None:
    tables = page.find_elements(By.CSS_SELECTOR, ".figure details")
    assert len(tables) == 9
    for table in tables:
        page.execute_script("arguments[0].open = true", table)
    settle(page)
    rows = [len(t.find_elements(By.CSS_SELECTOR, "tbody tr")) for t in tables]
    bars = len(payload["histograms"]["shares"][0])
    assert rows == [bars + 2, 4, 4, 4, 5, 5, 4, 5, 5]
    second = tables[3].find_elements(By.CSS_SELECTOR, "tbody tr:nth-child(2) td")
    cells = [cell.text for cell in second]
    saved = payload["layers"][1]["saved"]["sparsity"]
    assert cells[:3] == ["model.layers.1.mlp", f"{100 * saved:.1f}%", "51.0%"]
    # An open one follows the slider.
    before = tables[2].text
    focus(page, "#sparsity")
    press(page, Keys.ARROW_RIGHT)
    assert tables[2].text != before


def test_lines_can_be_switched_off_and_texts_chosen(page: Any) -> None:
    it = "charts.find((it) => it.element.closest('#quality'))"
    series = f"return [...new Set({it}.spec.items.map((item) => item.series))]"
    both = ["cats, uncompensated", "energy, compensated", "this folder"]
    assert page.execute_script(series) == both
    button = page.find_element(By.CSS_SELECTOR, "#quality .legend button")
    button.send_keys(Keys.ENTER)
    settle(page)
    assert button.get_attribute("aria-pressed") == "false"
    assert page.execute_script(series) == both[1:]
    button.send_keys(Keys.SPACE)
    page.find_element(By.CSS_SELECTOR, "#text option[value='another text']").click()
    settle(page)
    assert page.execute_script(series) == both[:1]


def test_accuracy_stands_beside_the_dense_models(page: Any) -> None:
    it = "charts.filter((it) => it.element.closest('#quality'))[1]"
    items = f"return {it}.spec.items.map((item) => [item.series, item.x, item.y])"
    assert page.execute_script(f"return {it}.heading.textContent") == "tiny on blimp, 40 examples"
    dense = ["dense", 0, 0.7]
    cats = [["cats, uncompensated", b, pytest.approx(0.7 - b / 5)] for b in (0.3, 0.45)]
    energy = ["energy, compensated", 0.31, 0.69]
    assert page.execute_script(items) == [dense, *cats, energy]
    lines = page.execute_script(f"return {it}.spec.items[1].lines")
    assert lines[1] == "64.0%, \N{MINUS SIGN}5.00% to dense ± 1.00%"
    # Across, at its height.
    across = f"const it = {it}, line = it.svg.querySelector('line.limit');"
    assert page.execute_script(
        f"{across} return Number(line.getAttribute('y1')) - it.place.y(0.7)"
    ) == (pytest.approx(0, abs=0.01))
    button = page.find_element(By.CSS_SELECTOR, "#quality figure:last-of-type .legend button")
    button.send_keys(Keys.ENTER)
    settle(page)
    assert page.execute_script(items) == [dense, energy]
    # The chart above has a switch of its own.
    above = page.find_element(By.CSS_SELECTOR, "#quality .legend button")
    assert above.get_attribute("aria-pressed") == "true"
    button.send_keys(Keys.ENTER)
    page.find_element(By.CSS_SELECTOR, "#task option[value='lambada, 8 examples']").click()
    settle(page)
    assert page.execute_script(items) == [["energy, compensated", 0.31, 0.2]]
    assert page.execute_script(f"return {it}.svg.querySelector('line.limit')") is None


def test_tasks_alone(browser: Any, payload: dict[str, Any], tmp_path: Path) -> None:
    alone = payload | {"compare": [], "evaluate": []}
    path = tmp_path / "page.html"
    path.write_text(render(alone), encoding="utf-8")
    visit(browser, path)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#quality figure")) == 1
    assert not browser.find_elements(By.CSS_SELECTOR, "#quality .notice")
    assert text_of(browser, "#quality h3") == "tiny on blimp, 40 examples"


def test_benchmarks_are_chosen(page: Any) -> None:
    assert text_of(page, "#speed h3") == "Time of a call: lower is better"
    page.find_element(By.CSS_SELECTOR, "#panel option[value='1']").click()
    settle(page)
    assert text_of(page, "#speed h3") == "Rate: higher is better"
    assert "tiny · decode" in text_of(page, "#speed .hint")


def background(page: Any) -> list[int]:
    color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(",")]


def test_dark_and_light(page: Any) -> None:
    assert min(background(page)) > 240
    button = page.find_element(By.ID, "theme")
    assert button.text == "Dark theme"
    button.send_keys(Keys.ENTER)
    assert max(background(page)) < 40
    assert (button.text, button.get_attribute("aria-pressed")) == ("Light theme", "true")
    button.click()
    assert min(background(page)) > 240
    assert button.get_attribute("aria-pressed") == "false"


def test_dark_where_the_system_is(page: Any) -> None:
    media(page, dark=True)
    assert max(background(page)) < 40
    assert text_of(page, "#theme") == "Light theme"
    page.find_element(By.ID, "theme").click()
    assert min(background(page)) > 240


def test_print(page: Any) -> None:
    page.find_element(By.ID, "theme").click()  # paper is white whatever the screen is
    media(page, kind="print")
    assert background(page) == [255, 255, 255]
    displayed = "return getComputedStyle(document.querySelector(arguments[0])).display"
    for selector in (".top", "#sparsity", "#reset", ".pickers", "details"):
        assert page.execute_script(displayed, selector) == "none", selector
    for selector in ("#at", "#at-loss", "figure", "h1", ".legend"):
        assert page.execute_script(displayed, selector) != "none", selector
    pdf = page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    pages_ = base64.b64decode(pdf).count(b"/Type /Page\n")
    assert 3 <= pages_ <= 8


def test_tab_order(page: Any) -> None:
    """Every control once, in the order in which they stand, each with a name."""
    wanted = page.execute_script(
        """const kinds = "a, button, input, select, summary, [tabindex='0']";
        return [...document.querySelectorAll(kinds)]
        .filter((e) => e.tabIndex >= 0 && e.checkVisibility()).length"""
    )
    seen: list[str] = []
    place = """const e = document.activeElement; window.order ??= [];
    const again = window.order.includes(e); window.order.push(e);
    const name = e.getAttribute("aria-label") ?? e.labels?.[0]?.textContent ?? e.textContent;
    return [again || e === document.body, e.id || e.tagName.toLowerCase(), name.trim()]"""
    while len(seen) < 200:
        press(page, Keys.TAB)
        stop, kind, name = page.execute_script(place)
        if stop:
            break
        assert name, kind
        seen.append(kind)
    assert len(seen) == wanted
    assert seen[:11] == [*["a"] * 7, "theme", "sparsity", "reset", "layer"]
    assert page.execute_script(
        """return window.order.slice(0, -1).every((e, k, all) => k === 0 ||
        all[k - 1].compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING)"""
    )


def test_the_skip_link(page: Any) -> None:
    press(page, Keys.TAB)
    link = page.switch_to.active_element
    assert link.text == "Skip to the report"
    assert link.rect["x"] >= 0


@pytest.mark.parametrize("width", [400, 600, 1200])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    resize(page, width)
    page.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    settle(page)
    sizes = "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    content, room = page.execute_script(sizes)
    assert content == room > width - 20  # a scroll bar may take some
    too_wide = page.execute_script(
        """const room = document.documentElement.clientWidth;
        return [...document.querySelectorAll("body *:not(.unseen, .skip)")]
        .filter((e) => !e.closest(".scroll, .tip, svg") && e.checkVisibility())
        .map((e) => [`${e.tagName} ${e.className}`, e.getBoundingClientRect().right])
        .filter(([, right]) => right > room + 0.5)"""
    )
    assert too_wide == []
    texts = page.execute_script(
        """const room = document.documentElement.clientWidth;
        return [...document.querySelectorAll(".canvas svg text")]
        .map((e) => [e.textContent, e.getBoundingClientRect()])
        .filter(([, box]) => box.width && (box.left < -1 || box.right > room + 1))"""
    )
    assert texts == []


def test_hostile_names_do_nothing(browser: Any, payload: dict[str, Any], tmp_path: Path) -> None:
    bad = (
        "</script ><script>window.hit = 1</script><img src=x onerror='window.hit = 1'><!-- <script "
    )
    raw = json.loads(json.dumps(payload))
    raw["model"]["name"] = raw["calibration"]["data"] = raw["layers"][0]["name"] = bad
    raw["layers"][1]["short"] = raw["compare"][0]["heldout"] = raw["bench"][0]["name"] = bad
    raw["tasks"][0]["task"] = raw["tasks"][1]["method"] = bad
    path = tmp_path / "hostile.html"
    path.write_text(render(raw), encoding="utf-8")
    media(browser)
    visit(browser, path)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    settle(browser)
    assert text_of(browser, "h1") == bad
    assert browser.title.startswith(bad)
    assert browser.execute_script("return window.hit ?? null") is None
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(
    "options",
    [
        {"keep": False, "table": False},
        {"table": False},
        {"method": "cats", "config": tiny.llama_config(num_hidden_layers=1)},
        {"method": "product", "preview": 4},
        {"method": "cats", "config": tiny.llama_config(hidden_act="relu"), "table": False},
        {"table": False, "sparsity": 0.5, "down_sparsity": 0.7},
        {"sparsity": 0.0},
        {"method": "teal", "sparsity": 0.4},
        {"sparsity": 0.5, "scope": "all"},
    ],
)
def test_other_folders(browser: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    made = pages.make_folder(tmp_path, **options)
    path, shown = write_page(made, progress=False)
    media(browser)
    resize(browser, 400)
    visit(browser, path)
    assert browser.get_log("browser") == []
    slider = browser.find_element(By.ID, "sparsity")
    assert slider.is_displayed() == (shown["levels"] is not None)
    for section in ("achieved", "quality", "speed"):  # and how the rows are made
        assert "catsparse report sparse --rows" in text_of(browser, f"#{section} .commands")
    if shown["levels"] is not None:
        focus(browser, "#sparsity")
        for key in (Keys.HOME, Keys.END):
            press(browser, key)
        assert "NaN" not in browser.find_element(By.TAG_NAME, "body").text
        attributes = browser.execute_script(
            """return [...document.querySelectorAll("svg *")].flatMap((e) => [...e.attributes])
            .map((a) => a.value).filter((v) => /NaN|Infinity/.test(v))"""
        )
        assert attributes == []
    known = shown["sensitivities"]["why_not"] is None
    assert ("nats" in text_of(browser, "#control")) is False or known
    if not known:
        assert "predicts no loss" in text_of(browser, "#slider-note") or shown["levels"] is None
        assert "--allocation optimal" in text_of(browser, "#layers .commands")
    if "down_sparsity" in options:
        assert "leaves out the second decision" in text_of(browser, "#slider-note")
    assert browser.get_log("browser") == []
