"""What a checkpoint may lack and what it may have over, by what the model's class in Transformers says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import ModelError

# Buffers that older versions of Transformers wrote into checkpoints; the model computes them itself.
COMPUTED_BUFFERS = re.compile(
    r"\.(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.(masked_)?bias|attention\.(masked_)?bias)$"
)
MAX_LISTED = 3


def really_missing(
    model: PreTrainedModel, keys: Iterable[str], expected: Mapping[str, Tensor], where: str
) -> tuple[list[str], list[str]]:
    """Those of the missing `keys` that have no value, and notes on the others.

    A class may name weights that need not be stored. Those that it computes have a value in the skeleton `expected`; those
    that it would draw at random have none, and are missing all the same. Raises ModelError where what is missing are
    experts that the checkpoint holds one by one.
    """
    keys = list(keys)
    allowed = _any_of(model._keys_to_ignore_on_load_missing)
    own = {key for key in keys if allowed(key) and not expected[key].is_meta}
    missing = [key for key in keys if key not in own]
    stacks = [key for key in missing if expected[key].ndim == 3]
    if stacks:
        raise ModelError(
            f"{where}: mixtures of experts whose files hold each expert by itself are not supported; {stacks[0]} would have "
            "to be put together from several tensors. Use a dense model."
        )
    present = [key for key in keys if key in own]
    return missing, [f"{listed(present)} not stored in {where}; the model's own values stand there."] if own else []


def really_unexpected(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of the stored `names` without a place that the class does not leave out by itself, and notes on the others."""
    names = [name for name in names if not COMPUTED_BUFFERS.search("." + name)]
    allowed = _any_of(model._keys_to_ignore_on_load_unexpected)
    ignored = [name for name in names if allowed(name)]
    notes = [f"{listed(ignored)} left out: {type(model).__name__} has no use for them."] if ignored else []
    return [name for name in names if not allowed(name)], notes


def _any_of(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    """Whether one of the regular expressions is found in a name."""
    joined = "|".join(f"({pattern})" for pattern in patterns or ())
    return (lambda name: re.search(joined, name) is not None) if joined else (lambda _name: False)


def listed(names: list[str]) -> str:
    """`a is`, or `5 weights (a, b, c, ...) are`"""
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{len(names)} weights ({', '.join(names[:MAX_LISTED])}{', ...' if len(names) > MAX_LISTED else ''}) are"
