"""The commands ``visionattn export`` and ``visionattn verify``."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def _need_packages() -> None:
    if missing := [name for name in ("hydra", "torchmetrics", "rich") if find_spec(name) is None]:
        raise ImportError(f'this needs more packages ({", ".join(missing)}): pip install "visionattn[train,export]"')


def export_command(args: argparse.Namespace) -> None:
    """Write a file or folder that other programs load, after comparing it with the model."""
    _need_packages()
    from visionattn.tasks.export import from_name, from_run

    if len(args.models) + (args.run_folder is not None) != 1:
        raise ValueError("give either the NAME of one model or --run FOLDER")
    if args.run_folder and (args.checkpoint or args.random_weights):
        raise ValueError("--checkpoint and --random-weights are for a NAME; --run takes a .ckpt file too")
    if args.format != "hub" and not args.output:
        raise ValueError(f"--format {args.format} needs --output FILE")
    if args.int8 and args.format != "onnx":
        raise ValueError(f"--int8 is for --format onnx, not {args.format}")
    if args.data and not args.int8:
        raise ValueError("--data is what --int8 is measured on; add --int8 or leave it out")
    if args.push and args.format != "hub":
        raise ValueError("--push is for --format hub")
    network = (
        from_run(args.run_folder)
        if args.run_folder
        else from_name(args.models[0], args.checkpoint, args.random_weights)
    )
    if args.format == "hub":
        _to_hub(args, network)
    else:
        _to_file(args, network)


def _to_hub(args: argparse.Namespace, network: Any) -> None:
    from visionattn.tasks.hub import push, save_folder

    if not args.output and not args.push:
        raise ValueError("--format hub needs --output FOLDER, --push OWNER/NAME or both")
    if args.dynamic != "none" or args.size or args.batch != 1:
        raise ValueError("--format hub keeps the model, not a graph: leave out --dynamic, --size and --batch")
    if args.output:
        save_folder(network, args.output, args.run_folder, args.license)
        print(f'{args.output}: timm.create_model("local-dir:{args.output}", pretrained=True) after import visionattn')
    if args.push:
        print(f"uploaded: {push(network, args.push, args.run_folder, args.license, args.private)}")


def _to_file(args: argparse.Namespace, network: Any) -> None:
    from visionattn.tasks.export import Settings, export

    if args.size and len(args.size) > 2:
        raise ValueError(f"--size {' '.join(map(str, args.size))}: expected a side, or a height and a width")
    size = (args.size[0], args.size[-1]) if args.size else None
    settings = Settings(args.format, args.dynamic, size, args.batch, args.tolerance)
    change = None
    if args.int8:
        from visionattn.tasks.quantize import int8

        change = int8(args.data, args.pictures, args.max_loss)
    facts = export(network, settings, args.output, change)
    shape = " x ".join(str(side) for side in facts["input"]["shape"])
    opset = f", opset {facts['opset']}" if "opset" in facts else ""
    print(f"{args.output}: {facts['name']}, {facts['form']} form, {args.format}{opset}, images {shape}")
    print(
        f"largest difference to the model {facts['largest_difference']:.1e} "
        f"({facts['relative_difference']:.1e} of the outputs' RMS) at {len(facts['compared_at'])} shapes"
    )
    if "int8" in facts:
        print(_int8_line(facts))
    print(f"{facts['bytes'] / 2**20:.1f} MiB, SHA-256 {facts['sha256']}; classes and preprocessing: {args.output}.json")


def _int8_line(facts: dict[str, Any]) -> str:
    found = facts["int8"]
    line = f"8 bits: {found['bytes_before'] / facts['bytes']:.1f} times as small, the same class in "
    line += f"{found['agreement']:.2f} % of {found['images']} images"
    if "top1" in found:
        return f"{line}, top-1 {found['top1']:.2f} % before and {found['top1_int8']:.2f} % after"
    return f"{line} of noise, which is no measure of accuracy: give --data ROOT"


def verify_command(args: argparse.Namespace) -> None:
    """Measure top-1 beside the published figure and enter it in the table of models."""
    _need_packages()
    from visionattn.tasks.config import write_text
    from visionattn.tasks.verify import summary, verify

    overrides = [f"data.batch_size={args.batch_size}", f"data.workers={args.workers}"]
    result = verify(args.model, args.data, args.checkpoint, args.folder, args.labels, overrides)
    print(summary(result))
    if args.output:
        write_text(Path(args.output), json.dumps(result, indent=1) + "\n")


def add(commands: Any) -> None:
    """Put both commands into the parser of ``visionattn``."""
    _add_export(commands)
    _add_verify(commands)


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a model for other programs: torch.export, AOTInductor, ONNX, safetensors, the hub",
        description="visionattn export biformer_s --format onnx --dynamic --output biformer_s.onnx; or "
        "visionattn export --run outputs/digits --format hub --output DIR. What differs from the model is not kept.",
    )
    add = command.add_argument
    add("models", nargs="*", metavar="NAME", help="a registered model, with or without a tag")
    add("--run", dest="run_folder", help="folder of a run (classification or segmentation), or a .ckpt file")
    add("--format", choices=("torch", "aoti", "onnx", "safetensors", "hub"), required=True)
    dynamic = "leave open the batch, or the batch, height and width (all, the default where no word is given)"
    add("--dynamic", nargs="?", choices=("batch", "all"), const="all", default="none", help=dynamic)
    add(
        "--size",
        type=int,
        nargs="+",
        metavar="N",
        help="side, or height and width, of the images (default: the model's)",
    )
    add("--batch", type=int, default=1, help="images at once where the batch is fixed (default 1)")
    add("--checkpoint", help="weights of NAME, .pth or .safetensors (default: the published ones)")
    add("--random-weights", action="store_true", help="of NAME no weights, to try a format and its speed")
    add("--tolerance", type=float, default=1e-3, help="largest difference over the outputs' RMS (default 0.001)")
    add("--int8", action="store_true", help="with onnx: matrix products in 8 bits, kept if the predictions stay")
    add("--data", metavar="ROOT", help="with --int8: images in ROOT[/val]/CLASS/IMAGE to measure top-1 on")
    add(
        "--images",
        dest="pictures",
        type=int,
        metavar="N",
        help="with --int8: how many images (default: all of --data, else 64 of noise)",
    )
    add("--max-loss", type=float, default=1.0, help="with --int8: percent that may be lost (default 1)")
    add("--license", help="with hub: licence of the weights, for example apache-2.0 (default: the published one)")
    add("--push", metavar="OWNER/NAME", help="with hub: upload there")
    add("--private", action="store_true", help="with --push: make a new repository private")
    add("--output", help="file to write, with a .json beside it; of hub a folder")
    command.set_defaults(run=export_command)


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="top-1 of published weights on ImageNet's validation set beside the published figure",
        description="visionattn verify biformer_s.in1k --data /data/imagenet; fills the column of the table of models.",
    )
    add = command.add_argument
    add("model", help="a registered model, with or without a tag")
    add("--data", required=True, metavar="ROOT", help="ROOT[/val]/CLASS/IMAGE, or with --labels a folder of images")
    add("--labels", help="file of labels for one folder of images, see docs/export.md")
    add("--checkpoint", help="weights (default: those of the index in --folder, or the published ones)")
    add("--folder", default="checkpoints", help="published.csv, index.csv and results (default checkpoints)")
    add("--batch-size", type=int, default=64, help="images at once (default 64)")
    add("--workers", type=int, default=4, help="processes that read images (default 4)")
    add("--output", help="JSON file to write as well")
    command.set_defaults(run=verify_command)
