"""The server of play: who may connect, and that pages come and go."""

import json

import numpy as np
import pytest
from worldmodel_play import Painted

from worldmodel.play.game import Game

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")
from starlette.datastructures import URL
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from worldmodel.play.server import MOST_COMMAND, Server, serve

HOME = "http://127.0.0.1:8710"


@pytest.fixture
def game(tmp_path):
    return Game(Painted(), tmp_path / "world.npz")


def client(game, token=None, base=HOME):
    return TestClient(Server(game, token).app, base_url=base)


def connected(web, query="", origin=None):
    address = str(web.base_url).replace("http", "ws", 1).rstrip("/")
    return web.websocket_connect(f"{address}/play{query}", headers={} if origin is None else {"origin": origin})


def received(socket, count):
    return [json.loads(socket.receive_text()) for _ in range(count)]


def test_the_page_needs_nothing_from_elsewhere(game):
    with client(game) as web:
        page = web.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
            assert f'"{name}"' in page.text and web.get(f"/{name}").headers["content-type"].startswith(kind)
        for text in (page.text, web.get("/page.css").text, web.get("/page.js").text):
            assert "http://" not in text and "https://" not in text
        assert web.get("/world.npz").status_code == 404


@pytest.mark.parametrize("token", [None, "secret"])
def test_a_host_header_names_no_file(game, token, tmp_path, monkeypatch):
    """Some versions of starlette put the Host header into the URL as it is."""
    (tmp_path / "other.css").write_text("other")
    url = URL(f"http://127.0.0.1/{tmp_path / 'other.css'}?/page.css")
    with client(game, token) as web:
        expected = web.get("/page.css").content
        monkeypatch.setattr(Request, "url", url)
        assert web.get("/page.css").content == expected


def test_commands_are_answered(game):
    with client(game) as web, connected(web, origin=HOME) as socket:
        hello, frame, held = received(socket, 3)
        assert [message["type"] for message in (hello, frame, held)] == ["hello", "frame", "map"]
        socket.send_text(json.dumps({"do": "act", "action": 1}))
        assert received(socket, 1)[0]["position"] == [5, 6]
        for bad, told in (
            ("{", "Expecting"),
            ("[" * 2000, ""),
            (json.dumps({"do": "act", "action": 7}), "action is 7"),
            (json.dumps({"do": "look", "more": "x" * MOST_COMMAND}), f"expected at most {MOST_COMMAND:,}"),
        ):
            socket.send_text(bad)
            (message,) = received(socket, 1)
            assert message["type"] == "said" and message["error"] and told in message["text"]
        socket.send_text(json.dumps({"do": "save"}))
        assert [message["type"] for message in received(socket, 2)] == ["frame", "said"]
        socket.send_bytes(b"no text")  # ends this connection alone
        with connected(web) as other:
            received(other, 3)
    assert np.load(game.paths[0])["steps"] == 1


def test_pages_see_the_same_world_and_one_that_leaves_changes_nothing(game):
    with client(game) as web, connected(web) as first:
        received(first, 3)
        with connected(web) as second:
            received(second, 3)
            second.send_text(json.dumps({"do": "fork"}))
            assert [message["type"] for message in received(first, 2)] == ["frame", "map"]
            second.send_text(json.dumps({"do": "save"}))
            second.send_text(json.dumps({"do": "act", "action": 2}))
        assert [message["type"] for message in received(first, 3)] == ["frame", "said", "frame"]
        first.send_text(json.dumps({"do": "act", "action": 2}))
        assert received(first, 1)[0]["position"] == [7, 5]
    assert np.load(game.paths[0])["steps"] == 0, "the world on disk is as it was saved, and whole"


@pytest.mark.parametrize(
    "address, origin",
    [
        (HOME, "http://example.org"),
        ("http://evil.example:8710", None),
        (HOME, "http://127.0.0.1:9999"),
        (HOME, "https://127.0.0.1:8710"),
    ],
)
def test_other_sites_are_refused(game, address, origin):
    with client(game, base=address) as web, pytest.raises(WebSocketDisconnect), connected(web, origin=origin):
        pass
    with client(game, base="http://evil.example:8710") as web:
        assert web.get("/").status_code == 403


def test_the_address_that_stands_for_all_is_said_as_one_to_open(game, monkeypatch):
    monkeypatch.setattr("worldmodel.play.server.uvicorn.Server.run", lambda self, sockets: None)
    said = []
    for host, token in (("0.0.0.0", True), ("127.0.0.1", False)):
        serve(game, host, 0, lambda text, flush: said.append(text))
        assert said[-1].startswith("http://127.0.0.1:") and ("?token=" in said[-1]) == token
    assert len(said) in (2, 3) and not any("0.0.0.0" in text for text in said)


def test_a_token_is_needed_where_there_is_one(game):
    address = "http://192.0.2.7:8710"
    with client(game, "secret", address) as web:
        assert web.get("/").status_code == web.get("/?token=secreT").status_code == 403
        assert "?token=" in web.get("/").text and web.get("/?token=secret").status_code == 200
        for query in ("", "?token=é"):
            with pytest.raises(WebSocketDisconnect), connected(web, query):
                pass
        with connected(web, "?token=secret", address) as socket:
            received(socket, 3)
