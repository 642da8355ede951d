"""Packed attention against a dense masked softmax in float64: lengths, groups, window, softcap, shared prefixes."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_close_to_float64, assert_same_for_all_threads, called, values_and_gradients

from luthier.errors import ShapeError
from luthier.kernels import attention, native

# (lengths of the segments, their parents): texts that stand alone, that share one prefix, and that share in groups.
PACKS = (
    ([1, 5], None),
    ([64], None),
    ([65], None),
    ([200, 3, 0, 70, 1], None),
    ([8] * 9, None),
    ([40, 20, 30, 90], [-1, 0, 0, 0]),
    ([130, 130, 7, 64], [-1, 0, 0, 0]),
    ([20, 9, 70, 5, 66, 8, 3, 30], [-1, 0, 1, 1, 0, -1, 5, 4]),
    ([10, 0, 5, 6], [-1, 0, 1, 1]),
    ([40, *[20] * 9], [-1, *[0] * 9]),
)
LIMITS = ((None, None), (16, None), (100, None), (None, 2.0), (33, 3.0))


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def parents_of(parents: list[int] | None) -> torch.Tensor | None:
    return None if parents is None else torch.tensor(parents)


def exact(q, k, v, starts, scale, window=None, softcap=None, parents=None):
    """The dense form: every token against every token, and a mask that says who sees whom."""
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    texts: list[list[int]] = []
    position, sees = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, tokens, dtype=torch.bool)
    for n, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        parent = -1 if parents is None else int(parents[n])
        before = [] if parent < 0 else texts[parent]
        texts.append([*before, *range(begin, end)])
        for row in range(begin, end):
            position[row] = len(before) + row - begin
            sees[row, texts[n][: position[row] + 1]] = True
    sees &= position[:, None] - position < window if window else True
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


def tensors(tokens: int, heads: int, kv_heads: int, size: int) -> list[torch.Tensor]:
    torch.manual_seed(tokens + size)
    return [torch.randn(tokens, n, size) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(("window", "softcap"), LIMITS)
@pytest.mark.parametrize(("lengths", "parents"), PACKS)
def test_attention_and_its_gradients(lengths, parents, window, softcap):
    starts = starts_of(lengths)
    options = {"window": window, "softcap": softcap, "parents": parents_of(parents)}
    assert_close_to_float64(
        lambda q, k, v: attention.packed_attention(q, k, v, starts, 0.25, **options),
        lambda q, k, v: exact(q, k, v, starts, 0.25, **options),
        tensors(int(starts[-1]), 6, 2, 16),
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 80), (2, 1, 128), (8, 1, 20), (1, 1, 1), (2, 2, 256)]
)
def test_heads_and_sizes(heads, kv_heads, size):
    starts = starts_of([70, 9])
    assert_close_to_float64(
        lambda q, k, v: attention.packed_attention(q, k, v, starts, size**-0.5),
        lambda q, k, v: exact(q, k, v, starts, size**-0.5),
        tensors(79, heads, kv_heads, size),
    )


# Runs, gaps, whole segments and none at all; the second of them without a query in the first text.
ROWS = (
    lambda tokens: [n for n in range(tokens) if n % 7 in (2, 3, 4)],
    lambda tokens: list(range(tokens // 2, tokens)),
    lambda tokens: [tokens // 3 + 1],
    lambda tokens: [],
)


@pytest.mark.parametrize("chosen", ROWS, ids=["runs", "end", "one", "none"])
@pytest.mark.parametrize(("window", "softcap"), LIMITS)
@pytest.mark.parametrize(("lengths", "parents"), PACKS[3:])
def test_some_tokens_as_queries(lengths, parents, window, softcap, chosen):
    """Queries of some tokens alone: what they give, and gradients to the keys of all, as if the others' were not used."""
    starts = starts_of(lengths)
    rows = torch.tensor(chosen(int(starts[-1])), dtype=torch.int64)
    options = {"window": window, "softcap": softcap, "parents": parents_of(parents)}
    assert_close_to_float64(
        lambda q, k, v: attention.packed_attention(q[rows], k, v, starts, 0.25, **options, rows=rows),
        lambda q, k, v: exact(q, k, v, starts, 0.25, **options)[rows],
        tensors(int(starts[-1]), 6, 2, 16),
    )


def test_all_tokens_as_rows_are_as_no_rows():
    q, k, v = tensors(90, 4, 2, 16)
    pack = torch.tensor([0, 40, 65, 90]), 0.25
    out = attention.packed_attention(q, k, v, *pack)
    assert torch.equal(attention.packed_attention(q, k, v, *pack, rows=torch.arange(90)), out)


def test_the_library_is_called_forward_and_backward():
    assert native.use_native()
    starts = starts_of([5, 4])
    with called("packed_attention", "packed_attention_backward"):
        values_and_gradients(lambda q, k, v: attention.packed_attention(q, k, v, starts, 0.25), tensors(9, 2, 1, 16))


def test_a_document_does_not_change_with_its_neighbours():
    q, k, v = tensors(100, 4, 2, 32)
    alone = attention.packed_attention(q[30:60].clone(), k[30:60].clone(), v[30:60].clone(), starts_of([30]), 0.2)
    packed = attention.packed_attention(q, k, v, torch.tensor([0, 30, 60, 100]), 0.2)
    assert torch.equal(packed[30:60], alone)


def test_a_prefix_equals_the_documents_with_it_written_out():
    q, k, v = tensors(90, 4, 2, 16)
    starts, parents = torch.tensor([0, 40, 65, 90]), torch.tensor([-1, 0, 0])
    shared = attention.packed_attention(q, k, v, starts, 0.25, parents=parents)
    for begin, end in ((40, 65), (65, 90)):
        rows = torch.cat([torch.arange(40), torch.arange(begin, end)])
        whole = attention.packed_attention(q[rows], k[rows], v[rows], starts_of([len(rows)]), 0.25)
        assert torch.allclose(shared[begin:end], whole[40:], atol=1e-6)


def test_large_packs_are_handled_in_rounds_of_heads():
    """Every segment takes whole tiles of 64 keys, so the turned keys of all 6 heads are more than a round holds."""
    lengths = [67, *[3, 9, 1, 5, 2, 0, 8, 4] * 12]
    parents = torch.tensor([-1 if n % 5 == 0 else n - 1 - n % 3 for n in range(len(lengths))])
    starts, scale = starts_of(lengths), 512**-0.5
    tiles = sum(-(-length // 64) for length in lengths)
    assert tiles * 64 * 512 * 4 * 6 > 48 * 2**20
    assert_close_to_float64(
        lambda q, k, v: attention.packed_attention(q, k, v, starts, scale, parents=parents),
        lambda q, k, v: exact(q, k, v, starts, scale, parents=parents),
        tensors(int(starts[-1]), 12, 6, 512),
    )


def test_keys_that_never_count_do_not_spoil_the_tiles_behind_them():
    q, k, v = tensors(200, 2, 1, 16)
    q[..., 0] = 1.0
    k[:64, :, 0] = -torch.inf
    starts = starts_of([200])
    expected = exact(q.double(), k.double(), v.double(), starts, 0.25)
    for mode in native.MODES:
        with native.forced(mode):
            out = attention.packed_attention(q, k, v, starts, 0.25)
        assert out[:64].isnan().all()
        assert torch.allclose(out[64:], expected[64:].float(), atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_own_document_only(value):
    q, k, v = tensors(40, 2, 2, 16)
    k[5, 0, 3] = value
    starts = starts_of([20, 20])
    for mode in native.MODES:
        with native.forced(mode):
            out = attention.packed_attention(q, k, v, starts, 0.25)
        assert not out[5:20, 0].isfinite().all()
        assert out[20:].isfinite().all()
        assert out[:, 1].isfinite().all()


@pytest.mark.parametrize(("lengths", "parents"), [([50, 130, 9, 77], [-1, 0, 0, 2]), PACKS[-1]], ids=["few", "many"])
def test_results_do_not_depend_on_the_number_of_threads(lengths, parents):
    """Where tasks are few the parts of dk and dv are added up afterwards; where they are many there are none."""
    starts, parents = starts_of(lengths), torch.tensor(parents)
    inputs = tensors(sum(lengths), 6, 2, 16)

    def attended(q, k, v):
        return attention.packed_attention(q, k, v, starts, 0.25, parents=parents)

    assert_same_for_all_threads(lambda: values_and_gradients(attended, inputs))


def test_bad_arguments_are_named():
    q, k, v = tensors(9, 4, 2, 16)
    starts = starts_of([9])
    with pytest.raises(ShapeError, match=r"k and v are \(T, H_kv, D\); got \(9, 4, 16\), \(9, 2, 16\) and \(8, 2, 16\)"):
        attention.packed_attention(q, k, v[:8], starts, 0.25)
    with pytest.raises(ShapeError, match=r"q must have the 9 rows of k and v; got 8. Say by rows which tokens they are of"):
        attention.packed_attention(q[:8], k, v, starts, 0.25)
    for bad in (torch.arange(3), torch.arange(4).int(), torch.arange(8).view(4, 2)):
        with pytest.raises(ShapeError, match=r"rows must be int64 of shape \(4,\), as q has rows, on the CPU"):
            attention.packed_attention(q[:4], k, v, starts, 0.25, rows=bad)
    for bad in ([0, 1, 1, 2], [3, 2, 5, 6], [-1, 0, 1, 2], [6, 7, 8, 9]):
        with pytest.raises(ShapeError, match=r"rows must rise within \[0, 9\); got"):
            attention.packed_attention(q[:4], k, v, starts, 0.25, rows=torch.tensor(bad))
    with pytest.raises(ShapeError, match=r"must be float32; got torch\.float64"):
        attention.packed_attention(q.double(), k.double(), v.double(), starts, 0.25)
    with pytest.raises(ShapeError, match=r"the key heads must divide the query heads; got 2 and 3"):
        attention.packed_attention(q[:, :3], k, v, starts, 0.25)
    for bad in (torch.tensor([0, 8]), torch.tensor([1, 9]), torch.tensor([0, 5, 3, 9])):
        with pytest.raises(ShapeError, match=r"starts must rise from 0 to the number of tokens 9"):
            attention.packed_attention(q, k, v, bad, 0.25)
    with pytest.raises(ShapeError, match=r"starts must be int64"):
        attention.packed_attention(q, k, v, starts.int(), 0.25)
    for bad in ([0], [1], [-2]):
        with pytest.raises(ShapeError, match=r"a segment goes on from an earlier one or, with -1, from none"):
            attention.packed_attention(q, k, v, starts, 0.25, parents=torch.tensor(bad))
    for bad in (torch.tensor([-1, 0]), torch.tensor([-1], dtype=torch.int32)):
        with pytest.raises(ShapeError, match=r"parents must be int64 of shape \(1,\) on the CPU"):
            attention.packed_attention(q, k, v, starts, 0.25, parents=bad)
    with pytest.raises(ShapeError, match=r"window must be at least 1, or None for no window; got 0"):
        attention.packed_attention(q, k, v, starts, 0.25, window=0)
    with pytest.raises(ShapeError, match=r"softcap must be above 0"):
        attention.packed_attention(q, k, v, starts, 0.25, softcap=-1.0)
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ShapeError, match=r"softcap must be above 0 and finite, or None for no cap; got (inf|nan)"):
            attention.packed_attention(q, k, v, starts, 0.25, softcap=bad)


def test_ops_have_honest_schemas_and_fakes():
    q, k, v = tensors(9, 4, 2, 16)
    starts, parents, options = starts_of([2, 5, 2]), torch.tensor([-1, 0, 0]), (0.25, 0.0, 0)
    for rows in (None, torch.tensor([1, 2, 6])):
        inputs = (q if rows is None else q[rows], k, v, starts, parents, rows)
        torch.library.opcheck(torch.ops.luthier.packed_attention.default, (*inputs, *options))
        out, lse = torch.ops.luthier.packed_attention(*inputs, *options)
        torch.library.opcheck(torch.ops.luthier.packed_attention_backward.default, (out, *inputs, out, lse, *options))
