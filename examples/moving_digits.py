"""Next-frame prediction of handwritten digits that move and bounce, with ``wmkernels.nn.ConvLSTM``.

    pip install -e '.[examples]'
    python examples/moving_digits.py                       # writes moving_digits.png
    python examples/moving_digits.py --steps 2000          # longer, sharper

Each sequence has two 8x8 digits at random positions and velocities (Srivastava et al. 2015, arXiv 1502.04681); test
digits are held out. Baselines: persistence, and a plain ConvLSTM of the same size and training. The picture shows
open-loop predictions after the context.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wmkernels

SIZE, DIGIT, DIGITS = 20, 8, 2  # sides in pixels; digits per frame
TEST_INTERVAL = 5  # every fifth image
State = Any


def load_digits() -> tuple[Tensor, Tensor]:
    """Training and test images, (count, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits as images

    digits = torch.from_numpy(images().images).float() / 16
    test = torch.arange(len(digits)) % TEST_INTERVAL == 0
    return digits[~test], digits[test]


def moving(images: Tensor, count: int, time_steps: int, generator: torch.Generator) -> Tensor:
    """Sequences (time, count, 1, SIZE, SIZE) of bouncing digits."""
    room = SIZE - DIGIT
    which = torch.randint(len(images), (count, DIGITS), generator=generator)
    position = room * torch.rand((count, DIGITS, 2), generator=generator)
    velocity = 1.0 + 1.5 * torch.rand((count, DIGITS, 2), generator=generator)
    velocity *= torch.where(torch.rand((count, DIGITS, 2), generator=generator) < 0.5, -1.0, 1.0)
    steps = torch.arange(time_steps).view(-1, 1, 1, 1)
    # The unfolded path is straight, with period 2 * room.
    unfolded = (position + velocity * steps) % (2 * room)
    corners = torch.where(unfolded > room, 2 * room - unfolded, unfolded).round().long()
    frames = torch.zeros(time_steps, count, 1, SIZE, SIZE)
    for t in range(time_steps):
        for b in range(count):
            for d in range(DIGITS):
                top, left = corners[t, b, d].tolist()
                window = frames[t, b, 0, top : top + DIGIT, left : left + DIGIT]
                torch.maximum(window, images[which[b, d]], out=window)
    return frames


class PlainConvLSTM(nn.Module):
    """Concatenates x and h, with one convolution per step and gradients by autograd."""

    def __init__(self, input_size: int, hidden_size: int, kernel_size: int, num_layers: int):
        super().__init__()
        self.hidden_size = hidden_size
        inputs = [input_size, *[hidden_size] * (num_layers - 1)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(size + hidden_size, 4 * hidden_size, kernel_size, padding="same") for size in inputs
        )
        for convolution in self.convolutions:
            nn.init.ones_(convolution.bias[hidden_size : 2 * hidden_size])

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One frame (batch, input_size, height, width)."""
        if state is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size, *x.shape[-2:])
            state = [(zeros, zeros)] * len(self.convolutions)
        next_state = []
        for convolution, (h, c) in zip(self.convolutions, state, strict=True):
            i, f, g, o = convolution(torch.cat([x, h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(c)
            next_state.append((x, c))
        return x, next_state

    def forward(self, inputs: Tensor) -> tuple[Tensor, State]:
        """All frames (time, batch, input_size, height, width)."""
        outputs, state = [], None
        for x in inputs:
            output, state = self.step(x, state)
            outputs.append(output)
        return torch.stack(outputs), state


class Predictor(nn.Module):
    """A memory and a readout per pixel."""

    def __init__(self, memory: nn.Module, hidden_size: int):
        super().__init__()
        self.memory = memory
        self.readout = nn.Conv2d(hidden_size, 1, 1)
        # Starts dark, as most pixels are.
        nn.init.constant_(self.readout.bias, -3.0)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits of the next frames; ``frames``: (time, batch, 1, height, width)."""
        hidden, _ = self.memory(frames)
        return self.readout(hidden.flatten(0, 1)).unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def imagine(self, context: Tensor, count: int) -> Tensor:
        """``count`` open-loop frames after the context."""
        hidden, state = self.memory(context)
        frame = torch.sigmoid(self.readout(hidden[-1]))
        frames = [frame]
        for _ in range(count - 1):
            hidden, state = self.memory.step(frame, state)
            frame = torch.sigmoid(self.readout(hidden))
            frames.append(frame)
        return torch.stack(frames)


def train(model: Predictor, images: Tensor, options: argparse.Namespace) -> float:
    """Trains on the same new sequences for every model; returns the seconds without data generation."""
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.learning_rate, total_steps=options.steps)
    seconds = 0.0
    for step in range(options.steps):
        frames = moving(images, options.batch, options.frames, generator)
        start = time.perf_counter()
        loss = F.binary_cross_entropy_with_logits(model(frames[:-1]), frames[1:])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if step % max(1, options.steps // 5) == 0 or step == options.steps - 1:
            print(f"  step {step + 1:4d} of {options.steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    return seconds


@dataclass
class Score:
    """Mean squared error per pixel, one step ahead and open-loop."""

    name: str
    next_frame: float
    imagined: float
    seconds: float | None = None


@torch.no_grad()
def score(name: str, model: Predictor | None, frames: Tensor, context: int, seconds: float | None = None) -> Score:
    """Scores a model, or persistence if None, after the context."""
    target = frames[context:]
    if model is None:
        return Score(
            name, _error(frames[context - 1 : -1], target), _error(frames[context - 1].expand_as(target), target)
        )
    predicted = torch.sigmoid(model(frames[:-1]))[context - 1 :]
    return Score(name, _error(predicted, target), _error(model.imagine(frames[:context], len(target)), target), seconds)


def _error(predicted: Tensor, target: Tensor) -> float:
    return F.mse_loss(predicted, target).item()


def draw(path: Path, frames: Tensor, context: int, models: dict[str, Predictor]) -> None:
    """Writes the true frames and each model's predictions, one row each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frames = frames[:, :1]
    rows = {"context, then truth": frames[:, 0, 0]}
    for name, model in models.items():
        blank = torch.full((context, SIZE, SIZE), float("nan"))
        imagined = model.imagine(frames[:context], len(frames) - context)[:, 0, 0]
        rows[name] = torch.cat([blank, imagined])
    figure, axes = plt.subplots(len(rows), len(frames), figsize=(0.8 * len(frames), 0.9 * len(rows) + 0.3))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for number, (panel, picture) in enumerate(zip(line, pictures, strict=True)):
            panel.imshow(picture, cmap="gray", vmin=0, vmax=1)
            panel.set_axis_off()
            if number == 0:
                panel.set_title(name, loc="left", fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training, each on a new batch (400)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (4)")
    parser.add_argument("--frames", type=int, default=12, help="frames per sequence (12)")
    parser.add_argument("--context", type=int, default=6, help="frames observed before imagination (6)")
    parser.add_argument("--hidden", type=int, default=16, help="channels per layer (16)")
    parser.add_argument("--layers", type=int, default=2, help="layers (2)")
    parser.add_argument("--kernel", type=int, default=3, help="size of the convolutions, odd (3)")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="peak (0.01)")
    parser.add_argument("--backend", help="of wmkernels; default: the best that can run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("moving_digits.png"), help="output file")
    options = parser.parse_args(arguments)
    if not 1 <= options.context < options.frames:
        parser.error(f"--context is {options.context}, expected 1 to {options.frames - 1}: some frames must follow it")
    if min(options.steps, options.batch, options.hidden, options.layers) < 1:
        parser.error("--steps, --batch, --hidden and --layers must be positive")
    if options.kernel < 1 or options.kernel % 2 == 0:
        parser.error(f"--kernel is {options.kernel}, expected an odd number")
    return options


def main(arguments: Sequence[str] | None = None) -> list[Score]:
    """Trains both models, prints errors and writes the picture."""
    options = parse_arguments(arguments)
    train_images, test_images = load_digits()
    frames = moving(test_images, 64, options.frames, torch.Generator().manual_seed(options.seed + 1))
    sizes = (1, options.hidden, options.kernel, options.layers)
    scores, models = [score("persistence", None, frames, options.context)], {}
    constructors = {
        "wmkernels": lambda: wmkernels.nn.ConvLSTM(*sizes, backend=options.backend),
        "plain ConvLSTM": lambda: PlainConvLSTM(*sizes),
    }
    for name, construct in constructors.items():
        torch.manual_seed(options.seed)
        model = models[name] = Predictor(construct(), options.hidden)
        print(f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        seconds = train(model, train_images, options)
        scores.append(score(name, model, frames, options.context, seconds))
    print(f"\n{'mean squared error per pixel':28} next frame   imagined   training")
    for each in scores:
        seconds = "" if each.seconds is None else f"{each.seconds:7.0f} s"
        print(f"{each.name:28} {each.next_frame:10.4f} {each.imagined:10.4f}  {seconds}")
    draw(options.picture, frames, options.context, models)
    print(f"wrote {options.picture}")
    return scores


if __name__ == "__main__":
    main()
