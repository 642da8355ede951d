"""Fused blocks give the hidden states, losses and gradients of the Transformers modules they stand for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_tiny
from torch import Tensor, nn

from luthier import kernels
from luthier.adapters import AdapterSpec, attach, trainable_parameters
from luthier.adapters.targets import low_rank_layers
from luthier.data.packing import Pack
from luthier.evaluation.loss import supervised_loss
from luthier.kernels import native
from luthier.kernels.registry import registered_ops
from luthier.models.blocks import linears, without_blocks
from luthier.models.load import load
from luthier.models.packed import packed_hidden
from luthier.training.prepare import set_training_mode
from luthier.training.recompute import set_recomputed

pytestmark = pytest.mark.skipif(not native.use_native(), reason="the blocks run on the compiled kernels")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
LENGTHS = [1, 40, 7, 83, 5]  # two of them longer than the tiny models' window of 32
HIDDEN, KV, FFN, RANK = 64, 32, 96, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_tiny(root / family, family) for family in FAMILIES}


def make_pack() -> Pack:
    """Five documents; every third token is supervised."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 390, (sum(LENGTHS),), generator=generator)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    predict = torch.tensor([t for t in range(len(ids) - 1) if t % 3 and t + 1 not in starts.tolist()])
    return Pack.of_texts(ids, starts, predict)


def adapted(folder: Path, *, base: str | None = None, name: str = "default", **spec) -> nn.Module:
    """A loaded model with an adapter none of whose factors is zero, in training mode."""
    model = load(str(folder), base=base).model
    add_adapter(model, AdapterSpec(rank=RANK, **spec), name)
    return model


def add_adapter(model: nn.Module, spec: AdapterSpec, name: str = "default") -> None:
    attach(model, spec, name=name, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    set_training_mode(model)


def outcome(model: nn.Module, pack: Pack, every_row: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(hidden states, loss, gradients of the loss); with `every_row` a loss of all hidden states instead of the head's."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with torch.no_grad():
        hidden = packed_hidden(model, pack.ids, pack.starts)
    torch.manual_seed(5)
    if every_row:
        weights = torch.randn(len(pack.ids), HIDDEN, generator=torch.Generator().manual_seed(2))
        loss = (packed_hidden(model, pack.ids, pack.starts) * weights).sum()
    else:
        loss = supervised_loss(model, pack)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden, loss.detach(), grads


def assert_same(model: nn.Module, *, every_row: bool = False) -> dict[str, Tensor]:
    """With blocks and without them everything is equal; returns the gradients."""
    pack = make_pack()
    with without_blocks():
        expected_hidden, expected_loss, expected = outcome(model, pack, every_row)
    got_hidden, got_loss, got = outcome(model, pack, every_row)
    assert relative(got_hidden, expected_hidden) < 1e-5
    if not every_row:  # there the terms of the sum cancel, and the hidden states that it is made of have been compared
        assert relative(got_loss, expected_loss) < 1e-5
    assert got.keys() == expected.keys()
    assert len(got) > 0
    for name, gradient in expected.items():
        assert relative(got[name], gradient) < 1e-5, name
    return got


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def native_calls() -> dict[str, int]:
    return {op.name: op.native_calls for op in registered_ops()}


def calls_during(run: Callable[[], object]) -> dict[str, int]:
    before = native_calls()
    run()
    return {name: count - before[name] for name, count in native_calls().items()}


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_terms(folders: dict[str, Path], family: str, recomputed: int) -> None:
    model = adapted(folders[family])
    set_recomputed(model, recomputed)
    assert_same(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_half_is_one_operation(folders: dict[str, Path], family: str, caplog) -> None:
    """Two layers: four norms and those of heads and posts, once each; q, k and v are one call, as are gate and up.

    In the last layer q is of other tokens than k and v, so it is turned by itself, and multiplied by itself where it can.
    """
    model, pack = adapted(folders[family]), make_pack()
    with caplog.at_level(logging.INFO, logger="luthier"):
        supervised_loss(model, pack)
        forward = calls_during(lambda: supervised_loss(model, pack))
    assert not caplog.text
    assert forward["packed_attention"] == forward["gated"] == 2
    assert forward["rotary_"] == 3
    norms = {"qwen3": 4, "gemma2": 4, "gemma3": 6}.get(family, 2)
    assert forward["rms_norm"] == 2 * norms + 1
    head = forward["frozen_linear"] - 2 * 4 - (family != "phi3")
    assert head in (0, 1, 2)


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("changes", [{"variant": "dora"}, {"dropout": 0.3}, {"variant": "dora", "dropout": 0.3}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_composed_of_parts(folders: dict[str, Path], family: str, changes: dict, recomputed: int, caplog) -> None:
    """DoRA, and dropout, whose masks are those that Transformers' order of calls draws from one seed, for all rows alike."""
    model = adapted(folders[family], **changes)
    set_recomputed(model, recomputed)
    with caplog.at_level(logging.INFO, logger="luthier"):
        assert_same(model, every_row="dropout" in changes)
    assert caplog.text.count("4 of 4 half layers are composed of parts: linear layers with more than") == 1


@pytest.mark.parametrize("base", ["f32", "bf16", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_storages(folders: dict[str, Path], family: str, base: str) -> None:
    assert_same(adapted(folders[family], base=base))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize(
    "targets",
    [
        r".*layers\.1\.self_attn\.(qkv|q)_proj",
        r".*layers\.1\.self_attn\.o_proj",
        r".*layers\.1\.mlp\.gate(_up)?_proj",
        r".*layers\.1\.mlp\.down_proj",
        r".*layers\.0\.mlp\.down_proj",
        r".*embed_tokens",
    ],
)
def test_few_layers_adapted(folders: dict[str, Path], family: str, targets: str) -> None:
    gradients = assert_same(adapted(folders[family], targets=targets))
    assert len(gradients) == 2


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_several_terms_biases_and_parts_that_train(folders: dict[str, Path], family: str) -> None:
    """Two adapters at once are one joined term; a norm or a linear layer that trains whole takes its half out."""
    model = adapted(folders[family])
    add_adapter(model, AdapterSpec(rank=2, targets=r".*o_proj|.*down_proj"), "second")
    gradients = assert_same(model)
    assert any(".second." in name for name in gradients)
    output = model.model.layers[1].self_attn.o_proj
    output.terms["default"].lora_B_bias = nn.Parameter(torch.randn(HIDDEN))
    assert "model.layers.1.self_attn.o_proj.terms.default.lora_B_bias" in assert_same(model)
    model = adapted(
        folders[family], targets=r".*o_proj", modules_to_save=["layers.0.mlp.down_proj", "layers.1.input_layernorm"]
    )
    gradients = assert_same(model)
    assert "model.layers.1.input_layernorm.weight" in gradients
    assert "model.layers.0.mlp.down_proj.weight" in {name.replace("matrix.", "") for name in gradients}


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_rows(folders: dict[str, Path], family: str) -> None:
    """The last layer works for the rows asked for alone, and gradients are those of the whole."""
    for spec in ({}, {"variant": "dora"}):
        model, pack = adapted(folders[family], **spec), make_pack()
        rows = torch.tensor([3, 0, 77, 130])
        grad = torch.randn(len(rows), HIDDEN, generator=torch.Generator().manual_seed(2))
        results = []
        for chosen in (rows, None):
            model.zero_grad(set_to_none=True)
            hidden = packed_hidden(model, pack.ids, pack.starts, chosen)
            hidden = hidden if chosen is not None else hidden[rows]
            hidden.backward(grad)
            results.append([hidden.detach(), *(p.grad for _, p in trainable_parameters(model))])
        for got, expected in zip(*results, strict=True):
            assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_multiplies_for_the_rows_alone(folders: dict[str, Path], family: str, monkeypatch) -> None:
    """Forward and backward: all tokens go into k and v (and q with them where the three are one layer) and nothing else."""
    seen: list[tuple[int, int]] = []
    forward, backward = linears.forward_op, linears.backward_input_op

    def forward_seen(x: Tensor, *rest):
        outputs, inner = forward(x, *rest)
        seen.extend((y.shape[1], len(y)) for y in outputs)
        return outputs, inner

    def backward_seen(dys: list[Tensor], *rest):
        seen.extend((dy.shape[1], len(dy)) for dy in dys)
        return backward(dys, *rest)

    monkeypatch.setattr(linears, "forward_op", forward_seen)
    monkeypatch.setattr(linears, "backward_input_op", backward_seen)
    model, pack = adapted(folders[family]), make_pack()
    hidden = packed_hidden(model, pack.ids, pack.starts, torch.tensor([3, 20, 77, 130]))
    last = seen[len(seen) // 2 :]
    assert len(last) == len(seen) - len(last)
    count = len(last)
    hidden.sum().backward()
    half = model.model.layers[1].self_attn
    whole = [half.qkv_proj] if family == "phi3" else [half.k_proj, half.v_proj]
    everywhere = sorted((layer.out_features, len(pack.ids)) for layer in whole)
    for products in (last, seen[2 * count : 3 * count]):
        assert sorted(product for product in products if product[1] != 4) == everywhere
        assert len(products) == len(list(low_rank_layers(half))) + len(list(low_rank_layers(model.model.layers[1].mlp)))


def test_against_float64(folders: dict[str, Path]) -> None:
    """A float64 model of merged weights knows nothing of adapters: dA = s B^T dW and dB = s dW A^T."""
    model, pack = adapted(folders["llama"]), make_pack()
    _, loss, gradients = outcome(model, pack, False)
    oracle = tiny_model("llama").double()
    for name, linear in oracle.model.named_modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = model.model.get_submodule(name).merged()[0].double()
    logits = torch.cat([oracle(input_ids=part[None]).logits[0] for part in pack.ids.split(LENGTHS)])
    expected_loss = nn.functional.cross_entropy(logits[pack.predict], pack.targets, reduction="sum")
    expected_loss.backward()
    assert relative(loss.double(), expected_loss) < 1e-6
    for name, module in model.model.named_modules():
        terms = getattr(module, "terms", {})
        if "default" not in terms:
            continue
        term, dW = terms["default"], oracle.model.get_submodule(name).weight.grad
        dA, dB = term.scaling * term.lora_B.double().T @ dW, term.scaling * dW @ term.lora_A.double().T
        assert relative(gradients[f"model.{name}.terms.default.lora_A"].double(), dA) < 1e-5
        assert relative(gradients[f"model.{name}.terms.default.lora_B"].double(), dB) < 1e-5


def saved_floats(model: nn.Module, pack: Pack) -> int:
    """Floats kept for backward of the hidden states, tensors that live on anyway (parameters, tables) left out."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack_tensor(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.dtype == torch.float32 and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        hidden = packed_hidden(model, pack.ids, pack.starts)
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_for_backward(folders: dict[str, Path], family: str) -> None:
    """A token and layer: 2 hidden (x, m) + q + k + v + attention + H (log sums) + 2 F + the ranks, and y and its norm's
    scale with post norms. Beside the layers: the input of the last norm and its scale."""
    pack = make_pack()
    adapters = 4 * RANK if family == "phi3" else 7 * RANK
    post = 2 * (HIDDEN + 1) if family.startswith("gemma") else 0
    a_layer = 2 * HIDDEN + (HIDDEN + 2 * KV) + HIDDEN + 4 + 2 * FFN + adapters + post
    tokens = len(pack.ids)
    model = adapted(folders[family])
    assert saved_floats(model, pack) == tokens * (2 * a_layer + HIDDEN + 1)
    upper = adapted(folders[family], targets=r".*layers\.1\..*_proj")
    assert saved_floats(upper, pack) == tokens * (a_layer + HIDDEN + 1)
    set_recomputed(model, 1)
    assert saved_floats(model, pack) == tokens * (a_layer + 2 * HIDDEN + 1)


def test_lower_half_keeps_only_what_its_term_needs(folders: dict[str, Path]) -> None:
    """With a term on the last down_proj alone: gate, up and u; nothing of the attention, no input."""
    pack = make_pack()
    model = adapted(folders["llama"], targets=r".*layers\.1\.mlp\.down_proj")
    assert saved_floats(model, pack) == len(pack.ids) * (2 * FFN + RANK + HIDDEN + 1)


def test_models_outside_luthier_and_their_weights(folders: dict[str, Path]) -> None:
    """A plain Transformers model whose every weight trains."""
    for family in FAMILIES:
        assert len(assert_same(tiny_model(family))) > 10


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "partial_rotary_factor": 0.5}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize(
    "scaling",
    [LONGROPE, DYNAMIC],
    ids=["longrope", "dynamic"],
)
def test_frequencies_that_depend_on_length(scaling: dict) -> None:
    """A long document changes nothing in a short one beside it; half of each head turns."""
    model = tiny_model("phi3" if scaling["rope_type"] == "longrope" else "llama")
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 50, **scaling}
    config.max_position_embeddings = 50 if scaling["rope_type"] == "dynamic" else 512
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    pack = make_pack()
    with torch.no_grad():
        got = packed_hidden(other, pack.ids, pack.starts)
        alone = [other.model(input_ids=part[None]).last_hidden_state[0] for part in pack.ids.split(LENGTHS)]
    assert relative(got, torch.cat(alone)) < 1e-5


def test_hooks_are_heard(folders: dict[str, Path], caplog) -> None:
    model, pack = adapted(folders["llama"]), make_pack()
    calls = []
    layers = model.model.layers
    handle = layers[0].mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("q"))
    with caplog.at_level(logging.INFO, logger="luthier"):
        assert_same(model)
        supervised_loss(model, pack)
        assert calls[-2:] == ["mlp", "q"]
    assert caplog.text.count("1 layers run as Transformers' modules: it has hooks") == 1
    assert caplog.text.count("1 of 2 half layers are composed of parts") == 1
    handle.remove()
    model.model.register_forward_hook(lambda *_: calls.append("body"))
    assert_same(model)
    assert calls[-1] == "body"


def test_a_base_models_own_dropout_is_left_to_it(folders: dict[str, Path], caplog) -> None:
    model = adapted(folders["llama"])
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with caplog.at_level(logging.INFO, logger="luthier"):
        assert_same(model)
    assert "the base model's own dropout is on" in caplog.text


def test_the_log_names_families_without_blocks(caplog) -> None:
    model = tiny_model("olmo2")
    with caplog.at_level(logging.INFO, logger="luthier"):
        assert_same(model)
        assert_same(model)
    assert caplog.text.count("Olmo2ForCausalLM: layers run as Transformers' modules: its family has no blocks of its own.") == 1


def test_derived_classes_are_not_taken_for_their_parents(caplog) -> None:
    model = tiny_model("llama")

    class Body(type(model.model)):
        pass

    model.model.__class__ = Body
    with caplog.at_level(logging.INFO, logger="luthier"):
        assert_same(model)
    assert "no blocks of its own" in caplog.text


def test_reference_kernels_and_other_precisions_take_the_modules(caplog) -> None:
    pack = make_pack()
    with caplog.at_level(logging.INFO, logger="luthier"), torch.no_grad():
        with native.forced("reference"):
            packed_hidden(tiny_model("llama"), pack.ids, pack.starts)
        half = packed_hidden(tiny_model("llama", dtype=torch.bfloat16), pack.ids, pack.starts)
    assert half.dtype == torch.float32
    assert "the compiled kernels are not in use" in caplog.text
    assert "its activations are torch.bfloat16 on cpu" in caplog.text
    assert kernels.active().mode == "native"


def test_an_unknown_activation_takes_the_modules(caplog) -> None:
    model = tiny_model("llama")
    model.config.hidden_act = "relu"
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    with caplog.at_level(logging.INFO, logger="luthier"):
        assert_same(model)
    assert "2 layers run as Transformers' modules: there is no kernel for its activation." in caplog.text
