"""What Python code asks of a tensor without the tensor noticing, so that a trace would keep a wrong answer.

A proxy refuses what it notices itself. The rest is refused for what the code says: each function that becomes
part of a trace is looked at once, its bytecode and the names in it.
"""

import contextlib
import dis
import functools
import gc
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace as follow

ANY = "*"
"""Stands for every name in the names that code reads."""

_OF_PROXIES = {*dir(fx.proxy.Attribute), *("node", "tracer", "root", "attr", "held", "is_tensor"), ANY}
_OF_PROXIES -= {*dir(torch.Tensor)}
_AHEAD = ("CACHE", "EXTENDED_ARG", "NOP", "PUSH_NULL", "COPY", "RESUME", "NOT_TAKEN", "TO_BOOL")
_CALLS = ("PRECALL", "CALL", "CALL_FUNCTION")
_OF_ANYTHING = {"vars", "dir", "attrgetter", "__dict__", "__getattribute__", "eval", "exec"}
_STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
_MUTATORS = {*dir(list), *dir(dict), *dir(set), *dir(deque)}
_MUTATORS -= {*dir(tuple), *dir(frozenset), *dir(MappingProxyType)}


@dataclass
class Questions:
    """What the code of one function can ask and do."""

    reads: set[str]
    """The names of attributes that it may read."""
    refusal: str = ""
    """What no trace can stand for, in words."""
    catches: bool = False
    """Whether it catches exceptions, which would tell a proxy from a tensor."""
    asks: bool = False
    """Whether it asks if something is None, or has an attribute, that it did not read from ``self``."""
    stores: bool = False
    """Whether it changes attributes or globals."""
    asks_own_class: bool = False
    """Whether it asks for the class of ``self``."""


@functools.lru_cache(4096)
def questions_of(code: CodeType) -> Questions:
    """What the code of a function can ask; nested functions are looked at when they are called."""
    found = [
        step for one in dis.get_instructions(code) if one.opname not in _AHEAD for step in _steps_of(one)
    ]
    # Steps behind the last one, and before the first.
    steps = [*found, ("", None), ("", None), ("", None)]
    its = Questions({*code.co_names, *(value for value in code.co_consts if isinstance(value, str))})
    for i, (op, value) in enumerate(found):
        before, after, then = steps[i - 1], steps[i + 1], steps[i + 2]
        called = value if op in ("LOAD_GLOBAL", "LOAD_NAME") else None
        if called in ("type", "id", "callable"):
            its.asks_own_class |= called == "type" and _is_self(after)
            if not _is_self(after) or (called == "type" and then[0] not in _CALLS):
                its.refusal = f"it asks for {called}(...), which a trace cannot answer"
        elif called in ("hasattr", "getattr"):
            name = then[1] if then[0] == "LOAD_CONST" else ANY
            its.reads.add(name)
            its.asks |= not _is_self(after)
            if not _is_self(after) and name in _OF_PROXIES:
                its.refusal = f"it asks by {called} for what only a stand-in of a tensor may have"
        elif value == "__class__" and op in ("LOAD_ATTR", "LOAD_METHOD"):
            its.asks_own_class |= _is_self(before)
            its.refusal = its.refusal if _is_self(before) else "it asks for the class of a value"
        elif op.startswith("MATCH_"):
            its.refusal = "it matches a value against patterns"
        elif op == "IS_OP" and before != ("LOAD_CONST", None):
            its.refusal = "it asks whether one value is another"
        if op == "IS_OP" or op.endswith("_NONE"):
            its.asks |= not _is_read_of_self(steps, i - (2 if op == "IS_OP" else 1))
        its.catches |= op == "SETUP_FINALLY" or (op == "PUSH_EXC_INFO" and after[0] != "WITH_EXCEPT_START")
        its.stores |= op in _STORES or value == "setattr"
        its.stores |= value in _MUTATORS and _is_read_of_self(steps, i - 1)
        its.stores |= op == "STORE_SUBSCR" and any(_is_read_of_self(steps, i - back) for back in (2, 3))
    its.reads |= {ANY} if its.reads & _OF_ANYTHING else set()
    return its


def _steps_of(one: dis.Instruction) -> Iterator[tuple[str, Any]]:
    """An instruction with its operand; two where Python 3.13 makes one of two."""
    if isinstance(one.argval, tuple) and "_FAST_" in one.opname:
        yield ("STORE_FAST" if one.opname.startswith("STORE") else "LOAD_FAST"), one.argval[0]
        yield ("STORE_FAST" if one.opname.endswith("STORE_FAST") else "LOAD_FAST"), one.argval[1]
    else:
        yield one.opname, one.argval


def _is_self(step: tuple[str, Any]) -> bool:
    return step[0].startswith("LOAD_FAST") and step[1] == "self"


def _is_read_of_self(steps: list[tuple[str, Any]], last: int) -> bool:
    """Whether the value that step ``last`` makes is an attribute of ``self``, however deep."""
    first = last
    while steps[first][0] == "LOAD_ATTR":
        first -= 1
    return first < last and _is_self(steps[first])


def _asked_by(kind: type) -> Iterator[Questions]:
    """What the methods of a class that its ``forward`` reaches can ask, but for those of torch."""
    todo, done = ["forward"], set()
    while todo:
        name = todo.pop()
        function = getattr(kind, name, None)
        function = getattr(function, "__wrapped__", function)
        code = getattr(function, "__code__", None)
        if name not in done and code is not None and _root(function.__module__) not in _OWN:
            done.add(name)
            yield questions_of(code)
            todo += [one for one in code.co_names if callable(getattr(kind, one, None))]


def stores_state(module: nn.Module) -> bool:
    """Whether running a module may change an attribute that code outside of it reads."""
    return any(one.stores for kind in {*map(type, module.modules())} for one in _asked_by(kind))


def asks_own_class(kind: type[nn.Module]) -> bool:
    """Whether a module asks for its own class, which a subclass would answer otherwise."""
    return any(one.asks_own_class for one in _asked_by(kind))


_OWN = ("torch", "fused_cna")
_LIBRARY = sys.stdlib_module_names - {"__main__"}
_MODULE = nn.Module.__module__
_BY_NAME = (hasattr, getattr, vars, dir, id, callable, eval, exec)

# What tells in which mode code runs, which may be another one in the next call, or a tensor from a proxy.
_TELLING = re.compile(
    "enabled|autocast|determinis|get_default|tracing|compiling|export|is_tensor|is_storage|isinstance|has_torch"
)
_SPACES = (torch, torch._C, torch.jit, torch.compiler, torch.overrides, torch.onnx, follow)
# It is known by its names, because importing it takes seconds.
_COMPILER = "torch._dynamo"

_ASKING = {isinstance, nn.Module._named_members, nn.Module.state_dict, contextlib.suppress.__exit__}
for _space in _SPACES:
    _ASKING |= {one for name, one in vars(_space).items() if _TELLING.search(name) and callable(one)}
# Functions in Python are told by their code, as all that is seen of a call is its frame.
_ASKING_CODE = {one.__code__ for one in _ASKING if hasattr(one, "__code__")}
_SWITCHES = (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.autocast)
_SWITCHING = {torch.set_grad_enabled.__init__.__code__, *(one.__enter__.__code__ for one in _SWITCHES)}


class Watch:
    """A context in which the Python code that this thread runs is looked at.

    ``isinstance`` and ``torch.is_tensor`` are answered by ``is_instance`` in every module whose functions
    run, but those of torch: a proxy that itself passed for a tensor would do so to torch's C++ code too,
    which reads its memory.

    Args:
        refuse: is told, in words, of what the code does that no graph can stand for.
    """

    def __init__(self, is_instance: Callable[[Any, Any], bool], refuse: Callable[[str], object]) -> None:
        self._is_instance, self._refuse = is_instance, refuse
        self._answered: list[dict[str, Any]] = []
        self._seen: set[CodeType] = set()
        self.asks = False
        """Whether the code asks if something is None, see :class:`Questions`."""
        self.reads: set[str] = set()
        """The names of attributes that the code may read."""

    def __enter__(self) -> "Watch":
        # What the garbage collector calls is no code of the network.
        self._collects = gc.isenabled()
        gc.disable()
        self._before = sys.getprofile(), torch.is_tensor
        torch.is_tensor = lambda value: self._is_instance(value, torch.Tensor)  # type: ignore[assignment]
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        profile, torch.is_tensor = self._before
        sys.setprofile(profile)
        if self._collects:
            gc.enable()
        for names in self._answered:
            del names["isinstance"]

    def _note(self, frame: FrameType, event: str, function: Any) -> None:
        """Look at a call, of a function in C or one in Python that was not seen yet."""
        if event == "c_call" and type(function) is type(len):
            # What is asked under its own name was seen in the code.
            renamed = function in _BY_NAME and function.__name__ not in frame.f_code.co_names
            if (renamed or function in _ASKING) and not _is_of_torch(frame):
                self._refuse(f"it calls {function.__name__}")
        elif event == "call" and frame.f_code not in self._seen:
            self._note_function(frame, frame.f_code, str(frame.f_globals.get("__name__")))

    def _note_function(self, frame: FrameType, code: CodeType, module: str) -> None:
        if code in _SWITCHING:
            self._refuse("it switches gradients or autocast on or off")
        elif code in _ASKING_CODE or (module.startswith(_COMPILER) and _TELLING.search(code.co_name)):
            if not _is_of_torch(frame.f_back, _MODULE):
                self._refuse(f"it calls {code.co_name}")
        elif _root(module) in _OWN:
            self._seen.add(code)
            if module.startswith("torch.nn.modules.") and module != _MODULE:
                self.reads.update(code.co_names)
        elif not _is_of_torch(frame):
            self._seen.add(code)
            its = questions_of(code)
            # The errors that the standard library catches say nothing of tensors.
            if its.refusal or (its.catches and _root(module) not in _LIBRARY):
                self._refuse(its.refusal or "it catches exceptions")
            self.asks |= its.asks
            self.reads |= its.reads
            if "isinstance" in code.co_names and "isinstance" not in frame.f_globals:
                self._answered.append(frame.f_globals)
                frame.f_globals["isinstance"] = self._is_instance


def _is_of_torch(frame: FrameType | None, beyond: str = "") -> bool:
    """Whether code of torch runs, or of the standard library, or the module ``beyond``, for torch."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if _root(name) not in _LIBRARY and name != beyond:
            return _root(name) in _OWN
        frame = frame.f_back
    return False


def _root(name: Any) -> str:
    return str(name).partition(".")[0]
