"""The groups of a graph: each convolution, and what follows it, as far as one fused call can compute it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
    call: Conv
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
    def nodes(self) -> list[Node]:
        """Its nodes in the order in which they run."""
        tail = (self.add, self.act) if self.residual_order == "add_act" else (self.act, self.add)
        return [node for node in (self.pad, self.conv, self.norm, *tail) if node is not None]

    def leave(self, reason: str) -> None:
        """Take the group apart, although it looks as if it could be fused."""
        self.pad = self.norm = self.add = self.act = self.residual = None
        self.reason, self.missed = reason, True

    @property
    def is_fused(self) -> bool:
        return any((self.norm, self.add, self.act))


@dataclass
class Matches:
    """All convolutions of a graph in their order, and those that are left alone."""

    groups: list[Group]
    calls: dict[Node, Call]
    refused: dict[Node, str]
    aliasing: Aliasing


def match(graph: Graph, modules: dict[str, nn.Module], same_shape: SameShape) -> Matches:
    """Find the groups.

    A convolution takes in what follows as long as nothing else takes its result. The later of two
    convolutions that are added takes the addition, as then the other is there already.

    Args:
        modules: the targets of the graph's ``call_module`` nodes.
    """
    calls = {node: call for node in graph.nodes if (call := call_of(node, modules)) is not None}
    finder = _Finder(calls, modules, Aliasing(graph, calls, modules), same_shape)
    refused = {
        node: call.reason for node, call in calls.items() if isinstance(call, Refused) and call.kind is Conv
    }
    return Matches(finder.find(), calls, refused, finder.aliasing)


class _Finder:
    def __init__(
        self,
        calls: dict[Node, Call],
        modules: dict[str, nn.Module],
        aliasing: Aliasing,
        same_shape: SameShape,
    ) -> None:
        self.calls = calls
        self.modules = modules
        self.aliasing = aliasing
        self.same_shape = same_shape
        self.convs = [(node, call) for node, call in calls.items() if isinstance(call, Conv)]
        self.taken: set[Node] = set()

    def find(self) -> list[Group]:
        """The groups in the order of the graph."""
        groups = []
        for node, call in reversed(self.convs):
            group = Group(node, call)
            self._extend(group)
            changed = self._changed_value(group) if group.is_fused else None
            if changed is not None:
                group.leave(f"a parameter may be overwritten within it, by {changed.name}")
            if group.is_fused:
                self._take_pad(group)
            groups.append(group)
        for group in groups:
            # The other operand may have been able to take it.
            if group.missed_add in self.taken:
                group.reason, group.missed = "", False
        return groups[::-1]

    def _extend(self, group: Group) -> None:
        last = self._take_norm(group)
        last = self._take_add(group, last, "add_act")
        following = self._following(last)
        call = self.calls.get(following) if following is not None else None
        if isinstance(call, Act) and not self._has_own_activation(group):
            group.act = last = self._take(following)
            if group.add is None:
                last = self._take_add(group, last, "act_add")
        if not group.is_fused:
            reason, missed = self._why_nothing(group)
            group.reason = group.reason or reason
            group.missed = group.missed or missed

    def _take(self, node: Node | None) -> Node:
        assert node is not None
        self.taken.add(node)
        return node

    def _take_norm(self, group: Group) -> Node:
        following = self._following(group.conv)
        call = self.calls.get(following) if following is not None else None
        if isinstance(call, Norm):
            if call.module is None and _pads_by_itself(group.call.module):
                group.reason, group.missed = (
                    "its norm is a function, and no call has its kind of padding",
                    True,
                )
                return group.conv
            group.norm = self._take(following)
            return group.norm
        return group.conv

    def _has_own_activation(self, group: Group) -> bool:
        call = self.calls.get(group.norm) if group.norm is not None else None
        return isinstance(call, Norm) and call.act != "identity"

    def _following(self, node: Node) -> Node | None:
        """The only node that takes the result, if it takes it once and no one has claimed it."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        return user if user.all_input_nodes.count(node) == 1 and user not in self.taken else None

    def _take_add(self, group: Group, last: Node, order: str) -> Node:
        add = self._following(last)
        call = self.calls.get(add) if add is not None else None
        if add is None or not isinstance(call, Add):
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
        if order == "add_act" and self._has_own_activation(group):
            order = "act_add"
        group.add, group.residual, group.residual_order = self._take(add), residual, order
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

    def _changed_value(self, group: Group) -> Node | None:
        """A node that may overwrite a parameter of the group while it runs."""
        first, *_, last = group.nodes
        for value in values_of(group, self.calls):
            changed = self.aliasing.changed_between(value, first, last) if isinstance(value, Node) else None
            if changed is not None:
                return changed
        return None

    def _is_block(self, group: Group) -> bool:
        """Whether its parts are modules, so that a module can stand for it, which looks at each residual."""
        norm = self.calls.get(group.norm) if group.norm is not None else None
        return group.call.module is not None and (not isinstance(norm, Norm) or norm.module is not None)

    def _take_pad(self, group: Group) -> None:
        """Zeros around the input join the convolution where nothing else sees them."""
        pad = group.call.x
        call = self.calls.get(pad)
        if not isinstance(call, Pad) or len(pad.users) != 1:
            return
        if not self._is_block(group) and (isinstance(group.call.padding, str) or min(call.amounts) < 0):
            return
        if self.aliasing.changed_between(call.x, pad, group.add or group.conv) is None:
            group.pad = pad

    def _why_nothing(self, group: Group) -> tuple[str, bool]:
        """The reason in words, and whether it looks as if something could have been fused."""
        users = list(group.conv.users)
        if not users:
            return "its result is not used", False
        if len(users) > 1:
            parts = [user for user in users if isinstance(self.calls.get(user), Norm)]
            return f"its result goes to {len(users)} places: {_names(users, self.modules)}", bool(parts)
        call = self.calls.get(users[0])
        if isinstance(call, Refused) and call.kind in (Norm, Act):
            return f"what follows is left alone: {call.reason}", call.kind is Norm
        if isinstance(call, Add):
            return group.reason or "the addition after it belongs to another convolution", group.missed
        return f"nothing that could be fused follows: its result goes to {_names(users, self.modules)}", False


def values_of(group: Group, calls: dict[Node, Call]) -> list[Value]:
    """The parameters and buffers of a group, without those that are None."""
    norm = calls.get(group.norm) if group.norm is not None else None
    vectors = [norm.weight, norm.bias, norm.mean, norm.var] if isinstance(norm, Norm) else []
    return [value for value in (group.call.weight, group.call.bias, *vectors) if value is not None]


def _pads_by_itself(conv: nn.Conv2d | None) -> bool:
    """Whether a convolution pads with other values than zeros, or as many as the input size asks for."""
    return conv is not None and (conv.padding_mode != "zeros" or layers.pads_same(conv))


def _names(nodes: Iterable[Node], modules: dict[str, nn.Module]) -> str:
    return ", ".join(_name(node, modules) for node in nodes)


def _name(node: Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    return "the output" if node.op == "output" else node.name
