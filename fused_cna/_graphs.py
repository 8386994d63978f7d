"""Capturing a CUDA graph."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_one_at_a_time = threading.RLock()


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """``torch.cuda.graph``, for one thread at a time and with the stream restored.

    A graph that the garbage collector finds meanwhile would be destroyed, which torch 2.11 does without
    regard to captures: the one under way would fail. It also leaves the stream of a failed capture current.
    """
    with _one_at_a_time:
        stream, collects = torch.cuda.current_stream(), gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, **options):
                yield
        finally:
            torch.cuda.set_stream(stream)
            if collects:
                gc.enable()
