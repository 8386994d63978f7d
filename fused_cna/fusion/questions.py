"""What Python code asks of a tensor without the tensor noticing, so that a trace would keep a wrong answer.

A proxy refuses what it notices itself. The rest is refused for what the code says: each function that becomes
part of a trace is looked at once, its bytecode and the names in it.
"""

import builtins
import contextlib
import dis
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn

_OF_PROXIES = {*dir(fx.Proxy), "node", "tracer", "held"} - {*dir(torch.Tensor)}
_AHEAD = ("CACHE", "EXTENDED_ARG", "NOP", "PUSH_NULL", "COPY", "RESUME", "NOT_TAKEN", "TO_BOOL")
_OF_ANYTHING = {"vars", "dir", "attrgetter", "__dict__", "__getattribute__", "eval", "exec"}
_MUTATORS = {
    *("append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "update", "setdefault"),
    *("popitem", "add", "discard", "appendleft", "popleft"),
}


@dataclass(frozen=True)
class Questions:
    """What the code of one function can ask and do."""

    refusal: str
    """What no trace can stand for, in words; empty for nothing."""
    refusal_in_library: str
    """The same for code of the standard library, whose errors say nothing of tensors."""
    asks: bool
    """Whether it asks if something is None, or has an attribute, that it did not read from ``self``."""
    reads: frozenset[str] | None
    """The names of attributes that it may read; None for any."""
    stores: bool
    """Whether it changes attributes or globals."""
    asks_own_class: bool
    """Whether it asks for the class of ``self``."""


@functools.lru_cache(4096)
def questions_of(code: CodeType) -> Questions:
    """What the code of a function can ask; nested functions are looked at when they are called."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in _AHEAD]
    refusal, catches, reads_any = "", "", bool(_OF_ANYTHING & {*code.co_names})
    asks = stores = own_class = False
    for i, step in enumerate(steps):
        name, value = step.opname, step.argval
        before, after = steps[max(i - 1, 0)], steps[min(i + 1, len(steps) - 1)]
        if name in ("LOAD_GLOBAL", "LOAD_NAME") and value in ("type", "id", "callable"):
            if not _is_self(after) or (value == "type" and not _is_call(steps[i + 2])):
                refusal = f"it asks for {value}(...), which a trace cannot answer"
            own_class |= value == "type" and _is_self(after)
        elif name in ("LOAD_GLOBAL", "LOAD_NAME") and value in ("hasattr", "getattr"):
            attribute = steps[i + 2].argval if steps[i + 2].opname == "LOAD_CONST" else None
            asks |= not _is_self(after)
            reads_any |= attribute is None
            if not _is_self(after) and (attribute is None or attribute in _OF_PROXIES):
                refusal = f"it asks by {value} for what only a stand-in of a tensor may have"
        elif value == "__class__" and name in ("LOAD_ATTR", "LOAD_METHOD"):
            own_class |= _is_self(before)
            refusal = refusal if _is_self(before) else "it asks for the class of a value"
        elif name.startswith("MATCH_"):
            refusal = "it matches a value against patterns"
        elif name == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
            refusal = "it asks whether one value is another"
        elif name == "PUSH_EXC_INFO" and after.opname != "WITH_EXCEPT_START":
            catches = "it catches exceptions"
        if name == "IS_OP" or name.endswith("_NONE"):
            asks |= not _is_read_of_self(steps, i - (2 if name == "IS_OP" else 1))
        stores |= name in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
        stores |= value == "setattr" or (value in _MUTATORS and _is_read_of_self(steps, i - 1))
        stores |= name == "STORE_SUBSCR" and any(_is_read_of_self(steps, i - back) for back in (2, 3))
    words = (value for value in code.co_consts if isinstance(value, str))
    reads = None if reads_any else frozenset((*code.co_names, *words))
    return Questions(refusal or catches, refusal, asks, reads, stores, own_class)


def _is_self(step: dis.Instruction) -> bool:
    return step.opname.startswith("LOAD_FAST") and step.argval == "self"


def _is_call(step: dis.Instruction) -> bool:
    return step.opname in ("PRECALL", "CALL", "CALL_FUNCTION")


def _is_read_of_self(steps: list[dis.Instruction], last: int) -> bool:
    """Whether the value that step ``last`` makes is an attribute of ``self``, however deep."""
    if last < 0 or steps[last].opname != "LOAD_ATTR":
        return False
    while last > 0 and steps[last].opname == "LOAD_ATTR":
        last -= 1
    return _is_self(steps[last])


def _codes_of(kind: type) -> Iterator[Questions]:
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
    return any(one.stores for kind in {*map(type, module.modules())} for one in _codes_of(kind))


def asks_own_class(kind: type[nn.Module]) -> bool:
    """Whether a module asks for its own class, which a subclass would answer otherwise."""
    return any(one.asks_own_class for one in _codes_of(kind))


_OWN = ("torch", "fused_cna")
_LIBRARY = sys.stdlib_module_names - {"__main__"}


def _functions(*paths: str) -> list[Any]:
    found = []
    for path in paths:
        value: Any = torch
        for name in path.split("."):
            value = getattr(value, name, None)
        found += [] if value is None else [value]
    return found


# By the function, as C functions are seen, and by its code, as those of Python are.
_MODES = {
    function: path
    for path in (
        *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"),
        *("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype", "get_default_dtype"),
        *("is_autocast_cache_enabled", "get_default_device", "are_deterministic_algorithms_enabled"),
        *("is_deterministic_algorithms_warn_only_enabled", "get_deterministic_debug_mode", "jit.is_tracing"),
        *("compiler.is_compiling", "compiler.is_dynamo_compiling", "compiler.is_exporting", "jit.isinstance"),
        *("onnx.is_in_onnx_export", "fx._symbolic_trace.is_fx_tracing", "_C._get_tracing_state"),
        *("fx._symbolic_trace.is_fx_symbolic_tracing", "_dynamo.is_compiling", "is_storage"),
        *(
            "_C._get_deterministic_algorithms",
            "_C._is_tracing",
            "overrides.is_tensor_like",
            "overrides.has_torch_function",
            "is_anomaly_enabled",
            "is_anomaly_check_nan_enabled",
            "overrides.has_torch_function_unary",
            "overrides.has_torch_function_variadic",
            "is_tensor",
        ),
    )
    for function in _functions(path)
}
_MODES_BY_CODE = {
    function.__code__: path for function, path in _MODES.items() if hasattr(function, "__code__")
}
_MODES_BY_CODE[contextlib.suppress.__exit__.__code__] = "errors to suppress"
_ALL_TENSORS = {nn.Module._named_members.__code__, nn.Module.state_dict.__code__}
_BY_NAME = (hasattr, getattr, vars, dir, id, callable, eval, exec)


class Watch:
    """A context in which the Python code that this thread runs is looked at.

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
        self._seen: set[CodeType] = set()
        self.asks = False
        """Whether the code asks if something is None, see :class:`Questions`."""
        self.reads: set[str] | None = set()
        """The names of attributes that the code may read; None for any."""

    def __enter__(self) -> "Watch":
        self._before = sys.getprofile()
        self._replace(vars(torch), "is_tensor", lambda value: self._is_instance(value, torch.Tensor))
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        for names, name, value in reversed(self._replaced):
            names[name] = value
            if value is None:
                del names[name]

    def _note(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            self._note_builtin(frame, function)
        elif event == "call" and frame.f_code not in self._seen:
            self._note_function(frame)

    def _note_builtin(self, frame: FrameType, function: Any) -> None:
        if type(function) is not type(len):
            return
        if function in _MODES and not _is_of_torch(frame):
            self._refuse(f"it asks for {_MODES[function]}")
        if function is isinstance and not _is_of_torch(frame):
            self._refuse("it calls isinstance by another name")
        elif (
            function in _BY_NAME
            and function.__name__ not in frame.f_code.co_names
            and not _is_of_torch(frame)
        ):
            self._refuse(f"it calls {function.__name__} by another name")

    def _note_function(self, frame: FrameType) -> None:
        code = frame.f_code
        mode = _MODES_BY_CODE.get(code, "all parameters or buffers" if code in _ALL_TENSORS else "")
        if mode:
            caller = frame.f_back
            while caller is not None and caller.f_globals.get("__name__") == nn.Module.__module__:
                caller = caller.f_back
            if caller is not None and not _is_of_torch(caller):
                self._refuse(f"it asks for {mode}")
            return
        name = str(frame.f_globals.get("__name__"))
        if name.startswith("torch.nn.modules.") and not name.endswith(".module") and self.reads is not None:
            self.reads.update(code.co_names)
        if _is_of_torch(frame):
            return
        self._seen.add(code)
        questions = questions_of(code)
        refusal = questions.refusal_in_library if _root(name) in _LIBRARY else questions.refusal
        if refusal:
            self._refuse(refusal)
        self.asks |= questions.asks
        self.reads = None if self.reads is None or questions.reads is None else self.reads | questions.reads
        if "isinstance" in code.co_names:
            names = frame.f_globals
            if names.get("isinstance", builtins.isinstance) is builtins.isinstance:
                self._replace(names, "isinstance", self._is_instance)

    def _replace(self, names: dict[str, Any], name: str, value: Any) -> None:
        self._replaced.append((names, name, names.get(name)))
        names[name] = value


def _is_of_torch(frame: FrameType | None) -> bool:
    """Whether code of torch runs, or of the standard library for torch."""
    while frame is not None and _root(frame.f_globals.get("__name__")) in _LIBRARY:
        frame = frame.f_back
    return frame is not None and _root(frame.f_globals.get("__name__")) in _OWN


def _root(name: Any) -> str:
    return str(name).partition(".")[0]
