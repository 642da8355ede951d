"""Greedy answers to many prompts at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Renderer
from luthier.errors import DataError, bulleted
from luthier.evaluation.pieces import text_of
from luthier.evaluation.stops import end_tokens, position_limit
from luthier.models.modes import evaluation_mode
from luthier.models.packed import carries_state
from luthier.progress import Progress

MAX_ROWS = 32
PROMPT_TOKENS_AT_ONCE = 4096
CACHE_BYTES_AT_ONCE = 512 << 20


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    progress: Progress | None = None,
    renderer: Renderer | None = None,
) -> list[str]:
    """The likeliest next token, again and again, for each prompt; the text of each answer without special tokens.

    An answer ends before the first end token of the model's configuration, the tokenizer or the chat template, after
    `max_new_tokens`, or where the model's positions end. Prompts run in batches of similar length whose keys and values
    stay within CACHE_BYTES_AT_ONCE; rows that have ended leave their batch. Other rows change an answer only by rounding.
    progress("generating", answers done, prompts) after each answer. renderer: the tokenizer's, made here where not given.
    Raises DataError naming every prompt that is empty or leaves no position for an answer.
    """
    _check_prompts(prompts, position_limit(model))
    stops = end_tokens(model, tokenizer, renderer or Renderer(tokenizer, max_length=64))
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    with evaluation_mode(model):
        for rows in _batches(model, prompts, max_new_tokens):
            for row, ids in zip(rows, _decode(model, [prompts[row] for row in rows], max_new_tokens, stops), strict=True):
                answers[row] = ids
                done += 1
                if progress is not None:
                    progress("generating", done, len(prompts))
    return [text_of(tokenizer, ids) for ids in answers]


def _check_prompts(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    problems = [f"prompt {number} is empty" for number, prompt in enumerate(prompts, 1) if not prompt]
    if limit is not None:
        long = [(number, len(prompt)) for number, prompt in enumerate(prompts, 1) if len(prompt) >= limit]
        problems += [f"prompt {number} has {length} tokens" for number, length in long]
    if problems:
        room = "at least one token" if limit is None else f"1 to {limit - 1} tokens, the model having {limit} positions"
        raise DataError(f"a prompt to answer needs {room}; got:\n{bulleted(problems)}\nShorten these rows or leave them out.")


def _batches(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
    """Rows of similar length, the longest first, so that a batch that is too large for the machine shows at once."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    if not _takes_padding(model):
        yield from ([row] for row in order)
        return
    token_bytes = _cache_bytes_a_token(model)
    while order:
        longest = len(prompts[order[0]])
        by_cache = CACHE_BYTES_AT_ONCE // (token_bytes * (longest + max_new_tokens))
        rows = max(1, min(MAX_ROWS, PROMPT_TOKENS_AT_ONCE // longest, by_cache))
        yield order[:rows]
        order = order[rows:]


def _cache_bytes_a_token(model: PreTrainedModel) -> int:
    """Keys and values of one token in all layers, float32."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_size * 4


def _takes_padding(model: PreTrainedModel) -> bool:
    """Whether a batch may be padded on the left: positions come from outside, and only keys and values are carried on."""
    wanted = {"position_ids", "past_key_values", "attention_mask"}
    return wanted <= inspect.signature(model.forward).parameters.keys() and not carries_state(model)


def _decode(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: frozenset[int]
) -> list[list[int]]:
    """The answers' ids, end tokens left out, in the order of the prompts. All rows start and go on together."""
    if not _takes_padding(model):
        return [_decode_alone(model, prompt, max_new_tokens, stops) for prompt in prompts]
    limit = position_limit(model)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    ids, mask = _padded_left(prompts, model.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for _ in range(max_new_tokens):
        visible = None if bool(mask.all()) else mask
        output = model(
            input_ids=ids, attention_mask=visible, position_ids=positions, past_key_values=cache, use_cache=True, **last_only
        )
        chosen = output.logits[:, -1].argmax(1)
        going_on = []
        for place, (row, token) in enumerate(zip(open_rows, chosen.tolist(), strict=True)):
            if token in stops:
                continue
            answers[row].append(token)
            if limit is None or len(prompts[row]) + len(answers[row]) < limit:
                going_on.append(place)
        if not going_on:
            break
        if len(going_on) < len(open_rows):
            keep = torch.tensor(going_on, device=mask.device)
            open_rows = [open_rows[place] for place in going_on]
            chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
            cache.batch_select_indices(keep)
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return answers


def _padded_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, both (B, longest) int64; what stands left of a prompt has id 0 and mask 0."""
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _decode_alone(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, stops: frozenset[int]) -> list[int]:
    """One prompt through Transformers' own generation, for families with a memory of their own kind."""
    limit = position_limit(model)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, num_beams=1,
        eos_token_id=sorted(stops) or None, pad_token_id=0,
    )  # fmt: skip
    answer = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stops else answer
