"""GradNorm on toy tasks whose gradients are known."""

import io

import pytest
import torch
from torch import Tensor, nn

from reidctl.config import parse_section
from reidctl.errors import UsageError
from reidctl.layers.gradnorm import GradNorm, GradNormConfig, _renormalise

NO_REG = {"weight_reg": 0.0, "warm_steps": 1}


def toy(theta: Tensor, slopes: dict[str, float], values: dict[str, float] | None = None) -> dict[str, Tensor]:
    """Losses with gradient norm `slope` at theta and the given value."""
    unit = torch.ones_like(theta) / len(theta) ** 0.5
    projections = {task: slope * (unit * theta).sum() for task, slope in slopes.items()}
    wanted = values or dict.fromkeys(slopes, 1.0)
    return {task: value - value.detach() + wanted[task] for task, value in projections.items()}


def run(balancer: GradNorm, slopes: dict[str, float], steps: int, values: dict[str, float] | None = None) -> None:
    theta = torch.zeros(4, requires_grad=True)
    balancer.step(toy(theta, slopes), theta)  # the warm step: L_k0 = 1
    for _ in range(steps):
        balancer.step(toy(theta, slopes, values), theta)


@pytest.mark.covers(52, 146)
@pytest.mark.parametrize("ref", ["first", "mean"])
@pytest.mark.parametrize("slopes", [{"a": 100.0, "b": 1.0}, {"a": 1.0, "b": 100.0}])
def test_gradients_of_100_to_1_are_balanced_to_equal_pulls(ref: str, slopes: dict[str, float]) -> None:
    balancer = GradNorm(["a", "b"], GradNormConfig(ref=ref, targets="feasible", **NO_REG))  # type: ignore[arg-type]
    run(balancer, slopes, 1000)
    weights = balancer.weights()
    assert weights["a"] * slopes["a"] == pytest.approx(weights["b"] * slopes["b"], rel=0.05)
    small = "b" if slopes["a"] > slopes["b"] else "a"
    assert weights[small] == pytest.approx(200 / 101, rel=0.01)  # w_b = 100 w_a, w_a + w_b = 2


@pytest.mark.covers(52)
@pytest.mark.parametrize("ref", ["first", "mean"])
@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 3.0), (2.0, 9.0), (0.0, 1.0)])
def test_pulls_converge_to_the_ratio_of_training_rates(ref: str, exponent: float, expected: float) -> None:
    # Task b fell to 0.3 of its start, a to 0.9: r_a / r_b = 3.
    balancer = GradNorm(["a", "b"], GradNormConfig(ref=ref, exponent=exponent, targets="feasible", **NO_REG))  # type: ignore[arg-type]
    slopes = {"a": 5.0, "b": 2.0}
    run(balancer, slopes, 600, {"a": 0.9, "b": 0.3})
    weights = balancer.weights()
    assert weights["a"] * 5 / (weights["b"] * 2) == pytest.approx(expected, rel=0.1)


@pytest.mark.covers(52, 146)
def test_literal_targets_starve_all_but_a_slow_first_task_and_feasible_ones_do_not() -> None:
    weights = {}
    for targets, ref in (("literal", "first"), ("feasible", "mean")):
        balancer = GradNorm(["a", "b"], GradNormConfig(targets=targets, ref=ref, warm_steps=1))  # type: ignore[arg-type]
        run(balancer, {"a": 1.0, "b": 1.0}, 600, {"a": 1.0, "b": 0.7})
        weights[targets] = balancer.weights()["b"]
    assert weights["literal"] < 1e-3
    assert weights["feasible"] == pytest.approx(2 * 0.7 / 1.7, rel=0.05)


@pytest.mark.covers(52, 146)
def test_weights_sum_to_the_number_of_tasks_within_the_clip_after_every_step() -> None:
    config = GradNormConfig(clip=(0.5, 1.2), lr=0.5, warm_steps=1)
    balancer, theta = GradNorm(["a", "b", "c"], config), torch.zeros(3, requires_grad=True)
    for step in range(40):
        balancer.step(toy(theta, {"a": 1e4, "b": 1.0 + step, "c": 1e-4}), theta)
        weights = list(balancer.weights().values())
        assert sum(weights) == pytest.approx(3, abs=1e-7)
        assert min(weights) >= 0.5 - 1e-9 and max(weights) <= 1.2 + 1e-9
    assert max(weights) == pytest.approx(1.2)  # the bound was reached


def test_renormalising_by_hand() -> None:
    assert _renormalise(torch.tensor([1.0, 3.0]), 1e-4, 10).tolist() == [0.5, 1.5]
    assert _renormalise(torch.tensor([1.0, 99.0], dtype=torch.float64), 0.5, 1.5).tolist() == pytest.approx([0.5, 1.5])


@pytest.mark.covers(52)
def test_network_parameters_receive_no_gradient_from_balancing() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    losses = {"a": network(torch.ones(3)).square().sum(), "b": network(torch.ones(3)).abs().sum()}
    balancer = GradNorm(["a", "b"], GradNormConfig(warm_steps=1))
    expected = torch.autograd.grad(losses["a"] + losses["b"], network.weight, retain_graph=True)[0]
    for _ in range(2):
        balancer.step(losses, network.weight)
    assert network.weight.grad is None and network.bias.grad is None
    weights = balancer.weights()
    assert weights["a"] != weights["b"]
    balancer.combine(losses).backward()  # the graph is still there
    assert network.weight.grad is not None and not torch.equal(network.weight.grad, expected)


@pytest.mark.covers(52, 145)
def test_combine_is_the_weighted_sum_with_constant_weights() -> None:
    balancer = GradNorm(["a", "b"])
    with torch.no_grad():
        balancer.log_weights.copy_(torch.tensor([0.5, 1.5]).log())
    losses = {"b": torch.tensor(2.0, requires_grad=True), "a": torch.tensor(3.0, requires_grad=True)}
    total = balancer.combine(losses)
    total.backward()
    assert total.item() == pytest.approx(0.5 * 3 + 1.5 * 2)
    assert losses["a"].grad is not None and losses["a"].grad.item() == pytest.approx(0.5)
    assert balancer.log_weights.grad is None


@pytest.mark.covers(52)
def test_weights_collapse_if_they_also_descend_the_weighted_losses_and_ours_do_not() -> None:
    """What gradient routing prevents: s <- s - lr d(sum w L)/ds shrinks every weight, until the lower clip."""
    theta, slopes = torch.zeros(4, requires_grad=True), {"a": 1.0, "b": 1.0}
    log_weights = torch.zeros(2, requires_grad=True)
    naive = torch.optim.SGD([log_weights], lr=25.0)
    ours = GradNorm(["a", "b"], GradNormConfig(warm_steps=1))
    for _ in range(400):
        losses = toy(theta, slopes)
        naive.zero_grad()
        (log_weights.exp() * torch.stack([losses["a"], losses["b"]]).detach()).sum().backward()
        naive.step()
        with torch.no_grad():
            log_weights.clamp_(min=torch.tensor(1e-4).log())
        ours.step(losses, theta)
    assert log_weights.exp().max() < 2e-4
    assert list(ours.weights().values()) == pytest.approx([1.0, 1.0])


@pytest.mark.covers(53, 147)
def test_regulariser_pulls_the_log_weights_to_zero_and_can_be_switched_off() -> None:
    def after(weight_reg: float) -> float:
        balancer = GradNorm(["a", "b"], GradNormConfig(coef=0.0, weight_reg=weight_reg, warm_steps=1))
        with torch.no_grad():
            balancer.log_weights.copy_(torch.tensor([0.4, 1.6]).log())
        run(balancer, {"a": 1.0, "b": 7.0}, 200)
        return balancer.weights()["a"]

    assert after(1e-3) == pytest.approx(1.0, abs=0.02)
    assert after(0.0) == pytest.approx(0.4)


@pytest.mark.covers(53)
def test_regulariser_is_zero_with_a_zero_gradient_at_equal_weights() -> None:
    balancer = GradNorm(["a", "b"], GradNormConfig(coef=0.0, warm_steps=1))
    run(balancer, {"a": 1.0, "b": 7.0}, 20)
    assert balancer.weights() == {"a": 1.0, "b": 1.0}


@pytest.mark.covers(146)
def test_defaults_are_the_papers_settings() -> None:
    config = GradNormConfig()
    assert (config.coef, config.exponent, config.ref, config.lr) == (1.5, 1.0, "first", 0.025)
    assert (config.clip, config.weight_reg, config.every) == ((1e-4, 10.0), 1e-3, 1)
    with pytest.raises(UsageError, match="clip"):
        parse_section(GradNormConfig, {"clip": [2.0, 10.0]}, "method.gradnorm")


@pytest.mark.covers(146)
def test_weights_stay_one_while_the_initial_losses_are_averaged() -> None:
    balancer, theta = GradNorm(["a", "b"]), torch.zeros(4, requires_grad=True)
    for step in range(10):
        report = balancer.step(toy(theta, {"a": 1.0, "b": 9.0}, {"a": float(step), "b": 2.0}), theta)
        assert report == {"weight_a": 1.0, "weight_b": 1.0}
    report = balancer.step(toy(theta, {"a": 1.0, "b": 9.0}, {"a": 9.0, "b": 1.0}), theta)
    # L_a0 = mean(0..9) = 4.5, L_b0 = 2: rates 2 and 0.5, mean 1.25.
    assert report["ratio_a"] == pytest.approx(1.6) and report["ratio_b"] == pytest.approx(0.4)
    # Pulls 1 and 9, reference 1 (the first): |1 - 1.6| + |9 - 0.4|.
    assert report["gradient_b"] == pytest.approx(9)
    assert report["gradnorm"] == pytest.approx(9.2)
    assert report["weight_b"] < 1 < report["weight_a"]


def test_initial_losses_have_a_floor() -> None:
    balancer = GradNorm(["a", "b"], GradNormConfig(warm_steps=1, floor=0.5))
    theta = torch.zeros(4, requires_grad=True)
    balancer.step(toy(theta, {"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 1.0}), theta)
    report = balancer.step(toy(theta, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 3.0}), theta)
    assert report["ratio_a"] == pytest.approx(1 / 2) and report["ratio_b"] == pytest.approx(3 / 2)


def test_every_skips_steps_in_between() -> None:
    balancer, theta = GradNorm(["a", "b"], GradNormConfig(every=3, warm_steps=1)), torch.zeros(4, requires_grad=True)
    balanced = ["gradnorm" in balancer.step(toy(theta, {"a": 1.0, "b": 2.0}), theta) for _ in range(9)]
    assert balanced == [False, False, True] * 3


@pytest.mark.covers(57)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(bad: float) -> None:
    balancer = GradNorm(["a", "b"], GradNormConfig(warm_steps=1))
    run(balancer, {"a": 1.0, "b": 4.0}, 5)
    before, theta = balancer.weights(), torch.zeros(4, requires_grad=True)
    balancer.step(toy(theta, {"a": 1.0, "b": 4.0}, {"a": bad, "b": 1.0}), theta)
    assert balancer.weights() == before


@pytest.mark.covers(57)
def test_losses_of_zero_or_without_gradient_give_finite_weights() -> None:
    balancer, theta = GradNorm(["a", "b"], GradNormConfig(warm_steps=1)), torch.zeros(4, requires_grad=True)
    for _ in range(5):
        balancer.step({"a": theta.sum() * 0.0, "b": torch.tensor(0.0)}, theta)
    assert sum(balancer.weights().values()) == pytest.approx(2)


@pytest.mark.covers(60)
@pytest.mark.parametrize("cut", [3, 25])  # within and after the warm-up
def test_a_resumed_balancer_continues_bit_for_bit(cut: int) -> None:
    def steps(balancer: GradNorm, first: int, last: int) -> dict[str, float]:
        report: dict[str, float] = {}
        theta = torch.zeros(4, requires_grad=True)
        for step in range(first, last):
            report = balancer.step(toy(theta, {"a": 1.0 + step, "b": 4.0}, {"a": 1 / (1 + step), "b": 0.7}), theta)
        return report

    whole, before, resumed = (GradNorm(["a", "b"]) for _ in range(3))
    expected = steps(whole, 0, 40)
    steps(before, 0, cut)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert steps(resumed, cut, 40) == expected  # weights, norms and training rates
    assert whole.weights()["a"] != 1.0


def test_a_saved_state_does_not_change_with_the_run() -> None:
    balancer = GradNorm(["a", "b"], GradNormConfig(warm_steps=1))
    state = balancer.state_dict()
    run(balancer, {"a": 1.0, "b": 9.0}, 3)
    assert (state["log_weights"] == 0).all() and (state["initial_sum"] == 0).all()


def test_other_losses_than_the_tasks_are_refused() -> None:
    balancer = GradNorm(["a", "b"])
    with pytest.raises(ValueError, match=r"\['a', 'b'\], got \['a'\]"):
        balancer.combine({"a": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="balances"):
        balancer.load_state_dict(GradNorm(["b", "a"]).state_dict())


def test_the_warm_up_needs_no_layer_and_what_follows_does() -> None:
    balancer, theta = GradNorm(["a", "b"], GradNormConfig(warm_steps=2)), torch.zeros(4, requires_grad=True)
    for _ in range(2):
        assert balancer.warming
        balancer.step(toy(theta, {"a": 1.0, "b": 2.0}), None)
    assert not balancer.warming
    with pytest.raises(ValueError, match="shared parameter"):
        balancer.step(toy(theta, {"a": 1.0, "b": 2.0}), None)


@pytest.mark.covers(52, 146)
@pytest.mark.parametrize("targets", ["literal", "feasible"])
def test_weights_sum_to_k_inside_the_clip_after_every_step_of_random_gradients(targets: str) -> None:
    generator = torch.Generator().manual_seed(0)
    config = GradNormConfig(targets=targets, clip=(0.6, 1.5), lr=0.3, warm_steps=1)  # type: ignore[arg-type]
    balancer, theta = GradNorm(["a", "b", "c", "d"], config), torch.zeros(4, requires_grad=True)
    extremes = set()
    for _ in range(60):
        slopes = dict(zip("abcd", (10 ** (6 * torch.rand(4, generator=generator) - 3)).tolist(), strict=True))
        balancer.step(toy(theta, slopes), theta)
        weights = list(balancer.weights().values())
        assert sum(weights) == pytest.approx(4, abs=1e-6)
        assert min(weights) >= 0.6 - 1e-9 and max(weights) <= 1.5 + 1e-9
        extremes |= {weight for weight in (0.6, 1.5) if min(abs(weight - mine) for mine in weights) < 1e-6}
    assert extremes == {0.6, 1.5}, "the bounds were reached, so the test could fail"
