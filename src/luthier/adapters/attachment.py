"""Put adapters on a model, take them off, and switch them off for a while."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.adapters.registry import Attached, AttachReport, SavedModule, attached, pick, tensors, terms_of, trains_everything
from luthier.adapters.spec import AdapterSpec
from luthier.adapters.start import Start
from luthier.adapters.targets import Layer, is_inside, low_rank_layers, resolve_saved, resolve_targets, tied_to
from luthier.adapters.widen import Widener, trained_copy
from luthier.errors import AdapterError, bulleted
from luthier.linear import LowRankEmbedding, LowRankLinear, LowRankTerm, column_norms, row_norms


def attach(
    model: nn.Module, spec: AdapterSpec, *, name: str = "default", seed: int | None = None, start: Start | None = None
) -> AttachReport:
    """Put a new trainable adapter on the model; everything but adapters stops requiring gradients.

    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, on embeddings A = 0, B ~ N(0, 1), a magnitude = the row norms of W, so that the
    model gives what it gave before. Each term draws from a generator of its own, seeded by `seed` and the layer's name:
    the same term whatever else is attached and in which order. seed=None draws one from torch's generator.
    start: factors that terms begin with in place of these; layers it does not name begin as above.
    Raises AdapterError if a target or pattern matches nothing, a rank is too large for its layer, the name is taken, or
    `start` does not fit.
    """
    check_attachable(model, name)
    names, notes = _plan_saved(model, spec)
    targets = planned_targets(model, spec)
    saved = copy_modules(model, names, tied=spec.ensure_weight_tying)
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    layers = low_rank_layers(model)
    if start is not None:
        start.check(spec, {target: layers[target] for target in targets})
    adapter = Attached(name, spec, targets, taken_off=list(start.factors) if start is not None and start.taken_off else [])
    given = {} if start is None else start.factors
    terms = {
        target: make_term(layers[target], spec, target, *(factor.clone() for factor in given[target]))
        if target in given
        else _new_term(layers[target], spec, target, seed)
        for target in targets
    }
    install(model, adapter, terms, saved)
    return AttachReport(targets, count_numbers(model, adapter), notes + tied_target_notes(model, targets))


def planned_targets(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """The layers that `attach` will put terms on. Raises AdapterError where it would, for targets and ranks."""
    names, _ = _plan_saved(model, spec)
    targets = resolve_targets(model, spec, [*names, *_trained_whole(model)])
    _check_ranks(model, spec, targets)
    return targets


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter of that name off, or all of them; modules that were trained whole are the base's again.

    A model without adapters stays as it is. Raises AdapterError for a name that is not attached.
    """
    adapters = attached(model)
    for adapter in [pick(model, name)] if name is not None else list(adapters.values()):
        for target in adapter.targets:
            layer = model.get_submodule(target)
            assert isinstance(layer, (LowRankLinear, LowRankEmbedding))
            for key in adapter.keys(target):
                del layer.terms[key]
        for path, saved in adapter.saved.items():
            _put(model, path, saved.base)
        del adapters[adapter.name]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """While the block runs the model is the base: no term adds anything, modules trained whole are the base's own.

    Raises AdapterError on a model that trains everything, which holds no base any more.
    """
    if trains_everything(model):
        raise AdapterError("a model that trains everything keeps no base to go back to. Load the base model a second time.")
    terms = [term for own in attached(model).values() for target in own.targets for term in terms_of(model, own, target)]
    saved = {path: module for adapter in attached(model).values() for path, module in adapter.saved.items()}
    enabled = [term.enabled for term in terms]
    present = {path: model.get_submodule(path) for path in saved}
    try:
        for term in terms:
            term.enabled = False
        for path, module in saved.items():
            _put(model, path, module.base)
        yield
    finally:
        for term, before in zip(terms, enabled, strict=True):
            term.enabled = before
        for path, before_module in present.items():
            _put(model, path, before_module)


def check_attachable(model: nn.Module, name: str) -> None:
    """Raise AdapterError if no adapter of that name can be put on the model."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterError(f"an adapter's name is made of letters, digits, - and _; got {name!r}.")
    if name in attached(model):
        raise AdapterError(f"adapter names must differ; {name!r} is attached already. Detach it or pass another name=.")
    if trains_everything(model):
        raise AdapterError("a model that trains everything takes no adapter. Load the model again.")


def _plan_saved(model: nn.Module, spec: AdapterSpec) -> tuple[list[str], list[str]]:
    """The modules to train whole, and what one should know of those that share their weights."""
    names = resolve_saved(model, spec.modules_to_save) if spec.modules_to_save else []
    tied = tied_to(model)
    if not spec.ensure_weight_tying:
        return names, untying_notes(model, names)
    partners = [other for name in names for other in tied.get(name, [])]
    if not partners:
        raise AdapterError(
            "ensure_weight_tying needs a module that shares its weights in modules_to_save; "
            f"got {list(spec.modules_to_save)}, sharing: {', '.join(tied) or 'none'}. Name one there, or leave the setting out."
        )
    notes = [
        f"{name} and {', '.join(tied[name])} share their weights and are trained as one." for name in names if name in tied
    ]
    return names + [partner for partner in dict.fromkeys(partners) if partner not in names], notes


def untying_notes(model: nn.Module, names: Sequence[str]) -> list[str]:
    """A note for each module in `names` that shares its weights with another and will be trained on its own."""
    return [
        f"{name} shares its weights with {', '.join(others)} and is trained whole on its own: from now on they differ. "
        "ensure_weight_tying=True trains them as one."
        for name, others in tied_to(model).items()
        if is_inside(name, names)
    ]


def copy_modules(model: nn.Module, names: Sequence[str], *, tied: bool) -> dict[str, SavedModule]:
    """Trained float32 copies of the modules, not yet in the model; with `tied` those that share a matrix share its copy.

    Raises AdapterError if one of them is part of an attached adapter already.
    """
    _check_free(model, names)
    widener = Widener()
    saved = {}
    for name in names:
        module = model.get_submodule(name)
        saved[name] = SavedModule(module, trained_copy(module, widener if tied else Widener()))
    return saved


def install(model: nn.Module, adapter: Attached, terms: dict[str, LowRankTerm], saved: dict[str, SavedModule]) -> None:
    """Put terms and trained copies into the model and record them. Everything but adapters stops requiring gradients."""
    if not attached(model):
        model.requires_grad_(False)
    for target, term in terms.items():
        layer = model.get_submodule(target)
        assert isinstance(layer, (LowRankLinear, LowRankEmbedding))
        term.train(layer.training)
        if target in adapter.taken_off:
            layer.terms[adapter.start_key] = opposite(term).to(layer.weight.device)
        layer.terms[adapter.name] = term.to(layer.weight.device)
    for path, module in saved.items():
        _put(model, path, module.trained)
    adapter.saved = saved
    attached(model)[adapter.name] = adapter


def tied_target_notes(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """What one should know of targets that share their weights with another layer."""
    shared = {target: ", ".join(others) for target, others in tied_to(model).items() if target in targets}
    return [
        f"{target} shares its weights with {others}: its term acts on {target} alone, and merging it unties them."
        for target, others in shared.items()
    ]


def count_numbers(model: nn.Module, adapter: Attached) -> int:
    """How many numbers the adapter holds, shared ones once."""
    return sum({tensor.data_ptr(): tensor.numel() for _, tensor in tensors(model, adapter)}.values())


def _new_term(layer: Layer, spec: AdapterSpec, name: str, seed: int) -> LowRankTerm:
    rank = spec.rank_of(name)
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    rows, columns = layer.matrix.shape
    if isinstance(layer, LowRankEmbedding):
        A, B = torch.zeros(rank, rows), torch.empty(columns, rank).normal_(generator=generator)
    else:
        bound = 1 / math.sqrt(columns)
        A, B = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator), torch.zeros(rows, rank)
    return make_term(layer, spec, name, A, B)


def make_term(
    layer: Layer,
    spec: AdapterSpec,
    name: str,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None = None,
    bias: Tensor | None = None,
) -> LowRankTerm:
    """A term for `layer` with the settings `spec` has for it.

    In DoRA without a magnitude given, it starts at the row norms of W + s B A, so that the layer is as it was.
    """
    term = LowRankTerm(A, B, spec.scaling_of(name), spec.dropout, magnitude, bias).to(layer.weight.device)
    if spec.has_magnitude and magnitude is None:
        norms = column_norms if isinstance(layer, LowRankEmbedding) else row_norms
        term.magnitude = nn.Parameter(norms(layer.matrix, term))
    return term


def opposite(term: LowRankTerm) -> LowRankTerm:
    """-s B A of the term as it is now, a frozen copy without dropout."""
    taken = LowRankTerm(term.lora_A.detach().clone(), -term.lora_B.detach(), term.scaling)
    return taken.requires_grad_(False)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _check_ranks(model: nn.Module, spec: AdapterSpec, targets: Sequence[str]) -> None:
    layers = low_rank_layers(model)
    problems = []
    for target in targets:
        largest = min(layers[target].matrix.shape)
        if spec.rank_of(target) > largest:
            problems.append(f"rank must be between 1 and min(in, out) = {largest} on {target}; got {spec.rank_of(target)}.")
    if problems:
        hint = "Try a smaller rank, or rank_pattern for these layers."
        raise AdapterError(
            f"{problems[0]} {hint}" if len(problems) == 1 else f"a rank is too large:\n{bulleted(problems)}\n{hint}"
        )


def _trained_whole(model: nn.Module) -> list[str]:
    return [path for adapter in attached(model).values() for path in adapter.saved]


def _check_free(model: nn.Module, names: Sequence[str]) -> None:
    """Raise AdapterError if a module to be trained whole is part of an attached adapter already."""
    problems = []
    for other in attached(model).values():
        for name in names:
            if any(is_inside(target, [name]) for target in other.targets):
                problems.append(f"{name} carries terms of adapter {other.name!r}")
            if any(is_inside(path, [name]) or is_inside(name, [path]) for path in other.saved):
                problems.append(f"{name} is trained whole by adapter {other.name!r}")
    if problems:
        raise AdapterError(
            f"a module trained whole belongs to one adapter alone:\n{bulleted(problems)}\nDetach that adapter first."
        )


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of `path`, in the mode (training or not) of the one that stood there."""
    before = model.get_submodule(path).training
    if module.training != before:
        module.train(before)
    model.set_submodule(path, module)
