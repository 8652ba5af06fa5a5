"""The page in a real browser: headless Chromium, driven by playwright; skipped where there is none.

Debian: apt-get install chromium fonts-noto-color-emoji
"""
import io
import re
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from autoregressive.serve.page import Page
from autoregressive.serve.page_server import web_app
from autoregressive.serve.page_style import PAINT
from autoregressive.serve.protocol import Job, OverloadedError, UnavailableError
from tests.autoregressive.serve.coloured import COLOURS, GREY, PROMPTED, ColouredBackend
from tests.autoregressive.serve.serving import served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.processes, pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")]
PATIENCE = 60_000  # milliseconds: for machines that do much else
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, the same for all tests."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def place():
    """A backend and the address of its page."""
    pytest.importorskip("gradio")
    backend = ColouredBackend()
    with served(web_app(Page(backend))) as url:
        yield backend, url


class Tab:
    """A tab with the page, and what it asked of other hosts."""

    def __init__(self, context, url: str) -> None:
        self.page, self.foreign, self.errors = context.new_page(), [], []
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self.foreign.append(request.url) if not request.url.startswith(
            (url, "data:", "blob:")) else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.wait("draw", r"3 pictures in")  # the examples of the first visit

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something outside of the page, while the page goes on."""
        for _ in range(PATIENCE // 20):
            if condition():
                return
            self.page.wait_for_timeout(20)
        raise AssertionError("waited in vain")

    def drawn(self, backend: ColouredBackend, kind: str = "draw") -> Job:
        """Draw, and wait for the pictures; what was asked of the backend."""
        before = len(backend.jobs)
        self.page.click(f"#{kind}")
        self.until(lambda: len(backend.jobs) > before)
        job = backend.jobs[-1]
        self.wait(kind, rf"\d+ pictures? in [\d.]+ s · seed {job.seed}")
        self.page.locator(f"#{kind}:not(:disabled)").wait_for()
        return job

    def wait(self, kind: str, words: str) -> None:
        self.page.locator(f"#{kind}-status", has_text=re.compile(words)).wait_for()

    def said(self, words: str) -> None:
        """Wait for an error message, and put it away."""
        message = self.page.get_by_test_id("toast-body").filter(has_text=re.compile(words))
        message.first.wait_for()
        assert len([line for line in message.first.inner_text().splitlines() if line not in ("", "×", "Error")]) == 1
        message.first.get_by_test_id("toast-close").click()

    def set(self, control: str, value) -> None:
        box = self.page.locator(f"#{control} input[type=number]")
        box.fill(str(value))
        box.press("Tab")

    def choose(self, control: str, option: str) -> None:
        self.page.locator(f"#{control} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def pictures(self, kind: str, count: int) -> list[np.ndarray]:
        """What the gallery shows, as the files that it would download."""
        self.until(lambda: self.page.locator(f"#{kind}-pictures .thumbnail-item img").count() == count)
        sources = self.page.locator(f"#{kind}-pictures .thumbnail-item img").evaluate_all("all => all.map(i => i.src)")
        contents = [self.page.request.get(source).body() for source in sources]
        assert all(content.startswith(b"\x89PNG") for content in contents)
        return [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]

    def paint(self) -> None:
        """A stroke over the middle of the picture."""
        canvas = self.page.locator("#canvas canvas").first
        canvas.scroll_into_view_if_needed()
        self.page.locator("#canvas:not(.empty)").wait_for()
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 25, y)
        self.page.mouse.down()
        self.page.mouse.move(x + 25, y, steps=6)
        self.page.mouse.up()
        self.until(self.paint_shows)

    def paint_shows(self) -> bool:
        pixels = np.asarray(Image.open(io.BytesIO(self.page.locator("#canvas").screenshot())).convert("RGB"))
        return (pixels == tuple(bytes.fromhex(PAINT.removeprefix("#")))).all(2).sum() > 1000


@pytest.fixture
def open_tab(browser, place):
    """Opens tabs with the page; afterwards no other host was asked, no script failed, nothing is drawn any more."""
    backend, url = place
    backend.error, backend.good, backend.held = None, 0, False
    contexts, tabs = [], []

    def opened(viewport=DESKTOP, **given) -> Tab:
        contexts.append(browser.new_context(viewport=viewport, **given))
        tabs.append(Tab(contexts[-1], url))
        return tabs[-1]

    yield opened
    backend.held = False
    assert not [url for tab in tabs for url in tab.foreign]
    assert not [error for tab in tabs for error in tab.errors]
    for context in contexts:
        context.close()


def colours(pictures: list[np.ndarray]) -> list[tuple[int, ...]]:
    """The colours of pictures of one colour each."""
    assert all((picture == picture[0, 0]).all() for picture in pictures)
    return [tuple(map(int, picture[0, 0])) for picture in pictures]


def test_pictures_appear_while_they_are_drawn_and_can_be_stopped(open_tab, place):
    tab, backend = open_tab(), place[0]
    assert colours(tab.pictures("draw", 3)) == list(COLOURS[:3])
    tab.set("count", 2)
    backend.held, backend.good = True, 9
    tab.page.click("#draw")
    tab.wait("draw", r"0 of 2 pictures, 16 of 32 codes · seed \d+")
    upper, lower = tab.pictures("draw", 2)[1][:8], tab.pictures("draw", 2)[1][8:]
    assert (upper == COLOURS[0]).all() and (lower == GREY).all()
    backend.held = False
    tab.wait("draw", r"^\s*2 pictures in [\d.]+ s · seed \d+")
    assert colours(tab.pictures("draw", 2)) == [COLOURS[0]] * 2
    assert tab.page.locator("#draw-pictures img").first.evaluate("i => getComputedStyle(i).imageRendering") == \
        "pixelated"

    backend.held = True
    tab.page.click("#draw")
    tab.wait("draw", "16 of 32 codes")
    tab.page.click("#draw-stop")
    tab.wait("draw", r"stopped after 0 of 2 pictures, 16 of 32 codes · seed \d+")
    assert backend.open == 0 and tab.page.locator("#draw").is_enabled()


def test_the_seed_is_shown_and_used_again(open_tab, place):
    tab, backend = open_tab(), place[0]
    first, second = tab.drawn(backend), tab.drawn(backend)
    assert first.seed != second.seed == int(tab.page.locator("#seed input").input_value())
    tab.page.locator("#another input").uncheck()
    tab.set("seed", 1234)
    assert tab.drawn(backend).seed == 1234
    assert tab.drawn(backend).seed == 1234


def test_classes_by_name_and_number_prompts_and_what_a_model_takes(open_tab, place):
    tab, backend = open_tab(), place[0]
    tab.set("count", 1)
    for typed, colour in (("clocks", COLOURS[2]), ("1", COLOURS[1]), ("no class", COLOURS[3])):
        tab.page.locator("#class input").fill(typed)
        tab.page.locator("#class input").press("Enter")
        tab.drawn(backend)
        assert colours(tab.pictures("draw", 1)) == [colour]
    tab.page.locator("#class input").fill("cats")
    tab.page.locator("#class input").press("Enter")
    tab.page.click("#draw")
    tab.said("class 'cats' is unknown: choose from faces, flags, clocks")

    tab.page.get_by_text("Guidance and sampling").click()
    assert tab.page.locator("#steps").count() == 0 and tab.page.locator("#prompt").count() == 0
    tab.choose("model", "emoji-arpg")
    tab.page.locator("#steps").wait_for()
    tab.set("steps", 3)
    assert tab.page.locator("#cfg-scale input[type=number]").input_value() == "4"
    job = tab.drawn(backend)
    assert (job.model, job.steps, job.cfg_scale) == ("emoji-arpg", 3, 4.0)
    tab.choose("model", "emoji-text")
    tab.page.locator("#prompt textarea").fill("a <b>red</b> heart")
    assert tab.page.locator("#class").count() == 0
    assert tab.drawn(backend).condition == "a <b>red</b> heart" and colours(tab.pictures("draw", 1)) == [PROMPTED]


def test_a_painted_part_is_redrawn(open_tab, place, tmp_path):
    tab, backend = open_tab(), place[0]
    tab.choose("model", "emoji-arpg")
    tab.set("count", 3)
    tab.page.get_by_role("tab", name="Inpaint").click()
    tab.page.click("#redraw")
    tab.said("there is no picture: upload one, or take one that was drawn")
    tab.page.get_by_role("tab", name="Draw", exact=True).click()
    tab.page.locator("#draw-pictures .thumbnail-item").nth(1).click()
    tab.page.locator("#draw-pictures .preview").wait_for()
    tab.page.click("#draw-onward")
    tab.page.locator("#canvas:not(.empty)").wait_for()
    tab.page.click("#redraw")
    tab.said("nothing is painted: mark with the brush what is to be drawn anew")
    tab.paint()
    job = tab.drawn(backend, "redraw")
    assert (job.image == COLOURS[1]).all() and job.mask[8, 8] and not job.mask[0].any() and job.paste == 4
    assert 0 < job.mask.sum() < 128
    results = tab.pictures("redraw", 3)
    assert tuple(results[0][8, 8]) == COLOURS[0] and tuple(results[0][0, 0]) == COLOURS[1]

    tab.choose("model", "emoji-gpt")  # from the highest painted row on
    tab.page.locator("#edit-note", has_text="row by row").wait_for()
    job = tab.drawn(backend, "redraw")
    rows = job.mask.all(1)
    assert job.model == "emoji-gpt" and rows[-1] and (rows == job.mask.any(1)).all()
    assert not rows[:4].any()


def test_a_picture_of_ones_own_is_redrawn_and_what_is_none_is_refused(open_tab, place, tmp_path):
    tab, backend = open_tab(), place[0]
    tab.choose("model", "emoji-arpg")
    tab.page.get_by_role("tab", name="Inpaint").click()

    def upload(name: str) -> None:
        with tab.page.expect_file_chooser() as chooser:
            tab.page.click("#upload")
        chooser.value.set_files(tmp_path / name)

    for name, content in (("broken.png", b"\x89PNG\r\n\x1a\nnothing"), ("notes.jpg", b"not a picture")):
        (tmp_path / name).write_bytes(content)
        upload(name)
        tab.said(re.escape(name))
    Image.new("RGB", (90, 60), (10, 200, 200)).save(tmp_path / "mine.png")
    upload("mine.png")
    tab.page.locator("#canvas:not(.empty)").wait_for()
    tab.paint()
    job = tab.drawn(backend, "redraw")
    assert (job.image == (10, 200, 200)).all() and job.mask.any()
    tab.page.click("#clear")
    tab.until(lambda: not tab.paint_shows())
    tab.page.click("#redraw")
    tab.said("nothing is painted")


def test_a_server_that_is_gone_or_has_too_much_to_do_is_told_in_a_line(open_tab, place):
    tab, backend = open_tab(), place[0]
    for error, words in ((OverloadedError("300 pictures are waiting: try again", seconds=5), "300 pictures"),
                         (UnavailableError("the server does not answer: is it running?"), "is it running")):
        backend.error, backend.good = error, 6
        tab.page.click("#draw")
        tab.said(words)
        tab.wait("draw", "stopped after 0 of 8 pictures")
        assert tab.page.locator("#draw").is_enabled()
    backend.error = None
    tab.page.click("#draw")
    tab.wait("draw", "8 pictures in")


def test_two_tabs_draw_at_once_and_a_closed_one_gives_its_places_back(open_tab, place):
    backend, tabs = place[0], [open_tab(), open_tab()]
    backend.held, backend.good = True, 5
    for tab, name in zip(tabs, ("flags", "clocks"), strict=True):
        tab.choose("class", name)
        tab.page.click("#draw")
    for tab in tabs:
        tab.wait("draw", "32 of 128 codes")
    assert backend.open == 2
    tabs[0].page.close()
    tabs[1].until(lambda: backend.open == 1)
    backend.held = False
    tabs[1].wait("draw", "8 pictures in")
    assert colours(tabs[1].pictures("draw", 8)) == [COLOURS[2]] * 8


def test_on_a_phone_nothing_is_wider_than_the_window(open_tab):
    tab = open_tab(PHONE, has_touch=True, is_mobile=True)

    def fits() -> bool:
        return tab.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")

    assert fits()
    tab.page.get_by_text("Guidance and sampling").tap()
    tab.page.locator("#temperature").wait_for()
    tab.page.locator("#draw").tap()
    tab.wait("draw", "8 pictures in")
    assert fits()
    first, last = (tab.page.locator("#draw-pictures .thumbnail-item").nth(i).bounding_box() for i in (0, 2))
    assert first["x"] >= 0 and last["x"] + last["width"] <= PHONE["width"]
    tab.page.locator("#draw-onward").tap()
    tab.paint()
    tab.page.locator("#redraw").tap()
    tab.wait("redraw", "8 pictures in")
    assert fits()
