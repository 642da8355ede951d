"""How much memory a run takes at its highest point, part by part, for any size of pack and number of recomputed layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.training.blueprint import Blueprint
from luthier.training.calibrate import ByteCosts
from luthier.training.initial_costs import InitialCosts
from luthier.training.workload import Packing

FLOAT_BYTES = 4
# Plots and the report at the end of a run: matplotlib and what it draws.
FINISHING_BYTES = 90_000_000
# How much more than its tensors a step takes where freed memory is kept for the next: blocks of different sizes leave gaps.
# Measured between 1.1 and 1.3.
GAPS = 1.2
# Copies of a pack's hidden states around the head: the last one and its norm, and gradients of them.
HIDDEN_COPIES, SUPERVISED_COPIES = 4, 3


@dataclass(frozen=True)
class Footprint:
    """Bytes of the whole process when it holds most. activations: what layers keep for backward and what their backward
    works with; head: one chunk of logits where it adds to that. load_bytes, initial_bytes: the highest points while the model
    is loaded, and while what the terms start from is made. adapter_bytes: frozen terms of the start included."""

    runtime_bytes: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    head_bytes: int
    load_bytes: int
    finish_bytes: int
    initial_bytes: int = 0

    @property
    def step_bytes(self) -> int:
        """The highest point of a training step."""
        return (
            self.runtime_bytes + self.base_bytes + self.adapter_bytes + self.gradient_bytes
            + self.optimizer_bytes + self.activation_bytes + self.head_bytes
        )  # fmt: skip

    @property
    def peak_bytes(self) -> int:
        return max(self.step_bytes, self.load_bytes, self.initial_bytes, self.finish_bytes)


@dataclass(frozen=True)
class Memory:
    """What does not depend on how steps are cut: sizes of the model, what is trained, and the measured costs of a token.

    runtime_bytes: what the process holds before the model is loaded. trained: numbers in training. trains_base: they are
    the model's own weights, not numbers beside them. frozen_layers: those below the lowest that trains, which keep nothing.
    initial: what making the terms' start takes.
    """

    runtime_bytes: int
    blueprint: Blueprint
    costs: ByteCosts
    trained: int
    trains_base: bool
    frozen_layers: int = 0
    initial: InitialCosts = field(default_factory=InitialCosts)

    def footprint(self, packing: Packing, recomputed: int, *, keeps_freed: bool) -> Footprint:
        """With that many layers computed again in backward, freed memory kept for the next tensors or given back.

        The highest point is the largest of three: the loss, all layers' activations being held; the last layer's
        backward, the same; or the backward of a recomputed layer, when those after it have let go of theirs.
        Gradients of all weights stand beside it where a step has several packs, and otherwise come as activations go.
        """
        costs, tokens, layers = self.costs, packing.largest, self.blueprint.layers - self.frozen_layers
        inputs = recomputed * costs.input * tokens
        held = inputs + (layers - recomputed) * costs.kept * tokens
        vectors = HIDDEN_COPIES * tokens + SUPERVISED_COPIES * packing.supervised_largest
        around = vectors * self.blueprint.hidden_size * FLOAT_BYTES
        in_head = held + around + costs.head
        in_layer = held + costs.working * tokens if recomputed < layers else 0.0
        in_recomputed = inputs + costs.recomputing * tokens if recomputed else 0.0
        # A forward pass holds less than a backward one; where nothing trains in any layer it is all there is.
        in_frozen = costs.working * tokens if self.frozen_layers else 0.0
        highest = max(in_head, in_layer, in_recomputed, in_frozen)
        activations = held if highest == in_head else highest
        own = self.trained * FLOAT_BYTES
        gradients = own
        if packing.most == 1:
            gradients, activations, highest = (0, activations, highest) if highest > own else (own, 0.0, 0.0)
        gaps = GAPS if keeps_freed else 1.0
        fixed = self.runtime_bytes + self.blueprint.base_bytes
        adapter = 0 if self.trains_base else own + self.initial.frozen * FLOAT_BYTES
        return Footprint(
            runtime_bytes=self.runtime_bytes,
            base_bytes=self.blueprint.base_bytes,
            adapter_bytes=adapter,
            gradient_bytes=gradients,
            optimizer_bytes=2 * own,
            activation_bytes=round(gaps * activations),
            head_bytes=round(gaps * (highest - activations)),
            load_bytes=fixed + self.blueprint.loading_bytes,
            finish_bytes=fixed + adapter + 2 * own + FINISHING_BYTES,
            initial_bytes=self._initial_bytes(fixed, tokens),
        )

    def _initial_bytes(self, fixed: int, tokens: int) -> int:
        """The factors made so far, the pass that measures inputs, the least room for their moments, one decomposition."""
        initial = self.initial
        if not initial.kept:
            return 0
        passing = round(self.costs.working * tokens) if initial.tokens else 0
        return fixed + initial.kept * FLOAT_BYTES + passing + initial.moments_bytes + initial.working_bytes
