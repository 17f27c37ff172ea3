"""Torch's own transformer layers: their feed-forward units are sites, and no fused path goes past their banks."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from tests.assertions import (
    TOLERANCES,
    assert_same_gradient,
    assert_same_output,
    assert_same_state,
    assert_unchanged,
    bank_tensors,
    outcome,
    state_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

EXACT = TOLERANCES[torch.float64]
UNITS = [0, 3, 11]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often torch's fused kernel ran, and how often a batch was converted to a nested tensor."""
    counts = {"fused": 0, "nested": 0}
    for name, private in (("fused", "_transformer_encoder_layer_fwd"), ("nested", "_nested_tensor_from_mask")):
        monkeypatch.setattr(torch, private, counting(getattr(torch, private), name, counts))
    return counts


def counting(function: Callable[..., Any], name: str, counts: dict[str, int]) -> Callable[..., Any]:
    @functools.wraps(function)
    def count(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return count


def encoder_layer(cls: Any = nn.TransformerEncoderLayer, **options: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(cls(8, 2, 16, **{"batch_first": True, "dropout": 0.2, **options}).double())


def perturbed(model: Any) -> Any:
    """Torch initializes norms and attention biases to 0 and 1, and layers of a stack alike: make every number count."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def encoder(num_layers: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, "dropout": 0.2, **options})
    return perturbed(nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(8)).double())


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (3, 5, 8), generator=generator, dtype=torch.float64)


def padding() -> Tensor:
    """True where a sequence of the batch has ended."""
    return torch.arange(5) >= torch.tensor([3, 5, 2])[:, None]


def causal() -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)


def operate(model: nn.Module, *names: str) -> Any:
    return surgery.knife(model, surgery.Units(dict.fromkeys(names, UNITS)))


def assert_close(before: Tensor, after: Tensor) -> None:
    error = float((after - before).detach().abs().max())
    assert error <= EXACT * max(float(before.detach().abs().max()), 1.0), error


# -- discovery ---------------------------------------------------------------------------------------------------------


def test_the_feed_forward_units_of_every_layer_are_sites_and_the_rest_is_declined():
    model = nn.Transformer(8, 2, 2, 1, 16)
    found = surgery.discover(model)
    assert {name: (site.activation_fn, site.scope, site.num_units) for name, site in found.items()} == {
        "encoder.layers.0.linear1": ("relu", "encoder.layers.0", 16),
        "encoder.layers.1.linear1": ("relu", "encoder.layers.1", 16),
        "decoder.layers.0.linear1": ("relu", "decoder.layers.0", 16),
    }
    attention = {name: reason for name, reason in found.declined.items() if "attn" in name}
    assert len(attention) == 8 and set(attention.values()) == {"fused attention"}
    assert "the scope returns its output" in found.declined["decoder.layers.0.linear2"]


class Gated(nn.Module):
    """A tanh layer in front of an encoder layer, whose residual stream may rely on its range."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.layer, self.out = nn.Linear(8, 8), encoder_layer().float(), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.layer(torch.tanh(self.enter(x))))


def test_a_range_bearing_value_is_not_followed_into_a_layer_by_its_feed_forward_block():
    found = surgery.discover(Gated())
    assert set(found) == {"layer.linear1"}
    assert "range-bearing" in found.declined["enter"] and "'layer'" in found.declined["enter"]


# -- equivalence -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm first": {"norm_first": True},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "no dropout": {"dropout": 0.0},
    "gelu by name": {"activation": "gelu"},
    "silu function": {"activation": F.silu},
    "range-bearing function": {"activation": torch.tanh},
    "relu module": {"activation": nn.ReLU()},
    "gelu module": {"activation": nn.GELU()},
    "prelu module": {"activation": nn.PReLU()},
    "odd heads": {"nhead": 1},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
EVERY_MASK = pytest.mark.parametrize(
    "masks",
    [{}, {"src_key_padding_mask": padding()}, {"src_mask": causal(), "is_causal": True}],
    ids=["unmasked", "padded", "causal"],
)


def layer_with(cls: Any, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.2, **options}
    return perturbed(cls(8, options.pop("nhead", 2), 16, **copy.deepcopy(options)).double())


class Calling(nn.Module):
    """Calls a layer with fixed masks."""

    def __init__(self, layer: nn.Module, masks: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self.call = lambda *args: layer(*args, **masks)

    def forward(self, *args: Tensor) -> Any:
        return self.call(*args)


def batch_for(options: dict[str, Any]) -> Tensor:
    return tokens() if options.get("batch_first", True) else tokens(5, 3, 8)


@EVERY_OPTION
@EVERY_MASK
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_operated_encoder_layer_keeps_its_output_and_gradient(options, masks, mode: str):
    layer = layer_with(nn.TransformerEncoderLayer, options).train(mode == "train")
    model, x = Calling(layer, masks), batch_for(options)
    before = outcome(model, [x])
    operate(layer, "linear1")
    operate(layer, "linear1")
    after = outcome(model, [x])
    assert_same_output(before, after, EXACT)
    assert_same_gradient(before, after, EXACT)


@EVERY_OPTION
@EVERY_MASK
def test_an_operated_encoder_layer_keeps_its_output_without_gradients(options, masks, calls):
    layer = layer_with(nn.TransformerEncoderLayer, options).eval()
    x = batch_for(options)
    with torch.no_grad():
        before = layer(x, **masks)
        was_fused = calls["fused"]
        operate(layer, "linear1")
        after = layer(x, **masks)
    assert calls["fused"] == was_fused, "the fused path went past the bank"
    assert_close(before, after)


@EVERY_OPTION
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_operated_decoder_layer_keeps_its_output_and_gradient(options, mode: str):
    layer = layer_with(nn.TransformerDecoderLayer, options).train(mode == "train")
    model = Calling(layer, {"tgt_mask": causal(), "memory_key_padding_mask": padding()})
    x, memory = batch_for(options), batch_for(options).flip(-1)
    before = outcome(model, [x, memory])
    operate(layer, "linear1")
    after = outcome(model, [x, memory])
    assert_same_output(before, after, EXACT)
    assert_same_gradient(before, after, EXACT)


def test_a_whole_transformer_keeps_its_output_in_both_modes_with_and_without_gradients():
    torch.manual_seed(0)
    model = perturbed(nn.Transformer(8, 2, 2, 2, 16, batch_first=True).double())
    masks = {"tgt_mask": causal(), "src_key_padding_mask": padding(), "memory_key_padding_mask": padding()}
    calling, x, y = Calling(model, masks), tokens(), tokens().flip(-1)

    def results() -> list[Tensor]:
        found = []
        for is_training in (True, False):
            model.train(is_training)
            found.append(outcome(calling, [x, y]).tensors[0])
            with torch.no_grad():
                torch.manual_seed(0)
                found.append(model(x, y, **masks))
        return found

    before = results()
    operate(model, *surgery.discover(model))
    for old, new in zip(before, results(), strict=True):
        assert_close(old, new)


def test_verify_accepts_an_operation_on_an_encoder_with_padded_sequences():
    model = encoder().eval()
    batch = {"src": tokens(), "src_key_padding_mask": padding()}
    report = surgery.knife(model, surgery.Units({"layers.1.linear1": UNITS}), verify=batch)
    assert report.verified and report.model_error is not None and report.model_error <= EXACT


# -- the fused path ----------------------------------------------------------------------------------------------------


def test_the_untouched_layer_takes_the_fused_path_and_the_operated_one_does_not(calls):
    layer = encoder_layer().eval()
    with torch.no_grad():
        layer(tokens())
        assert calls["fused"] == 1
        operate(layer, "linear1")
        layer(tokens())
        assert calls["fused"] == 1


def test_composites_are_in_effect_where_the_untouched_layer_takes_the_fused_path():
    layer = encoder_layer().eval()
    operate(layer, "linear1")
    with torch.no_grad():
        layer.linear1.weight.add_(torch.randn_like(layer.linear1.weight))
        without_gradients = layer(tokens())
    with_gradients = layer(tokens())
    plain = encoder_layer().eval()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "composite" not in name})
    assert_close(with_gradients, without_gradients)
    assert float((plain(tokens()) - without_gradients).detach().abs().max()) > 0.01


@pytest.mark.parametrize("operated", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_a_container_takes_padded_sequences_as_before_whichever_layers_are_operated_on(operated, calls):
    model = encoder().eval()
    mask = padding()
    with torch.no_grad():
        before = model(tokens(), src_key_padding_mask=mask)
        assert calls == {"fused": 3, "nested": 1}
        operate(model, *(f"layers.{index}.linear1" for index in operated))
        after = model(tokens(), src_key_padding_mask=mask)
    assert calls["fused"] == 3 + 3 - len(operated), "the layers that were not operated on keep the fused path"
    assert_close(before, after)
    assert torch.equal(before[mask], after[mask]), "what padded positions hold must not change either"


@pytest.mark.parametrize("operated", [0, 1])
def test_a_container_with_moved_composites_agrees_with_and_without_gradients(operated: int):
    model = encoder(2).eval()
    operate(model, f"layers.{operated}.linear1")
    with torch.no_grad():
        model.layers[operated].linear1.weight.add_(torch.randn(16, 8))
        without = model(tokens(), src_key_padding_mask=padding())
    assert_close(model(tokens(), src_key_padding_mask=padding())[~padding()], without[~padding()])


def test_an_operated_layer_takes_a_nested_batch_as_before(calls):
    layer = encoder_layer().eval()
    nested = torch.nested.nested_tensor([tokens()[0, :3], tokens()[1]])
    with torch.no_grad():
        before = layer(nested)
        assert calls["fused"] == 1
        operate(layer, "linear1")
        after = layer(src=nested)
    assert calls["fused"] == 1 and after.is_nested and after.layout is before.layout
    for old, new in zip(before.unbind(), after.unbind(), strict=True):
        assert_close(old, new)


@pytest.mark.parametrize("masks", [{"src_mask": causal()}, {"src_key_padding_mask": padding()}], ids=str)
def test_a_nested_batch_with_a_mask_is_refused_as_before(masks):
    layer = encoder_layer().eval()
    nested = torch.nested.nested_tensor([tokens()[0, :3], tokens()[1]])
    for _ in range(2):
        with torch.no_grad(), pytest.raises(Exception, match=r"(?i)nested"):
            layer(nested, **masks)
        operate(layer, "linear1")


def test_discovery_and_observation_leave_the_fused_path_and_the_class_alone(calls):
    model = encoder(2)
    surgery.discover(model)
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
    with surgery.observe(model) as evidence:
        model(tokens()).square().sum().backward()
        model.eval()
        with torch.no_grad():
            model(tokens())
    assert calls["fused"] == 2
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
    scores = surgery.score(surgery.discover(model), evidence, surgery.Dormant())
    assert set(scores) == {"layers.0.linear1", "layers.1.linear1"}


def test_layers_that_were_not_operated_on_keep_their_class():
    model = encoder(2)
    operate(model, "layers.1.linear1")
    assert type(model) is nn.TransformerEncoder
    assert type(model.layers[0]) is nn.TransformerEncoderLayer is not type(model.layers[1])


# -- what happens to models --------------------------------------------------------------------------------------------


def test_undo_brings_the_class_the_fused_path_and_every_weight_back(calls):
    layer = encoder_layer().eval()
    before, flag = state_of(layer), layer.activation_relu_or_gelu
    report = operate(layer, "linear1")
    assert (flag, layer.activation_relu_or_gelu) == (1, 0)
    surgery.undo(layer, report)
    assert type(layer) is nn.TransformerEncoderLayer and layer.activation_relu_or_gelu == flag
    assert_same_state(before, state_of(layer))
    with torch.no_grad():
        layer(tokens())
    assert calls["fused"] == 1


def test_what_is_assigned_to_the_flag_meanwhile_holds_after_undo():
    layer = encoder_layer(activation="gelu")
    report = operate(layer, "linear1")
    layer.activation_relu_or_gelu = 0
    surgery.undo(layer, report)
    assert layer.activation_relu_or_gelu == 0


def by_saving(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_saving,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_computes_the_same_on_every_path_and_keeps_off_the_fused_one(copied, calls):
    model = encoder(2).eval()
    operate(model, "layers.0.linear1")
    again = copied(model)
    assert type(again.layers[0]) is type(model.layers[0])
    with torch.no_grad():
        model.layers[0].linear1.weight.mul_(2)
        again.layers[0].linear1.weight.mul_(2)
        for masks in ({}, {"src_key_padding_mask": padding()}):
            calls["fused"] = 0
            assert torch.equal(model(tokens(), **masks), again(tokens(), **masks))
            assert calls["fused"] == 2, "one of two layers, in two models"
    assert_same_state(state_of(model), state_of(again))


def test_a_state_dict_carries_the_banks_into_a_copy_that_was_trained_on():
    model = encoder(2)
    operate(model, "layers.0.linear1")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tokens()), other.eval()(tokens()))


def test_switching_modes_after_surgery_keeps_the_output_of_each():
    layer = encoder_layer()
    before = [outcome(layer.train(mode), [tokens()]) for mode in (True, False, True)]
    operate(layer, "linear1")
    for mode, old in zip((True, False, True), before, strict=True):
        assert_same_output(old, outcome(layer.train(mode), [tokens()]), EXACT)


def test_twenty_steps_move_the_active_members_and_nothing_frozen():
    model = encoder(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    operate(model, "layers.0.linear1", "layers.1.linear1")
    slots = [layer.linear1.weight[UNITS].detach().clone() for layer in model.layers]
    frozen = bank_tensors(model)
    assert len(frozen) >= 4
    for _ in range(20):
        optimizer.zero_grad()
        (model(tokens(), src_key_padding_mask=padding()) - 1).square().mean().backward()
        optimizer.step()
    for layer, before in zip(model.layers, slots, strict=True):
        assert bool((layer.linear1.weight[UNITS].detach() != before).any(1).all())
    for name, before in bank_tensors(model).items():
        assert_unchanged(name, frozen[name], before)


@pytest.mark.parametrize("is_grad_enabled", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_compiled_layer_computes_the_same(mode: str, is_grad_enabled: bool):
    layer = encoder_layer(dropout=0.0).train(mode == "train")
    with torch.set_grad_enabled(is_grad_enabled):
        before = layer(tokens())
        operate(layer, "linear1")
        assert_close(before, torch.compile(layer, backend="eager", fullgraph=True)(tokens()))


def test_an_exported_encoder_computes_the_same():
    model = encoder(2).eval()
    torch.export.export(model, (tokens(),))  # the untouched model can be exported
    before = model(tokens())
    operate(model, "layers.0.linear1")
    assert_close(before, torch.export.export(model, (tokens(),)).module()(tokens()))


# -- user code ---------------------------------------------------------------------------------------------------------


class Untraceable(nn.TransformerEncoderLayer):
    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(src, *args, **kwargs) if src.sum() > 0 else src


class OwnBlock(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Any:
        return self.linear2(torch.relu(self.linear1(x)) * 2)


class OwnAttention(nn.TransformerEncoderLayer):
    def _sa_block(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(x)


@pytest.mark.parametrize("cls", [Untraceable, OwnBlock, OwnAttention])
def test_a_subclass_with_blocks_of_its_own_whose_forward_cannot_be_traced_is_declined(cls):
    found = surgery.discover(encoder_layer(cls))
    assert not found and f"{cls.__name__}.forward cannot be traced" in found.declined["linear1"]


class OwnForward(nn.TransformerEncoderLayer):
    """Post-norm, written out; the container still takes it for one of torch's."""

    def forward(self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False):
        attended = self._sa_block(src, src_mask, src_key_padding_mask, is_causal)
        x = self.norm1(src + attended)
        return self.norm2(x + self._ff_block(x)) * 2


@pytest.mark.parametrize("is_grad_enabled", [True, False])
def test_a_subclass_whose_forward_can_be_traced_is_operated_on_also_in_a_padded_container(is_grad_enabled, calls):
    torch.manual_seed(0)
    model = perturbed(nn.TransformerEncoder(OwnForward(8, 2, 16, batch_first=True), 2).double()).eval()
    assert set(surgery.discover(model)) == {"layers.0.linear1", "layers.1.linear1"}
    with torch.set_grad_enabled(is_grad_enabled):
        before = model(tokens(), src_key_padding_mask=padding())
        operate(model, "layers.1.linear1")
        after = model(tokens(), src_key_padding_mask=padding())
    assert calls["nested"] == (0 if is_grad_enabled else 2)
    assert_close(before, after)


class Scaled(OwnForward):
    """Reads for itself what torch's forward asks before it takes the fused path."""

    def forward(self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) * self.activation_relu_or_gelu

    def hidden(self, x: Tensor) -> Any:
        return F.gelu(self.linear1(x)) * self.activation_relu_or_gelu


def test_a_subclass_that_reads_the_flag_itself_still_finds_it():
    layer = encoder_layer(Scaled, activation="gelu", dropout=0.0)
    before = layer(tokens())
    assert bool(before.detach().any())
    operate(layer, "linear1")
    assert layer.activation_relu_or_gelu == 2
    assert_close(before, torch.compile(layer, backend="eager", fullgraph=True)(tokens()))


class WithSummary(nn.TransformerEncoderLayer):
    """Overrides none of torch's blocks."""

    def hidden(self, x: Tensor) -> Any:
        return F.relu(self.linear1(x)).mean(-1)


def test_a_subclass_that_only_adds_a_method_is_operated_on_in_all_of_them(calls):
    layer = encoder_layer(WithSummary).eval()
    x = tokens()
    with torch.no_grad():
        before = layer(x), layer.hidden(x)
        assert calls["fused"] == 1
        operate(layer, "linear1")
        assert_close(before[0], layer(x))
        assert_close(before[1], layer.hidden(x))
    assert calls["fused"] == 1


def test_a_block_replaced_on_the_instance_is_declined():
    layer = encoder_layer()
    layer._sa_block = lambda x, *args, **kwargs: x
    assert "_sa_block was replaced on the instance" in surgery.discover(layer).declined["linear1"]


class Wide(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def exchanged(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda layer: setattr(layer, name, value)


INCONSISTENT = {
    "activation": ({}, exchanged("activation", F.silu), "computes 'relu'"),
    "gelu by tanh": ({"activation": nn.GELU("tanh")}, lambda layer: None, "computes 'gelu'"),
    "linear2": ({}, exchanged("linear2", Wide(16, 8)), "takes its 'linear2' for a Linear, and it is a Wide"),
    "norm1": ({}, exchanged("norm1", nn.RMSNorm(8)), "takes its 'norm1' for a LayerNorm"),
}


@pytest.mark.parametrize(("options", "change", "words"), INCONSISTENT.values(), ids=INCONSISTENT.keys())
def test_a_layer_whose_fused_path_computes_something_else_is_declined(options, change, words: str):
    layer = encoder_layer(**options)
    change(layer)
    assert words in surgery.discover(layer).declined["linear1"]
    layer.self_attn.batch_first = False  # then the fused path is never taken
    assert "linear1" in surgery.discover(layer)
