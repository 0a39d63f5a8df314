"""A film of play: a headless Chromium walks through a world, edits it and forks it.

    python scripts/play_film.py WORLD|RUN film.gif

needs Chromium, Playwright and what `python -m worldmodel play` needs. The world's file is left as it was.
"""

import argparse
import io
import shutil
import socket
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from worldmodel.play.game import Game
from worldmodel.play.server import Server
from worldmodel.play.worlds import create, load

STEP, LOOK = 160, 900  # milliseconds that a frame is shown: of a step, and of what is to be looked at
BACK = {"ArrowUp": "ArrowDown", "ArrowDown": "ArrowUp", "ArrowLeft": "ArrowRight", "ArrowRight": "ArrowLeft"}
AROUND = ["ArrowRight"] * 4 + ["ArrowDown"] * 4 + ["ArrowLeft"] * 5 + ["ArrowUp"] * 3
AWAY = ["ArrowDown", "ArrowRight"] * 4
OWN_WAY = ["ArrowUp", "ArrowLeft"] * 4


class Film:
    """A frame per step, however long the browser takes for it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.pictures: list[Image.Image] = []
        self.shown: list[int] = []  # milliseconds

    def shoot(self, milliseconds: int = STEP) -> None:
        picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        self.pictures.append(picture.quantize(128, dither=Image.Dither.NONE))
        self.shown.append(milliseconds)

    def until(self, condition: str) -> None:
        """Waits for a condition of the page, whose policy forbids Playwright's own way."""
        while not self.page.evaluate(f"Boolean({condition})"):
            time.sleep(0.02)

    def press(self, key: str, world: int) -> bool:
        """A step; whether it led elsewhere."""
        before = self.page.evaluate(f"[worlds[{world}].frame.steps, ...worlds[{world}].frame.position]")
        self.page.keyboard.press(key)
        self.until(f"worlds[{world}].frame.steps > {before[0]}")
        self.until(f"String(worlds[{world}].held.positions[0]) === String(worlds[{world}].frame.position)")
        self.shoot()
        return bool(self.page.evaluate(f"worlds[{world}].frame.position") != before[1:])

    def click(self, element: str, x: float = 0.5, y: float = 0.5) -> None:
        """At a share of the element's width and height."""
        box = self.page.locator(element).first.bounding_box()
        self.page.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)

    def walk(self) -> None:
        """Around, an edit, away and back to it, then a fork that is edited and goes its own way."""
        self.page.evaluate("$('status').hidden = true")  # how fast it is filmed says nothing of how fast it is
        self.shoot(LOOK)
        for key in AROUND:
            self.press(key, 0)
        self.click("#swatches button:nth-child(8)")
        self.shoot(LOOK)
        self.click("canvas.view", 0.5, 0.3)  # the place above
        self.until("!worlds[0].frame.saved")
        time.sleep(0.5)
        self.shoot(LOOK)
        self.page.keyboard.press("Escape")
        gone = [key for key in AWAY if self.press(key, 0)]
        for key in reversed(gone):
            self.press(BACK[key], 0)
        self.shoot(LOOK)
        self.click("#fork")
        self.until("worlds.length === 2 && worlds[1].held")
        self.shoot(LOOK)
        for key in OWN_WAY:
            self.press(key, 1)
        self.click("#gaps")
        self.shoot(2 * LOOK)

    def write(self, target: Path) -> None:
        first, *others = self.pictures
        first.save(target, save_all=True, append_images=others, duration=self.shown, loop=0, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path)
    parser.add_argument("film", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listening:
        world = create(options.world, 0) if options.world.is_dir() else load(options.world)
        app = Server(Game(world, Path(folder) / "world.safetensors")).app
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        try:
            with sync_playwright() as playwright:
                path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
                browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 520, "height": 850})
                page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
                page.wait_for_selector("canvas.map")
                time.sleep(1)
                film = Film(page)
                film.walk()
                film.write(options.film)
                browser.close()
        finally:
            server.should_exit = True
            thread.join()
    print(options.film)


if __name__ == "__main__":
    main()
