"""Discovery over the zoo: the right units in the right layers, a reason for every other producer, the same output."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuronsurgery import surgery
from tests.assertions import TOLERANCES
from tests.zoo import ZOO, Animal, Dueling, animals, mlp

EVERY = pytest.mark.parametrize("animal", ZOO, ids=str)
WITH_SITES = pytest.mark.parametrize("animal", [a for a in ZOO if a.sites], ids=str)


@EVERY
def test_discover_finds_the_sites_and_their_activation_functions(animal: Animal):
    found = surgery.discover(animal.build())
    assert {name: site.activation_fn for name, site in found.items()} == dict(animal.sites)


@EVERY
def test_discover_says_why_for_every_other_producer(animal: Animal):
    declined = surgery.discover(animal.build()).declined
    assert set(declined) == set(animal.declined)
    for name, words in animal.declined.items():
        assert words in declined[name], (name, declined[name])


@EVERY
def test_every_linear_layer_and_convolution_is_a_site_or_declined(animal: Animal):
    model = animal.build()
    found = surgery.discover(model)
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    names = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    shared = {"right"} if animal.name == "two modules, one Parameter" else set()  # one name for both
    assert names - shared <= set(found) | set(found.declined)
    assert not set(found) & set(found.declined)


@WITH_SITES
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_operation_on_every_site_keeps_the_output_and_adds_rows_where_it_should(animal: Animal, mode: str):
    torch.manual_seed(0)
    model, batch = animal.build().train(mode == "train"), animal.batch()
    units = {name: [0, site.num_units - 1] for name, site in surgery.discover(model).items()}
    for operation in (1, 2):
        report = surgery.knife(model, surgery.Units(units), verify=batch)
        assert report.operation == operation and report.verified
        assert report.model_error is not None and report.model_error <= TOLERANCES[torch.float32]
    found = surgery.composites(model)
    assert {name: sorted({member.unit for member in members}) for name, members in found.members.items()} == units
    assert all(site.num_frozen == 8 for site in surgery.discover(model).values())


@WITH_SITES
def test_only_the_chosen_rows_of_the_chosen_layers_change(animal: Animal):
    torch.manual_seed(0)
    model = animal.build()
    site = list(surgery.discover(model))[-1]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    surgery.knife(model, surgery.Units({site: [1]}))
    for name, parameter in model.named_parameters():
        axis = 1 if site == "4" and animal.name == "other convolutions" else 0  # a transposed convolution's units
        moved = (parameter.detach() != before[name]).movedim(axis, 0).flatten(1).any(1) if parameter.dim() > 1 else None
        if moved is not None and f"{name}.".startswith(f"{site}."):
            assert moved.tolist() == [unit == 1 for unit in range(parameter.shape[axis])], name
        elif moved is not None:
            assert not bool(moved.any()), name


@WITH_SITES
def test_discover_finds_the_same_sites_in_an_operated_model(animal: Animal):
    model = animal.build()
    before = surgery.discover(model)
    surgery.knife(model, surgery.Units({name: [0] for name in before}))
    after = surgery.discover(model)
    assert {name: (s.scope, s.producer, s.activation_fn, s.num_units) for name, s in before.items()} == {
        name: (s.scope, s.producer, s.activation_fn, s.num_units) for name, s in after.items()
    }
    assert dict(before.declined) == dict(after.declined)


# -- registration order misleads ---------------------------------------------------------------------------------------


def test_a_dueling_networks_streams_are_sites_and_its_outputs_are_not():
    model = Dueling()
    found = surgery.discover(model)
    assert set(found) == {"trunk", "value_hidden", "advantage_hidden"}
    assert [found[name].num_units for name in found] == [6, 5, 5]


def test_two_modules_with_one_parameter_get_one_bank_and_stay_tied():
    torch.manual_seed(0)
    (animal,) = animals("two modules, one Parameter")
    model: Any = animal.build()
    x, y = animal.batch()
    before = model(x, y)
    surgery.knife(model, surgery.Units({"left": [0, 3]}), verify=(x, y))
    assert model.left.composite is model.right.composite
    assert model.left.weight is model.right.weight
    assert torch.allclose(model(x, y), before, atol=1e-6)
    model(x, y).sum().backward()
    copied: Any = copy.deepcopy(model)
    assert copied.left.composite is copied.right.composite and copied.left.composite is not model.left.composite
    assert torch.equal(copied(x, y), model(x, y))


def test_a_module_called_with_two_activations_is_declined():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(F.relu(self.fc(x)) + torch.tanh(self.fc(x)))

    assert "another activation function in Both.forward" in surgery.discover(Both()).declined["fc"]


def test_a_unit_with_a_product_of_computed_tensors_is_no_site():
    (animal,) = animals("QMIX")
    assert set(surgery.discover(animal.build())) == {"hyper_w_1.0", "hyper_w_final.0", "V.0"}


# -- models that are refused as a whole --------------------------------------------------------------------------------


def test_a_lazy_model_is_refused_until_it_ran():
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(
        surgery.ModelError, match=r"'0.weight' is lazy and has no shape yet; run one forward pass first"
    ):
        surgery.discover(model)
    model(torch.randn(3, 4))
    assert list(surgery.discover(model)) == ["0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused_and_a_scripted_child_declined():
    scripted = torch.jit.script(mlp())
    with pytest.raises(surgery.ModelError, match="scripted"):
        surgery.discover(scripted)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), torch.jit.script(mlp()))
    found = surgery.discover(model)
    assert list(found) == ["0"]
    assert "scripted" in found.declined["2"]


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(surgery.ModelError, match=r"created under torch.inference_mode"):
        surgery.discover(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_is_refused():
    model = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(surgery.ModelError, match="quantized"):
        surgery.discover(model)


@pytest.mark.parametrize("thing", [mlp, nn.Linear, 3, {"a": 1}])
def test_what_is_no_module_is_refused_by_type(thing):
    with pytest.raises(surgery.ModelError, match="pass the model itself"):
        surgery.discover(thing)


def test_a_meta_model_is_declined_layer_by_layer():
    with torch.device("meta"):
        model = mlp()
    assert all("meta device" in reason for reason in surgery.discover(model).declined.values())


def test_a_model_without_sites_says_why():
    with pytest.raises(surgery.SiteError, match=r"no site to operate on was found. 0: no activation function"):
        surgery.knife(nn.Sequential(nn.Linear(4, 2)), surgery.Random(0.5))


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_a_hook_that_may_change_an_output_declines_and_one_that_cannot_does_not():
    seen: list[torch.Size] = []

    def note(*args):
        seen.append(args[-1].shape)

    def scale_in_place(module, args, output):
        output.mul_(2.0)

    kept: dict[str, torch.Tensor] = {}

    def store(module, args, output):
        kept["last"] = output.detach()

    class Halve:
        def __call__(self, module, args, output):
            return output / 2

    changing: list[Any] = [
        Halve(),
        lambda module, args, output: output.add(1),
        lambda module, args, output: torch.log(output),
        lambda module, args, output: kept.setdefault("first", output),
        lambda module, args, output: bool(seen.append(output.shape)) or output * 2,  # type: ignore[func-returns-value]
        lambda module, args, output: output.mul_(2),
        lambda module, args, output: None if kept else output,
        functools.partial(lambda scale, module, args, output: output * scale, 2.0),
        scale_in_place,
    ]
    observing: list[Any] = [
        note,
        store,
        lambda module, args, output: seen.append(output.shape),
        lambda module, args, output: kept.update(last=output.detach()),
        functools.partial(note, "name"),
    ]
    for hook, declined in [(hook, True) for hook in changing] + [(hook, False) for hook in observing]:
        for index in (0, 1):
            model = mlp()
            model[index].register_forward_hook(hook)
            assert ("0" in surgery.discover(model).declined) is declined
    assert not seen and not kept, "discovery called a user's hook"


def test_a_straddled_child_is_inlined_only_without_backward_hooks():
    plain, hooked = (animal.build() for animal in animals("straddle", "hooked straddle"))
    assert surgery.discover(plain)["body.2"].scope == ""
    assert "body.2" not in surgery.discover(hooked)


def test_straddled_sites_keep_the_output_of_the_child_itself():
    torch.manual_seed(0)
    (animal,) = animals("straddle")
    model: Any = animal.build()
    (x,) = animal.batch()
    surgery.knife(model, surgery.Units({"body.0": [0, 1]}), verify=x)
    whole = model(x)
    inner = model.out(torch.relu(model.body(x)))
    assert torch.allclose(whole, inner, atol=1e-6)
