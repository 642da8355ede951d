"""The timings of the kernel benchmark: what is run, how much work it is, what is asked of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels.attention import packed_attention
from luthier.kernels.elementwise_ops import (
    gated_backward_op,
    gated_op,
    layer_norm_backward_op,
    layer_norm_op,
    rms_norm_backward_op,
    rms_norm_op,
    rotary_in_place_op,
)
from luthier.kernels.head import linear_cross_entropy
from luthier.kernels.linear_ops import Part, Term, backward_input_op, flatten, forward_op, outer_op
from luthier.kernels.quantize import nf4_storage, quantize_gguf, quantize_nf4
from luthier.kernels.storage import DENSE_DTYPES, GGUF_BLOCKS, Storage, from_parts

RANK = 16
# Shares of the multiply-add peak that are asked for: (T, in, out) -> share, for these storages, forward and backward.
TARGET_STORAGES = ("f32", "bf16", "nf4", "q4_1", "q8_0", "q4_k")
LINEAR_TARGETS = {
    (512, 4096, 4096): 0.85,
    (512, 4096, 11008): 0.85,
    (512, 576, 1536): 0.78,
    (512, 1536, 576): 0.78,
    (512, 576, 576): 0.78,
    (512, 576, 49152): 0.80,
    (64, 4096, 4096): 0.65,
}
# Shares of the read bandwidth at one token, in stored bytes.
READ_TARGETS = {"bf16": 0.70, "nf4": 0.45, "q4_0": 0.45, "q4_1": 0.45, "q4_k": 0.45}
TORCH_TARGET = 1.25
COPY_TARGET = 0.75
NF4_RATE = 1.5e9
# Matrices at one token are many enough that none is still in a cache when its turn comes again.
ROTATED_BYTES = 256 * 2**20

Run = Callable[[], object]


@dataclass
class Case:
    """One timing. work: flops where bound is "fma", bytes where it is "read" or "copy"; a rate is work a second.

    peers do the same job; peer_work is theirs where it differs. target: the share of the bound that is asked for, or the
    rate where bound is None; peer_targets: the ratios of rates that are asked for.
    """

    name: str
    shape: str
    storage: str
    work: float
    bound: str | None
    run: Run
    peers: Mapping[str, Run] = field(default_factory=dict)
    peer_work: float | None = None
    target: float | None = None
    peer_targets: Mapping[str, float] = field(default_factory=dict)


def stored(weight: Tensor, kind: str) -> Storage:
    """A float32 matrix as `kind`; Q5 kinds, which we do not write, get random blocks with a plain scale."""
    shape = (weight.shape[0], weight.shape[1])
    if kind in DENSE_DTYPES:
        return Storage.dense(weight.to(DENSE_DTYPES[kind]))
    if kind == "nf4":
        return nf4_storage(quantize_nf4(weight), shape)
    if kind.startswith("q5"):
        elements, size = GGUF_BLOCKS[kind]
        blocks = torch.randint(0, 256, (weight.numel() // elements, size), dtype=torch.uint8)
        blocks[:, :4] = torch.tensor([0.01, 0.01], dtype=torch.float16).view(torch.uint8)
        return Storage(kind, shape, blocks.view(shape[0], -1))
    return Storage(kind, shape, quantize_gguf(weight, kind.upper()))


def linear_cases(tokens: int, inputs: int, outputs: int, kind: str, *, backward: bool = True) -> list[Callable[[], Case]]:
    """Forward, and the gradient to x, with a LoRA term of rank 16; at one token forward alone, over matrices in turn."""
    if tokens == 1:
        return [partial(_one_token, inputs, outputs, kind)]
    directions = (False, True) if backward else (False,)
    return [partial(_linear, tokens, inputs, outputs, kind, turned) for turned in directions]


def _linear(tokens: int, inputs: int, outputs: int, kind: str, turned: bool) -> Case:
    weight = torch.randn(outputs, inputs) / inputs**0.5
    term = Term(torch.randn(RANK, inputs), torch.randn(outputs, RANK), 2.0)
    packed, layout, numbers, bias, A, B = flatten([Part(stored(weight, kind), None, term)])
    x = torch.randn(tokens, outputs if turned else inputs)

    def run() -> object:
        if turned:
            return backward_input_op([x], packed, layout, numbers, A, B)
        return forward_op(x, packed, layout, numbers, bias, A, B)

    def peer() -> Tensor:
        return x @ weight if turned else F.linear(x, weight)

    plain = 2.0 * tokens * inputs * outputs
    wanted = kind in TARGET_STORAGES
    return Case(
        "linear backward" if turned else "linear forward",
        f"{tokens}x{inputs}x{outputs}",
        kind,
        plain + 2.0 * tokens * RANK * (inputs + outputs),
        "fma",
        run,
        {"torch f32": peer},
        plain,
        LINEAR_TARGETS.get((tokens, inputs, outputs)) if wanted else None,
        {"torch f32": TORCH_TARGET} if wanted and tokens == 512 else {},
    )


def factor_cases(tokens: int, inputs: int, outputs: int) -> list[Callable[[], Case]]:
    """dA = s v^T x and dB = s dy^T u at rank 16: at most 2 * 16 flops for 4 bytes read, so memory bounds them."""

    def build(name: str, features: int, turned: bool) -> Case:
        wide, narrow = torch.randn(tokens, features), torch.randn(tokens, RANK)
        flops, run = 2.0 * tokens * features * RANK, partial(outer_op, narrow, wide, 2.0, turned)
        return Case(
            f"linear {name}", f"{tokens}x{inputs}x{outputs}", "f32", flops, "fma", run, {"torch f32": lambda: narrow.T @ wide}
        )

    return [partial(build, "dA", inputs, False), partial(build, "dB", outputs, True)]


def _one_token(inputs: int, outputs: int, kind: str) -> Case:
    weight = torch.randn(outputs, inputs) / inputs**0.5
    first = stored(weight, kind)
    copies = max(2, -(-ROTATED_BYTES // first.size_bytes))
    turns = itertools.cycle([first] + [_copied(first) for _ in range(copies - 1)])
    dense = itertools.cycle([weight] + [weight.clone() for _ in range(ROTATED_BYTES // (4 * weight.numel()))])
    x = torch.randn(1, inputs)

    def run() -> None:
        packed, layout, numbers, bias, A, B = flatten([Part(next(turns))])
        forward_op(x, packed, layout, numbers, bias, A, B)

    size, target = float(first.size_bytes), READ_TARGETS.get(kind)
    peers = {"torch f32": lambda: F.linear(x, next(dense))}
    return Case("linear forward", f"1x{inputs}x{outputs}", kind, size, "read", run, peers, size, target)


def _copied(s: Storage) -> Storage:
    return from_parts(s.kind, s.shape, [tensor.clone() for tensor in s.tensors()], s.offset, s.transposed)


# The tensors that an element-wise op reads and writes, each of (tokens, width).
ELEMENTWISE_PASSES = {
    "rms_norm": 2,
    "add_rms_norm": 4,
    "rms_norm backward": 3,
    "layer_norm": 2,
    "layer_norm backward": 3,
    "rotary": 2,
    "swiglu": 3,
    "swiglu backward": 5,
    "geglu": 3,
    "geglu backward": 5,
}


def elementwise_cases(tokens: int, width: int) -> list[Callable[[], Case]]:
    """Every element-wise op over (tokens, width), which should be larger than the caches together with its results."""
    return [partial(_elementwise, name, tokens, width) for name in ELEMENTWISE_PASSES]


def _elementwise(name: str, tokens: int, width: int) -> Case:
    x, y, w = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(width)
    row = torch.rand(tokens)
    heads, tables = x.view(tokens, -1, 64), torch.rand(tokens, 64)
    none = heads[:, :0]
    runs: dict[str, Run] = {
        "rms_norm": lambda: rms_norm_op(x, None, w, 0.0, 1e-6),
        "add_rms_norm": lambda: rms_norm_op(x, y, w, 0.0, 1e-6),
        "rms_norm backward": lambda: rms_norm_backward_op(y, None, x, w, 0.0, row, False),
        "layer_norm": lambda: layer_norm_op(x, w, w, 1e-6),
        "layer_norm backward": lambda: layer_norm_backward_op(y, x, w, row, row, False),
        "rotary": lambda: rotary_in_place_op(heads, none, tables, tables, False),
        "swiglu": lambda: gated_op(x, y, 0),
        "swiglu backward": lambda: gated_backward_op(x, x, y, 0),
        "geglu": lambda: gated_op(x, y, 1),
        "geglu backward": lambda: gated_backward_op(x, x, y, 1),
    }
    torch_runs: dict[str, Run] = {
        "rms_norm": lambda: F.rms_norm(x, (width,), w, 1e-6),
        "layer_norm": lambda: F.layer_norm(x, (width,), w, w, 1e-6),
        "swiglu": lambda: F.silu(x) * y,
        "geglu": lambda: F.gelu(x, approximate="tanh") * y,
    }
    peers = {"torch": torch_runs[name]} if name in torch_runs else {}
    work = 4.0 * ELEMENTWISE_PASSES[name] * tokens * width
    return Case(name, f"{tokens}x{width}", "f32", work, "copy", runs[name], peers, target=COPY_TARGET)


def attention_case(lengths: tuple[int, ...], heads: int = 9, kv_heads: int = 3, size: int = 64) -> Case:
    """Forward and backward over documents of these lengths; flops are those of the causal half, 3.5 times forward."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(starts[-1])
    q, k, v = (torch.randn(tokens, n, size, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    out_gradient = torch.randn(tokens, heads, size)
    bounds = list(itertools.pairwise(starts.tolist()))

    def one_by_one() -> Tensor:
        pieces = []
        for begin, end in bounds:
            a, b, c = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            piece = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
            pieces.append(piece.squeeze(0).transpose(0, 1))
        return torch.cat(pieces)

    def both(forward: Callable[[], Tensor]) -> None:
        torch.autograd.grad(forward(), (q, k, v), out_gradient)

    flops = 3.5 * sum(2.0 * heads * size * length * (length + 1) for length in lengths)
    described = f"{len(lengths)} of {lengths[0]}"
    return Case(
        "attention fwd+bwd",
        described,
        "f32",
        flops,
        "fma",
        lambda: both(lambda: packed_attention(q, k, v, starts, size**-0.5)),
        {"torch loop": lambda: both(one_by_one)},
    )


def head_case(rows: int, vocabulary: int, width: int, kind: str) -> Case:
    """Loss and gradient to the hidden states: two products."""
    weight = torch.randn(vocabulary, width) / width**0.5
    storage = stored(weight, kind)
    hidden, targets = torch.randn(rows, width, requires_grad=True), torch.randint(0, vocabulary, (rows,))

    def peer() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum"), hidden)

    flops = 4.0 * rows * vocabulary * width
    shape = f"{rows}x{width}x{vocabulary}"
    run = partial(linear_cross_entropy, hidden, storage, targets)
    return Case("head loss+gradient", shape, kind, flops, "fma", run, {"torch f32": peer})


def quantize_case(rows: int, columns: int, kind: str) -> Case:
    """Bytes of float32 read a second. kind: "NF4" (double quantisation included) or a GGUF kind."""
    weight = torch.randn(rows, columns)
    run = partial(quantize_nf4, weight) if kind == "NF4" else partial(quantize_gguf, weight, kind)
    target = NF4_RATE if kind == "NF4" else None
    return Case(f"quantize {kind}", f"{rows}x{columns}", "f32", 4.0 * weight.numel(), None, run, target=target)
