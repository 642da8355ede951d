"""What is attached to a model. The record lies on the model itself, beside its modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from luthier.adapters.spec import AdapterSpec
from luthier.errors import AdapterError
from luthier.linear import LowRankEmbedding, LowRankLinear, LowRankTerm

PREFIX = "base_model.model."
_RECORD = "_luthier_adapters"
_START = "+start"
_FULL = "_luthier_trains_everything"


@dataclass
class SavedModule:
    """A module trained whole: the one it replaces, and its trained copy."""

    base: nn.Module
    trained: nn.Module


@dataclass
class Attached:
    """One adapter on a model: its settings, the layers with its terms, the modules it trains whole, by name.

    taken_off: the targets with a second, frozen term -s B0 A0, which takes off what the trained one started from.
    """

    name: str
    spec: AdapterSpec
    targets: list[str]
    saved: dict[str, SavedModule] = field(default_factory=dict)
    taken_off: list[str] = field(default_factory=list)

    @property
    def start_key(self) -> str:
        """The name, among a layer's terms, of the frozen one that takes the start off."""
        return f"{self.name}{_START}"

    def keys(self, target: str) -> list[str]:
        """The names of this adapter's terms on a layer."""
        return [self.start_key, self.name] if target in self.taken_off else [self.name]


@dataclass
class AttachReport:
    """What `attach` or `load_adapter` did: names of the layers with terms, numbers that train, and what one should know."""

    targets: list[str]
    trainable_parameters: int
    notes: list[str]


def attached(model: nn.Module) -> dict[str, Attached]:
    """The adapters on the model by name; the dictionary itself, empty where there are none."""
    if not hasattr(model, _RECORD):
        setattr(model, _RECORD, {})
    return getattr(model, _RECORD)


def trains_everything(model: nn.Module) -> bool:
    """Whether `train_everything` has prepared the model."""
    return getattr(model, _FULL, False)


def mark_trains_everything(model: nn.Module) -> None:
    setattr(model, _FULL, True)


def pick(model: nn.Module, name: str | None) -> Attached:
    """The adapter of that name, or the only one. Raises AdapterError if there is none or no single one."""
    adapters = attached(model)
    if name is None and len(adapters) == 1:
        return next(iter(adapters.values()))
    if name is not None and name in adapters:
        return adapters[name]
    listed = ", ".join(adapters) or "none"
    if name is None and adapters:
        raise AdapterError(f"the adapter's name is needed where several are attached: {listed}. Pass name=.")
    wanted = f"; got {name!r}" if name is not None else ""
    raise AdapterError(f"the adapter must be attached to the model{wanted}, attached: {listed}. Call luthier.attach first.")


def term_of(model: nn.Module, adapter: Attached, target: str) -> LowRankTerm:
    """The adapter's own term on the layer of that name, which trains."""
    return terms_of(model, adapter, target)[-1]


def terms_of(model: nn.Module, adapter: Attached, target: str) -> list[LowRankTerm]:
    """All of the adapter's terms on the layer of that name: the one that takes the start off, if there is one, then its own."""
    layer = model.get_submodule(target)
    assert isinstance(layer, (LowRankLinear, LowRankEmbedding))
    terms = [layer.terms[key] for key in adapter.keys(target)]
    assert all(isinstance(term, LowRankTerm) for term in terms)
    return terms  # type: ignore[return-value]


def tensors(model: nn.Module, adapter: Attached) -> Iterator[tuple[str, Tensor]]:
    """The adapter's tensors under PEFT's keys; the tensors themselves, not copies."""
    for target in adapter.targets:
        term = term_of(model, adapter, target)
        prefix = PREFIX + target
        if isinstance(model.get_submodule(target), LowRankEmbedding):
            yield f"{prefix}.lora_embedding_A", term.lora_A
            yield f"{prefix}.lora_embedding_B", term.lora_B
        else:
            yield f"{prefix}.lora_A.weight", term.lora_A
            yield f"{prefix}.lora_B.weight", term.lora_B
        if term.lora_B_bias is not None:
            yield f"{prefix}.lora_B.bias", term.lora_B_bias
        if term.magnitude is not None:
            yield f"{prefix}.lora_magnitude_vector", term.magnitude
    for name, saved in adapter.saved.items():
        for key, tensor in saved.trained.state_dict().items():
            yield f"{PREFIX}{name}.{key}", tensor
