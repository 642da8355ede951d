"""AdamW on the trainable parameters, with clipping by the global norm and denormal numbers flushed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from luthier.config import RunConfig
from luthier.errors import CheckpointError, ConfigError, bulleted

STATE_PARTS = ("exp_avg", "exp_avg_sq", "step")
PAGED_PARTS = ("state1", "state2", "step")  # bitsandbytes' names for the same


class Optimizer:
    """torch's fused AdamW.

        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  p <- p - lr (m^ / (sqrt(v^) + 1e-8) + decay p)

    m^, v^ are m, v corrected for their start at zero. Weight decay falls on matrices; vectors (biases, norms, DoRA's
    magnitudes) have none. named_parameters: those to train, float32. Source: arXiv:1711.05101.
    """

    def __init__(self, named_parameters: list[tuple[str, nn.Parameter]], config: RunConfig):
        self.names = {parameter: name for name, parameter in named_parameters}
        self.parameters = [parameter for _, parameter in named_parameters]
        self.max_grad_norm = config.max_grad_norm
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.paged = config.optimizer == "paged_adamw"
        make = _paged_adamw if self.paged else _fused_adamw
        self.adamw = make([group for group in groups if group["params"]], (config.beta1, config.beta2))

    def clip(self) -> float:
        """Scale all gradients by min(1, max_grad_norm / norm) and return the global norm before that, in L2.

        Where the norm is not finite the gradients are left as they are; the caller must not step.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        return float(norm)

    def step(self, learning_rate: float) -> None:
        """Apply the gradients once at `learning_rate`."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts as `<parameter>.<exp_avg|exp_avg_sq|step>`; empty before the first step. No copies."""
        states = self.adamw.state
        keys = PAGED_PARTS if self.paged else STATE_PARTS
        return {
            f"{name}.{part}": torch.as_tensor(states[parameter][key], dtype=torch.float32)
            for parameter, name in self.names.items()
            if parameter in states
            for part, key in zip(STATE_PARTS, keys, strict=True)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave. Raises CheckpointError naming every tensor that is unknown, missing or misshapen."""
        problems = []
        known = {f"{name}.{part}" for name in self.names.values() for part in STATE_PARTS}
        problems += [f"{key} belongs to no trainable parameter" for key in sorted(state.keys() - known)]
        restored: dict[nn.Parameter, dict[str, Tensor]] = {}
        for parameter, name in self.names.items():
            parts = {part: state[f"{name}.{part}"] for part in STATE_PARTS if f"{name}.{part}" in state}
            if not parts:
                continue
            if len(parts) < len(STATE_PARTS):
                problems.append(f"{name} has only {', '.join(parts)}")
            elif any(parts[part].shape != parameter.shape for part in STATE_PARTS[:2]):
                problems.append(f"{name} is {tuple(parameter.shape)}, its moments {tuple(parts['exp_avg'].shape)}")
            restored[parameter] = parts
        if problems:
            raise CheckpointError(f"the optimiser's state must fit the parameters; it does not:\n{bulleted(problems)}")
        for parameter, parts in restored.items():
            if self.paged:
                self._load_paged(parameter, parts)
            else:
                self.adamw.state[parameter] = {part: tensor.clone() for part, tensor in parts.items()}

    def _load_paged(self, parameter: nn.Parameter, parts: dict[str, Tensor]) -> None:
        """bitsandbytes wants moments in its own paged memory and counts steps in a plain number."""
        state: dict[str, Any] = {"step": int(parts["step"])}
        for part, key in zip(STATE_PARTS[:2], PAGED_PARTS[:2], strict=True):
            state[key] = self.adamw.get_state_buffer(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
            state[key].copy_(parts[part])
        self.adamw.state[parameter] = state


def _fused_adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def _paged_adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with float32 moments that the GPU's driver moves to the host when memory is short. Tested with
    bitsandbytes' CPU version, which pages nothing; not on a GPU."""
    from bitsandbytes.optim import PagedAdamW32bit

    return PagedAdamW32bit(groups, lr=0.0, betas=betas)


def device_of(config: RunConfig) -> str:
    """Where a run computes: on the GPU with the optimiser that is made for one, else on the CPU."""
    return "cuda" if config.optimizer == "paged_adamw" else "cpu"


def check_optimizer(config: RunConfig) -> None:
    """Raise ConfigError if the optimiser asked for cannot run on this machine."""
    if config.optimizer != "paged_adamw":
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "paged_adamw moves its moments between a GPU's memory and the host's, so it needs CUDA; there is none here. "
            "Use --optimizer adamw."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("paged_adamw is bitsandbytes' own, which is not installed. Run `pip install bitsandbytes`.")


@contextlib.contextmanager
def flushed_denormals() -> Iterator[bool]:
    """Within it, results below 1.2e-38 become zero on all of torch's threads; yields whether the processor can do that.

    Moments of a gradient that stays at zero decay through that range, where an AdamW step was measured to take 2.6
    times as long on one thread (docs/log.md). The setting from before is put back.
    """
    before = _flushes()
    supported = torch.set_flush_denormal(True)
    try:
        yield supported
    finally:
        torch.set_flush_denormal(before)


def _flushes() -> bool:
    return float(torch.full((1,), 1e-40) * 1.0) == 0.0
