"""The mathematics of agents, mixers and learner, one number vector at a time, in float64.

Written from the formulas of the papers, for one episode, one step and one agent at a time; nothing of `marl` is used
but the names under which it keeps its weights. Gradients come from torch's differentiation of these loops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

Weights = Mapping[str, Tensor]


def part(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights below a prefix, by the rest of their names."""
    return {name[len(prefix) + 1 :]: value for name, value in weights.items() if name.startswith(f"{prefix}.")}


def affine(weights: Weights, layer: str, x: Tensor) -> Tensor:
    return weights[f"{layer}.weight"] @ x + weights[f"{layer}.bias"]


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.exp(x) - 1)


def perceptron(weights: Weights, x: Tensor) -> Tensor:
    """Linear layers at 0, 2, 4, ... with ReLU between them."""
    layers = sorted({int(name.split(".")[0]) for name in weights})
    for layer in layers:
        x = affine(weights, str(layer), x)
        if layer != layers[-1]:
            x = relu(x)
    return x


def gru(weights: Weights, x: Tensor, hidden: Tensor) -> Tensor:
    """r, z, n and h' of a GRU; torch keeps the rows of the three gates in that order."""
    size = len(hidden)
    gates_x = weights["weight_ih"] @ x + weights["bias_ih"]
    gates_h = weights["weight_hh"] @ hidden + weights["bias_hh"]
    r = sigmoid(gates_x[:size] + gates_h[:size])
    z = sigmoid(gates_x[size : 2 * size] + gates_h[size : 2 * size])
    n = torch.tanh(gates_x[2 * size :] + r * gates_h[2 * size :])
    return (1 - z) * n + z * hidden


def one_hot(index: int, size: int) -> Tensor:
    return torch.tensor([1.0 if place == index else 0.0 for place in range(size)], dtype=torch.float64)


def agent_values(weights: Weights, episodes: TensorDict, episode: int) -> list[list[Tensor]]:
    """Values[t][i], a vector over actions, for an agent that sees observation, last action and its index."""
    obs, actions = episodes["obs"][episode], episodes["actions"][episode]
    num_steps, num_agents = obs.shape[:2]
    num_actions = len(weights["head.bias"])
    values: list[list[Tensor]] = [[] for _ in range(num_steps)]
    for i in range(num_agents):
        hidden = torch.zeros(len(weights["head.weight"][0]), dtype=torch.float64)
        for t in range(num_steps):
            last_action = one_hot(int(actions[t - 1, i]), num_actions) if t > 0 else torch.zeros(num_actions)
            x = torch.cat([obs[t, i].double(), last_action.double(), one_hot(i, num_agents)])
            for layer in sorted({int(name.split(".")[0]) for name in part(weights, "encoder")}):
                x = relu(affine(weights, f"encoder.{layer}", x))
            if part(weights, "cell"):
                x = hidden = gru(part(weights, "cell"), x, hidden)
            values[t].append(affine(weights, "head", x))
    return values


def vdn(weights: Weights, chosen: list[Tensor], best: list[Tensor], state: Tensor, actions: list[int]) -> Tensor:
    return torch.stack(chosen).sum()


def qmix(weights: Weights, chosen: list[Tensor], best: list[Tensor], state: Tensor, actions: list[int]) -> Tensor:
    num_agents, size = len(chosen), len(weights["b1.bias"])
    w1 = torch.abs(perceptron(part(weights, "w1"), state))
    b1 = affine(weights, "b1", state)
    w2 = torch.abs(perceptron(part(weights, "w2"), state))
    q_tot = perceptron(part(weights, "v"), state)[0]
    for e in range(size):
        entering = b1[e]
        for i in range(num_agents):
            entering = entering + chosen[i] * w1[i * size + e]
        q_tot = q_tot + elu(entering) * w2[e]
    return q_tot


def qplex(
    weights: Weights,
    chosen: list[Tensor],
    best: list[Tensor],
    state: Tensor,
    actions: list[int],
    *,
    minus_one: bool = True,
) -> Tensor:
    num_agents, num_actions = len(chosen), _num_actions(weights, len(chosen), len(state))
    if part(weights, "transformation"):
        w = torch.abs(perceptron(part(weights, "transformation.weights"), state)) + 1e-10
        v = perceptron(part(weights, "transformation.offsets"), state)
        chosen = [w[i] * chosen[i] + v[i] for i in range(num_agents)]
        best = [w[i] * best[i] + v[i] for i in range(num_agents)]
    joint = torch.cat([state, *(one_hot(action, num_actions) for action in actions)])
    num_heads = _num_heads(part(weights, "attention.agents"), num_agents)
    q_tot = torch.zeros((), dtype=torch.float64)
    for i in range(num_agents):
        importance = torch.zeros((), dtype=torch.float64)
        for k in range(num_heads):
            key = torch.abs(head(part(weights, "attention.keys"), k, num_heads, state)[0]) + 1e-10
            agents = sigmoid(head(part(weights, "attention.agents"), k, num_heads, state)[i])
            action = sigmoid(head(part(weights, "attention.actions"), k, num_heads, joint)[i])
            importance = importance + key * agents * action
        advantage = (chosen[i] - best[i]).detach()
        q_tot = q_tot + chosen[i] + advantage * (importance - 1 if minus_one else importance)
    return q_tot


def head(weights: Weights, k: int, num_heads: int, x: Tensor) -> Tensor:
    """The k-th of several networks: its rows of the first layer, its group of the others."""
    num_rows = len(weights["0.bias"]) // num_heads
    rows = slice(k * num_rows, (k + 1) * num_rows)
    x = weights["0.weight"][rows] @ x + weights["0.bias"][rows]
    for layer in sorted({int(name.split(".")[0]) for name in weights} - {0}):
        x = relu(x) @ weights[f"{layer}.weight"][k] + weights[f"{layer}.bias"][k]
    return x


def _num_heads(weights: Weights, num_agents: int) -> int:
    grouped = [value for name, value in weights.items() if name.endswith("weight") and name != "0.weight"]
    return len(grouped[0]) if grouped else len(weights["0.bias"]) // num_agents


def _num_actions(weights: Weights, num_agents: int, state_size: int) -> int:
    return (weights["attention.actions.0.weight"].shape[1] - state_size) // num_agents


MIXERS = {"vdn": vdn, "qmix": qmix, "qplex": qplex}


def best_available(values: Tensor, available: Tensor) -> int:
    """The available action of the highest value; action 0 where none is available."""
    allowed = [action for action in range(len(values)) if available[action]]
    return max(allowed, key=lambda action: float(values[action].detach()), default=0)


def learner_loss(
    online: Weights,
    target: Weights,
    episodes: TensorDict,
    algorithm: str,
    *,
    gamma: float,
    td_lambda: float,
    scale: float,
) -> Tensor:
    """The loss of a batch, episode by episode; lambda returns by the recursion of PyMARL's code."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for episode in range(len(episodes)):
        mask = episodes["mask"][episode]
        ended = episodes["terminated"][episode]
        reward = episodes["reward"][episode].double()
        q_tot, next_q_tot = joint_values(online, target, episodes, episode, algorithm)
        following = torch.zeros((), dtype=torch.float64) if bool(ended.any()) else next_q_tot[-1]
        for t in reversed(range(len(mask))):
            bootstrap = reward[t] + (1 - td_lambda) * gamma * next_q_tot[t] * (0.0 if ended[t] else 1.0)
            following = td_lambda * gamma * following + (bootstrap if mask[t] else 0.0)
            if mask[t]:
                total = total + (q_tot[t] - following.detach()) ** 2
                count += 1
    return scale * total / count


def joint_values(
    online: Weights, target: Weights, episodes: TensorDict, episode: int, algorithm: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Q_tot of each step's actions, and the target's of the next step's, chosen by the online networks."""
    mixer = MIXERS[algorithm]
    states, available = episodes["state"][episode].double(), episodes["avail_actions"][episode]
    values = agent_values(part(online, "agent"), episodes, episode)
    slow = agent_values(part(target, "agent"), episodes, episode)
    agents = range(len(values[0]))
    now, after = [], []
    for t in range(len(values) - 1):
        taken = [int(action) for action in episodes["actions"][episode, t]]
        chosen = [values[t][i][taken[i]] for i in agents]
        best = [values[t][i][best_available(values[t][i], available[t, i])].detach() for i in agents]
        now.append(mixer(part(online, "mixer"), chosen, best, states[t], taken))
        greedy = [best_available(values[t + 1][i], available[t + 1, i]) for i in agents]
        chosen = [slow[t + 1][i][greedy[i]] for i in agents]
        best = [slow[t + 1][i][best_available(slow[t + 1][i], available[t + 1, i])] for i in agents]
        after.append(mixer(part(target, "mixer"), chosen, best, states[t + 1], greedy))
    return now, after
