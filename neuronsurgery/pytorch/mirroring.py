"""A mirror of a module that records what its forward reads, so that tracing never touches the user's object.

Tracing a forward bakes in whatever Python saw: plain attributes, the lengths of containers, `training`. The mirror is
a structural copy (same classes, same parameters, own dictionaries) that reports each such read to the tracer. Every
read becomes a **guard**: the traced program is used only while the guard still holds.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from neuronsurgery.pytorch.composites import Composite

__all__ = [
    "GENERATED",
    "Absent",
    "Guard",
    "Impurity",
    "Mirror",
    "Steps",
    "class_without_rewrite",
    "mirror_of",
    "original_class",
    "unswallowed",
]

Steps = tuple[tuple[str, Any], ...]


class Impurity(BaseException):
    """Something in a forward that a recorded program could not repeat soundly; its text is the reason.

    No `Exception`: a forward that catches those must not swallow it. One that catches everything does, so each is
    noted where it is made, see `unswallowed`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        noted: list[Impurity] | None = getattr(_NOTED, "impurities", None)
        if noted is not None:
            noted.append(self)


_NOTED = threading.local()


@contextlib.contextmanager
def unswallowed() -> Iterator[None]:
    """Raise the first Impurity made inside, also if the code in between caught it.

    Raises:
        Impurity: one was made.
    """
    outer = getattr(_NOTED, "impurities", None)
    noted: list[Impurity] = []
    _NOTED.impurities = noted
    try:
        yield
    except (Exception, Impurity) as error:
        if noted and error is not noted[0]:
            raise noted[0] from error
        raise
    finally:
        _NOTED.impurities = outer
    if noted:
        raise noted[0]


class Absent(enum.Enum):
    """What a guard finds where there is no such attribute, item or module."""

    ABSENT = "absent"


@dataclass(frozen=True)
class Guard:
    """What was read: a module's path, the steps from it (attributes, items, or its children), and what was found."""

    module: str
    steps: Steps
    found: Any

    def holds(self, root: nn.Module) -> bool:
        """Whether `root` still shows what was found when its forward was traced."""
        try:
            value = self.look(root)
        except (AttributeError, LookupError):
            value = Absent.ABSENT
        return type(value) is type(self.found) and bool(value == self.found)

    def look(self, root: nn.Module) -> Any:
        """What there is in `root` now."""
        value: Any = submodule(root, self.module)
        for kind, key in self.steps:
            if kind == "children":
                value = child_names(value)
            elif kind == "class":
                value = original_class(value)
            elif kind == "is":
                value = value is submodule(root, key)
            elif kind == "length":
                value = len(value)
            elif kind == "shape":
                value = None if value is None else tuple(value.shape)
            else:
                value = value[key] if kind == "item" else getattr(value, key)
        return value


class Listener(Protocol):
    """Who is told of what a mirror's forward reads."""

    def read_attribute(self, module: Mirror, name: str, value: Any) -> Any: ...

    def read_children(self, module: Mirror) -> None: ...

    def call_module(self, module: Mirror, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


_LISTENER = "_neuronsurgery_listener"
_MACHINERY = frozenset(nn.Module().__dict__) - {"training"} | {_LISTENER, "_neuronsurgery_path"}


class Mirror:
    """Mixed into the class of every mirrored module: calls and plain attribute reads go to the listener."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Not passed on: making a mirror must not run the user's subclass hook."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        listener = listener_of(self)
        if listener is None:  # made inside the forward, a slice of a Sequential say: part of the forward itself
            return self.forward(*args, **kwargs)
        return listener.call_module(self, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if listener_of(self) is not None:
            raise Impurity(f"writes the attribute '{name}'")
        super().__setattr__(name, value)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("__"):
            return value
        own = object.__getattribute__(self, "__dict__")
        listener = own.get(_LISTENER)
        if listener is None or (name not in own and not _is_class_data(type(self), name)):
            return value
        if name == "_modules":
            listener.read_children(self)
        elif name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            raise Impurity(f"adds, removes or looks at hooks ({name})")
        elif name not in _MACHINERY:
            return listener.read_attribute(self, name, value)
        return value

    def __getattr__(self, name: str) -> Any:
        listener = listener_of(self)
        try:
            value = super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if listener is not None and not name.startswith("__"):
                listener.read_attribute(self, name, Absent.ABSENT)
            raise
        if value is None and listener is not None:  # a child or parameter that there could be
            listener.read_attribute(self, name, None)
        return value


def _is_class_data(cls: type, name: str) -> bool:
    """Whether a name that an instance lacks is plain data of the user's class: no method, property or torch's own."""
    for base in cls.__mro__:
        if name in vars(base):
            is_bound = any("__get__" in vars(kind) for kind in type(vars(base)[name]).__mro__)
            return base.__module__.partition(".")[0] != "torch" and not is_bound
    return False


def listener_of(module: Any) -> Listener | None:
    """The listener of a mirror, or None for any other module."""
    return object.__getattribute__(module, "__dict__").get(_LISTENER)  # type: ignore[no-any-return]


def path_of(mirror: Any) -> str:
    """The qualified name of a mirrored module within its root."""
    return object.__getattribute__(mirror, "__dict__")["_neuronsurgery_path"]  # type: ignore[no-any-return]


def mirror_of(module: nn.Module, listener: Listener, training: bool | None = None) -> tuple[Any, dict[int, Any]]:
    """The mirror of `module` (in the given mode, None: as it is), and all mirrors by the id of what they mirror."""
    mirrors: dict[int, Any] = {}
    mirror = _mirror(module, "", listener, mirrors)
    if training is not None:
        for each in mirrors.values():
            object.__getattribute__(each, "__dict__")["training"] = training
    return mirror, mirrors


def _mirror(module: nn.Module, path: str, listener: Listener, mirrors: dict[int, Any]) -> Any:
    if id(module) in mirrors:
        return mirrors[id(module)]
    mirror = object.__new__(mirror_class(cast(Any, original_class(module))))
    mirrors[id(module)] = mirror
    state = dict(module.__dict__)
    for name in ("_parameters", "_buffers"):
        state[name] = dict(state[name])
    state["_modules"] = {
        name: child if child is None else _mirror(child, f"{path}.{name}" if path else name, listener, mirrors)
        for name, child in module._modules.items()
        if not isinstance(child, Composite)
    }
    object.__getattribute__(mirror, "__dict__").update(state, _neuronsurgery_path=path, **{_LISTENER: listener})
    return mirror


@functools.lru_cache(maxsize=4096)
def mirror_class(cls: Any) -> type[nn.Module]:
    """`cls` with the recording mixed in."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    mirrored: type[nn.Module] = type(cls)(cls.__name__, (Mirror, cls), names)
    return mirrored


def original_class(module: nn.Module) -> type[nn.Module]:
    """The user's own class of a module, also when surgery exchanged it for a generated one, or FSDP for its own."""
    cls = getattr(type(module), "_neuronsurgery_original", type(module))
    while _is_swapped(cls):
        cls = cls.__bases__[1]
    return cls


def class_without_rewrite(module: nn.Module) -> type[nn.Module]:
    """What the class of a module would be had surgery not exchanged it; FSDP may have swapped it before or since."""
    cls: Any = type(module)
    if getattr(cls, GENERATED, cls) is not cls and _is_swapped(cls):
        return _swapped_alone(cls)  # type: ignore[no-any-return]
    return getattr(cls, "_neuronsurgery_original", cls)  # type: ignore[no-any-return]


GENERATED = "_neuronsurgery_generated"
"""The attribute of a generated class that is the class itself; of a class derived from it, it is another one."""


def _is_swapped(cls: type[nn.Module]) -> bool:
    """Whether a class is one that FSDP makes of another on the way: a base of its own before the other, and no more."""
    return cls.__bases__[0].__module__.startswith("torch.distributed.fsdp")


@functools.cache
def _swapped_alone(cls: Any) -> Any:
    """A class that FSDP made of a generated one, made of the user's own instead."""
    bases = tuple(getattr(base, "_neuronsurgery_original", base) for base in cls.__bases__)
    names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, names)


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a qualified name, "" being the root."""
    for name in path.split(".") if path else ():
        root = getattr(root, name)
    return root


def modules_under(root: nn.Module) -> Iterator[nn.Module]:
    """As `root.modules()`, without a generator for every level, which a deep model pays for at each of its modules."""
    pending, seen = [root], set[int]()
    while pending:
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            pending.extend(child for child in reversed(module._modules.values()) if child is not None)


def child_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's children as its own code sees them, without a bank."""
    children = module.__dict__["_modules"]
    return tuple(name for name, child in children.items() if not isinstance(child, Composite))


_CONSTANTS = (
    int,
    float,
    complex,
    str,
    bytes,
    bool,
    type(None),
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Size,
)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.BuiltinMethodType, type, types.ModuleType)


def is_constant(value: Any) -> bool:
    """A plain value, or a tuple, list, set or dictionary of plain values, which a guard can compare."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(is_constant(item) for item in value)
    if isinstance(value, dict):
        return all(is_constant(key) and is_constant(item) for key, item in value.items())
    return isinstance(value, (*_CONSTANTS, *_FUNCTIONS, torch.layout, torch.memory_format, slice, range))


class Reads:
    """Turns what a forward reads from plain attributes into guards, or refuses it as an impurity."""

    def __init__(self, mirrors: dict[int, Any]) -> None:
        self.mirrors = mirrors
        self.guards: dict[tuple[str, Steps], Guard] = {}
        self.tensors: dict[int, tuple[Tensor, str]] = {}
        self.lent: list[tuple[str, Any, Any]] = []  # containers handed out as copies, with what they held

    def note(self, module: str, steps: Steps, found: Any) -> None:
        self.guards.setdefault((module, steps), Guard(module, steps, found))

    def take(self, module: str, steps: Steps, value: Any) -> Any:
        """What a forward gets for the value it read; the read is on record, or an Impurity is raised."""
        label = ".".join(filter(None, [module, *(str(key) for _, key in steps)]))
        if isinstance(value, Tensor):
            if any(kind != "attribute" for kind, _ in steps):
                raise Impurity(f"reads a tensor inside the container '{label}'")
            self.tensors.setdefault(id(value), (value, label))
            return value
        if isinstance(value, nn.Module):
            found = self.module(value, label)
            self.note(module, (*steps, ("is", path_of(found))), True)
            return found
        if is_bound_builtin(value):
            owner = type(value.__self__).__name__
            raise Impurity(f"calls '{label}', a method of a {owner}, which may have a state of its own")
        if is_constant(value):
            self.note(module, steps, _frozen_copy(value))
            return self.lend(label, value)
        if isinstance(value, types.MethodType) and id(value.__self__) in self.mirrors:
            return types.MethodType(value.__func__, self.mirrors[id(value.__self__)])
        if isinstance(value, (list, tuple)):
            self.note(module, (*steps, ("length", None)), len(value))
            items = [self.take(module, (*steps, ("item", index)), item) for index, item in enumerate(value)]
            return self.lend(label, items) if isinstance(value, list) else tuple(items)
        if callable(value) and not isinstance(value, nn.Module):
            raise Impurity(f"calls '{label}', a {type(value).__name__}, whose content cannot be recorded")
        return Recorded(self, module, steps, value)

    def lend(self, label: str, value: Any) -> Any:
        """A copy of a mutable container, watched: a forward that fills its own lists cannot be recorded."""
        if not isinstance(value, (list, dict, set)):
            return value
        lent = _frozen_copy(value)
        self.watch(label, lent)
        return lent

    def watch(self, label: str, container: Any) -> None:
        self.lent.append((label, container, _frozen_copy(container)))

    def module(self, value: nn.Module, label: str) -> Any:
        if isinstance(value, Mirror):
            return value
        if id(value) not in self.mirrors:
            raise Impurity(f"calls '{label}', a module that is not registered as a child")
        return self.mirrors[id(value)]

    def check_unchanged(self, roots: Iterator[tuple[nn.Module, Any]]) -> None:
        """Refuse a forward that wrote attributes, or into containers that it read."""
        for label, now, before in self.lent:
            if not _is_same(now, before):
                raise Impurity(f"writes into '{label}'")
        for module, mirror in roots:
            own = object.__getattribute__(mirror, "__dict__")
            for name, value in own.items():
                if name in ("_parameters", "_buffers"):
                    written = [k for k, v in value.items() if v is not module.__dict__[name].get(k)]
                elif name in (_LISTENER, "_neuronsurgery_path", "_modules", "training"):
                    continue
                else:
                    written = [] if name in module.__dict__ and value is module.__dict__[name] else [name]
                if written:
                    raise Impurity(f"writes the attribute '{written[0]}' of a {type(module).__name__}")


def _frozen_copy(value: Any) -> Any:
    """A copy down to the leaves, which stay the same objects."""
    if type(value) is tuple:
        return tuple(map(_frozen_copy, value))
    if not issubclass(type(value), (list, dict, set)):
        return value
    copied = value.copy()
    if issubclass(type(value), (list, dict)):
        for key in range(len(copied)) if issubclass(type(value), list) else copied:
            copied[key] = _frozen_copy(copied[key])
    return copied


def _is_same(now: Any, before: Any) -> bool:
    """Whether a container still holds the very objects that its copy holds."""
    kind = type(now)
    if not issubclass(kind, (list, tuple, dict, set)) or now is before:
        return now is before
    a, b = ([*c.keys(), *c.values()] if issubclass(kind, dict) else list(c) for c in (now, before))
    return len(a) == len(b) and all(map(_is_same, a, b))


def is_bound_builtin(value: Any) -> bool:
    """A C function bound to an object, such as `rng.random` or `deque.append`; those of modules and types are free."""
    owner = getattr(value, "__self__", None) if isinstance(value, types.BuiltinMethodType) else None
    return not (owner is None or isinstance(owner, (types.ModuleType, type)))


class Recorded:
    """Stands in for a plain object (a config, a namespace) that a forward reads constants from."""

    def __init__(self, reads: Reads, module: str, steps: Steps, value: Any) -> None:
        object.__setattr__(self, "_recorded", (reads, module, steps, value))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(object.__getattribute__(self, "_recorded")[3])

    def __getattr__(self, name: str) -> Any:
        reads, module, steps, value = object.__getattribute__(self, "_recorded")
        try:
            found = getattr(value, name)
        except AttributeError:
            reads.note(module, (*steps, ("attribute", name)), Absent.ABSENT)
            raise
        if isinstance(found, types.MethodType) or is_bound_builtin(found):
            raise Impurity(f"calls the method '{name}' of '{steps[-1][1]}', a {type(value).__name__}")
        return reads.take(module, (*steps, ("attribute", name)), found)

    def __getitem__(self, key: Any) -> Any:
        reads, module, steps, value = object.__getattribute__(self, "_recorded")
        try:
            found = value[key]
        except LookupError:
            reads.note(module, (*steps, ("item", key)), Absent.ABSENT)
            raise
        return reads.take(module, (*steps, ("item", key)), found)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Impurity(f"writes the attribute '{name}' of an object it holds")

    def _refuse(self, *_: Any) -> Any:
        value = object.__getattribute__(self, "_recorded")[3]
        raise Impurity(f"uses an object of type {type(value).__name__} in a way that cannot be recorded")

    __bool__ = __len__ = __iter__ = __contains__ = __eq__ = __lt__ = __call__ = __setitem__ = _refuse
    __hash__ = None  # type: ignore[assignment]
