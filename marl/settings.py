"""Settings of a learner, in the parts that each piece gets, and the presets of the literature.

`preset("reborn", "qmix")` is a value like any other: `dataclasses.replace` changes a part of it. Sizes of networks are
checked by the networks, everything else here. The file is long because each field says what it means.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from marl.agents import INPUT_PARTS, InputPart
from marl.errors import SettingsError

__all__ = [
    "AgentSettings",
    "Algorithm",
    "ExplorationSettings",
    "HardTargets",
    "LossSettings",
    "MixerSettings",
    "OptimizerSettings",
    "PolyakTargets",
    "PresetName",
    "QMIXSettings",
    "QPLEXSettings",
    "ReplaySettings",
    "Settings",
    "TargetSettings",
    "VDNSettings",
    "preset",
]

Algorithm = Literal["vdn", "qmix", "qplex"]
PresetName = Literal["pymarl", "reborn", "pymarl2", "smacv2"]


def preset(name: PresetName, algorithm: Algorithm) -> Settings:
    """The settings of a published code, by its name.

    - `pymarl`: PyMARL (Samvelyan et al. 2019) and, for QPLEX, its authors' code for SMAC (Wang et al. 2021).
    - `reborn`: ReBorn (Qin et al. 2024): two input layers, 64 mixing units, QPLEX with TD(0.6).
    - `pymarl2`: the fine-tuned PyMARL2 (Hu et al. 2021): Adam, TD(0.6), 128 episodes for an update.
    - `smacv2`: the same with TD(0.4), as SMACv2's authors ran QMIX (Ellis et al. 2023); of QMIX alone.

    Raises:
        SettingsError: an unknown name.

    >>> preset("reborn", "qmix").mixer
    QMIXSettings(embed_size=64, hypernet_layers=2, hypernet_size=64)
    """
    _check_choice("preset", name, PRESETS)
    settings = PRESETS[name]
    _check_choice("algorithm", algorithm, settings)
    return settings[algorithm]


@dataclass(frozen=True)
class AgentSettings:
    """The network that all agents share."""

    kind: Literal["recurrent", "feed_forward"] = "recurrent"
    """With a GRU cell, or without memory."""
    hidden_size: int = 64
    """Units of each hidden layer and of the GRU's state."""
    num_hidden_layers: int = 1
    """Linear layers with ReLU, in front of the GRU cell if there is one."""
    inputs: tuple[InputPart, ...] = INPUT_PARTS
    """What an agent sees: observation, its last action, its own index."""

    def __post_init__(self) -> None:
        _check_choice("kind of agent", self.kind, ("recurrent", "feed_forward"))


@dataclass(frozen=True)
class VDNSettings:
    """Values are added: nothing to set."""


@dataclass(frozen=True)
class QMIXSettings:
    """The monotonic mixer."""

    embed_size: int = 32
    """Units of the mixing layer, and of the hidden layer of V(s)."""
    hypernet_layers: int = 2
    """Linear layers of the hypernetworks that generate weights: 1 or 2."""
    hypernet_size: int = 64
    """ReLU units between them."""


@dataclass(frozen=True)
class QPLEXSettings:
    """The dueling mixer; its authors use 10 heads of 3 layers on matrix games."""

    num_heads: int = 4
    """Heads of the attention that weighs advantages."""
    adversary_layers: int = 1
    """Linear layers of each of the heads' networks: 1 to 3."""
    adversary_size: int = 64
    """ReLU units between them."""
    hypernet_size: int = 64
    """ReLU units of the networks that transform the agents' values."""
    weighted_head: bool = True
    """Whether the agents' values are transformed at all."""
    minus_one: bool = True
    """Whether advantages count lambda - 1 times, beside values that count once."""

    def __post_init__(self) -> None:
        _check_choice("number of adversary layers", self.adversary_layers, (1, 2, 3))


MixerSettings = VDNSettings | QMIXSettings | QPLEXSettings


@dataclass(frozen=True)
class LossSettings:
    """What values are trained toward."""

    gamma: float = 0.99
    """Discount of a step."""
    td_lambda: float = 0.0
    """0 bootstraps after one step, 1 at the end of the episode."""
    scale: float = 1.0
    """Factor of the mean squared error; 0.5 also halves what the bound on the gradient's norm sees."""

    def __post_init__(self) -> None:
        _check_between(0.0, 1.0, gamma=self.gamma, td_lambda=self.td_lambda)
        _check_positive(scale=self.scale)


@dataclass(frozen=True)
class OptimizerSettings:
    """How the weights of agents and mixer move."""

    kind: Literal["rmsprop", "adam"] = "rmsprop"
    """Neither centered nor with momentum, or with the usual betas."""
    learning_rate: float = 5e-4
    """Step size."""
    alpha: float = 0.99
    """Decay of RMSprop's mean square; Adam has no use for it."""
    epsilon: float = 1e-5
    """Added to the root of the mean square."""
    max_grad_norm: float = 10.0
    """Bound on the L2 norm of the gradient of agents and mixer together."""

    def __post_init__(self) -> None:
        _check_choice("optimizer", self.kind, ("rmsprop", "adam"))
        _check_between(0.0, 1.0, alpha=self.alpha)
        _check_positive(learning_rate=self.learning_rate, epsilon=self.epsilon, max_grad_norm=self.max_grad_norm)


@dataclass(frozen=True)
class HardTargets:
    """The target networks become copies of the online ones, now and then."""

    every: int = 200
    """Episodes collected from one copy to the next, at least."""

    def __post_init__(self) -> None:
        _check_positive(every=self.every)


@dataclass(frozen=True)
class PolyakTargets:
    """The target networks follow the online ones, a little after each update."""

    rate: float = 0.005
    """Share of the way that they go."""

    def __post_init__(self) -> None:
        _check_between(0.0, 1.0, rate=self.rate)


TargetSettings = HardTargets | PolyakTargets


@dataclass(frozen=True)
class ReplaySettings:
    """What is remembered, and how much of it an update sees."""

    capacity: int = 5_000
    """Episodes kept, the latest."""
    batch_size: int = 32
    """Episodes drawn for an update."""

    def __post_init__(self) -> None:
        _check_positive(capacity=self.capacity)
        _check_between(1, self.capacity, batch_size=self.batch_size)


@dataclass(frozen=True)
class ExplorationSettings:
    """The share of random actions, falling linearly with the steps taken.

    >>> ExplorationSettings(start=1.0, finish=0.5, num_steps=50_000).epsilon(25_000)
    0.75
    """

    start: float = 1.0
    """Epsilon before the first step."""
    finish: float = 0.05
    """Epsilon from `num_steps` on."""
    num_steps: int = 50_000
    """Steps of the environment until then."""

    def __post_init__(self) -> None:
        _check_between(0.0, 1.0, start=self.start, finish=self.finish)
        _check_positive(num_steps=self.num_steps)

    def epsilon(self, steps: int) -> float:
        """The share of random actions after so many steps of the environment."""
        return self.start + (self.finish - self.start) * min(1.0, steps / self.num_steps)


@dataclass(frozen=True)
class Settings:
    """All of a learner and of what feeds it."""

    mixer: MixerSettings
    """VDN, QMIX or QPLEX."""
    agent: AgentSettings = field(default_factory=AgentSettings)
    """The agents' network."""
    loss: LossSettings = field(default_factory=LossSettings)
    """Targets and loss."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """The optimizer and the bound on the gradient."""
    targets: TargetSettings = field(default_factory=HardTargets)
    """How target networks follow."""
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    """Memory of episodes."""
    exploration: ExplorationSettings = field(default_factory=ExplorationSettings)
    """Random actions."""


def _check_choice(what: str, asked: object, choices: Collection[object]) -> None:
    if asked not in choices:
        raise SettingsError(f"unknown {what} {asked!r}: choose one of {', '.join(map(repr, choices))}")


def _check_between(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:
            raise SettingsError(f"{name} is {value}: it must be from {low} to {high}")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise SettingsError(f"{name} is {value}: it must be above 0")


PYMARL = {
    "vdn": Settings(VDNSettings()),
    "qmix": Settings(QMIXSettings(embed_size=32)),
    "qplex": Settings(QPLEXSettings(num_heads=4, adversary_layers=1)),
}

TWO_LAYERS = AgentSettings(num_hidden_layers=2)
REBORN = {
    "vdn": Settings(VDNSettings(), TWO_LAYERS),
    "qmix": Settings(QMIXSettings(embed_size=64), TWO_LAYERS),
    "qplex": Settings(QPLEXSettings(adversary_layers=2), TWO_LAYERS, LossSettings(td_lambda=0.6, scale=0.5)),
}

FINE_TUNED = Settings(
    VDNSettings(),
    loss=LossSettings(td_lambda=0.6, scale=0.5),
    optimizer=OptimizerSettings("adam", learning_rate=1e-3, epsilon=1e-8),
    replay=ReplaySettings(batch_size=128),
    exploration=ExplorationSettings(num_steps=100_000),
)
PYMARL2 = {
    "vdn": FINE_TUNED,
    "qmix": replace(FINE_TUNED, mixer=QMIXSettings(embed_size=32)),
    "qplex": replace(FINE_TUNED, mixer=QPLEXSettings(adversary_layers=2)),
}

SMACV2 = {"qmix": replace(PYMARL2["qmix"], loss=LossSettings(td_lambda=0.4, scale=0.5))}

PRESETS = {"pymarl": PYMARL, "reborn": REBORN, "pymarl2": PYMARL2, "smacv2": SMACV2}
