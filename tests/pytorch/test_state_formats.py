"""What people save models with, and the frameworks that do it for them: each goes on with the operated network."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.entry import ages
from tests.state_subjects import as_bits, assert_same_model, operated
from tests.zoo import Residual

CHECKPOINTS = "Checkpoints and copies"


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2)
    )


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    for units in ({"0": [0, 3]}, {"0": [3], "2": [1]}):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        surgery.knife(model, surgery.Units(units), optimizer=optimizer)
    return model, optimizer


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(F.relu(self.two(F.relu(self.one(x)))))
        return y


def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 20).view(5, 4)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.situation(CHECKPOINTS, "torch.save and torch.load(weights_only=True)", "works")
def test_a_state_dict_saved_by_torch_is_restored():
    model, optimizer = trained()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=True)
    fresh = build()
    owner = torch.optim.AdamW(fresh.parameters())
    owner.load_state_dict(checkpoint["optimizer"])
    surgery.restore(fresh, checkpoint["model"], owner)
    assert ages(fresh, owner) == ages(model, optimizer) != {}
    assert_same_model(fresh, model, (x(),))


@pytest.mark.situation(CHECKPOINTS, "a whole module in another process", "works")
def test_a_whole_module_is_loaded_in_another_process_and_restored_there(tmp_path: Path):
    model = operated(Residual())
    torch.save(model, tmp_path / "model")
    torch.save((model.state_dict(), x(), model(x())), tmp_path / "example")
    code = f"""
        import torch
        from neuronsurgery import surgery
        from tests.zoo import Residual
        state, x, y = torch.load({str(tmp_path / "example")!r}, weights_only=True)
        model = torch.load({str(tmp_path / "model")!r}, weights_only=False)
        assert torch.equal(model(x), y)
        fresh = Residual()
        surgery.restore(fresh, state)
        assert torch.equal(fresh(x), y)
        assert surgery.composites(fresh) == surgery.composites(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        surgery.attach(model, optimizer)
        surgery.knife(model, surgery.Units({{"blocks.0.up": [4]}}), optimizer=optimizer, verify=x)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.situation(CHECKPOINTS, "safetensors: save_file, load_file", "works")
def test_safetensors_files_are_restored(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model, _ = trained()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = build()
    surgery.restore(fresh, load_file(tmp_path / "model.safetensors"))
    assert_same_model(fresh, model, (x(),))


@pytest.mark.situation(CHECKPOINTS, "safetensors: save_model, load_model, tied weights", "works")
@pytest.mark.parametrize("how", ["restore", "accept", "the same structure", "other units"])
def test_safetensors_of_tied_weights_are_restored(tmp_path: Path, how: str):
    from safetensors.torch import load_file, load_model, save_model

    model, fresh = Tied(), Tied()
    surgery.knife(model, surgery.Units({"one": [0, 2]}))
    save_model(model, str(tmp_path / "model"))
    assert "two.composite.frozen_weight" not in load_file(tmp_path / "model"), "one name of several is kept"
    if how == "restore":
        surgery.restore(fresh, load_file(tmp_path / "model"))
    else:
        if how == "accept":
            surgery.accept(fresh)
        else:
            surgery.knife(fresh, surgery.Units({"one": [0, 2] if how == "the same structure" else [1, 3]}))
        missing, unexpected = load_model(fresh, tmp_path / "model")
        assert not missing and not unexpected
    assert_same_model(fresh, model, (x(),))


# -- torch.distributed.checkpoint --------------------------------------------------------------------------------------

ONE_PROCESS = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit:UserWarning")


def save_distributed(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = trained()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=path)  # type: ignore[attr-defined]
    return model, optimizer


@ONE_PROCESS
@pytest.mark.situation(CHECKPOINTS, "torch.distributed.checkpoint (DCP)", "works")
def test_a_distributed_checkpoint_is_restored_onto_a_fresh_model(tmp_path: Path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    model, optimizer = save_distributed(tmp_path / "checkpoint")
    dcp_to_torch_save(tmp_path / "checkpoint", tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = build()
    owner = torch.optim.AdamW(fresh.parameters())
    surgery.restore(fresh, checkpoint["model"])
    set_optimizer_state_dict(fresh, owner, checkpoint["optimizer"])
    surgery.attach(fresh, owner)
    assert ages(fresh, owner) == ages(model, optimizer) != {}
    assert_same_model(fresh, model, (x(),))


@ONE_PROCESS
@pytest.mark.situation(CHECKPOINTS, "torch.distributed.checkpoint (DCP), the same structure", "works")
def test_a_distributed_checkpoint_is_loaded_into_the_same_structure(tmp_path: Path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, _ = save_distributed(tmp_path / "checkpoint")
    other, owner = trained()
    weights, moments = get_state_dict(other, owner)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path / "checkpoint")  # type: ignore[attr-defined]
    set_state_dict(other, owner, model_state_dict=weights, optim_state_dict=moments)
    assert_same_model(other, model, (x(),))


@ONE_PROCESS
def test_dcp_loads_a_fresh_model_without_its_banks_and_says_nothing(tmp_path: Path):
    """It reads what the model asks for; this is why the documentation goes by way of a file."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, _ = save_distributed(tmp_path / "checkpoint")
    fresh = build()
    weights = get_model_state_dict(fresh)
    dcp.load({"model": weights}, checkpoint_id=tmp_path / "checkpoint")  # type: ignore[attr-defined]
    set_model_state_dict(fresh, weights)
    assert not torch.allclose(fresh.eval()(x()), model.eval()(x()))
    assert torch.equal(fresh.state_dict()["0.weight"], model.state_dict()["0.weight"])


# -- transformers ------------------------------------------------------------------------------------------------------


def bert() -> Any:
    from tests.zoo.huggingface import bert as make

    return make().eval()


def gpt2() -> Any:
    from tests.zoo.huggingface import gpt2 as make

    return make().eval()


@pytest.mark.situation(CHECKPOINTS, "transformers: save_pretrained, from_pretrained, then restore", "works")
@pytest.mark.parametrize("make", [gpt2, pytest.param(bert, marks=pytest.mark.slow)])
def test_from_pretrained_drops_the_banks_and_restore_brings_them(tmp_path: Path, make: Callable[[], Any]):
    from safetensors.torch import load_file

    model, tokens = make(), {"input_ids": torch.randint(3, 17, (4, 9))}
    operated(model, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "intermediate" in name or "c_fc" in name:
                parameter.add_(0.5)  # the active members have moved since
    expected = model(**tokens).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not surgery.composites(loaded).members
    assert not torch.allclose(loaded(**tokens).logits, expected, atol=1e-4)
    surgery.restore(loaded, load_file(tmp_path / "model.safetensors"))
    assert surgery.composites(loaded) == surgery.composites(model)
    assert torch.equal(loaded(**tokens).logits, expected)


# -- stable-baselines3 -------------------------------------------------------------------------------------------------


def ppo(seed: int) -> Any:
    from stable_baselines3 import PPO

    return PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=8, n_epochs=1, device="cpu", seed=seed)


def dqn(seed: int) -> Any:
    from stable_baselines3 import DQN

    options = {"learning_starts": 8, "batch_size": 8, "target_update_interval": 8, "buffer_size": 64}
    return DQN("MlpPolicy", "CartPole-v1", device="cpu", seed=seed, **options)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(ppo, marks=pytest.mark.situation(CHECKPOINTS, "stable-baselines3: PPO save, load", "works")),
        pytest.param(dqn, marks=pytest.mark.situation(CHECKPOINTS, "stable-baselines3: DQN save, load", "works")),
    ],
)
def test_a_saved_agent_is_loaded_and_learns_on(tmp_path: Path, make: Callable[[int], Any]):
    agent = make(0)
    agent.learn(16)
    optimizer = agent.policy.optimizer
    sites = surgery.discover(agent.policy)
    surgery.knife(agent.policy, surgery.Units({name: [0, 1] for name in sites}), optimizer=optimizer)
    agent.save(tmp_path / "agent")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict.*composite\.frozen_weight"):
        type(agent).load(tmp_path / "agent")
    resumed = make(1)
    surgery.accept(resumed.policy)
    resumed.set_parameters(tmp_path / "agent")
    surgery.attach(resumed.policy, resumed.policy.optimizer)
    assert as_bits(resumed.policy.state_dict()) == as_bits(agent.policy.state_dict())
    assert surgery.composites(resumed.policy) == surgery.composites(agent.policy)
    assert ages(resumed.policy, resumed.policy.optimizer) == ages(agent.policy, optimizer) != {}
    resumed.learn(16)


# -- lightning ---------------------------------------------------------------------------------------------------------


def lightning_module(operate_at: int | None) -> Any:
    import lightning

    class Net(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
            surgery.accept(self)

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def on_train_start(self) -> None:
            surgery.attach(self, self.trainer.optimizers)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == operate_at:
                surgery.knife(self, surgery.Units({"net.0": [0, 3]}), optimizer=self.trainer.optimizers)

    return Net


def fitted(net: Any, path: Path, max_epochs: int, checkpoint: Path | None = None) -> Any:
    import lightning

    data = torch.utils.data.TensorDataset(torch.linspace(-1.0, 1.0, 64).view(16, 4))
    trainer = lightning.Trainer(
        max_epochs=max_epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu", default_root_dir=path,
    )  # fmt: skip
    trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=checkpoint)
    return trainer


@pytest.mark.slow
@pytest.mark.situation(CHECKPOINTS, "lightning: fit(ckpt_path=), load_from_checkpoint", "works")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*weights_only. was not set")
def test_a_lightning_checkpoint_is_loaded_and_trained_on_bit_for_bit(tmp_path: Path):
    Net = lightning_module(operate_at=3)
    torch.manual_seed(0)
    whole = Net()
    torch.manual_seed(0)
    first = Net()
    fitted(whole, tmp_path, 2)
    fitted(first, tmp_path, 1).save_checkpoint(tmp_path / "one.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "one.ckpt")
    assert as_bits(loaded.state_dict()) == as_bits(first.state_dict())
    resumed = lightning_module(operate_at=None)()
    trainer = fitted(resumed, tmp_path, 2, tmp_path / "one.ckpt")
    assert trainer.global_step == 8 and surgery.composites(resumed).num_units == 2
    assert as_bits(resumed.state_dict()) == as_bits(whole.state_dict())


# -- torchrl -----------------------------------------------------------------------------------------------------------


@pytest.mark.situation(CHECKPOINTS, "torchrl: a network with shared parameters", "works")
@pytest.mark.parametrize("accepts", [False, True])
def test_a_network_whose_parameters_tensordict_holds_is_restored(accepts: bool):
    from tests.zoo.torchrl_models import multi_agent_mlp

    model, fresh, agents = multi_agent_mlp(True), multi_agent_mlp(True), torch.randn(4, 3, 6)
    operated(model)
    if accepts:
        surgery.accept(fresh)
        fresh.load_state_dict(model.state_dict())
    else:
        surgery.restore(fresh, model.state_dict())
    assert as_bits(fresh.state_dict()) == as_bits(model.state_dict())
    assert torch.equal(fresh(agents), model(agents))


@pytest.mark.situation(CHECKPOINTS, "tensordict modules, by the part that was operated on", "works")
def test_a_part_that_was_operated_on_is_restored_inside_a_tensordict_module():
    tensordict = pytest.importorskip("tensordict")
    from_tensordict = pytest.importorskip("tensordict.nn")

    def make() -> Any:
        return from_tensordict.TensorDictModule(build(), ["x"], ["y"])

    model, fresh, accepts = make().eval(), make().eval(), make().eval()
    operated(model.module)
    with pytest.raises(surgery.StateError, match=r"'module\.0' is no site.*restore that part"):
        surgery.restore(fresh, model.state_dict())
    with pytest.raises(surgery.SiteError, match=r"bank of '0' is at no site.*surgery\.attach\(part, optimizer\)"):
        surgery.attach(model, torch.optim.Adam(model.parameters()))
    surgery.restore(fresh.module, model.state_dict(), prefix="module.")
    surgery.accept(accepts.module)
    accepts.load_state_dict(model.state_dict())
    for other in (fresh, accepts):
        given = (tensordict.TensorDict({"x": x()}, [5]) for _ in range(2))
        assert torch.equal(*(each(batch)["y"] for each, batch in zip((model, other), given, strict=True)))
