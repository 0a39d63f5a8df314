"""Speed of models of Hugging Face transformers on these kernels and without them, on a CPU.

    python benchmarks/models.py             # writes benchmarks/results/local/models_cpu.json
    python benchmarks/models.py --publish   # writes benchmarks/results/models_cpu.json
    python benchmarks/models.py --quick

Random weights of 2 layers × 768, float32, batch 1, 512 steps; Jamba has a layer of attention, too. Before and after are
measured in one run; a training step of the library that takes a minute runs once. A row is written as soon as it is
measured, and a run that was stopped goes on after it: remove the file to measure anew. What would be possible is the
same model with kernels that return at once.
"""

import argparse
import contextlib
import importlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import wmkernels.integrations.transformers as kernels
from harness import environment, result_file, tables
from wmkernels.integrations.transformers import functions

VOCABULARY, NEW_TOKENS, REPEATS = 1000, 50, 7
REPEATED_SECONDS = 10.0  # the library's own training step may take a minute, and runs once then
MAMBA = {"state_size": 16, "num_hidden_layers": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", MAMBA),
    "falcon_mamba": ("FalconMamba", MAMBA),
    "mamba2": ("Mamba2", {"num_hidden_layers": 2, "state_size": 128, "n_groups": 1}),
    "jamba": (
        "Jamba",
        {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 1}
        | {"num_experts_per_tok": 1, "num_attention_heads": 12, "num_key_value_heads": 12},
    ),
}
# measure -> (least, aim), by model: times as fast, and shares of what is possible
TARGETS: dict[str, dict[str, tuple[float, float]]] = {
    "training": {"mamba": (150, 250), "falcon_mamba": (150, 250), "mamba2": (3.5, 4.5), "jamba": (50, 100)},
    "forward": dict.fromkeys(FAMILIES, (0.8, 0.95)),
    "generation": dict.fromkeys(FAMILIES, (0.97, 1.0)),
}
HEADER = ("model", "measure", "before: ms", "after: ms", "times as fast", "% of what is possible", "error", "target")


class Sizes(NamedTuple):
    hidden: int
    steps: int
    prompt: int
    new_tokens: int
    repeats: int


FULL, QUICK = Sizes(768, 512, 16, NEW_TOKENS, REPEATS), Sizes(48, 12, 4, 3, 1)


def build(name: str, sizes: Sizes) -> Any:
    prefix, settings = FAMILIES[name]
    settings = {"vocab_size": VOCABULARY, "hidden_size": sizes.hidden, **settings}
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    if name == "mamba2":
        settings |= {"num_heads": 2 * sizes.hidden // 16 if sizes is QUICK else 2 * sizes.hidden // 64}
        settings |= {"head_dim": 2 * sizes.hidden // settings["num_heads"]}
    if name == "jamba":
        settings |= {"intermediate_size": 2 * sizes.hidden, "use_mamba_kernels": False}
    configurations = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(0)
    return getattr(modeling, f"{prefix}ForCausalLM")(getattr(configurations, f"{prefix}Config")(**settings))


def forward(model: Any, ids: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def train(model: Any, ids: Tensor) -> list[Tensor]:
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def generate(model: Any, ids: Tensor, tokens: int) -> Tensor:
    model.eval()
    return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def differences(after: Any, before: Any) -> float:
    """Of logits, of the worst parameter's gradient, or the number of other tokens."""
    if isinstance(after, list):
        return max(relative(a, b) for a, b in zip(after, before, strict=True))
    return relative(after, before) if after.is_floating_point() else float((after != before).sum())


class FirstInput(torch.autograd.Function):
    """Returns the first input; the others have gradients, too, zeros that take no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor | None) -> Tensor:
        ctx.shapes = [None if other is None else other.shape for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        zero = grads[0].new_zeros(())
        return grads[0], *(None if shape is None else zero.expand(shape) for shape in ctx.shapes)


@contextlib.contextmanager
def free_kernels() -> Iterator[None]:
    """Kernels that return at once, tensors of the right shapes."""

    def with_state(out: Tensor, arguments: dict[str, Any], *state: int) -> Any:
        return (out, out.new_zeros(out.shape[0], *state)) if arguments.get("return_last_state") else out

    def scan(u: Tensor, delta: Tensor, A: Tensor, *rest: Any, **arguments: Any) -> Any:
        out = FirstInput.apply(u, delta, A, *rest[:5])
        return (out, u.new_zeros(u.shape[0], *A.shape)) if rest[6] else out

    def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any, **arguments: Any) -> Any:
        return with_state(FirstInput.apply(x, dt, A, B, *rest[:4]), arguments, *x.shape[2:], B.shape[-1])

    free = {
        "causal_conv1d": lambda x, weight, bias, **arguments: FirstInput.apply(x, weight, bias),
        "causal_conv1d_step": lambda state, x, *rest, **arguments: (x, state),
        "selective_scan": scan,
        "selective_state_update": lambda state, x, *rest: x,
        "ssd_scan": ssd,
        "ssd_step": lambda state, x, *rest, **arguments: (x, state),
    }
    with mock.patch.multiple(functions, **free):
        yield


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(name: str, quantity: str, sizes: Sizes) -> dict[str, Any]:
    """A row: the library's own, on kernels, and with kernels that cost nothing, interleaved."""
    model = build(name, sizes)
    ids = torch.randint(3, VOCABULARY, (1, sizes.prompt if quantity == "generation" else sizes.steps))
    work: Callable[[], Any] = {
        "forward": lambda: forward(model, ids),
        "training": lambda: train(model, ids),
        "generation": lambda: generate(model, ids, sizes.new_tokens),
    }[quantity]
    spent: dict[str, list[float]] = {"before": [], "after": [], "possible": []}
    kernels.enable(name)
    work()  # the first call allocates
    kernels.disable()
    for repeat in range(sizes.repeats):
        if repeat == 0 or spent["before"][0] < REPEATED_SECONDS:
            seconds, before = timed(work)
            spent["before"].append(seconds)
        kernels.enable(name)
        seconds, after = timed(work)
        spent["after"].append(seconds)
        if repeat == 0:
            error = differences(after, before)
            calls = dict(kernels.report().calls)
        with free_kernels():
            spent["possible"].append(timed(work)[0])
        kernels.disable()
    seconds_of = {kind: statistics.median(values) for kind, values in spent.items()}
    return {
        "model": name,
        "measure": quantity,
        "sizes": list(sizes),
        "milliseconds": {kind: 1e3 * seconds for kind, seconds in seconds_of.items()},
        "speedup": seconds_of["before"] / seconds_of["after"],
        "possible_fraction": seconds_of["possible"] / seconds_of["after"],
        "error": error,
        "calls": calls,
    }


def value(row: dict[str, Any]) -> float:
    """What the row's target is about."""
    return row["possible_fraction"] if row["measure"] == "forward" else row["speedup"]


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    shown = []
    for row in rows:
        least, aim = TARGETS[row["measure"]][row["model"]]
        reached = tables.outcome(value(row), least, aim)
        if row["measure"] == "training" and row["speedup"] < least and row["possible_fraction"] is not None:
            reached += f", {row['speedup'] / row['possible_fraction']:.1f}× is possible"
        unit, scale = ("%", 100) if row["measure"] == "forward" else ("×", 1)
        times, possible = row["milliseconds"], row["possible_fraction"]
        error = f"{row['error']:.0f} tokens" if row["measure"] == "generation" else f"{row['error']:.0e}"
        shown.append(
            [
                FAMILIES[row["model"]][0],
                row["measure"],
                tables.figure(times["before"]),
                tables.figure(times["after"]),
                f"{tables.figure(row['speedup'])}×",
                "" if possible is None else f"{100 * possible:.0f}",
                error,
                f"{least * scale:g}{unit}, aim {aim * scale:g}{unit}: {reached}",
            ]
        )
    return shown


SHORT_HEADER = ("", "training step: s before", "after", "", "forward", "generation")


def short_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row per model: how many times as fast."""
    found = {(row["model"], row["measure"]): row for row in rows}
    shown = []
    for name in dict.fromkeys(row["model"] for row in rows):
        seconds = [found[name, "training"]["milliseconds"][kind] / 1e3 for kind in ("before", "after")]
        times = [f"{tables.figure(found[name, quantity]['speedup'])}×" for quantity in TARGETS]
        shown.append([FAMILIES[name][0], *map(tables.figure, seconds), *times])
    return shown


def measured(path: Path | None, sizes: Sizes, packages: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of an earlier run with these sizes and packages."""
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if earlier["environment"]["packages"] != packages:
        return []
    return [row for row in earlier["rows"] if row["sizes"] == list(sizes)]


def main(arguments: list[str] | None = None) -> None:
    warnings.simplefilter("ignore")  # of the library, about itself
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    chosen = result_file.parse(parser, arguments)
    torch.set_num_threads(chosen.threads)  # before the environment is described
    sizes = QUICK if chosen.quick else FULL
    described = environment.describe(torch.device("cpu"))
    path = result_file.target(chosen, "models", "cpu")
    rows = measured(path, sizes, described["packages"])
    result = {"benchmark": "models", "device": "cpu", "environment": described, "rows": rows}
    done = {(row["model"], row["measure"]) for row in rows}
    for quantity in TARGETS:
        for name in chosen.models:
            if (name, quantity) in done:
                continue
            rows.append(measure(name, quantity, sizes))
            print(f"{name} {quantity}: {rows[-1]['speedup']:.1f}× as fast", flush=True)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
    print(environment.summary(described))
    tables.show("Models of transformers, before and after enable()", HEADER, cells(rows))
    if path is not None:
        print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
