"""The model that an adapter makes of its base, tensor by tensor: nothing is merged before it is asked for.

W' = g (W + s B A) for each layer with terms, and everything else as it is. W is the matrix that was trained on, or that
of the original model in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters.registry import attached
from luthier.adapters.targets import Layer, is_inside, low_rank_layers
from luthier.errors import AdapterError, bulleted
from luthier.linear import LowRankEmbedding, LowRankLinear, enabled_terms
from luthier.matrices import Matrix


@dataclass(frozen=True)
class Part:
    """One tensor of the merged model. name: in the checkpoint; shape: as plain Transformers stores it; layer: the name of
    the low-rank layer whose weight it is, None for biases, norms and all else."""

    name: str
    shape: tuple[int, ...]
    layer: str | None


class Merge:
    """A model with its adapters merged.

    originals: matrices to merge into by the layer's name, in place of those that `model` holds; layers that were trained
    whole have no other. tied: whether head and embedding are one matrix still. Computing that merges both if either has
    a term. Raises AdapterError where a term has a bias and its layer has none, which no plain model can hold.
    """

    def __init__(self, model: PreTrainedModel, originals: Mapping[str, Matrix] | None = None):
        self.model = model
        present = low_rank_layers(model)
        saved = [path for adapter in attached(model).values() for path in adapter.saved]
        originals = {name: matrix for name, matrix in (originals or {}).items() if not is_inside(name, saved)}
        # Layers of its own on the same tensors, so that what becomes of those in the model does not change the merge.
        self.layers = {name: _twin(layer, originals.get(name, layer.matrix)) for name, layer in present.items()}
        self.embedding = _name_of(present, model.get_input_embeddings())
        self.head = _name_of(present, model.get_output_embeddings())
        self._check_biases()
        self.was_tied = bool(model.config.tie_word_embeddings)
        self.tied = self.was_tied and self._is_tied()

    @property
    def untied(self) -> bool:
        """Whether head and embedding were one matrix and have become two."""
        return self.was_tied and not self.tied

    @property
    def changed(self) -> list[str]:
        """The layers that a term changes."""
        return [name for name, layer in self.layers.items() if enabled_terms(layer)]

    def parts(self) -> list[Part]:
        """Every tensor of the merged model in its order; a head that is tied is left out."""
        parts: list[Part] = []
        inside = tuple(f"{name}." for name in self.layers)
        for name, module in self.model.named_modules():
            if name in self.layers:
                if name == self.head and self.tied:
                    continue
                layer = self.layers[name]
                parts.append(Part(f"{name}.weight", self._stored_shape(layer), name))
                if isinstance(layer, LowRankLinear) and layer.bias is not None:
                    parts.append(Part(f"{name}.bias", tuple(layer.bias.shape), None))
            elif not f"{name}.".startswith(inside):
                own = module.state_dict(keep_vars=True)
                parts += [Part(f"{name}.{key}", tuple(tensor.shape), None) for key, tensor in own.items() if "." not in key]
        return parts

    def value(self, part: Part) -> Tensor:
        """The part's numbers in float32, (out, in) for a layer's weight; a copy where they are merged."""
        if part.layer is not None:
            return self.weight(part.layer)
        path, _, key = part.name.rpartition(".")
        if path in self.layers:
            bias = self.bias(path)
            assert bias is not None
            return bias
        return self.model.get_submodule(path).state_dict()[key].to(torch.float32)

    def matrix(self, name: str) -> Matrix:
        """What the layer of that name is merged into."""
        return self.layers[name].matrix

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """The merged matrix (out, in) of a layer in float32."""
        layer = self.layers[name]
        if not enabled_terms(layer):
            return layer.matrix.dequantize()
        return layer.merged()[0] if isinstance(layer, LowRankLinear) else layer.merged()

    @torch.no_grad()
    def bias(self, name: str) -> Tensor | None:
        """The merged bias of a linear layer, None without one."""
        layer = self.layers[name]
        assert isinstance(layer, LowRankLinear)
        needs_merge = any(term.lora_B_bias is not None for term in enabled_terms(layer))
        return layer.merged()[1] if needs_merge else layer.bias

    def stored(self, part: Part, value: Tensor) -> Tensor:
        """A layer's weight (out, in) laid out as the checkpoint has it: turned where Transformers keeps it so."""
        turned = part.layer is not None and self.layers[part.layer].matrix.transposed
        return value.T.contiguous() if turned else value

    def _stored_shape(self, layer: Layer) -> tuple[int, ...]:
        rows, columns = layer.matrix.shape
        return (columns, rows) if layer.matrix.transposed else (rows, columns)

    def _is_tied(self) -> bool:
        head, embedding = self.layers[self.head], self.layers[self.embedding]
        if head.matrix is embedding.matrix and not enabled_terms(head) and not enabled_terms(embedding):
            return True
        return torch.equal(self.weight(self.head), self.weight(self.embedding))

    def _check_biases(self) -> None:
        problems = []
        for name, layer in self.layers.items():
            biased = any(term.lora_B_bias is not None for term in enabled_terms(layer))
            if biased and (isinstance(layer, LowRankEmbedding) or layer.bias is None):
                problems.append(name)
        if problems:
            raise AdapterError(
                "a term's bias (lora_bias) needs a layer with a bias to be merged into; these have none:\n"
                f"{bulleted(problems)}\nExport it with --to peft."
            )


def _twin(layer: Layer, matrix: Matrix) -> Layer:
    """A layer with the matrix given and the bias and terms of `layer`, shared."""
    twin: Layer
    if isinstance(layer, LowRankEmbedding):
        twin = LowRankEmbedding(matrix, layer.padding_idx, layer.scale)
    else:
        twin = LowRankLinear(matrix, layer.bias)
    twin.terms = nn.ModuleDict({name: term for name, term in layer.terms.items() if getattr(term, "enabled", True)})
    return twin


def _name_of(layers: Mapping[str, Layer], wanted: object) -> str:
    return next(name for name, layer in layers.items() if layer is wanted)
