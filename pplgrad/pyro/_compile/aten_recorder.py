"""A step recorded while it runs: every operation below autograd, forward and backward, as a graph that can run again.

What the step reads and did not make itself becomes an input of the graph. Numbers that the program makes of Python
objects are constants, which holds as long as those objects are the same. Where a value leaves the tensors, or where random
numbers do not come from torch's generators as they go on, the graph would not do what the program does: refused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad.errors import CompileError
from pplgrad.pyro._recording import reading_refused, recorders
from pplgrad.pyro._tracing.callers import is_check, user_line
from pplgrad.pyro._tracing.indexing import one_hot, without_numbers
from pplgrad.pyro._tracing.operations import dynamic_shape, tensors_in

_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift.default)
_MOVES = torch.ops.aten._to_copy.default

LEAVING = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
}
# These show the memory of an array, whose numbers are compared at each step like all that the program reads.
SHOWING = {torch.from_numpy, torch.frombuffer}
# These copy the elements of a list of tensors without an operation that could be dispatched.
COPYING = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}


@dataclass
class Captured:
    """A tensor that the step read: where in the program, and its place among the graph's inputs."""

    tensor: torch.Tensor
    node: Node
    line: str
    constant: bool


class Recorder(TorchDispatchMode):
    """Records, while active, what is computed; `graph_of` gives the graph of what led to some tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._graph = Graph()
        self._nodes: dict[int, Node] = {}
        # A freed tensor's identity may be given to another, so every tensor that was seen is kept alive.
        self._alive: list[torch.Tensor] = []
        self._captured: list[Captured] = []
        self._generators: dict[torch.device, torch.Tensor] = {}
        self._written = False
        self.making = False
        self._leaving = _Leaving(self)

    def __enter__(self) -> Recorder:
        recorders.append(self)
        self._leaving.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, where)
        self._leaving.__exit__(kind, error, where)
        recorders.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._refuse(func, args, kwargs)
        if self.making and func is _MOVES and id(args[0]) not in self._nodes:
            # Numbers on their way to a GPU: the constant is what arrives there.
            self._node(out := func(*args, **kwargs), True)
            return out
        lifted = func in _LIFTS and (self.making or id(args[0]) not in self._nodes)
        inputs = map_aggregate((args, kwargs), lambda x: self._node(x, lifted) if isinstance(x, torch.Tensor) else x)
        random = _is_random(func)
        if random:
            self._check_generator(args, kwargs)
        out = func(*args, **kwargs)
        written = func._schema.is_mutable
        if not written and not tensors_in(out):
            return out
        if lifted:
            self._bind(out, inputs[0][0])
            return out
        node = self._graph.call_function(func, *inputs)
        node.meta["fixed"] = not random and all(x.meta["fixed"] for x in node.all_input_nodes)
        node.meta["on_gpu"] = all(x.is_cuda for x in tensors_in(out))
        # What was made of constants alone may be a view of what this operation wrote into.
        self._written |= written and not node.meta["fixed"]
        if out is not None:
            self._bind(out, node)
        if random:
            self._note_generator(out)
        return out

    def graph_of(self, outputs: Sequence[torch.Tensor]) -> tuple[GraphModule, list[Captured]]:
        """Return the graph that computes `outputs`, and its inputs in their order.

        The graph's `meta` says whether all that it computes of what changes is computed on one GPU, writing into none of its inputs.
        """
        self._graph.output(tuple(self._node(x, False) for x in outputs))
        self._graph.eliminate_dead_code(must_run)
        written = any(writes(x) for x in self._graph.nodes)
        for captured in self._captured:
            if captured.constant and captured.tensor.numel() == 1:
                _write_out(self._graph, captured)
            elif captured.constant and written:
                _copy(self._graph, captured)
        used = [x for x in self._captured if x.node.users]
        for node in list(self._graph.nodes):
            if node.op == "placeholder" and not node.users:
                self._graph.erase_node(node)
        self._graph.lint()
        module = GraphModule(torch.nn.Module(), self._graph)
        changing = [node for node in self._graph.nodes if not node.meta.get("fixed", True)]
        one_device = len({x.tensor.device for x in used}) == 1
        on_gpu = one_device and bool(changing) and all(node.meta["on_gpu"] for node in changing)
        module.meta["on_one_gpu"] = on_gpu and not any(writes_into_input(node) for node in self._graph.nodes)
        return module, used

    def _node(self, tensor: torch.Tensor, constant: bool) -> Node:
        node = self._nodes.get(id(tensor))
        if node is None:
            after = self._captured[-1].node if self._captured else None
            with self._graph.inserting_after(after):  # type: ignore[arg-type]
                node = self._graph.placeholder(f"input_{len(self._captured)}")
            node.meta |= {"fixed": constant, "on_gpu": tensor.is_cuda, "like": _like(tensor)}
            # A tensor that shares an array's memory would change with it.
            kept = tensor.detach().clone() if constant else tensor
            self._captured.append(Captured(kept, node, user_line(), constant))
            self._nodes[id(tensor)] = node
            self._alive.append(tensor)
        return node

    def show(self, tensor: torch.Tensor) -> None:
        """Note a tensor that an array's numbers were made into: a constant, as long as the array is the same."""
        self._node(tensor, True)

    def _bind(self, out: Any, node: Node) -> None:
        if isinstance(out, torch.Tensor):
            self._nodes[id(out)] = node
            self._alive.append(out)
            node.meta["like"] = _like(out)
            return
        for i, part in enumerate(out):
            if isinstance(part, (torch.Tensor, list, tuple)):
                item = self._graph.call_function(operator.getitem, (node, i))
                item.meta |= {kind: node.meta[kind] for kind in ("fixed", "on_gpu")}
                self._bind(part, item)

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        if torch.Tag.data_dependent_output in func.tags:
            self.refuse_reading((args, kwargs))
        elif dynamic_shape(func, args):
            raise CompileError(
                f"The step cannot be compiled, because a shape depends on the values of a tensor at {user_line()}; write it "
                'with torch.where or a weight of 0, or use compile=False (compile="fallback" does so by itself).'
            )
        if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
            raise CompileError(
                f"The step cannot be compiled, because a generator of its own draws random numbers at {user_line()}; use "
                "torch's default generator."
            )

    def refuse_reading(self, tree: Any) -> None:
        """Refuse that Python reads a tensor's value, unless it is made of constants or a library checks its arguments."""
        read = tensors_in(tree)
        nodes = [self._nodes.get(id(x)) for x in read]
        if not self._written and all(node is not None and node.meta["fixed"] for node in nodes):
            return
        if is_check() and all(x.dtype == torch.bool for x in read):
            return
        raise reading_refused(user_line())

    def refuse_copying(self, out: torch.Tensor, tree: Any) -> None:
        """Refuse that numbers are copied out of tensors by no operation that could be recorded."""
        node = self._nodes.get(id(out))
        if node is not None and node.op == "placeholder" and node.meta["fixed"] and tensors_in(tree):
            raise reading_refused(user_line())

    def _check_generator(self, args: Any, kwargs: Any) -> None:
        """Refuse random numbers whose generator was put into another state since the last ones."""
        for device, state in self._generators.items():
            if not torch.equal(_state(device), state):
                raise CompileError(
                    f"The step cannot be compiled, because it puts a random number generator into another state before "
                    f"{user_line()} (by manual_seed, fork_rng or a checkpoint); let the generator go on."
                )

    def _note_generator(self, out: Any) -> None:
        for tensor in tensors_in(out):
            if tensor.device.type in ("cpu", "cuda"):
                self._generators[tensor.device] = _state(tensor.device)

    def forget_generators(self) -> None:
        """Accept the generators' states as they are."""
        self._generators = {device: _state(device) for device in self._generators}


class _Leaving(TorchFunctionMode):
    """Sees the ways out of torch that no dispatched operation shows."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LEAVING:
            self._recorder.refuse_reading(args)
        if func is torch.Tensor.__getitem__:
            args = without_numbers(args)
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func in SHOWING:
            self._recorder.show(out := func(*args, **(kwargs or {})))
            return out
        if func not in COPYING:
            return func(*args, **(kwargs or {}))
        # `new_tensor` takes kind and place from its tensor, and numbers from what follows.
        numbers = (args[1:] if func is torch.Tensor.new_tensor else args, kwargs)
        self._recorder.making = not (numbers[0] and isinstance(numbers[0][0], torch.Tensor))
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self._recorder.making = False
        self._recorder.refuse_copying(out, numbers)
        return out


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """Return what torch's function does, which must not find out the number of classes from the values."""
    if num_classes < 0:
        raise reading_refused(user_line())
    return one_hot(tensor, num_classes)


def _like(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape and dtype that holds nothing."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def writes(node: Node) -> bool:
    """Return whether a node writes into a tensor."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def must_run(node: Node) -> bool:
    """Return whether a node does more than compute: it writes into a tensor, or moves a generator on."""
    if node.op in ("placeholder", "output"):
        return True
    return _is_random(node.target) or writes(node)


def drawn(node: Node) -> int:
    """Return how many random numbers a node draws."""
    return node.meta["like"].numel() if _is_random(node.target) and "like" in node.meta else 0


def _is_random(operation: Any) -> bool:
    return isinstance(operation, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in operation.tags


def writes_into_input(node: Node) -> bool:
    """Return whether a node may write into an input of the graph, or into a view of one."""
    if not writes(node):
        return False
    target = node.args[0] if node.args else None
    if any(x.alias_info is not None and x.alias_info.is_write for x in node.target._schema.arguments[1:]):
        return True
    while isinstance(target, Node) and target.op == "call_function":
        alias = target.target is operator.getitem or any(x.alias_info is not None for x in _returns(target))
        if not alias:
            return False
        target = target.args[0]
    return True


def _returns(node: Node) -> list:
    """Return what the schema of a node's operation says that it returns."""
    target: Any = node.target
    return list(target._schema.returns) if isinstance(target, torch._ops.OpOverload) else []


def _write_out(graph: Graph, captured: Captured) -> None:
    """Put a number into the graph in the place of an input."""
    x = captured.tensor
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        number = graph.call_function(
            torch.ops.aten.full.default, (list(x.shape), x.item()), {"dtype": x.dtype, "device": x.device}
        )
    number.meta["like"] = captured.node.meta["like"]
    captured.node.replace_all_uses_with(number)


def _copy(graph: Graph, captured: Captured) -> None:
    """Let the graph work on a copy of a constant, which it might write into."""
    with graph.inserting_after(captured.node):
        copied = graph.call_function(torch.ops.aten.clone.default, (captured.node,))
    captured.node.replace_all_uses_with(copied, lambda user: user is not copied)


def _state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
