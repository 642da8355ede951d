"""Labels: what a walk through them allows at each token, and what is no list of labels."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from luthier.errors import ConfigError, DataError
from luthier.generation import Generator, LabelConstraint, Sampling
from luthier.generation.constraint import restricted

STOPS = frozenset({2, 90})


def allowed(walk, size: int = 100) -> set[int]:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0))
    left = walk.restrict(logits)
    kept = left.isfinite()
    assert torch.equal(left[kept], logits[kept])
    return set(kept.nonzero().flatten().tolist())


def test_each_token_allows_what_some_label_goes_on_with() -> None:
    labels = LabelConstraint([[5, 6], [5, 6, 7, 8], [5, 9], [4]])
    assert labels.longest == 4
    walk = labels.begin(STOPS)
    assert allowed(walk) == {4, 5}
    assert walk.rest() is None
    walk.take(5)
    assert allowed(walk) == {6, 9}
    walk.take(6)
    assert allowed(walk) == {7, *STOPS}
    assert walk.rest() is None
    walk.take(7)
    assert walk.rest() == [8]
    other = labels.begin(STOPS)
    other.take(5)
    other.take(9)
    assert other.rest() == []
    assert allowed(labels.begin(STOPS)) == {4, 5}  # one walk leaves the others alone


def test_a_stop_ends_a_label_that_others_go_on_from() -> None:
    walk = LabelConstraint([[5], [5, 6]]).begin(STOPS)
    walk.take(5)
    walk.take(90)
    assert walk.rest() == []


def test_without_a_stop_the_longest_of_labels_that_begin_alike_is_taken() -> None:
    walk = LabelConstraint([[5], [5, 6], [7]]).begin(frozenset())
    walk.take(5)
    assert allowed(walk) == {6}
    assert walk.rest() is None
    walk.take(6)
    assert walk.rest() == []


@pytest.mark.parametrize("temperature", [0.0, 8.0])
def test_texts_come_out_as_they_went_in(temperature: float) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("llama", seed=2)
    labels = ["card", "card_lost", "table for two", "é 🎻", "two words"]
    prompts = [tokenizer(f"question {number}").input_ids for number in range(40)]
    answers = Generator(model, stops=frozenset({2})).generate(
        prompts, 30, sampling=Sampling(temperature), constraint=LabelConstraint.of_texts(tokenizer, labels)
    )
    texts = {tokenizer.decode(answer) for answer in answers}
    assert texts <= set(labels)
    if temperature:
        assert len(texts) > 2


def test_what_is_no_list_of_labels() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match="needs at least one; there is none"):
        LabelConstraint([])
    with pytest.raises(DataError, match="labels must have a token at least; label 2 is empty"):
        LabelConstraint([[3], []])
    with pytest.raises(DataError, match="labels must differ; label 3 has the tokens of one before it"):
        LabelConstraint([[3], [4], [3]])
    with pytest.raises(DataError, match="must not hold a token that ends an answer; one holds token 2"):
        LabelConstraint([[3], [4, 2, 5]]).begin(STOPS)
    with pytest.raises(DataError, match=r"the model's tokenizer can write; it changes 'a<\|im_end\|>b'"):
        LabelConstraint.of_texts(tokenizer, ["fine", "a<|im_end|>b"])


def test_ids_that_the_model_has_not() -> None:
    with pytest.raises(ConfigError, match="tokens of the model's vocabulary of 10; got 12"):
        restricted(torch.zeros(10), torch.tensor([3, 12]))
    with pytest.raises(ConfigError, match="leaves no token that may come next"):
        restricted(torch.zeros(10), torch.tensor([], dtype=torch.int64))
