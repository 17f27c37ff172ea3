"""The survey of a model: what all its readings together say of each producer, a place or a reason."""

from __future__ import annotations

import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from neuronsurgery.pytorch.chains import chain_of, is_sequential
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.hooks import forbids_inlining
from neuronsurgery.pytorch.injected import Injected
from neuronsurgery.pytorch.leftovers import leftovers, why_swapped
from neuronsurgery.pytorch.lookahead import MIXING_MODULES, Lookahead, is_shielded_by_autograd
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.places import Home, Place, banks_at, owners_of, place_of
from neuronsurgery.pytorch.producers import computed_weight_of, is_producer, why_not_computed
from neuronsurgery.pytorch.reading import (
    CONTAINERS,
    Reading,
    is_scope,
    is_torch,
    modules_of,
    read,
    scopes_of,
    targets_of,
)
from neuronsurgery.pytorch.reads import Read, methods_of, reads_of
from neuronsurgery.pytorch.recognition import is_metadata
from neuronsurgery.pytorch.splitting import sharding_problem
from neuronsurgery.pytorch.tracing import Trace
from neuronsurgery.pytorch.unitwise import Kind
from neuronsurgery.pytorch.uses import Use, find_uses, get_attr_reads

__all__ = ["FROZEN", "Survey", "modules_around"]

Reach = tuple[nn.Module, str, Read | None, Any]
"""The owner and label of an untraced function, how it reads (None: its source is not to be had), and what it reads."""


class Survey:
    """All the readings of a model, and the judgement on each of its producers."""

    def __init__(self, model: nn.Module, outputs: tuple[Tensor, ...], include: frozenset[str]) -> None:
        self.model, self.outputs, self.include = model, outputs, include
        self.names = {id(m): n for n, m in reversed(list(modules_of(model)))}
        self.known_uses: dict[fx.Graph, list[Use]] = {}
        self.readings = {id(m): read(n, m) for n, m in scopes_of(model)}
        for reading in self.readings.values():
            self.inline_straddled(reading)
        self.uses = [
            (reading, method, use)
            for reading in self.readings.values()
            for method, traced in reading.traces
            for use in self.uses_in(traced, reading.scope)
        ]
        self.by_weight: dict[int, list[tuple[Reading, str, Use]]] = defaultdict(list)
        for entry in self.uses:
            self.by_weight[id(entry[2].weight)].append(entry)
        self.owners = owners_of(model)
        self.computed = self.find_computed()
        self.inlined = {id(submodule(r.scope, path)) for r in self.readings.values() for path in r.inline}
        self.tensor_reads = self.find_tensor_reads()
        self.reached = self.find_reached()
        self.callers = self.find_callers()
        self.joined: dict[int, str] = {}  # id of an activation's node -> the site whose units come out there
        self.lookahead = Lookahead(
            {key: (r.scope, [t.graph for _, t in r.traces]) for key, r in self.readings.items() if r.has_forward},
            self.callers,
            self.blind_caller,
        )

    # -- reading

    def inline_straddled(self, reading: Reading) -> None:
        """Inline children that return a pre-activation whose activation function is in this scope."""
        for _ in range(8):
            straddled = {
                str(node.target)
                for _, traced in reading.traces
                for node in traced.graph.nodes
                if node.op == "call_module" and self.is_straddled(reading.scope, node)
            } | self.entered(reading)
            if straddled <= reading.inline:
                return
            again = read(reading.name, reading.scope, reading.inline | straddled)
            if again.failure is not None:
                return
            reading.traces, reading.inline = again.traces, again.inline

    def is_straddled(self, scope: nn.Module, node: fx.Node) -> bool:
        child = submodule(scope, str(node.target))
        inner = self.readings.get(id(child))
        if inner is None or forbids_inlining(child) or len(node.users) != 1:
            return False
        (reader,) = node.users
        if reader.op == "output" or (reader.op == "call_module" and self.reads_often(scope, str(reader.target))):
            return False
        return any(use.followed.is_open for _, t in inner.traces for use in self.uses_in(t, inner.scope))

    def reads_often(self, scope: nn.Module, path: str) -> bool:
        """Whether a child with a forward of its own reads what it is given more than once, as a residual block does."""
        inner = self.readings.get(id(submodule(scope, path)))
        if inner is None or not inner.traces:
            return False
        inputs = [node for node in inner.traces[0][1].graph.nodes if node.op == "placeholder"]
        return len([user for user in inputs[0].users if not is_metadata(user)]) > 1 if inputs else False

    def entered(self, reading: Reading) -> set[str]:
        """Children that a pre-activation of this scope enters, and that may hold its activation function.

        A Sequential hands rows on to the children of a Sequential inside it, not into other forwards.
        """
        stopped = {use.followed.stopped for _, t in reading.traces for use in self.uses_in(t, reading.scope)} - {""}
        children = {path: submodule(reading.scope, path) for path in stopped}
        return {
            path
            for path, child in children.items()
            if id(child) in self.readings and not forbids_inlining(child) and not self.reads_often(reading.scope, path)
            if is_sequential(child) or not reading.is_sequential
        }

    def uses_in(self, traced: Trace, scope: nn.Module) -> list[Use]:
        """The producers in a traced function of a scope, followed once: every caller of the scope asks for them."""
        if traced.graph not in self.known_uses:
            self.known_uses[traced.graph] = find_uses(traced.graph, scope)
        return self.known_uses[traced.graph]

    def find_callers(self) -> dict[int, list[tuple[nn.Module, fx.Node]]]:
        callers: dict[int, list[tuple[nn.Module, fx.Node]]] = defaultdict(list)
        for reading in self.readings.values():
            for _, traced in reading.traces:
                for node in traced.graph.nodes:
                    if node.op == "call_module":
                        callers[id(submodule(reading.scope, str(node.target)))].append((reading.scope, node))
        return callers

    def blind_caller(self, scope: nn.Module) -> str | None:
        """An untraced function that may call the scope: a method of an ancestor, or a forward that cannot be read."""
        for owner, label, found, _ in self.reaching({id(scope)}):
            if (owner is not scope) if found is None else found.is_call:
                return label
        return None

    def find_computed(self) -> dict[int, nn.Parameter]:
        """By the id of each producer module with a computed weight the first parameter of it, which the module owns."""
        found: dict[int, nn.Parameter] = {}
        for _, module in modules_of(self.model):
            computed = computed_weight_of(module)
            if computed is not None:
                found[id(module)] = computed.weight
        for key in {id(weight) for weight in found.values()}:
            modules = (module for _, module in modules_of(self.model) if id(found.get(id(module))) == key)
            self.owners[key] = [(module, "weight") for module in modules]
        return found

    def find_tensor_reads(self) -> dict[int, list[tuple[Reading, fx.Node]]]:
        """Where traced functions read a tensor directly, by its id."""
        reads: dict[int, list[tuple[Reading, fx.Node]]] = defaultdict(list)
        for reading in self.readings.values():
            for _, traced in reading.traces:
                for node, tensor in get_attr_reads(traced.graph, reading.scope):
                    reads[id(tensor)].append((reading, node))
        return reads

    def find_reached(self) -> dict[int, list[tuple[int, Reach]]]:
        """Which untraced functions read a module or parameter, by its id, each with its place in their order."""
        reached: dict[int, list[tuple[int, Reach]]] = defaultdict(list)
        order = itertools.count()
        for owner, label, reads in self.untraced_functions():
            found = ((None, m) for m in owner.modules()) if reads is None else targets_of(owner, reads)
            for how, target in found:
                reached[id(target)].append((next(order), (owner, label, how, target)))
        return reached

    def reaching(self, ids: set[int]) -> list[Reach]:
        """The untraced functions that read anything with these ids, in their order."""
        found = sorted((entry for key in ids for entry in self.reached.get(key, ())), key=operator.itemgetter(0))
        return [reach for _, reach in found]

    def untraced_functions(self) -> Iterator[tuple[nn.Module, str, tuple[Read, ...] | None]]:
        for _, module in modules_of(self.model):
            reading = self.readings.get(id(module))
            label = original_class(module).__name__
            if reading is not None and reading.failure is not None:
                yield module, f"{label}.forward", reads_of(original_class(module).forward)
            traced = {method for method, _ in reading.traces} if reading is not None else set()
            for method, function in methods_of(module):
                if method not in traced:
                    yield module, f"{label}.{method}", reads_of(function)

    def without_needless_inlining(self, places: dict[str, Place]) -> dict[str, Place]:
        """Where no accepted site straddles an inlined child, the child stays opaque: its own scope holds the sites."""
        homes: dict[int, list[tuple[Place, Home]]] = defaultdict(list)
        for place in places.values():
            for home in place.homes:
                homes[id(home.scope)].append((place, home))
        needed = {
            id(scope): frozenset(
                path
                for place, home in homes[id(scope)]
                for path in _around(home) & reading.inline
                if not any(other.scope is submodule(scope, path) for other in place.homes)
            )
            for scope, reading in ((r.scope, r) for r in self.readings.values())
        }

        def kept(place: Place, home: Home) -> Home | None:
            spare = home.inline - needed[id(home.scope)]
            if is_sequential(home.scope) and any(_is_within(other, home) for other in place.homes):
                return None
            if not _around(home).isdisjoint(spare):
                return None
            return replace(home, inline=home.inline - spare)

        return {
            name: replace(place, homes=tuple(h for home in place.homes if (h := kept(place, home)) is not None))
            for name, place in places.items()
        }

    # -- judging

    def producers(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every weight that could be a site's, by the name of its producer: the module's, or the parameter's."""
        seen: set[int] = set()
        for name, module in modules_of(self.model):
            weight = module._parameters.get("weight", self.computed.get(id(module)))
            if is_producer(module) and weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                yield name, weight
        for name, parameter in self.model.named_parameters():
            if id(parameter) in self.by_weight and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def judge(self, name: str, weight: nn.Parameter) -> Place | str:
        """The site of a weight, or the reason why it is none."""
        owners = self.owners[id(weight)]
        entries = [e for e in self.by_weight.get(id(weight), ()) if not self.is_superseded(e)]
        is_learning = not is_operated(owners)  # what was operated on stays a place when it is frozen
        reason = (
            _unfit(weight)
            or (FROZEN if is_learning and not weight.requires_grad else "")
            or self.unread(name, owners, bool(entries))
            or next((use.problem for _, _, use in entries if use.problem), "")
            or ("its bias is frozen" if is_learning and _has_frozen_bias(entries) else "")
            or _disagreement(entries)
            or self.broken_chain(entries)
            or self.other_role(weight, owners)
            or self.other_way_in(weight, owners, entries)
            or self.relied_on(name, weight, owners, entries)
        )
        if reason:
            return reason
        ends = {id(use.end) for _, _, use in entries}
        for other in (self.joined[end] for end in ends if end in self.joined):
            return f"its units are those of '{other}', whose pre-activations it joins before the activation function"
        self.joined |= dict.fromkeys(ends, name)
        place = place_of(name, weight, owners, entries, functools.partial(self.is_own, weight))
        return sharding_problem(place) or place

    def broken_chain(self, entries: list[tuple[Reading, str, Use]]) -> str:
        """Why children of a Sequential cannot hand the rows of a site on."""
        for reading, method, use in entries:
            if reading.is_sequential and method == "forward":
                modules = [link.module for link in use.links]
                if isinstance(found := chain_of(reading.scope, use.producer, modules, use.origins), str):
                    return found
        return ""

    def is_superseded(self, entry: tuple[Reading, str, Use]) -> bool:
        """A pre-activation returned by a scope that all its callers inline: the site is the callers'."""
        reading, _, use = entry
        if not use.followed.is_open:
            return False
        return id(reading.scope) in self.inlined and not self.callers.get(id(reading.scope))

    def unread(self, name: str, owners: list[tuple[nn.Module, str]], has_uses: bool) -> str:
        if has_uses:
            return ""
        if not name:
            return "it is the whole model, and no activation function follows it"
        parts = name.split(".")
        for depth in range(len(parts), -1, -1):
            ancestor = submodule(self.model, ".".join(parts[:depth]))
            reading = self.readings.get(id(ancestor))
            if reading is not None and reading.failure is not None:
                return str(reading.failure)
            label = original_class(ancestor).__name__
            if isinstance(ancestor, Injected):
                return "part of a module that plasticity_injection added copies to"
            if isinstance(ancestor, nn.MultiheadAttention):
                return "fused attention"
            if depth < len(parts) and is_torch(ancestor) and not isinstance(ancestor, CONTAINERS):
                return f"inside {label}, which can bypass Python (a fused path)"
        if "forward" in vars(owners[0][0]):
            return "its forward was replaced on the instance"
        return "no traced forward calls it"

    def other_role(self, weight: nn.Parameter, owners: list[tuple[nn.Module, str]]) -> str:
        """A weight that is read otherwise too, as a tied decoder does, is no row-wise thing."""
        own = {id(node) for _, _, use in self.by_weight[id(weight)] for node in use.producing}
        for owner, attribute in owners:
            produces = is_producer(owner)
            if attribute != "weight" and produces:
                return f"its weight is also the {attribute} of '{self.names[id(owner)]}'"
            if not produces and is_torch(owner) and not isinstance(owner, CONTAINERS):
                return f"its weight is also read by '{self.names[id(owner)]}', a {original_class(owner).__name__}"
        for reading, _, use in self.by_weight[id(weight)]:
            nodes = () if use.call.computed is None else use.call.computed.nodes
            if weighty := _beyond_metadata([user for node in nodes for user in node.users if id(user) not in own]):
                return (
                    f"the weight computed of it is also read by '{weighty}' in {original_class(reading.scope).__name__}"
                )
        for reading, node in self.tensor_reads.get(id(weight), ()):
            users = [user for user in node.users if id(user) not in own or _times_read(user, node) > 1]
            if weighty := _beyond_metadata(users):
                return f"its weight is also read by '{weighty}' in {original_class(reading.scope).__name__}"
        return ""

    def is_own(self, weight: nn.Parameter, tensor: Tensor, owner: nn.Module) -> bool:
        """Whether nothing but the site of a weight reads a tensor: its bias, or one that its path passes."""
        uses = [use for _, _, use in self.by_weight[id(weight)]]
        nodes = {id(node) for use in uses for node in (*use.producing, *(n for link in use.links for n in link.nodes))}
        producers = {id(module) for module, _ in self.owners[id(weight)]}
        holders = {id(module) for module, _ in self.owners[id(tensor)]} - producers
        if not holders <= {id(owner)}:
            return False
        readers = [user for _, node in self.tensor_reads[id(tensor)] for user in node.users]
        if holders and not is_scope(owner):
            readers += [call for _, call in self.callers.get(id(owner), ())]
        return all(id(reader) in nodes for reader in readers)

    def other_way_in(
        self,
        weight: nn.Parameter,
        owners: list[tuple[nn.Module, str]],
        entries: list[tuple[Reading, str, Use]],
    ) -> str:
        """A function that was not traced and computes with the producer would not see its bank."""
        homes = [(reading.scope, use) for reading, _, use in entries]
        inside = {id(owner) for owner, _ in owners}
        for scope, use in homes:
            inside |= _between(scope, use.producer)
        scopes = {id(scope) for scope, _ in homes}
        around = {id(module) for name in self.names_of(weight) for module in modules_around(self.model, name)}
        for owner, label, found, target in self.reaching(inside | around | {id(weight)}):
            if found is None and id(target) in inside:
                return f"used by {label}, whose source is not to be had"
            if found is None:
                continue
            if isinstance(target, nn.Module) and not found.is_call:
                return f"{label} runs a module around it with other parameters than its own (functional_call)"
            if target is weight and not found.is_call:
                return f"used by {label}"
            if id(target) in inside and (id(target) not in scopes or target is owner) and target is not owner:
                reading = self.readings.get(id(owner))
                why = reading.unread.get(label.rsplit(".", 1)[-1], "") if reading else ""
                return f"used by {label}" + (f", which {why.partition(' ')[2]}" if why else "")
        return ""

    def names_of(self, weight: nn.Parameter) -> list[str]:
        """The names of the modules that own a weight."""
        return [self.names[id(owner)] for owner, _ in self.owners[id(weight)]]

    def relied_on(
        self,
        name: str,
        weight: nn.Parameter,
        owners: list[tuple[nn.Module, str]],
        entries: list[tuple[Reading, str, Use]],
    ) -> str:
        if name in self.include or is_operated(owners):
            return ""
        for reading, _, use in entries:
            assert use.path is not None
            needs_proof = use.path.kind is Kind.RANGE_BEARING
            reason = self.lookahead.why_not(reading.scope, use.end, needs_proof=needs_proof)
            if reason and not is_shielded_by_autograd(self.outputs, weight):
                return (
                    f"range-bearing: the range of '{use.path.name}' may carry meaning, and {reason}. If no "
                    f'one relies on it, name the site: sites=["{name}"]'
                )
        return ""

    def is_functional(self, name: str) -> bool:
        """Whether a producer's name is a parameter's, which a function multiplies with."""
        owner, _, attribute = name.rpartition(".")
        return attribute in submodule(self.model, owner)._parameters

    def others(self, known: set[str]) -> dict[str, str]:
        """Producers of kinds that are never sites."""
        declined: dict[str, str] = {}
        listed = set(known)
        known = known | {name.rpartition(".")[0] for name in known if self.is_functional(name)}
        for name, module in self.model.named_modules():
            if name in known or any(ancestor in declined for ancestor in _ancestors(name)):
                continue
            if reason := why_swapped(self.model, name) or _never_a_site(module):
                declined[name] = reason
        return declined | self.left_over(listed | set(declined))

    def left_over(self, listed: set[str]) -> dict[str, str]:
        """Parameters that a forward multiplies with, and that neither are listed nor belong to what is."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        computed = (use.call.computed for _, _, use in self.uses if not use.problem)
        for each in computed:
            for _, source, *_ in () if each is None else each.extras:
                names.pop(id(source), None)
        found: dict[str, str] = {}
        for parameter, reason in leftovers(self.model, list(self.readings.values())):
            if id(parameter) in self.by_weight:
                continue
            name = names.get(id(parameter), "")
            if name and not {name, *_ancestors(name)} & listed:
                found.setdefault(name, reason)
        return found


# -- one producer ------------------------------------------------------------------------------------------------------


def is_operated(owners: list[tuple[nn.Module, str]]) -> bool:
    """Whether a weight has a bank. Then it stays a place: without its bank the layer would give another output."""
    return any(isinstance(owner._modules.get(name), Composite) for owner, name in banks_at(owners))


FROZEN = "frozen: its weight does not require a gradient"


def _has_frozen_bias(entries: list[tuple[Reading, str, Use]]) -> bool:
    bias = entries[0][2].call.bias if entries else None
    return bias is not None and not bias.requires_grad


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What torch computes and trains in; float8 and integers are for storing."""


def _unfit(weight: nn.Parameter) -> str:
    if weight.is_complex():
        return "complex weights"
    if weight.dtype not in _DTYPES:
        return f"weights of dtype {weight.dtype}"
    if weight.device.type == "meta":
        return "its weight is on the meta device"
    return ""


def _disagreement(entries: list[tuple[Reading, str, Use]]) -> str:
    """All the places that use a weight must use it in the same way, so that one bank serves them."""
    first_reading, _, first = entries[0]
    bias, known = first.call.bias, _sources(first)
    for reading, method, use in entries[1:]:
        place = f"{original_class(reading.scope).__name__}.{method}"
        if use.call.bias is not bias:
            return f"its weight is used with another bias in {place}"
        assert use.path is not None and first.path is not None
        if use.product != first.product or use.path.links != first.path.links:
            return f"it passes another activation function in {place}"
        found = _sources(use)
        is_less = bool(found and _sources(first)) and not found.items() >= _sources(first).items()
        if is_less or any(known.setdefault(name, tensor) != tensor for name, tensor in found.items()):
            return f"its weight is computed from other parameters in {place}"
        if any(a.tensor is not b.tensor for a, b in zip(use.own, first.own, strict=True)):
            return f"it passes an activation function with other parameters in {place}"
        if reading.is_sequential and first_reading.is_sequential and use.path != first.path:
            return f"it passes another activation function in {place}"
    return ""


def _sources(use: Use) -> dict[str, int]:
    """The parameters that a computed weight comes from beside the first, by the names of their buffers."""
    return {} if use.call.computed is None else {source.name: id(t) for source, t, *_ in use.call.computed.extras}


def _times_read(user: fx.Node, node: fx.Node) -> int:
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), lambda argument: found.append(argument))
    return sum(argument is node for argument in found)


def _beyond_metadata(users: list[fx.Node]) -> str:
    """The first reader of a parameter that does more than ask for its dtype or device."""
    for user in users:
        if not (user.op == "call_function" and user.target is getattr and user.args[1] in ("dtype", "device")):
            return str(getattr(user.target, "__name__", user.target))
    return ""


def _around(home: Home) -> set[str]:
    """The inlined children in whose forward a part of a home's site is, and those around them."""
    found = set(home.origins) - {""}
    return found | {".".join(part.split(".")[:depth]) for part in found for depth in range(1, part.count(".") + 1)}


def _is_within(inner: Home, outer: Home) -> bool:
    """Whether a home's scope lies between another's and the producer: it holds the whole site, and serves both."""
    names = outer.producer.split(".")
    around = (submodule(outer.scope, ".".join(names[:depth])) for depth in range(1, len(names)))
    return any(inner.scope is module for module in around)


def _between(scope: nn.Module, producer: str) -> set[int]:
    """The modules from the scope's first child down to the producer, by id: calling one misses the activation."""
    inside, module = set(), scope
    for name in producer.split("."):
        child = module._modules.get(name)
        if child is None:
            break
        module = child
        inside.add(id(module))
    return inside


def modules_around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """A module and all those above it, the root included."""
    yield model
    for part in name.split(".") if name else ():
        model = submodule(model, part)
        yield model


def _ancestors(name: str) -> Iterator[str]:
    """The names of the modules above one, the root left out."""
    while name := name.rpartition(".")[0]:
        yield name


def _never_a_site(module: nn.Module) -> str:
    label = original_class(module).__name__
    if isinstance(module, nn.modules.rnn.RNNBase | nn.modules.rnn.RNNCellBase):
        return f"recurrent gates ({label})"
    if isinstance(module, nn.MultiheadAttention):
        return "fused attention"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if "quantized" in original_class(module).__module__:
        return f"quantized ({label})"
    if reason := why_not_computed(module):
        return reason
    if isinstance(module, MIXING_MODULES) and not is_producer(module):
        return f"a producer of type {label} is not supported yet"
    return ""
