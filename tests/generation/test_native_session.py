"""Cached rows: pages are shared where prompts begin alike, given back, and hold what the model computes."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from luthier.generation.native_session import NativeSession
from luthier.generation.pages import SLAB_BYTES, PagePool
from luthier.kernels import native
from luthier.kernels.decoder import PAGE

pytestmark = pytest.mark.skipif(not native.use_native(), reason="the decoder is one of the compiled kernels")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=2)


@pytest.fixture
def session(model) -> NativeSession:
    with torch.no_grad():
        return NativeSession(model)


def exact(model, ids: list[int]) -> torch.Tensor:
    """Logits behind the whole text."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def texts(count: int, beginning: int, own: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    common = torch.randint(3, 390, (beginning,), generator=generator).tolist()
    return [common + torch.randint(3, 390, (own,), generator=generator).tolist() for _ in range(count)]


@torch.no_grad()
def test_a_beginning_in_common_is_computed_and_stored_once(model, session) -> None:
    prompts = texts(5, 2 * PAGE + 10, 9)
    seen = []
    prefill = session._stack.prefill
    session._stack.prefill = lambda ids, *rest: seen.append(len(ids)) or prefill(ids, *rest)
    rows, logits = session.start(prompts)
    assert seen == [2 * PAGE + 10 + 5 * 9]
    assert session._pool.used == 2 + 5
    assert len({row.pages[0] for row in rows}) == len({row.pages[1] for row in rows}) == 1
    assert len({row.pages[2] for row in rows}) == 5
    for row, prompt in enumerate(prompts):
        assert_near(logits[row], exact(model, prompt))


@torch.no_grad()
def test_rows_that_share_pages_go_on_apart(model, session) -> None:
    """One ends on a page's last place, so that its next token opens a page; equal prompts go on with different tokens."""
    prompts = texts(2, PAGE + 20, PAGE - 20)
    prompts += [prompts[0][:70], prompts[0], prompts[1][:PAGE]]
    rows, _ = session.start(prompts)
    tokens = [[11, 12, 13, 14, 15], [21, 22, 23, 24, 25], [31, 32, 33, 34, 35]]
    for step in tokens:
        logits = session.extend(rows, step)
    for number, prompt in enumerate(prompts):
        assert_near(logits[number], exact(model, prompt + [step[number] for step in tokens]))


@torch.no_grad()
def test_pages_are_given_back_and_used_again(model, session) -> None:
    prompts = texts(3, PAGE, 30)
    rows, _ = session.start(prompts)
    assert session._pool.used == 1 + 3
    session.release(rows[0])
    assert session._pool.used == 1 + 2
    kept = exact(model, [*prompts[1], 5])
    others, _ = session.start(texts(2, 0, 3 * PAGE))
    assert_near(session.extend([rows[1]], [5])[0], kept)
    for row in (*rows[1:], *others):
        session.release(row)
    assert session._pool.used == 0
    before = len(session._pool._slabs)
    session.start(prompts)
    assert len(session._pool._slabs) == before


@torch.no_grad()
def test_what_rows_will_take_is_known_beforehand(session) -> None:
    prompts = texts(3, PAGE, 30)
    page = session.cache_bytes(1)
    assert session.cache_bytes(PAGE + 1) == 2 * page
    assert session.cache_bytes(PAGE + 30, PAGE + 5) == page
    rows, _ = session.start(prompts)
    wanted = [(row, PAGE + 30 + 40) for row in rows]
    assert session.committed_bytes(wanted) == (4 + 3) * page
    for _ in range(40):
        session.extend(rows, [9, 9, 9])
    assert session._pool.used == 4 + 3
    assert session.committed_bytes(wanted) == (4 + 3) * page


@torch.no_grad()
def test_a_row_reads_on_and_is_cut_back(model, session) -> None:
    (text,) = texts(1, 0, 3 * PAGE + 7)
    (row,), _ = session.start([text[:20]])
    assert_near(session.read(row, text[20:]), exact(model, text))
    assert (row.length, len(row.pages)) == (3 * PAGE + 7, 4)
    session.cut(row, PAGE)
    assert (row.length, len(row.pages), session._pool.used) == (PAGE, 1, 1)
    assert_near(session.read(row, [8, 9]), exact(model, [*text[:PAGE], 8, 9]))


def test_a_pool_grows_by_slabs_and_counts_holders() -> None:
    pool = PagePool(SLAB_BYTES // 8)  # two pages a slab
    first, second, third = pool.take(), pool.take(), pool.take()
    assert len({first, second, third}) == 3
    assert (len(pool._slabs), pool.used) == (2, 3)
    pool.share(first)
    pool.release(first)
    assert pool.used == 3
    pool.release(first)
    assert pool.used == 2
    assert pool.take() == first
    large = PagePool(SLAB_BYTES)
    assert large.page_bytes == 4 * SLAB_BYTES
    large.take()
    assert len(large._slabs) == 1
