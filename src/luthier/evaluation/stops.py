"""Where an answer ends."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Renderer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> frozenset[int]:
    """The ids that end an answer: those of the model's generation configuration and configuration, the tokenizer's
    end-of-sequence token, and the token with which the chat template closes an assistant's turn."""
    found: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found.update(ids if isinstance(ids, list | tuple) else [ids])
    # A row with an answer shows how the template, or the end-of-sequence token in its place, closes it.
    example = renderer.render({"prompt": "question", "completion": "answer"}, "a row that shows how an answer ends")
    taught = [token for token, supervised in zip(example.ids, example.supervised, strict=True) if supervised]
    controls = {tokenizer.convert_tokens_to_ids(token) for token in renderer.encoder.control_tokens}
    # An answer may begin with control tokens too, such as those that name a channel; the last one closes it.
    closing = next((token for token in reversed(taught) if token in controls), None)
    return frozenset(found if closing is None else found | {closing})
