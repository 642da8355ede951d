"""Written answers to many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Renderer
from luthier.evaluation.pieces import text_of
from luthier.evaluation.stops import end_tokens
from luthier.generation import Constraint, Generator, Sampling
from luthier.progress import Progress


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    progress: Progress | None = None,
    renderer: Renderer | None = None,
    sampling: Sampling | None = None,
    constraint: Constraint | None = None,
) -> list[str]:
    """The text of each prompt's answer without special tokens; the likeliest next token each time where no sampling is given.

    An answer ends before the first end token of the model's configuration, the tokenizer or the chat template, after
    `max_new_tokens`, or where the model's positions end. `Generator` says how rows run side by side.
    progress("generating", answers done, prompts) after each answer. renderer: the tokenizer's, made here where not given.
    Raises DataError naming every prompt that is empty or leaves no position for an answer.
    """
    stops = end_tokens(model, tokenizer, renderer or Renderer(tokenizer, max_length=64))
    done = 0

    def count(_number: int, _answer: list[int]) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("generating", done, len(prompts))

    generator = Generator(model, stops=stops)
    answers = generator.generate(prompts, max_new_tokens, sampling=sampling, constraint=constraint, done=count)
    return [text_of(tokenizer, ids) for ids in answers]
