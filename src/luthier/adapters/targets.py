"""Which modules an adapter goes to: from names and regular expressions to layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from luthier.adapters.spec import ALL_LINEAR, AdapterSpec, matches, pattern_fits
from luthier.errors import AdapterError, bulleted, nearest
from luthier.linear import LowRankEmbedding, LowRankLinear

Layer = LowRankLinear | LowRankEmbedding


def low_rank_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer that can carry a term, by its name, in the model's order. Raises AdapterError if there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (LowRankLinear, LowRankEmbedding))}
    if not layers:
        raise AdapterError(
            f"the model must come from luthier.load; {type(model).__name__} has no layer that can carry an adapter."
        )
    return layers


def module_names(model: nn.Module) -> list[str]:
    """The names of all modules as plain Transformers knows them: what stands inside a low-rank layer is left out."""
    inside = tuple(f"{name}." for name in low_rank_layers(model))
    return [name for name, _ in model.named_modules() if name and not name.startswith(inside)]


def resolve_targets(model: nn.Module, spec: AdapterSpec, saved: Iterable[str]) -> list[str]:
    """The names of the layers that `spec` puts terms on, in the model's order.

    saved: names of modules trained whole, which take no terms. Raises AdapterError, listing candidates, if a name or
    the expression matches no layer, or if an entry of rank_pattern or alpha_pattern matches none of the targets.
    """
    whole = tuple(saved)
    free = [name for name in low_rank_layers(model) if not is_inside(name, whole)]
    if spec.targets == ALL_LINEAR:
        chosen = [name for name in all_linear(model) if name in free]
        problems = [] if chosen else ["'all-linear' matches nothing: no linear layer is left beside the head"]
    elif isinstance(spec.targets, str):
        chosen = [name for name in free if matches(spec.targets, name, whole=True)]
        problems = [] if chosen else [_unmatched_regex(spec.targets, free)]
    else:
        chosen = [name for name in free if named_by(name, spec.targets)]
        problems = [
            _unmatched_name(entry, model, free, whole) for entry in spec.targets if not any(named_by(n, [entry]) for n in free)
        ]
    if problems:
        raise AdapterError(f"every target must match a linear layer or embedding:\n{bulleted(problems)}\n{_candidates(free)}")
    check_patterns(spec, chosen)
    return chosen


def all_linear(model: nn.Module) -> list[str]:
    """Every linear layer but the output head, in the model's order."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return [name for name, layer in low_rank_layers(model).items() if isinstance(layer, LowRankLinear) and layer is not head]


def resolve_saved(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The modules that `names` mean, in the model's order; of two where one holds the other, the outer one.

    Raises AdapterError, listing candidates, if a name matches no module with weights.
    """
    with_weights = {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
    available = [name for name in module_names(model) if name in with_weights]
    problems = []
    for entry in names:
        if not any(named_by(name, [entry]) for name in available):
            problems.append(f"{entry!r} matches nothing.{nearest(entry, _leaves(available))}")
    if problems:
        raise AdapterError(
            f"every entry of modules_to_save must match a module with weights:\n{bulleted(problems)}\n{_candidates(available)}"
        )
    chosen = [name for name in available if named_by(name, names)]
    return [name for name in chosen if not is_inside(name, [other for other in chosen if other != name])]


def named_by(module: str, names: Iterable[str]) -> bool:
    """Whether one of `names` is the module's whole name or its end after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def is_inside(module: str, outer: Iterable[str]) -> bool:
    """Whether the module is one of `outer` or stands inside one of them."""
    return any(module == name or module.startswith(f"{name}.") for name in outer)


def shortest_names(model: nn.Module, targets: Sequence[str], saved: Sequence[str]) -> list[str]:
    """A list of names that means exactly `targets`: their last parts where these suffice, otherwise the whole names."""
    leaves = _leaves(targets)
    meant = [name for name in module_names(model) if named_by(name, leaves) and not is_inside(name, saved)]
    return leaves if meant == list(targets) else list(targets)


def tied_to(model: nn.Module) -> dict[str, list[str]]:
    """From each layer that shares its matrix with others to the names of those others."""
    layers = low_rank_layers(model)
    sharing: dict[int, list[str]] = {}
    for name, layer in layers.items():
        sharing.setdefault(id(layer.matrix), []).append(name)
    return {name: [other for other in names if other != name] for names in sharing.values() if len(names) > 1 for name in names}


def check_patterns(spec: AdapterSpec, targets: Sequence[str]) -> None:
    """Raise AdapterError naming every entry of rank_pattern and alpha_pattern that matches none of the targets."""
    problems = [
        f"{label}: {pattern!r} matches nothing.{nearest(pattern, _leaves(targets))}"
        for label, pattern in inert_patterns(spec, targets)
    ]
    if problems:
        raise AdapterError(f"every pattern must match a target:\n{bulleted(problems)}\n{_candidates(targets)}")


def inert_patterns(spec: AdapterSpec, targets: Sequence[str]) -> list[tuple[str, str]]:
    """The entries of rank_pattern and alpha_pattern that match none of the targets: (`rank_pattern`, its key) and so on."""
    labelled = (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern))
    return [
        (label, pattern)
        for label, patterns in labelled
        for pattern in patterns
        if not any(pattern_fits(pattern, name) for name in targets)
    ]


def _unmatched_regex(pattern: str, free: Sequence[str]) -> str:
    hint = ""
    if any(named_by(name, [pattern]) for name in free):
        hint = f" One string is a regular expression for the whole name; for names that end in it give a list: [{pattern!r}]."
    return f"{pattern!r} matches nothing.{hint}"


def _unmatched_name(entry: str, model: nn.Module, free: Sequence[str], whole: Sequence[str]) -> str:
    for name in module_names(model):
        if named_by(name, [entry]) and is_inside(name, whole):
            return f"{entry!r} matches only what is trained whole already (modules_to_save). Take it out of one of the two."
        if named_by(name, [entry]):
            kind = type(model.get_submodule(name)).__name__
            return f"{entry!r} matches only {name}, a {kind}. To train it whole, name it in modules_to_save."
    return f"{entry!r} matches nothing.{nearest(entry, _leaves(free))}"


def _candidates(names: Sequence[str]) -> str:
    example = f" (whole names look like {names[0]})" if names else ""
    return f"Candidates: {', '.join(_leaves(names))}{example}."


def _leaves(names: Iterable[str]) -> list[str]:
    """The last parts of the names, each once, in order; a number alone says nothing and stays out."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return [leaf for leaf in leaves if not leaf.isdigit()]
