"""One memory of ``demo memory``.

python -m worldmodel.demo.worker {train,continue} FOLDER MEMORY SEED SECONDS STEPS
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldmodel.data.batch import State
from worldmodel.demo.repeat_previous import DECK, LAG, Answerer, deal, first_step, one_hot
from worldmodel.model.blocks import GatedConvBlock, GRUBlock
from worldmodel.model.memory import MemoryConfig
from worldmodel.runs import storage

MEMORIES = {
    "scan": MemoryConfig(),
    "GRU": MemoryConfig(width=128, blocks=(GRUBlock(),)),
    "no memory": MemoryConfig(blocks=(GatedConvBlock(d_conv=1),)),
}
STREAMS = 4
_EPISODES = 32  # per update
_CHUNK = 4096  # steps per call of the memory
_RATE = 5e-3
_GOOD = 3e-3  # loss that ends training


def train(folder: Path, name: str, seed: int, seconds: float, steps: int) -> None:
    """Trains on 103-step episodes, plays one per stream, saves weights and states."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Answerer(MEMORIES[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE, betas=(0.9, 0.98))
    start = said = time.perf_counter()
    loss, updates = float("inf"), 0
    while time.perf_counter() - start < seconds and loss > _GOOD:
        optimizer.param_groups[0]["lr"] = _RATE * min(1.0, (updates + 1) / 50)
        error = model.loss(deal(_EPISODES, DECK, random))
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        updates += 1
        loss = error.item() if updates == 1 else 0.9 * loss + 0.1 * error.item()
        if time.perf_counter() - said > 10:
            said = time.perf_counter()
            print(f"{name}: {said - start:.0f} s of training, loss {loss:.3f}", file=sys.stderr, flush=True)
    spent = time.perf_counter() - start
    cards = _stream(seed, steps)[:, :DECK]
    with torch.no_grad():
        q, state = model(one_hot(cards), None, first_step(cards))
    right = q.argmax(-1)[:, LAG:] == cards[:, : DECK - LAG]
    storage.save(
        folder / f"{file_name(name)}.safetensors",
        {"model": model.state_dict(), "state": state, "right": right, "seconds": spent, "updates": updates},
    )
    accuracy = right.float().mean().item()
    print(f"{name}: trained for {spent:.0f} s, {accuracy:.3f} right; state saved", file=sys.stderr, flush=True)


def go_on(folder: Path, name: str, seed: int, seconds: float, steps: int) -> None:
    """Continues from the saved states to ``steps``, and writes the results."""
    saved = storage.load(folder / f"{file_name(name)}.safetensors")
    model = Answerer(MEMORIES[name])
    model.load_state_dict(saved["model"])
    cards = _stream(seed, steps)
    state, right = saved["state"], [saved["right"]]
    start = time.perf_counter()
    for first in range(DECK, steps, _CHUNK):
        piece = cards[:, first : first + _CHUNK]
        with torch.no_grad():
            q, state = model(one_hot(piece), state)
        right.append(q.argmax(-1) == cards[:, first - LAG : first - LAG + piece.shape[1]])
    answered = torch.cat(right, 1)  # (streams, steps - LAG)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "memory": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_numbers": sum(value[0].numel() for value in state.values()),
        "training_seconds": saved["seconds"],
        "updates": saved["updates"],
        "steps": steps,
        "microseconds_a_step": 1e6 * seconds / (steps - DECK),
        "accuracy_by_time": _by_time(answered),
        "accuracy_in_training_length": answered[:, : DECK - LAG].float().mean().item(),
        "accuracy_beyond": answered[:, DECK - LAG :].float().mean().item(),
        "sensitivity": _sensitivity(model, cards[:1, :DECK]).tolist(),
        "swap": _swap(model, cards, state),
    }
    (folder / f"{file_name(name)}.json").write_text(json.dumps(result))
    reached = f"{result['accuracy_beyond']:.4f} right from step {DECK:,} to {steps:,}"
    print(f"{name}: a new process went on, {reached}, in {seconds:.0f} s", file=sys.stderr, flush=True)


def _stream(seed: int, steps: int) -> Tensor:
    """The same cards in both processes."""
    return deal(STREAMS, steps, torch.Generator().manual_seed(seed + 1))


def _by_time(answered: Tensor) -> list[tuple[int, int, float]]:
    """(first step, last step, accuracy), four intervals per doubling of time."""
    edges = [LAG]
    while edges[-1] < LAG + answered.shape[1]:
        edges.append(min(LAG + answered.shape[1], max(edges[-1] + 8, round(edges[-1] * 2**0.25))))
    stretches = itertools.pairwise(edges)
    return [(low, high, answered[:, low - LAG : high - LAG].float().mean().item()) for low, high in stretches]


def _sensitivity(model: Answerer, cards: Tensor) -> Tensor:
    """|∂Q_t/∂o_s| of the best answer, (t, s)."""
    time_steps = cards.shape[1]
    # One copy per t, so that one backward pass gives all rows.
    seen = one_hot(cards.expand(time_steps, -1)).requires_grad_()
    q, _ = model(seen, None, first_step(cards).expand(time_steps, -1))
    index = torch.arange(time_steps)
    q[index, index].amax(-1).sum().backward()
    assert seen.grad is not None
    return seen.grad.norm(dim=-1)


def _swap(model: Answerer, cards: Tensor, state: State) -> dict[str, Any]:
    """Swaps the states of two streams, and counts the ``LAG`` answers about earlier cards."""
    following = cards[:1, :LAG].expand(2, -1)
    exchanged = {name: value[:2].flip(0) for name, value in state.items()}
    with torch.no_grad():
        q, _ = model(one_hot(following), exchanged)
    answers, past = q.argmax(-1), cards[:2, -LAG:]  # (2, LAG)
    return {
        "past": past.tolist(),
        "answers": answers.tolist(),
        "as_the_state_says": (answers == past.flip(0)).float().mean().item(),
        "as_the_stream_says": (answers == past).float().mean().item(),
    }


def file_name(name: str) -> str:
    """Without spaces."""
    return name.lower().replace(" ", "_")


def main(arguments: list[str]) -> None:
    """Runs one phase of one memory."""
    phase, folder, name, seed, seconds, steps = arguments
    torch.set_num_threads(1)
    {"train": train, "continue": go_on}[phase](Path(folder), name, int(seed), float(seconds), int(steps))


if __name__ == "__main__":
    main(sys.argv[1:])
