"""What a user sees of a module stays as it was: parameters, keys, containers, classes, hooks, copies, checkpoints."""

from __future__ import annotations

import collections
import copy
import inspect
import io
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from tests.assertions import assert_same_output, outcome
from tests.zoo import ZOO, ActorCritic, Animal, MultiHead, RecurrentAgent, Residual, mlp

WITH_SITES = pytest.mark.parametrize("animal", [a for a in ZOO if a.sites], ids=str)
UNITS = surgery.Units({"0": [0, 3], "2": [1]})


def operate_everywhere(model: nn.Module) -> surgery.Report:
    return surgery.knife(model, surgery.Units({name: [0, 1] for name in surgery.discover(model)}))


def storages(model: nn.Module) -> set[int]:
    return {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 20).view(5, 4)


# -- parameters and keys -----------------------------------------------------------------------------------------------


@WITH_SITES
def test_parameters_keep_identity_name_shape_and_order(animal: Animal):
    model = animal.build()
    before = [(name, id(p), p.shape, p.requires_grad, p.is_leaf) for name, p in model.named_parameters()]
    grouped = [id(p) for p in model.parameters()]
    for _ in range(2):
        operate_everywhere(model)
    assert before == [(name, id(p), p.shape, p.requires_grad, p.is_leaf) for name, p in model.named_parameters()]
    assert grouped == [id(p) for p in model.parameters()]


@WITH_SITES
def test_original_state_dict_keys_stay_in_order_and_new_ones_are_the_banks(animal: Animal):
    model = animal.build()
    before = list(model.state_dict())
    sites = list(surgery.discover(model))
    operate_everywhere(model)
    after = list(model.state_dict())
    assert [key for key in after if key in before] == before
    producers = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for key in set(after) - set(before):
        bank, _, entry = key.rpartition(".")
        assert entry == "_extra_state" or entry.startswith("frozen_"), key
        owner = bank.removesuffix(".composite") if bank.endswith(".composite") else bank.removesuffix("_composite")
        assert owner in sites or owner in producers, key
    assert all(isinstance(value, Tensor) for value in model.state_dict().values())


@WITH_SITES
def test_modules_classes_and_signatures_stay(animal: Animal):
    model = animal.build()
    before = [(name, type(m), m) for name, m in model.named_modules()]
    operate_everywhere(model)
    after = dict(model.named_modules())
    for name, cls, module in before:
        assert after[name] is module and isinstance(module, cls)
        assert type(module).__name__ == cls.__name__ and type(module).__module__ == cls.__module__
        assert inspect.signature(type(module).forward) == inspect.signature(cls.forward)
    assert [name for name in after if "composite" not in name] == [name for name, _, _ in before]


def test_containers_keep_length_indexing_and_iteration():
    model: Any = mlp()
    children = list(model)
    surgery.knife(model, UNITS)
    assert len(model) == 5 and list(model) == children and list(model.children()) == children
    assert model[0] is children[0] and model[-1] is children[-1] and list(model[1:3]) == children[1:3]
    residual: Any = Residual()
    blocks = list(residual.blocks)
    operate_everywhere(residual)
    assert len(residual.blocks) == 2 and list(residual.blocks) == blocks and residual.blocks[1] is blocks[1]


def test_the_class_hook_of_a_users_class_is_not_fired():
    made: list[str] = []

    class Registered(nn.Module):
        def __init_subclass__(cls, **options: Any) -> None:
            made.append(cls.__name__)

    class Net(Registered):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            return self.out(F.relu(self.fc(x)))

        def name(self) -> str:
            return f"{type(self).__name__} of {self.fc.out_features}"

    model = Net()
    surgery.discover(model)
    surgery.knife(model, surgery.Units({"fc": [0]}))
    assert made == ["Net"]
    assert model.name() == "Net of 6" and isinstance(model, Registered)


def test_bookkeeping_of_modules_works_on_an_operated_model():
    model = mlp().eval()
    operate_everywhere(model)
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    visited: list[str] = []
    model.apply(lambda module: visited.append(type(module).__name__))
    assert visited.count("Linear") == 3
    model(x()).sum().backward()
    model.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(False).requires_grad_(True)
    assert not any(b.requires_grad for b in model.buffers())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_an_operated_model_can_change_its_dtype(dtype: torch.dtype):
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    surgery.knife(model, UNITS)
    model.to(dtype), plain.to(dtype)
    assert all(b.dtype == dtype for name, b in model.named_buffers() if "weight" in name or "bias" in name)
    tolerance = {torch.float64: 1e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8}[dtype]  # the rows were rounded
    inputs = [x().to(dtype)]
    assert_same_output(outcome(plain, inputs), outcome(model, inputs), tolerance)
    assert model.to("meta")(x().to("meta", dtype)).shape == (5, 2)


# -- hooks of the user -------------------------------------------------------------------------------------------------


def test_hooks_that_may_return_a_value_decline_every_site_and_are_not_called_by_discovery():
    model = nn.Sequential(mlp(), nn.Tanh())
    fired: collections.Counter[str] = collections.Counter()
    for name, module in list(model.named_modules()):
        module.register_forward_pre_hook(lambda m, a, name=name: fired.update([f"pre {name}"]))
        module.register_forward_hook(lambda m, a, o, name=name: _note(fired, f"forward {name}"))
        module.register_full_backward_pre_hook(lambda m, g, name=name: _note(fired, f"backward pre {name}"))
        module.register_full_backward_hook(lambda m, a, b, name=name: _note(fired, f"backward {name}"))

    def call() -> dict[str, int]:
        fired.clear()
        model(x().requires_grad_()).sum().backward()
        return dict(fired)

    before = call()
    assert set(before.values()) == {1}
    fired.clear()
    assert list(surgery.discover(model)) == []  # a lambda that calls a function may return a value
    assert not fired


def _note(fired: collections.Counter[str], name: str) -> None:
    fired[name] += 1


@pytest.mark.parametrize("build", [mlp, ActorCritic, MultiHead, Residual, RecurrentAgent])
def test_observing_hooks_on_producer_activation_and_parents_fire_once_after_surgery(build):
    fired: collections.Counter[str] = collections.Counter()

    class Note:
        def __init__(self, name: str) -> None:
            self.name = name

        def forward(self, module: nn.Module, args: Any, output: Any) -> None:
            fired[f"forward {self.name}"] += 1

        def backward(self, module: nn.Module, received: Any, sent: Any) -> None:
            fired[f"backward {self.name}"] += 1

        def pre(self, module: nn.Module, args: Any) -> None:
            fired[f"pre {self.name}"] += 1

    model = build()
    for name, module in model.named_modules():
        note = Note(name)
        module.register_forward_hook(note.forward)
        if not isinstance(module, (nn.ReLU, nn.ModuleList, nn.ModuleDict)):
            module.register_forward_pre_hook(note.pre)
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(note.backward)
    inputs = (x().requires_grad_(), *([torch.zeros(5, 6)] if build is RecurrentAgent else []))

    def call() -> dict[str, int]:
        fired.clear()
        output = model(*inputs)
        parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
        sum((part.sum() for part in parts), torch.zeros(())).backward()
        return dict(fired)

    before = call()
    assert set(before.values()) == {1}
    report = operate_everywhere(model)
    assert report.num_units > 0
    assert call() == before


def test_a_pre_hook_that_changes_the_producers_input_reaches_the_bank():
    model = mlp()
    calls: list[int] = []

    def double(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(1)
        return (args[0] * 2 + 1,)

    model[0].register_forward_pre_hook(double)
    before = model(x())
    surgery.knife(model, UNITS, verify=x())
    calls.clear()
    assert torch.allclose(model(x()), before, atol=1e-6)
    assert len(calls) == 1
    assert list(model[0]._forward_pre_hooks.values()) == [double]


def test_hooks_that_arrive_after_surgery_see_the_composites():
    model = mlp()
    surgery.knife(model, UNITS)
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    y = model(x())
    handle.remove()
    assert len(seen) == 1 and seen[0] is y


class Body(nn.Module):
    """A child that returns a pre-activation, and takes a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor, *, scale: Any = 1.0) -> Any:
        return self.last(F.relu(self.first(x)) * scale)


class Parent(nn.Module):
    """Calls the body with a keyword and has the activation function."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = Body(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.tanh(self.out(torch.relu(self.body(x * 2, scale=0.5))) @ torch.ones(2, 6)))


class Observer:
    """Hooks that note what they get, and return nothing."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = collections.defaultdict(list)

    def pre(self, module: nn.Module, args: Any) -> None:
        self.seen["pre"].append(args)

    def pre_named(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen["pre named"].append((args, kwargs))

    def post(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen["post"].append((args, output))

    def post_named(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.seen["post named"].append((args, kwargs, output))

    def register(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.pre)
        module.register_forward_pre_hook(self.pre_named, with_kwargs=True)
        module.register_forward_hook(self.post)
        module.register_forward_hook(self.post_named, with_kwargs=True)


@pytest.mark.parametrize("when", ["before surgery", "after surgery", "for all modules"])
def test_hooks_of_an_inlined_child_fire_once_with_the_arguments_they_would_have_got(when: str):
    torch.manual_seed(0)
    model, observer = Parent(), Observer()
    plain, expected = copy.deepcopy(model), Observer()
    if when == "before surgery":
        observer.register(model.body)
    report = surgery.knife(model, surgery.Units({"body.last": [0, 1], "body.first": [2]}), verify=x())
    assert report.num_units == 3 and type(model) is not Parent
    if when == "after surgery":
        observer.register(model.body)
    if when == "for all modules":
        handles = [
            nn.modules.module.register_module_forward_pre_hook(lambda m, a: note(observer, expected, m, "pre", a)),
            nn.modules.module.register_module_forward_hook(lambda m, a, o: note(observer, expected, m, "post", (a, o))),
        ]
    else:
        handles = []
        expected.register(plain.body)
    observer.seen.clear()  # verification ran them too
    assert torch.allclose(model(x()), plain(x()), atol=1e-6)
    for handle in handles:
        handle.remove()
    assert {name: len(calls) for name, calls in observer.seen.items()} == dict.fromkeys(expected.seen, 1)
    for name in expected.seen:
        old, new = (torch.utils._pytree.tree_leaves(each.seen[name]) for each in (expected, observer))
        if name.startswith("post"):  # the pre-activation of an operated unit is that of its slot
            assert torch.allclose(old.pop()[:, 2:], new.pop()[:, 2:], atol=1e-6)
        for a, b in zip(old, new, strict=True):
            assert a == b if isinstance(a, float) else torch.allclose(a, b, atol=1e-6)


def note(observer: Observer, expected: Observer, module: nn.Module, name: str, value: Any) -> None:
    if isinstance(module, Body):
        (observer if "composite" in module.last._modules else expected).seen[name].append(value)


def test_a_hook_that_changes_what_an_inlined_child_passes_declines_it_or_is_an_error_later():
    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2

    def shift(module: nn.Module, args: Any) -> Any:
        return (args[0] + 1,)

    def in_place(module: nn.Module, args: Any) -> None:
        args[0].mul_(2)

    for register in (
        lambda body: body.register_forward_hook(double),
        lambda body: body.register_forward_pre_hook(shift),
        lambda body: body.register_forward_pre_hook(in_place),
        lambda body: body.register_full_backward_hook(lambda *_: None),
    ):
        model = Parent()
        register(model.body)
        assert "body.last" in surgery.discover(model).declined
    for register, words in (
        (lambda body: body.register_forward_hook(double), "forward hook registered on Body replaces its output"),
        (lambda body: body.register_forward_pre_hook(shift), "pre-hook registered on Body replaces its arguments"),
    ):
        model = Parent()
        surgery.knife(model, surgery.Units({"body.last": [0]}))
        register(model.body)
        with pytest.raises(surgery.SurgeryError, match=words):
            model(x())


def test_an_inlined_child_with_hooks_compiles_whole():
    torch._dynamo.reset()
    model = Parent()
    surgery.knife(model, surgery.Units({"body.last": [0]}))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x()), model(x()), atol=1e-6)
    torch._dynamo.reset()


# -- other ways in -----------------------------------------------------------------------------------------------------


def test_value_beside_forward_is_right_after_surgery_and_after_training():
    model = ActorCritic()
    before = model(x()), model.value(x())
    surgery.knife(model, surgery.Units({"hidden": [0, 2]}))
    assert torch.allclose(model(x()), before[0], atol=1e-6)
    assert torch.allclose(model.value(x()), before[1], atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x()).square().sum() + model.value(x()).square().sum()).backward()
        optimizer.step()
    bank: Any = model.hidden.composite
    rows = bank.passed(0, bank.path.links[0], bank(x()))
    h = bank.assemble(F.relu(model.hidden(x())), rows)
    assert torch.allclose(model.actor(h), model(x()), atol=1e-6)
    assert torch.allclose(model.critic(h), model.value(x()), atol=1e-6)


def test_a_method_that_cannot_be_traced_declines_the_layer_it_reads():
    class Debugging(ActorCritic):
        def value(self, x: Tensor) -> Any:
            z = self.hidden(x)
            if z.sum() > 0:
                z = z * 2
            return self.critic(z)

    reason = surgery.discover(Debugging()).declined["hidden"]
    assert "used by Debugging.value, which cannot be traced: control flow" in reason


def test_a_method_that_reads_the_pre_activation_declines_the_layer():
    class Probing(ActorCritic):
        def features(self, x: Tensor) -> Any:
            return self.hidden(x)

    assert "hidden" in surgery.discover(Probing()).declined


def test_slices_appends_and_inserts_keep_the_output():
    model = mlp()
    y, h = model(x()), model[:2](x())
    surgery.knife(model, UNITS, verify=x())
    assert torch.allclose(model[:2](x()), h, atol=1e-6)
    assert torch.allclose(model[2:](model[:2](x())), y, atol=1e-6)
    assert torch.allclose(nn.Sequential(model[:2], model[2:])(x()), y, atol=1e-6)
    model.append(nn.Tanh())
    model.insert(0, nn.Identity())
    assert torch.allclose(model(x()), torch.tanh(y), atol=1e-6)
    del model[0]
    model.pop(-1)
    assert torch.allclose(model(x()), y, atol=1e-6)
    model.extend([nn.Flatten(), nn.Identity()])
    assert torch.allclose(model(x()), y, atol=1e-6)


def test_a_slice_that_cuts_a_site_says_so():
    model = mlp()
    surgery.knife(model, UNITS)
    with pytest.raises(surgery.SurgeryError, match="ends between a producer and its activation function ReLU"):
        model[:3](x())
    assert model[:4](x()).shape == (5, 5)


def test_an_activation_replaced_after_surgery_is_refused_and_its_settings_are_followed():
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.1), nn.Linear(6, 2))
    plain = copy.deepcopy(model)
    surgery.knife(model, surgery.Units({"0": [0, 1, 2]}))
    model[1].negative_slope = plain[1].negative_slope = 0.7
    assert torch.allclose(model(x()), plain(x()), atol=1e-6)
    model[1] = nn.Tanh()
    with pytest.raises(surgery.SurgeryError, match="made for the activation LeakyReLU, and Tanh stands there now"):
        model(x())


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Any:
        for layer in self.net:
            x = layer(x)
        return x


class Indexes(Loops):
    def forward(self, x: Tensor) -> Any:
        for index in range(len(self.net)):
            x = self.net[index](x)
        return x


class Slices(Loops):
    def forward(self, x: Tensor) -> Any:
        return self.net[2:](self.net[:2](x))


class Features(Loops):
    def forward(self, x: Tensor) -> Any:
        return self.net(x) + self.net[:4](x).sum()


class Mixed(Loops):
    def forward(self, x: Tensor) -> Any:
        return self.net(x) + self.net[0](x).sum()


@pytest.mark.parametrize("build", [Loops, Indexes, Slices, Features, Mixed])
def test_a_model_that_loops_over_indexes_or_slices_a_sequential_keeps_its_output(build):
    model = build()
    found = surgery.discover(model)
    assert set(found) | set(found.declined) == {"net.0", "net.2", "net.4"}
    assert ("net.0" in found) is (build is not Mixed)
    before = model(x())
    for _ in range(2):
        surgery.knife(model, surgery.Units({name: [0, 1] for name in found}), verify=x())
    assert torch.allclose(model(x()), before, atol=1e-5)


# -- forwards on the instance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "blocks.0", "blocks.0.up"])
def test_a_forward_on_the_instance_declines_what_it_hides(path: str):
    model = Residual()
    module = model.get_submodule(path)
    inner = module.forward
    module.forward = lambda x: inner(x) * 0.5
    before = model(x())
    found = surgery.discover(model)
    hidden = {"": [], "blocks.0": ["blocks.0.up"], "blocks.0.up": ["blocks.0.up"]}[path]
    assert set(found) == {"blocks.0.up", "blocks.1.up"} - set(hidden)
    assert all("replaced on the instance" in found.declined[name] for name in hidden)
    surgery.knife(model, surgery.Units({name: [0, 1] for name in found}), verify=x())
    assert torch.allclose(model(x()), before, atol=1e-6)


def test_a_forward_on_the_activation_instance_declines():
    model = mlp()
    model[1].forward = lambda x: x * 0.5
    assert "the forward of '1' was replaced on the instance" in surgery.discover(model).declined["0"]


# -- copies and checkpoints --------------------------------------------------------------------------------------------


@WITH_SITES
def test_deepcopy_pickle_and_save_keep_class_output_and_independence(animal: Animal):
    if "<locals>" in animal.build().__class__.__qualname__ or animal.name == "instance forward":
        pytest.skip("holds a lambda, which pickle refuses with or without surgery")
    if animal.name == "computed weights":
        pytest.skip("holds parametrized modules, which torch lets no one pickle, with or without surgery")
    torch.manual_seed(0)
    model, batch = animal.build().eval(), animal.batch()
    operate_everywhere(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for copied in copies:
        assert type(copied) is type(model)
        assert_same_output(outcome(model, batch), outcome(copied, batch), 0.0)
        assert not storages(copied) & storages(model)
        surgery.knife(copied, surgery.Units({next(iter(animal.sites)): [2]}), verify=batch)
        assert_same_output(outcome(model, batch), outcome(copied, batch), 2e-6)


def test_a_shallow_copy_shares_and_works():
    model = ActorCritic()
    operate_everywhere(model)
    copied = copy.copy(model)
    assert copied.hidden is model.hidden and type(copied) is type(model)
    assert torch.equal(copied(x()), model(x())) and torch.equal(copied.value(x()), model.value(x()))


@pytest.mark.parametrize("whole", [True, False], ids=["pickle", "torch.save"])
def test_an_operated_module_is_loaded_in_another_process(tmp_path, whole: bool):
    model = Residual()
    operate_everywhere(model)
    path = tmp_path / "model"
    path.write_bytes(pickle.dumps(model)) if whole else torch.save(model, path)
    torch.save((x(), model(x())), tmp_path / "example")
    code = f"""
        import pickle, torch
        path = {str(path)!r}
        model = pickle.load(open(path, "rb")) if {whole} else torch.load(path, weights_only=False)
        x, y = torch.load({str(tmp_path / "example")!r})
        assert torch.equal(model(x), y)
        from neuronsurgery import surgery
        surgery.knife(model, surgery.Units({{"blocks.0.up": [4]}}), verify=x)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_state_dict_goes_into_a_model_operated_on_in_the_same_way():
    torch.manual_seed(0)
    first, second = mlp(), mlp()
    for model in (first, second):
        surgery.knife(model, UNITS)
        surgery.knife(model, surgery.Units({"0": [3, 5]}))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(first(x()), second(x()))
    assert surgery.composites(first) == surgery.composites(second)


def test_a_state_dict_with_other_units_of_the_same_number_brings_its_structure_along():
    torch.manual_seed(0)
    first, second = mlp(), mlp()
    surgery.knife(first, surgery.Units({"0": [0, 3]}))
    surgery.knife(second, surgery.Units({"0": [4, 5]}))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x()), second(x()))


def test_checkpoints_of_another_structure_are_refused():
    operated, plain, more = mlp(), mlp(), mlp()
    surgery.knife(operated, UNITS)
    for _ in range(3):
        surgery.knife(more, surgery.Units({"0": [0, 1, 2], "2": [0, 1, 2]}))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0.composite.frozen_weight"):
        plain.load_state_dict(operated.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*0.composite.frozen_weight"):
        operated.load_state_dict(plain.state_dict())
    with pytest.raises((RuntimeError, surgery.SurgeryError), match=r"size mismatch|operated on differently"):
        operated.load_state_dict(more.state_dict())


def test_functional_call_takes_the_place_of_parameters():
    model = mlp()
    surgery.knife(model, UNITS)
    doubled = {name: p.detach() * 2 for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert torch.equal(torch.func.functional_call(model, doubled, (x(),)), other(x()))


def test_parameters_replaced_through_vmap_ensembles_work():
    models = [mlp() for _ in range(3)]
    for model in models:
        surgery.knife(model, UNITS)
    parameters, buffers = torch.func.stack_module_state(models)
    together = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x(),)))(parameters, buffers)
    assert torch.allclose(together, torch.stack([model(x()) for model in models]), atol=1e-6)


@pytest.mark.parametrize("verify", [True, False])
def test_an_operation_inside_an_autocast_block_keeps_the_output(verify: bool):
    torch.manual_seed(0)
    model = mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x()).detach()
        surgery.knife(model, surgery.Units({"0": [0, 3, 5], "2": [1]}), verify=x() if verify else None)
        after = model(x()).detach()
    assert after.dtype == torch.bfloat16
    assert float((after - before).abs().max()) <= 2.0**-7 * float(before.abs().max())


# -- loops of the user's own -------------------------------------------------------------------------------------------


def by_hand(model: nn.Sequential, x: Tensor) -> Tensor:
    for layer in model:
        x = layer(x)
    return x


@pytest.mark.parametrize("kind", ["inplace relu", "prelu", "identity between", "convolutions"])
def test_loops_over_a_sequential_by_hand_give_the_same_output_after_surgery(kind: str):
    torch.manual_seed(0)
    models = {
        "inplace relu": (nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), torch.randn(5, 4)),
        "prelu": (nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 2)), torch.randn(5, 4)),
        "identity between": (
            nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.GELU(), nn.Linear(8, 2)),
            torch.randn(5, 4),
        ),
        "convolutions": (
            nn.Sequential(nn.Conv1d(2, 8, 3), nn.SiLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)),
            torch.randn(5, 2, 8),
        ),
    }
    model, x = models[kind]
    before = model(x).detach()
    for seed in (1, 2):
        surgery.knife(model, surgery.Random(0.5, seed=seed))
    assert torch.allclose(by_hand(model, x), before, rtol=0, atol=2e-6 * float(before.abs().max()))
    with torch.no_grad():  # the active members move, so that no bank could be left out unnoticed
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.equal(by_hand(model, x), model(x))
    assert not torch.allclose(model(x), before, atol=1e-3)
    behind = {"identity between": 3}.get(kind, 2)  # the first activation function
    assert torch.equal(model[behind:](model[:behind](x)), model(x))


def test_a_child_that_replaces_the_activation_is_an_error_and_not_a_wrong_output():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    surgery.knife(model, surgery.Units({"0": [1, 2]}))
    model[1] = nn.Tanh()
    with pytest.raises(surgery.SurgeryError, match=r"made for the activation ReLU, and Tanh stands there now"):
        model(torch.randn(3, 4))


def test_an_activation_used_in_a_sequential_and_in_a_forward_adds_the_rows_once():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.body = nn.Sequential(nn.Linear(4, 6), self.act, nn.Linear(6, 6), self.act)
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.body[0](x)) + self.body(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Both(), torch.randn(5, 4)
    before = model(x).detach()
    report = surgery.knife(model, surgery.Random(0.5, seed=3), verify=x)
    assert report.num_units == 6
    assert torch.allclose(model(x), before, rtol=0, atol=2e-6 * float(before.abs().max()))


def test_an_initializer_that_walks_whatever_has_a_weight_leaves_the_frozen_members():
    def initialize(module: nn.Module) -> None:
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                nn.init.normal_(getattr(module, name))

    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 2))
    surgery.knife(model, surgery.Units({"0": [1, 2]}))
    before = {key: value.clone() for key, value in model.state_dict().items() if "composite" in key}
    model.apply(initialize)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
