"""The command ``visionattn``: ``list``, ``train``, ``eval`` and ``predict``."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import visionattn


def config_folder() -> Path:
    """The configurations: inside an installed package, or beside it in a checkout."""
    package = Path(visionattn.__file__).parent
    return next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())


def list_command(args: argparse.Namespace) -> None:
    """Print the registered models with their number of parameters."""
    import timm

    names = visionattn.list_models(args.pattern)
    if not names:
        raise ValueError(f"no model matches {args.pattern!r}; all: {', '.join(visionattn.list_models())}")
    for name in names:
        model = timm.create_model(name, device="meta")
        print(f"{name:16} {sum(p.numel() for p in model.parameters()) / 1e6:7.2f} M parameters")


def _need_training_packages() -> None:
    missing = [name for name in ("hydra", "lightning", "torchmetrics", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f'this needs more packages ({", ".join(missing)}): pip install "visionattn[train]"')


def train_command(args: argparse.Namespace) -> None:
    """Compose the configuration and train."""
    _need_training_packages()
    import hydra

    from visionattn.tasks.train import train

    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("train", overrides=args.overrides)
    for name, value in train(config).items():
        print(f"{name} {value:.4f}")


def eval_command(args: argparse.Namespace) -> None:
    """Evaluate a run's best checkpoint; prints JSON and writes it beside the run."""
    _need_training_packages()
    import json

    from visionattn.tasks.inference import evaluate

    print(json.dumps(evaluate(Path(args.run_folder), args.overrides), indent=1))


def predict_command(args: argparse.Namespace) -> None:
    """Print the most likely classes of pictures and draw them."""
    _need_training_packages()
    from visionattn.tasks.inference import draw, load_model, load_run, predict

    if (args.run_folder is None) == (args.model is None):
        raise ValueError("give either --run FOLDER or --model NAME")
    classifier = load_run(args.run_folder) if args.run_folder else load_model(args.model, args.checkpoint)
    results = predict(classifier, args.images, args.topk)
    for path, result in zip(args.images, results, strict=True):
        print(path, ", ".join(f"{name} {probability:.1%}" for name, probability in result))
    draw(args.images, results, classifier.in_chans, Path(args.output))
    print(f"picture: {args.output}")


def main(argv: list[str] | None = None) -> None:
    """Entry point; errors that a user can cause end with one line and exit code 1."""
    parser = argparse.ArgumentParser("visionattn", description="Vision backbones built on efficient attention.")
    parser.add_argument("--version", action="version", version=visionattn.__version__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("list", help="list the backbones")
    command.add_argument("pattern", nargs="?", default="*", help="shell pattern, for example 'biformer_*'")
    command.set_defaults(run=list_command)
    command = commands.add_parser("train", help="train from a configuration, for example: experiment=digits")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides of configs/train.yaml")
    command.set_defaults(run=train_command)
    command = commands.add_parser("eval", help="top-1, top-5 and throughput of a run on its validation split")
    command.add_argument("run_folder", metavar="RUN", help="folder of the run, for example outputs/digits")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes, for example data.root=DIR")
    command.set_defaults(run=eval_command)
    command = commands.add_parser("predict", help="classify pictures")
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("--run", dest="run_folder", help="folder of a run, or a .ckpt file")
    command.add_argument("--model", help="a registered model with pretrained weights")
    command.add_argument("--checkpoint", help="weights for --model, .pth or .safetensors")
    command.add_argument("--topk", type=int, default=5, help="classes to print (default 5)")
    command.add_argument("--output", default="prediction.png", help="picture to write (default prediction.png)")
    command.set_defaults(run=predict_command)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except Exception as error:
        user_error = isinstance(error, ValueError | FileNotFoundError | ImportError)
        if not user_error and type(error).__module__.split(".")[0] not in ("hydra", "omegaconf"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
