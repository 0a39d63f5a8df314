import json

import laws
import pytest


def test_no_law_is_lost(request: pytest.FixtureRequest) -> None:
    """Every law × op × backend, planted error and bad input of the list is collected.

    Remove renamed or obsolete tests from the list by ``python tests/laws.py --write``.
    """
    listed = json.loads(laws.LIST.read_text())
    config = request.config
    whole = config.args_source != pytest.Config.ArgsSource.ARGS or hasattr(config, "workerinput")
    here = laws.lists(config.stash[laws.EVERY_TEST])
    found = here if whole and len(here["laws"]) >= len(listed["laws"]) else laws.collect(laws.ROOT)
    missing = laws.lost(listed, found)
    assert not missing, "\n".join([*missing, "are gone: see this test's description"])


def test_a_lost_row_is_seen_and_what_this_machine_lacks_is_not() -> None:
    old = {"laws": [["a", "scan", "cpu"], ["b", "scan", "cuda"]], "planted": ["plant[1]"], "bad input": []}
    new = {"laws": [("c", "scan", "cpu")], "planted": [], "bad input": []}
    assert laws.lost(old, new) == ["a × scan × cpu", "planted: plant[1]"]
    assert laws.lost(old, {**new, "planted": ["plant[1]"]}, {"a × scan × cpu": "c × scan × cpu"}) == []
