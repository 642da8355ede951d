"""The trainable state of a model: its parameters for an optimiser, its tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from luthier.adapters.registry import pick, tensors, trains_everything
from luthier.errors import AdapterError, NumericError, bulleted


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter that requires gradients, once, with its name in the model; after `train_everything` all of them."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Copies on the CPU of the tensors that training changes: PEFT's keys for an adapter.

    After `train_everything`: every weight under its name in the checkpoint, tied ones once.
    name: which adapter; not needed where only one is attached. Raises AdapterError if there is none.
    """
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in _tensors(model, name).items()}


@torch.no_grad()
def set_adapter_state(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Copy what `adapter_state` gave back into the model. Raises AdapterError naming every key that is missing, too many
    or of another shape, NumericError naming those with NaN or Inf; the model is then as it was."""
    own = _tensors(model, name)
    problems = misfits({key: tuple(tensor.shape) for key, tensor in own.items()}, state)
    if problems:
        raise AdapterError(
            f"the state must fit the adapter on the model:\n{bulleted(problems)}\nAttach with the settings it was made with."
        )
    check_finite_tensors(state, "the state")
    for key, tensor in own.items():
        tensor.copy_(state[key])


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights and persistent buffers under their checkpoint names, tied ones once; the tensors themselves, no terms."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    state = {}
    for key, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if ".terms." not in key and (identity not in seen or tensor.numel() == 0):
            seen.add(identity)
            state[key] = tensor
    return state


def misfits(expected: Mapping[str, tuple[int, ...]], got: Mapping[str, Tensor]) -> list[str]:
    """One line for every key that is missing, too many, or of another shape, with both shapes."""
    problems = [f"{key} is missing; it must be {shape}" for key, shape in expected.items() if key not in got]
    for key, tensor in got.items():
        if key not in expected:
            problems.append(f"{key} {tuple(tensor.shape)} has no place in the adapter")
        elif tuple(tensor.shape) != expected[key]:
            problems.append(f"{key} must be {expected[key]}; it is {tuple(tensor.shape)}")
    return problems


def check_finite_tensors(state: Mapping[str, Tensor], what: str) -> None:
    """Raise NumericError naming every tensor that holds NaN or Inf."""
    bad = [key for key, tensor in state.items() if not _is_finite(tensor.split(4096) if tensor.ndim else [tensor])]
    if bad:
        hint = "Use an earlier checkpoint, or train with a lower learning rate."
        raise NumericError(f"{what} must be finite; NaN or Inf in:\n{bulleted(bad)}\n{hint}")


def _is_finite(pieces: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(piece).all()) for piece in pieces)


def _tensors(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    if trains_everything(model):
        return full_state(model)
    return dict(tensors(model, pick(model, name)))
