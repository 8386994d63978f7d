"""Watching Python code while it is traced, for questions that a graph cannot ask again when it runs."""

import builtins
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

_MODES = {
    torch.is_autocast_enabled: "autocast",
    torch.get_autocast_dtype: "autocast",
    torch.is_inference_mode_enabled: "inference mode",
}
_ALL_TENSORS = {nn.Module._named_members.__code__, nn.Module.state_dict.__code__}
_OWN = ("torch", "fused_cna")


class Watch:
    """A context in which this thread's Python code is watched.

    ``isinstance`` and ``torch.is_tensor`` are answered by ``is_instance`` in every module whose functions
    run, but those of torch: a proxy that itself passed for a tensor would do so to torch's C++ code too,
    which reads its memory.

    Args:
        refuse: is told, in words, of what the code does that no graph can stand for.
    """

    def __init__(self, is_instance: Callable[[Any, Any], bool], refuse: Callable[[str], object]) -> None:
        self._is_instance = is_instance
        self._refuse = refuse
        self._replaced: list[tuple[dict[str, Any], str, Any]] = []

    def __enter__(self) -> "Watch":
        self._before = sys.getprofile()
        self._replace(vars(torch), "is_tensor", lambda value: self._is_instance(value, torch.Tensor))
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        for names, name, value in self._replaced:
            names[name] = value
            if value is builtins.isinstance:
                del names[name]

    def _note(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            if _is_builtin(function) and function in _MODES and not _is_of_torch(frame):
                self._refuse(f"it asks for {_MODES[function]}")
        elif event == "call" and frame.f_code in _ALL_TENSORS:
            caller = frame.f_back
            while caller is not None and caller.f_globals.get("__name__") == nn.Module.__module__:
                caller = caller.f_back
            if caller is not None and not _is_of_torch(caller):
                self._refuse("it asks for all parameters or buffers of a module")
        elif event == "call" and _asks_for_types(frame) and not _is_of_torch(frame):
            self._replace(frame.f_globals, "isinstance", self._is_instance)

    def _replace(self, names: dict[str, Any], name: str, value: Any) -> None:
        self._replaced.append((names, name, names.get(name, builtins.isinstance)))
        names[name] = value


def _asks_for_types(frame: FrameType) -> bool:
    return "isinstance" in frame.f_code.co_names and "isinstance" not in frame.f_globals


def _is_builtin(function: Any) -> bool:
    return type(function) is type(len)


def _is_of_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _OWN
