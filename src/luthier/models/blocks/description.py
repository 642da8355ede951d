"""What a decoder layer computes, said in the same words for every family: two halves around the residual stream.

    m = x + post(O attention(rotary(norm(Q n)), rotary(norm(K n)), V n))    n = norm(x)
    y = m + post(D (act(G n') * U n'))                                        n' = norm(m)

The norms of queries and keys and the norms marked `post` are there in some families only. All parameters are those of
the Transformers modules; nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from luthier.kernels.elementwise import rms_norm

# The activations there are kernels for, by their name in a configuration, with the number the kernels give them.
GATES = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}


@dataclass(frozen=True, eq=False)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; * (1 + weight) with `plus_one`."""

    weight: Tensor
    eps: float
    plus_one: bool = False

    @property
    def plus(self) -> float:
        return 1.0 if self.plus_one else 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, plus_one=self.plus_one)


@dataclass(frozen=True, eq=False)
class AttentionHalf:
    """projections: q, k and v, or the one layer that gives all three side by side. Heads are `head_size` wide."""

    norm: Norm
    projections: tuple[Any, ...]
    output: Any
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    post_norm: Norm | None = None

    @property
    def linears(self) -> tuple[Any, ...]:
        return (*self.projections, self.output)

    @property
    def norms(self) -> tuple[Norm, ...]:
        every = (self.norm, self.query_norm, self.key_norm, self.post_norm)
        return tuple(norm for norm in every if norm is not None)


@dataclass(frozen=True, eq=False)
class MlpHalf:
    """projections: gate and up, or the one layer that gives both side by side. gate: a number of GATES, None if unknown."""

    norm: Norm
    projections: tuple[Any, ...]
    down: Any
    gate: int | None
    post_norm: Norm | None = None

    @property
    def linears(self) -> tuple[Any, ...]:
        return (*self.projections, self.down)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,) if self.post_norm is None else (self.norm, self.post_norm)


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer. module: Transformers' own; rotary: the name of its rotary tables where a family has several."""

    module: Any
    attention: AttentionHalf
    mlp: MlpHalf
    rotary: str | None = None

    @property
    def linears(self) -> tuple[Any, ...]:
        return (*self.attention.linears, *self.mlp.linears)

    @cached_property
    def bypassed(self) -> list[nn.Module]:
        """The modules whose own forward the halves stand for: all but the linear layers and what is inside those."""
        return _modules_outside(self.module, {id(linear) for linear in self.linears})


def _modules_outside(module: nn.Module, left_out: set[int]) -> list[nn.Module]:
    found = [module]
    for child in module._modules.values():
        if child is not None and id(child) not in left_out:
            found += _modules_outside(child, left_out)
    return found


def plain_norm(module: Any) -> Norm:
    """A norm whose weight is the factor, as Llama's."""
    return Norm(module.weight, module.variance_epsilon)


def gemma_norm(module: Any) -> Norm:
    """A norm whose weight is the factor less one."""
    return Norm(module.weight, module.eps, plus_one=True)


def separate_projections(attention: Any, norm: Norm, window: int | None) -> AttentionHalf:
    """The attention of most families: q_proj, k_proj, v_proj and o_proj, scale and sizes where Llama has them."""
    config = attention.config
    return AttentionHalf(
        norm,
        (attention.q_proj, attention.k_proj, attention.v_proj),
        attention.o_proj,
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        attention.scaling,
        window,
    )


def separate_gate(mlp: Any, norm: Norm, activation: str) -> MlpHalf:
    """gate_proj, up_proj and down_proj."""
    return MlpHalf(norm, (mlp.gate_proj, mlp.up_proj), mlp.down_proj, GATES.get(activation))
