"""The page of a service, in a browser: drawing, keyboard alone, a phone, darkness, review, and what axe-core finds.

`SAFEREDIR_SCREENSHOTS=docs/pictures` writes the pictures that the docs show.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.served import Served, served

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
#: What axe-core calls grave.
GRAVE = ("serious", "critical")
SCREENS = {"desktop": (1280, 900, "light"), "dark": (1280, 900, "dark"), "phone": (390, 844, "light")}
#: Milliseconds.
DRAWN = 60_000
REVIEWER = "a reviewer's key"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = {"page": True, "page_unprotected": True, "review_key": REVIEWER, "keep_prompts": True, "threads": 1}
    with served(tmp_path_factory.mktemp("page"), **settings) as own:
        yield own


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(params=SCREENS)
def page(request: pytest.FixtureRequest, browser: Any, service: Served) -> Iterator[Any]:
    width, height, scheme = SCREENS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    own = context.new_page()
    own.screen, own.troubles = request.param, []
    own.on("pageerror", lambda error: own.troubles.append(str(error)))
    own.on("request", lambda asked: asked.url.startswith((service.address, "data:")) or own.troubles.append(asked.url))
    own.goto(service.address)
    own.wait_for_function("document.getElementById('sampler').options.length > 0")
    yield own
    context.close()
    assert own.troubles == []  # neither errors nor anything from elsewhere


def drawn(page: Any) -> None:
    page.wait_for_function("document.getElementById('said').textContent === 'done'", timeout=DRAWN)


def shot(page: Any, name: str) -> None:
    if folder := os.environ.get("SAFEREDIR_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}-{page.screen}.png", full_page=True)


def check_access(page: Any) -> None:
    found = axe.Axe().run(page).response["violations"]
    grave = [(own["id"], [node["html"] for node in own["nodes"]]) for own in found if own["impact"] in GRAVE]
    assert grave == []


def test_a_picture_is_drawn_step_by_step_with_what_was_seen_and_done(page: Any) -> None:
    page.fill("#steps", "8")
    page.fill("#seed", "7")
    page.check("#plain")
    page.click("#go")
    drawn(page)
    card = page.locator("#cards article").first
    assert card.locator("img").count() == 2
    assert "church" in card.text_content() and "house" in card.text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    check_access(page)
    shot(page, "drawn")


def test_a_reviewer_finds_a_record_and_draws_it_again(page: Any) -> None:
    page.fill("#steps", "4")
    page.click("#go")
    drawn(page)
    page.click("#tab-review")
    page.fill("#review-key", REVIEWER)
    page.click("#filter button")
    page.locator("#records tbody tr").first.wait_for()
    page.locator("#records tbody tr button").first.click()
    page.locator("#record .buttons button").first.click()
    page.wait_for_function("document.querySelector('#record .note').textContent !== 'drawing'", timeout=DRAWN)
    assert "same" in page.text_content("#record .note") or "equal" in page.text_content("#record .note")
    check_access(page)
    shot(page, "reviewed")


def test_a_wrong_key_shows_nothing(page: Any) -> None:
    page.click("#tab-review")
    page.fill("#review-key", "another")
    page.click("#filter button")
    page.wait_for_function("document.getElementById('reviewed').textContent !== ''")
    assert page.locator("#records tbody tr").count() == 0


def test_everything_is_reached_by_keyboard(page: Any) -> None:
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "go":
            break
    assert {"tab-draw", "prompt", "negative", "steps", "guidance", "sampler", "seed", "go"} <= set(reached)
    page.fill("#steps", "4")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    drawn(page)
    page.focus("#tab-draw")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-review"
    assert page.is_visible("#review")


def test_what_is_planted_is_found(page: Any) -> None:
    page.evaluate("document.querySelector('main').append(document.createElement('input'))")  # a field without a label
    with pytest.raises(AssertionError, match="label"):
        check_access(page)
