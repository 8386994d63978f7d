"""The groups of a graph: each convolution, and what follows it, as far as one fused call can compute it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from fused_cna import layers
from fused_cna.fusion.aliasing import Aliasing
from fused_cna.fusion.nodes import Act, Add, Call, Conv, Norm, Pad, Refused, Value, call_of

SameShape = Callable[[Node, Node], bool | None]
"""Whether two nodes are tensors of one shape, dtype and device; None where only the call will show."""

RESIDUAL_FIRST = "residual_first"
"""In the ``meta`` of a group's node: whether the residual stood before the convolution in the sum."""


@dataclass
class Group:
    """A convolution with what is computed in the same call; without parts, why there are none."""

    conv: Node
    calls: dict[Any, Any]
    """What the nodes of the graph compute."""
    pad: Node | None = None
    norm: Node | None = None
    add: Node | None = None
    act: Node | None = None
    residual: Node | None = None
    residual_order: str = "add_act"
    reason: str = ""
    """Why nothing, or less than it seems, is fused."""
    missed: bool = False
    """Whether it looked as if more could have been fused."""
    missed_add: Node | None = None
    """The addition that could not be taken in."""

    @property
    def call(self) -> Conv:
        return self.calls[self.conv]  # type: ignore[no-any-return]

    @property
    def module(self) -> nn.Conv2d | None:
        """The convolution, where a module is that can be part of a group."""
        return getattr(self.call, "module", None)

    @property
    def norm_call(self) -> Norm | None:
        return self.calls.get(self.norm)

    @property
    def act_call(self) -> Act | None:
        return self.calls.get(self.act)

    @property
    def nodes(self) -> list[Node]:
        """Its nodes in the order in which they run."""
        tail = (self.add, self.act) if self.residual_order == "add_act" else (self.act, self.add)
        return [node for node in (self.pad, self.conv, self.norm, *tail) if node is not None]

    @property
    def values(self) -> list[Value]:
        """Its parameters and buffers, without those that are None."""
        norm = self.norm_call
        vectors = [] if norm is None else [norm.weight, norm.bias, norm.mean, norm.var]
        return [value for value in (self.call.weight, self.call.bias, *vectors) if value is not None]

    @property
    def is_fused(self) -> bool:
        return any((self.norm, self.add, self.act))

    @property
    def is_of_modules(self) -> bool:
        """Whether its parts are modules, so that a module can stand for it."""
        return self.module is not None and (self.norm_call is None or self.norm_call.module is not None)

    def leave(self, reason: str) -> None:
        """Take the group apart, although it looks as if it could be fused."""
        self.pad = self.norm = self.add = self.act = self.residual = None
        self.reason, self.missed = reason, True

    def parts(self) -> str:
        """What is computed in one call, in order, such as "conv + norm + add + relu"."""
        norm, act = self.norm_call, self.act_call
        words = ["pad"] * (self.pad is not None) + ["conv"] + ["norm"] * (norm is not None)
        words += [norm.act] if norm is not None and norm.act != "identity" else []
        tail = ["add"] * (self.add is not None) + ([] if act is None else [act.name])
        return " + ".join(words + (tail if self.residual_order == "add_act" else tail[::-1]))


@dataclass
class Matches:
    """All convolutions of a graph in their order."""

    groups: list[Group]
    aliasing: Aliasing


def match(graph: Graph, modules: dict[str, nn.Module], same_shape: SameShape) -> Matches:
    """Find the groups.

    A convolution takes in what follows as long as nothing else takes its result. The later of two
    convolutions that are added takes the addition, as then the other is there already.

    Args:
        modules: the targets of the graph's ``call_module`` nodes.
    """
    calls = {node: call for node in graph.nodes if (call := call_of(node, modules)) is not None}
    aliasing = Aliasing(graph, calls, modules)
    return Matches(_Finder(calls, modules, aliasing, same_shape).find(), aliasing)


@dataclass
class _Finder:
    calls: dict[Any, Call]
    modules: dict[str, nn.Module]
    aliasing: Aliasing
    same_shape: SameShape

    def find(self) -> list[Group]:
        """The groups in the order of the graph."""
        self.taken: set[Node | None] = set()
        groups = []
        for node, call in reversed(self.calls.items()):
            if isinstance(call, Refused) and call.kind is Conv:
                groups.append(Group(node, self.calls, reason=call.reason, missed=True))
            if not isinstance(call, Conv):
                continue
            group = Group(node, self.calls)
            self._extend(group)
            nodes, values = group.nodes, [value for value in group.values if isinstance(value, Node)]
            found = (self.aliasing.changed_between(value, nodes[0], nodes[-1]) for value in values)
            changed = next(filter(None, found), None) if group.is_fused else None
            if changed is not None:
                group.leave(f"a parameter may be overwritten within it, by {changed.name}")
            elif group.is_fused:
                self._take_pad(group)
            groups.append(group)
        for group in groups:
            # The other operand may have been able to take it.
            if group.missed_add in self.taken:
                group.reason, group.missed = "", False
        return groups[::-1]

    def _extend(self, group: Group) -> None:
        last = group.conv
        norm, call = self._following(last, Norm)
        if call is not None and call.module is None and _pads_by_itself(group.call.module):
            group.reason, group.missed = "its norm is a function, and no call has its kind of padding", True
        elif norm is not None:
            group.norm = last = norm
        has_activation = group.norm_call is not None and group.norm_call.act != "identity"
        last = self._take_add(group, last, "act_add" if has_activation else "add_act")
        act, _ = (None, None) if has_activation else self._following(last, Act)
        if act is not None:
            group.act = act
            if group.add is None:
                self._take_add(group, act, "act_add")
        self.taken.update(group.nodes)
        if not group.is_fused:
            reason, missed = self._why_nothing(group)
            group.reason, group.missed = group.reason or reason, group.missed or missed
        elif refused := self._refused_after(group.nodes[-1]):
            group.reason = group.reason or f"what follows is left alone, as {refused.reason}"

    def _following(self, node: Node, kind: type) -> tuple[Node | None, Any]:
        """The only node that takes the result, if it is of a kind, takes it once and is not claimed."""
        if len(node.users) != 1:
            return None, None
        (user,) = node.users
        call = self.calls.get(user)
        fits = isinstance(call, kind) and user.all_input_nodes.count(node) == 1 and user not in self.taken
        return (user, call) if fits else (None, None)

    def _take_add(self, group: Group, last: Node, order: str) -> Node:
        add, call = self._following(last, Add)
        if add is None:
            return last
        residual = call.b if call.a is last else call.a
        reason = self._why_not_added(group, add, call, last, residual)
        if reason:
            group.reason, group.missed, group.missed_add = (
                f"{reason}, so the addition is not fused",
                True,
                add,
            )
            return last
        group.add, group.residual, group.residual_order = add, residual, order
        return add

    def _why_not_added(self, group: Group, add: Node, call: Add, last: Node, residual: Node) -> str:
        if residual.op == "get_attr":
            return "what is added is a parameter"
        if self.same_shape(last, residual) is False:
            return "what is added has another shape, dtype or device"
        if call.overwritten is residual and not self.aliasing.is_forgotten(residual, add):
            return "the addition overwrites a tensor that is seen elsewhere"
        changed = self.aliasing.changed_between(group.call.x, group.conv, add)
        if changed is not None:
            return f"the input of the convolution may be overwritten before the addition, by {changed.name}"
        return ""

    def _take_pad(self, group: Group) -> None:
        """Zeros around the input join the convolution where nothing else sees them."""
        pad = group.call.x
        call = self.calls.get(pad)
        if not isinstance(call, Pad) or len(pad.users) != 1:
            return
        if not group.is_of_modules and (isinstance(group.call.padding, str) or min(call.amounts) < 0):
            return
        if self.aliasing.changed_between(call.x, pad, group.add or group.conv) is None:
            group.pad = pad

    def _why_nothing(self, group: Group) -> tuple[str, bool]:
        """The reason in words, and whether it looks as if something could have been fused."""
        users = list(group.conv.users)
        if not users:
            return "its result is not used", False
        if len(users) > 1:
            is_missed = any(isinstance(self.calls.get(user), Norm) for user in users)
            return f"its result goes to {len(users)} places: {self._names(users)}", is_missed
        if refused := self._refused_after(group.conv):
            return f"what follows is left alone, as {refused.reason}", refused.kind is Norm
        if isinstance(self.calls.get(users[0]), Add):
            return "the addition after it belongs to another convolution", False
        return f"nothing that could be fused follows: its result goes to {self._names(users)}", False

    def _refused_after(self, node: Node) -> Refused | None:
        """The norm or activation that alone takes the result, where it must be left alone."""
        call = self.calls.get(next(iter(node.users))) if len(node.users) == 1 else None
        return call if isinstance(call, Refused) and call.kind in (Norm, Act) else None

    def _names(self, nodes: Iterable[Node]) -> str:
        kinds = {
            node: f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
            for node in nodes
            if node.op == "call_module"
        }
        return ", ".join(
            kinds.get(node, "the output" if node.op == "output" else node.name) for node in nodes
        )


def _pads_by_itself(conv: nn.Conv2d | None) -> bool:
    """Whether a convolution pads with other values than zeros, or as many as the input size asks for."""
    return conv is not None and (conv.padding_mode != "zeros" or layers.pads_same(conv))
