"""The command ``visionattn``: ``list`` and ``train``."""

import argparse
import sys
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


def train_command(args: argparse.Namespace) -> None:
    """Compose the configuration and train."""
    try:
        import hydra
        import lightning  # noqa: F401
    except ImportError as error:
        raise ImportError(f'training needs more packages ({error.name}): pip install "visionattn[train]"') from error
    from visionattn.tasks.train import train

    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("train", overrides=args.overrides)
    for name, value in train(config).items():
        print(f"{name} {value:.4f}")


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
