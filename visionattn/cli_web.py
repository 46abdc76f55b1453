"""The command ``visionattn web``."""

import argparse
import signal
import sys
from importlib.util import find_spec
from typing import Any


def web_command(args: argparse.Namespace) -> None:
    """Serve the web page with the runs and models that were asked for."""
    if find_spec("gradio") is None:
        raise ImportError('the web page needs the package gradio: pip install "visionattn[demo]"')
    from visionattn.integrations.web import check_address, serve
    from visionattn.integrations.web_models import find_runs, model_choices, run_choices

    check_address(args.host, args.port)  # before models are looked for
    found = run_choices(args.run_folders) if args.run_folders else run_choices(find_runs(args.outputs), _note)
    patterns = None if args.names is None else [name for name in args.names.split(",") if name]
    choices = [*found, *model_choices(patterns, dict(args.checkpoint))]
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        _note(f"warning: whoever reaches {args.host}:{args.port} can use this page; it asks for no password")
    _note(f"{len(found)} runs, {len(choices) - len(found)} backbones; starting")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are removed then too
    serve(choices, args.host, args.port, lambda address: _note(f"{address} (Ctrl+C ends it)"))


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _checkpoint(text: str) -> tuple[str, str]:
    """``NAME=FILE``."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FILE")
    return name, file


def add(commands: Any) -> None:
    """Add the command to those of ``visionattn``."""
    command = commands.add_parser(
        "web",
        help="a web page on this machine: models, runs and your pictures",
        description="visionattn web --run outputs/nuclei outputs/grounding --models 'biformer_*' "
        "--checkpoint biformer_s=biformer_small_best.pth",
    )
    command.add_argument(
        "--run",
        dest="run_folders",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="runs, or checkpoints of runs (default: all below --outputs)",
    )
    command.add_argument("--outputs", default="outputs", help="where runs are looked for (default outputs)")
    command.add_argument(
        "--models", dest="names", metavar="NAMES", help="names or patterns, with commas (default: all backbones)"
    )
    command.add_argument(
        "--checkpoint",
        type=_checkpoint,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="weights of a backbone, .pth or .safetensors; may be given several times",
    )
    command.add_argument("--port", type=int, default=7860, help="default 7860")
    command.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1, which other machines cannot reach")
    command.set_defaults(run=web_command)
