"""The blocks behind the forward of Transformers' own body, for training loops that are not ours.

HF Trainer, TRL or a person's loop call the model with padded batches, or with rows laid end to end whose positions
restart at 0. While gradients are recorded, the body takes its texts out of the batch, lays beginnings that rows share once,
runs them through the blocks, and puts the hidden states back where they belong. Any other call is Transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from luthier.models.blocks.body import are_switched_on, blocks_hidden, blocks_share
from luthier.models.blocks.families import family_of
from luthier.models.blocks.tokens import Tokens
from luthier.models.pack_layout import is_packed
from luthier.models.prefix_tree import PrefixTree, sharing_order

# What callers pass to every body and that changes nothing here: cache_position says where an empty cache begins.
_NO_EFFECT = frozenset({"cache_position", "num_items_in_batch", "return_dict"})


def use_blocks_in_forward(model: PreTrainedModel) -> None:
    """Give the body of a model whose family has blocks a forward that uses them wherever they compute the same."""
    body: Any = model.base_model
    if body is not model and family_of(body) is not None and not isinstance(body.forward, BlocksForward):
        body.forward = BlocksForward(model, body.forward)


class BlocksForward:
    """The body's forward. Texts are the runs of tokens that a row's mask leaves in, cut where its positions restart at 0."""

    uses_blocks = True

    def __init__(self, model: PreTrainedModel, original: Callable[..., Any]):
        self.model = model
        self.original = original
        self.__wrapped__ = original

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        plain = past_key_values is None and inputs_embeds is None and not use_cache and not _asks_for_more(others)
        config = self.model.config
        plain = plain and not config.output_attentions and not config.output_hidden_states
        if plain and input_ids is not None and torch.is_grad_enabled() and are_switched_on() and not is_packed(self.model):
            restarts = attention_mask is None and not (config.use_cache if use_cache is None else use_cache)
            texts = _texts(input_ids, attention_mask, position_ids, restarts)
            hidden = None if texts is None else self._hidden(input_ids, texts)
            if hidden is not None:
                return BaseModelOutputWithPast(last_hidden_state=hidden)
        return self.original(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )

    def _hidden(self, input_ids: Tensor, texts: list[Tensor]) -> Tensor | None:
        """(rows, length, hidden) after the final norm, zero where there is no text; None where the blocks cannot be used."""
        flat = input_ids.flatten()
        ids = [flat[places].tolist() for places in texts]
        numbers = range(len(ids))
        order, shared = sharing_order(ids) if blocks_share(self.model) else (list(numbers), [0] * len(ids))
        tree = PrefixTree()
        laid = [torch.tensor(tree.add(ids[number], common)) for number, common in zip(order, shared, strict=True)]
        starts, parents = (torch.tensor(values, dtype=torch.int64) for values in tree.segments())
        hidden = blocks_hidden(self.model, torch.tensor(tree.ids), Tokens.of(starts, parents), None)
        if hidden is None:
            return None
        places = torch.cat([texts[number] for number in order])
        spread = hidden.new_zeros(len(flat), hidden.shape[1]).index_copy(0, places, hidden[torch.cat(laid)])
        return spread.view(*input_ids.shape, -1)


def _asks_for_more(others: dict[str, Any]) -> bool:
    """Whether the caller wants something besides hidden states, or passes something we do not know."""
    if others.get("return_dict") is False:
        return True
    return any(value is not None and value is not False for key, value in others.items() if key not in _NO_EFFECT)


def _texts(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None, restarts: bool) -> list[Tensor] | None:
    """The places of each text's tokens in the flattened batch; None for a batch that is not runs of whole texts.

    restarts: a position of 0 begins a text. Transformers takes it for that without a mask and a cache only.
    """
    if input_ids.ndim != 2 or input_ids.device.type != "cpu" or (mask is not None and mask.shape != input_ids.shape):
        return None
    rows, length = input_ids.shape
    inside = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask != 0
    if positions is not None:
        positions = positions.expand(rows, length) if positions.shape[-1] == length else None
        if positions is None:
            return None
    texts = []
    for row in range(rows):
        places = inside[row].nonzero()[:, 0]
        if len(places) == 0:
            continue
        if int(places[-1]) - int(places[0]) + 1 != len(places):
            return None
        cuts = _cuts(positions[row, places] if positions is not None else None)
        if cuts is None or (cuts and not restarts):
            return None
        texts += [part + row * length for part in places.tensor_split(cuts)]
    return texts or None


def _cuts(positions: Tensor | None) -> list[int] | None:
    """Where texts after the first begin. Positions count up by one; a text may begin at any one, and restarts at 0."""
    if positions is None:
        return []
    steps = positions.diff()
    restarts = (steps != 1) & (positions[1:] == 0)
    if bool(((steps != 1) & ~restarts).any()):
        return None
    return (restarts.nonzero()[:, 0] + 1).tolist()
