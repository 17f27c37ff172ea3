"""The consumers of a site: every slice of a parameter that reads the activations of its units.

Methods that silence a unit or copy it have to write its outgoing weights. They are found in the traced graphs, from the
activation function on: through functions of one entry, pooling, flattening, concatenation and batch norms, into the
modules that are called and out to those that call. Where something else is read with a unit (a residual, a norm over
units), or where the graph ends, the outgoing weights are not the unit's alone or not known, and the site is declined.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.hooks import forbids_inlining, may_change_input
from neuronsurgery.pytorch.layouts import Layout, Passed
from neuronsurgery.pytorch.links import UnitFunction
from neuronsurgery.pytorch.lookahead import is_of_parameters
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.passing import past, width_of
from neuronsurgery.pytorch.places import Place, banks_at
from neuronsurgery.pytorch.producers import Multiplication, multiplication_at, shape_of
from neuronsurgery.pytorch.products import Convolution, Linear
from neuronsurgery.pytorch.readers import Weights, input_weights
from neuronsurgery.pytorch.reading import Reading
from neuronsurgery.pytorch.recognition import canonical_name, is_metadata
from neuronsurgery.pytorch.survey import Survey, modules_around
from neuronsurgery.pytorch.unit_axes import UnitAxes
from neuronsurgery.pytorch.uses import Use

__all__ = ["Consumer", "consumers_of"]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A parameter that reads a site: `columns`, (num_units, entries) int64, are those of each unit under `axes`.

    `axes` number what the parameter reads, as a producer's axes number its units; `layout` says where the units are
    among it, with no count open. `bias`: what the same layer adds.
    """

    name: str
    weight: nn.Parameter
    axes: UnitAxes
    layout: Layout
    bias: nn.Parameter | None

    @functools.cached_property
    def columns(self) -> Tensor:
        """The columns of each unit."""
        return self.layout.places()

    @property
    def passed(self) -> Passed:
        """What the activations pass on their way here."""
        return self.layout.passed

    def of(self, units: Tensor) -> Tensor:
        """The columns of some units, one after the other, (num_taken * entries,)."""
        device = self.weight.device
        return self.columns.to(device).index_select(0, units.to(device)).flatten()

    def beside(self, copied: Tensor) -> tuple[Tensor, Tensor]:
        """What its axis is made of once copies of these units follow behind all units of the site.

        Returns for each entry which one it comes from, (size,) int64, and the columns of each unit then.
        """
        layout = replace(self.layout, num_units=self.layout.num_units + len(copied))
        old, now = self.columns, layout.places()
        source = torch.empty(layout.total, dtype=torch.long)
        source[_others(now, layout.total)] = _others(old, self.layout.total)
        source[now.flatten()] = torch.cat([old, old[copied]]).flatten()
        return source, now


def _others(columns: Tensor, total: int) -> Tensor:
    """The entries of an axis that belong to no unit of the site, in order."""
    is_other = torch.ones(total, dtype=torch.bool)
    is_other[columns.flatten()] = False
    return is_other.nonzero().flatten()


def consumers_of(survey: Survey, place: Place, *, is_kept: bool = False) -> tuple[Consumer, ...] | str:
    """Every consumer of a site, or why not all of them can be told.

    `is_kept`: what they compute is to stay as it is, so that frozen rows and frozen weights are no obstacle.
    """
    if reason := _why_not_apart(place, is_kept):
        return reason
    entries = [entry for entry in survey.by_weight[id(place.weight)] if not survey.is_superseded(entry)]
    followed = Following(survey, place, is_kept)
    for reading, method, use in entries:
        if reason := followed.follow(reading, method, use, place.site.num_units):
            return reason
    return followed.complete()


def _why_not_apart(place: Place, is_kept: bool) -> str:
    """Why what a site's consumers read is not its units' alone, whatever the consumers are."""
    if place.bank is not None and not is_kept:
        return "it has frozen rows, which its consumers read as well: undo or consolidate first"
    if place.product.is_stacked:
        return "its units are numbered by several axes, as stacked experts are"
    for link in place.path.links:
        if isinstance(link, UnitFunction) and link.num_others:
            return "another tensor, a residual say, enters before its activation function: its consumers read that too"
    return ""


Value = tuple[nn.Module, fx.Node, Layout]


@dataclass
class Following:
    """Follows the activations of one site to their consumers; each reason is the first found."""

    survey: Survey
    place: Place
    is_kept: bool = False
    pending: list[Value] = field(default_factory=list)
    found: dict[int, Consumer] = field(default_factory=dict)  # id of a weight -> what reads
    calls: set[fx.Node] = field(default_factory=set)
    entries: dict[int, set[fx.Node]] = field(default_factory=dict)  # id of a module entered -> the calls of it
    whole: set[int] = field(default_factory=set)  # ids of layers whose class says by what they read, not their graphs

    def follow(self, reading: Reading, method: str, use: Use, num_units: int) -> str:
        """Follow one use of the site; "" if all that reads it was found."""
        if self.is_inlined(reading.scope):
            return ""
        layout = _layout_of(use, num_units)
        if isinstance(layout, str):
            return layout
        self.pending.append((reading.scope, use.end, layout))
        seen: dict[fx.Node, set[Layout]] = defaultdict(set)
        while self.pending:
            scope, node, layout = self.pending.pop()
            if layout in seen[node]:
                continue
            seen[node].add(layout)
            if len(seen[node]) > MANY:
                return f"it reaches '{node.name}' in more than {MANY} ways, as where a module reads its own output"
            if not (readers := [user for user in node.users if not is_metadata(user)]):
                return "nothing reads it"
            for user in readers:
                if reason := self.read(scope, node, user, layout, method):
                    return reason
        return ""

    def is_inlined(self, scope: nn.Module) -> bool:
        """Whether all callers of a scope have inlined it: it is followed in their graphs."""
        return id(scope) in self.survey.inlined and not self.survey.callers.get(id(scope))

    # -- one reader

    def read(self, scope: nn.Module, node: fx.Node, user: fx.Node, layout: Layout, method: str) -> str:
        if user.op == "output":
            return self.left(scope, node, user, layout, method)
        call = multiplication_at(user, scope)
        if call is not None and call.received is node:
            return self.consumed(scope, user, call, layout)
        if call is not None:
            return f"it is multiplied with the weights of '{call.producer}' otherwise than as its input"
        if user.op == "call_module":
            return self.called(scope, node, user, layout)
        return self.passed(scope, user, past(user, node, scope, layout, self))

    def passed(self, scope: nn.Module, user: fx.Node, layout: Layout | str) -> str:
        if isinstance(layout, str):
            return layout
        self.pending.append((scope, user, layout))
        return ""

    def width(self, node: fx.Node, scope: nn.Module, axis: int) -> int | None:
        """How many entries another value has along an axis."""
        return width_of(node, scope, axis)

    def is_partner(self, node: fx.Node, scope: nn.Module, layout: Layout) -> bool:
        """Whether a layer makes a value, entry by entry, for the one node that reads it: half of a gated unit."""
        if sum(not is_metadata(user) for user in node.users) != 1:
            return False
        if multiplication_at(node, scope) is not None:
            return True
        reading = self.survey.readings.get(id(submodule(scope, str(node.target)))) if node.op == "call_module" else None
        if reading is not None:
            results = [traced.graph.output_node().args[0] for method, traced in reading.traces if method == "forward"]
            inner = [each for each in results if isinstance(each, fx.Node)]
            return len(inner) == len(results) > 0 and all(self.is_partner(o, reading.scope, layout) for o in inner)
        inputs = [each for each in node.all_input_nodes if not is_of_parameters(each)]
        if len(inputs) != 1:
            return False
        after = past(node, inputs[0], scope, layout, self)
        is_entrywise = not isinstance(after, str) and replace(after, passed=layout.passed) == layout
        return is_entrywise and self.is_partner(inputs[0], scope, layout)

    def called(self, scope: nn.Module, node: fx.Node, user: fx.Node, layout: Layout) -> str:
        module = submodule(scope, str(user.target))
        path = self.name_of(scope, str(user.target))
        if (weights := input_weights(module)) is not None:
            return self.entered_whole(path, module, weights, node, user, layout)
        if original_class(module).forward is nn.MultiheadAttention.forward:
            return self.attended(path, module, node, user, layout)
        reading = self.survey.readings.get(id(module))
        if reading is not None and not forbids_inlining(module):
            return self.entered(reading, node, user, layout)
        return self.passed(scope, user, past(user, node, scope, layout, self))

    def entered(self, reading: Reading, node: fx.Node, user: fx.Node, layout: Layout) -> str:
        """A module with a forward of its own reads it."""
        graphs = [traced.graph for method, traced in reading.traces if method == "forward"]
        if not graphs or user.kwargs or any(not isinstance(argument, fx.Node) for argument in user.args):
            return f"it enters '{user.target}' in a way that cannot be followed"
        for graph in graphs:
            placeholders = [inside for inside in graph.nodes if inside.op == "placeholder"]
            inner = [p for p, argument in zip(placeholders, user.args, strict=False) if argument is node]
            if not inner:
                return f"it enters '{user.target}' in a way that cannot be followed"
            self.pending += [(reading.scope, each, layout) for each in inner]
        self.entries.setdefault(id(reading.scope), set()).add(user)
        return ""

    def left(self, scope: nn.Module, node: fx.Node, output: fx.Node, layout: Layout, method: str) -> str:
        """The scope returns it, to those that call the scope."""
        label = original_class(scope).__name__
        callers = self.survey.callers.get(id(scope), [])
        if method != "forward" and not callers:
            return f"{label}.{method} returns it, which may be called from anywhere"
        if blind := self.survey.blind_caller(scope):
            return f"it leaves {label} to {blind}, which cannot be traced"
        if not callers:
            return f"it is returned by {label}"
        if output.args[0] is node:
            self.pending += [(caller, call, layout) for caller, call in callers]
            return ""
        result: Any = output.args[0]
        if not isinstance(result, tuple) or node not in result:
            return f"it is returned by {label} inside a structure"
        items: list[tuple[Any, Any]] = [(caller, user) for caller, call in callers for user in call.users]
        if any(canonical_name(user) != "getitem" or not isinstance(user.args[1], int) for _, user in items):
            return f"it is returned by {label} in a tuple that is handed on"
        self.pending += [(caller, user, layout) for caller, user in items if result[user.args[1]] is node]
        return ""

    # -- consumers

    def consumed(self, scope: nn.Module, user: fx.Node, call: Multiplication, layout: Layout) -> str:
        """A product with a parameter reads it."""
        name = self.name_of(scope, call.producer)
        if isinstance(call.product, str):
            return f"its consumer '{name}' cannot be written: {call.product}"
        if user.op == "call_module" and may_change_input(submodule(scope, call.producer)):
            return f"a hook on its consumer '{name}' may change what that reads"
        if call.computed is not None:
            return f"the weight of its consumer '{name}' is computed, from parameters that other units share"
        axes = _input_axes(call.product)
        if axes is None:
            return f"its consumer '{name}' is a product in which inputs have no columns of their own"
        at = -call.product.dims - 1 if isinstance(call.product, Convolution) else -1
        if layout.axis != at:
            return f"its consumer '{name}' reads it along another axis than that of its units"
        return self.noted(name, call.weight, axes, call.bias, layout) or self.counted(user)

    def entered_whole(
        self, path: str, module: nn.Module, weights: Weights, node: fx.Node, user: fx.Node, layout: Layout
    ) -> str:
        """A layer reads it by these weights, as its class says, whatever else it does."""
        if user.args[:1] != (node,) or node in user.args[1:] or node in user.kwargs.values() or layout.axis != -1:
            return f"it enters '{path}' otherwise than as its input"
        if may_change_input(module):
            return f"a hook on its consumer '{path}' may change what that reads"
        self.whole.add(id(module))
        return self.noted_all(path, module, weights, layout) or self.counted(user)

    def noted_all(self, path: str, module: nn.Module, weights: Weights, layout: Layout) -> str:
        for name, bias in weights.items():
            weight = module._parameters.get(name)
            if weight is None or weight.dim() != 2:
                return f"its consumer '{path}' reads by '{name}', which is computed or no parameter (outputs, inputs)"
            own = None if bias is None else module._parameters.get(bias)
            if reason := self.noted(f"{path}.{name}", weight, UnitAxes((1,)), own, layout):
                return reason
        return ""

    def attended(self, path: str, module: nn.Module, node: fx.Node, user: fx.Node, layout: Layout) -> str:
        """The projections of an attention layer read it, as query, key or value."""
        given = dict(zip(("query", "key", "value"), user.args, strict=False)) | dict(user.kwargs)
        names = [name for name in ("query", "key", "value") if given.pop(name) is node]
        if node in given.values() or len(user.args) > 3 or not names or layout.axis != -1:
            return f"it enters '{path}' otherwise than as query, key or value"
        if may_change_input(module):
            return f"a hook on its consumer '{path}' may change what that reads"
        is_packed = module._parameters.get("q_proj_weight") is None
        if is_packed and len(names) < 3:
            return f"its consumer '{path}' reads it beside others by columns of one weight: as {', '.join(names)} alone"
        weights: Weights = {"in_proj_weight": "in_proj_bias"}
        if not is_packed:
            weights = dict.fromkeys(f"{name[0]}_proj_weight" for name in names)
        return self.noted_all(path, module, weights, layout) or self.counted(user)

    def noted(self, name: str, weight: nn.Parameter, axes: UnitAxes, bias: nn.Parameter | None, layout: Layout) -> str:
        settled = layout.settled(axes.num_units(weight.shape))
        if isinstance(settled, str):
            return f"its consumer '{name}' reads {settled}"
        if reason := self.unwritable(name, weight):
            return reason
        known = self.found.get(id(weight))
        if known is not None:
            if not torch.equal(known.columns, settled.places()):
                return f"its consumer '{name}' reads it in two places"
            is_fixed = settled.is_fixed or known.layout.is_fixed
            settled = replace(settled.past(known.passed), is_fixed=is_fixed)
        self.found[id(weight)] = Consumer(name, weight, axes, settled, bias)
        return ""

    def unwritable(self, name: str, weight: nn.Parameter) -> str:
        """Why the columns of a weight are read by more than the consumer, or written by more."""
        if self.is_kept:
            return ""
        owners = self.survey.owners[id(weight)]
        if any(isinstance(owner._modules.get(bank), Composite) for owner, bank in banks_at(owners)):
            return f"its consumer '{name}' has frozen rows, which read it too: undo or consolidate there first"
        if not weight.requires_grad:
            return f"the weight of its consumer '{name}' is frozen"
        return ""

    def counted(self, user: fx.Node) -> str:
        self.calls.add(user)
        return ""

    def name_of(self, scope: nn.Module, path: str) -> str:
        outer = self.survey.names.get(id(scope), "")
        return f"{outer}.{path}".lstrip(".")

    # -- all of them

    def complete(self) -> tuple[Consumer, ...] | str:
        """The consumers, if their weights read nothing else."""
        for key, calls in self.entries.items():
            for caller, call in self.survey.callers.get(key, ()):
                if call not in calls:
                    return f"'{call.target}', which reads it, is called in {original_class(caller).__name__} with more"
        for consumer in self.found.values():
            if reason := self.other_inputs(consumer):
                return reason
        return tuple(self.found.values()) or "nothing reads it"

    def other_inputs(self, consumer: Consumer) -> str:
        """Why the columns of a consumer's weight may serve another input too: it is called again, or read otherwise."""
        survey, weight = self.survey, consumer.weight
        entries = [
            (reading, use)
            for reading, method, use in survey.by_weight.get(id(weight), ())
            if not (id(reading.scope) in self.whole and method == "forward") and not self.is_inlined(reading.scope)
        ]
        for reading, use in entries:
            if use.node not in self.calls:
                where = original_class(reading.scope).__name__
                return f"its consumer '{consumer.name}' is called in {where} with another input too"
        owners = survey.owners[id(weight)]
        if not entries:  # of a layer that says by what it reads: its calls are no products
            callers = [call for owner, _ in owners for _, call in survey.callers.get(id(owner), ())]
            if any(call not in self.calls for call in callers):
                return f"its consumer '{consumer.name}' is called with another input too"
            reason = self.other_callers(weight)
            return f"its consumer '{consumer.name}' is {reason}" if reason else ""
        reason = survey.other_role(weight, owners) or self.other_callers(weight)
        return f"the weight of its consumer '{consumer.name}' has another role: {reason}" if reason else ""

    def other_callers(self, weight: nn.Parameter) -> str:
        """A function that was not traced and uses a consumer apart from the site may give it another input."""
        survey = self.survey
        around_site, around = (
            {id(module): module for name in survey.names_of(each) for module in modules_around(survey.model, name)}
            for each in (self.place.weight, weight)
        )
        apart = {id(weight), *(set(around) - set(around_site))}
        found = (
            label
            for owner, label, _, target in survey.reaching(apart)
            if id(target) in apart and not (id(owner) in self.whole and label.endswith(".forward"))
        )
        return next((f"used by {label}" for label in found), "")


MANY = 8
"""In so many ways a value may be reached, as when it is joined with functions of itself."""


def _layout_of(use: Use, num_units: int) -> Layout | str:
    """Where the units are in the activations of one use, batched as convolutions take their inputs."""
    assert use.path is not None
    if isinstance(use.product, Convolution):
        num_axes = use.product.dims + 2
        return Layout(num_units, use.path.unit_axes(use.product, num_axes)[0], num_axes)
    shape = shape_of(use.product, use.weight)
    for link in use.links:
        shape = shape.past(link.link)
    if shape.axes is None:
        return "where its units are past a transpose is not known"
    return Layout(num_units, shape.axes[0])


def _input_axes(product: Any) -> UnitAxes | None:
    """Where the inputs of a product are in its weight, as `UnitAxes` that number them; None where they are in none."""
    if isinstance(product, Linear):
        return UnitAxes((1 - product.axes.axes[0],))
    if not isinstance(product, Convolution):
        return None
    if product.transposed:
        return UnitAxes((0,))
    return UnitAxes((1,)) if product.groups == 1 else UnitAxes((0, 2), product.groups)
