"""einops in a forward: its functions are recorded as they are, its layers stay opaque children."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuronsurgery import surgery

einops: Any = pytest.importorskip("einops")
layers: Any = pytest.importorskip("einops.layers.torch")
rearrange, reduce, repeat, einsum = einops.rearrange, einops.reduce, einops.repeat, einops.einsum
rows = functools.partial(rearrange, pattern="b f -> b f")
FUNCTIONS = {name: getattr(einops, name).__code__ for name in ("rearrange", "reduce", "repeat", "einsum", "pack")}


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(3, 6))


class ByModule(Hidden):
    def forward(self, x):
        h = einops.rearrange(F.relu(self.fc(einops.rearrange(x, "b f -> b f"))), "b (a c) -> b a c", a=2)
        return self.out(einops.rearrange(h, "b a c -> b (a c)"))


class ByName(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(rows(x)))
        pooled = reduce(repeat(h, "b f -> b k f", k=x.shape[0]), "b k f -> b f", "mean")
        return self.out(pooled) + einsum(h, repeat(self.scale, "k f -> (k n) f", n=2)[:1], "b f, o f -> b o")


class Local(Hidden):
    def forward(self, x):
        from einops import pack, parse_shape, unpack

        sizes = parse_shape(x, "batch _")
        both, shapes = pack([F.relu(self.fc(x)), F.relu(self.fc(x * 2))], "b *")
        one, two = unpack(both, shapes, "b *")
        h = rearrange([one, two], "n b f -> b n f")
        return self.out(rearrange(h, "b n f -> (b n) f")).view(sizes["batch"], -1)


class Layers(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.join = layers.Rearrange("b (a c) -> b a c", a=2), layers.Rearrange("b a c -> b (a c)")
        self.mix = layers.EinMix("b a c -> b a d", weight_shape="a c d", bias_shape="a d", a=2, c=3, d=3)
        self.pool = layers.Reduce("b (a c) -> b a", "max", c=3)

    def forward(self, x):
        h = self.join(self.mix(self.split(F.relu(self.fc(x)))))
        return self.out(h) + self.pool(h).mean(1, keepdim=True)


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        layers.Rearrange("b f -> b f"), nn.Linear(4, 6), nn.ReLU(), layers.Rearrange("b (a c) -> b c a", a=2),
        nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "site"),
    [(ByModule, "fc"), (ByName, "fc"), (Local, "fc"), (Layers, "fc"), (stack, "1")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_forward_that_uses_einops_is_operated_on(build, site):
    model = build()
    operated = copy.deepcopy(model)
    found = surgery.discover(operated)
    assert site in found, found.declined
    surgery.knife(operated, surgery.Units({site: [0, 1, 2]}), verify=torch.randn(3, 4))
    with torch.no_grad():
        for each in (model, operated):
            each.get_submodule(site).weight[3:].add_(0.5)
    for batch in (3, 5):
        x = torch.randn(batch, 4)
        assert torch.allclose(model(x), operated(x), atol=1e-5)


def test_the_functions_are_einopss_own_afterwards_also_after_a_failure():
    class Fails(Hidden):
        def forward(self, x):
            if rearrange(x, "b f -> f b").sum() > 0:
                x = x * 2
            return self.out(F.relu(self.fc(x)))

    for model in (ByName(), Fails(), Local()):
        surgery.discover(model)
        assert {name: getattr(einops, name).__code__ for name in FUNCTIONS} == FUNCTIONS
    assert rearrange(torch.zeros(2, 3), "a b -> b a").shape == (3, 2)


def test_a_line_of_the_user_is_named_where_einops_refuses():
    class Malformed(Hidden):
        def forward(self, x):
            return self.out(F.relu(self.fc(x))) + rearrange(torch.float32, "a b -> b a")

    reason = surgery.discover(Malformed()).declined["fc"]
    assert f"test_einops.py:{Malformed.forward.__code__.co_firstlineno + 1})" in reason


def test_other_threads_use_einops_while_a_forward_is_traced():
    seen = bytearray()  # no container that a trace would put back

    class Waits(Hidden):
        def forward(self, x):
            thread = threading.Thread(target=lambda: seen.extend(rearrange(torch.zeros(2, 3), "a b -> b a").shape))
            thread.start()
            thread.join(5)
            return self.out(F.relu(self.fc(rearrange(x, "a b -> a b"))))

    surgery.discover(Waits())
    assert seen[:2] == bytes([3, 2])


def test_einops_is_not_imported_for_those_who_do_not_use_it():
    code = """
        import sys, torch
        from torch import nn
        from neuronsurgery import surgery
        assert "0" in surgery.discover(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        assert "einops" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
