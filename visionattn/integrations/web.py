"""A web page on this machine: choose a model and a picture, see what the model says about it and where it looks.

Nothing leaves the machine: no telemetry, no public link, no fonts or scripts from elsewhere, which a content security
policy forbids the browser as well. gradio (the extra ``demo``) is imported only when the page is built.
"""

import errno
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from visionattn.integrations.web_answers import answer, regions
from visionattn.integrations.web_examples import example_pictures
from visionattn.integrations.web_models import Choice

UPLOAD_MB = 32
"""Largest file that can be uploaded, in MB."""

# what gradio's page would fetch from elsewhere (fonts, banners) is refused by the browser
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "form-action 'self'; frame-ancestors 'self'"
)
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Liberation Sans", "Arial", "sans-serif"]
_MONO = ["ui-monospace", "Liberation Mono", "Menlo", "Consolas", "monospace"]
# small pictures fill their boxes, stages are never cut, and nothing moves when results appear
_STYLE = """
.gradio-container > main, .gradio-container main.contain {width: 100%; max-width: 1280px; margin: 0 auto}
#picture img, #overlay img {width: 100%; height: 100%; object-fit: contain}
#stages .grid-wrap {max-height: none !important; overflow: visible}
"""
_ABOUT = """# visionattn
Choose a model and a picture, then **Run**. Everything stays on this machine."""
_CLICK = """**Click a position** to see where a BiFormer looks from there: its own region in green, the regions that it
is routed to in white, the attention in them in colour."""
_TASKS = {
    "classification": "Names the most likely classes.",
    "segmentation": "Lays a mask over the picture.",
    "semantic": "Gives every pixel a class.",
    "detection": "Draws a box around each object.",
    "grounding": "Marks the answer to your question in the picture.",
}


def describe(choice: Choice) -> str:
    """A line of Markdown on what a model does, and with which weights."""
    if choice.random:
        return f"{_TASKS[choice.kind]} **Random weights**: the answer means nothing."
    return f"{_TASKS[choice.kind]} Weights: `{choice.run or choice.checkpoint}`"


def _shown_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a user can get wrong as a message of the page, without the folder of uploads in it."""
    import gradio

    @wraps(function)  # its annotations tell gradio what to pass
    def call(label: str, uploaded: dict[str, Any] | None, *rest: Any) -> Any:
        path = (uploaded or {}).get("path")
        if not path:
            raise gradio.Error("Choose a picture first.", duration=None, print_exception=False)
        try:
            return function(label, path, *rest)
        except (ValueError, OSError, ImportError) as error:
            raise gradio.Error(
                str(error).replace(str(path), Path(path).name), duration=None, print_exception=False
            ) from error

    return call


def build_page(choices: Sequence[Choice], examples: Sequence[Path] = ()) -> Any:
    """The page as a ``gradio.Blocks``; ``serve`` gives it to a browser.

    Args:
        choices: The list of models, the first chosen.
        examples: Picture files to choose from.

    Raises:
        ValueError: No model.
        ImportError: gradio is not installed.
    """
    if not choices:
        raise ValueError("there is no model to show; give --run FOLDER or --models NAMES")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError('the page needs the package gradio: pip install "visionattn[demo]"') from error

    by_label = {choice.label: choice for choice in choices}
    first = choices[0]
    with gr.Blocks(title="visionattn", analytics_enabled=False) as page:
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                model = gr.Dropdown(list(by_label), value=first.label, label="Model", elem_id="model")
                about = gr.Markdown(describe(first), elem_id="about")
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], height=320, elem_id="picture"
                )
                question = gr.Textbox(
                    label="Question",
                    placeholder="where is the red circle?",
                    visible=first.kind == "grounding",
                    elem_id="question",
                )
                run = gr.Button("Run", variant="primary", elem_id="run")
                if examples:
                    gr.Examples([[str(path)] for path in examples], picture, label="Examples", elem_id="examples")
            with gr.Column(scale=3, min_width=320):
                results = _results(gr)
        _connect(gr, by_label, (model, about, picture, question, run), results)
    return page


def _results(gr: Any) -> dict[str, Any]:
    """What the right side shows, in this order; all but the hint are hidden until there is something in them."""
    still = dict(format="png", interactive=False, visible=False, buttons=["fullscreen"])
    return dict(
        text=gr.Markdown("The result appears here.", elem_id="text"),
        scores=gr.Label(label="Most likely classes", visible=False, show_heading=False, elem_id="scores"),
        overlay=gr.Image(label="Result", elem_id="overlay", height=480, **still),
        hint=gr.Markdown(_CLICK, visible=False, elem_id="hint"),
        view=gr.Image(
            label="What the model sees: click into it", elem_id="view", height=400, **{**still, "buttons": []}
        ),
        stages=gr.Gallery(
            label="Routed regions by stage",
            format="png",
            columns=2,
            height="auto",
            object_fit="contain",
            visible=False,
            buttons=["fullscreen"],
            elem_id="stages",
        ),
    )


def _connect(gr: Any, by_label: dict[str, Choice], inputs: tuple[Any, ...], results: dict[str, Any]) -> None:
    model, about, picture, question, run = inputs

    def cleared(text: str = "The result appears here.") -> dict[Any, Any]:
        hidden = {
            results[name]: gr.update(visible=False, value=None) for name in ("scores", "overlay", "view", "stages")
        }
        return {**hidden, results["text"]: text, results["hint"]: gr.update(visible=False)}

    def choose(label: str) -> dict[Any, Any]:
        choice = by_label[label]
        asked = gr.update(visible=choice.kind == "grounding")
        return {about: describe(choice), question: asked, **cleared()}

    def predict(label: str, path: str, text: str) -> dict[Any, Any]:
        found = answer(by_label[label], path, text or "")
        if found.warning:
            gr.Warning(found.warning)
        shown = cleared(found.text)
        for name, value in (("scores", found.scores), ("overlay", found.picture), ("view", found.view)):
            if value is not None:
                shown[results[name]] = gr.update(value=value, visible=True)
        return {**shown, results["hint"]: gr.update(visible=found.view is not None)}

    def look(label: str, path: str, event: gr.SelectData) -> dict[Any, Any]:
        view, stages = regions(by_label[label], path, (int(event.index[0]), int(event.index[1])))
        return {results["view"]: view, results["stages"]: gr.update(value=stages, visible=True)}

    outputs = list(results.values())
    # models share the cores; gradio has checked that the file is an upload, and would open it only to fail unclearly
    one = dict(concurrency_limit=1, concurrency_id="model", preprocess=False, api_visibility="private")
    model.change(choose, model, [about, question, *outputs], api_visibility="private", show_progress="hidden")
    picture.change(cleared, None, outputs, api_visibility="private", show_progress="hidden")
    gr.on([run.click, question.submit], _shown_errors(predict), [model, picture, question], outputs, **one)
    looked = [results["view"], results["stages"]]
    results["view"].select(_shown_errors(look), [model, picture], looked, **one)


def check_address(host: str, port: int) -> None:
    """Refuse an address where no server can be started.

    Raises:
        ValueError: A port outside 1 to 65535, one in use, one that only an administrator may take, or an unknown host.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: ports are 1 to 65535, for example --port 7860")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a server just ended is free
            server.bind(address)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: (f"port {port} is in use", f"--port {port % 65535 + 1}"),
            errno.EACCES: (f"port {port} is for administrators", "--port 7860"),
        }
        why, remedy = reasons.get(error.errno or 0, (f"no server can be started at {host}", "--host 127.0.0.1"))
        raise ValueError(f"{why} ({error.strerror or error}); choose another, for example {remedy}") from error


def serve(
    choices: Sequence[Choice],
    host: str = "127.0.0.1",
    port: int = 7860,
    report: Callable[[str], None] | None = None,
) -> None:
    """Show the page until the process is interrupted.

    Uploads go to a temporary folder, which is removed at the end.

    Args:
        choices: As in ``build_page``.
        host: Address to listen at; any but 127.0.0.1 lets other machines in.
        port: Port to listen at.
        report: Gets the page's address as soon as it can be opened.

    Raises:
        ValueError: No model, or an address where no server can be started.
        ImportError: gradio is not installed.
    """
    check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="visionattn_web_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "uploads"))
        page = build_page(choices, example_pictures(Path(folder, "examples")))
        import gradio as gr
        from starlette.middleware import Middleware

        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            max_file_size=UPLOAD_MB * 10**6,
            footer_links=[],
            theme=gr.themes.Default(font=_FONTS, font_mono=_MONO),
            css=_STYLE,
            app_kwargs=dict(middleware=[Middleware(_Policy)]),
        )
        if report:
            report(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        page.block_thread()


class _Policy:
    """ASGI middleware that adds the content security policy to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)
