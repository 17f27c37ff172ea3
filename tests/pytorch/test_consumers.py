"""Consumers are found in the graphs: every slice that reads a unit, or a reason.

What is found is held to two facts that need no knowledge of how: with the found columns zero the output does not depend
on the unit, and with any other unit's columns zero it does.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.errors import SiteError
from neuronsurgery.pytorch.consuming import Consumer, consumers_of
from neuronsurgery.pytorch.layouts import Layout
from neuronsurgery.pytorch.sites import explored


class Forward(nn.Module):
    """Children by name, for a forward that a subclass gives."""

    one: Any
    two: Any
    body: Any
    head: Any
    policy: Any
    value: Any
    memory: Any
    wide: Any
    deep: Any
    grouped: Any
    up: Any
    left: Any
    right: Any
    embed: Any
    mix: Any
    last: Any
    norm: Any
    gate: Any
    attention: Any

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def images() -> nn.Module:
    """Convolutions, a batch norm and pooling between, and a flattening in front of a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)),
    )


class Branches(Forward):
    """Two heads read one layer, one of them from a concatenation with the input."""

    def __init__(self) -> None:
        super().__init__(body=nn.Linear(4, 8), policy=nn.Linear(12, 3), value=nn.Linear(8, 1))

    def forward(self, x):
        h = F.relu(self.body(x))
        return torch.cat([self.policy(torch.cat([x, h], -1)), self.value(h)], -1)


class Modules(Forward):
    """Out of one module, into another, and into a recurrent layer."""

    def __init__(self) -> None:
        super().__init__(body=Body(), head=nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1)))
        self.memory = nn.GRU(8, 3, batch_first=True)

    def forward(self, x):
        h = self.body(x)
        return torch.cat([self.head(h), self.memory(h.unsqueeze(1))[0].flatten(1)], -1)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x):
        return F.relu(self.layer(x))


class Dense(Forward):
    """Each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 8), two=nn.Linear(12, 6), head=nn.Linear(14, 2))

    def forward(self, x):
        h = F.relu(self.one(x))
        return self.head(torch.cat([h, F.relu(self.two(torch.cat([x, h], 1)))], 1))


class Functional(nn.Module):
    """Weights in parameters, (in, out), and joined channels that are flattened together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return F.gelu(x @ self.up) @ self.down


class Mobile(Forward):
    """A depthwise, a grouped and a transposed convolution, pooled by a mean."""

    def __init__(self) -> None:
        super().__init__(
            wide=nn.Conv2d(1, 8, 1), deep=nn.Conv2d(8, 8, 3, groups=8), grouped=nn.Conv2d(8, 4, 1, groups=2)
        )
        self.up, self.head = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Linear(6, 2)

    def forward(self, x):
        h = F.silu(self.grouped(F.relu(self.deep(F.silu(self.wide(x))))))
        return self.head(F.gelu(self.up(h)).mean((2, 3)))


class TwoStreams(Forward):
    """Channels of two convolutions, joined and then flattened: a block of columns for each unit, behind others."""

    def __init__(self) -> None:
        super().__init__(left=nn.Conv1d(1, 2, 3), right=nn.Conv1d(1, 3, 3), head=nn.Linear(5 * 4, 2))

    def forward(self, x):
        joined = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        return self.head(joined.flatten(1))


class Sequence(Forward):
    """Linear units over time, of which the last step goes on, and a convolution over time behind a transpose."""

    def __init__(self) -> None:
        super().__init__(embed=nn.Linear(4, 6), mix=nn.Conv1d(6, 3, 2), head=nn.Linear(3, 2), last=nn.Linear(6, 2))

    def forward(self, x):
        h = F.relu(self.embed(x))
        mixed = F.relu(self.mix(h.transpose(-1, -2))).mean(-1)
        return self.head(mixed) + self.last(h[:, -1])


class Gated(Forward):
    """A gated unit (SwiGLU): what a second layer makes is for the product alone, directly or in a module of its own."""

    def __init__(self, up: nn.Module | None = None) -> None:
        super().__init__(gate=nn.Linear(4, 8), up=up or nn.Linear(4, 8), head=nn.Linear(8, 2))

    def forward(self, x):
        return self.head(F.silu(self.gate(x)) * self.up(x))


class Excited(Forward):
    """Squeeze and excitation: what reads the channels' means makes a factor for each of them."""

    def __init__(self) -> None:
        super().__init__(body=nn.Conv2d(1, 4, 3), one=nn.Conv2d(4, 3, 1), two=nn.Conv2d(3, 4, 1))
        self.head = nn.Conv2d(4, 2, 2)

    def forward(self, x):
        h = F.relu(self.body(x))
        factors = self.two(F.relu(self.one(F.adaptive_avg_pool2d(h, 1)))).sigmoid()
        return self.head(h * factors).mean((2, 3))


class Pooled(Forward):
    """A weight for each step of time, the same for all units: in a product with a sum, and in a batch of matrices."""

    def __init__(self) -> None:
        super().__init__(body=nn.Linear(4, 6), mix=nn.Linear(6, 1), head=nn.Linear(6, 2), last=nn.Linear(6, 2))

    def forward(self, x):
        h = F.relu(self.body(x))
        weights = torch.softmax(self.mix(h), dim=1)
        known = x.abs().sum(-1).gt(0.5).float().unsqueeze(-1)
        return self.head((weights * h * known).sum(1)) + self.last(torch.bmm(weights.transpose(1, 2), h)).sum(1)


class Attended(Forward):
    """Self-attention, by one weight for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 6), attention=nn.MultiheadAttention(6, 2, batch_first=True))

    def forward(self, x):
        h = F.relu(self.one(x))
        return self.attention(h, h, value=h, need_weights=False)[0]


class Crossed(Forward):
    """Attention over what another layer makes, by a weight for each of query, key and value."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 6), two=nn.Linear(4, 3))
        self.attention = nn.MultiheadAttention(6, 2, kdim=3, vdim=3, batch_first=True)

    def forward(self, x):
        memory = F.relu(self.two(x))
        return self.attention(F.relu(self.one(x)), memory, memory)[0]


class Multiplied(Forward):
    """Units times a function of themselves."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 6), head=nn.Linear(6, 2))

    def forward(self, x):
        h = F.relu(self.one(x))
        return self.head(h * (h * 0.5).tanh())


WIDE, IMAGE = (5, 4), (5, 1, 8, 8)
FOUND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, dict[str, int]]]] = {
    "mlp": (mlp, WIDE, {"0": {"3": 1}, "3": {"5": 1}}),
    "images": (images, IMAGE, {"0": {"4": 1}, "4": {"7": 4}, "7": {"9": 1}}),
    "branches": (Branches, WIDE, {"body": {"policy": 1, "value": 1}}),
    "modules": (
        *(Modules, WIDE),
        {"body.layer": {"head.0": 1, "memory.weight_ih_l0": 1}, "head.0": {"head.2": 1}},
    ),
    "dense": (Dense, WIDE, {"one": {"head": 1, "two": 1}, "two": {"head": 1}}),
    "functional": (Functional, WIDE, {"up": {"down": 1}}),
    "mobile": (
        *(Mobile, IMAGE),
        {"wide": {"deep": 1}, "deep": {"grouped": 1}, "grouped": {"up": 1}, "up": {"head": 1}},
    ),
    "two streams": (TwoStreams, (5, 1, 6), {"left": {"head": 4}, "right": {"head": 4}}),
    "sequence": (Sequence, (5, 7, 4), {"embed": {"mix": 1, "last": 1}, "mix": {"head": 1}}),
    "gated": (Gated, WIDE, {"gate": {"head": 1}}),
    "excited": (Excited, IMAGE, {"body": {"one": 1, "head": 1}, "one": {"two": 1}}),
    "gated by a module": (
        *(lambda: Gated(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 8))), WIDE),
        {"gate": {"head": 1}, "up.0": {"up.2": 1}},
    ),
    "pooled by attention": (Pooled, (5, 7, 4), {"body": {"mix": 1, "head": 1, "last": 1}}),
    "attended": (Attended, (5, 7, 4), {"one": {"attention.in_proj_weight": 1}}),
    "attended across": (
        *(Crossed, (5, 7, 4)),
        {
            "one": {"attention.q_proj_weight": 1},
            "two": {"attention.k_proj_weight": 1, "attention.v_proj_weight": 1},
        },
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_every_consumer_is_found_with_the_columns_of_a_unit(name: str) -> None:
    make, _, expected = FOUND[name]
    found = surgery.consumers(make())
    assert {site: dict(readers) for site, readers in found.readers.items()} == expected
    assert found.declined == {}


@pytest.mark.parametrize("name", FOUND)
def test_the_columns_found_are_all_that_reads_a_unit_and_no_other_units(name: str) -> None:
    make, shape, expected = FOUND[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    for site in expected:
        model = make().double().eval()
        silence(readers_of(model, site), unit=1)
        before = model(x.double())
        with with_louder(model, site, unit=1):
            assert torch.equal(model(x.double()), before), site
        with with_louder(model, site, unit=0):
            assert not torch.allclose(model(x.double()), before), site


def readers_of(model: nn.Module, site: str) -> tuple[Consumer, ...]:
    discovery, survey = explored(model)
    readers = consumers_of(survey, discovery.places[site])
    assert not isinstance(readers, str)
    return readers


@contextlib.contextmanager
def with_louder(model: nn.Module, site: str, *, unit: int) -> Iterator[None]:
    """A unit with other incoming weights."""
    place = explored(model)[0].places[site]
    axes, kept, units = place.product.axes, place.weight.detach().clone(), torch.tensor([unit])
    with torch.no_grad():
        axes.put(place.weight, units, 3 - axes.take(kept, units))
    yield
    with torch.no_grad():
        place.weight.copy_(kept)


def silence(readers: tuple[Consumer, ...], unit: int) -> None:
    for consumer in readers:
        columns = consumer.of(torch.tensor([unit]))
        with torch.no_grad():
            consumer.axes.put(consumer.weight, columns, torch.zeros_like(consumer.axes.take(consumer.weight, columns)))


# -- what is declined ------------------------------------------------------------------------------------------------


class Residual(Forward):
    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), head=nn.Linear(4, 2))

    def forward(self, x):
        return self.head(x + F.relu(self.one(x)))


class ResidualBefore(Residual):
    def forward(self, x):
        return self.head(F.relu(x + self.one(x)))


class Normed(Forward):
    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.norm(F.relu(self.one(x))))


class GatedInput(Forward):
    """A gate on features that are read elsewhere too: its consumer is theirs."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), gate=nn.Linear(4, 4), head=nn.Linear(4, 2))

    def forward(self, x):
        return self.head(F.silu(self.one(x)) * x)


class GatedBeside(Forward):
    """Features from outside, each with a column of its own in the consumer."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), head=nn.Linear(4, 2))

    def forward(self, x, features):
        return self.head(F.silu(self.one(x)) * features)


class GatedNorm(GatedInput):
    def forward(self, x):
        return self.head(F.silu(self.one(x)) * F.layer_norm(self.gate(x), (4,)))


class GatedTwice(GatedInput):
    """The other half is read once more."""

    def forward(self, x):
        up = self.gate(x)
        return self.head(F.silu(self.one(x)) * up) + up.sum(-1, keepdim=True)


class Divisor(GatedInput):
    def forward(self, x):
        return self.head(self.gate(x) / (1 + F.silu(self.one(x))))


class InPlace(GatedInput):
    def forward(self, x):
        h = F.silu(self.one(x))
        before = self.head(h)
        return before + h.mul_(self.gate(x)).sum(-1, keepdim=True)


class Twice(Forward):
    """Units and functions of them side by side: two columns of each, of which one alone must not be written."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), head=nn.Linear(8, 2))

    def forward(self, x):
        h = F.relu(self.one(x))
        return self.head(torch.cat([h, h.tanh()], -1))


class Growing(Forward):
    """A module that reads its own output, with ever more axes."""

    def __init__(self) -> None:
        super().__init__(one=nn.Conv2d(1, 2, 3), body=Axis(), head=nn.Conv2d(2, 2, 1))

    def forward(self, x):
        return self.head(self.body(self.body(F.relu(self.one(x)))))


class Axis(nn.Module):
    def forward(self, h):
        return h.unsqueeze(0)


class Returned(Forward):
    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), head=nn.Linear(4, 2))

    def forward(self, x):
        h = F.relu(self.one(x))
        return self.head(h), h


class SharedHead(Forward):
    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), two=nn.Linear(4, 4), head=nn.Linear(4, 2))

    def forward(self, x):
        return self.head(F.relu(self.one(x))) + self.head(F.relu(self.two(x)))


class Tied(Forward):
    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), head=nn.Linear(4, 2))

    def forward(self, x):
        return self.head(F.relu(self.one(x))) + self.head.weight.sum()


class Open(Forward):
    """The sizes of a flattened convolution and of what it is joined with are both not known."""

    def __init__(self) -> None:
        super().__init__(one=nn.Conv2d(1, 2, 3), head=nn.Linear(2 * 36 + 64, 2))

    def forward(self, x):
        return self.head(torch.cat([F.relu(self.one(x)).flatten(1), x.flatten(1)], 1))


class Encoding(Forward):
    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), head=nn.Linear(4, 2))

    def encode(self, x):
        return F.relu(self.one(x))

    def forward(self, x):
        return self.head(self.encode(x))


class Untraced(Forward):
    def __init__(self) -> None:
        super().__init__(body=Body(), head=nn.Linear(8, 2))

    def forward(self, x):
        h = self.body(x)
        return self.head(h) if h.sum() > 0 else self.head(-h)


class SharedModule(SharedHead):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 3), nn.ReLU())


class Elsewhere(Forward):
    """A method that cannot be traced calls the consumer with something else."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), head=nn.Sequential(nn.Linear(4, 2)))

    def forward(self, x):
        return self.head(F.relu(self.one(x)))

    def of_input(self, x):
        return self.head(x) if x.sum() > 0 else x


class Together(Forward):
    """A method that cannot be traced calls a module that holds the site and its consumer."""

    def __init__(self) -> None:
        super().__init__(body=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))

    def forward(self, x):
        return self.body(x).abs()

    def of_input(self, x):
        return self.body(x) if x.sum() > 0 else x


def test_a_caller_of_site_and_consumer_together_is_no_reason() -> None:
    assert surgery.consumers(Together()).readers == {"body.0": {"body.2": 1}}


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))


def frozen_head() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2).requires_grad_(False))


def hooked(child: int, kind: str) -> Callable[[], nn.Module]:
    def make() -> Any:
        model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 2))
        getattr(model[child], f"register_forward_{kind}")(lambda module, args, *out: (out or args)[0].flip(-1))
        return model

    return make


class Remembering(Forward):
    """A method that cannot be traced calls the recurrent layer with something else."""

    def __init__(self) -> None:
        super().__init__(one=nn.Linear(4, 4), memory=nn.GRUCell(4, 3))

    def forward(self, x):
        return self.memory(F.relu(self.one(x)))

    def of_input(self, x):
        return self.memory(x) if x.sum() > 0 else x


class Skipping(nn.GRUCell):
    """A cell that hands its input on beside its gates."""

    def forward(self, input, hx=None):
        return super().forward(input, hx) + input


def skipped() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Skipping(4, 4))


class Correlated(Attended):
    def forward(self, x):
        h = F.relu(self.one(x))
        return self.attention.out_proj(torch.bmm(h, h.detach().flip(1)))


class Squared(Attended):
    def forward(self, x):
        h = F.relu(self.one(x))
        return self.attention.out_proj(torch.bmm(h, h))


class Masked(Attended):
    def forward(self, x):
        h = F.relu(self.one(x))
        return self.attention(h, h, h, key_padding_mask=h)[0]


class Asked(Attended):
    """One weight reads the units as queries and something else as keys and values."""

    def forward(self, x):
        memory = torch.cat([x, x], -1)[..., :6]
        return self.attention(F.relu(self.one(x)), memory, memory)[0]


def listened() -> nn.Module:
    model = Attended()
    model.attention.register_forward_pre_hook(lambda module, args: (args[0].flip(-1), *args[1:]))
    return model


DECLINED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "a residual behind": (Residual, "one", "added to another tensor"),
    "a residual before": (ResidualBefore, "one", "a residual say, enters before its activation function"),
    "a norm over units": (Normed, "one", r"'norm' \(LayerNorm\) reads it, which may mix units"),
    "a gate on an input": (GatedInput, "one", "'mul' combines it with a computed tensor"),
    "a gate on another input": (GatedBeside, "one", "'mul' combines it with a computed tensor"),
    "a gate on normed values": (GatedNorm, "one", "'mul' combines it with a computed tensor"),
    "a gate whose other half is read twice": (GatedTwice, "one", "'mul' combines it with a computed tensor"),
    "a product in place": (InPlace, "one", "'mul' changes it in place, for others that read it too"),
    "a function of the units as a factor": (Multiplied, "one", "'mul' combines it with a computed tensor"),
    "two places of one consumer": (Twice, "one", "its consumer 'head' reads it in two places"),
    "a module that reads its own output": (Growing, "one", "it reaches '.*' in more than 8 ways"),
    "returned": (Returned, "one", "it is returned by Returned"),
    "a consumer of two": (SharedHead, "one", "'head' is called in SharedHead with another input too"),
    "a consumer read otherwise": (Tied, "one", "'head' has another role: its weight is also read by 'sum'"),
    "open sizes": (Open, "one", "how 136 entries are shared out .* is not known"),
    "a method": (Encoding, "one", "Encoding.encode returns it, which may be called from anywhere"),
    "a caller that cannot be traced": (Untraced, "body.layer", "it leaves Body to Untraced.forward"),
    "a module of two": (SharedModule, "one", "'head', which reads it, is called in SharedModule with more"),
    "a consumer called elsewhere": (Elsewhere, "one", "'head.0' has another role: used by Elsewhere.of_input"),
    "a computed weight": (weight_normed, "0", "the weight of its consumer '2' is computed"),
    "a frozen consumer": (frozen_head, "0", "the weight of its consumer '2' is frozen"),
    "a hook behind": (hooked(2, "hook"), "0", r"a hook on '2' \(Dropout\) may change what its units pass on"),
    "a hook on the consumer": (hooked(3, "pre_hook"), "0", "a hook on its consumer '3' may change what that reads"),
    "a recurrent layer called elsewhere": (Remembering, "one", "'memory.weight_ih' is used by Remembering.of_input"),
    "attention beside others": (Asked, "one", "'attention' reads it beside others by columns of one weight: as query"),
    "a sum over units": (Correlated, "one", "'bmm' reads it otherwise than to average it"),
    "a product with itself": (Squared, "one", "'bmm' reads it otherwise than to average it"),
    "a recurrent layer with a forward of its own": (skipped, "0", "it is added to another tensor"),
    "a mask of attention": (Masked, "one", "it enters 'attention' otherwise than as query, key or value"),
    "a hook on attention": (listened, "one", "a hook on its consumer 'attention' may change what that reads"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_a_site_whose_outgoing_weights_are_not_its_own_is_declined_with_the_reason(name: str) -> None:
    make, site, reason = DECLINED[name]
    with pytest.raises(SiteError, match=f"outgoing weights of site '{site}' cannot be written: .*{reason}"):
        surgery.consumers(make()).require([site])


@pytest.mark.parametrize(("make", "site"), [(Excited, "two"), (Divisor, "one")])
def test_a_factor_or_divisor_of_what_others_read_is_declined_where_it_is_forced_to_be_a_site(
    make: Callable[[], nn.Module], site: str
) -> None:
    assert "combines it with a computed tensor" in surgery.consumers(make(), include=[site]).declined[site]


def test_frozen_rows_on_either_side_are_declined() -> None:
    model = mlp()
    surgery.knife(model, surgery.Units({"3": [1]}))
    declined = surgery.consumers(model).declined
    assert declined["0"].startswith("its consumer '3' has frozen rows") and declined["3"].startswith(
        "it has frozen rows"
    )


# -- what methods make of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Gated, Excited, Attended, Crossed])
def test_the_output_does_not_depend_on_what_units_are_drawn_behind_which_stand_gates_or_attention(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(IMAGE if make is Excited else (5, 7, 4))
    copied = copy.deepcopy(model)
    for each, values in ((model, 1.0), (copied, -2.0)):
        report = surgery.redo(
            each, surgery.Lowest(0.3, of="dormant"), evidence=measured(each, x), init=partial(filled, values)
        )
        assert report.num_units > 0
    assert torch.equal(model(x), copied(x))


def filled(value: float, weight: Tensor) -> None:
    weight.data.fill_(value)


def measured(model: nn.Module, x: Tensor) -> Any:
    return surgery.probe(model, [x], lambda model, x: model(x).square().mean())


def test_units_that_are_averaged_over_time_are_shared_and_split_without_a_change_of_the_output() -> None:
    torch.manual_seed(0)
    model: Any = Pooled().double()
    x = torch.randn(5, 7, 4).double()
    with torch.no_grad():
        model.body.bias[:2] = torch.tensor([-100.0, 100.0])  # one unit never fires, one always does
    before = model(x)
    report = surgery.reborn(model, surgery.Dormant(1e-6), over_active=2.0, evidence=measured(model, x))
    assert report.operated == {"body": (0,)} and not any("donor" in note for note in report.notes)
    assert torch.allclose(model(x), before, atol=1e-12)
    assert surgery.widen(model, surgery.Units({"body": [1, 3]})).operated == {"body": (1, 3)}
    assert torch.allclose(model(x), before, atol=1e-12) and model.body.out_features == 8


@pytest.mark.parametrize(
    ("make", "site", "reason"),
    [
        (Gated, "gate", "numbers of its own for each unit"),
        (Attended, "one", r"'attention.in_proj_weight' \(MultiheadAttention\) has other tensors"),
    ],
)
def test_a_gated_unit_or_a_consumer_with_heads_is_not_split(
    make: Callable[[], nn.Module], site: str, reason: str
) -> None:
    report = surgery.widen(make(), surgery.Units({site: [1]}))
    assert not report.operated and re.search(reason, report.declined[site])


def test_reborn_does_not_share_gated_units_out() -> None:
    x = torch.randn(5, 4)
    report = surgery.reborn(model := Gated(), surgery.Lowest(0.3, of="dormant"), evidence=measured(model, x))
    assert not report.operated and "a way of its own" in report.declined["gate"]


def test_a_constant_unit_that_goes_leaves_its_effect_in_the_biases_of_attention() -> None:
    torch.manual_seed(0)
    model: Any = Attended().double()
    x = torch.randn(5, 7, 4).double()
    with torch.no_grad():
        model.one.weight[2], model.one.bias[2] = 0.0, 1e-3  # the same for every input, and the least useful
        model.attention.in_proj_weight[:, 2] *= 1e-3
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with surgery.ContinualBackprop(model, optimizer, rate=0.2, maturity=1) as replacing:
        while not replacing.num_units:
            model(x).square().mean().backward()
            optimizer.step()
            replacing.step()
            optimizer.zero_grad()
        assert replacing.last is not None and replacing.last.operated == {"one": (2,)}
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_columns_agree_with_torch_on_where_units_go() -> None:
    """A value that says at each place which unit it is, taken the same way."""
    marked = torch.arange(3.0)[None, :, None, None].expand(2, 3, 2, 2)
    other = torch.full((2, 2, 2, 2), -1.0)
    value = torch.cat([torch.cat([other, marked], 1).flatten(1), torch.full((2, 5), -2.0)], 1)
    joined = Layout(3, axis=-3, num_axes=4).joined([2], [])
    flat = joined.flattened(1, -1)
    assert isinstance(flat, Layout)
    columns = flat.joined([], [5]).columns(value.shape[1])
    assert isinstance(columns, Tensor)
    assert torch.equal(value[0][columns], torch.arange(3.0)[:, None].expand(3, 4))


def test_units_over_time_that_are_flattened_have_a_column_for_each_step() -> None:
    value = torch.arange(3.0).expand(2, 4, 3).flatten(1)
    flat = Layout(3, axis=-1).flattened(1, -1)
    assert isinstance(flat, Layout)
    columns = flat.columns(12)
    assert isinstance(columns, Tensor)
    assert torch.equal(value[0][columns], torch.arange(3.0)[:, None].expand(3, 4))


@pytest.mark.parametrize("total", [2, 4, 7])
def test_sizes_that_do_not_fit_are_a_reason(total: int) -> None:
    assert Layout(3, axis=-1).columns(total) == f"{total} entries do not fit its 3 units"
    assert Layout(3, axis=-3, num_axes=4, inner=None).columns(total) == f"{total} entries do not fit its 3 units"
