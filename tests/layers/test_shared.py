"""Where GradNorm measures: on a network whose shared weights are known."""

import pytest
import torch
from torch import Tensor, nn

from reidctl.errors import UsageError
from reidctl.layers.shared import SharedLayer


class Forked(nn.Module):
    """trunk -> top -> left and right; `trunk.weight` and `top.weight` are shared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.top = nn.Linear(3, 3), nn.Linear(3, 3)
        self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

    def losses(self, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.top(self.trunk(torch.ones(2, 3)))
        return {"left": self.left(hidden).sum(), "right": scale * self.right(hidden).square().sum()}

    def trained(self, *frozen: str) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if name.split(".")[0] not in frozen}


def layer(rule: str, last_mlp: str = "trunk.weight") -> SharedLayer:
    return SharedLayer(rule, ["left", "right"], last_mlp)


@pytest.mark.covers(146)
@pytest.mark.parametrize(
    ("rule", "name"), [("last_mlp", "trunk.weight"), ("auto", "top.weight"), ("top.bias", "top.bias")]
)
def test_each_rule_chooses_at_the_first_step_once_and_touches_no_gradient(rule: str, name: str) -> None:
    network, chosen = Forked(), layer(rule)
    losses = network.losses()
    assert chosen.choose(losses, network.trained(), wait=True) and (chosen.name, chosen.reason) == (name, "")
    assert not chosen.choose(losses, network.trained(), wait=True), "the choice is made once"
    assert all(parameter.grad is None for parameter in network.parameters())
    losses["left"].backward()  # the graph is still there


@pytest.mark.covers(146)
def test_a_last_mlp_that_does_not_train_or_lies_beside_a_loss_gives_way_to_the_last_shared_weight() -> None:
    for last_mlp, frozen, why in (("trunk.weight", "trunk", "does not train"), ("left.weight", "", "is not under")):
        network, chosen = Forked(), layer("last_mlp", last_mlp)
        assert chosen.choose(network.losses(), network.trained(frozen), wait=True)
        assert chosen.name == "top.weight" and why in chosen.reason


@pytest.mark.covers(146)
def test_a_gradient_of_zero_waits_and_an_absent_one_does_not() -> None:
    for rule, name in (("last_mlp", "trunk.weight"), ("auto", "top.weight"), ("trunk.weight", "trunk.weight")):
        network, chosen = Forked(), layer(rule)
        for _ in range(3):
            assert not chosen.choose(network.losses(scale=0.0), network.trained(), wait=True)
            assert chosen.name is None
        assert chosen.choose(network.losses(), network.trained(), wait=True) and chosen.name == name
    with pytest.raises(UsageError, match="share no weight"):
        _apart()


def _apart() -> None:
    left, right = nn.Linear(3, 1), nn.Linear(3, 1)
    losses = {"left": left(torch.ones(1, 3)).sum(), "right": right(torch.ones(1, 3)).sum()}
    layer("auto").choose(losses, {"l": left.weight, "r": right.weight}, wait=True)


@pytest.mark.covers(146)
def test_a_loss_that_is_zero_during_the_whole_warm_up_is_judged_by_its_graph() -> None:
    for rule, name in (("last_mlp", "trunk.weight"), ("auto", "top.weight")):
        network, chosen = Forked(), layer(rule)
        assert chosen.choose(network.losses(scale=0.0), network.trained(), wait=False) and chosen.name == name


@pytest.mark.covers(146)
def test_gradients_of_different_steps_of_the_warm_up_add_up() -> None:
    network, chosen = Forked(), layer("last_mlp")
    first = network.losses()
    assert not chosen.choose({"left": first["left"], "right": first["right"] * 0}, network.trained(), wait=True)
    again = network.losses()
    resumed = layer("last_mlp")
    resumed.load_state_dict(chosen.state_dict())
    for one in (chosen, resumed):
        assert one.choose({"left": again["left"] * 0, "right": again["right"]}, network.trained(), wait=True)
        assert one.name == "trunk.weight"
    fresh = layer("last_mlp")
    assert not fresh.choose({"left": again["left"] * 0, "right": again["right"]}, network.trained(), wait=True)


@pytest.mark.covers(146)
def test_the_choice_survives_its_state() -> None:
    network, chosen = Forked(), layer("last_mlp", "left.weight")
    chosen.choose(network.losses(), network.trained(), wait=True)
    back = layer("last_mlp", "left.weight")
    back.load_state_dict(chosen.state_dict())
    assert (back.name, back.reason) == (chosen.name, chosen.reason) == ("top.weight", chosen.reason)


@pytest.mark.covers(146)
def test_losses_that_share_nothing_are_named_with_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"`left` and `right` share no weight.*method\.gradnorm=null"):
        _apart()
    network = Forked()
    with pytest.raises(UsageError, match=r"`right` does not depend on `left\.weight`"):
        layer("left.weight").choose(network.losses(), network.trained(), wait=True)
    with pytest.raises(UsageError, match="`left` and `right` do not depend on any weight that trains"):
        layer("auto").choose({"left": torch.tensor(1.0), "right": torch.tensor(1.0)}, network.trained(), wait=True)
    three = SharedLayer("auto", ["a", "b", "c"], "x")
    x, y, z = (nn.Parameter(torch.ones(1, 1)) for _ in range(3))
    pairs = {"a": (x * y).sum(), "b": (y * z).sum(), "c": (x * z).sum()}
    with pytest.raises(UsageError, match="`a`, `b` and `c` share no weight"):
        three.choose(pairs, {"x": x, "y": y, "z": z}, wait=True)
