"""Second moments against sums in float64 over inputs that plain Transformers modules see."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, write_tiny

import luthier
from luthier.adapters import AdapterSpec, attach
from luthier.adapters.targets import all_linear
from luthier.calibration import collect_moments, moments_in_passes, row_packs, rows, shared_inputs, text_packs
from luthier.calibration.inputs import look_at_output_gradients
from luthier.calibration.moments import MomentSum
from luthier.data import Example
from luthier.errors import ConfigError, DataError, NumericError, PreflightError
from luthier.models.blocks import without_blocks
from luthier.units import size_text

TEXT = "The quick brown fox jumps over the lazy dog. " * 12
FAMILIES = ("llama", "gemma3", "phi3", "gpt2", "gpt_neox")


def loaded(tmp_path, family: str):
    return luthier.load(str(write_tiny(tmp_path / family, family))).model


def packs_of_text():
    return text_packs(tiny_tokenizer(), TEXT, windows=5, length=17, max_tokens=40)


def seen_by_transformers(family: str, packs, gradients: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """From each linear layer of the plain float64 model to its inputs and weights, every window run on its own."""
    model = tiny_model(family).to(torch.float64)
    model.config.use_cache = False
    inputs: dict[str, list] = {}
    weights: dict[str, list] = {}

    def watch(name):
        def hook(_module, args, output):
            inputs.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))
            if gradients:
                output.register_hook(lambda g: weights.setdefault(name, []).append(g.reshape(-1, g.shape[-1]).square().sum(1)))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(watch(name))
    for pack in packs:
        for first, last in zip(pack.starts[:-1].tolist(), pack.starts[1:].tolist(), strict=True):
            ids = pack.ids[None, first:last]
            loss = model(input_ids=ids, labels=ids).loss
            if gradients:
                (loss * (last - first - 1)).backward()
    ones = {name: [torch.ones(len(x), dtype=torch.float64) for x in parts] for name, parts in inputs.items()}
    return {name: (torch.cat(parts), torch.cat((weights if gradients else ones)[name])) for name, parts in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_the_sums_over_what_transformers_modules_see(tmp_path, family: str):
    packs = packs_of_text()
    model = loaded(tmp_path, family)
    moments = collect_moments(model, packs)
    expected = seen_by_transformers(family, packs)
    assert set(moments) == set(all_linear(model))
    for name, own in moments.items():
        x, _ = expected[name]
        exact = x.T @ x
        assert own.second.dtype == torch.float64
        assert float((own.second - exact).norm() / exact.norm()) < 1e-5, name
        assert torch.equal(own.second, own.second.T)
        assert own.tokens == len(x) == 85


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_gradients_are_those_at_the_outputs_of_transformers_modules(tmp_path, family: str):
    packs = packs_of_text()
    model = loaded(tmp_path, family)
    attach(model, AdapterSpec(rank=2, targets=[all_linear(model)[0]]))
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in all_linear(model)}

    def see(name: str, g: torch.Tensor) -> None:
        own = torch.zeros(pack.tokens, dtype=torch.float64)
        # The last decoder layer may compute the tokens alone that a loss depends on.
        own[torch.arange(pack.tokens) if len(g) == pack.tokens else pack.predict] = g.double().square().sum(1)
        squares[name].append(own)

    for pack in packs:
        look_at_output_gradients(model, pack, list(squares), see)
    expected = seen_by_transformers(family, packs, gradients=True)
    for name, own in squares.items():
        _, weight = expected[name]
        assert float((torch.cat(own) - weight).norm() / weight.norm()) < 1e-4, name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_both_ways_of_running_give_the_same(tmp_path):
    model, packs = loaded(tmp_path, "llama"), packs_of_text()
    fused = collect_moments(model, packs)
    with without_blocks():
        plain = collect_moments(model, packs)
    for name, own in fused.items():
        assert float((own.second - plain[name].second).norm() / own.second.norm()) < 1e-5


def test_a_sum_in_float32_blocks_is_that_in_float64():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2500, 1100, generator=generator) + 0.5
    w = torch.rand(2500, generator=generator)
    own, weighted = MomentSum(1100), MomentSum(1100)
    for part, weights in zip(x.split(1300), w.split(1300), strict=True):
        own.add(part)
        weighted.add(part, weights)
    wide = x.to(torch.float64)
    bound = 1024 * 2**-24 * (wide.abs().T @ wide.abs())
    assert ((own.moments().second - wide.T @ wide).abs() <= bound).all()
    exact = (wide * w.to(torch.float64)[:, None]).T @ wide
    assert float((weighted.moments().second - exact).norm() / exact.norm()) < 1e-6
    own.add(x)
    assert torch.allclose(own.moments().second, 2 * wide.T @ wide, rtol=1e-5)


def test_layers_that_share_an_input_share_its_moments(tmp_path):
    model = loaded(tmp_path, "llama")
    groups = shared_inputs(model)
    short = [[name.rpartition(".")[2] for name in group] for group in groups]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    moments = collect_moments(model, packs_of_text())
    assert [len({id(moments[name]) for name in group}) for group in groups] == [1] * 8


def test_passes_keep_to_their_memory_and_give_the_same(tmp_path):
    model, packs = loaded(tmp_path, "llama"), packs_of_text()
    whole = collect_moments(model, packs)
    passes = list(moments_in_passes(model, packs, max_bytes=8 * (64**2 + 96**2)))
    assert len(passes) == 4
    assert [name for one in passes for name in one] == [name for group in shared_inputs(model) for name in group]
    for one in passes:
        distinct = {id(own): own.second.numel() for own in one.values()}
        assert sum(distinct.values()) <= 64**2 + 96**2
        for name, own in one.items():
            assert torch.equal(own.second, whole[name].second), name
    # The widest layer decides, not the first that is too wide.
    with pytest.raises(PreflightError, match=rf"must fit; they take {size_text(8 * 96**2)}, allowed are 1\.00 kB"):
        list(moments_in_passes(model, packs, max_bytes=1000))


def test_the_head_is_given_what_the_body_gives(tmp_path):
    model, packs = loaded(tmp_path, "llama"), packs_of_text()
    own = collect_moments(model, packs, ["lm_head", "model.layers.0.self_attn.q_proj"])
    x, _ = seen_by_transformers("llama", packs)["lm_head"]
    assert float((own["lm_head"].second - x.T @ x).norm() / (x.T @ x).norm()) < 1e-5
    with pytest.raises(ConfigError, match="below the head"):
        look_at_output_gradients(model, packs[0], ["lm_head"], lambda *_: None)


def test_nothing_is_left_on_the_model_whatever_happens(tmp_path):
    model, packs = loaded(tmp_path, "llama"), packs_of_text()
    model.train()
    model.model.layers[0].mlp.up_proj.matrix.weight.data[:] = float("nan")
    with pytest.raises(NumericError, match="must be finite"):
        collect_moments(model, packs, ["model.layers.1.mlp.down_proj"])
    next(moments_in_passes(model, packs, max_bytes=8 * 96**2))
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks
    assert all(module.training for module in model.modules())


def test_names_that_are_no_linear_layers_are_refused(tmp_path):
    model = loaded(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"Did you mean 'model\.layers\.0\.mlp\.up_proj'"):
        collect_moments(model, packs_of_text(), ["model.layers.0.mlp.upp_proj"])
    with pytest.raises(ConfigError, match="linear layers"):
        shared_inputs(model, ["model.embed_tokens"])


def example(number: int, length: int) -> Example:
    return Example([number] * length, [True] * length, [], "", None, f"row {number}")


def test_rows_are_spread_over_the_data_and_stay_whole():
    examples = [example(number, 10) for number in range(100)]
    packs = row_packs(examples, tokens=50, max_tokens=25)
    assert [pack.ids.unique().tolist() for pack in packs] == [[0, 20], [40, 60], [80]]
    assert sum(pack.tokens for pack in row_packs(examples[:3], tokens=10**6, max_tokens=64)) == 30
    with pytest.raises(DataError, match="needs rows"):
        row_packs([], tokens=10, max_tokens=10)


def test_a_text_is_cut_in_windows_that_predict_their_own_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    packs = text_packs(tokenizer, TEXT, windows=4, length=10, max_tokens=20)
    assert [pack.starts.tolist() for pack in packs] == [[0, 10, 20]] * 2
    assert torch.cat([pack.ids for pack in packs]).tolist() == ids[:40]
    assert packs[0].predict.tolist() == [*range(9), *range(10, 19)]
    assert packs[0].targets.tolist() == ids[1:10] + ids[11:20]
    with pytest.raises(DataError, match="at least two tokens"):
        text_packs(tokenizer, "", windows=4, length=10)


@pytest.mark.parametrize("characters", [1, 6])
def test_of_a_long_text_its_beginning_alone_is_tokenised_and_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    """Where the first guess gives too few tokens, more is tried."""
    tokenizer, text = tiny_tokenizer(), TEXT * 60
    encode, asked = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda part, **more: (asked.append(len(part)), encode(part, **more))[1])
    monkeypatch.setattr(rows, "CHARACTERS_A_TOKEN", characters)
    packs = text_packs(tokenizer, text, windows=4, length=10, max_tokens=20)
    assert torch.cat([pack.ids for pack in packs]).tolist() == encode(text, add_special_tokens=False)[:40]
    first = characters * (40 + rows.CUT_TOKENS)
    assert asked == [first * 2**number for number in range(len(asked))]
    assert asked[-1] < len(text) / 2
    assert len(asked) > 1 or characters > 1
