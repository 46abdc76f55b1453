"""The command ``visionattn data example``."""

import argparse
from typing import Any


def example_command(args: argparse.Namespace) -> None:
    """Write the example folder and say how it is used."""
    from visionattn.data.example_folder import CLASSES, write_example

    counts = write_example(args.folder)
    print(
        f"{args.folder}: {counts['train']} images to train with and {counts['val']} to validate with, of the classes "
        f"{', '.join(CLASSES)}, and picture.png; train with experiment=finetune data.root={args.folder}"
    )


def add(actions: Any) -> None:
    """Add the action to those of ``visionattn data``.

    Args:
        actions: Subparsers of that command.
    """
    command = actions.add_parser("example", help="write a folder of 20 real images in four classes, to try things with")
    command.add_argument("folder", metavar="DIR", help="folder to write, which must not exist")
    command.set_defaults(run=example_command)
