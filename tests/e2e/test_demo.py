import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from worldmodel.__main__ import main
from worldmodel.demo import command, worker
from worldmodel.demo.repeat_previous import DECK, LAG, SUITS, Answerer, deal, first_step, one_hot
from worldmodel.demo.worker import MEMORIES
from worldmodel.model.blocks import GatedConvBlock
from worldmodel.model.memory import MemoryConfig
from worldmodel.runs import storage

ROOT = Path(__file__).resolve().parents[2]


def test_the_cards_are_those_of_popgym() -> None:
    popgym = pytest.importorskip("popgym")
    environment = popgym.envs.RepeatPreviousMedium()
    seen, rewards = [environment.reset(seed=0)[0]], []
    ended = False
    while not ended:
        # The correct action.
        right = seen[-1 - LAG] if len(seen) > LAG else 0
        observation, reward, ended, _, _ = environment.step(right)
        rewards.append(reward)
        seen.append(observation)
    assert len(seen) == DECK and environment.action_space.n == SUITS
    assert sum(rewards) == pytest.approx(1) and min(rewards) >= 0
    dealt = deal(3, 2 * DECK, torch.Generator().manual_seed(0))
    for deck in dealt.split(DECK, 1):
        assert [row.bincount().tolist() for row in deck] == [[DECK // SUITS] * SUITS] * 3
    assert torch.tensor(seen).bincount().tolist() == [DECK // SUITS] * SUITS


def test_an_oracle_has_no_loss_and_the_loss_asks_for_the_card_of_the_lag() -> None:
    cards = deal(2, DECK, torch.Generator().manual_seed(0))
    model = Answerer(MemoryConfig(width=8, blocks=(GatedConvBlock(d_conv=1),)))

    def oracle(seen: torch.Tensor, state: Any, reset: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return 2 * seen.roll(LAG, 1) - 1, {}

    model.forward = oracle  # type: ignore[method-assign]
    assert model.loss(cards).item() == 0
    assert model.loss(cards.roll(1, 1)).item() == 0


def test_the_demo_goes_on_in_another_process_as_one_process_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 3 * DECK

    def run_all(phase: str, options: command.MemoryDemoOptions) -> None:
        tail = [str(options.seed), str(options.seconds), str(options.steps)]
        for name in MEMORIES:
            arguments = [phase, str(options.folder), name, *tail]
            if (phase, name) == ("continue", "scan"):
                command = [sys.executable, "-m", "worldmodel.demo.worker", *arguments]
                subprocess.run(command, check=True, timeout=200, capture_output=True)
            else:
                worker.main(arguments)

    # One real process suffices as a check; six start slowly.
    monkeypatch.setattr(command, "_run_all", run_all)
    assert main(["demo", "memory", "--folder", str(tmp_path), "--steps", str(steps), "--seconds", "0.2"]) == 0
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "memory.json").read_text())
    assert [result["memory"] for result in found["memories"]] == list(MEMORIES)
    for result in found["memories"]:
        saved = storage.load(tmp_path / f"{worker.file_name(result['memory'])}.safetensors")
        model = Answerer(MEMORIES[result["memory"]])
        model.load_state_dict(saved["model"])
        cards = deal(worker.STREAMS, steps, torch.Generator().manual_seed(1))
        with torch.no_grad():
            q, _ = model(one_hot(cards), None, first_step(cards))
        right = (q.argmax(-1)[:, LAG:] == cards[:, :-LAG]).float()
        # Nearly untrained, two values are often almost equal.
        assert right[:, DECK - LAG :].mean().item() == pytest.approx(result["accuracy_beyond"], abs=0.01)
        low, high, _ = result["accuracy_by_time"][0]
        assert (low, result["accuracy_by_time"][-1][1]) == (LAG, steps) and high > low
        sensitivity = torch.tensor(result["sensitivity"])
        assert sensitivity.shape == (DECK, DECK)
        assert sensitivity.triu(1).abs().max() == 0  # causal
    assert torch.tensor(found["memories"][-1]["sensitivity"]).tril(-1).abs().max() == 0  # no recurrence


def test_a_process_of_the_demo_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(command.DemoFailed, match="continue of 'scan' ended with exit status 1"):
        command._run_all("continue", command.MemoryDemoOptions(folder=tmp_path / "missing", processes=1))
