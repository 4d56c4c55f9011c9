"""The server's own page in a real browser: a talk, dense beside sparse, keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
import serving
from browsing import NEEDED, By, Keys, media, resize, settle
from serving import NAME, PROMPT, Running, expected, wait_for

pytestmark = NEEDED
KEY = "secret"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving.serving(max_tokens=300) as made:
        yield made


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving.serving(api_key=KEY) as made:
        yield made


def visit(browser: Any, url: str) -> None:
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(url)
    settle(browser)


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Any]:
    """Connected; nothing in the console at the end."""
    media(browser)
    resize(browser, 1100)
    visit(browser, running.url)
    wait_for(lambda: text_of(browser, "#model") == NAME)
    yield browser
    assert browser.get_log("browser") == []


def find(page: Any, selector: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, selector)


def text_of(page: Any, selector: str) -> str:
    return str(find(page, selector).get_attribute("textContent"))


def texts_of(page: Any, selector: str) -> list[str]:
    found = page.find_elements(By.CSS_SELECTOR, selector)
    return [str(element.get_attribute("textContent")) for element in found]


def fill(page: Any, selector: str, text: str) -> None:
    element = find(page, selector)
    element.clear()
    element.send_keys(text)


def is_done(page: Any) -> bool:
    return bool(find(page, "#send").is_enabled())


def ask(page: Any, text: str, tokens: int = 24) -> None:
    fill(page, "#temperature", "0")
    fill(page, "#tokens", str(tokens))
    find(page, "#message").send_keys(text, Keys.ENTER)
    wait_for(lambda: is_done(page), 30)


def test_dense_beside_sparse(page: Any) -> None:
    """Both texts, each with its speed; and nothing but this server is asked for anything."""
    assert re.fullmatch(r"sparse, context 512 tokens", text_of(page, "#facts"))
    ask(page, PROMPT)
    assert texts_of(page, ".mine") == [PROMPT]
    assert text_of(page, ".answer.sparse .text") == expected(PROMPT, 24)
    assert text_of(page, ".answer.dense .text") == expected(PROMPT, 24, dense=True)
    for speed in texts_of(page, ".speed"):
        assert re.fullmatch(r"\d+\.\d tokens/s, 24 tokens, the first after \d+\.\d\d s", speed), (
            speed
        )
    left, right = (find(page, f".answer.{kind}").rect for kind in ("sparse", "dense"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [e["params"]["request"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # The browser's own first page may still be loading.
    own = ("data:", "chrome:")
    asked = {request["url"] for request in sent if not request["url"].startswith(own)}
    start = page.current_url
    paths = {"", "page.css", "page.js", "v1/models", "v1/chat/completions"}
    assert asked == {start + path for path in paths}


def test_the_talk_goes_on_from_the_first_answer(page: Any) -> None:
    find(page, "input[value=sparse]").click()
    ask(page, PROMPT, 8)
    ask(page, "Then", 8)
    first = expected(PROMPT, 8)
    talk = f"{PROMPT}{first}\nThen"
    assert texts_of(page, ".answer.sparse .text") == [first, expected(talk, 8)]
    assert texts_of(page, ".answer.dense") == []


def test_it_is_shown_as_it_comes_and_can_be_stopped(page: Any, running: Running) -> None:
    fill(page, "#tokens", "300")
    find(page, "#message").send_keys(PROMPT, Keys.ENTER)
    wait_for(lambda: len(text_of(page, ".answer .text")) > 20)
    assert not is_done(page)
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait_for(lambda: is_done(page))
    assert texts_of(page, ".speed") == ["stopped"]
    wait_for(lambda: not running.service._active)


def test_by_keyboard_alone(page: Any) -> None:
    """Every control is reached by Tab and seen; Shift+Enter is no send."""
    assert page.switch_to.active_element.get_attribute("id") == "message"
    page.switch_to.active_element.send_keys("a", Keys.SHIFT, Keys.ENTER)
    assert find(page, "#message").get_attribute("value") == "a\n"
    assert texts_of(page, ".mine") == []
    reached = []
    for _ in range(5):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.switch_to.active_element.get_attribute("id"))
        outline = page.switch_to.active_element.value_of_css_property("outline-style")
        assert outline != "none"
    assert reached == ["", "temperature", "tokens", "clear", "send"]


def test_what_the_model_writes_is_text(page: Any, running: Running) -> None:
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    writes = running.server.app.posts["/v1/chat/completions"]
    chunk = writes.chunk
    writes.chunk = lambda ident, text, finish=None: chunk(  # type: ignore[method-assign]
        ident, markup if text else text, finish
    )
    try:
        ask(page, markup, 2)
    finally:
        del writes.chunk
    assert texts_of(page, ".mine") == [markup]
    assert text_of(page, ".answer .text").startswith(markup)
    assert page.find_elements(By.CSS_SELECTOR, ".answer b, #talk img") == [
        *page.find_elements(By.CSS_SELECTOR, ".speed b")
    ]


def test_nothing_else_can_be_loaded(browser: Any, running: Running) -> None:
    response = running.http().get("/")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    visit(browser, running.url)
    refused = browser.execute_async_script(
        """const done = arguments[0];
        const script = document.createElement("script");
        script.textContent = "window.ran = 1";
        document.body.append(script);
        fetch("https://localhost:9/x").then(() => done("fetched"), () => done(window.ran));"""
    )
    assert refused is None
    logged = [entry["message"] for entry in browser.get_log("browser")]
    assert len([line for line in logged if "Content Security Policy" in line]) >= 2


def test_an_error_is_shown(page: Any) -> None:
    ask(page, "word " * 600, 8)
    assert all("have room for 512" in text for text in texts_of(page, ".wrong"))
    assert len(texts_of(page, ".wrong")) == 2
    page.get_log("browser")  # which notes the 400s
    find(page, "#clear").click()
    assert texts_of(page, ".mine") == []
    ask(page, PROMPT, 4)
    assert text_of(page, ".answer.sparse .text") == expected(PROMPT, 4)


def test_a_key_is_asked_for(browser: Any, locked: Running) -> None:
    visit(browser, locked.url)
    wait_for(lambda: bool(find(browser, "#key").is_displayed()))
    assert text_of(browser, "#facts") == "this server asks for a key"
    find(browser, "#key").send_keys("wrong", Keys.ENTER)
    wait_for(lambda: "missing or wrong" in text_of(browser, "#facts"))
    find(browser, "#key").send_keys(KEY, Keys.ENTER)
    wait_for(lambda: text_of(browser, "#model") == NAME)
    assert not find(browser, "#key").is_displayed()
    ask(browser, PROMPT, 8)
    assert text_of(browser, ".answer.sparse .text") == expected(PROMPT, 8)
    stored = browser.execute_script("return [localStorage.length, sessionStorage.length]")
    assert stored == [0, 0]
    assert KEY not in browser.page_source


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_it_can_be_read(page: Any, dark: bool, width: int) -> None:
    """Contrast of 4.5 at least, nothing beside the window."""
    media(page, dark=dark)
    resize(page, width)
    ask(page, PROMPT, 4)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    for selector in ("#model", "#facts", ".mine", ".text", ".speed", "h2", ".row label", "#send"):
        colours = page.execute_script(
            """const e = document.querySelector(arguments[0]);
            let behind = e;
            const clear = "rgba(0, 0, 0, 0)";
            while (getComputedStyle(behind).backgroundColor === clear && behind.parentElement)
              behind = behind.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];""",
            selector,
        )
        assert contrast(*colours) >= 4.5, (selector, colours)


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)
