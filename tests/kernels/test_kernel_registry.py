"""When an op is called past torch's dispatcher, and that nothing which acts there is lost by it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.kernels import registry
from luthier.kernels.elementwise_ops import rms_norm_op

X, W = torch.arange(6.0).view(2, 3) + 1, torch.ones(3)


class Own(Tensor):
    """A tensor of another class than torch's."""


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def profiled():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def way(*arguments) -> str:
    return registry._direct(lambda *_: "dispatched", lambda *_: "direct")(*arguments)


def normed(x: Tensor) -> Tensor:
    return rms_norm_op(x, None, W, 0.0, 1e-6)[1]


def test_without_gradients_plain_tensors_go_the_direct_way():
    with torch.no_grad():
        assert way(X, None, [W, torch.nn.Parameter(W)], [None, W], [], [1, 2], [0.5], 3, 0.5, True) == "direct"
    with torch.inference_mode():
        assert way([X], 1) == "direct"
    assert way(X) == "dispatched"


@pytest.mark.parametrize("watcher", [Dispatching, Functions, profiled], ids=lambda watcher: watcher.__name__)
def test_what_looks_on_sees_the_op(watcher):
    with torch.no_grad(), watcher():
        assert way(X) == "dispatched"


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("other", [W.as_subclass(Own), W.to("meta")], ids=["subclass", "meta"])
def test_one_tensor_of_another_kind_is_enough(other, place):
    arguments = [[X, other], [other, X], [None, other]]
    with torch.no_grad():
        assert way(other, X) == way(X, other) == way(X, 1, arguments[place]) == "dispatched"


def test_vmap_and_traces_without_gradients():
    many = torch.stack([X, 2 * X - 9])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a trace converts sizes to numbers, and that vmap falls back to a loop
        assert torch.equal(torch.vmap(normed)(many), torch.stack([normed(x) for x in many]))
        traced = torch.jit.trace(normed, (many[0],))
        assert torch.equal(traced(many[1]), normed(many[1]))


def test_a_compiled_function_keeps_the_op_in_its_graph():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(normed, backend=keep, fullgraph=True)
        assert torch.equal(compiled(X), normed(X))
    assert any("luthier" in str(node.target) for node in graphs[0].graph.nodes)
