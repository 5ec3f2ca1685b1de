# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""The loss terms and the utility arithmetic against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mambaformer.trainer.arguments import MambaFormerTrainingArguments
from mambaformer.trainer.losses import (
    LOSS_TERMS,
    LossInputs,
    burst_loss,
    cost_loss,
    expert_loss,
    gain_loss,
    gate_loss,
    regress_loss,
    task_loss,
    total_loss,
    use_loss,
    utilisation,
    utility_loss,
    z_loss,
)
from mambaformer.trainer.utility import (
    CallCosts,
    dual_ascent,
    gaps_of,
    gate_target,
    oracle_choice,
    oracle_gain,
    price_for_share,
    threshold_for_share,
    token_weights,
    utility_target,
)

ROWS, LENGTH = 3, 7


@pytest.fixture
def inputs() -> LossInputs:
    """Random values of a batch with padding, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(ROWS, LENGTH, dtype=torch.float64, generator=generator)

    mask = torch.ones(ROWS, LENGTH, dtype=torch.float64)
    mask[1, 5:] = 0
    log_p_et5, log_p_emamba = -normal().abs(), -normal().abs()
    delta, cost = log_p_et5 - log_p_emamba, 1 + normal().abs()
    return LossInputs(
        mask=mask,
        log_p_et5=log_p_et5,
        log_p_emamba=log_p_emamba,
        margin=normal().requires_grad_(),
        delta=delta,
        cost=cost,
        target=utility_target(delta, cost, 0.3, 0.5),
        weight=torch.ones_like(mask),
        choice=torch.randint(0, 2, (ROWS, LENGTH), generator=generator),
        gate_logit=torch.randn(ROWS, dtype=torch.float64, generator=generator).requires_grad_(),
        gate_target=torch.rand(ROWS, dtype=torch.float64, generator=generator),
        price=0.3,
        share=0.04,
    )


def margin_gradient(loss: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """Gradient in each token's margin, times the number of tokens that the mean is over."""
    (gradient,) = torch.autograd.grad(loss, inputs.margin)
    return gradient * inputs.mask.sum()


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_utility_gradient_is_phi_minus_target(inputs):
    phi = torch.sigmoid(inputs.margin)
    target = torch.sigmoid((inputs.delta.clamp(-5, 5) - 0.3 * inputs.cost) / 0.5)
    close(margin_gradient(utility_loss(inputs), inputs), (phi - target) * inputs.mask)


def test_task_gradient_is_phi_minus_the_posterior_of_et5(inputs):
    phi = torch.sigmoid(inputs.margin)
    et5, emamba = phi * inputs.log_p_et5.exp(), (1 - phi) * inputs.log_p_emamba.exp()
    inputs.log_p_mix = torch.log(et5 + emamba)
    close(margin_gradient(task_loss(inputs), inputs), (phi - et5 / (et5 + emamba)).detach() * inputs.mask)


def test_gain_gradient_is_the_expected_policy_gradient(inputs):
    phi = torch.sigmoid(inputs.margin)
    expected = -phi * (1 - phi) * (inputs.delta - 0.3 * inputs.cost) * inputs.mask
    close(margin_gradient(gain_loss(inputs), inputs), expected)
    # The score-function estimator over both choices has this mean.
    reward = inputs.delta - 0.3 * inputs.cost
    scored = phi * reward * (1 - phi)  # choice ET5: reward times d log phi; choice EMamba: reward 0
    close(margin_gradient(gain_loss(inputs), inputs), -scored * inputs.mask)


def test_cost_gradient_prices_each_call(inputs):
    phi = torch.sigmoid(inputs.margin)
    close(margin_gradient(cost_loss(inputs), inputs), 0.3 * inputs.cost * phi * (1 - phi) * inputs.mask)


def test_regression_gradient_is_margin_minus_delta(inputs):
    assert bool(((inputs.margin - inputs.delta).abs() < 5).all())
    close(margin_gradient(regress_loss(inputs), inputs), (inputs.margin - inputs.delta) * inputs.mask)


def test_z_gradient(inputs):
    close(margin_gradient(z_loss(inputs), inputs), 2 * inputs.margin * inputs.mask)


def test_burst_loss_counts_switches(inputs):
    inputs.mask = torch.ones_like(inputs.mask)
    choice = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0]])
    inputs.margin = (choice * 2.0 - 1) * 60
    assert float(burst_loss(inputs)) == pytest.approx((2 + 0 + 6) / 21)


def test_burst_loss_is_the_expectation_over_all_choices(inputs):
    inputs.mask = torch.ones_like(inputs.mask)
    phi = torch.sigmoid(inputs.margin.detach())
    expected = 0.0
    for choice in itertools.product((0.0, 1.0), repeat=LENGTH):
        chosen = torch.tensor(choice, dtype=torch.float64)
        probability = (phi * chosen + (1 - phi) * (1 - chosen)).prod(-1)  # (ROWS,)
        expected = expected + probability.sum() * (chosen[1:] - chosen[:-1]).abs().sum()
    close(burst_loss(inputs).detach(), expected / inputs.mask.sum())


def test_expert_loss_is_the_sum_over_both_experts(inputs):
    close(expert_loss(inputs), -(inputs.mask * (inputs.log_p_et5 + inputs.log_p_emamba)).sum() / inputs.mask.sum())


def test_gate_gradient(inputs):
    (gradient,) = torch.autograd.grad(gate_loss(inputs), inputs.gate_logit)
    close(gradient, (torch.sigmoid(inputs.gate_logit) - inputs.gate_target) / ROWS)


@pytest.mark.parametrize(
    ("dispatched", "expected"), [(0.04, 1.0), (0.5, 6.51), (0.0, 1.0417)], ids=["target", "uniform", "never"]
)
def test_utilisation_at_the_target_at_uniform_and_at_never(dispatched, expected):
    value = torch.tensor(dispatched, dtype=torch.float64)
    assert float(utilisation(value, value, 0.04)) == pytest.approx(expected, abs=1e-3)


def test_use_loss_rests_at_the_target_and_pulls_back_to_it():
    """Where a share rho is dispatched the loss is 1 and moves nothing; above it margins fall, below it they rise."""
    margin = torch.logit(torch.tensor([[0.04]], dtype=torch.float64)).repeat(1, 100).requires_grad_()
    for count, value, sign in ((4, 1.0, 0), (8, None, 1), (1, None, -1)):
        choice = (torch.arange(100) < count).long()[None]
        inputs = LossInputs(mask=torch.ones_like(margin), margin=margin, choice=choice, share=0.04)
        loss = use_loss(inputs)
        gradient = margin_gradient(loss, inputs)
        if sign == 0:
            close(loss.detach(), value)
            close(gradient, torch.zeros_like(gradient))
        else:
            assert bool((gradient * sign > 0).all())


def test_tokens_on_which_the_experts_agree_give_no_gradient(inputs):
    differs = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    differs[0, 2] = True
    inputs.weight = token_weights(differs, 0.0).double()
    gradient = margin_gradient(utility_loss(inputs), inputs)
    assert float(gradient[0, 2].abs()) > 1e-3
    assert float(gradient[~differs].abs().max()) == 0


def learned(loss, starts: list[float], delta: float) -> list[float]:
    """Where phi ends from each start after 2000 steps at 0.05 of gradient descent on one token, at a price of 0.3."""
    margin = torch.logit(torch.tensor([starts])).requires_grad_()
    one = torch.ones_like(margin)  # (1, starts)
    inputs = LossInputs(
        mask=one,
        margin=margin,
        delta=delta * one,
        cost=one,
        target=utility_target(delta * one, one, 0.3, 0.5),
        weight=one,
        price=0.3,
    )
    for _ in range(2000):
        phi = torch.sigmoid(margin)
        inputs.log_p_mix = torch.log(phi + (1 - phi) * math.exp(-delta))  # ET5 gives the gold token probability 1
        margin.data -= 0.05 * margin_gradient(loss(inputs), inputs)
    return torch.sigmoid(margin.detach())[0].tolist()


@pytest.mark.parametrize(("delta", "expected"), [(1.0, 0.802), (0.35, 0.525)])
def test_utility_fixed_point_does_not_depend_on_the_start(delta, expected):
    assert learned(utility_loss, [0.01, 0.5, 0.99], delta) == pytest.approx([expected] * 3, abs=1e-3)


def test_the_alternatives_remember_their_start():
    """Expected utility stalls where phi saturates, marginal likelihood feeds on itself: neither is the default."""
    assert learned(gain_loss, [0.01, 0.5], 1.0) == pytest.approx([0.031, 0.984], abs=2e-3)
    assert learned(lambda x: task_loss(x) + cost_loss(x), [0.01, 0.5], 1.0) == pytest.approx([0.817, 0.969], abs=2e-3)


def test_price_and_temperature_limits(inputs):
    delta, cost = inputs.delta, inputs.cost
    assert float(utility_target(delta, cost, 1e4, 0.5).max()) < 1e-9
    assert float(utility_target(delta, cost, -1e4, 0.5).min()) > 1 - 1e-9
    hard = (delta.clamp(-5, 5) > 0.3 * cost).double()
    close(utility_target(delta, cost, 0.3, 1e-6), hard)


def test_price_is_the_quantile_and_makes_the_oracle_spend_the_share():
    delta = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * 2
    mask = torch.ones_like(delta)
    mask[:, 45:] = 0
    price = price_for_share(delta, mask, 0.04)
    values = delta[mask.bool()]
    assert price == pytest.approx(float(values.quantile(0.96)), abs=0.02)
    choice, _ = oracle_choice(delta, mask, CallCosts(), price)
    assert int(choice.sum()) == round(0.04 * values.numel())
    assert int(choice[:, 45:].sum()) == 0


def test_price_with_catch_up_costs_meets_the_share_and_prefers_short_gaps():
    delta = torch.randn(60, 50, generator=torch.Generator().manual_seed(2)).abs() * 2
    mask = torch.ones_like(delta)
    costs = CallCosts.from_table({"pass": 2.0, "token": 0.5, "encoder": 8.0, "emamba": 1.0}, 0.1, 50)
    price = price_for_share(delta, mask, 0.1, costs)
    choice, gap = oracle_choice(delta, mask, costs, price)
    assert float(choice.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(gap, gaps_of(choice))
    free, _ = oracle_choice(delta, mask, CallCosts(), price_for_share(delta, mask, 0.1))
    assert float(gaps_of(choice)[choice == 1].float().mean()) < float(gaps_of(free)[free == 1].float().mean())


def test_an_average_call_costs_one():
    costs = CallCosts.from_table({"pass": 3.0, "token": 0.2, "encoder": 10.0, "emamba": 1.0}, 0.04, 100)
    assert float(costs.of_call(torch.tensor(25.0))) == pytest.approx(1.0)
    assert CallCosts.from_table(None, 0.04, 100) == CallCosts()
    choice = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])
    gap = gaps_of(choice)
    assert gap.tolist() == [[1, 2, 1, 2], [1, 2, 3, 4]]
    spent = costs.of_sequence(choice, gap)
    assert float(spent[0]) == pytest.approx(2 * costs.once + 4 * costs.token + costs.encoder)
    assert float(spent[1]) == 0


def test_gate_target_follows_what_a_sequence_can_gain():
    costs = CallCosts(once=0.5, token=0.1, encoder=1.0)
    delta = torch.tensor([[4.0, 4.0, -1.0], [0.1, -3.0, -1.0]])
    target = gate_target(delta, torch.ones_like(delta), costs, 1.0, 0.5)
    assert float(target[0]) > 0.99
    assert float(target[1]) == pytest.approx(float(torch.sigmoid(torch.tensor(-2.0))))


@pytest.mark.parametrize("share", [0.01, 0.04, 0.25, 1.0])
def test_threshold_gives_the_share(share):
    margins = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    threshold = threshold_for_share(margins, share)
    assert int((margins > threshold).sum()) == round(share * 1000)


def test_threshold_never_opens_what_a_gate_closed():
    margins = torch.randn(1000, generator=torch.Generator().manual_seed(4))
    margins[:900] = float("-inf")
    threshold = threshold_for_share(margins, 0.04)
    assert int((margins > threshold).sum()) == 40
    assert int((margins > threshold_for_share(margins, 0.5)).sum()) == 100


def test_dual_ascent_reaches_the_budget():
    margins = torch.randn(20000, generator=torch.Generator().manual_seed(5)) * 2
    price = 0.0
    for _ in range(4000):
        spent = float(torch.sigmoid((margins - price) / 0.3).mean())
        price = dual_ascent(price, spent, 0.04, 0.5)
    assert spent == pytest.approx(0.04, abs=1e-4)
    assert price > 0
    assert dual_ascent(0.01, 0.0, 0.04, 10.0) == 0.0


def test_oracle_gain_bounds_what_a_choice_wins():
    delta = torch.tensor([3.0, -1.0, 2.0, 0.5])
    assert oracle_gain(delta, torch.tensor([0, 1, 1, 0])) == (5.0 / 4, 1.0 / 4)
    assert oracle_gain(delta, torch.tensor([1, 0, 1, 0])) == (5.0 / 4, 5.0 / 4)
    assert oracle_gain(delta, torch.zeros(4)) == (0.0, 0.0)


def test_total_is_the_weighted_sum_of_the_stages_terms(inputs):
    weights = dict.fromkeys(LOSS_TERMS, 0.0) | {"util": 2.0, "z": 0.5, "expert": 9.0}
    total, terms = total_loss(inputs, "distil", weights)
    assert set(terms) == {"util", "z"}
    assert not any(value.requires_grad for value in terms.values())
    close(total.detach(), (2 * terms["util"] + 0.5 * terms["z"]))


def test_every_term_has_a_weight_field(tmp_path):
    args = MambaFormerTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for name in LOSS_TERMS:
        assert isinstance(getattr(args, f"w_{name}"), float)


def test_padding_changes_no_term(inputs):
    inputs.log_p_mix = inputs.log_p_et5
    weights = dict.fromkeys(LOSS_TERMS, 1.0)
    before, _ = total_loss(inputs, "joint", weights)
    with torch.no_grad():
        for name in ("margin", "delta", "log_p_mix", "log_p_et5", "log_p_emamba", "target", "cost"):
            getattr(inputs, name)[1, 5:] = 0.77
        inputs.choice[1, 5:] = -1
    after, _ = total_loss(inputs, "joint", weights)
    close(after.detach(), float(before.detach()))
