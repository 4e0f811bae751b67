"""grpo.py's curricula, scaffolds, exploration, budgets and teachers: each against its formula, its limits, and as runs."""
import copy
import itertools
import json
import math
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import eval as ground
import faults
import grpo
from eval import InputError, Problem, encode_prompt, load_model
from faults import largest_difference
from grpo import Config, Group, Row, World
from rounding import assert_close, rounding_of_run

ALONE = World(0, 1, torch.device("cpu"))


def config(**flags):
    made = Config(**{"model_name_or_path": "tiny", "eval_steps": 0, "num_generations": 4, "max_completion_length": 12, **flags})
    grpo.check_config(made)
    return made


def row_of(right, text="", n_tokens=3, prompt=(5,)):
    row = Row(list(prompt), torch.ones(n_tokens, dtype=torch.long), {"sampled": torch.zeros(n_tokens)}, True, text, right)
    row.reward = float(right)
    return row


def group_of(problem, right, n=4):
    """A group of n completions, the first `right` of them right."""
    return Group(problem, [row_of(i < right) for i in range(n)])


def sampler_of(kind, arms, **flags):
    c = config(sampler=kind, **flags)
    return grpo.SAMPLERS[kind](arms, c), grpo.pace_of(0, c)


# --- samplers ---


def test_uniform_walks_through_all_problems_again_and_again():
    sampler, pace = sampler_of("uniform", ["a"] * 10)
    seen = [i for _ in range(5) for i, n in sampler.pick(pace, 16) if n == 4]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert grpo.in_order(10, 7, 8, 3) == (grpo.in_order(10, 0, 20, 3))[7:15]


def test_sec_is_uniform_without_signal_and_moves_only_the_arms_it_has_seen():
    sampler, _ = sampler_of("sec", ["a", "b", "c"], sampler_rate=0.5, sampler_temperature=0.4)
    sampler.update([group_of(0, 0), group_of(1, 4)])
    assert sampler.shares() == pytest.approx([1 / 3] * 3)
    sampler.update([group_of(1, 1), group_of(1, 1)])
    gain = (1.5 + 3 * 0.5) / 4 * (0.5 / (0.5 + 1e-4))  # one success of four: +1.5, -0.5 three times (unbiased std .5)
    assert sampler.state["values"] == pytest.approx([0, 0.5 * gain, 0], rel=1e-3)
    sampler.update([group_of(0, 0)])
    assert sampler.state["values"][1] == pytest.approx(0.5 * gain, rel=1e-3)  # not drawn: it stays
    sampler.update([group_of(1, 1)])
    assert sampler.state["values"][1] == pytest.approx(0.75 * gain, rel=1e-3)  # a running mean, not a sum
    weights = [math.exp(value / 0.4) for value in sampler.state["values"]]
    assert sampler.shares() == pytest.approx([weight / sum(weights) for weight in weights])


def test_each_step_draws_its_arms_anew():
    sampler, pace = sampler_of("sec", [str(i % 4) for i in range(40)])
    drawn = [tuple(sampler.arm_of[i] for i, _ in sampler.pick(pace, 64)) for _ in range(8)]
    assert len(set(drawn)) == 8 and {arm for arms in drawn for arm in arms} == set(range(4))


def test_what_a_group_can_teach_is_in_the_units_of_the_advantages():
    assert group_of(0, 1).mean_gain(config(scale_rewards="none")) == pytest.approx((0.75 + 3 * 0.25) / 4)
    assert group_of(0, 1).mean_gain(config()) == pytest.approx((1.5 + 3 * 0.5) / 4, rel=1e-3)


def test_the_curricula_are_fed_verdicts_not_rewards():
    sampler, _ = sampler_of("sec", ["a", "b"])
    shaped = group_of(0, 0)
    for i, row in enumerate(shaped.rows):
        row.reward = float(i)
    sampler.update([shaped])
    assert sampler.state["values"] == [0, 0]


def test_dump_bonus():
    sampler, _ = sampler_of("dump", [str(i) for i in range(12)], num_generations=2)
    sampler.state["counts"] = [170] * 11 + [178]
    assert sampler.bonus()[0] == pytest.approx(math.sqrt(2 * math.log(2049) / 171)) == pytest.approx(0.30, abs=5e-3)
    sampler.state["counts"] = [10] * 11 + [0]
    assert max(sampler.shares()) == sampler.shares()[11]  # never tried: the largest bonus


def test_dump_looks_at_a_window_of_completions():
    sampler, _ = sampler_of("dump", ["a", "b"], dump_window=8)
    for right in (2, 0, 0):
        sampler.update([group_of(0, right)])
    assert len(sampler.state["gains"][0]) == 2 and sampler.state["counts"] == [12, 0]
    assert all(gain == 0 for gain, _ in sampler.state["gains"][0])  # the informative one is out of the window


def test_dump_counts_a_large_group_for_more_than_a_small_one():
    sampler, _ = sampler_of("dump", ["a", "b"], scale_rewards="none")
    sampler.update([group_of(0, 1, n=2), group_of(0, 0, n=6), group_of(1, 0, n=8)])  # gains 1/2, 0, 0; equal counts
    ratio = sampler.shares()[0] / sampler.shares()[1]
    assert math.log(ratio) * sampler.config.sampler_temperature == pytest.approx(0.5 * 2 / 8)


def test_domain_aware_weights():
    sampler, pace = sampler_of("domain_aware", ["a", "b", "c"], sampler_temperature=0.3)
    sampler.update([group_of(0, 4), group_of(1, 2), group_of(2, 0)])
    shares = sampler.shares()
    assert [share / shares[0] for share in shares] == pytest.approx([1, 5.3, 28], rel=2e-2)
    sampler.update([group_of(0, 0)])
    assert sampler.state["rewards"] == pytest.approx([0.5, 0.5, 0])  # rate .5
    picks = sampler.pick(pace, 40)
    counts = [sum(i == arm for i, _ in picks) for arm in range(3)]
    assert sum(counts) == 10 and all(abs(n - 10 * share) < 1 for n, share in zip(counts, sampler.shares()))


def test_horizon_opens_the_next_arm_when_the_last_is_mastered():
    sampler, pace = sampler_of("horizon", ["1", "2", "3"], horizon_review=0.2)
    assert sampler.shares() == [1, 0, 0]
    sampler.update([group_of(0, 4) for _ in range(7)])
    assert sampler.state["stage"] == 0  # too few to judge by
    sampler.update([group_of(0, 4), group_of(1, 4)])
    assert sampler.state["stage"] == 1 and sampler.shares() == pytest.approx([0.2, 0.8, 0])
    for _ in range(5):
        sampler.update([group_of(1, 3) for _ in range(8)] + [group_of(0, 4) for _ in range(8)])
    assert sampler.state["stage"] == 1  # .75 of the current arm; what it reviews does not count
    sampler.update([group_of(1, 4) for _ in range(16)])
    assert sampler.state["stage"] == 2 and sampler.shares() == pytest.approx([0.1, 0.1, 0.8])
    sampler.update([group_of(2, 4) for _ in range(16)])
    assert sampler.state["stage"] == 2  # there is no further one


def test_arms_stand_in_the_order_of_their_numbers():
    assert sampler_of("horizon", ["10", "9", "1"])[0].names == ["1", "9", "10"]
    assert sampler_of("sec", ["10,add", "2,sub", "2,add"])[0].names == ["2,add", "2,sub", "10,add"]


def test_horizon_without_a_gate_is_a_function_of_the_step():
    c = config(sampler="horizon", horizon_gate=0.0, horizon_review=0.0, max_steps=30)
    for step in (0, 9, 10, 19, 20, 29):
        sampler = grpo.Horizon(["1", "2", "3"], c)
        assert {i for i, _ in sampler.pick(grpo.pace_of(step, c), 16)} == {step // 10}


def test_adcl_measures_sorts_and_trains_on_easy_chunks_first():
    sampler, pace = sampler_of("adcl", ["a"] * 8, adcl_chunks=2, adcl_samples=4)
    strength = {i: (7 * i) % 8 % 5 for i in range(8)}  # of 4 completions right
    picks = sampler.pick(pace, 8)
    assert sorted(picks) == [(i, 4) for i in range(8)]  # everything is measured once
    groups = [group_of(i, strength[i]) for i, _ in picks]
    sampler.update(groups)
    assert not any(sampler.keep(group) for group in groups)  # and does not train
    easiest = sorted(range(8), key=lambda i: (-strength[i], i))
    first = sampler.pick(pace, 8) + sampler.pick(pace, 8)
    assert [i for i, _ in first] == easiest[:4] and sampler.keep(groups[0])
    assert sorted(sampler.pick(pace, 8)) == sorted((i, 4) for i in easiest[4:])  # the second chunk, measured anew
    now = {i: 4 - strength[i] for i in range(8)}  # what was hard has become easy
    sampler.update([group_of(i, now[i]) for i in easiest[4:]])
    assert [i for i, _ in sampler.pick(pace, 16)] == sorted(easiest[4:], key=lambda i: (-now[i], i))


def test_adcl_with_more_chunks_than_problems():
    problems, c = [Problem(str(i), "1") for i in range(2)], config(sampler="adcl", adcl_chunks=50)
    sampler, player = grpo.make_sampler(problems, c), Player(lambda problem: 2)
    for step in range(4):
        kept, _, _ = grpo.collect(sampler, player, problems, grpo.pace_of(step, c), 8, c)
        assert sum(len(group.rows) for group in kept) == 8


def worth(n, p):
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def test_knapsack_is_the_best_allocation():
    rates, total, low, high = [0.5, 0.25, 0.9], 14, 2, 8
    best = max((counts for counts in itertools.product(range(low, high + 1), repeat=3) if sum(counts) <= total),
               key=lambda counts: sum(worth(n, p) for n, p in zip(counts, rates)))
    found = grpo.knapsack_allocation(rates, total, 4, low, high)
    assert sum(worth(n, p) for n, p in zip(found, rates)) == pytest.approx(sum(worth(n, p) for n, p in zip(best, rates)))
    for n in range(1, 9):
        assert grpo.added_worth(n, 0.3) == pytest.approx(worth(n + 1, 0.3) - worth(n, 0.3))


@pytest.mark.parametrize("rates", [[0.5, 0.98, 0.0, 1.0], [0.3, None, 0.0], [1.0, 1.0], [0.0, 0.5], [0.2] * 5])
def test_knapsack_gives_out_what_there_is(rates):
    total = 8 * len(rates)
    counts = grpo.knapsack_allocation(rates, total, 8, 2, 32)
    assert sum(counts) == total and min(counts) >= 2
    assert all(n <= 32 for n, rate in zip(counts, rates) if rate and 0 < rate < 1)
    if 0.98 in rates:
        assert counts[0] > counts[1]
    if rates == [0.0, 0.5]:
        assert counts == [12, 4]  # four make the mixed one mixed; what is left goes to the unsolved one
    assert all(n == 8 for n, rate in zip(counts, rates) if rate is None)


def test_the_range_of_the_knapsack_binds_no_other_sampler():
    assert config(num_generations=128).num_generations == 128
    with pytest.raises(InputError, match="--knapsack_range"):
        config(num_generations=128, sampler="knapsack")


def test_knapsack_trusts_a_rate_after_eight_completions_and_remembers_sixteen():
    sampler, pace = sampler_of("knapsack", ["a"] * 2)
    assert [n for _, n in sampler.pick(pace, 8)] == [4, 4]
    for right in (4, 4):
        sampler.update([group_of(0, right)])
    counts = dict(sampler.pick(pace, 8))
    assert counts == {0: 3, 1: 5}  # solved: 2, unknown: 4, and nobody who would gain from the two that are left
    for _ in range(4):
        sampler.update([group_of(0, 0)])
    assert sampler.state["verdicts"]["0"] == [0] * 16


def test_dynamic_keeps_mixed_groups_alone():
    sampler, _ = sampler_of("dynamic", ["a"] * 3)
    assert [sampler.keep(group_of(0, right)) for right in range(5)] == [False, True, True, True, False]


@pytest.mark.parametrize("kind", ["horizon", "sec", "dump", "domain_aware"])
def test_the_names_of_the_arms_do_not_matter(kind):
    """Permuting the arms together with what comes back permutes the shares; horizon goes by the order of the names."""
    arms, order = ["a", "b", "c"], [2, 0, 1]
    plain, _ = sampler_of(kind, arms)
    moved, _ = sampler_of(kind, [arms[i] for i in order] if kind != "horizon" else arms)
    for rights in ([4, 2, 0], [1, 3, 4], [4, 4, 4]):
        groups = [group_of(arm, right) for arm, right in enumerate(rights)]
        plain.update(groups)
        moved.update([group_of(order.index(g.problem) if kind != "horizon" else g.problem, round(4 * g.success())) for g in groups])
    assert moved.shares() == pytest.approx(plain.shares())
    assert len(set(plain.shares())) > 1


@pytest.mark.parametrize("kind", [name for name in grpo.SAMPLERS if name != "yoked"])
def test_the_state_of_a_sampler_survives_json(kind):
    arms = [str(i % 3) for i in range(12)]
    sampler, pace = sampler_of(kind, arms, adcl_chunks=2)
    both = [sampler]
    for round_ in range(6):
        if round_ == 3:
            both.append(sampler_of(kind, arms, adcl_chunks=2)[0])
            both[1].state = json.loads(json.dumps(sampler.state))
        picks = [each.pick(pace, 16) for each in both]
        assert picks[0] == picks[-1]
        for each in both:
            each.update([group_of(i, (i + round_) % 5) for i, _ in picks[0]])


class Player:
    """Stands in for the policy: `answers(problem)` says how many of the completions asked for are right."""

    def __init__(self, answers, longest=1000):
        self.answers, self.longest, self.asked, self.rollouts = answers, longest, [], 0

    def fits(self, problem):
        return len(problem.prompt) <= self.longest

    def sample(self, problems, counts, pace):
        self.asked += [[problem.prompt for problem in problems]] if problems else []
        self.rollouts += sum(counts)
        return [[row_of(j < self.answers(problem), problem.prompt, prompt=[ord(c) for c in problem.prompt])
                 for j in range(count)] for problem, count in zip(problems, counts)]


def test_collect_counts_what_it_throws_away_and_stops():
    problems = [Problem(str(i), "1") for i in range(12)]
    c = config(sampler="dynamic", max_rounds=3)
    sampler, seen = grpo.make_sampler(problems, c), []
    sampler.update = seen.extend
    player = Player(lambda problem: 2 * (int(problem.prompt) % 4 == 0))
    kept, sampled, _ = grpo.collect(sampler, player, problems, grpo.pace_of(0, c), 16, c)
    assert all(group.success() == 0.5 for group in kept) and 0 < len(kept) <= 4
    assert player.rollouts == sum(len(group.rows) for group in sampled) and len(player.asked) <= 3
    assert len(seen) == len(sampled) > len(kept)  # the sampler has seen the dropped ones too
    nobody = Player(lambda problem: 0)
    kept, sampled, _ = grpo.collect(grpo.make_sampler(problems, c), nobody, problems, grpo.pace_of(0, c), 16, c)
    assert not kept and nobody.rollouts == 3 * 16


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "dapo"])
def test_a_step_without_a_mixed_group_changes_nothing_and_goes_on(tiny, loss_type):
    c = config(sampler="dynamic", loss_type=loss_type, beta=0.1, entropy_coef=0.1, entropy_weighting="tea", scale_rewards="batch")
    grpo.credit([], grpo.pace_of(0, c), 8, c)
    grpo.consult([], grpo.Policy(tiny[0]), grpo.Policy(tiny[0]), None, grpo.pace_of(0, c), c, ALONE)
    assert grpo.Update([], c).rows == []


def test_what_is_measured_is_not_helped():
    problems = [Problem(str(i), "1", hints=("a", "b")) for i in range(8)]
    c = config(sampler="adcl", adcl_chunks=2, scaffold="hints", scaffold_exempt=0.0)
    player = Player(lambda problem: 0)
    _, _, numbers = grpo.collect(grpo.make_sampler(problems, c), player, problems, grpo.pace_of(0, c), 8, c)
    assert numbers["scaffold/asked"] == 2 and player.rollouts == 8 * 4 + 8 + 2 * 2  # two groups that train, two hints each


def test_a_short_step_has_the_weights_of_a_full_one():
    c = config(loss_type="grpo")
    groups = [group_of(0, 2), group_of(1, 1)]
    grpo.credit(groups, grpo.pace_of(0, c), 8, c)
    full = [row.weight for row in groups[0].rows]
    grpo.credit(groups[:1], grpo.pace_of(0, c), 8, c)
    assert [row.weight for row in groups[0].rows] == pytest.approx(full)


def test_knapsack_weights_can_be_made_equal():
    groups = [group_of(0, 1, n=2), group_of(1, 3, n=6)]
    for reweight, wanted in ((True, 3.0), (False, 1.0)):
        c = config(sampler="knapsack", knapsack_reweight=reweight, loss_type="grpo")
        grpo.credit(groups, grpo.pace_of(0, c), 8, c)
        totals = [sum(row.weight for row in group.rows) for group in groups]
        assert totals[1] / totals[0] == pytest.approx(wanted)


# --- schedules and rewards ---


def test_golden_budgets_and_stages():
    c = config(reward_funcs=["accuracy", "budget"], length_budget=[256, 87], max_steps=600, max_completion_length=512)
    assert [round(grpo.pace_of(step, c).budget) for step in (0, 149, 150, 300, 450, 599)] == [256, 256, 179, 125, 87, 87]
    pace, plain = grpo.pace_of(0, c)._replace(budget=100, limit=200), config(budget_gate=False)
    rows = [grpo.Row([], torch.zeros(n), {}, True, "1+1=2 #2") for n in (0, 50, 100, 150, 200, 300)]
    assert [grpo.budget_reward(None, row, pace, plain) for row in rows] == [0, 0.5, 1, 0.5, 0, 0]
    assert [grpo.budget_reward(None, row, pace, c) for row in rows] == [0] * 6  # the gate: none is right
    assert [grpo.format_length_reward(None, row, pace, c) for row in rows[1:5]] == [1.25, 1.5, 1, -0.5]
    assert [grpo.format_length_reward(None, replace(row, text="no"), pace, c) for row in rows[1:5]] == [0, 0, 0, -1]
    c = config(reward_funcs=["accuracy", "budget"], length_budget=[800, 160], budget_drops=2, max_steps=30, max_completion_length=999)
    assert [int(grpo.pace_of(step, c).budget) for step in (0, 15, 29)] == [800, 357, 160]
    c = config(stages=["4x16", "8x8", "12x4"], max_steps=9)
    assert [(grpo.pace_of(s, c).limit, grpo.pace_of(s, c).generations) for s in (0, 2, 3, 6, 8)] == [
        (4, 16), (4, 16), (8, 8), (12, 4), (12, 4)]
    c = config(kd_coef=0.5, teacher_model_name_or_path="tiny", kd_schedule="anneal", max_steps=10)
    assert [grpo.pace_of(s, c).kd_coef for s in (0, 5)] == pytest.approx([0.5, 0.3])
    c.kd_schedule = "switch"
    assert [grpo.pace_of(s, c).kd_coef for s in (4, 5)] == [0.5, 0]
    assert [grpo.pace_of(s, config(max_steps=20)).helps for s in (2, 3)] == [False, True]


def test_shaped_rewards():
    c = config(reward_funcs=["accuracy", "budget"], length_budget=[10, 10], max_completion_length=20)
    pace, problem = grpo.pace_of(0, c), Problem("1+1=", "2")
    assert grpo.budget_reward(problem, row_of(True, n_tokens=5), pace, c) == 0.5
    assert grpo.budget_reward(problem, row_of(False, n_tokens=5), pace, c) == 0
    c.budget_gate = False
    assert grpo.budget_reward(problem, row_of(False, n_tokens=5), pace, c) == 0.5
    assert grpo.format_length_reward(problem, row_of(False, "#7", n_tokens=10), pace, c) == 1.5
    assert grpo.format_length_reward(problem, row_of(False, "7", n_tokens=10), pace, c) == 0
    assert grpo.format_length_reward(problem, row_of(False, "7", n_tokens=20), pace, c) == -1


def test_shaped_rewards_do_not_move_a_group_without_a_right_completion():
    shaped = [group_of(0, 0), group_of(1, 1)]
    for group in shaped:
        for i, row in enumerate(group.rows):
            row.reward += 0.01 * i
    for flag, silent in ((False, True), (True, False)):
        c = config(reward_funcs=["accuracy", "length"], shape_silent_groups=flag)
        grpo.credit(shaped, grpo.pace_of(0, c), 8, c)
        assert all(row.advantage == 0 for row in shaped[0].rows) == silent
        assert all(row.advantage != 0 for row in shaped[1].rows)
    c = config(reward_funcs=["length"])  # without the verdict among the rewards nothing is gated
    grpo.credit(shaped, grpo.pace_of(0, c), 8, c)
    assert all(row.advantage != 0 for row in shaped[0].rows)


def test_leave_one_out():
    c = config(baseline="leave_one_out", scale_rewards="none")
    group = group_of(0, 1)
    grpo.credit([group], grpo.pace_of(0, c), 4, c)
    rewards = [row.reward for row in group.rows]
    wanted = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert [row.advantage for row in group.rows] == pytest.approx(wanted)


def test_advantages_over_the_batch_divide_by_its_std():
    c = config(scale_rewards="batch")
    groups = [group_of(0, 1), group_of(1, 4)]
    grpo.credit(groups, grpo.pace_of(0, c), 8, c)
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    wanted = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)).flatten().tolist()
    assert [row.advantage for group in groups for row in group.rows] == pytest.approx(wanted)


# --- losses ---


def test_gradients_of_the_teacher_penalties_by_enumeration():
    """Over a 7-way softmax, tokens weighted by their probability and that weight not differentiated: what sampling does."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    policy, teacher = logits.log_softmax(0), other.log_softmax(0)
    weights = policy.exp().detach()
    reverse = torch.autograd.grad((policy.exp() * (policy - teacher)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((teacher.exp() * (teacher - policy)).sum(), logits, retain_graph=True)[0]
    for direction, wanted in (("reverse", reverse), ("forward", forward)):
        loss = (weights * grpo.teacher_penalty(policy[None], teacher[None], direction)[0]).sum()
        assert torch.allclose(torch.autograd.grad(loss, logits, retain_graph=True)[0], wanted)
    k1 = (weights * (policy - teacher)).sum()
    assert torch.allclose(torch.autograd.grad(k1, logits)[0], torch.zeros(7, dtype=torch.float64))
    certain = torch.tensor([0.0, -20.0], dtype=torch.float64).log_softmax(0)  # what the policy likes it all but forbids
    doubtful = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    mine = doubtful.log_softmax(0)
    wanted = torch.autograd.grad((certain.exp() * (certain - mine)).sum(), doubtful, retain_graph=True)[0]
    loss = (mine.exp().detach() * grpo.teacher_penalty(mine[None], certain[None], "forward")[0]).sum()
    assert torch.allclose(torch.autograd.grad(loss, doubtful)[0], wanted)
    far = torch.tensor([[-30.0]], requires_grad=True)
    grpo.teacher_penalty(far, torch.tensor([[-1.0]]), "reverse").backward()
    assert far.grad.item() == -10


def test_tea_weights_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(3, 5, generator=generator) * 3
    lengths, advantages = [5, 2, 4], torch.tensor([1.0, -0.5, -0.5])
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    logps.requires_grad_()
    found = grpo.tea_weights(advantages, logps, mask)
    assert not found.requires_grad
    places = [(i, t) for i in range(3) for t in range(lengths[i])]
    mean_a = sum(float(advantages[i]) for i, _ in places) / len(places)
    mean_l = sum(float(logps[i, t]) for i, t in places) / len(places)
    for i in range(3):
        covariance = [(float(advantages[i]) - mean_a) * (float(logps[i, t]) - mean_l) for t in range(lengths[i])]
        total = sum(math.exp(x) for x in covariance)
        assert_close(found[i, : lengths[i]], [min(5, 10 * math.exp(x) / total) for x in covariance])
        assert (found[i, lengths[i] :] == 0).all()


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_model("tiny")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return model, tokenizer


def gradient(model, rows, c):
    model.zero_grad()
    update = grpo.Update(rows, c)
    if update.rows:
        [batch] = grpo.batches_of(update.rows, c, ALONE)
        update.loss_of(grpo.Policy(model), batch)[0].backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_hpt_is_the_likelihood_of_the_solution_divided_by_prompts(tiny):
    model, tokenizer = tiny
    problems = [Problem("1+1=", "2", "1+1=2#2"), Problem("2+2=", "4", "2+2=4#4")]
    c = config(hpt_gate=0.25, sft_coef=0.5)
    groups = [group_of(0, 1), group_of(1, 2)]
    for group in groups:
        for row in group.rows:
            row.prompt = encode_prompt(tokenizer, problems[group.problem].prompt)
    grpo.credit(groups, grpo.pace_of(0, c), 8, c)
    kept = copy.deepcopy(groups[1].rows)
    assert grpo.demonstrate(groups, problems, tokenizer, c) == {"hpt/share": 0.5}
    assert len(groups[0].rows) == 1 and [row.weight for row in groups[1].rows] == [row.weight for row in kept]
    found = gradient(model, groups[0].rows, c)
    model.zero_grad()
    prompt = encode_prompt(tokenizer, "1+1=")
    answer = tokenizer("1+1=2#2").input_ids + [tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
    (-0.5 * logps.sum() / (2 * len(answer))).backward()
    assert_close(found, {name: parameter.grad for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_kl_in_the_reward_is_centred_over_the_group(tiny, baseline):
    """With the baseline of the rewards: what is compared is reward - beta KL, against the mean of all, or the others."""
    c = config(beta=0.1, kl_in_reward=True, scale_rewards="none", baseline=baseline)
    group = group_of(0, 2)
    grpo.credit([group], grpo.pace_of(0, c), 4, c)
    before = [row.advantage for row in group.rows]
    for i, row in enumerate(group.rows):
        row.values["sampled"] = torch.full((3,), -float(i))
    model, _ = tiny
    grpo.consult([group], grpo.Policy(model), grpo.Policy(model), None, grpo.pace_of(0, c), c, ALONE)
    kl = [float((row.values["sampled"] - row.values["reference"]).sum()) for row in group.rows]
    others = [(sum(kl) - k) / 3 if baseline == "leave_one_out" else sum(kl) / 4 for k in kl]
    wanted = [a - 0.1 * (k - other) for a, k, other in zip(before, kl, others)]
    assert_close([row.advantage for row in group.rows], wanted)
    assert len(set(kl)) > 1


def test_rows_that_were_not_sampled_under_their_prompt_count_with_their_true_log_probs(tiny):
    """A hinted completion trained under the bare prompt: its KL and its TEA weights are those of the bare prompt."""
    model, tokenizer = tiny
    policy, reference = grpo.Policy(model), grpo.Policy(load_model("tiny", seed=1)[0])
    c = config(beta=0.1, kl_in_reward=True, entropy_coef=0.1, entropy_weighting="tea", scale_rewards="none")
    known = group_of(0, 2)
    for i, row in enumerate(known.rows):
        row.tokens_T = torch.arange(3, 6 + i)
    grpo.add_logps(policy, known.rows, "sampled", c, ALONE)
    blind = copy.deepcopy(known)
    blind.rows[3].values["sampled"].fill_(math.nan)
    for group in (known, blind):
        grpo.credit([group], grpo.pace_of(0, c), 4, c)
        grpo.consult([group], policy, reference, None, grpo.pace_of(0, c), c, ALONE)
    for a, b in zip(known.rows, blind.rows):
        assert_close(a.advantage, b.advantage, size=1.0)
        assert_close(a.values["entropy_weight"], b.values["entropy_weight"])
    assert known.rows[3].advantage != pytest.approx(-0.5, abs=1e-4)  # the KL did move it


@pytest.mark.parametrize("weighting", ["uniform", "tea"])
def test_the_entropy_bonus_against_a_loop(tiny, weighting):
    model, tokenizer = tiny
    c, rows, wanted = config(entropy_coef=0.3, entropy_weighting=weighting), [], 0.0
    for i, text in enumerate(("12", "345#6")):
        prompt, tokens_T = encode_prompt(tokenizer, "1+1="), torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        weights_T = (1 + i) * torch.arange(1.0, len(tokens_T) + 1)
        rows.append(grpo.Row(prompt, tokens_T, {"sampled": torch.zeros(len(tokens_T)), "entropy_weight": weights_T}, True))
        rows[-1].weight = 0.1 * (i + 1)  # its advantage is 0, so the bonus is all there is
        with torch.no_grad():
            logps = (model(torch.tensor([prompt + tokens_T.tolist()])).logits[0].double() / c.temperature).log_softmax(-1)
        for t in range(len(tokens_T)):
            at = logps[len(prompt) + t - 1]
            wanted -= 0.3 * rows[-1].weight * (float(weights_T[t]) if weighting == "tea" else 1) * float(-(at.exp() * at).sum())
    update = grpo.Update(rows, c)
    [batch] = grpo.batches_of(update.rows, c, ALONE)
    found, _ = update.loss_of(grpo.Policy(model), batch)
    assert batch.rows == [1, 0]  # longest first
    assert_close(found, wanted)


def test_a_solution_is_imitated_and_nothing_else(tiny):
    model, tokenizer = tiny
    found, problem = [], Problem("1+1=", "2", "1+1=2#2")
    other = grpo.Policy(load_model("tiny", seed=1)[0])
    for extra in ({}, {"beta": 0.5, "entropy_coef": 0.5, "kd_coef": 0.5, "teacher_model_name_or_path": "tiny"}):
        c, group = config(hpt_gate=0.0, **extra), group_of(0, 0)
        group.rows[0].prompt = encode_prompt(tokenizer, problem.prompt)
        grpo.demonstrate([group], [problem], tokenizer, c)
        grpo.consult([group], grpo.Policy(model), other, other, grpo.pace_of(0, c), c, ALONE)
        found.append(gradient(model, group.rows, c))
    assert_close(found[0], found[1])


def test_a_group_without_a_right_completion_moves_nothing_unless_it_is_helped(tiny):
    model, tokenizer = tiny
    problem = Problem("1+1=", "2", hints=("a",))

    def moves(helped, **flags):
        c, group = config(hint_template="{prompt}{hint}", **flags), group_of(0, 0)
        for i, row in enumerate(group.rows):
            row.prompt, row.reward = encode_prompt(tokenizer, problem.prompt), 0.1 * i * (len(c.reward_funcs) > 1)
        if helped:
            player = Player(lambda problem: problem.prompt.endswith("a"))
            grpo.add_hints([group], player, [problem], grpo.pace_of(0, c), c)
            group.rows[-1].prompt = encode_prompt(tokenizer, "1+1=1")
        grpo.credit([group], grpo.pace_of(0, c), 4, c)
        return any(slope.any() for slope in gradient(model, group.rows, c).values())

    assert not moves(False) and moves(True, scaffold="hints")
    assert not moves(False, reward_funcs=["accuracy", "length"])
    assert moves(False, reward_funcs=["accuracy", "length"], shape_silent_groups=True)


def test_a_teacher_whose_weight_has_fallen_to_0_is_not_asked(tiny):
    model, tokenizer = tiny
    c = config(kd_coef=0.1, teacher_model_name_or_path="tiny", kd_schedule="switch", max_steps=2)
    policy, teacher = grpo.Policy(model), grpo.Policy(load_model("tiny", seed=1)[0])
    asked = []
    teacher.register_forward_hook(lambda *given: asked.append(1))
    for step in (0, 1):
        group, asked[:] = group_of(0, 2), []
        for row in group.rows:
            row.prompt = encode_prompt(tokenizer, "1+1=")
        grpo.credit([group], grpo.pace_of(step, c), 4, c)
        grpo.consult([group], policy, None, teacher, grpo.pace_of(step, c), c, ALONE)
        update = grpo.Update(group.rows, c)
        [batch] = grpo.batches_of(update.rows, c, ALONE)
        loss, numbers = update.loss_of(policy, batch)
        assert bool(asked) == ("kd/teacher_gap" in numbers) == (step == 0) and torch.isfinite(loss)


# --- scaffolds ---


CHAIN = ground.load_problems("chain", "train", 8, levels="4")
LADDER = Problem("q", "9", hints=(("a", "b"), ("c",)))


def test_hints_go_from_little_to_much_and_never_tell_the_answer():
    assert grpo.hint_levels(LADDER) == ["a", "a b", "c"]  # chunks add up in a tier, a later tier replaces it
    word = Problem("How many?", "72", "He sold 48/2 = 24 clips.\nThat is 48+24 = 72 clips.\n#### 72")
    assert grpo.hint_levels(word) == ["He sold 48/2 = 24 clips."]  # the step that gives 72 is left out
    for problem in CHAIN:
        assert all(not grpo.gives_away(level, problem.answer) for level in grpo.hint_levels(problem))
        assert len(problem.subgoals) == 3
    assert grpo.gives_away("so 42.", "42") and not grpo.gives_away("3.42, 142, 42.5, 42.05, 1,042", "42")
    assert [grpo.cut_solution(text) for text in ("a\nb\n#### 3", "x;y#3", None, "so \\boxed{3}")] == [["a\n", "b\n"], ["x;", "y"], [], ["so "]]
    assert grpo.cut_solution("## Step 1\nadd\n#### 3") == ["## Step 1\n", "add\n"]  # a headline does not end it


@pytest.mark.parametrize("text, answer", [("gets $11,000 for it", "11000"), ("it costs $12.00", "12"), ("12,345,678", "12345678"),
                                          ("1000 in all", "1,000"), ("f(100,200)", "200")])
def test_a_hint_may_not_write_the_answer_in_another_way(text, answer):
    assert grpo.gives_away(text, answer)
    assert grpo.hint_levels(Problem("q", answer, hints=("think", text))) == ["think"]


def hinted(scaffold, solved_with, **flags):
    c = config(scaffold=scaffold, hint_template="{prompt}|{hint}", **flags)
    problems = [LADDER, Problem("r", "7", "do;this#7", hints=("a",))]
    player = Player(lambda problem: problem.prompt.endswith(solved_with))
    groups = [group_of(0, 0), group_of(1, 2)]
    numbers = grpo.add_hints(groups, player, problems, grpo.pace_of(0, c), c)
    grpo.credit(groups, grpo.pace_of(0, c), 8, c)
    return groups, player, numbers


def test_the_least_help_that_works_takes_one_row():
    groups, player, numbers = hinted("hints", "|a b")
    assert player.asked == [["q|a"], ["q|a b"]] and numbers == {
        "scaffold/asked": 1, "scaffold/solved": 1, "scaffold/level": 2, "scaffold/too_long": 0}
    assert [row.right for row in groups[0].rows] == [False, False, False, True]
    assert groups[0].rows[3].prompt == [ord(c) for c in "q|a b"]  # it is trained in the context it was sampled in
    assert sum(row.reward for row in groups[0].rows) == 1 and all(row.weight for row in groups[0].rows)
    assert all(row.prompt == [5] for row in groups[1].rows)  # the group that has a right one is left alone


def test_what_is_said_and_learned_of_a_step_is_what_was_sampled_without_help():
    problems = [Problem("q", "9", hints=("a", "b")), Problem("r", "9", hints=("a", "b"))]
    c, seen = config(scaffold="hints", scaffold_exempt=0.0, hint_template="{prompt}|{hint}"), []
    sampler = grpo.make_sampler(problems, c)
    sampler.update = lambda groups: seen.extend(group.success() for group in groups)
    player = Player(lambda problem: problem.prompt == "q|b")
    kept, sampled, numbers = grpo.collect(sampler, player, problems, grpo.pace_of(0, c), 8, c)
    assert sorted(group.success() for group in kept) == [0, 0.25]
    assert seen == [group.success() for group in sampled] == [0, 0]
    assert (numbers["scaffold/asked"], numbers["scaffold/solved"], numbers["scaffold/level"]) == (2, 1, 2)
    c.scaffold_exempt = 0.5
    kept, _, numbers = grpo.collect(sampler, player, problems, grpo.pace_of(0, c), 8, c)
    assert not any(group.success() for group in kept) and "scaffold/asked" not in numbers  # not yet


def test_help_that_makes_a_prompt_too_long_is_left_out_and_counted(tiny):
    c, group, player = config(scaffold="hints", hint_template="{prompt}|{hint}"), group_of(0, 0), Player(lambda problem: 0, longest=3)
    numbers = grpo.add_hints([group], player, [LADDER], grpo.pace_of(0, c), c)
    assert player.asked == [["q|a"], ["q|c"]] and numbers["scaffold/too_long"] == 1  # not "q|a b"
    player = Player(lambda problem: problem.prompt.endswith("c"), longest=3)
    numbers = grpo.add_hints([group_of(0, 0)], player, [LADDER], grpo.pace_of(0, c), c)
    assert numbers["scaffold/level"] == 3  # "c" is the third, though the second to be tried
    c = config(scaffold="subgoals", subgoal_form="given", hint_template="{hint}{prompt}")
    problem = Problem("3+4-2=", "5", "3+4=7;7-2=5#5", subgoals=(("3+4=", "7"),))
    for longest, too_long in ((4, 0), (3, 1)):
        group, player = group_of(0, 0), Player(lambda problem: 4, longest)
        numbers = grpo.add_subgoals([group], player, [problem], grpo.pace_of(0, c), c)
        assert numbers == {"scaffold/asked": 1, "scaffold/solved": 1 - too_long, "scaffold/too_long": too_long}
        assert group.success() == 1 - too_long and player.rollouts == 4 * (1 - too_long)
    actor = grpo.Actor(*tiny, config(max_prompt_length=len(encode_prompt(tiny[1], "1+1="))), ALONE)
    assert actor.fits(Problem("1+1=", "2")) and not actor.fits(Problem("1+1=|2", "2"))


def test_a_plain_row_is_trained_under_the_bare_prompt():
    groups, _, _ = hinted("hints", "|c", hint_logps="plain")
    assert groups[0].rows[3].prompt == [5] and groups[0].rows[3].values["sampled"].isnan().all()
    groups, player, _ = hinted("egsr", "nothing")
    assert player.asked == []  # the first problem has no solution to show
    c = config(scaffold="egsr", hint_template="{prompt}|{hint}")
    group, player = group_of(0, 0), Player(lambda problem: True)
    grpo.add_hints([group], player, [Problem("r", "7", "do;this#7")], grpo.pace_of(0, c), c)
    assert player.asked == [["r|do;this#7"]] and group.rows[3].prompt == [5]


def test_the_control_keeps_only_the_negatives():
    groups, _, _ = hinted("negatives", "|a")
    assert groups[0].rows[3].weight == 0 and groups[0].rows[3].right
    assert all(row.weight > 0 and row.advantage < 0 for row in groups[0].rows[:3])


def test_a_group_that_no_help_solves_stays_silent(tiny):
    groups, player, _ = hinted("hints", "never")
    assert len(player.asked) == 3 and all(row.advantage == 0 for row in groups[0].rows)


def test_a_hint_changes_what_a_row_is_scored_on(tiny):
    model, tokenizer = tiny
    rows = []
    for prompt in ("1+1=", "1+1=|2", "1+1=|3"):
        row = row_of(True, prompt=encode_prompt(tokenizer, prompt))
        grpo.add_logps(grpo.Policy(model), [row], "old", config(), ALONE)
        rows.append(row.values["old"].sum().item())
    assert len(set(rows)) == 3


def test_subgoals_in_both_forms():
    problem = Problem("3+4-2=", "5", "3+4=7;7-2=5#5", level=2, subgoals=(("3+4=", "7"), ("3+4-1=", "6")))
    alone = grpo.subgoal_of(problem, 1, config(subgoal_form="alone"))
    given = grpo.subgoal_of(problem, 1, config(subgoal_form="given", hint_template="{hint}{prompt}"))
    assert (alone.prompt, alone.answer) == ("3+4-1=", "6") and (given.prompt, given.answer) == ("3+4=7;3+4-1=", "6")
    around = config(prompt_template="<{prompt}>", hint_template="{prompt}|{hint}")
    assert [grpo.subgoal_of(problem, place, around).prompt for place in (0, 1)] == ["<3+4=>", "<3+4-1=>|3+4=7;"]
    unsolved = Problem("q", "5", subgoals=(("a", "1"), ("b", "2")))
    assert grpo.subgoal_of(unsolved, 1, config()).prompt == "b"  # there are no steps to give
    c = config(scaffold="subgoals", subgoal_form="alone")
    groups, player = [group_of(0, 0), group_of(0, 1)], Player(lambda problem: 2)
    numbers = grpo.add_subgoals(groups, player, [problem], grpo.pace_of(0, c), c)
    assert numbers == {"scaffold/asked": 1, "scaffold/solved": 1, "scaffold/too_long": 0} and player.rollouts == 4
    assert groups[0].success() == 0.5 and player.asked[0][0] in ("3+4=", "3+4-1=")
    for problem in CHAIN:
        for prompt, answer in problem.subgoals:
            first, *rest = [int(x) for x in __import__("re").findall(r"\d+", prompt)]
            value = first
            for op, operand in zip([c for c in prompt if c in "+-*"], rest):
                value = ground.apply_operator(op, value, operand)
            assert str(value) == answer and problem.prompt.startswith(prompt[:-1])


# --- runs ---


@pytest.fixture(scope="module")
def cold_start(tmp_path_factory):
    """A folder with a small model that adds one small number to another and is wrong about every other time."""
    import sft
    folder = tmp_path_factory.mktemp("cold") / "start"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in faults.SMALLER.items():
            patch.setitem(ground.TINY, name, value)
        patch.setattr(ground, "CHAIN_FIRST", 9)
        patch.setitem(ground.CHAIN_OPERAND, "+", 3)
        sft.main(sft.Config(output_dir=str(folder), levels="1-2", domains="add", n_train=500, error_rate=0.3, max_steps=150,
                            per_device_train_batch_size=32, learning_rate=1e-2, eval_steps=0, save_steps=0))
    return folder


@pytest.fixture(autouse=True)
def small_sums(monkeypatch):
    monkeypatch.setattr(ground, "CHAIN_FIRST", 9)
    monkeypatch.setitem(ground.CHAIN_OPERAND, "+", 3)


def flags_of(cold_start, **flags):
    return {"model_name_or_path": str(cold_start), "n_train": 12, "per_device_train_batch_size": 16, "num_generations": 4,
            "max_completion_length": 24, "eval_steps": 0, "levels": "1-3", "domains": "add", "max_steps": 4,
            "save_steps": 2, "learning_rate": 1e-3, "scaffold_exempt": 0.0, "hint_template": "{prompt}{hint}", **flags}


COMBINATIONS = {
    "sec, hints": {"sampler": "sec", "scaffold": "hints", "loss_type": "dapo"},
    "dump, egsr, two iterations": {"sampler": "dump", "scaffold": "egsr", "num_iterations": 2, "max_steps": 6, "save_steps": 3},
    "horizon, subgoals": {"sampler": "horizon", "scaffold": "subgoals", "horizon_gate": 0.0},
    "domain_aware, moving anchor": {"sampler": "domain_aware", "beta": 0.1, "kl_in_reward": True,
                                    "ref_model_mixup_alpha": 0.5, "entropy_coef": 0.01, "entropy_weighting": "tea"},
    "adcl": {"sampler": "adcl", "adcl_chunks": 3, "adcl_samples": 2},
    "knapsack, budget": {"sampler": "knapsack", "reward_funcs": ["accuracy", "budget"], "n_train": 4},
    "dynamic, hints": {"sampler": "dynamic", "scaffold": "hints", "max_rounds": 3},
    "hpt, teacher, tea": {"hpt_gate": 0.25, "kd_coef": 0.1, "num_iterations": 2, "max_steps": 6, "save_steps": 3, "entropy_coef": 0.01,
                          "entropy_weighting": "tea"},
    "stages": {"stages": ["12x8", "24x4"], "loss_type": "dr_grpo"}}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_resumes_bit_for_bit(tmp_path, cold_start, name):
    mine = flags_of(cold_start, **COMBINATIONS[name])
    if mine.get("kd_coef"):
        mine["teacher_model_name_or_path"] = str(cold_start)
    grpo.main(Config(**mine, output_dir=str(tmp_path / "whole")))
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    saved, last = faults.steps_of(cut)  # with two iterations: 4, which was due at 3
    assert (saved, last) == ((4, 6) if mine["max_steps"] == 6 else (2, 4))
    shutil.rmtree(faults.newest(cut))
    args = json.loads((cut / "args.json").read_text())
    (cut / "args.json").write_text(json.dumps({**args, "finished": False, "flags": {**args["flags"], "output_dir": str(cut)}}))
    (cut / "model.safetensors").unlink()
    grpo.main(Config(**mine, output_dir=str(cut)))
    assert largest_difference(cut, tmp_path / "whole") == 0
    lines = [[{name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
              for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (tmp_path / "whole", cut)]
    assert lines[0] == lines[1] and len(lines[0]) == last
    assert any(line["grad_norm"] > 0 for line in lines[0])


@pytest.mark.parametrize("name", ["sec, hints", "domain_aware, moving anchor", "knapsack, budget", "hpt, teacher, tea"])
def test_a_combination_on_two_processes_equals_one(tmp_path, tiny_model, name):
    mine = {**flags_of(tiny_model, **COMBINATIONS[name]), "max_steps": 3, "levels": "1-2", "domains": "",
            "learning_rate": 1e-4}
    if mine.get("kd_coef"):
        mine["teacher_model_name_or_path"] = str(tiny_model)
    assert faults.run("grpo", {**mine, "output_dir": tmp_path / "one"})[0] == [0]
    codes, text = faults.run("grpo", {**mine, "per_device_train_batch_size": 8, "output_dir": tmp_path / "two"}, ranks=2)
    assert codes == [0, 0], text
    assert largest_difference(tmp_path / "two", tmp_path / "one") < rounding_of_run(tmp_path / "one")


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_moving_anchor_goes_on_with_another_number_of_processes(tmp_path, tiny_model, before, after):
    """Stopped in the first step of a window, so saved after its last; the anchor is not the model given any more."""
    mine = flags_of(tiny_model, beta=0.1, ref_model_mixup_alpha=0.5, num_iterations=2, save_steps=0, levels="1-2", domains="",
                    entropy_coef=0.1)

    def go(name, ranks, *fault):
        rows = {"per_device_train_batch_size": 16 // ranks, "output_dir": tmp_path / name}
        return faults.run("grpo", {**mine, **rows}, *fault, ranks=ranks)

    assert go("whole", 1)[0] == [0]
    codes, text = go("cut", before, {"signal_at": [1, signal.SIGTERM]})
    assert codes == [128 + signal.SIGTERM] * before and faults.steps_of(tmp_path / "cut") == [2], text
    codes, text = go("cut", after)
    assert codes == [0] * after, text
    assert largest_difference(tmp_path / "cut", tmp_path / "whole") < rounding_of_run(tmp_path / "whole")
    kl = [[json.loads(line)["kl"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("cut", "whole")]
    assert kl[0][2:] == pytest.approx(kl[1][2:], rel=1e-3)


def test_a_yoked_run_replays_the_schedule_of_another(tmp_path, cold_start):
    mine = flags_of(cold_start, n_train=30) | {"eval_steps": 2, "n_eval": 2}
    grpo.main(Config(**mine, sampler="sec", output_dir=str(tmp_path / "sec"), seed=1))
    grpo.main(Config(**mine, sampler=f"yoked:{tmp_path / 'sec'}", output_dir=str(tmp_path / "yoked"), seed=2))
    runs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("sec", "yoked")]
    assert runs[0][0]["step"] == 0 and "eval/accuracy" in runs[0][0]  # not a step to replay
    for a, b in zip(*runs, strict=True):
        assert {k: v for k, v in a.items() if k.startswith("sampler/rollouts")} == {
            k: v for k, v in b.items() if k.startswith("sampler/rollouts")}


@pytest.mark.parametrize("rows, arms", [(4, [1]), (8, [1, 1]), (16, [0, 1, 1, 1]), (64, [0] * 5 + [1] * 11)])
def test_a_yoked_run_of_another_size_replays_the_shares(tmp_path, rows, arms):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "sampler/rollouts/a": 1, "sampler/rollouts/b": 2}) + "\n")
    sampler = grpo.Yoked(["a", "b"], config(sampler=f"yoked:{tmp_path}", max_steps=1))
    picks = sampler.pick(grpo.pace_of(0, sampler.config), rows)
    assert [i for i, _ in picks] == arms and sum(n for _, n in picks) == rows


@pytest.mark.parametrize("flags, said", [
    (dict(sampler="knapsack", n_train=12), "no problem comes twice"), (dict(sampler="knapsack", n_train=3), ""),
    (dict(sampler="adcl", n_train=12, adcl_samples=4), "measuring alone takes 48 completions, training 32"),
    (dict(sampler="adcl", n_train=4, adcl_samples=2), "")])
def test_a_curriculum_that_the_run_is_too_short_for_says_so(tmp_path, cold_start, capsys, flags, said):
    grpo.main(Config(**{**flags_of(cold_start, max_steps=2), **flags, "output_dir": str(tmp_path / "run")}))
    shown = capsys.readouterr().out
    assert said in shown and ("--sampler" in shown) == bool(said)


def test_a_yoked_run_needs_lines_to_replay(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="has 0 steps"):
        grpo.Yoked(["a", "b"], config(sampler=f"yoked:{tmp_path}"))


def test_with_stages_only_their_group_sizes_must_divide_a_step(tmp_path, cold_start):
    mine = flags_of(cold_start, stages=["12x5"], num_generations=4, per_device_train_batch_size=10, max_steps=1, save_steps=0)
    grpo.main(Config(**mine, output_dir=str(tmp_path / "run")))


def test_one_problem_fills_the_batch_with_groups_of_its_own(tmp_path, cold_start):
    grpo.main(Config(**flags_of(cold_start, n_train=1, max_steps=1), output_dir=str(tmp_path / "run")))
    [line] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["rollouts"] == 16 and line["sampled_accuracy"] not in (0, 1)


def test_entropy_alone_moves_the_policy(tmp_path, cold_start):
    grpo.main(Config(**flags_of(cold_start, max_steps=1, reward_weights=[0.0], entropy_coef=0.01), output_dir=str(tmp_path / "run")))
    [line] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["reward"] == 0 and line["grad_norm"] > 0


@pytest.mark.parametrize("flags, named", [
    (dict(sampler="best"), "--sampler best"), (dict(sampler="yoked:nowhere"), "--sampler yoked:nowhere"),
    (dict(sampler="sec", levels="2"), "--arm level"), (dict(arm="size"), "--arm size"), (dict(kd_coef=1.0), "--kd_coef"),
    (dict(stages=["8x4", "12x4"], soft_overlong_tokens=8), "--soft_overlong_tokens 8"),
    (dict(kl_in_reward=True), "--kl_in_reward"), (dict(ref_model_mixup_alpha=0.1), "--ref_model_mixup_alpha"),
    (dict(entropy_weighting="tea"), "--entropy_weighting"), (dict(hint_template="{prompt}"), "--hint_template"),
    (dict(hpt_gate=0.0, scaffold="hints"), "--hpt_gate"), (dict(hpt_gate=0.0, sampler="dynamic"), "--hpt_gate"),
    (dict(stages=["64"]), "--stages 64"), (dict(stages=["12x5"]), "--stages 12x5"), (dict(stages=["12x1"]), "--stages 12x1"), (dict(length_budget=[5]), "--length_budget"),
    (dict(knapsack_range=[8, 9]), "--knapsack_range"), (dict(horizon_review=1.5), "--horizon_review 1.5"),
    (dict(scaffold="hints", sampler="knapsack", stages=["12x4"]), "--sampler knapsack"),
])
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(tmp_path, cold_start, flags, named):
    with pytest.raises(InputError) as caught:
        grpo.main(Config(**{**flags_of(cold_start), **flags}, output_dir=str(tmp_path / "run")))
    assert named in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_data_without_help_is_refused_for_a_scaffold(tmp_path, cold_start):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(4)))
    for flags, named in ((dict(scaffold="hints"), "--scaffold hints"), (dict(scaffold="subgoals"), "--scaffold subgoals"),
                         (dict(hpt_gate=0.0), "--hpt_gate")):
        with pytest.raises(InputError, match=named):
            grpo.main(Config(**{**flags_of(cold_start), "dataset_name": str(data), **flags}, output_dir=str(tmp_path / "run")))
    data.write_text(json.dumps({"prompt": "1+1=", "answer": "2", "hints": [["a"], ["b", 3]]}) + "\n")
    with pytest.raises(InputError, match="row 1.*hints"):
        ground.load_problems(str(data))
    data.write_text(json.dumps({"prompt": "1+1=", "answer": "2", "hints": [["a"], ["b", "c"]], "subgoals": [["1=", "1"]]}) + "\n")
    [problem] = ground.load_problems(str(data))
    assert problem.hints == (("a",), ("b", "c")) and problem.subgoals == (("1=", "1"),)
