"""Clocks for benchmarks: calls in turn on any device; device time, host time and memory of a call on a CUDA device."""

import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")
_WARM_UPS = 3
_REPORT_EVERY = 10  # seconds


def times_in_turn(
    calls: dict[Key, Callable[[], object]],
    rounds: int,
    device: str,
    warm_ups: int = 5,
    report: Callable[[str], object] = lambda line: None,
) -> dict[Key, list[float]]:
    """Seconds of every call in every round.

    The calls take turns, so that whatever else the machine does meets all of them alike.

    Args:
        calls: What to time, by name.
        rounds: Times that each is called after those for warming up.
        device: Where the calls work.
        warm_ups: Rounds that do not count.
        report: Called every ten seconds with a line that says how far the rounds are.
    """
    said = time.perf_counter()
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    for i in range(-warm_ups, rounds):
        for name, call in calls.items():
            if device != "cpu":
                torch.accelerator.synchronize()
            start = time.perf_counter()
            call()
            if device != "cpu":
                torch.accelerator.synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() - said > _REPORT_EVERY and i + 1 < rounds:
            said = time.perf_counter()
            report(f"round {i + 1} of {rounds}" if i >= 0 else "warming up")
    return seconds


def capture(call: Callable[[], object], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """Capture a CUDA graph of some calls in a row.

    Backward works on the streams that its nodes were made on. So a call that differentiates must build everything from
    leaves that no other stream has differentiated: warming up and capture share one side stream.

    Args:
        call: Launches work on the current stream and waits for none.
        repeats: Calls in the graph.

    Returns:
        The graph, ready to replay.

    Raises:
        RuntimeError: The call cannot be captured.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what the default stream keeps in reserve serves no other stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a capture that fails leaves its stream current; this restores the old one
        for _ in range(_WARM_UPS):
            call()
        try:
            return _captured(call, repeats, stream, "thread_local")
        except RuntimeError:
            pass  # backward runs in a thread of its own; "relaxed" allows what some libraries do on first use there
        try:
            return _captured(call, repeats, stream, "relaxed")
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # the end of a failed capture raises again and says less
                cause = cause.__context__
            raise RuntimeError(f"not captured: {cause}") from error


def _captured(call: Callable[[], object], repeats: int, stream: torch.cuda.Stream, mode: str) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        for _ in range(repeats):
            call()
    return graph


def events_ms(call: Callable[[], object], rounds: int, warm_ups: int = _WARM_UPS) -> float:
    """Median milliseconds of a call between two events; where the device waits for the host, that is in it."""
    times = []
    for i in range(-warm_ups, rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 0:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_ms(call: Callable[[], object], repeats: int, rounds: int, warm_ups: int = _WARM_UPS) -> float:
    """Median milliseconds of device time of a call, from replays of a CUDA graph of ``repeats`` calls.

    Starting a graph takes some microseconds, which many calls in it share.

    Raises:
        RuntimeError: The call cannot be captured.
    """
    return events_ms(capture(call, repeats).replay, rounds, warm_ups) / repeats


def host_us(call: Callable[[], object], number: int, rounds: int = 5) -> float:
    """Median microseconds that the host takes to enqueue a call.

    Args:
        call: What to time.
        number: Calls in a row, few enough that the device's queue (about 1000 kernels) has room for them.
        rounds: Times that the device is waited for and the calls are enqueued.
    """
    seconds = timeit.Timer(call, setup=torch.cuda.synchronize).repeat(rounds, number)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(seconds) / number


def extra_mib(call: Callable[[], Any], results: int) -> float:
    """Peak memory beyond what was there and ``results`` bytes, in MiB."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before - results) / 2**20
