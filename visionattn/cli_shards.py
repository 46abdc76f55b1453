"""The commands ``visionattn data shard`` and ``visionattn data index``."""

import argparse
import sys
from pathlib import Path
from typing import Any


def _report(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def shard_command(args: argparse.Namespace) -> None:
    """Pack a folder of images by class into tar shards."""
    from visionattn.data.shard_writing import write_shards

    indices = write_shards(
        args.root,
        args.output,
        args.split,
        images=args.size,
        megabytes=args.megabytes,
        seed=args.seed,
        workers=args.workers,
        on_error=args.on_error,
        progress=_report,
    )
    for split, index in indices.items():
        images, size = sum(map(len, index.shards)), sum(shard.bytes for shard in index.shards)
        contents = f"{images} images of {len(index.classes)} classes in {len(index.shards)} shards"
        sys.stdout.write(f"{Path(args.output, split)}: {contents}, {size / 1e6:.1f} MB\n")
    sys.stdout.write(f"train with data=shards data.root={args.output}\n")


def index_command(args: argparse.Namespace) -> None:
    """Write the index of shards made elsewhere, or compare shards with their index."""
    from visionattn.data.shards import check_shards, index_shards

    if args.check:
        index = check_shards(args.folder, args.workers, _report)
    else:
        classes = Path(args.classes).read_text(encoding="utf-8").split("\n") if args.classes else []
        index = index_shards(args.folder, [name.strip() for name in classes if name.strip()], args.workers, _report)
    images = sum(map(len, index.shards))
    what = "as indexed" if args.check else "indexed"
    sys.stdout.write(
        f"{args.folder}: {images} images of {len(index.classes)} classes in {len(index.shards)} shards {what}\n"
    )


def add(actions: Any) -> None:
    """Add the commands to those of ``visionattn data``."""
    command = actions.add_parser("shard", help="pack a folder of images by class into tar shards with an index")
    command.add_argument("root", help="folder with SPLIT/CLASS/IMAGE")
    command.add_argument("--output", required=True, help="folder to write, with a sub-folder for each split")
    command.add_argument("--split", nargs="+", default=["train", "val"], help="sub-folders (default train val)")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--size", type=int, default=1000, metavar="IMAGES", help="images of a shard (default 1000)")
    size.add_argument("--megabytes", type=float, metavar="MB", help="instead, about the size of a shard")
    command.add_argument("--seed", type=int, default=0, help="of the order of the images in the shards (default 0)")
    command.add_argument("--workers", type=int, default=4, help="shards written at the same time (default 4)")
    command.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="what an unreadable image does")
    command.set_defaults(run=shard_command)
    command = actions.add_parser("index", help="index tar shards made elsewhere, or compare shards with their index")
    command.add_argument("folder", help="folder of *.tar with KEY.jpg and KEY.cls")
    command.add_argument("--classes", metavar="FILE", help="names of the classes in label order, one a line")
    command.add_argument("--workers", type=int, default=4, help="shards read at the same time (default 4)")
    command.add_argument("--check", action="store_true", help="compare sizes and SHA-256, write nothing")
    command.set_defaults(run=index_command)
