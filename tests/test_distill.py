"""distill.py: RLT's reward against loops, contexts spliced token by token, divergences and gradients, data, and runs."""
import copy
import gc
import json
import math
import os
import shutil
import signal
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import eval as ground
from distill import (Config, Example, Imitate, Learner, Reinforce, World, check_config, collate, divergence,
                     implausibility, score_explanations, teacher_loss, thought_weights, understanding)
from eval import InputError, Problem, Rollouts, char_tokenizer, load_model
from faults import assert_same, largest_difference, run
from rounding import assert_close, rounding_of_run

ALONE = World(0, 1, torch.device("cpu"))
KINDS = ["forward", "reverse", "jsd"]


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    monkeypatch.setattr("eval.plot_runs", lambda runs, path: path.write_bytes(b""))


def config(**flags):
    made = Config(**{"model_name_or_path": "tiny", "teacher_model_name_or_path": "tiny", "eval_steps": 0, "save_steps": 0,
                     "num_generations": 4, "max_completion_length": 12, "teacher_batch_size": 8, **flags})
    check_config(made)
    distill.fill_formats(made, char_tokenizer())
    return made


def model_of(hidden, seed, layers=1):
    """A small random model of the character vocabulary."""
    tokenizer = char_tokenizer()
    sizes = {**ground.TINY, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(seed)
    made = ground.Qwen3ForCausalLM(ground.Qwen3Config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # sharp enough for every divergence to be far from 0
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a small student and a larger teacher of the same vocabulary, its head padded by 5 rows."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name, model in (("student", model_of(32, 0)), ("teacher", model_of(48, 1, layers=2))):
        if name == "teacher":
            model.resize_token_embeddings(len(char_tokenizer()) + 5)
        made[name] = str(root / name)
        model.save_pretrained(made[name])
        char_tokenizer().save_pretrained(made[name])
    return made


# --- the reward ---


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5])
def test_reward_terms_equal_loops(alpha):
    generator = torch.Generator().manual_seed(1)
    teacher, student = (-torch.rand(5, 14, generator=generator).double() * 4 for _ in range(2))
    spans = [(0, 3, 4, 9), (2, 2, 2, 3), (1, 9, 10, 14), (0, 1, 1, 14), (5, 8, 9, 10)]  # thought from-to, solution from-to
    thought, solution = torch.zeros(5, 14, dtype=torch.bool), torch.zeros(5, 14, dtype=torch.bool)
    for row, (a, b, c, d) in enumerate(spans):
        thought[row, a:b], solution[row, c:d] = True, True
    clear, forced = understanding(student, solution, alpha), implausibility(teacher, student, thought, alpha)
    for row, (a, b, c, d) in enumerate(spans):
        known = [float(student[row, t]) for t in range(c, d)]
        assert float(clear[row]) == pytest.approx(sum(known) / len(known) + alpha * min(known), abs=1e-9)
        gaps = [float(teacher[row, t] - student[row, t]) for t in range(a, b)]
        wanted = sum(gaps) / len(gaps) + alpha * max(gaps) if gaps else 1 + alpha
        assert float(forced[row]) == pytest.approx(wanted, abs=1e-9)


def rollouts_of(texts, finished, T=12, seed=0):
    """Rollouts that say these texts, with made-up log-probs."""
    tokenizer, rows = char_tokenizer(), []
    for text, done in zip(texts, finished):
        rows.append(tokenizer(text).input_ids + [tokenizer.eos_token_id] * done)
    tokens = torch.tensor([ids + [7] * (T - len(ids)) for ids in rows])  # what stands past the length means nothing
    logps = -torch.rand(len(rows), T, generator=torch.Generator().manual_seed(seed))
    return Rollouts(tokens, logps, torch.tensor([len(ids) for ids in rows]), torch.tensor(finished))


@pytest.mark.parametrize("flags", [{}, {"micro_batch_tokens": 1}, {"temperature": 0.7, "rlt_alpha": 0.2}])
def test_the_student_reads_exactly_its_own_context(flags):
    """Scores against a loop over texts written out by hand, tags, empty and cut-off thoughts included."""
    tokenizer, student = char_tokenizer(), model_of(32, 3)
    c = config(thought_prefix="<t>", thought_suffix="</t> ", **flags)
    problems = [Problem("37+5-8=", "34", "37+5=42;42-8=34#34"), Problem("9-2=", "7", "9-2=7#7")]
    lessons = distill.make_lessons(problems, tokenizer, c)
    texts, finished = ["37+5=42", "", "34#34", "37+5", "9-2=7;9-2=7", "7"], [True, True, True, False, True, True]
    rollouts = rollouts_of(texts, finished)
    tags = distill.make_tags(tokenizer, c)
    found = score_explanations(Learner(student), lessons, rollouts, tags, c, ALONE)
    for row, text in enumerate(texts):
        problem = problems[row // 3]
        before, solution = f"{problem.prompt}<t>", f"#{problem.answer}"
        whole = tokenizer(f"{before}{text}</t> {solution}").input_ids
        logps = (student(torch.tensor([whole])).logits[0] / c.temperature).log_softmax(-1)
        each = [float(logps[t - 1, whole[t]]) for t in range(1, len(whole))]
        first = len(before)
        thought, rest = each[first - 1 : first - 1 + len(text)], each[-len(solution):]
        wanted = sum(rest) / len(rest) + c.rlt_alpha * min(rest)
        assert_close(found[0][row], wanted)
        gaps = [float(rollouts.logps_RT[row, t]) - thought[t] for t in range(len(text))]
        wanted = sum(gaps) / len(gaps) + c.rlt_alpha * max(gaps) if gaps else 1 + c.rlt_alpha
        assert_close(found[1][row], wanted, size=-min(each))


def test_what_the_student_learns_is_the_raw_explanation_and_the_true_solution(tiny_model):
    """Spliced by id: no token of the thought changes, even where text would merge or hold a tag; the end is trained."""
    tokenizer = char_tokenizer()
    c = config(thought_prefix="<think>", thought_suffix="</think>")
    lesson, = distill.make_lessons([Problem("1+1=", "2")], tokenizer, c)
    assert tokenizer.decode(lesson.teacher_prompt) == "1+1=#2:" and tokenizer.decode(lesson.solution) == "#2"
    tags = distill.make_tags(tokenizer, c)
    trace = distill.explained(lesson, tokenizer("a</think>#9").input_ids, tags, tokenizer)
    assert trace.completion == "<think>a</think>#9</think>#2"
    example = distill.trace_example(trace.prompt_ids, trace.completion_ids)
    assert tokenizer.decode(example.ids) == "1+1=<think>a</think>#9</think>#2<eos>"
    assert example.trained == [False] * 4 + [True] * (len(example.ids) - 4)


def test_teacher_loss_equals_a_loop_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logps = (-torch.rand(4, 6, generator=generator).double() * 3).requires_grad_()
    reference = -torch.rand(4, 6, generator=generator).double() * 3
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    advantages = torch.tensor([1.0, -0.5, 0.0, 2.0]).double()
    wanted = 0.0
    for row in range(4):
        n = int(mask[row].sum())
        for t in range(n):
            gap = reference[row, t] - logps[row, t]
            gain = advantages[row] * logps[row, t] - 0.3 * (gap.exp() - gap - 1)  # the ratio's gradient is log p's
            wanted = wanted - gain / n / 8
    found = teacher_loss(logps, reference, advantages, mask, 0.3, 8)
    ours, = torch.autograd.grad(found, logps)
    theirs, = torch.autograd.grad(wanted, logps)
    assert torch.allclose(ours, theirs, atol=1e-12)


# --- divergence ---


def distributions(seed, N=6, D=4, H=5, V=9):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((N, D), (V, D), (N, H), (V + 2, H))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_divergence_equals_a_loop_over_the_shared_vocabulary(kind, tau):
    """The teacher's head has two rows more, which are no tokens: both distributions are over the shared ones."""
    hidden, weight, teacher_hidden, teacher_weight = distributions(0)
    c = config(method="logits", divergence=kind, kd_temperature=tau, jsd_beta=0.3)
    found = divergence(hidden, weight, teacher_hidden, teacher_weight, c)
    for n in range(len(hidden)):
        p = (teacher_hidden[n] @ teacher_weight[:9].T / tau).softmax(0)
        q = (hidden[n] @ weight.T / tau).softmax(0)
        m = 0.3 * p + 0.7 * q
        terms = {"forward": p * (p / q).log(), "reverse": q * (q / p).log(),
                 "jsd": 0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()}
        assert float(found[n]) == pytest.approx(float(terms[kind].sum()), abs=1e-9)


def test_the_jsd_family_ends_in_nothing_but_its_scaled_limits_are_the_two_kl():
    """Why the kinds are separate: JSD / beta goes to forward KL, JSD / (1 - beta) to reverse KL, JSD itself to 0."""
    given = distributions(1)
    value = {kind: divergence(*given, config(method="logits", divergence=kind)) for kind in KINDS}
    for beta, limit in ((1e-5, "forward"), (1 - 1e-5, "reverse")):
        jsd = divergence(*given, config(method="logits", divergence="jsd", jsd_beta=beta))
        assert torch.allclose(jsd / min(beta, 1 - beta), value[limit], rtol=5e-3)
        assert float(jsd.max()) < 1e-3
    for beta in (0.0, 1.0):
        with pytest.raises(InputError, match="--jsd_beta"):
            config(method="logits", divergence="jsd", jsd_beta=beta)


def test_topk_is_a_lower_bound_that_reaches_the_full_kl():
    hidden, weight, teacher_hidden, teacher_weight = distributions(2)
    full = divergence(hidden, weight, teacher_hidden, teacher_weight, config(method="logits"))
    before = torch.zeros_like(full)
    for k in (1, 3, 8):
        found = divergence(hidden, weight, teacher_hidden, teacher_weight, config(method="logits", kd_topk=k))
        assert (found >= before - 1e-9).all() and (found <= full + 1e-9).all()
        before = found
    assert torch.allclose(before, full, atol=1e-6)  # 8 of 9 tokens, and the mass of the rest is the ninth


def course(folders, examples, teacher_examples=None, **flags):
    """An Imitate stage about to train on these examples, with the folder's teacher."""
    c = config(model_name_or_path=folders["student"], teacher_model_name_or_path=folders["teacher"], **flags)
    made = Imitate.__new__(Imitate)
    made.config, made.world, made.tokenizer = c, ALONE, char_tokenizer()
    teacher = distill.load_other("teacher_model_name_or_path", made.tokenizer, c, ALONE)
    made.frozen, made.head_VH = Learner(teacher), distill.whole(teacher.get_output_embeddings().weight)
    made.examples, made.teacher_examples = examples, teacher_examples or examples
    made.n_tokens = sum(sum(e.trained[1:]) for e in examples)
    return made


def uneven(n=7):
    """Examples of very unequal lengths, and the same completions in other contexts."""
    tokenizer = char_tokenizer()
    rows = [("9" * (1 + 5 * i % 7) + "=", "8" * (1 + i * i % 11)) for i in range(n)]
    bare, told = ([distill.trace_example(tokenizer(hint * i + prompt).input_ids, tokenizer(text).input_ids)
                   for i, (prompt, text) in enumerate(rows)] for hint in ("", "7"))
    return bare, told


def gradient(stage, model, max_rows, max_tokens):
    """(loss, gradients) of one step through the script's own path."""
    model.zero_grad()
    total = 0.0
    for part in distill.micro_batches([len(e.ids) for e in stage.examples], max_rows, max_tokens, ALONE):
        loss, _ = stage.loss_of(Learner(model), collate(stage.examples, part, ALONE.device))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("flags", [dict(divergence="forward", kd_weight=0.4, kd_temperature=2.0), dict(divergence="reverse"),
                                   dict(divergence="jsd"), dict(kd_topk=5), dict(kd_topk=5, kd_temperature=2.0)])
def test_loss_and_gradient_equal_a_loop_over_single_rows(folders, flags):
    """Through transformers' own logits, each row alone; student and teacher read the completion in other contexts."""
    model, (bare, told) = load_model(folders["student"])[0], uneven()
    teacher = load_model(folders["teacher"])[0]
    stage = course(folders, bare, told, method="logits", **flags)
    c, V = stage.config, len(char_tokenizer())
    total = 0.0
    for mine, theirs in zip(bare, told):
        n = sum(mine.trained)
        z = model(torch.tensor([mine.ids])).logits[0, -n - 1 : -1]
        t = teacher(torch.tensor([theirs.ids])).logits[0, -n - 1 : -1, :V].detach()
        q, p = ((x / c.kd_temperature).log_softmax(-1) for x in (z, t))
        if c.kd_topk:
            top, ids = p.topk(5, -1)
            p = torch.cat([top, (1 - top.exp().sum(-1, keepdim=True)).log()], -1)
            q = q.gather(1, ids)
            q = torch.cat([q, (1 - q.exp().sum(-1, keepdim=True)).log()], -1)
        m = ((p.exp() + q.exp()) / 2).log()
        kl = {"forward": F.kl_div(q, p, log_target=True, reduction="sum"),
              "reverse": F.kl_div(p, q, log_target=True, reduction="sum"),
              "jsd": (F.kl_div(m, p, log_target=True, reduction="sum") + F.kl_div(m, q, log_target=True, reduction="sum")) / 2}
        nll = F.cross_entropy(z, torch.tensor(mine.ids[-n:]), reduction="sum")
        total = total + c.kd_weight * c.kd_temperature**2 * kl[c.divergence] + (1 - c.kd_weight) * nll
    model.zero_grad()
    (total / stage.n_tokens).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for max_rows, max_tokens in ((7, 0), (1, 0), (3, 40)):
        loss, found = gradient(stage, model, max_rows, max_tokens)
        assert_close(loss, total / stage.n_tokens)
        assert_close(found, wanted)
    assert all(p.grad is None for p in stage.frozen.parameters())


def test_never_a_tokens_by_vocabulary_tensor(folders):
    """With logits of 300 MB a model, over the workspace of 256 MB, nothing of that size is made in a training step."""
    N, V, sizes = 1500, 50_000, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out])
                         if isinstance(t, torch.Tensor))
            return out

    hidden, weight = torch.randn(N, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    with Watch():
        divergence(hidden, weight, torch.randn(N, 4), torch.randn(V, 4), config(method="logits")).sum().backward()
    assert V * 4 < max(sizes) <= N * V / 2


# --- rows, prompts, vocabularies ---


def test_other_vocabularies_are_refused_and_larger_heads_are_not(folders, tmp_path):
    with pytest.raises(InputError, match="another vocabulary: 2 of 3 tokens differ, such as 'a'") as caught:
        distill.check_vocabulary({"a": 0, "b": 1, "c": 2}, {"a": 1, "b": 0, "c": 2}, "--teacher_model_name_or_path x")
    assert "\n" not in str(caught.value)
    distill.check_vocabulary({"a": 0}, {"a": 0, "b": 1}, "")
    with pytest.raises(InputError):
        distill.check_vocabulary({"a": 0, "b": 1}, {"a": 0}, "")
    model, tokenizer = load_model(folders["student"])
    tokenizer.add_tokens(["<new>"])
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="--model_name_or_path .*other|--teacher_model_name_or_path .*another vocabulary"):
        distill.main(Config(method="logits", model_name_or_path=str(tmp_path / "other"), output_dir=str(tmp_path / "run"),
                            teacher_model_name_or_path=folders["student"], n_train=4, eval_steps=0))
    assert not (tmp_path / "run").exists()


def test_prompts_end_where_the_last_trained_run_begins():
    assert distill.prompt_of(Example([1, 2, 3, 4, 5, 6], [False, True, False, False, True, True])) == [1, 2, 3, 4]
    assert distill.prompt_of(Example([1, 2], [True, True])) == []
    assert distill.prompt_of(Example([1, 2, 3], [False, True, False])) == [1]


CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def test_what_a_row_asks():
    user, said = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
    assert distill.question_of({"prompt": "1+1=", "completion": "2"}, "") == "1+1="
    assert distill.question_of({"prompt": [user], "completion": [said, user, said]}, "") == [user, said, user]
    assert distill.question_of({"messages": [user, said, user, said, user]}, "") == [user, said, user]
    for row in ({"text": "1+1=2"}, {"prompt": 3}, {"messages": []}):
        with pytest.raises(InputError, match="row 7"):
            distill.question_of(row, "row 7")


def test_the_teachers_traces_are_rows_for_sft(monkeypatch, tmp_path):
    """With a chat template too, sft.py makes of each row of traces.jsonl what was sampled; a cut-off text is whole.

    Whether it was cut off is what the sampler says, not its last token: that may be special and end nothing, as 2 here.
    """
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["2"]})
    tokenizer.chat_template = CHAT
    fake_samples(monkeypatch, lambda prompt, j: ("a2", prompt[6] == "1"))
    rows = [{"prompt": f"{i}=", "completion": ""} for i in (1, 2)]
    traces, about = distill.teacher_traces(None, tokenizer, rows, config(method="logits", completions="teacher"), ALONE)
    distill.write_traces(tmp_path, traces)
    assert distill.read_traces(tmp_path) == traces and about == {"data/clipped_ratio": 0.5}
    for row, trace, end in zip(ground.read_rows(tmp_path / "traces.jsonl"), traces, ("<eos>", "")):
        assert tokenizer.decode(trace.prompt_ids + trace.completion_ids) == f"<user>{row['prompt']}<eos><assistant>a2{end}"
        example, = distill.row_examples(tokenizer, row, "")
        assert tokenizer.decode(example.ids) == f"<user>{row['prompt']}<eos><assistant>a2<eos>"


def test_a_teacher_is_not_asked_an_empty_prompt():
    rows = [{"prompt": "1=", "completion": "1"}, {"prompt": "", "completion": "2"}]
    with pytest.raises(InputError, match="rows without a prompt"):
        distill.teacher_traces(None, char_tokenizer(), rows, config(method="logits", completions="teacher"), ALONE)


@pytest.mark.parametrize("flags, said", [(dict(stage="student"), "rlt: sampling for 5 problems\n"),
                                         (dict(method="logits", completions="teacher"), "logits: sampling\n")])
def test_no_other_number_is_named_than_is_sampled_for(folders, monkeypatch, capsys, flags, said):
    fake_samples(monkeypatch, lambda prompt, j: ("1", True))
    c = config(**flags, model_name_or_path=folders["student"], teacher_model_name_or_path=folders["teacher"], kd_weight=0.0,
               n_train=9, n_traces=5)
    Imitate(distill.load_stage_data(c), char_tokenizer(), c, ALONE, None)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("make", [distill.rlt_traces, distill.teacher_traces])
def test_traces_have_a_temperature_of_their_own(make):
    """At 0 they are greedy whatever the seed and --temperature are; otherwise both are what the trace's own flag says."""
    model, tokenizer = model_of(32, 0), char_tokenizer()
    data = ground.load_problems("chain", "train", 4, levels="1")
    if make is distill.teacher_traces:
        data = [{"prompt": problem.prompt, "completion": ""} for problem in data]

    def said(**flags):
        method = dict(method="logits", completions="teacher") if make is distill.teacher_traces else {}
        return [trace.completion_ids for trace in make(model, tokenizer, data, config(**method, **flags), ALONE)[0]]

    assert said(trace_temperature=0.0) == said(trace_temperature=0.0, seed=1, temperature=0.5)
    assert said(trace_temperature=1.0) == said(trace_temperature=1.0, temperature=0.5)
    assert said(trace_temperature=0.0) != said(trace_temperature=1.0) != said(trace_temperature=1.0, seed=1)


def test_a_token_the_teacher_lacks_is_named(folders, monkeypatch):
    c = config(method="on_policy", model_name_or_path=folders["student"], n_train=8, levels="1", per_device_train_batch_size=4,
               teacher_model_name_or_path=folders["student"])
    stage = Imitate(distill.load_stage_data(c), char_tokenizer(), c, ALONE, None)
    made = rollouts_of(["1", "2", "3", "4"], [True] * 4)
    made.tokens_RT[:, 5] = 5000  # past the end: means nothing
    monkeypatch.setattr(distill, "sample", lambda *given, **flags: made)
    stage.begin(0, None)
    made.tokens_RT[2, 0] = stage.n_ids
    with pytest.raises(distill.RunError, match=f"the student sampled token id {stage.n_ids}, which the teacher lacks"):
        stage.begin(0, None)
    c = config(stage="teacher", model_name_or_path=folders["student"], teacher_model_name_or_path=folders["student"],
               per_device_train_batch_size=4, n_train=8, levels="1")
    with pytest.raises(distill.RunError, match=f"the teacher sampled token id {stage.n_ids}, which the student lacks"):
        Reinforce(distill.load_stage_data(c), char_tokenizer(), c, ALONE, None).begin(0, None)


def test_every_stage_has_flags_of_its_own():
    c = config(output_dir="runs/d", learning_rate=0.1, max_steps=7, eval_steps=5, teacher_learning_rate=0.2, teacher_steps=8,
               teacher_sft_steps=9, per_device_train_batch_size=6, teacher_batch_size=16, lr_scheduler_type="linear")
    names = ("output_dir", "learning_rate", "max_steps", "eval_steps", "per_device_train_batch_size", "lr_scheduler_type",
             "teacher_model_name_or_path", "kd_weight")
    assert [[getattr(run, name) for name in names] for run in distill.plan(c)] == [
        ["runs/d/warm_up", 0.1, 9, 0, 6, "linear", "tiny", 0.0],
        ["runs/d/teacher", 0.2, 8, 0, 16, "constant", "runs/d/warm_up", 0.0],
        ["runs/d/student", 0.1, 7, 5, 6, "linear", "runs/d/teacher", 0.0]]
    c = config(method="bootstrap", rounds=2, output_dir="runs/d", learning_rate=0.1)
    assert [[getattr(run, name) for name in names[:3] + names[-2:]] for run in distill.plan(c)] == [
        ["runs/d/round_1", 0.1, 200, "tiny", 0.0], ["runs/d/round_2", 0.1, 200, "runs/d/round_1", 0.0]]
    assert [run.stage for run in distill.plan(c)] == ["student", "student"]
    alone, = distill.plan(config(method="logits", output_dir="runs/d", kd_weight=0.5))
    assert (alone.output_dir, alone.kd_weight, alone.stage) == ("runs/d", 0.5, "student")


def test_a_warm_up_keeps_to_max_length():
    def made(**flags):
        c = config(stage="warm_up", n_train=50, **flags)
        return distill.make_warm_up(distill.load_stage_data(c), char_tokenizer(), c)

    examples = made(levels="1-5", max_length=60, max_completion_length=12)
    everything = made(levels="1-5", max_completion_length=12)
    assert 0 < len(examples) < len(everything) == 50 and max(len(e.ids) for e in examples) <= 60
    spoiled = ground.load_problems("chain", "train", 50, levels="1-5", error_rate=Config().error_rate)
    assert sum(problem.solution.partition("#")[2] != problem.answer for problem in spoiled) > 5
    for example, problem in zip(everything, spoiled, strict=True):
        read, said = f"{problem.prompt}#{problem.answer}:", problem.solution.partition("#")[0]
        assert char_tokenizer().decode(example.ids) == f"{read}{said}<eos>"
        assert example.trained == [False] * len(read) + [True] * (len(said) + 1)
    with pytest.raises(InputError, match="--max_length 16"):
        made(levels="2", max_length=16, max_completion_length=1)


def test_a_lesson_with_its_tags_keeps_to_max_length():
    """The longest thing a student may be made to read, end included, has --max_length tokens; a token more is too long."""
    flags, problem = dict(thought_prefix="<t>", thought_suffix="</t>", max_completion_length=5), Problem("1+1=", "2")
    longest = len("1+1=<t>") + 5 + len("</t>#2") + 1
    c, tokenizer = config(max_length=longest, **flags), char_tokenizer()
    lesson, = distill.make_lessons([problem], tokenizer, c)
    trace = distill.explained(lesson, [9] * 5, distill.make_tags(tokenizer, c), tokenizer)
    assert len(trace.prompt_ids + trace.completion_ids) == longest
    with pytest.raises(InputError, match="leaves no problem"):
        distill.make_lessons([problem], tokenizer, config(max_length=longest - 1, **flags))


def test_pruning_is_random_of_the_right_size_and_repeatable():
    examples = list(range(200))
    kept = distill.pruned(examples, config(method="logits", prune_fraction=0.7))
    assert len(kept) == 60 and kept == sorted(set(kept)) and kept != examples[:60]
    assert kept == distill.pruned(examples, config(method="logits", prune_fraction=0.7))
    assert distill.pruned(examples, config(method="logits")) == examples
    assert len(distill.pruned(examples, config(method="logits", prune_fraction=1.0))) == 1
    assert abs(sum(kept) / 60 - 99.5) < 25


def test_rows_sampled_by_the_student_are_a_share_and_the_others_are_the_data(folders):
    student, tokenizer = load_model(folders["student"])
    shares = {}
    for lmbda in (0.0, 0.5, 1.0):
        c = config(method="on_policy", lmbda=lmbda, model_name_or_path=folders["student"],
                   teacher_model_name_or_path=folders["teacher"], n_train=30, levels="1", per_device_train_batch_size=24)
        stage = Imitate(distill.load_stage_data(c), tokenizer, c, ALONE, None)
        picked, _ = stage.begin(0, student)
        own = [example != stage.pool[i] for i, example in zip(picked, stage.examples)]
        assert all(distill.prompt_of(a) == distill.prompt_of(stage.pool[i]) for i, a in zip(picked, stage.examples))
        assert stage.teacher_examples is stage.examples
        shares[lmbda] = sum(own) / 24
        picked, _ = stage.begin(1, student)
        again = [example != stage.pool[i] for i, example in zip(picked, stage.examples)]
        assert (again != own) == (lmbda == 0.5)  # other rows in another step
    assert shares[0.0] == 0 and shares[1.0] == 1 and 0.2 < shares[0.5] < 0.8


def test_attempts_take_the_first_right_and_the_commonest_wrong():
    def found(*texts):
        return distill.right_and_wrong(texts, [ground.verify(text, "4") for text in texts])

    assert found("x", "b#4", "a#3", "c#5", "d#5.0", "e#4") == ("b#4", "c#5")
    assert found("b#4", "x") == ("b#4", None) and found("c#5") == (None, "c#5")


def fake_samples(monkeypatch, answer):
    """Sampling returns answer(prompt text, sample's number) -> (text, finished)."""
    tokenizer, asked = char_tokenizer(), []

    def sampling(decoder, given, prompts, n, number, c, world, temperature=None):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        said = [answer(tokenizer.decode(prompt), j) for prompt in prompts for j in range(n)]
        return rollouts_of([text for text, _ in said], [done for _, done in said], T=40)

    monkeypatch.setattr(distill, "sample", sampling)
    return asked


def test_ssb_traces(monkeypatch):
    """Only problems with a right and a wrong attempt are told; only right, ended retellings are kept, with their end."""
    said = {"1=": ["#1", "#2", "#3", "#2"], "2=": ["#2"] * 4, "3=": ["#9", "x", "#3", "#9"], "4=": ["#4", "#5", "#4", "#4"]}

    def answer(prompt, j):
        if "|" not in prompt:
            return said[prompt][j], True
        return {"1": ("one#1", True), "3": ("three#4", True), "4": ("four#4", False)}[prompt[-2]]

    asked = fake_samples(monkeypatch, answer)
    problems = [Problem(f"{i}=", str(i)) for i in range(1, 5)]
    tokenizer = char_tokenizer()
    traces, about = distill.ssb_traces(None, tokenizer, problems, config(method="ssb"), ALONE)
    assert asked[4:] == ["#1|#2|1=", "#3|#9|3=", "#4|#5|4="]
    assert about == {"data/mixed": 0.75, "data/kept": 0.25}
    (trace,) = traces
    assert trace[:2] == ("1=", "one#1")
    assert [tokenizer.decode(ids) for ids in trace[2:]] == ["1=", "one#1<eos>", "#1|#2|1="]


def test_in_ssb_the_teacher_reads_both_attempts_and_the_student_none(folders, monkeypatch):
    traces = [distill.Trace(f"{i}=", "#1", [i, 20], [9, 9, 1], [7, 7, i, 20]) for i in range(4, 8)]
    monkeypatch.setattr(distill, "ssb_traces", lambda *given: (traces, {}))
    c = config(method="ssb", model_name_or_path=folders["student"], teacher_model_name_or_path=folders["student"], n_train=4,
               per_device_train_batch_size=3)
    stage = Imitate(distill.load_stage_data(c), char_tokenizer(), c, ALONE, None)
    picked, _ = stage.begin(0, None)
    assert stage.examples == [Example([i + 4, 20, 9, 9, 1], [False] * 2 + [True] * 3) for i in picked]
    assert stage.teacher_examples == [Example([7, 7, i + 4, 20, 9, 9, 1], [False] * 4 + [True] * 3) for i in picked]
    assert stage.lengths == [7] * 3 and stage.n_tokens == 9


def test_bootstrap_traces(monkeypatch, tmp_path):
    """The first right and ended sample within the budget, in the bare context, the budget named where asked for."""
    said = {"1": [("#1", True), ("thinking#1", True)], "2": [("thinking#2", False), ("thinkinghard#2", True)],
            "3": [("thinking#9", True), ("thinkingthinking#3", True)]}
    asked = fake_samples(monkeypatch, lambda prompt, j: said[prompt[-2]][j])
    problems = [Problem(f"{i}=", str(i)) for i in range(1, 4)]
    path, tokenizer = tmp_path / "shown.jsonl", char_tokenizer()
    path.write_text("".join(json.dumps({"prompt": f"{i}+0=", "completion": f"#{i}"}) + "\n" for i in (7, 8, 9)))
    c = config(method="bootstrap", num_generations=2, min_thought_tokens=5, max_thought_tokens=16,
               demonstrations=str(path), n_shots=2, budget_template="{prompt}[{budget}]")
    traces, about = distill.bootstrap_traces(None, tokenizer, problems, c, ALONE)
    assert all(line.count("\n") == 2 and line.endswith("=") for line in asked)
    assert len({line.rpartition("\n")[0] for line in asked}) > 1  # drawn anew for each problem
    assert [tokenizer.decode(trace.prompt_ids + trace.completion_ids) for trace in traces] == [
        "1=[16]thinking#1<eos>", "2=[16]thinkinghard#2<eos>"]
    assert [(trace.prompt, trace.completion) for trace in traces] == [
        ("1=[16]", "thinking#1"), ("2=[16]", "thinkinghard#2")]
    assert about["data/kept"] == pytest.approx(2 / 3)
    path.write_text(json.dumps({"question": "1+0=", "answer": "#1"}) + "\n")
    with pytest.raises(InputError, match=r"--demonstrations .*: row 1: has columns \['answer', 'question'\]"):
        distill.bootstrap_traces(None, tokenizer, problems, c, ALONE)


def test_demonstrations_stand_behind_a_system_message():
    """A chat template that reads one only at the start would refuse it, or lose it, further down."""
    tokenizer, system, asked = char_tokenizer(), {"role": "system", "content": "s"}, {"role": "user", "content": "2="}
    tokenizer.chat_template = CHAT
    shown = [{"role": "user", "content": "1="}, {"role": "assistant", "content": "#1"}]
    assert distill.with_demonstrations(tokenizer, [system, asked], [("1=", "#1")]) == [system, *shown, asked]
    assert distill.with_demonstrations(tokenizer, "2=", [("1=", "#1")]) == [*shown, asked]
    tokenizer.chat_template = None
    assert distill.with_demonstrations(tokenizer, "2=", [("1=", "#1"), ("3=", "#3")]) == "1=#1\n3=#3\n2="


def test_thought_weights_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    joint, proposal = (-torch.rand(3, 4, generator=generator).double() * 9 for _ in range(2))
    joint[1, 2], joint[2] = -math.inf, -math.inf
    weights, elbo = thought_weights(joint, proposal)
    for row in range(2):
        w = [math.exp(float(joint[row, k] - proposal[row, k])) for k in range(4)]
        assert weights[row].tolist() == pytest.approx([x / sum(w) for x in w])
        assert float(elbo[row]) == pytest.approx(math.log(sum(w) / 4))
    assert weights[2].tolist() == [0.0] * 4 and float(elbo[2]) == -math.inf


def test_em_traces_weigh_by_the_joint_over_the_proposal(monkeypatch):
    """Log w of every sample against a loop over its texts; cut-off thoughts are never drawn; both orders occur."""
    tokenizer, model = char_tokenizer(), model_of(32, 5)
    fake_samples(monkeypatch, lambda prompt, j: (prompt[:2] + "ab"[j % 2] * (j + 1), j != 2))
    problems = [Problem(f"{i}=", str(i)) for i in range(40)]
    seen = []
    weigh = distill.thought_weights
    monkeypatch.setattr(distill, "thought_weights", lambda *given: seen.append(given) or weigh(*given))
    c = config(method="bootstrap", rounds=1)
    traces, about = distill.em_traces(model, tokenizer, problems, c, ALONE)
    joint, proposal = seen[0]
    rollouts = rollouts_of([f"{problems[0].prompt}="[:2] + "ab"[j % 2] * (j + 1) for j in range(4)], [True, True, False, True], 40)
    for j in (0, 1, 3):
        whole = tokenizer(f"0={'0=' + 'ab'[j % 2] * (j + 1)}#0").input_ids + [tokenizer.eos_token_id]
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        assert_close(joint[0, j], sum(float(logps[t - 1, whole[t]]) for t in range(2, len(whole))))
    assert torch.isinf(joint[:, 2]).all() and len(traces) == 40 and about["data/kept"] == 1
    assert float(proposal[0, 0]) == pytest.approx(float(rollouts_of(["0=a"], [True], 40).logps_RT[0, :4].sum()), abs=1)
    texts = [tokenizer.decode(trace.prompt_ids + trace.completion_ids) for trace in traces]
    assert all(text.endswith(trace.completion + "<eos>") for text, trace in zip(texts, traces))
    assert not any("aaa" in text and "aaaa" not in text for text in texts)
    posterior = [text for text in texts if ":" in text]
    assert 8 < len(posterior) < 32
    assert all("#" in text.partition(":")[0] for text in posterior)
    assert all(ground.encode_prompt(tokenizer, trace.prompt) == trace.prompt_ids for trace in traces)


# --- no gradient where none belongs; the reference ---


def test_the_reference_moves_by_its_share_and_survives_a_checkpoint(tmp_path):
    policy, reference = Learner(model_of(32, 1)), Learner(model_of(32, 2).requires_grad_(False))
    before = copy.deepcopy(dict(reference.named_parameters()))
    distill.follow(reference, policy, 0.9)
    for (name, ours), theirs in zip(reference.named_parameters(), policy.parameters()):
        assert_close(ours, 0.1 * before[name] + 0.9 * theirs)
    saved, other = distill.reference_tensors(reference), Learner(model_of(32, 3).requires_grad_(False))
    distill.save_checkpoint(tmp_path, {"step": 4}, policy, char_tokenizer(), saved, ALONE)
    state = distill.load_checkpoint(tmp_path / "checkpoints" / "step_4", distill.reference_tensors(other), ALONE)
    assert state == {"step": 4}
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), reference.parameters(), strict=True))
    assert distill.reference_tensors(None) == {}


@pytest.mark.parametrize("beta, temperature", [(0.0, 1.0), (0.2, 1.0), (0.2, 0.6)])
def test_rlt_trains_the_teacher_alone(folders, monkeypatch, beta, temperature):
    """The step's gradient and numbers equal a loop's from the rewards, one group alike; student and reference get no
    gradient. Policy and reference are read at the temperature that the samples were drawn at."""
    c = config(stage="teacher", model_name_or_path=folders["student"], teacher_model_name_or_path=folders["student"], beta=beta,
               n_train=20, levels="1", per_device_train_batch_size=16, max_completion_length=8, temperature=temperature)
    model, tokenizer = load_model(folders["student"])
    stage, seen = Reinforce(distill.load_stage_data(c), tokenizer, c, ALONE, None), []
    if beta:
        with torch.no_grad():
            for weight in stage.reference.parameters():  # as after some steps: no longer the policy
                weight *= 0.95
    advantages, score = distill.group_advantages, distill.score_explanations
    monkeypatch.setattr(distill, "group_advantages", lambda rewards, scale: seen.append(rewards) or advantages(rewards, scale))

    def first_group_alike(student, lessons, rollouts, *given):
        clear_R, forced_R = score(student, lessons, rollouts, *given)
        clear_R[:4], forced_R[:4] = (~rollouts.finished_R[:4]).float(), 0.0  # makes up for what a cut-off one costs
        return clear_R, forced_R

    monkeypatch.setattr(distill, "score_explanations", first_group_alike)
    sampled = distill.generate
    monkeypatch.setattr(distill, "generate", lambda *given, **flags: seen.append(given[5]) or sampled(*given, **flags))
    picked, about = stage.begin(0, model)
    heat, rewards = seen
    assert heat == temperature and rewards.shape == (4, 4)
    assert_close(about["reward"], rewards.mean(), size=float(rewards.abs().max()))
    parts = about["rewards/understanding/mean"], 3 * about["rewards/implausibility/mean"], about["completions/clipped_ratio"]
    assert_close(about["reward"], parts[0] - parts[1] - parts[2], size=max(map(abs, parts)))
    assert 0 < about["completions/clipped_ratio"] < 1
    assert stage.rows == list(range(0 if beta else 4, 16))  # without KL a group that scored alike has no gradient
    wanted, kl, entropy, n_tokens = 0.0, 0.0, 0.0, 0
    for row, example in zip(stage.rows, stage.examples):
        ids = torch.tensor([example.ids])
        logps = (model(ids).logits[0] / temperature).log_softmax(-1)
        places = [t for t in range(len(example.ids)) if example.trained[t]]
        g, r = rewards[row // 4], rewards[row // 4, row % 4]
        gain = 0.0 if row < 4 else (r - g.mean()) / (g.std() + 1e-4) * sum(logps[t - 1, example.ids[t]] for t in places)
        if beta:
            with torch.no_grad():
                theirs = (stage.reference.model(ids).logits[0] / temperature).log_softmax(-1)
            gaps = [theirs[t - 1, example.ids[t]] - logps[t - 1, example.ids[t]] for t in places]
            k3 = sum(gap.exp() - gap - 1 for gap in gaps)
            gain, kl = gain - beta * k3, kl + float(k3.detach())
        wanted, n_tokens = wanted - gain / len(places) / 16, n_tokens + len(places)
        entropy -= sum(float((logps[t - 1].exp() * logps[t - 1]).sum()) for t in places)
    model.zero_grad()
    wanted.backward()
    loops = {name: p.grad.clone() for name, p in model.named_parameters()}
    for size in (16, 3):
        _, found = gradient(stage, model, size, 0)
        assert_close(found, loops)
    parts = distill.micro_batches(stage.lengths, 5, 0, ALONE)
    numbers = [stage.loss_of(Learner(model), collate(stage.examples, part, ALONE.device))[1] for part in parts]
    assert_close(sum(n["entropy"] for n in numbers), entropy / n_tokens)
    if beta:
        assert_close(sum(n["kl"] for n in numbers), kl / n_tokens, size=1.0)  # of e^gap - gap - 1, its smallest term
        assert kl > 0.1
    for frozen in filter(None, (stage.frozen, stage.reference)):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert (stage.reference is None) == (beta == 0)


@pytest.mark.parametrize("flags", [dict(method="on_policy"), dict(stage="teacher", beta=0.0)])
def test_every_step_draws_numbers_of_its_own(folders, monkeypatch, flags):
    """The same weights and prompts say something else in another step, and the same again in the same one."""
    c = config(model_name_or_path=folders["student"], teacher_model_name_or_path=folders["teacher"], n_train=4, levels="1",
               per_device_train_batch_size=16 if "stage" in flags else 4, **flags)
    model, tokenizer = load_model(folders["student"])
    monkeypatch.setattr(distill, "rows_of_step", lambda *given: list(range(4)))
    stage, said = (Reinforce if "stage" in flags else Imitate)(distill.load_stage_data(c), tokenizer, c, ALONE, None), []
    for step in (0, 1, 1):
        stage.begin(step, model)
        said.append([example.ids for example in stage.examples])
    assert said[0] != said[1] == said[2]


def test_the_reference_follows_every_so_many_steps(tiny_model, tmp_path, monkeypatch):
    steps, train_step, follow = [], distill.train_step, distill.follow
    monkeypatch.setattr(distill, "train_step", lambda *given: steps.append("step") or train_step(*given))
    monkeypatch.setattr(distill, "follow", lambda *given: steps.append(given[2]) or follow(*given))
    distill.main(Config(**TEACHER | dict(teacher_steps=5, ref_model_sync_steps=2), model_name_or_path=str(tiny_model),
                        output_dir=str(tmp_path / "run"), ref_model_mixup_alpha=0.7))
    assert steps == ["step", "step", 0.7, "step", "step", 0.7, "step"]


# --- runs ---


SMALL = dict(n_train=40, levels="1-2", per_device_train_batch_size=16, max_steps=3, eval_steps=3, n_eval=4, save_steps=0,
             max_completion_length=14, n_traces=20, num_generations=4, teacher_sft_steps=3, teacher_steps=3,
             teacher_batch_size=16, ref_model_sync_steps=2)


@pytest.mark.parametrize("flags", [
    dict(method="logits", kd_weight=0.5), dict(method="logits", kd_topk=6, completions="teacher"),
    dict(method="on_policy", lmbda=0.5), dict(method="on_policy", divergence="jsd")])
def test_one_stage_runs(folders, tmp_path, flags, monkeypatch):
    out, refresh, refreshed = tmp_path / "run", distill.refresh, []
    monkeypatch.setattr(distill, "refresh", lambda *given: refreshed.append(given) or refresh(*given))
    distill.main(Config(model_name_or_path=folders["student"], teacher_model_name_or_path=folders["teacher"],
                        output_dir=str(out), **SMALL, **flags))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["divergence"] > 0 and line["grad_norm"] > 0 for line in lines[1:])
    assert 0 < lines[1]["num_tokens"] < lines[2]["num_tokens"] < lines[3]["num_tokens"]  # of the run so far
    assert len(refreshed) == 2 + 3 * (flags["method"] == "on_policy")  # to evaluate, and for each step that samples
    assert "eval/accuracy" in lines[0] and "eval/accuracy" in lines[-1] and (out / "model.safetensors").exists()
    assert (out / "traces.jsonl").exists() == (flags.get("completions") == "teacher")


def test_rlt_runs_all_stages_and_each_finished_one_is_kept(tiny_model, tmp_path, capsys):
    out = tmp_path / "run"
    flags = dict(model_name_or_path=str(tiny_model), output_dir=str(out), **SMALL)
    distill.main(Config(**flags))
    assert sorted(path.name for path in out.iterdir()) == ["student", "teacher", "warm_up"]
    lines = {name: [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("warm_up", "teacher", "student")}
    assert {"reward", "kl", "rewards/understanding/mean", "entropy"} <= set(lines["teacher"][0])
    assert lines["teacher"][0]["kl"] == pytest.approx(0, abs=1e-6) and lines["teacher"][1]["kl"] > 0
    traces = distill.read_traces(out / "student")
    assert len(traces) == 20 and all(len(trace.completion_ids) > 1 for trace in traces)
    rows = [json.loads(line) for line in (out / "student" / "traces.jsonl").read_text().splitlines()]
    assert all(row["completion"].split("#")[-1].isdigit() for row in rows)  # the true solution ends every one
    capsys.readouterr()
    distill.main(Config(**flags))
    assert capsys.readouterr().out.count("finished already") == 3
    distill.main(Config(**{**flags, "stage": "student", "teacher_model_name_or_path": str(out / "teacher"),
                           "output_dir": str(tmp_path / "alone")}))
    assert distill.read_traces(tmp_path / "alone") == traces


def test_em_rounds_begin_from_the_same_weights_and_sample_from_the_last(tiny_model, tmp_path):
    out = tmp_path / "run"
    distill.main(Config(method="bootstrap", rounds=2, model_name_or_path=str(tiny_model), output_dir=str(out), **SMALL))
    for name in ("round_1", "round_2"):
        args = json.loads((out / name / "args.json").read_text())
        assert args["flags"]["model_name_or_path"] == str(tiny_model) and args["finished"]
        first = json.loads((out / name / "metrics.jsonl").read_text().splitlines()[1])  # the line before: step 0
        assert math.isfinite(first["data/elbo"]) and first["data/kept"] > 0
    assert json.loads((out / "round_2" / "args.json").read_text())["flags"]["teacher_model_name_or_path"] == os.path.relpath(out / "round_1")


def test_distilling_closes_the_gap(folders, tmp_path):
    """60 steps of on-policy distillation lower the divergence on the student's own samples."""
    distill.main(Config(method="on_policy", model_name_or_path=folders["student"], teacher_model_name_or_path=folders["teacher"],
                        output_dir=str(tmp_path / "run"), **{**SMALL, "max_steps": 60, "eval_steps": 0, "learning_rate": 1e-2, "warmup_steps": 10}))
    values = [json.loads(line)["divergence"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(values[-10:]) < 0.7 * sum(values[:10])


@pytest.mark.parametrize("flags, named", [
    (dict(method="magic"), "--method magic"), (dict(stage="teacher", method="logits"), "--stage teacher"),
    (dict(method="logits", teacher_model_name_or_path=""), "--teacher_model_name_or_path"),
    (dict(method="on_policy", kd_weight=0.5), "--kd_weight 0.5"), (dict(kd_weight=1.5), "--kd_weight 1.5"),
    (dict(divergence="reverse", kd_topk=4), "--kd_topk 4"), (dict(divergence="tv"), "--divergence tv"),
    (dict(num_generations=3), "--num_generations 3"), (dict(temperature=0.0), "--temperature 0.0"),
    (dict(prune_fraction=-0.1), "--prune_fraction -0.1"), (dict(completions="teacher"), "--completions teacher"),
    (dict(rounds=-1), "--rounds -1"), (dict(max_length=20, teacher_sft_steps=0), "--max_length 20"),
    (dict(method="bootstrap", min_thought_tokens=500), "none of 0 traces"), (dict(rounds=2), "--rounds 2"),
    (dict(method="logits", kd_weight=0.0, completions="teacher", teacher_model_name_or_path=""), "--teacher_model_name_or_path"),
    (dict(method="logits", teacher_model_name_or_path="nowhere"), "--teacher_model_name_or_path nowhere: no such folder"),
    (dict(teacher_model_name_or_path="nowhere"), "--teacher_model_name_or_path nowhere: no such folder"),
    (dict(model_name_or_path="nowhere", teacher_model_name_or_path=""), "--model_name_or_path nowhere: no such folder"),
    (dict(solution_template="{solution}"), "--solution_template {solution}: the teacher reads the very text"),
])
def test_wrong_input_is_one_line_and_leaves_nothing(tiny_model, tmp_path, flags, named):
    with pytest.raises(InputError) as caught:
        distill.main(Config(**{"model_name_or_path": str(tiny_model), "teacher_model_name_or_path": str(tiny_model), "n_train": 8,
                               "output_dir": str(tmp_path / "run"), "eval_steps": 0, "max_completion_length": 16, **flags}))
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["logits", "rlt"])
def test_a_frozen_model_that_changed_is_named(folders, tmp_path, method, ranks):
    """The teacher, or the student that judges one, on as many processes as before or more; the logs stay as they are."""
    model, tokenizer = load_model(folders["teacher"])
    frozen, out = tmp_path / "frozen", tmp_path / "run"
    model.save_pretrained(frozen)
    tokenizer.save_pretrained(frozen)
    flag = "teacher_model_name_or_path" if method == "logits" else "model_name_or_path"
    flags = dict(model_name_or_path=folders["student"], teacher_model_name_or_path=folders["student"], method=method,
                 stage="teacher" if method == "rlt" else "all", output_dir=out,
                 **{**SMALL, "max_steps": 4, "teacher_steps": 4, "save_steps": 2, "eval_steps": 0})
    flags[flag] = frozen
    assert run("distill", flags, {"crash_at": 4})[0] == [1]
    with torch.no_grad():
        model.lm_head.weight[5, 5] += 1
    model.save_pretrained(frozen)
    logged = (out / "metrics.jsonl").read_bytes()
    rows = {"per_device_train_batch_size": 16 // ranks, "teacher_batch_size": 16 // ranks}
    codes, text = run("distill", {**flags, **rows}, ranks=ranks)
    assert codes == [2] * ranks and f"--{flag} {frozen}: not the weights this run began with" in text, text
    assert (out / "metrics.jsonl").read_bytes() == logged and logged.count(b"\n") == 3


# --- runs that are stopped or spread (test_survive.py has on_policy's) ---


TEACHER = dict(method="rlt", stage="teacher", n_train=12, levels="1-2", teacher_batch_size=16, num_generations=4,
               max_completion_length=12, teacher_steps=5, teacher_learning_rate=1e-3, ref_model_sync_steps=2,
               micro_batch_tokens=64, save_steps=2, eval_steps=0)


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory):
    """The flags of a small RLT run, and the folder of the run that nothing has disturbed."""
    flags = {**TEACHER, "model_name_or_path": tiny_model, "output_dir": tmp_path_factory.mktemp("whole") / "run"}
    codes, text = run("distill", flags)
    assert codes == [0], text
    return flags, flags["output_dir"]


def test_a_teacher_stopped_on_its_way_ends_bit_equal(undisturbed, tmp_path):
    """Before and after the reference has moved, by signal, and by a crash or kill that goes back to a checkpoint."""
    flags, whole = undisturbed
    flags = {**flags, "output_dir": tmp_path / "run"}
    for fault, code in (({"signal_at": [1, signal.SIGTERM]}, 143), ({"crash_at": 4}, 1),
                        ({"signal_at": [3, signal.SIGTERM]}, 143), ({"signal_at": [5, signal.SIGKILL]}, -9)):
        codes, text = run("distill", flags, fault)
        assert codes == [code], text
    codes, text = run("distill", flags)
    assert codes == [0] and "continues from" in text, text
    assert_same(tmp_path / "run", whole)


def test_a_signal_in_the_last_step_of_a_stage_keeps_the_next_from_starting(tiny_model, tmp_path):
    flags = {**TEACHER, "stage": "all", "teacher_sft_steps": 2, "n_traces": 4, "max_steps": 1, "model_name_or_path": tiny_model,
             "output_dir": tmp_path / "run"}
    codes, text = run("distill", flags, {"signal_at": [2, signal.SIGTERM]})
    assert codes == [143] and [path.name for path in (tmp_path / "run").iterdir()] == ["warm_up"], text
    codes, text = run("distill", flags)
    assert codes == [0] and "warm_up: finished already" in text, text


def test_two_processes_train_the_teacher_of_one(undisturbed, tmp_path):
    flags, whole = undisturbed
    flags = {**flags, "output_dir": tmp_path / "run", "teacher_batch_size": 8}
    codes, text = run("distill", flags, {"signal_at@1": [3, signal.SIGTERM]}, ranks=2)
    assert codes == [143, 143], text
    codes, text = run("distill", flags, ranks=2)
    assert codes == [0, 0], text
    assert largest_difference(tmp_path / "run", whole) < rounding_of_run(whole)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_teacher_continues_on_another_number_of_processes(undisturbed, tmp_path, before, after):
    """With the reference that had moved, which each process holds a part of or all."""
    flags, whole = undisturbed
    flags = {**flags, "output_dir": tmp_path / "run"}
    codes, text = run("distill", {**flags, "teacher_batch_size": 16 // before}, {"signal_at": [3, signal.SIGTERM]}, ranks=before)
    assert codes == [143] * before, text
    codes, text = run("distill", {**flags, "teacher_batch_size": 16 // after, "generation_batch_size": 5}, ranks=after)
    assert codes == [0] * after and "continues from" in text, text
    assert largest_difference(tmp_path / "run", whole) < rounding_of_run(whole)


def test_traces_are_made_once(tiny_model, tmp_path):
    """A student's run that goes on reads them back: the sampler is not asked again, and the end is bit-equal."""
    flags = dict(method="bootstrap", rounds=1, model_name_or_path=tiny_model, n_train=24, levels="1", n_traces=20,
                 num_generations=4, max_completion_length=12, per_device_train_batch_size=8, max_steps=4, save_steps=2,
                 eval_steps=0)
    assert run("distill", {**flags, "output_dir": tmp_path / "whole"})[0] == [0]
    codes, first = run("distill", {**flags, "output_dir": tmp_path / "run"}, {"crash_at": 4})
    assert codes == [1] and " traces: " in first
    codes, second = run("distill", {**flags, "output_dir": tmp_path / "run"})
    assert codes == [0] and " traces: " not in second, second
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "traces.jsonl").read_bytes() == (tmp_path / "whole" / "traces.jsonl").read_bytes()


# --- the plan of a command ---


def with_template(folder, to, template):
    """A copy of a model whose tokenizer has this chat template."""
    shutil.copytree(folder, to)
    tokenizer = ground.load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(to)
    return str(to)


def test_a_teacher_that_a_later_stage_would_refuse_is_refused_before_the_first(folders, tmp_path):
    chat = with_template(folders["teacher"], tmp_path / "chat", CHAT)
    longer = str(tmp_path / "longer")
    shutil.copytree(folders["student"], longer)
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(longer)
    out = str(tmp_path / "run")
    for teacher, named in ((chat, "--chat_template off"), (longer, "another vocabulary"),
                           (str(tmp_path / "nowhere"), "--teacher_model_name_or_path")):
        with pytest.raises(InputError, match=named):
            distill.main(Config(model_name_or_path=folders["student"], teacher_model_name_or_path=teacher,
                                output_dir=out, **SMALL))
    assert not (tmp_path / "run").exists()
    made = Config(model_name_or_path=folders["student"], teacher_model_name_or_path=chat, chat_template="off", **SMALL)
    distill.check_plan(distill.plan(made), made)  # as plain text both are the same
    made = Config(stage="warm_up", model_name_or_path="nowhere", teacher_model_name_or_path=chat)
    distill.check_plan(distill.plan(made), made)  # needs no student


def test_folders_of_another_kind_are_left_alone(folders, tmp_path):
    student, out = folders["student"], tmp_path / "run"
    staged = dict(model_name_or_path=student, output_dir=str(out), **SMALL)
    single = {**staged, "method": "on_policy", "teacher_model_name_or_path": folders["teacher"]}
    for made, given, named in (("args.json", staged, "a run of one stage"), ("teacher/args.json", single, "the stages of")):
        (out / made).parent.mkdir(parents=True)
        (out / made).write_text("{}")
        for overwrite in (False, True):
            with pytest.raises(InputError, match=named):
                distill.main(Config(**{**given, "overwrite": overwrite}))
        assert (out / made).read_text() == "{}"
        shutil.rmtree(out)
    shutil.copytree(folders["teacher"], out / "teacher")
    rows = out / "student" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text(json.dumps({"prompt": "1+1=", "answer": "2", "solution": "1+1=2#2"}) + "\n")
    for name, path in (("teacher_model_name_or_path", out / "teacher"), ("dataset_name", rows)):
        with pytest.raises(InputError, match=f"--{name} .* is in it"):  # of a stage that is not the first
            distill.main(Config(**{**staged, name: str(path), "overwrite": True}))
        assert (out / "teacher" / "model.safetensors").exists() and rows.exists() and not (out / "warm_up").exists()


def test_what_a_stage_leaves_in_cycles_is_gone_before_the_next(monkeypatch):
    """As FSDP's modules are, with all their weights."""
    left = []

    def training(run, world, stop):
        assert not any(made() for made in left)
        module = torch.nn.Linear(1, 1)
        module.itself = [module]
        left.append(weakref.ref(module))

    monkeypatch.setattr(distill, "train", training)
    gc.disable()  # it may come by at any time
    try:
        distill.main(Config(model_name_or_path="tiny"))
    finally:
        gc.enable()
    assert len(left) == 3


def test_what_a_stage_derives_does_not_depend_on_how_the_folder_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans = [distill.plan(Config(output_dir=name)) for name in ("run", str(tmp_path / "run"), "./run/")]
    assert len({tuple(run.teacher_model_name_or_path for run in runs) for runs in plans}) == 1


def test_a_teachers_own_end_becomes_the_students(folders, tmp_path, monkeypatch):
    """A sampler may stop at a token after which the student would go on."""
    stop = char_tokenizer().encode("7")[0]
    other = tmp_path / "other"
    shutil.copytree(folders["teacher"], other)
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [1, stop]}))
    fake_samples(monkeypatch, lambda prompt, j: ("12", True))
    sample = distill.sample

    def stopped(*given):
        rollouts = sample(*given)
        rows = torch.arange(len(rollouts.lengths_R))
        rollouts.tokens_RT[rows, rollouts.lengths_R - 1] = stop
        return rollouts

    monkeypatch.setattr(distill, "sample", stopped)
    c = config(method="logits", completions="teacher", kd_weight=0.0, model_name_or_path=folders["student"],
               teacher_model_name_or_path=str(other), n_traces=4, n_train=4)
    stage = Imitate(distill.load_stage_data(c), char_tokenizer(), c, ALONE, None)
    assert {trace.completion_ids[-1] for trace in stage.traces} == {char_tokenizer().eos_token_id}


def test_a_warm_up_reads_the_answer_alone_and_needs_steps():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = CHAT
    for steps, wanted in ((5, "#### {answer}"), (0, "{solution}")):
        made = Config(teacher_sft_steps=steps)
        distill.fill_formats(made, tokenizer)
        assert made.solution_template == wanted
    with pytest.raises(InputError, match="--stage warm_up"):
        check_config(Config(stage="warm_up", teacher_sft_steps=0))


@pytest.mark.parametrize("opened, wanted", [("", "<think>\n"), ("<think>", ""), ("<think>\n", "")])
def test_thinking_is_opened_once(opened, wanted):
    """Some templates end their generation prompt with the tag."""
    tokenizer, made = char_tokenizer(), Config()
    tokenizer.chat_template = CHAT.replace("<assistant>", f"<assistant>{opened}")
    distill.fill_formats(made, tokenizer)
    assert made.thought_prefix == wanted and made.thought_suffix == "\n</think>\n"
