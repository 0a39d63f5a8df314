"""The page of play in a headless Chromium, where Playwright and a Chromium are installed."""

import os
import shutil
import socket
import threading
import time

import numpy as np
import pytest
from worldmodel_play import Painted

from worldmodel.play.game import Game

sync_api = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture
def address(tmp_path, request):
    """Of a server in a thread of its own; the parameter is the number of agents, 1 without."""
    from worldmodel.play.server import Server

    listening = socket.create_server(("127.0.0.1", 0))
    app = Server(Game(Painted(bodies=getattr(request, "param", 1)), tmp_path / "world.npz")).app
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=[[listening]])
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser, address, **options):
    page = browser.new_context(**options).new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.goto(address)
    until(page, "worlds.length && worlds[0].held")
    return page


def until(page, condition):
    """Waits for a condition of the page, whose policy forbids Playwright's own way."""
    ends = time.monotonic() + 20
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < ends, f"it never came to {condition}"
        time.sleep(0.01)


def pixel(page, world, row, column):
    """Colour of a cell of a world's view."""
    script = f"[...worlds[{world}].view.getContext('2d').getImageData({column}, {row}, 1, 1).data].slice(0, 3)"
    return page.evaluate(script)


def test_a_held_key_moves_at_twenty_frames_a_second(browser, address):
    page = opened(browser, address)
    rates = []
    while len(rates) < 3 and max(rates, default=0) < 20:  # another process may take the time once
        page.keyboard.down("ArrowRight")
        time.sleep(0.3)  # after which it is held, and not tapped
        before, began = page.evaluate("Number(document.body.dataset.frames)"), time.perf_counter()
        time.sleep(1)
        frames = page.evaluate("Number(document.body.dataset.frames)") - before
        rates.append(frames / (time.perf_counter() - began))
        page.keyboard.up("ArrowRight")
    assert max(rates) >= 20
    step = page.evaluate("worlds[0].frame.steps")
    time.sleep(0.3)
    assert page.evaluate("worlds[0].frame.steps") <= step + 1, "it goes on after the key is up"
    page.keyboard.press("w")
    until(page, f"worlds[0].frame.steps > {step} && worlds[0].frame.heading === 0")
    assert page.wrong == []


def test_an_edit_a_fork_and_a_browser_that_goes_away(browser, address, tmp_path):
    page, path = opened(browser, address), tmp_path / "world.npz"
    page.click("#swatches button:nth-child(5)")
    box = page.locator("canvas.view").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.7)  # row 3, column 1
    until(page, "worlds[0].frame && !worlds[0].frame.saved")
    until(page, "worlds[0].view.getContext('2d').getImageData(1, 3, 1, 1).data[0] === 60")
    page.keyboard.press("Escape")
    page.click("#save")
    page.wait_for_selector("text=saved as world.npz")
    page.click("#fork")
    until(page, "worlds.length === 2 && worlds[1].held")
    assert pixel(page, 0, 3, 1) == pixel(page, 1, 3, 1) == [60, 60, 66]
    page.keyboard.press("ArrowDown")
    until(page, "worlds[1].frame.steps === 1")
    assert page.evaluate("worlds[0].frame.steps") == 0 and pixel(page, 1, 2, 1) == [60, 60, 66]
    page.check("#together")
    page.keyboard.press("ArrowDown")
    until(page, "worlds[0].frame.steps === 1 && worlds[1].frame.steps === 2")
    assert page.wrong == []
    page.keyboard.down("ArrowDown")
    page.context.close()
    saved = np.load(path)
    assert saved["cells"][6, 4] == 4 and saved["steps"] == 0 and os.listdir(tmp_path) == ["world.npz"]
    again = opened(browser, address)
    assert again.evaluate("worlds.length") == 2, "the game goes on for the next page"


@pytest.mark.parametrize("address", [2], indirect=True)
def test_each_of_two_bodies_is_shown_and_moved(browser, address):
    page = opened(browser, address)
    page.keyboard.press("ArrowRight")
    until(page, "worlds[0].frame.steps === 1")
    page.keyboard.press("b")
    until(page, "worlds[0].frame.body === 1 && worlds[0].frame.steps === 1")
    assert page.evaluate("worlds[0].frame.position") == [8, 5] and page.inner_text("#body") == "Body 2 of 2"
    page.keyboard.press("ArrowUp")
    until(page, "worlds[0].frame.steps === 2")
    page.click("#fork")
    until(page, "worlds.length === 2 && worlds[1].frame && worlds[1].frame.body === 1")
    page.click("#body")
    found = page.evaluate("worlds.map((world) => [world.frame.position, world.frame.body])")
    assert found == [[[5, 6], 0], [[5, 6], 0]] and page.wrong == []


def test_a_phone_has_all_of_it_in_its_width(browser, address):
    options = {"viewport": {"width": 375, "height": 700}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
    page = opened(browser, address, **options)
    page.tap("#moves .east")
    until(page, "worlds[0].frame.steps === 1 && worlds[0].frame.position[1] === 6")
    assert page.is_hidden("#body"), "there is one body"
    page.tap("#fork")
    until(page, "worlds.length === 2 && worlds[1].held")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    sizes = page.evaluate("[...document.querySelectorAll('#moves button')].map(b => b.getBoundingClientRect().height)")
    assert len(sizes) == 4 and min(sizes) >= 44
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = opened(browser, address).evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(23, 24, 27)" and light == "rgb(251, 250, 248)" and page.wrong == []
