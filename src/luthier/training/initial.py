"""What an adapter begins with under `init`: factors from the weights or from what goes into them, made, kept, read again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.adapters import AdapterSpec, Start
from luthier.adapters.attachment import planned_targets
from luthier.adapters.targets import low_rank_layers
from luthier.calibration import Moments, moments_in_passes, row_packs
from luthier.config import RunConfig
from luthier.data import Dataset
from luthier.errors import CheckpointError, ConfigError, NumericError, one_line
from luthier.linear import LowRankLinear
from luthier.lowrank import Factors, eva, pissa, qera
from luthier.matrices import GGUFMatrix, NF4Matrix
from luthier.models.originals import Originals
from luthier.training.events import Listener

TAKES_OFF = frozenset({"pissa"})
NEEDS_ORIGINALS = frozenset({"loftq", "qera"})
NEEDS_ROWS = frozenset({"eva", "qera"})


def make_start(
    model: Any, path: Path, config: RunConfig, spec: AdapterSpec, rows: Dataset, moments_bytes: int, listener: Listener
) -> Start | None:
    """The factors that `config.init` asks for; None with init default. Deterministic: nothing is drawn at random.

    path: where the model was loaded from; rows: the training rows, of which eva and qera take some; moments_bytes: what their
    second moments may hold at once. Layers for which the init has nothing (embeddings, layers that are not quantised or lost
    nothing by it) are named in a note and begin as by default. Raises ConfigError where it has nothing for any.
    """
    if config.init == "default":
        return None
    layers = low_rank_layers(model)
    targets = planned_targets(model, spec)
    linear = {name: layer for name in targets if isinstance(layer := layers[name], LowRankLinear)}
    originals = Originals(path) if config.init in NEEDS_ORIGINALS else None
    if originals is not None:
        linear = {name: layer for name, layer in linear.items() if _is_quantised_here(layer, originals.kind(name))}
    _refuse_nothing(config, bool(linear))
    scaled: dict[str, tuple[Tensor, Tensor]] = {}
    directions = _Directions()
    for number, (name, second) in enumerate(_in_turn(model, config, list(linear), rows, moments_bytes, listener)):
        listener.stage(f"starting from {config.init}", number, len(linear))
        matrix, rank = linear[name].matrix, spec.rank_of(name)
        if config.init == "eva":
            assert second is not None
            A, B = directions.of(second, rank), torch.zeros(matrix.shape[0], rank)
        else:
            A, B = _factors(matrix.dequantize(), None if originals is None else originals.weight(name), second, rank)
        if not bool(A.isfinite().all() and B.isfinite().all()):
            raise NumericError(f"the factors that terms start from must be finite; those of {name} are not. Use init default.")
        if not bool(A.any()):  # A = B = 0 would never train
            continue
        root = 1.0 if config.init == "eva" else spec.scaling_of(name) ** 0.5
        scaled[name] = (A / root, B / root)
    _refuse_nothing(config, bool(scaled))
    _say_left_out(config, [name for name in targets if name not in scaled], listener)
    return Start(scaled, taken_off=config.init in TAKES_OFF)


class _Directions:
    """eva's A, found once for layers that share an input and a rank."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, second: Tensor, rank: int) -> Tensor:
        if self._last is None or self._last[0] is not second or len(self._last[1]) != rank:
            self._last = second, eva(second, rank)
        return self._last[1]


def _factors(stored: Tensor, original: Tensor | None, second: Tensor | None, rank: int) -> Factors:
    """(A, B) with B A what the term adds at first: the principal part of the weights; of what quantising took from them;
    or that weighed by the inputs. stored: W as the layer computes with it; original: as it was, None for pissa.
    """
    if original is None:
        return pissa(stored, rank)
    if second is None:
        return pissa(original - stored, rank)
    return qera(original, stored, second, rank)


def _in_turn(
    model: Any, config: RunConfig, names: Sequence[str], rows: Dataset, moments_bytes: int, listener: Listener
) -> Iterator[tuple[str, Tensor | None]]:
    """Every layer, with the second moments of its input where the init needs them; each that shares one has the same tensor."""
    if config.init not in NEEDS_ROWS:
        yield from ((name, None) for name in names)
        return
    assert config.micro_batch_tokens is not None  # the plan has filled it in
    packs = row_packs(rows.examples, tokens=config.init_tokens, max_tokens=config.micro_batch_tokens)
    passes: Iterator[dict[str, Moments]] = moments_in_passes(
        model, packs, names, max_bytes=moments_bytes, progress=listener.stage
    )
    for moments in passes:
        yield from ((name, own.second) for name, own in moments.items())


def _is_quantised_here(layer: LowRankLinear, kind: str) -> bool:
    return isinstance(layer.matrix, NF4Matrix | GGUFMatrix) and layer.matrix.kind != kind


def _refuse_nothing(config: RunConfig, any_left: bool) -> None:
    if not any_left:
        what = "layers that are quantized while loading" if config.init in NEEDS_ORIGINALS else "linear layers"
        raise ConfigError(
            f"init {config.init} is for {what}; none of the adapter's targets is one in {config.model}. "
            "Use init default, or a model that is not quantized yet."
        )


def _say_left_out(config: RunConfig, left_out: list[str], listener: Listener) -> None:
    if left_out:
        named = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        listener.note(f"init {config.init} has nothing for {named}: they begin as by default.")


def write_start(path: Path, start: Start) -> None:
    """Keep it as one safetensors file, `<layer>.A` and `<layer>.B`. Raises OSError where the disk refuses."""
    tensors = {
        f"{name}.{side}": tensor for name, pair in start.factors.items() for side, tensor in zip("AB", pair, strict=True)
    }
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"taken_off": json.dumps(start.taken_off)}
    )


def read_start(path: Path, sha256: str) -> Start:
    """What `write_start` kept. sha256: its own, as the run's checkpoints have it.

    Raises CheckpointError if it is missing, damaged or another one.
    """
    again = "Put it back, or start a new run with `luthier train`."
    try:
        with safe_open(path, framework="pt") as file:
            taken_off = (file.metadata() or {}).get("taken_off") == "true"
            tensors: Mapping[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        start = Start({name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}, taken_off)
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"a run goes on from what its terms started with; {path}: {one_line(error)}. {again}") from error
    if start.sha256() != sha256:
        raise CheckpointError(f"a run goes on from what its terms started with; {path} is not as it was written. {again}")
    return start
