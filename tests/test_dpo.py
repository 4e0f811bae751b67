"""dpo.py: each loss against its formula and its limits, the tensors of a pair, the reference, the data, and a run."""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import dpo
from dpo import Config, Pair, World, collate_pairs, line_tokens, micro_batches, pair_losses, row_pair
from eval import InputError, char_tokenizer, encode_prompt, end_of_turn, generate, load_model, load_problems
from rounding import assert_close, rounding
from test_sft import TEMPLATES, chat_tokenizer

ALONE = World(0, 1, torch.device("cpu"))
LOSSES = list(dpo.USUAL_BETA)
LOG2 = math.log(2)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def config_for(loss_type, **changes):
    config = Config(loss_type=loss_type, pairs="steps" if loss_type == "step_apo" else "offline", **changes)
    dpo.check_config(config)
    return config


def uneven_pairs(n=7, seed=0):
    """Pairs of very unequal lengths, some completions of one token, with values."""
    rng = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=rng))
        return torch.randint(4, 90, (length,), generator=rng).tolist()

    return [Pair(ids(1, 20), ids(1, 25) + [1], ids(1, 12), 0, (float(torch.rand(1, generator=rng)), 0.25 * (i % 3)))
            for i in range(n)]


# --- losses ---


def sigma(x):
    return 1 / (1 + math.exp(-x))


def formula(loss_type, w, l, ref_w, ref_l, n_w, n_l, v_w, v_l, beta):
    """The loss of one pair, in plain numbers, as its paper has it."""
    c, r = w - ref_w, l - ref_l
    return {"sigmoid": lambda: -math.log(sigma(beta * (c - r))),
            "hinge": lambda: max(0.0, 1 - beta * (c - r)),
            "ipo": lambda: (c / n_w - r / n_l - 1 / (2 * beta)) ** 2,
            "ipo_sum": lambda: (c - r - 1 / (2 * beta)) ** 2,
            "simpo": lambda: -math.log(sigma(beta / n_w * w - beta / n_l * l - 1.0)),
            "rpo": lambda: -math.log(sigma(beta * (c - r))) - 1.0 * w / n_w,
            "dpop": lambda: -math.log(sigma(beta * (c - r - 5.0 * max(0.0, ref_w - w)))),
            "step_apo": lambda: -math.log(sigma(beta * c - beta * r - (v_w - v_l))),
            "sft": lambda: -w / n_w}[loss_type]()


CASES = [(-5.0, -9.0, -6.0, -7.0, 4, 7, 0.75, 0.0), (-9.0, -5.0, -6.5, -7.0, 9, 2, 0.25, 0.5),
         (-3.0, -3.0, -3.0, -3.0, 3, 3, 0.5, 0.5), (-40.0, -1.0, -2.0, -30.0, 11, 5, 1.0, 0.0)]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_loss_and_its_gradient_against_the_formula(loss_type):
    config = config_for(loss_type)
    table = torch.tensor(CASES, dtype=torch.float64)
    logps_PC = table[:, :2].clone().requires_grad_()
    losses_P, _ = pair_losses(logps_PC, table[:, 2:4], table[:, 4:6], table[:, 6:], config)
    losses_P.sum().backward()
    for row, case in enumerate(CASES):
        assert losses_P[row].item() == pytest.approx(formula(loss_type, *case, config.beta), abs=1e-9)
        for side in range(2):  # central difference of the formula
            up, down = (list(case) for _ in range(2))
            up[side], down[side] = case[side] + 1e-5, case[side] - 1e-5
            slope = (formula(loss_type, *up, config.beta) - formula(loss_type, *down, config.beta)) / 2e-5
            kink = loss_type == "dpop" and case[0] == case[2] and side == 0
            if not kink:
                assert logps_PC.grad[row, side].item() == pytest.approx(slope, abs=1e-5)


def losses_at(loss_type, logps, reference, lengths=(4, 4), values=(0.0, 0.0), **changes):
    """(loss, implicit rewards) of a single pair."""
    rows = [torch.tensor([row], dtype=torch.float32) for row in (logps, reference, lengths, values)]
    losses_P, rewards_PC = pair_losses(*rows, config_for(loss_type, **changes))
    return losses_P.item(), rewards_PC[0].tolist()


@pytest.mark.parametrize("loss_type", ["sigmoid", "dpop", "step_apo"])
def test_the_loss_of_the_reference_itself_is_log_2_exactly(loss_type):
    found, rewards = losses_at(loss_type, (-12.3, -4.5), (-12.3, -4.5), values=(0.7, 0.7))
    assert found == -F.logsigmoid(torch.tensor(0.0)).item() and rewards == [0.0, 0.0]
    assert_close(found, LOG2)
    assert_close(losses_at("sigmoid", (-12.3, -4.5), (-12.3, -4.5), label_smoothing=0.3)[0], LOG2)
    assert_close(losses_at("rpo", (-12.0, -4.5), (-12.0, -4.5))[0], LOG2 + 3.0)
    assert losses_at("hinge", (-12.0, -4.5), (-12.0, -4.5))[0] == 1.0


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "ipo_sum", "hinge", "simpo", "rpo", "dpop", "step_apo"])
def test_swapping_chosen_and_rejected_flips_the_margin(loss_type):
    _, (chosen, rejected) = losses_at(loss_type, (-5.0, -9.0), (-6.0, -7.5), (4, 7))
    _, (swapped_chosen, swapped_rejected) = losses_at(loss_type, (-9.0, -5.0), (-7.5, -6.0), (7, 4))
    assert chosen - rejected == -(swapped_chosen - swapped_rejected) != 0


def minimum(loss_type, **changes):
    """The margin in units of c - r (ipo: per token) that gradient descent on one pair ends at."""
    logps_PC = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    config, zeros, lengths = config_for(loss_type, **changes), torch.zeros(1, 2), torch.tensor([[2.0, 2.0]])
    optimizer = torch.optim.LBFGS([logps_PC], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = pair_losses(logps_PC, zeros, lengths, zeros, config)[0].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (logps_PC[0, 0] - logps_PC[0, 1]).item()


def test_limits():
    assert minimum("ipo_sum", beta=0.25) == pytest.approx(2.0, abs=1e-6)  # the fixed point 1 / (2 beta)
    assert minimum("ipo", beta=0.25) == pytest.approx(4.0, abs=1e-6)  # the same per token, of which there are two
    assert minimum("sigmoid", label_smoothing=0.1) == pytest.approx(math.log(9) / 0.1, abs=1e-3)
    even = minimum("sigmoid", label_smoothing=0.5)  # pairs that say nothing: stay where you are
    assert even == pytest.approx(0.0, abs=1e-9)
    # SimPO of completions of equal length, gamma 0, is DPO without a reference at beta / length
    simpo, _ = losses_at("simpo", (-5.0, -9.0), (0.0, 0.0), (4, 4), beta=2.0, simpo_gamma=0.0)
    assert_close(simpo, losses_at("sigmoid", (-5.0, -9.0), (0.0, 0.0), beta=0.5)[0], size=LOG2)
    # gamma is subtracted outside beta: a margin of exactly gamma costs log 2
    assert losses_at("simpo", (-4.0, -12.0), (0, 0), (4, 4), beta=2.0, simpo_gamma=4.0)[0] == pytest.approx(LOG2)
    # Step-APO without advantages is DPO; a step whose margin equals its advantage costs log 2
    assert losses_at("step_apo", (-5.0, -9.0), (-6.0, -7.0))[0] == losses_at("sigmoid", (-5.0, -9.0), (-6.0, -7.0))[0]
    assert losses_at("step_apo", (-1.0, -9.0), (-4.0, -7.0), values=(0.75, 0.25))[0] == pytest.approx(LOG2)
    # DPOP and RPO without their term are DPO; DPOP minds a fall of the chosen only
    for changes, loss_type in (({"dpop_lambda": 0.0}, "dpop"), ({"rpo_alpha": 0.0}, "rpo")):
        assert losses_at(loss_type, (-9.0, -12.0), (-6.0, -7.0), **changes) == losses_at("sigmoid", (-9.0, -12.0),
                                                                                         (-6.0, -7.0))
    assert losses_at("dpop", (-5.0, -9.0), (-6.0, -7.0))[0] == losses_at("sigmoid", (-5.0, -9.0), (-6.0, -7.0))[0]


def test_rewards_are_in_the_units_of_the_loss():
    for loss_type in ("sigmoid", "ipo", "rpo", "dpop", "step_apo"):
        rewards = losses_at(loss_type, (-8.0, -9.0), (-7.0, -12.0), (4, 3), beta=0.5)[1]
        assert rewards == pytest.approx([-0.5, 1.5])
    for loss_type in dpo.REFERENCE_FREE:
        assert losses_at(loss_type, (-8.0, -9.0), (0.0, 0.0), (4, 3), beta=0.5)[1] == pytest.approx([-1.0, -1.5])


def test_step_apo_pushes_a_step_the_harder_the_more_it_matters():
    logps_PC = torch.tensor([[-5.0, -5.0]] * 3, requires_grad=True)
    values_PC = torch.tensor([[0.1, 0.0], [0.5, 0.0], [1.0, 0.0]])
    pair_losses(logps_PC, logps_PC.detach(), torch.ones(3, 2), values_PC, config_for("step_apo"))[0].sum().backward()
    pull = -logps_PC.grad[:, 0]
    assert pull[0] < pull[1] < pull[2] and torch.allclose(pull, 0.1 * values_PC[:, 0].sigmoid())


# --- tensors ---


def sums_by_loop(model, pairs):
    """Summed log-probs of both completions [P, C], one sequence and one token at a time."""
    sums = []
    for pair in pairs:
        for ids in (pair.chosen, pair.rejected):
            logps = model(torch.tensor([pair.prompt + ids])).logits[0].log_softmax(-1)
            sums.append(sum(logps[len(pair.prompt) + i - 1, token] for i, token in enumerate(ids)))
    return torch.stack(sums).view(-1, 2)


def step_gradients(model, pairs, config, max_rows=64, max_tokens=0, world=ALONE):
    """(loss, numbers, gradients) of one step through the script's own path, against a reference of zeros minus 3."""
    model.zero_grad()
    policy, total, sums = dpo.PairPolicy(model), 0.0, {}
    reference_PC = torch.full((len(pairs), 2), -3.0)
    lengths = [line_tokens(pair, config.share_prefix) for pair in pairs]
    for part in micro_batches(lengths, max_rows, max_tokens, world):
        batch = collate_pairs(pairs, part, config.share_prefix, world.device)
        loss, numbers = dpo.pair_batch_loss(policy, batch, pairs, reference_PC, len(pairs), config)
        loss.backward()
        total += loss.item()
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in numbers.items()}
    return total, sums, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("share_prefix", [True, False])
def test_log_probs_are_those_of_each_sequence_alone(tiny, share_prefix):
    model, _ = tiny
    pairs = uneven_pairs()
    wanted = sums_by_loop(model, pairs)
    for rows in (list(range(len(pairs))), [3], [6, 0, 2]):
        batch = collate_pairs(pairs, rows, share_prefix, torch.device("cpu"))
        found_PC = dpo.PairPolicy(model)(batch)
        assert_close(found_PC, wanted[rows])
        assert len(batch.targets_N) == sum(len(pairs[row].chosen) + len(pairs[row].rejected) for row in rows)


def test_only_completions_meet_the_head_and_a_shared_prompt_is_computed_once():
    pairs = [Pair([5] * 10, [6, 7, 1], [8, 1])]
    shared, apart = (collate_pairs(pairs, [0], share, torch.device("cpu")) for share in (True, False))
    assert shared.ids_BS.tolist() == [[5] * 10 + [6, 7, 8]] and line_tokens(pairs[0], True) == 13
    assert apart.ids_BS.tolist() == [[5] * 10 + [6, 7], [5] * 10 + [8, 0]] and line_tokens(pairs[0], False) == 24
    for batch in (shared, apart):
        assert batch.targets_N.tolist() == [6, 7, 1, 8, 1] and batch.slots_N.tolist() == [0, 1, 2, 3, 4]
    assert shared.where_N.tolist() == [9, 10, 11, 9, 12] and apart.where_N.tolist() == [9, 10, 11, 21, 22]
    assert shared.positions_BS.tolist() == [[*range(10), 10, 11, 10]]
    assert shared.mask_B1SS[0, 0, 12].tolist() == [True] * 10 + [False, False, True]


def test_a_pair_costs_as_many_tokens_as_its_forward_holds():
    for pair in [*uneven_pairs(), Pair([5] * 3, [6, 7, 1], []), Pair([5], [1], [])]:  # the last two: of a cold start
        for share in (True, False):
            assert line_tokens(pair, share) == collate_pairs([pair], [0], share, ALONE.device).ids_BS.numel()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_gradient_depends_neither_on_micro_batches_nor_on_sharing_the_prefix(tiny, loss_type):
    model, _ = tiny
    pairs, config = uneven_pairs(), config_for(loss_type)
    model.zero_grad()
    logps_PC = sums_by_loop(model, pairs)
    total = 0.0
    for pair, (w, l) in zip(pairs, logps_PC):  # the formula again, on tensors
        n_w, n_l, beta = len(pair.chosen), len(pair.rejected), config.beta
        c, r, v = w + 3.0, l + 3.0, pair.values[0] - pair.values[1]
        total = total + {"sigmoid": lambda: -torch.log(torch.sigmoid(beta * (c - r))),
                         "hinge": lambda: torch.relu(1 - beta * (c - r)),
                         "ipo": lambda: (c / n_w - r / n_l - 1 / (2 * beta)) ** 2,
                         "ipo_sum": lambda: (c - r - 1 / (2 * beta)) ** 2,
                         "simpo": lambda: -torch.log(torch.sigmoid(beta * (w / n_w - l / n_l) - 1.0)),
                         "rpo": lambda: -torch.log(torch.sigmoid(beta * (c - r))) - w / n_w,
                         "dpop": lambda: -torch.log(torch.sigmoid(beta * (c - r - 5.0 * torch.relu(-c)))),
                         "step_apo": lambda: -torch.log(torch.sigmoid(beta * (c - r) - v)),
                         "sft": lambda: -w / n_w}[loss_type]() / len(pairs)
    total.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    for share, max_rows, max_tokens in ((True, 64, 0), (True, 2, 0), (True, 64, 60), (False, 64, 0), (False, 3, 0)):
        config.share_prefix = share
        loss, _, found = step_gradients(model, pairs, config, max_rows, max_tokens)
        assert_close(loss, total)
        assert_close(found, wanted, size=scale)


def test_two_processes_shares_of_a_step_add_up_to_it(tiny):
    model, _ = tiny
    pairs, config = uneven_pairs(5), config_for("sigmoid")
    whole = step_gradients(model, pairs, config)
    parts = [step_gradients(model, pairs, config, 2, 0, World(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    assert_close(parts[0][0] + parts[1][0], whole[0])
    for name in whole[1]:
        assert_close(parts[0][1][name] + parts[1][1][name], whole[1][name], size=-whole[1]["logps/chosen"])
    for name in whole[2]:
        assert_close(parts[0][2][name] + parts[1][2][name], whole[2][name])


def test_numbers_are_what_they_are_called(tiny):
    model, _ = tiny
    pairs, config = uneven_pairs(), config_for("sigmoid")
    logps = sums_by_loop(model, pairs).detach()
    c, r = logps[:, 0] + 3, logps[:, 1] + 3
    _, found, _ = step_gradients(model, pairs, config, 2)
    wanted = {"logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1], "rewards/chosen": 0.1 * c,
              "rewards/rejected": 0.1 * r, "rewards/margins": 0.1 * (c - r), "rewards/accuracies": (c > r).float(),
              "logps/chosen_fell": (c < 0).float()}
    assert_close(found, {name: value.mean() for name, value in wanted.items()}, size=float(-logps.min()))
    assert 0 < found["rewards/accuracies"] < 1


def test_models_that_cannot_share_a_prefix_are_known(tiny):
    model = copy.deepcopy(tiny[0])
    assert dpo.can_share_prefix(model)
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert not dpo.can_share_prefix(model)
    model = copy.deepcopy(tiny[0])
    model.set_attn_implementation("eager")
    assert not dpo.can_share_prefix(model)


# --- data ---


CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2="}]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("implicit", [True, False])
def test_chat_pairs_stand_in_the_context_of_sampling_with_one_bos_and_one_end(template, implicit):
    tokenizer = chat_tokenizer(template)
    answers = [[{"role": "assistant", "content": text}] for text in ("4", "5 no")]
    row = {"prompt": CHAT, "chosen": answers[0], "rejected": answers[1]}
    if implicit:
        row = {"chosen": CHAT + answers[0], "rejected": CHAT + answers[1]}
    pair = row_pair(tokenizer, row, "{prompt}", "row 1")
    end, lead = end_of_turn(tokenizer), " " if template == "mistral" else ""
    assert pair.prompt == encode_prompt(tokenizer, CHAT)
    assert pair.prompt.count(tokenizer.bos_token_id) == ("<bos>" in TEMPLATES[template])
    for ids, text in ((pair.chosen, "4"), (pair.rejected, "5 no")):
        assert tokenizer.decode(ids[:-1]) == lead + text and ids[-1] == end and ids.count(end) == 1
        assert tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("row, prompt, chosen, rejected", [
    ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", "2", "3"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is", " blue.", " black."),
    ({"chosen": "1+1=2", "rejected": "1+1=3"}, "1+1=", "2", "3"),
    ({"prompt": None, "chosen": "a b", "rejected": "a"}, "a", " b", ""),
])
def test_plain_pairs_have_one_bos_where_the_tokenizer_wants_it_and_one_end(row, prompt, chosen, rejected, adds_bos):
    tokenizer = char_tokenizer()
    if adds_bos:
        from tokenizers.processors import TemplateProcessing
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    pair = row_pair(tokenizer, row, "{prompt}", "row 1")
    assert tokenizer.decode(pair.prompt) == "<bos>" * adds_bos + prompt
    assert [tokenizer.decode(ids) for ids in (pair.chosen, pair.rejected)] == [chosen + "<eos>", rejected + "<eos>"]


def test_a_prompt_column_beside_whole_conversations_is_not_doubled():
    tokenizer = chat_tokenizer("chatml")
    rows = [{"prompt": "1+1=", "chosen": CHAT[:2], "rejected": CHAT[:1] + [{"role": "assistant", "content": "3"}]},
            {"prompt": "1+1=", "chosen": CHAT[1:2], "rejected": [{"role": "assistant", "content": "3"}]}]
    assert row_pair(tokenizer, rows[0], "{prompt}", "") == row_pair(tokenizer, rows[1], "{prompt}", "")
    framed = row_pair(tokenizer, rows[1], "Q: {prompt}", "")
    assert "Q: 1+1=" in tokenizer.decode(framed.prompt)


@pytest.mark.parametrize("row, said", [
    ({"prompt": "1", "chosen": "2"}, "wants chosen and rejected"),
    ({"prompt": "1", "chosen": "2", "rejected": 3}, "rejected must be text"),
    ({"prompt": "1", "chosen": "2", "rejected": CHAT[1:2]}, "both be text or both be messages"),
    ({"chosen": CHAT[:2], "rejected": CHAT[1:2]}, "one conversation"),
    ({"chosen": CHAT[1:2], "rejected": [{"role": "assistant", "content": "3"}]}, "one conversation of two messages"),
    ({"chosen": CHAT[:1], "rejected": CHAT[2:]}, "one conversation"),
    ({"chosen": "ab", "rejected": "cd"}, "prompt is empty"),
])
def test_a_row_that_is_no_pair_is_named(row, said):
    with pytest.raises(InputError, match=f"^row 7: .*{said}"):
        row_pair(chat_tokenizer("chatml") if isinstance(row["chosen"], list) else char_tokenizer(), row, "{prompt}",
                 "row 7")


def test_long_and_equal_pairs_are_left_out_and_counted(capsys):
    rows = [{"prompt": "1+1=", "chosen": "2" * n, "rejected": "3"} for n in (1, 30, 2)]
    rows += [{"prompt": "1+1=", "chosen": "2", "rejected": "2"}]
    kept = dpo.make_pairs(rows, char_tokenizer(), Config(max_length=10))
    assert [len(pair.chosen) for pair in kept] == [2, 3]
    assert "of 4 pairs 1 have no difference and 1 are longer than --max_length 10" in capsys.readouterr().out
    with pytest.raises(InputError, match="--max_length 3"):
        dpo.make_pairs(rows, char_tokenizer(), Config(max_length=3))


def test_chain_pairs_are_right_solutions_against_wrong_ones():
    rows = dpo.load_pair_rows(Config(n_train=100, error_rate=0.3))
    answers = {p.prompt: (p.solution, p.answer) for p in load_problems("chain", "train", 100, 0)}
    assert 20 < len(rows) < 100
    for row in rows:
        solution, answer = answers[row["prompt"]]
        assert row["chosen"] == solution and not row["rejected"].endswith(f"#{answer}")


# --- pairs from the policy ---


class Judge:
    """Stands in for the sampler: what follows each start of a completion is looked up, G answers each."""

    def __init__(self, tokenizer, table):
        self.tokenizer, self.table, self.asked = tokenizer, table, []

    def __call__(self, owners, starts):
        texts = [self.tokenizer.decode(start) for start in starts]
        self.asked += texts
        return [[dpo.Attempt(self.tokenizer(rest, add_special_tokens=False).input_ids + [1], right)
                 for rest, right in self.table[text]] for text in texts]


def test_the_first_wrong_step_is_found_by_halving():
    """Of five steps the fourth is the one after which nothing comes right; the last question is about it."""
    tokenizer = char_tokenizer()
    steps = ["a;", "b;", "c;", "X;", "e#9"]
    judge = Judge(tokenizer, {"": [("a;b;c;d;e#5", True), ("a;b;c;X;e#9", False)],
                              "a;b;": [("c;d;e#5", True), ("c;d;e#6", False)], "a;b;c;": [("d;e#5", True)] * 2,
                              "a;b;c;X;": [("e#9", False)] * 2, "a;b;c;d;": [("e#5", True), ("e#7", False)]})
    groups = judge([0], [[]])
    searches = dpo.find_first_wrong_steps(groups, tokenizer, judge, config_for("sigmoid"))
    assert [(s.low, s.high) for s in searches] == [(3, 4)] and judge.asked == ["", "a;b;", "a;b;c;", "a;b;c;X;"]
    pairs = dpo.step_pairs(groups, [[50, 51]], tokenizer, judge, config_for("step_apo"))
    (pair,) = pairs
    assert tokenizer.decode(pair.prompt[2:]) == "".join(steps[:3]) and pair.prompt[:2] == [50, 51]
    assert tokenizer.decode(pair.chosen) == "d;" and tokenizer.decode(pair.rejected) == "X;"
    assert pair.values == (0.5, 0.0) and judge.asked[-1] == "a;b;c;d;"  # measured after the chosen step


def test_a_wrong_last_step_is_paired_with_its_end_token_and_needs_no_measuring():
    tokenizer = char_tokenizer()
    judge = Judge(tokenizer, {"": [("a;b#2", True), ("a;b#3", False)], "a;": [("b#2", True), ("b#4", False)]})
    groups = judge([0], [[]])
    (pair,) = dpo.step_pairs(groups, [[50]], tokenizer, judge, config_for("step_apo"))
    assert [tokenizer.decode(ids) for ids in pair[:3]] == [tokenizer.decode([50]) + "a;", "b#2<eos>", "b#3<eos>"]
    assert pair.values == (1.0, 0.0) and judge.asked == ["", "a;"]


def test_no_pair_where_all_are_right_or_none_is_and_no_step_against_itself():
    tokenizer = char_tokenizer()
    judge = Judge(tokenizer, {"": [("a;b#2", True)] * 2, "a;": [("b#3", False)] * 2})
    right, wrong = judge([0], [[]]), [[dpo.Attempt([9, 1], False)] * 3]
    config = config_for("sigmoid")
    for groups in (right, wrong):
        assert dpo.answer_pairs(groups, [[5]], 1, config) == []
        assert dpo.step_pairs(groups, [[5]], tokenizer, judge, config) == []
    unlucky = Judge(tokenizer, {"": [("a;b#2", True), ("a;b#3", False)], "a;": [("b#3", False)] * 2})
    assert dpo.step_pairs(unlucky([0], [[]]), [[5]], tokenizer, unlucky, config) == []  # "a;" is not wrong


def test_so_many_wrong_completions_of_a_prompt_are_searched():
    tokenizer, config = char_tokenizer(), config_for("sigmoid", pairs_per_prompt=2)
    judge = Judge(tokenizer, {"": [("1#1", True)] + [(f"{n}#{n}", False) for n in (2, 3, 3, 4)]})
    searches = dpo.find_first_wrong_steps(judge([0], [[]]), tokenizer, judge, config)
    assert [tokenizer.decode(search.ids[:-1]) for search in searches] == ["2#2", "3#3"]


def test_what_is_logged_about_pairs(monkeypatch):
    groups = [[dpo.Attempt([n, 1], n < right) for n in range(4)] for right in (0, 2, 4, 1)]
    monkeypatch.setattr(dpo, "sample_attempts", lambda *args: groups)
    config = Config(num_generations=4, pairs_per_prompt=2)
    pairs, about = dpo.sample_pairs(None, None, [None] * 4, [[5]] * 4, 1, config, ALONE)
    assert about == {"reward": 7 / 16, "frac_mixed": 0.5, "num_pairs": 4, "rollouts": 16} and len(pairs) == 4
    judge, asked = Judge(char_tokenizer(), {"": [("a;b#2", True), ("a;b#3", False)], "a;": [("b#2", True)] * 2}), []
    monkeypatch.setattr(dpo, "sample_attempts", lambda decoder, tokenizer, problems, prompts, starts, *rest: (
        asked.append(len(starts)) or judge(range(len(starts)), starts)))
    config = Config(pairs="steps", num_generations=2)
    pairs, about = dpo.sample_pairs(None, judge.tokenizer, [None], [[5]], 1, config, ALONE)
    assert asked == [1, 1] and about["rollouts"] == 4 and about["num_pairs"] == 1  # the search counts, too


def test_answer_pairs_are_right_against_wrong_and_distinct():
    group = [dpo.Attempt([n, 1], n < 3) for n in (0, 1, 2, 2, 3, 4, 4, 5)]
    config = config_for("sigmoid", pairs_per_prompt=7)
    pairs = dpo.answer_pairs([group, group], [[7], [8]], 1, config)
    assert [pair.prompt for pair in pairs] == [[7]] * 7 + [[8]] * 7
    for pair in pairs:
        assert pair.chosen[0] < 3 <= pair.rejected[0]
    assert len({(*pair.chosen, *pair.rejected) for pair in pairs[:7]}) == 7
    assert pairs == dpo.answer_pairs([group, group], [[7], [8]], 1, config)
    assert pairs != dpo.answer_pairs([group, group], [[7], [8]], 2, config)
    config.pairs_per_prompt = 100
    assert len(dpo.answer_pairs([group], [[7]], 1, config)) == 9  # 3 right x 3 wrong


def test_steps_end_with_the_separator_and_tokens_are_never_cut():
    tokenizer = char_tokenizer()
    ids = tokenizer("1+1=2;2+2=4#4").input_ids + [1]
    assert dpo.step_ends(ids, tokenizer, ";") == [6, len(ids)]
    assert dpo.step_ends(ids, tokenizer, "=2") == [5, len(ids)]  # two tokens
    assert dpo.step_ends(ids[:6], tokenizer, ";") == [6] and dpo.step_ends([1], tokenizer, ";") == [1]


def test_sampled_ids_are_trained_as_they_are_and_judged_with_their_start(tiny_model, monkeypatch):
    model, tokenizer = load_model(str(tiny_model))
    problems = load_problems("chain", "train", 6, levels="1-2")
    prompts = [encode_prompt(tokenizer, p.prompt) for p in problems]
    starts = [[], *[tokenizer("1+1=2;").input_ids] * 5]
    config, judged = Config(num_generations=3, max_completion_length=20, temperature=0.7), []
    monkeypatch.setattr(dpo, "verify", lambda text, answer: judged.append(text) or len(judged) % 2 == 0)
    groups = dpo.sample_attempts(model, tokenizer, problems, prompts, starts, 5, config, ALONE)
    rollouts = generate(model, tokenizer, [p + s for p, s in zip(prompts, starts)], 3, 20, 0.7, seed=[0, 5])
    assert [a.ids for group in groups for a in group] == [rollouts.ids(row) for row in range(18)]
    ended = [(i, a) for i, group in enumerate(groups) for a in group if a.ids[-1] == 1]  # only these can be right
    assert judged == [tokenizer.decode(starts[i] + a.ids[:-1]) for i, a in ended] and any(i for i, _ in ended)
    assert [a.right for _, a in ended] == [n % 2 == 1 for n in range(len(ended))]
    assert sum(a.right for group in groups for a in group) == len(ended) // 2


# --- reference, phases ---


def test_the_reference_is_the_policy_as_it_stands(tiny):
    model, pairs, config = copy.deepcopy(tiny[0]), uneven_pairs(), config_for("sigmoid")
    policy = dpo.PairPolicy(model)
    found_PC = dpo.reference_logps(policy, pairs, config, ALONE)
    assert_close(found_PC, sums_by_loop(model, pairs))
    assert policy.training and not found_PC.requires_grad
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    assert not torch.equal(dpo.reference_logps(policy, pairs, config, ALONE), found_PC)  # other weights


def test_offline_runs_compute_the_reference_once(tiny_model, tmp_path, monkeypatch):
    calls, compute = [], dpo.reference_logps
    monkeypatch.setattr(dpo, "reference_logps", lambda policy, pairs, *rest: (
        calls.append(len(pairs)) or compute(policy, pairs, *rest)))
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(tmp_path / "run"), pairs="offline",
                                 error_rate=0.5, resample_steps=1)))
    assert len(calls) == 1 and calls[0] > 8  # all pairs, not those of one step


def test_the_reference_has_no_dropout(tiny):
    model, pairs = copy.deepcopy(tiny[0]), uneven_pairs()
    wanted = sums_by_loop(model.eval(), pairs).detach()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy, config = dpo.PairPolicy(model).train(), config_for("sigmoid", share_prefix=False)
    for _ in range(2):  # the first has left the policy in training, where dropout acts
        assert_close(dpo.reference_logps(policy, pairs, config, ALONE), wanted)
    with torch.no_grad():
        assert not torch.allclose(policy(collate_pairs(pairs, range(7), False, ALONE.device)), wanted, atol=1e-2)


def test_phases_and_rounds():
    config = config_for("sigmoid", max_steps=10, sft_fraction=0.3)
    config.pairs, config.resample_steps, config.sft_learning_rate = "on_policy", 3, 7.0
    assert [dpo.round_of(step, config) for step in range(10)] == (
        [(0, 0)] * 3 + [(1, 3)] * 3 + [(2, 6)] * 3 + [(3, 9)])
    flags = [dpo.phase_of(step, config) for step in range(10)]
    assert [since for _, since in flags] == [0, 1, 2, *range(7)]
    assert [f.loss_type for f, _ in flags] == ["sft"] * 3 + ["sigmoid"] * 7
    assert {f.learning_rate for f, _ in flags[:3]} == {7.0}
    assert [f.max_steps for f, _ in flags] == [3] * 3 + [7] * 7  # each has a schedule of its own
    config.resample_steps = 0
    assert [dpo.round_of(step, config) for step in (2, 3, 9)] == [(0, 0), (1, 3), (1, 3)]


def test_data_opens_from_easy_to_hard():
    config = config_for("sigmoid", easy_to_hard=0.5, max_steps=100)
    assert [dpo.n_open(1000, step, config) for step in (0, 25, 50, 99)] == [200, 600, 1000, 1000]
    config.n_train = 40
    data = dpo.make_data(dpo.load_examples(config), char_tokenizer(), config)
    levels = [pair.level for pair in data.pairs]
    assert levels == sorted(levels) and len(set(levels)) > 1
    assert dpo.n_open(7, 0, config_for("sigmoid")) == 7


def test_rounds_sample_other_prompts_and_at_first_the_easiest_alone(monkeypatch):
    config, asked = Config(loss_type="simpo", round_prompts=20, resample_steps=10, max_steps=40), []
    dpo.check_config(config)
    monkeypatch.setattr(dpo, "refresh", lambda decoder, policy: None)
    monkeypatch.setattr(dpo, "sample_pairs", lambda decoder, tokenizer, problems, prompts, *rest: (
        asked.append((problems, prompts)) or [Pair([5], [6], [7])], {}))
    data = dpo.Data([], [], list(range(100)), [[i] for i in range(100)])

    def problems_of(step):
        dpo.begin_round(data, None, step, None, None, None, config, ALONE)
        problems, prompts = asked[-1]
        assert prompts == [[i] for i in problems] and len(problems) == 20
        return problems

    first, second = problems_of(0), problems_of(10)
    assert set(first) != set(second) and max(first) >= 80
    config.easy_to_hard = 0.75
    found = [max(problems_of(step)) for step in (0, 10, 20, 30)]
    assert found[0] < 20 <= found[1] < 47 <= found[2] < 73 <= found[3]


@pytest.mark.parametrize("pairs", ["offline", "on_policy"])
def test_the_budget_is_split_and_no_example_is_used_twice(pairs):
    config = Config(pairs=pairs, budget=20, sft_fraction=0.25, error_rate=0.5, n_train=200)
    dpo.check_config(config)
    data = dpo.make_data(dpo.load_examples(config), char_tokenizer(), config)
    assert len(data.cold) == 5 and all(pair.rejected == [] and len(pair.chosen) > 3 for pair in data.cold)
    rest = [pair.prompt for pair in data.pairs] + data.prompts
    assert len(rest) == 15 and not {tuple(pair.prompt) for pair in data.cold} & set(map(tuple, rest))


@pytest.mark.parametrize("sampled", [True, False])
def test_a_round_survives_a_checkpoint_to_the_bit(sampled):
    pairs = [pair._replace(rejected=[] if i == 2 else pair.rejected) for i, pair in enumerate(uneven_pairs(4))]
    reference_PC = torch.tensor([[-0.1, 1 / 3], [-1e-30, -123456.789], [0.0, -2**-149], [-3.4028234e38, 1e-45]])
    before = dpo.Round(pairs, reference_PC)
    text = json.loads(json.dumps(before.text(sampled)))  # as it stands in state.json
    assert sampled or len(text) < 200
    after = dpo.restored_round(text, None if sampled else pairs)
    assert after.pairs == before.pairs and after.reference_PC.dtype == torch.float32
    assert torch.equal(after.reference_PC.view(torch.int32), reference_PC.view(torch.int32))


def test_every_float32_comes_back_from_json():
    values_N = torch.arange(-2**31, 2**31, 9973).to(torch.int32).view(torch.float32)
    values_N = values_N[values_N.isfinite()]
    text = dpo.Round([], values_N.view(-1, 1)).text(False)
    assert torch.equal(dpo.restored_round(text, []).reference_PC[:, 0].view(torch.int32), values_N.view(torch.int32))


# --- runs ---


RUN = dict(per_device_train_batch_size=8, max_steps=4, eval_steps=0, save_steps=0, n_train=40, levels="1-2")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def margin_size(line, loss_type):
    """Size of the numbers whose difference is a margin: summed log-probs times beta."""
    return dpo.USUAL_BETA[loss_type] * max(abs(line["logps/chosen"]), abs(line["logps/rejected"]))


@pytest.mark.parametrize("loss_type", LOSSES[:-2])
def test_offline_training_widens_the_margin(tiny_model, tmp_path, loss_type):
    run = tmp_path / "run"
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(run), pairs="offline", n_train=60,
                                 loss_type=loss_type, max_steps=12, learning_rate=2e-3, error_rate=0.5,
                                 eval_steps=12, n_eval=4, max_completion_length=12)))
    before, *lines = metrics(run)
    assert before["step"] == 0 and {"eval/accuracy", "eval/accuracy/low", "eval/accuracy/high"} <= set(before)
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.005
    if loss_type in ("sigmoid", "dpop"):
        assert_close(lines[0]["loss"], LOG2, size=1.0)
    if loss_type != "simpo":
        assert abs(lines[0]["rewards/margins"]) < rounding(margin_size(lines[0], loss_type))
        assert lines[0]["logps/chosen_fell"] == 0
    assert "eval/accuracy" in lines[-1] and (run / "curves.png").is_file()


def right_if_short(text, answer):
    """A verdict that the tiny model, which is never right, sometimes meets."""
    return sum(character.isdigit() for character in text) % 2 == 0


@pytest.mark.parametrize("pairs, loss_type", [("on_policy", "sigmoid"), ("steps", "step_apo"), ("on_policy", "sft")])
def test_pairs_from_the_policy_are_renewed_with_a_fresh_reference(tiny_model, tmp_path, monkeypatch, pairs, loss_type):
    monkeypatch.setattr(dpo, "verify", right_if_short)
    seeds = []
    monkeypatch.setattr(dpo, "generate", lambda *args, seed, **flags: seeds.append(tuple(seed)) or generate(
        *args, seed=seed, **flags))
    run = tmp_path / "run"
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(run), pairs=pairs,
                                 loss_type=loss_type, resample_steps=2, round_prompts=10, num_generations=4,
                                 max_completion_length=20, learning_rate=1e-3, sft_fraction=0.2, max_steps=5)))
    lines = metrics(run)
    assert "reward" not in lines[0] and "rewards/margins" not in lines[0]  # the cold start
    assert [line["rollouts"] for line in lines[1:]] == sorted(line["rollouts"] for line in lines[1:])
    assert lines[1]["rollouts"] >= 40 and lines[3]["rollouts"] >= lines[1]["rollouts"] + 40
    assert len(set(seeds)) == len(seeds) >= 2  # every call of the sampler draws its own numbers
    if loss_type != "sft":
        for fresh in (1, 3):  # the margin is counted anew
            assert abs(lines[fresh]["rewards/margins"]) < rounding(margin_size(lines[fresh], loss_type))
        assert lines[2]["rewards/margins"] != 0


@pytest.mark.parametrize("pairs, loss_type", [("offline", "rpo"), ("steps", "step_apo")])
def test_a_run_stopped_at_every_step_of_both_phases_ends_bit_equal(tiny_model, tmp_path, monkeypatch, pairs, loss_type):
    monkeypatch.setattr(dpo, "verify", right_if_short)
    flags = RUN | dict(model_name_or_path=str(tiny_model), pairs=pairs, loss_type=loss_type, resample_steps=2,
                       round_prompts=10, num_generations=4, max_completion_length=20, learning_rate=1e-3,
                       sft_fraction=0.34, max_steps=6, sft_learning_rate=1e-3, warmup_steps=1,
                       lr_scheduler_type="linear")
    rows, signals = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": "0"} for i in range(20)], []
    monkeypatch.setattr(dpo, "load_pair_rows", lambda config: rows)
    monkeypatch.setattr(dpo, "stop_signals", lambda: signals)
    dpo.main(Config(**flags, output_dir=str(tmp_path / "whole")))
    signals.append(15)
    for _ in range(5):
        with pytest.raises(SystemExit) as ended:
            dpo.main(Config(**flags, output_dir=str(tmp_path / "run")))
        assert ended.value.code == 143
    dpo.main(Config(**flags, output_dir=str(tmp_path / "run")))
    whole, run = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], run[name]) for name in whole)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "run"), strict=True):
        assert {k: v for k, v in a.items() if "time/" not in k} == {k: v for k, v in b.items() if "time/" not in k}


@pytest.mark.parametrize("pairs", ["on_policy", "steps"])
def test_pairs_that_were_sampled_are_written_down_and_train_again(tiny_model, tmp_path, monkeypatch, pairs):
    """pairs.jsonl holds every round's pairs in their order, once, also where the run was stopped within a round; as a
    data set they are the same token ids."""
    monkeypatch.setattr(dpo, "verify", right_if_short)
    made, sample_pairs, train_step, signals = [], dpo.sample_pairs, dpo.train_step, []
    monkeypatch.setattr(dpo, "sample_pairs", lambda *args: made.append(sample_pairs(*args)) or made[-1])
    monkeypatch.setattr(dpo, "stop_signals", lambda: signals)

    def signalled(policy, optimizer, batches, loss_of, step, *rest):
        signals[:] = [15] * (step == 1)
        return train_step(policy, optimizer, batches, loss_of, step, *rest)

    monkeypatch.setattr(dpo, "train_step", signalled)
    run, flags = tmp_path / "run", RUN | dict(model_name_or_path=str(tiny_model), pairs=pairs, resample_steps=2,
                                              round_prompts=10, num_generations=4, max_completion_length=20)
    with pytest.raises(SystemExit):
        dpo.main(Config(**flags, output_dir=str(run)))
    with open(run / "pairs.jsonl", "a") as file:  # of a round that the checkpoint knows nothing of
        file.write('{"step": 3, "prompt": "1+1=", "chosen": "2", "rejected": "3"}\n')
    dpo.main(Config(**flags, output_dir=str(run)))
    rows = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * len(made[0][0]) + [3] * len(made[1][0])
    tokenizer, sampled = char_tokenizer(), [pair for pairs, _ in made for pair in pairs]
    again = [dpo.row_pair(tokenizer, row, "{prompt}", "here") for row in rows]
    end = [tokenizer.eos_token_id]
    for ours, theirs in zip(again, sampled, strict=True):  # what was cut off, and a single step, has no end of its own
        assert ours.prompt == theirs.prompt
        for mine, sampled_ids in zip(ours[1:3], theirs[1:3]):
            assert mine == sampled_ids if sampled_ids[-1:] == end else mine == sampled_ids + end
    if pairs == "on_policy":
        assert {row["prompt"] for row in rows} <= {problem.prompt for problem in load_problems("chain", "train", 40,
                                                                                               levels="1-2")}


def test_a_run_on_offline_pairs_begins_with_the_easiest(tiny_model, tmp_path, monkeypatch):
    levels = []
    monkeypatch.setattr(dpo, "collate_pairs", lambda pairs, rows, *rest: (
        levels.append({pairs[i].level for i in rows}) or collate_pairs(pairs, rows, *rest)))
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(tmp_path / "run"), pairs="offline",
                                 loss_type="simpo", error_rate=0.5, n_train=60, levels="1-3", easy_to_hard=0.75,
                                 micro_batch_tokens=0)))
    assert levels[0] == {1} and levels[1] <= {1, 2} and 3 in levels[3]


def test_the_optimizer_begins_anew_after_the_cold_start(tiny_model, tmp_path):
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(tmp_path / "run"), pairs="offline",
                                 error_rate=0.5, sft_fraction=0.25)))
    (path,) = (tmp_path / "run" / "checkpoints" / "step_4" / "optimizer").glob("*.safetensors")
    kept = load_file(path)
    assert {float(count) for name, count in kept.items() if name.endswith(".step")} == {3.0}


def test_each_phase_has_a_learning_rate_schedule_of_its_own(tiny_model, tmp_path):
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(tmp_path / "run"), pairs="offline",
                                 error_rate=0.5, sft_fraction=0.5, lr_scheduler_type="linear", learning_rate=1e-4,
                                 sft_learning_rate=1e-3)))
    assert [line["learning_rate"] for line in metrics(tmp_path / "run")] == [1e-3, 5e-4, 1e-4, 5e-5]


def test_no_pair_at_all_is_an_error_of_one_line(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "verify", lambda text, answer: False)
    with pytest.raises(dpo.RunError, match="^step 1: of 6 prompts none gave a pair: no right one and a wrong one"):
        dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(tmp_path / "run"),
                                     round_prompts=6, max_completion_length=8)))


def test_where_later_rounds_give_no_pair_the_last_ones_go_on(tiny_model, tmp_path, monkeypatch, capsys):
    begin, seen, rows = dpo.sample_pairs, [], []
    monkeypatch.setattr(dpo.Log, "count", lambda log, state, taken, indices, count=dpo.Log.count: (
        rows.append(indices) or count(log, state, taken, indices)))

    def sample_once(*args):
        seen.append(1)
        pairs, about = begin(*args)
        return (pairs, about) if len(seen) == 1 else ([], about)

    monkeypatch.setattr(dpo, "verify", right_if_short)
    monkeypatch.setattr(dpo, "sample_pairs", sample_once)
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(tmp_path / "run"), round_prompts=10,
                                 resample_steps=2, max_completion_length=20)))
    assert len(seen) == 2 and "warning, step 3" in capsys.readouterr().err
    assert len(metrics(tmp_path / "run")) == 4 and rows[:2] != rows[2:]  # in another order


def test_a_round_without_pairs_is_told_by_one_process_only(monkeypatch, capsys):
    before, config = dpo.Round([], torch.zeros(0, 2)), config_for("sigmoid", resample_steps=2)
    config.pairs = "on_policy"
    monkeypatch.setattr(dpo, "refresh", lambda decoder, policy: None)
    monkeypatch.setattr(dpo, "sample_pairs", lambda *args: ([], {"reward": 0.0}))
    data = dpo.Data([], [], ["a problem"], [[5]])
    for rank in (0, 1):
        world = World(rank, 2, ALONE.device)
        assert dpo.begin_round(data, before, 2, None, None, None, config, world) == (before, {"reward": 0.0})
    assert capsys.readouterr().err.count("warning, step 3") == 1


def test_label_smoothing_half_teaches_nothing(tiny_model, tmp_path):
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(tmp_path / "run"), pairs="offline",
                                 error_rate=0.5, loss_type="sigmoid", label_smoothing=0.5)))
    assert metrics(tmp_path / "run")[0]["grad_norm"] < 1e-4


@pytest.mark.parametrize("flags, named", [
    (dict(loss_type="dpo"), "--loss_type dpo"), (dict(pairs="mine"), "--pairs mine"), (dict(beta=-1), "--beta -1"),
    (dict(label_smoothing=2, loss_type="sigmoid"), "--label_smoothing 2"),
    (dict(label_smoothing=0.1), "--label_smoothing"), (dict(max_steps=0), "--max_steps 0"),
    (dict(loss_type="step_apo"), "--loss_type step_apo"), (dict(temperature=0), "--temperature 0"),
    (dict(num_generations=1), "--num_generations 1"), (dict(sft_fraction=1.5), "--sft_fraction 1.5"),
    (dict(num_train_epochs=1.0), "--num_train_epochs"), (dict(step_separator=""), "--step_separator"),
    (dict(model_name_or_path="no/such/model"), "--model_name_or_path no/such/model"),
    (dict(budget=3, sft_fraction=0.01), "--sft_fraction 0.01"), (dict(sft_fraction=0.1), "--sft_fraction 0.1"),
    (dict(beta=float("nan")), "--beta nan"),
    (dict(pairs="offline", dataset_name="nowhere.jsonl"), "nowhere.jsonl"), (dict(max_length=1), "--max_length 1"),
    (dict(pairs="offline", error_rate=0.0), "--dataset_name chain"),
    (dict(pairs="offline", budget=1000), "--budget 1000"),
    (dict(easy_to_hard=0.5, resample_steps=0), "--easy_to_hard"),
])
def test_wrong_input_is_one_line_and_leaves_nothing(tiny_model, tmp_path, flags, named):
    with pytest.raises(InputError) as caught:
        dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), output_dir=str(tmp_path / "run")) | flags))
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_training_on_files_in_trl_formats(tiny_model, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "0"}) + "\n"
                            for i in range(8)))
    dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), dataset_name=str(path), pairs="offline",
                                 output_dir=str(tmp_path / "run"), per_device_train_batch_size=4,
                                 num_train_epochs=1.5)))
    assert len(metrics(tmp_path / "run")) == 3
    path.write_text(path.read_text() + '{"prompt": "1", "chosen": "2"}\n')
    with pytest.raises(InputError, match="row 9"):
        dpo.main(Config(**RUN | dict(model_name_or_path=str(tiny_model), dataset_name=str(path), pairs="offline",
                                     output_dir=str(tmp_path / "other"))))
