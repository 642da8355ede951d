"""The blocks behind the forward of Transformers' own body, for training loops that are not ours.

HF Trainer, TRL or a person's loop call the model with rows padded on the right, or with rows laid end to end whose
positions restart at 0. While gradients are recorded, the body takes its texts out of the batch, lays beginnings that rows
share once, runs them through the blocks, and puts the hidden states back where they belong. Hidden states at padding are
zero there; no cache is returned in training. Any other call is Transformers' own, and where that loses speed in
training it is said why.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from luthier.models.blocks import choice
from luthier.models.blocks.body import are_switched_on, blocks_hidden, blocks_share, forward_obstacle
from luthier.models.blocks.families import family_of
from luthier.models.blocks.tokens import Tokens
from luthier.models.pack_layout import is_packed
from luthier.models.prefix_tree import PrefixTree, sharing_order

# What callers pass to every body and that changes nothing here: cache_position says where an empty cache begins.
_NO_EFFECT = frozenset({"cache_position", "num_items_in_batch"})
_SWITCHES = frozenset({"output_attentions", "output_hidden_states"})
_ATTENTIONS = ("eager", "sdpa")


def use_blocks_in_forward(model: PreTrainedModel) -> None:
    """Give the body of a model whose family has blocks a forward that uses them wherever they compute the same."""
    body: Any = model.base_model
    if body is not model and family_of(body) is not None and not isinstance(body.forward, BlocksForward):
        body.forward = BlocksForward(body)


class BlocksForward:
    """The body's forward. Texts are the runs of tokens that a row's mask leaves in, cut where its positions restart at 0.

    It holds its body weakly, so that a model is freed when it is let go of; a copy of the body gets a forward of its own.
    """

    uses_blocks = True

    def __init__(self, body: Any):
        self._body = weakref.ref(body)
        own = inspect.signature(type(body).forward)
        self.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> BlocksForward:
        body = self._body()
        return BlocksForward(memo.get(id(body), body))

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
        body: Any = self._body()
        caches = body.config.use_cache if use_cache is None else use_cache
        if _is_training_pass(body, caches, use_cache):
            plain = input_ids is not None and past_key_values is None and inputs_embeds is None
            obstacle = _obstacle(body, others) if plain else "it is given embeddings or a cache"
            if obstacle is None and input_ids is not None:
                texts = _texts(input_ids, attention_mask, position_ids, attention_mask is None and not caches)
                if isinstance(texts, str):
                    obstacle = texts
                elif (hidden := _hidden(body, input_ids, texts)) is not None:
                    return BaseModelOutputWithPast(last_hidden_state=hidden)
            if obstacle is not None:
                choice.say_once(body, f"a call runs as Transformers' modules: {obstacle}.")
        return type(body).forward(
            body,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )


def _is_training_pass(body: Any, caches: bool, asked: bool | None) -> bool:
    """Whether the call is one of a training loop's, and nothing else has taken the model over."""
    if not torch.is_grad_enabled() or asked or (caches and not body.training):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return are_switched_on() and not is_packed(body)


def _obstacle(body: Any, others: dict[str, Any]) -> str | None:
    """Why the blocks would not give what Transformers gives, or None."""
    config = body.config
    if config.output_attentions or config.output_hidden_states or not getattr(config, "return_dict", True):
        return "more than the last hidden state is wanted, or a tuple"
    for key, value in others.items():
        harmless = key in _NO_EFFECT or value is None or (key in _SWITCHES and value is False)
        if not harmless and not (key == "return_dict" and value is True):
            return f"it is given {key}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if config._attn_implementation not in _ATTENTIONS:
        return f"its attention is {config._attn_implementation}"
    if torch_module._has_any_global_hook():
        return "there are hooks on all modules"
    return forward_obstacle(body)


def _hidden(body: Any, input_ids: Tensor, texts: list[Tensor]) -> Tensor | None:
    """(rows, length, hidden) after the final norm, zero where there is no text; None where the blocks cannot be used."""
    flat = input_ids.flatten()
    ids = [flat[places].tolist() for places in texts]
    order, shared = sharing_order(ids) if blocks_share(body) else (list(range(len(ids))), [0] * len(ids))
    tree = PrefixTree()
    laid = [torch.tensor(tree.add(ids[number], common)) for number, common in zip(order, shared, strict=True)]
    starts, parents = (torch.tensor(values, dtype=torch.int64) for values in tree.segments())
    hidden = blocks_hidden(body, torch.tensor(tree.ids), Tokens.of(starts, parents), None)
    if hidden is None:
        return None
    places = torch.cat([texts[number] for number in order])
    # Not by indexing, whose backward adds to a state that rows share in no fixed order.
    own = hidden.index_select(0, torch.cat(laid))
    return hidden.new_zeros(len(flat), hidden.shape[1]).index_copy(0, places, own).view(*input_ids.shape, -1)


def _texts(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None, restarts: bool) -> list[Tensor] | str:
    """The places of each text's tokens in the flattened batch, or why the batch is not runs of whole texts.

    restarts: a position of 0 begins a text. Transformers takes it for that without a mask and a cache only.
    """
    if input_ids.ndim != 2 or input_ids.device.type != "cpu" or (mask is not None and mask.shape != input_ids.shape):
        return "its ids or its mask are not of one row a text"
    rows, length = input_ids.shape
    inside = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask != 0
    if positions is not None:
        if positions.shape[-1] != length:
            return "its positions are not one a token"
        positions = positions.expand(rows, length)
    texts = []
    for row in range(rows):
        count = int(inside[row].sum())
        if not bool(inside[row, :count].all()):
            return "its mask leaves out tokens before the end of a row"
        cuts = _cuts(positions[row, :count]) if positions is not None else []
        if cuts is None or (cuts and not restarts):
            return "its positions do not count up from 0"
        places = torch.arange(row * length, row * length + count)
        texts += [part for part in places.tensor_split(cuts) if len(part)]
    return texts or "it has no tokens"


def _cuts(positions: Tensor) -> list[int] | None:
    """Where texts after the first begin; None for positions that do not count up by one from 0, again and again."""
    if len(positions) == 0:
        return []
    restarts = positions[1:] == 0
    if int(positions[0]) != 0 or bool(((positions.diff() != 1) & ~restarts).any()):
        return None
    return (restarts.nonzero()[:, 0] + 1).tolist()
