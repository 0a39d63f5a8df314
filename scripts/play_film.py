"""A film of play: a headless Chromium walks through a world, edits it and forks it.

    python scripts/play_film.py WORLD|RUN film.gif

needs Chromium, Playwright, imageio and what `python -m worldmodel play` needs. The world's file is left as it was.
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

import imageio.v3 as imageio
import numpy as np
import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from worldmodel.play.game import Game
from worldmodel.play.server import Server
from worldmodel.play.worlds import create, load

FRAMES_PER_SECOND = 8
# (key or element, seconds): a walk, an edit, a walk away and back, a fork that walks its own way.
ROUTE: list[tuple[str, float]] = [
    *[("ArrowRight", 0.5), ("ArrowDown", 0.5), ("ArrowLeft", 0.5), ("ArrowUp", 0.5)],
    *[("#swatches button:nth-child(4)", 0.4), ("canvas.view", 0.6), ("Escape", 0.1)],
    *[("ArrowDown", 1.0), ("ArrowUp", 1.0), ("#fork", 0.6), ("ArrowRight", 1.0), ("ArrowUp", 0.6), ("#gaps", 1.0)],
]


def film(page: Any, target: Path) -> None:
    """Walks ``ROUTE`` and writes what the page shows."""
    pictures: list[np.ndarray] = []

    def shoot(seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            began = time.monotonic()
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            pictures.append(np.asarray(picture.resize((picture.width // 2, picture.height // 2))))
            time.sleep(max(0, 1 / FRAMES_PER_SECOND - (time.monotonic() - began)))

    shoot(0.5)
    for what, seconds in ROUTE:
        if what.startswith(("#", "canvas")):
            box = page.locator(what).first.bounding_box()
            page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.3)
            shoot(seconds)
        else:
            page.keyboard.down(what)
            shoot(seconds)
            page.keyboard.up(what)
    imageio.imwrite(target, pictures, duration=1000 // FRAMES_PER_SECOND, loop=0)


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
                page = browser.new_page(viewport={"width": 800, "height": 1000})
                page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
                page.wait_for_selector("canvas.map")
                time.sleep(1)
                film(page, options.film)
                browser.close()
        finally:
            server.should_exit = True
            thread.join()
    print(options.film)


if __name__ == "__main__":
    main()
