"""Operators on a GPU beside what else could take their place: checked, then timed."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionattn.ops import use_backend
from visionattn.tasks import benchmark_neighborhood, benchmark_routing, benchmark_state, benchmark_sum
from visionattn.tasks.benchmark_models import DTYPES
from visionattn.tasks.operator_forms import Data, Form, Operator, check, generator
from visionattn.tasks.records import ORIGIN, markdown, origin
from visionattn.tasks.row_files import row_file
from visionattn.tasks.timing import events_ms, extra_mib, graph_ms, host_us

OPERATORS = {
    "routed_attention": benchmark_routing.OPERATOR,
    "neighborhood_attention": benchmark_neighborhood.OPERATOR,
    "neighborhood_sum": benchmark_sum.OPERATOR,
    "state_attention": benchmark_state.OPERATOR,
}
_DEVICE = "cuda"
_SLOW_MS, _ROUNDS_MS = 50.0, 1000.0  # from which a call is timed with few repetitions, and that its rounds may take

_KINDS = "forward", "both"  # both: forward and backward
_FIGURES = (
    "ms", "clock", "events_ms", "host_us", "extra_mib", "floor_ms", "to_floor", "published_ms", "to_published"
)  # fmt: skip
COLUMNS = ("shape", "form", "dtype", "error", *(f"{kind}_{x}" for kind in _KINDS for x in _FIGURES), "note")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _figures(
    make: Callable[[], Callable[[], Any]], rounds: int, calls: int, results: int
) -> tuple[dict[str, Any], str]:
    """Times and memory of a call, and why it has no graph; ``make`` gives a call whose leaves no stream has seen."""
    call = make()
    events = events_ms(call, 1, warm_ups=1)
    few = dict(rounds=max(3, min(rounds, int(_ROUNDS_MS / events))), warm_ups=1 if events > _SLOW_MS else 3)
    events = events_ms(call, **few)
    host = host_us(call, max(1, min(calls, int(100 / events))))
    memory = max(0.0, extra_mib(call, results))
    note, clock = "", "graph"
    try:
        device = graph_ms(make(), max(1, min(10, int(20 / events))), **few)
    except RuntimeError as error:
        device, clock, note = events, "events", _reason(error)
    return dict(ms=device, clock=clock, events_ms=events, host_us=host, extra_mib=round(memory)), note


def _published(operator: Operator, name: str, form: str, dtype: torch.dtype, row: dict[str, Any], device: str) -> None:
    """Add the published milliseconds of the form to a row, and how many times as long it took on such a device."""
    if dtype != torch.bfloat16 or name not in operator.published.get(form, {}):
        return
    for kind, published in zip(_KINDS, operator.published[form][name], strict=True):
        row[f"{kind}_published_ms"] = published
        if "H100" in device and f"{kind}_ms" in row and not isinstance(published, str):
            row[f"{kind}_to_published"] = row[f"{kind}_ms"] / published


def measure(operator: Operator, form: str, data: Data, shape: Any, rounds: int) -> dict[str, Any]:
    """Error, times and memory of one form at one shape.

    Args:
        operator: Of ``OPERATORS``.
        form: Of its forms.
        data: As from its ``inputs``.
        shape: The shape of ``data``.
        rounds: Replays of each graph; fewer of calls that take long.

    Returns:
        Columns of a row under names of ``COLUMNS``.

    Raises:
        ValueError: The result is wrong.
    """
    found = operator.forms[form]
    with use_backend(found.backend) if found.backend else nullcontext():
        return _measure(operator, form, found, data, shape, rounds)


def _measure(operator: Operator, name: str, form: Form, data: Data, shape: Any, rounds: int) -> dict[str, Any]:
    prepared = form.prepare(data, shape)
    row: dict[str, Any] = dict(error=check(name, form, prepared, data, shape))
    fixed = [x.detach() for x in prepared.inputs]

    def forward() -> Tensor:
        with torch.no_grad():
            return prepared.attend(*fixed)

    grad = torch.empty_like(forward()).normal_(generator=generator(_DEVICE))
    size, gradients = (sum(x.numel() * x.element_size() for x in tensors) for tensors in ([grad], fixed))

    def both() -> Callable[[], Any]:
        leaves = [x.detach().requires_grad_() for x in fixed]
        return lambda: torch.autograd.grad(prepared.attend(*leaves), leaves, grad)

    notes = []
    plan = ("forward", lambda: forward, 50, size), ("both", both, 20, size + gradients)
    floors = operator.floors(shape, grad.element_size())
    for (kind, make, calls, results), floor in zip(plan, floors, strict=True):
        figures, note = _figures(make, rounds, calls, results)
        figures |= dict(floor_ms=floor, to_floor=figures["ms"] / floor)
        row |= {f"{kind}_{key}": value for key, value in figures.items()}
        notes += [f"{kind}: {note}"] if note else []
    return row | dict(note="; ".join(notes))


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _line(row: dict[str, Any]) -> list[str]:
    """A row of ``COLUMNS`` as cells of the table: forward / forward and backward."""

    def text(kind: str, figure: str) -> str:
        value = row.get(f"{kind}_{figure}", "-")
        mark = "*" if figure == "ms" and row.get(f"{kind}_clock") == "events" else ""
        return value if isinstance(value, str) else f"{value:.4g}{mark}"

    def pair(figure: str) -> str:
        texts = [text(kind, figure) for kind in _KINDS]
        return (
            texts[0] if texts[0] == texts[1] and isinstance(row.get(f"both_{figure}", "-"), str) else " / ".join(texts)
        )

    figures = ("ms", "to_floor", "published_ms", "to_published", "host_us", "events_ms", "extra_mib")
    return [row["shape"], row["form"], *map(pair, figures), row["note"].replace("|", "/")]


def _chosen(operator: Operator, names: list[str]) -> tuple[list[str], list[str]]:
    """The forms of an operator that can be timed (``names`` empty: all), and a line for each that cannot."""
    if unknown := [name for name in names if name not in operator.forms]:
        raise ValueError(f"unknown form {unknown[0]!r}; choose of {', '.join(operator.forms)}")
    missing = {name: operator.forms[name].missing() for name in names or operator.forms}
    lines = [f"{name} is left out: {reason}" for name, reason in missing.items() if reason]
    return [name for name, reason in missing.items() if not reason], lines


def _row(operator: Operator, name: str, form: str, data: Data, shape: Any, rounds: int) -> dict[str, Any]:
    """A row without its names; of a peer that fails the reason."""
    try:
        return measure(operator, form, data, shape, rounds)
    except Exception as error:  # whatever a peer's compiler or kernels raise
        if operator.forms[form].ours:
            raise
        return dict(note=_reason(error))


def benchmark_ops(
    path: Path | None,
    forms: list[str] | None = None,
    rounds: int = 30,
    operator: str = "routed_attention",
    shapes: str = "default",
    dtype: str = "bf16",
    report: Callable[[str], object] = lambda line: None,
    file_format: str | None = None,
) -> str:
    """Check and time an operator and its peers at every shape of a set.

    A peer that cannot run, or that computes something else, is in the table with the reason instead of figures.

    Args:
        path: File to append to, row by row.
        forms: Of the operator's; None or empty for all.
        rounds: Replays of each graph; fewer of calls that take long.
        operator: Of ``OPERATORS``.
        shapes: Of the operator's sets.
        dtype: Of ``DTYPES``.
        report: Called with a line after each row.
        file_format: As ``row_file`` takes it; by default that of the path's suffix.

    Returns:
        A Markdown table.

    Raises:
        ValueError: There is no CUDA device, a name is unknown, the file has other columns, or the result of this
            package is wrong.
    """
    if _DEVICE == "cuda" and not torch.cuda.is_available():
        raise ValueError("the operators' benchmark needs a CUDA device; visionattn benchmark times models on a CPU")
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; choose of {', '.join(OPERATORS)}")
    found = OPERATORS[operator]
    if shapes not in found.sets:
        raise ValueError(f"unknown shapes {shapes!r} of {operator}; choose of {', '.join(found.sets)}")
    chosen, left_out = _chosen(found, forms or [])
    for line in left_out:
        report(line)
    file, where, lines = row_file(path, (*COLUMNS, *ORIGIN), file_format), origin(_DEVICE), []
    for name, shape in found.sets[shapes]().items():
        data = found.inputs(shape, DTYPES[dtype], _DEVICE)
        for form in (form for form in chosen if found.forms[form].fits(shape)):
            row = dict(shape=name, form=form, dtype=dtype) | _row(found, name, form, data, shape, rounds)
            _published(found, name, form, DTYPES[dtype], row, where["device"])
            row = {key: _rounded(value) for key, value in row.items()}
            file.append(row | where)
            lines.append(_line(row))
            report(f"{name}, {form}: {row['note'] if 'both_ms' not in row else lines[-1][2] + ' ms'}")
        del data
        if _DEVICE == "cuda":
            torch.cuda.empty_cache()  # what one shape leaves in pieces may lack the next
    both = "ms", "times the floor", "published ms", "times the published", "host us", "events ms", "extra MiB"
    table = markdown(("shape", "form", *both, "note"), lines)
    facts = ", ".join(f"{k} {v}" for k, v in where.items())
    return "\n".join(
        [table, "", f"{operator}, {dtype}: forward / forward and backward; * by events. {facts}.", *left_out]
    )
