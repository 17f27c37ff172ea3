"""Environments of many parallel episodes behind one small protocol.

`make_environment` knows them by name; `marl.environments.torchrl` brings in any environment of TorchRL, and it and
`marl.environments.pettingzoo` hand ours out. Those two need the packages they are named after; `Smax` needs JaxMARL
when a game is made.
"""

from marl.environments.matrix_game import MatrixGame, TwoStepGame
from marl.environments.payoffs import PAYOFFS
from marl.environments.predator_prey import PredatorPrey
from marl.environments.predator_prey_settings import PredatorPreySettings
from marl.environments.protocol import Environment, Observation, Outcome, Spec, TextEnvironment
from marl.environments.qtran_predator_prey import QtranPredatorPrey, QtranPredatorPreySettings
from marl.environments.registry import ENVIRONMENTS, make_environment
from marl.environments.smax import Smax
from marl.environments.smax_settings import SmaxSettings
from marl.environments.starcraft import Starcraft
from marl.environments.starcraft_settings import SmacSettings, Smacv2Settings
from marl.environments.tasks import Task, TaskSequence, matrix_tasks

__all__ = [
    # the protocol
    "Environment",
    "TextEnvironment",
    "Spec",
    "Observation",
    "Outcome",
    # by name
    "make_environment",
    "ENVIRONMENTS",
    "PAYOFFS",
    # the environments
    "MatrixGame",
    "TwoStepGame",
    "PredatorPrey",
    "PredatorPreySettings",
    "QtranPredatorPrey",
    "QtranPredatorPreySettings",
    "Smax",
    "SmaxSettings",
    "Starcraft",
    "Smacv2Settings",
    "SmacSettings",
    # in a row
    "Task",
    "TaskSequence",
    "matrix_tasks",
]
