"""The command ``visionattn``."""

import argparse
import ast
import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import visionattn
from visionattn import cli_example, cli_explain, cli_export, cli_shards, cli_web


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
    """Compose the configuration and train; several models if it lists them under ``models``."""
    _need_training_packages()
    from visionattn.tasks.config import compose
    from visionattn.tasks.train import train

    config = compose(args.overrides)
    if args.show:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config, resolve=False))
        return
    if config.models:
        from visionattn.tasks.comparison import compare

        print(compare(config, args.overrides))
        return
    for name, value in train(config).items():
        print(f"{name} {value:.4f}")


def eval_command(args: argparse.Namespace) -> None:
    """Evaluate a run's best checkpoint, or a model with any weights; prints JSON and writes it."""
    _need_training_packages()
    from visionattn.tasks.config import write_text
    from visionattn.tasks.inference import evaluate_model, evaluate_run
    from visionattn.tasks.kinds import KINDS, function, kind_of

    runs = [text for text in args.arguments if "=" not in text]
    overrides = [text for text in args.arguments if "=" in text]
    if len(runs) + (args.model is not None) != 1:
        raise ValueError("give either one RUN folder or --model NAME, and changes of the form key=value")
    averaged = {"best": None, "averaged": True, "trained": False}[args.weights]
    if args.model:
        result, output = evaluate_model(args.model, args.checkpoint, overrides), args.output
    elif (found := kind_of(runs[0])) in KINDS:
        result = function(KINDS[found].evaluate)(runs[0], overrides, averaged)
        print(function(KINDS[found].table)(result))
        if args.output:
            write_text(Path(args.output), json.dumps(result, indent=1) + "\n")
        return
    else:
        result = evaluate_run(runs[0], overrides, averaged)
        output = args.output or (Path(runs[0], "eval.json") if Path(runs[0]).is_dir() else None)
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        write_text(Path(output), text + "\n")


def predict_command(args: argparse.Namespace) -> None:
    """Print the most likely classes of pictures and draw them."""
    _need_training_packages()
    from visionattn.data.images import read_image
    from visionattn.tasks.inference import draw, load_model, load_run, predict
    from visionattn.tasks.kinds import KINDS, function, kind_of

    if (args.run_folder is None) == (args.model is None):
        raise ValueError("give either --run FOLDER or --model NAME")
    if args.topk < 1:
        raise ValueError(f"--topk {args.topk}: expected at least 1")
    task = args.task or (kind_of(args.run_folder) if args.run_folder else "classification")
    if task in KINDS:
        for line in function(KINDS[task].predict)(args):
            print(line)
        return
    classifier = load_run(args.run_folder) if args.run_folder else load_model(args.model, args.checkpoint)
    images = [read_image(path, classifier.in_chans, exif=True) for path in args.images]
    results = predict(classifier, images, args.topk)
    for path, result in zip(args.images, results, strict=True):
        print(path, ", ".join(f"{name} {probability:.1%}" for name, probability in result))
    draw(images, [f"{result[0][0]}  {result[0][1]:.0%}" for result in results], Path(args.output))
    print(f"picture: {args.output}")


def demo_command(args: argparse.Namespace) -> None:
    """Train a small BiFormer on embedded digits beside a baseline and a timm model."""
    _need_training_packages()
    from visionattn.tasks.demo import demo

    print(demo(Path(args.output), args.overrides))


def convert_command(args: argparse.Namespace) -> None:
    """Convert an official checkpoint and enter it in the index."""
    _need_training_packages()
    from visionattn.tasks.checkpoints import convert_checkpoint

    path = convert_checkpoint(args.model, args.file, args.folder, args.url)
    print(f"{path}, entered in {path.with_name('index.csv')}")


def data_command(args: argparse.Namespace) -> None:
    """Unpack and check a published data set that the user downloaded."""
    _need_training_packages()
    from visionattn.data.published import preparer

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        found = preparer(args.name)(args.name, args.archives, args.output, report, complete=not args.partial)
    except FileExistsError as error:
        raise ValueError(str(error)) from error
    counts = ", ".join(f"{len(names)} {split}" for split, names in found["splits"].items())
    print(f"{args.output}: {counts}; train with data={args.name} data.root={args.output}")


_SAME_NAME = ("rounds", "device", "autocast", "channels_last", "compile", "cuda_graph")  # options and settings


def benchmark_command(args: argparse.Namespace) -> None:
    """Time models, attention layers or operators side by side."""
    import torch

    if bool(args.models) + (args.attention is not None) + args.ops != 1:
        raise ValueError("give either names of models or --attention SIDE or --ops")
    output, plot = (Path(name) if name else None for name in (args.output, args.plot))
    if plot and not args.models:
        raise ValueError(f"--plot {plot} is for models; leave it out with --attention and --ops")
    if args.ops:
        from visionattn.tasks.benchmark_ops import benchmark_ops

        def report(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        forms = args.forms.split(",") if args.forms else None
        how = args.operator, args.shapes, args.dtype or "bf16", report, args.format
        print(benchmark_ops(output, forms, args.rounds, *how))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    from visionattn.tasks.benchmark_models import Settings, benchmark_models

    size = args.input_size or []
    if len(size) > 2:
        raise ValueError(f"--input-size {' '.join(map(str, size))}: expected a side, or a height and a width")
    settings = Settings(
        modes=tuple(args.modes.split(",")),
        batch=args.batch_size,
        size=(size[0], size[-1]) if size else None,
        model_kwargs=dict(args.model_kwargs),
        dtype=args.dtype or "fp32",
        **{key: getattr(args, key) for key in _SAME_NAME},
    )
    if args.models:
        print(benchmark_models(args.models, settings, output, args.format, plot))
        return
    from visionattn.tasks.benchmark import benchmark_attention

    shape = args.attention, args.dim, args.heads
    print(benchmark_attention(*shape, settings.batch, settings.rounds, settings.device, settings.dtype))


def _add_training(commands: Any) -> None:
    command = commands.add_parser("list", help="list the backbones")
    command.add_argument("pattern", nargs="?", default="*", help="shell pattern, for example 'biformer_*'")
    command.set_defaults(run=list_command)
    command = commands.add_parser("demo", help="train on real digits, evaluate, draw: a few minutes on a CPU")
    command.add_argument("--output", default="outputs/demo", help="folder to write (default outputs/demo)")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="changes of both trainings, like seed=1")
    command.set_defaults(run=demo_command)
    command = commands.add_parser("data", help="prepare a data set that you downloaded, or pack one into shards")
    actions = command.add_subparsers(required=True)
    command = actions.add_parser("prepare", help="unpack and check a published set, write images and masks as PNG")
    command.add_argument(
        "name",
        help="a set of masks, questions or objects, for example drive, vizwiz or coco; the documentation lists them",
    )
    command.add_argument("archives", nargs="+", metavar="ARCHIVE", help="files as downloaded, or folders of them")
    command.add_argument("--output", required=True, help="folder to write, which must not exist")
    command.add_argument("--partial", action="store_true", help="accept another number of images than the published")
    command.set_defaults(run=data_command)
    cli_shards.add(actions)
    cli_example.add(actions)
    command = commands.add_parser("train", help="train from a configuration, for example: experiment=digits")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides of configs/train.yaml")
    command.add_argument("--show", action="store_true", help="print the composed configuration and stop")
    command.set_defaults(run=train_command)


def _add_using(commands: Any) -> None:
    command = commands.add_parser(
        "eval",
        help="top-1, top-5 and throughput on a validation split",
        description="Of a run: visionattn eval outputs/digits [key=value ...]. Of a model with published weights or "
        "those of a file: visionattn eval --model biformer_s [--checkpoint FILE] data.root=DIR [key=value ...].",
    )
    command.add_argument(
        "arguments", nargs="*", metavar="RUN | key=value", help="folder of a run; changes like data.root=DIR"
    )
    command.add_argument("--model", help="a registered model with pretrained weights instead of a run")
    command.add_argument("--checkpoint", help="weights for --model, .pth or .safetensors")
    command.add_argument(
        "--weights",
        choices=("best", "averaged", "trained"),
        default="best",
        help="of a run with moving averages: those it validated (default), the averaged or the trained weights",
    )
    command.add_argument("--output", help="JSON file to write (default for a run: RUN/eval.json)")
    command.set_defaults(run=eval_command)
    command = commands.add_parser("predict", help="classify pictures, or write masks or boxes")
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("--run", dest="run_folder", help="folder of a run, or a .ckpt file")
    command.add_argument("--model", help="a registered model with pretrained weights")
    command.add_argument("--checkpoint", help="weights for --model, .pth or .safetensors")
    command.add_argument("--topk", type=int, default=5, help="classes to print (default 5)")
    tasks = ("classification", "segmentation", "semantic", "detection", "grounding", "scanpath")
    command.add_argument("--task", choices=tasks, help="by default the run's")
    command.add_argument("--question", help="of a grounding run: what its mask is to answer")
    command.add_argument("--boxes", help="of a scanpath: JSON file with the boxes and the target of an image")
    command.add_argument("--window", type=int, help="of a segmentation: side of the windows (default: the run's)")
    command.add_argument("--flips", action="store_true", help="of a segmentation: average over reflections")
    command.add_argument(
        "--output",
        default="prediction.png",
        help="picture to write (default prediction.png); of masks or boxes their folder (predictions)",
    )
    command.set_defaults(run=predict_command)
    command = commands.add_parser("convert", help="turn an official checkpoint into safetensors, with its digests")
    command.add_argument("model", help="timm name, with or without a tag: biformer_s.in1k")
    command.add_argument("file", help="official .pth or .safetensors file")
    command.add_argument("--folder", default="checkpoints", help="where file and index.csv go (default checkpoints)")
    command.add_argument("--url", help="where the file came from, for the index")
    command.set_defaults(run=convert_command)


def _keyword(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` with a Python literal or a word for the value."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


_OPERATORS = ("routed_attention", "neighborhood_attention", "neighborhood_sum", "state_attention")
_SHAPES_HELP = (
    "with --ops: networks for the calls of the published networks, of the neighbourhood operators, "
    "windows for those of DaViT, of neighborhood_attention"
)
_FORMS_HELP = (
    "with --ops: only these of visionattn,gather,dense SDPA,flex_attention (routed_attention), "
    "visionattn,visionattn + bias,NATTEN,flex_attention,windows + SDPA,dense SDPA,eager (neighborhood_attention), "
    "visionattn,eager,windows (neighborhood_sum)"
)


def _add_benchmark(commands: Any) -> None:
    command = commands.add_parser(
        "benchmark",
        help="time models, attention layers or operators side by side",
        description="visionattn benchmark davit_t davit_tiny patnet_t2:folded fasternet_t2 --threads 2; "
        "or visionattn benchmark --attention 14 --batch-size 16; or visionattn benchmark --ops "
        "[--operator neighborhood_attention]",
    )
    add, switch = command.add_argument, argparse.BooleanOptionalAction
    add("models", nargs="*", metavar="MODEL[:folded]", help="names of timm or this package")
    add("--attention", type=int, metavar="SIDE", help="HiLo and its peers on maps of this side")
    add("--ops", action="store_true", help="an operator and its peers on a CUDA device")
    add("--operator", choices=_OPERATORS, default=_OPERATORS[0], help=f"with --ops (default {_OPERATORS[0]})")
    add("--shapes", choices=("default", "networks", "windows"), default="default", help=_SHAPES_HELP)
    add("--forms", metavar="A,B", help=_FORMS_HELP)
    add("--output", help="with models or --ops: file to append to, .csv, .json or .md")
    add("--format", choices=("csv", "json", "markdown"), help="of --output (default: by its suffix)")
    add("--plot", help="with models: picture of throughput and latency to draw, .png, .svg or .pdf")
    add("--dim", type=int, default=384, help="with --attention: channels of the maps (default 384)")
    add("--heads", type=int, default=12, help="with --attention: attention heads (default 12)")
    add("--batch-size", "--batch", type=int, default=1, help="images at once (default 1)")
    add("--input-size", "--size", type=int, nargs="+", metavar="N", help="side, or height and width, of the images")
    add("--modes", default="inference", help="some of inference,training,features (default inference)")
    add("--rounds", type=int, default=30, help="times that each is called (default 30)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="default fp32, with --ops bf16")
    add("--autocast", action=switch, default=True, help="autocast to the type, or weights and images of it")
    add("--channels-last", action=switch, help="memory format (default: only on a CUDA device)")
    add(
        "--compile",
        nargs="?",
        const="default",
        metavar="MODE",
        help="through torch.compile, in a mode like reduce-overhead",
    )
    add("--cuda-graph", action="store_true", help="replay steps from a CUDA graph")
    add("--model-kwargs", type=_keyword, nargs="+", default=[], metavar="NAME=VALUE", help="arguments of every model")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    command.set_defaults(run=benchmark_command)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line as its parser understands it; ``run`` is the function of the command."""
    parser = argparse.ArgumentParser("visionattn", description="Vision backbones built on efficient attention.")
    parser.add_argument("--version", action="version", version=visionattn.__version__)
    commands = parser.add_subparsers(required=True)
    _add_training(commands)
    _add_using(commands)
    _add_benchmark(commands)
    cli_web.add(commands)
    cli_explain.add(commands)
    cli_export.add(commands)
    args, rest = parser.parse_known_args(argv)
    # argparse gives positional arguments that stand behind an option back as unknown
    listed = next((name for name in ("arguments", "overrides", "images", "models") if hasattr(args, name)), None)
    if rest and (listed is None or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if listed:
        setattr(args, listed, getattr(args, listed) + rest)
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point; errors that a user can cause end with one line and exit code 1."""
    args = parse(argv)
    logger = logging.getLogger("visionattn")  # not the root: Lightning prints its lines itself and hands them on
    logger.setLevel(logging.INFO)  # what VISIONATTN_AUTOTUNE=1 finds
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    try:
        args.run(args)
    except Exception as error:
        user_error = isinstance(error, ValueError | OSError | ImportError)
        if not user_error and type(error).__module__.split(".")[0] not in ("hydra", "omegaconf"):
            raise
        called = type(error).__name__ == "InstantiationException"  # of Hydra, around what it called
        text = str((called and error.__cause__) or error).strip()
        if "Original Traceback" in text:  # from a worker process of the data loader
            text = text.splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {text}")


if __name__ == "__main__":
    main()
