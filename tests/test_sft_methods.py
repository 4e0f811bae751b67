"""sft.py's methods: each loss and its gradient against the formula, adapters, choice of data, and whole runs."""
import copy
import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import faults
import sft
from eval import InputError, char_tokenizer, encode_prompt, generate, load_model, load_problems, verify
from rounding import assert_close, rounding_of_run
from sft import Config, Example, LowRank, World, collate, micro_batches, row_examples, rows_of_step

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def examples():
    """Solutions of one to three steps."""
    problems = load_problems("chain", "train", 12, seed=0, levels="1-3")
    return [row_examples(char_tokenizer(), {"prompt": p.prompt, "completion": p.solution}, "row")[0] for p in problems]


@pytest.fixture(scope="module")
def trained(tiny_model, examples):
    """A model that finds some of these solutions likely, others less, and its tokenizer."""
    model, tokenizer = load_model(str(tiny_model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = collate(examples, range(12), CPU)
    for _ in range(60):
        loss = -sft.Policy(model)(batch)[0].sum() / batch.mask_BS.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def token_logps(model, example):
    """log p of an example's trained tokens, and the distributions they come from, by transformers' own logits."""
    logits = model(torch.tensor([example.ids])).logits[0]
    places = [t for t in range(1, len(example.ids)) if example.trained[t]]
    logps_TV = logits.log_softmax(-1)[[t - 1 for t in places]]
    return logps_TV[range(len(places)), [example.ids[t] for t in places]], logps_TV, places


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_gradients(model, examples, config, notes=None, max_rows=64, max_tokens=0):
    """(loss, numbers, gradients) of one step through the script's own path."""
    model.zero_grad()
    policy, total, sums = sft.Policy(model), 0.0, {}
    if config.loss_type == "stablemax":
        policy.forward = sft.partial(sft.stablemax_forward, policy)
    if config.loss_type == "entropy":
        notes = sft.annotator([], examples, None, config, ALONE)(examples)
    n_tokens = sum(map(sum, notes if config.loss_type == "entropy" else [e.trained[1:] for e in examples]))
    for part in micro_batches([len(e.ids) for e in examples], max_rows, max_tokens, ALONE):
        loss, numbers = sft.batch_loss(policy, collate(examples, part, CPU), notes, n_tokens, config)
        loss.backward()
        total += loss.item()
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in numbers.items()}
    return total, sums, {name: p.grad.clone() for name, p in model.named_parameters()}


# --- dco ---


@pytest.mark.parametrize("n", [1, 2, 16, 1000])
def test_the_factor_turns_one_gradient_into_the_other(n):
    logp = torch.tensor([-1e-6, -0.01, -0.5, -1.0, -3.0, -8.0, -20.0], dtype=torch.float64, requires_grad=True)
    loss = -torch.log(-torch.expm1(n * torch.log1p(-logp.exp())))
    (wanted,) = torch.autograd.grad(loss.sum(), logp)  # of -log p it is -1
    factor = sft.dco_factor(logp, n)
    assert torch.allclose(factor, -wanted, rtol=1e-9, atol=1e-9) and not factor.requires_grad


def test_the_factors_limits():
    logp = torch.tensor([0.0, -1e-9, -1.0, -50.0, -1e4, -torch.inf])
    assert torch.equal(sft.dco_factor(logp, 1).float(), torch.ones(6))  # N = 1 is nll
    factor = sft.dco_factor(logp, 64)
    assert factor[:2].max() < 1e-9 and torch.allclose(factor[3:], torch.ones(3).double())
    assert sft.dco_factor(torch.tensor(-math.log(10_000)), 10_000) == pytest.approx(1 / (math.e - 1), abs=1e-3)
    p = torch.linspace(1e-4, 1, 99)
    assert (sft.dco_factor(p.log(), 16).diff() < 0).all()


@pytest.mark.parametrize("kind", ["dco", "dco_step"])
def test_dco_is_the_gradient_of_its_own_loss(trained, examples, kind):
    """-log(1 - (1 - p)^N), p of the whole solution or of each of its steps, summed and divided by the tokens."""
    model, tokenizer = trained
    total, n_tokens = 0.0, 0
    for example in examples:
        logps, _, places = token_logps(model, example)
        text = [tokenizer.decode([example.ids[t]]) for t in places]
        parts, start = [], 0
        for i in range(len(text)):
            if i == len(text) - 1 or (kind == "dco_step" and text[i] == ";"):
                parts.append(logps[start : i + 1].double().sum())
                start = i + 1
        total = total + sum(-torch.log(-torch.expm1(8 * torch.log1p(-logp.exp()))) for logp in parts)
        n_tokens += len(places)
    wanted = gradients(model, total / n_tokens)
    config = Config(loss_type=kind, dco_n=8)
    notes = sft.annotator([], examples, tokenizer, config, ALONE)(examples)
    for max_rows, max_tokens in ((12, 0), (1, 0), (5, 64)):
        _, numbers, found = step_gradients(model, examples, config, notes, max_rows, max_tokens)
        assert_close(found, wanted)
        assert 0.05 < numbers["dco/factor"] < 1
    assert max(notes[2]) == (2 if kind == "dco_step" else 0)  # three steps


def test_dco_with_one_sample_is_nll(trained, examples):
    loss, _, wanted = step_gradients(trained[0], examples, Config())
    for kind in ("dco", "dco_step", "dco_a"):
        notes = [[0.5] if kind == "dco_a" else sft.step_numbers(e, {30}) for e in examples]
        again, numbers, found = step_gradients(trained[0], examples, Config(loss_type=kind, dco_n=1), notes)
        assert again == loss
        assert_close(numbers["nll"], loss)
        assert_close(numbers["dco/factor"], 1)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_dco_a_weighs_rows_by_their_pass_rate(trained, examples):
    rates = [[i / 11] for i in range(12)]
    total = n_tokens = 0
    for example, (rate,) in zip(examples, rates):
        p, (logps, _, _) = torch.tensor(rate, dtype=torch.float64), token_logps(trained[0], example)
        factor = 4 * p * (1 - p) ** 3 / (1 - (1 - p) ** 4) if rate else 1.0
        total, n_tokens = total - factor * logps.sum(), n_tokens + len(logps)
    wanted = gradients(trained[0], total / n_tokens)
    for max_rows in (12, 1, 5):
        _, _, found = step_gradients(trained[0], examples, Config(loss_type="dco_a", dco_n=4), rates, max_rows)
        assert_close(found, wanted)


def test_pass_rates_are_those_of_the_samples(monkeypatch):
    model, tokenizer = load_model("tiny")
    problems = load_problems("chain", "train", 7, levels="1")
    prompts, answers = [encode_prompt(tokenizer, p.prompt) for p in problems], [str(i) for i in range(7)]
    config = Config(num_generations=40, max_completion_length=3)
    rates = sft.pass_rates(model, tokenizer, prompts, answers, [3, 1], config, ALONE)
    texts = generate(model, tokenizer, prompts, 40, 3, seed=[3, 1]).texts(tokenizer)
    assert rates == [sum(verify(text, a) for text in texts[40 * i : 40 * i + 40]) / 40 for i, a in enumerate(answers)]
    assert 0 < sum(rates) < 3
    monkeypatch.setattr(sft.dist, "all_reduce", lambda values: None)  # each process's own part of the sum
    shares = [sft.pass_rates(model, tokenizer, prompts, answers, [3, 1], config, World(rank, 2, CPU))
              for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares)] == rates


def test_each_step_measures_pass_rates_with_samples_of_its_own():
    model, tokenizer = load_model("tiny")
    rows = [{"prompt": f"{i}=", "completion": str(i), "answer": str(i)} for i in range(5)]
    config = Config(loss_type="dco_a", num_generations=40, max_completion_length=3)
    examples = sft.make_examples(rows, tokenizer, config)
    rates = sft.annotator(rows, examples, tokenizer, config, ALONE)
    first, second, again = (rates(examples, model, sft.Policy(model), step) for step in (0, 1, 0))
    assert first == again != second
    moved = copy.deepcopy(model)  # a decoder that is a copy takes the policy's weights first
    moved.lm_head.weight.data *= 50
    assert rates(examples, model, sft.Policy(moved), 0) == rates(examples, moved, sft.Policy(moved), 0) != first


def test_a_factor_of_one_is_warned_of_once(capsys):
    state, config = {"step": 9}, Config(loss_type="dco", max_steps=500)
    for factor in [1.0] * 99 + [0.5] + [0.999] * 300:
        sft.warn_of_idle_factor(state, factor, config, ALONE)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "--dco_n 16" in said and "dco_step" in said


# --- entropy, stablemax, perp_grad ---


@pytest.mark.parametrize("share, discount", [(0.8, 0.8), (0.3, 1.0), (0.01, 0.0), (1.0, 0.8)])
def test_entropy_keeps_the_most_surprising_tokens_of_each_row(trained, examples, share, discount):
    total, n_tokens, entropy = 0.0, 0, 0.0
    for example in examples:
        logps, logps_TV, _ = token_logps(trained[0], example)
        scores = [(-logp + discount * (row.exp() * row).sum()).item() for logp, row in zip(logps, logps_TV)]
        n = max(1, math.floor(share * len(scores) + 1e-9))
        kept = sorted(range(len(scores)), key=lambda t: -scores[t])[:n]
        total, n_tokens = total - logps[kept].sum(), n_tokens + n
        entropy -= (logps_TV.exp() * logps_TV).sum(1)[kept].sum().detach()
    wanted = gradients(trained[0], total / n_tokens)
    config = Config(loss_type="entropy", entropy_keep=share, entropy_discount=discount)
    for max_rows, max_tokens in ((12, 0), (1, 0), (5, 64)):
        loss, numbers, found = step_gradients(trained[0], examples, config, None, max_rows, max_tokens)
        assert_close(loss, total / n_tokens)
        assert_close(found, wanted)
        assert_close(numbers["entropy"], entropy / n_tokens)  # of the kept tokens


def test_stablemax_against_a_loop(trained, examples):
    total, n_tokens = 0.0, 0
    for example in examples:
        logits = trained[0](torch.tensor([example.ids])).logits[0].double()
        for t in range(1, len(example.ids)):
            if example.trained[t]:
                s = torch.stack([z + 1 if z >= 0 else 1 / (1 - z) for z in logits[t - 1]])
                total, n_tokens = total - torch.log(s[example.ids[t]] / s.sum()), n_tokens + 1
    wanted = gradients(trained[0], total / n_tokens)
    for max_rows in (12, 5):
        loss, _, found = step_gradients(trained[0], examples, Config(loss_type="stablemax"), None, max_rows)
        assert_close(loss, total / n_tokens)
        assert_close(found, wanted)


def test_stablemax_has_slope_one_at_zero_and_takes_chunks_and_caps():
    torch.manual_seed(0)
    weight_VD = torch.zeros(5, 3, requires_grad=True)
    hidden_BD, targets_B = torch.randn(4, 3), torch.tensor([0, 1, 2, 4])
    (grad_VD,) = torch.autograd.grad(sft.stablemax_rows(hidden_BD, weight_VD, targets_B, None).sum(), weight_VD)
    assert_close(grad_VD, (F.one_hot(targets_B, 5) - 0.2).T @ hidden_BD)
    weight_VD = torch.randn(5, 3)
    capped = sft.stablemax_rows(hidden_BD, weight_VD, targets_B, 2.0)
    z = 2 * torch.tanh(hidden_BD @ weight_VD.T / 2)
    s = torch.where(z >= 0, z + 1, 1 / (1 - z))
    assert_close(capped, (s / s.sum(1, keepdim=True)).log()[range(4), targets_B])


def test_perp_grad_drops_what_lengthens_a_matrix_and_keeps_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = sft.make_optimizer(model, Config(learning_rate=0.1))
    optimizer.register_step_pre_hook(sft.perp_grad)
    model(torch.randn(5, 4)).square().sum().backward()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.grad.clone()
    g = model[0].weight.grad.clone()
    wanted = g - (weight * g).sum() / weight.square().sum() * weight
    optimizer.step()
    found = model[0].weight.grad
    assert_close(found, wanted * g.norm() / wanted.norm())
    assert_close((found * weight).sum(), 0, size=float(found.norm() * weight.norm()))
    assert_close(found.norm(), g.norm())
    assert torch.equal(model[0].bias.grad, bias)
    first = (found.abs() > 1e-6) * -0.1 * found.sign()  # AdamW's first step: what it moved by is the new gradient's
    assert torch.allclose(model[0].weight - weight, first, atol=1e-4)


# --- adapters ---


def adapted(init, rank=3, examples=None, **flags):
    """(the model with adapters, the model without, config)."""
    model, tokenizer = load_model("tiny")
    config = Config(lora_rank=rank, lora_init=init, learning_rate=1e-2, **flags)
    if examples is None:
        rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(20)]
        examples = [row_examples(tokenizer, row, "row")[0] for row in rows]
    before = copy.deepcopy(model)
    sft.add_adapters(model, sft.adapter_places(model, config), examples, 8, config, ALONE)
    return model, before, config, examples


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_adapters_begin_as_the_model_itself(init):
    model, before, _, _ = adapted(init)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, before(ids).logits)
    if init == "gaussian":  # as PEFT's: the standard deviation of A is 1 / rank
        down = torch.cat([layer.down.flatten() for layer in model.modules() if isinstance(layer, LowRank)])
        assert down.std().item() == pytest.approx(1 / 3, rel=0.05)
        again, other = (adapted(init, seed=seed)[0].model.layers[0].mlp.up_proj.down for seed in (0, 1))
        first = model.model.layers[0].mlp.up_proj.down
        assert torch.equal(again, first) and not torch.equal(other, first)  # --seed decides, the same on all processes


@pytest.mark.parametrize("init", ["gaussian", "pissa", "lora_sb"])
def test_only_adapters_train_and_the_merged_model_computes_the_same(init, tmp_path):
    model, before, config, examples = adapted(init)
    trainable = {name.rsplit(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == ({"core"} if init == "lora_sb" else {"up", "down"})
    layers = [layer for layer in model.modules() if isinstance(layer, LowRank)]
    assert len(layers) == 7 * 3 and not isinstance(model.lm_head, LowRank)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    for name, p in before.named_parameters():  # neither embeddings, head, norms nor the layers' own weights have moved
        assert torch.equal(model.get_parameter(name), p), name
    ids = torch.arange(40).view(2, 20)
    logits = model(ids).logits
    assert (logits - before(ids).logits).abs().max() > 0.1
    sft.save_model(tmp_path / "saved", sft.Policy(model), char_tokenizer(), ALONE)
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == before.state_dict().keys()
    again = type(model).from_pretrained(tmp_path / "saved")
    assert_close(again(ids).logits, logits)


def test_pissa_begins_with_the_largest_singular_values():
    model, before, _, _ = adapted("pissa", rank=5)
    layer, weight = model.model.layers[1].mlp.up_proj, before.model.layers[1].mlp.up_proj.weight
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    assert_close(layer.up @ layer.down, (u[:, :5] * values[:5]) @ v[:5])
    assert_close(layer.up.T @ layer.up, values[:5].diag())  # both factors have the square roots
    assert_close(layer.down @ layer.down.T, values[:5].diag())
    left = torch.linalg.svdvals(weight - layer.up @ layer.down)  # what PiSSA calls the residual
    assert_close(left[: len(values) - 5], values[5:], size=float(values[0]))


def test_pissa_equals_that_of_peft():
    peft = pytest.importorskip("peft")
    _, before, _, _ = adapted("pissa")
    theirs = peft.get_peft_model(copy.deepcopy(before), peft.LoraConfig(
        r=3, lora_alpha=3, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]))
    model, _, _, _ = adapted("pissa")
    for name in ("layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"):
        ours, layer = model.model.get_submodule(name), theirs.base_model.model.model.get_submodule(name)
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        signs = (ours.down * down).sum(1).sign()
        assert_close(ours.down, signs[:, None] * down)
        assert_close(ours.up, signs * up)


def test_lora_sb_begins_one_truncated_step_of_adamw_away():
    """-rate x sign(gradient of the first step's rows), of which rank 3 is the nearest matrix of that rank."""
    model, before, config, examples = adapted("lora_sb", warmup_steps=4, micro_batch_tokens=16)
    rows = [examples[i] for i in rows_of_step(20, 8, 0, 0)]
    n_tokens = sum(sum(e.trained[1:]) for e in rows)
    for part in micro_batches([len(e.ids) for e in rows], 64, 16, ALONE):  # of a gradient near 0 the order has the sign
        batch = collate(rows, part, CPU)
        sft.nll_loss(sft.Policy(before)(batch)[0], batch.mask_BS, n_tokens).backward()
    for name in ("layers.0.self_attn.k_proj", "layers.2.mlp.gate_proj"):
        layer, plain = model.model.get_submodule(name), before.model.get_submodule(name)
        step = -1e-2 / 4 * plain.weight.grad.sign()
        u, values, v = torch.linalg.svd(step, full_matrices=False)
        update = layer.merged() - layer.weight
        assert_close(update, (u[:, :3] * values[:3]) @ v[:3], size=float(layer.weight.abs().max()))
        assert_close(layer.up.T @ layer.up, torch.eye(3))
        assert_close(layer.down @ layer.down.T, torch.eye(3))
        assert (step - update).norm() < step.norm() and torch.equal(layer.weight, plain.weight)
        assert layer.weight.grad is None


def test_a_tied_embedding_is_never_adapted(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
    tokenizer = char_tokenizer()
    torch.manual_seed(0)
    tied = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), eos_token_id=1, hidden_size=32, intermediate_size=64,
                                        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                        tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    sft.main(Config(model_name_or_path=str(tmp_path / "tied"), output_dir=str(tmp_path / "run"), lora_rank=2,
                    max_steps=3, n_train=16, per_device_train_batch_size=8, learning_rate=1e-2, warmup_steps=0,
                    eval_steps=0, save_steps=0))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.model.embed_tokens.weight, tied.model.embed_tokens.weight)
    assert not torch.equal(found.model.layers[0].mlp.up_proj.weight, tied.model.layers[0].mlp.up_proj.weight)


# --- data ---


def test_select_takes_its_end_of_the_pass_rates():
    rates = [0.0, 1.0, 0.25, 0.5, 0.0, 0.75, 0.125, 1.0]
    assert sft.select_rows(rates, 3, "hard", 0) == [6, 2, 3]
    assert sft.select_rows(rates, 8, "hard", 0)[6:] in ([0, 4], [4, 0])  # never solved: last
    assert set(sft.select_rows(rates, 3, "easy", 0)) == {1, 7, 5}
    drawn = {tuple(sorted(sft.select_rows(rates, 3, "uniform", seed))) for seed in range(50)}
    assert len(drawn) > 20 and all(len(set(rows)) == 3 for rows in drawn)


def test_a_run_trains_on_the_selected_problems_and_says_how_often_they_were_solved(tmp_path, capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(sft, "pass_rates", lambda decoder, tokenizer, prompts, *_: [
        seen.setdefault("pool", len(prompts)) and int(tokenizer.decode(ids)[:1]) / 10 for ids in prompts])
    monkeypatch.setattr(sft, "annotator", lambda rows, examples, *_: seen.update(data=examples) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sft.main(Config(output_dir=str(tmp_path / "run"), select="easy", n_train=10, select_pool=60, levels="1"))
    tokenizer = char_tokenizer()
    firsts = [int(tokenizer.decode(e.ids)[:1]) for e in seen["data"]]
    assert seen["pool"] == 60 and len(firsts) == 10 and min(firsts) >= 6 and "of 60 problems" in capsys.readouterr().out


@pytest.mark.parametrize("share, solution", [(1.0, "a;b;c;d;e#9"), (0.5, "a;c;e#9"), (0.25, "a;e#9"), (0.1, "e#9"),
                                             (0.8, "b;c;d;e#9"), (0.6, "b;d;e#9"), (0.4, "c;e#9")])
def test_a_budget_keeps_a_share_of_the_steps_and_the_answer(share, solution):
    row = sft.with_budget({"prompt": "x=", "completion": "a;b;c;d;e#9"}, share, ";", "row")
    assert row == {"prompt": f"[{100 * share:g}%]x=", "completion": solution}
    messages = [{"role": "user", "content": "x"}]
    chat = sft.with_budget({"prompt": messages, "completion": "a\nb\n#### 9"}, 0.5, "\n", "row")
    assert chat["prompt"][0]["content"] == "[50%]x" and chat["completion"] == "a\n#### 9"


def test_budgets_are_drawn_for_each_row_whatever_its_level():
    rows = sft.load_training_rows(Config(n_train=400, levels="1-4", thought_budgets=[1.0, 0.25], error_rate=0))
    tags = {(row["prompt"].split("]")[0], i % 4): 0 for i, row in enumerate(rows)}
    assert len(tags) == 8
    for row in rows:
        assert row["completion"].count(";") == 0 or row["prompt"].startswith("[100%]")
        assert verify(row["completion"], row["answer"])
    other = sft.load_training_rows(Config(n_train=400, levels="1-4", thought_budgets=[1.0, 0.25], error_rate=0, seed=1))
    tags, others = ([row["prompt"].split("]")[0] for row in found] for found in (rows, other))
    assert tags != others


# --- schedule and replay ---


def test_rewarmed_rates():
    for how, peak in (("keep", 0.2), ("half", 1.0), ("full", 2.0)):
        config = Config(rewarm=how, learning_rate=2.0, warmup_steps=4, max_steps=12)
        rates = [sft.rewarmed_rate(step, config) for step in range(13)]
        assert rates[:4] == pytest.approx([0.2 + (peak - 0.2) * (i + 1) / 4 for i in range(4)])
        assert rates[4:] == pytest.approx([0.2 + (peak - 0.2) * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)])


def test_a_run_goes_by_the_rewarmed_rate_and_replays_its_share(tmp_path, monkeypatch):
    old = Config(output_dir=str(tmp_path / "old"), domains="mul", levels="1", n_train=20, max_steps=2, eval_steps=0,
                 save_steps=0, per_device_train_batch_size=8)
    sft.main(old)
    moved, texts, tokenizer = [], [], char_tokenizer()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, original=torch.optim.AdamW.step: (
        moved.append(self.param_groups[1]["lr"]), original(self))[1])
    collate = sft.collate
    monkeypatch.setattr(sft, "collate", lambda examples, rows, device: (
        texts.extend(tokenizer.decode(examples[i].ids) for i in rows), collate(examples, rows, device))[1])
    new = Config(output_dir=str(tmp_path / "new"), model_name_or_path=str(tmp_path / "old"), domains="add", levels="2",
                 n_train=20, max_steps=4, warmup_steps=2, learning_rate=1e-3, rewarm="half", eval_steps=0, save_steps=0,
                 per_device_train_batch_size=8, replay_from=str(tmp_path / "old"), replay_share=0.25)
    sft.main(new)
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert moved == [line["learning_rate"] for line in lines] == [sft.rewarmed_rate(step, new) for step in range(4)]
    assert len(texts) == 32 and sum("*" in text for text in texts) == 8  # 2 of each step's 8 rows
    assert all(sum("*" in text for text in texts[i : i + 8]) == 2 for i in range(0, 32, 8))


def test_a_replayed_data_set_is_whole_and_passes_are_counted_in_new_rows(tmp_path):
    mine = dict(levels="2", domains="mul", n_train=16, replay_from="chain", replay_share=0.25)
    replayed = sft.load_replay(Config(**mine, error_rate=0.0))
    assert {"+", "-", "*"} <= {sign for row in replayed for sign in row["prompt"]}
    assert {row["prompt"].count("=") and len(row["completion"].split(";")) for row in replayed} == {1, 2, 3, 4, 5}
    sft.main(Config(**mine, output_dir=str(tmp_path / "run"), num_train_epochs=1.5, per_device_train_batch_size=8,
                    eval_steps=0, save_steps=0))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4  # 24 rows, 6 a step


def test_a_replay_holds_the_rows_that_a_selection_took(tmp_path):
    old = Config(output_dir=str(tmp_path / "old"), levels="2-3", select="easy", n_train=5, select_pool=20, max_steps=1,
                 eval_steps=0, per_device_train_batch_size=4, num_generations=2, max_completion_length=4,
                 thought_budgets=[0.5])
    sft.main(old)
    state = json.loads((tmp_path / "old" / "checkpoints" / "step_1" / "state.json").read_text())
    pool = sft.load_training_rows(old)
    found = sft.load_replay(Config(replay_from=str(tmp_path / "old"), replay_share=0.5))
    assert found == [pool[i] for i in state["selected"]] and len(found) == 5 and len(pool) == 20
    assert all(row["prompt"].startswith("[50%]") for row in found)


# --- whole runs ---

SFT = dict(n_train=20, levels="1-2", per_device_train_batch_size=8, micro_batch_tokens=64, max_steps=4, save_steps=2,
           eval_steps=4, n_eval=4, max_completion_length=8, warmup_steps=2, logging_steps=1, num_generations=4,
           learning_rate=1e-2)
RUNS = {
    "dco_a_select": dict(loss_type="dco_a", dco_n=4, select="hard", select_pool=30, num_generations=16),
    "dco_step_budgets": dict(loss_type="dco_step", thought_budgets=[1.0, 0.5], rewarm="full"),
    "entropy_replay": dict(loss_type="entropy", replay_from="chain", replay_share=0.25),
    "stablemax_perp": dict(loss_type="stablemax", perp_grad=True),
    "dco_pissa": dict(loss_type="dco", lora_rank=2, lora_init="pissa"),
    "lora_sb": dict(lora_rank=2, lora_init="lora_sb"),
    "gaussian": dict(lora_rank=2),
}


@pytest.fixture(scope="module")
def half_known(tmp_path_factory):
    """(data of 30 short sums, a model that solves some of them at times): pass rates between 0 and 1."""
    folder = tmp_path_factory.mktemp("half_known")
    rows = [{"prompt": f"{i}+1=", "completion": str((i + 1) % 10), "answer": str((i + 1) % 10)} for i in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes, text = faults.run("sft", dict(dataset_name=folder / "data.jsonl", output_dir=folder / "model", max_steps=40,
                                         per_device_train_batch_size=16, learning_rate=1e-2, save_steps=0))
    assert codes == [0], text
    return dict(dataset_name=folder / "data.jsonl", model_name_or_path=folder / "model")


@pytest.fixture(scope="module")
def whole(tiny_model, half_known, tmp_path_factory):
    """whole(name): flags and folder of the run of RUNS that nothing has disturbed, made once."""
    made = {}

    def folder(name):
        if name not in made:
            flags = {**SFT, "model_name_or_path": tiny_model, **RUNS[name]}
            if name == "dco_a_select":
                flags |= {**half_known, "learning_rate": 1e-3}
            made[name] = flags, tmp_path_factory.mktemp("whole") / name
            codes, text = faults.run("sft", {**flags, "output_dir": made[name][1]})
            assert codes == [0], text
        return made[name]

    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_bit_equal(whole, tmp_path, name):
    flags, expected = whole(name)
    mine = {**flags, "output_dir": tmp_path / "run"}
    codes, text = faults.run("sft", mine, {"signal_at": [3, signal.SIGTERM]})
    assert codes == [143], text
    codes, text = faults.run("sft", mine)
    assert codes == [0] and "continues from" in text, text
    faults.assert_same(tmp_path / "run", expected)
    factors = [json.loads(line)["dco/factor"] for line in faults.numbers_of(expected)] if name == "dco_a_select" else []
    assert all(0.02 < factor < 0.98 for factor in factors)  # or the pass rates were all alike


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(whole, tmp_path, name):
    flags, expected = whole(name)
    mine = {**flags, "output_dir": tmp_path / "run", "per_device_train_batch_size": 4}
    codes, text = faults.run("sft", mine, ranks=2)
    assert codes == [0, 0], text
    assert faults.largest_difference(tmp_path / "run", expected) < rounding_of_run(expected)


@pytest.mark.parametrize("name", ["dco_step_budgets", "entropy_replay", "stablemax_perp"])
def test_memory_flags_change_nothing(whole, tmp_path, name):
    flags, expected = whole(name)
    mine = {**flags, "output_dir": tmp_path / "run", "micro_batch_tokens": 1}
    codes, text = faults.run("sft", mine)
    assert codes == [0], text
    assert faults.largest_difference(tmp_path / "run", expected) < rounding_of_run(expected)


def test_a_checkpoint_of_adapters_is_a_plain_model(whole):
    _, run = whole("dco_pissa")
    last, end = (load_file(folder / "model.safetensors") for folder in (run / "checkpoints" / "step_4", run))
    assert last.keys() == end.keys() and all(torch.equal(last[name], end[name]) for name in end)
    [shard] = (run / "checkpoints" / "step_4" / "optimizer").iterdir()
    kinds = {name.rsplit(".")[-1] for name in load_file(shard)}
    assert kinds == {"up", "down", "up0", "down0", "step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("flags, named", [
    (dict(loss_type="ce"), "--loss_type ce"), (dict(dco_n=0), "--dco_n 0"), (dict(select="best"), "--select best"),
    (dict(select="hard", n_train=0), "--select hard"), (dict(select="hard", select_pool=3, n_train=9), "--select_pool"),
    (dict(entropy_keep=0.0), "--entropy_keep 0.0"), (dict(entropy_discount=float("nan")), "--entropy_discount nan"),
    (dict(thought_budgets=[0.5, 2.0]), "--thought_budgets 2.0"), (dict(step_separator=""), "--step_separator"),
    (dict(step_separator="x", thought_budgets=[0.5]), "--step_separator 'x'"),
    (dict(step_separator="x", loss_type="dco_step"), "--step_separator 'x'"),
    (dict(rewarm="hot"), "--rewarm hot"), (dict(replay_share=0.5), "--replay_share 0.5"),
    (dict(replay_from="chain"), "--replay_share 0.0"), (dict(replay_from="chain", replay_share=0.001), "no row"),
    (dict(replay_from="nowhere", replay_share=0.5), "nowhere"), (dict(lora_init="eva"), "--lora_init eva"),
    (dict(lora_rank=65), "--lora_rank 65"), (dict(lora_rank=2, perp_grad=True), "--perp_grad"),
    (dict(num_generations=0), "--num_generations 0"),
])
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, flags, named):
    with pytest.raises(InputError) as caught:
        sft.main(Config(**{"output_dir": str(tmp_path / "run"), "eval_steps": 0, "n_train": 30, **flags}))
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # or the right flags would be refused there


@pytest.mark.parametrize("flags", [dict(loss_type="dco_a"), dict(select="hard"), dict(thought_budgets=[0.5])])
def test_methods_that_need_answers_or_texts_say_so(tmp_path, flags):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "1+1=", "completion": "2", "answer": "2"}, {"messages": [{"role": "user", "content": "hi"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="data.jsonl: row 2"):
        sft.main(Config(dataset_name=str(path), output_dir=str(tmp_path / "run"), max_steps=1, **flags))


def test_example_stays_plain():
    assert sft.step_numbers(Example([9, 5, 7, 5, 8], [False, False, True, True, True]), {5}) == [0, 0, 0, 1]
