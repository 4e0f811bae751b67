"""sft.py: which tokens are trained, the loss and its gradient, the order of the data, the schedule, and a run."""
import copy
import json
import math
import sys
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import sft
from eval import (InputError, Log, char_tokenizer, describe_run, encode_prompt, end_of_turn, load_eval_problems, load_model,
                  load_problems, newest_checkpoint, verify, write_json)
from rounding import assert_close
from sft import Config, Example, World, collate, make_examples, micro_batches, nll_loss, row_examples, rows_of_step

ALONE = World(0, 1, torch.device("cpu"))
# Templates in the shape of the stock ones, on characters: ChatML, Llama-3, Gemma (roles renamed), one that drops the
# thinking of earlier turns (as Qwen3's and DeepSeek-R1's do), and Mistral's, which puts the end after the answer only.
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "<bos>{% for m in messages %}<|h|>{{ m.role }}</h>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
              "{% if add_generation_prompt %}<|h|>assistant</h>\n\n{% endif %}",
    "gemma": "<bos>{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
             "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
                "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "mistral": "<bos>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
               "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}",
}
CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "<think>easy</think>2"},
        {"role": "user", "content": "2+2="}, {"role": "assistant", "content": "<think>hm</think>4"}]


def chat_tokenizer(template):
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|h|>"],
                                  "bos_token": "<bos>"})
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def spans(tokenizer, example):
    """The runs of trained tokens, as text."""
    found, inside = [], False
    for token, trained in zip(example.ids, example.trained):
        if trained:
            found = found + [""] if not inside else found
            found[-1] += tokenizer.decode([token])
        inside = trained
    return found


@pytest.mark.parametrize("template", TEMPLATES)
def test_assistant_turns_and_their_ends_are_trained_and_nothing_else(template):
    tokenizer = chat_tokenizer(template)
    end = tokenizer.decode([end_of_turn(tokenizer)])
    assert end == ("<eos>" if template == "mistral" else "<|im_end|>")
    examples = sft.chat_examples(tokenizer, CHAT)
    assert len(examples) == (2 if template == "thinking" else 1)
    lead = " " if template == "mistral" else ""  # what the template puts before the answer is sampled, so it is trained
    assert [span for e in examples for span in spans(tokenizer, e)] == [lead + m["content"] + end for m in CHAT[1::2]]
    for example in examples:  # every trained token stands in the context that sampling would give it
        first = example.trained.index(True)
        contexts = [encode_prompt(tokenizer, CHAT[:i]) for i in (1, 3)]
        assert example.ids[:first] in contexts
        assert example.ids.count(tokenizer.bos_token_id) <= 1
    if template == "thinking":
        assert "easy" not in tokenizer.decode(examples[1].ids)


@pytest.mark.parametrize("row, text, trained", [
    ({"prompt": "1+1=", "completion": "2"}, "1+1=2<eos>", "2<eos>"),
    ({"text": "hello"}, "hello<eos>", "hello<eos>"),
])
def test_plain_formats(row, text, trained):
    tokenizer = char_tokenizer()
    (example,) = row_examples(tokenizer, row, "row 1")
    assert tokenizer.decode(example.ids) == text and spans(tokenizer, example) == [trained]


def test_chat_prompt_and_completion_train_the_completion_alone():
    tokenizer = chat_tokenizer("chatml")
    (example,) = row_examples(tokenizer, {"prompt": CHAT[:3], "completion": CHAT[3:]}, "row 1")
    assert spans(tokenizer, example) == ["<think>hm</think>4<|im_end|>"]


def test_an_empty_answer_trains_the_end_of_the_turn():
    """Also under a chat template; a greeting that answers nothing is read and not trained."""
    tokenizer = chat_tokenizer("chatml")
    (example,) = row_examples(tokenizer, {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": ""}]}, "row")
    assert spans(tokenizer, example) == ["<|im_end|>"]
    (example,) = row_examples(tokenizer, {"messages": [{"role": "assistant", "content": "Hello!"}, *CHAT[:2]]}, "row")
    assert spans(tokenizer, example) == [CHAT[1]["content"] + "<|im_end|>"]
    assert "Hello!" in tokenizer.decode(example.ids)


def test_a_conversation_that_the_template_refuses_is_quoted():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(InputError, match="no system role here.*user: '1.1='"):
        row_examples(tokenizer, {"messages": CHAT}, "row")


def test_the_prompt_template_stands_around_the_prompts_of_texts(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "1+1", "completion": "2"}\n{"prompt": "1+2", "completion": "3"}\n')
    rows = sft.load_rows(Config(dataset_name=str(path), prompt_template="{prompt}=", n_train=1))
    assert rows == [{"prompt": "1+1=", "completion": "2"}]


@pytest.mark.parametrize("row", [{"messages": CHAT[:1]}, {"question": "1"}, {"prompt": "1"}])
def test_a_row_without_a_trained_token_is_named(row):
    with pytest.raises(InputError, match="row 7"):
        row_examples(chat_tokenizer("chatml"), row, "row 7")


def test_long_examples_are_left_out_and_counted(capsys):
    rows = [{"prompt": "1+1=", "completion": "2" * n} for n in (1, 30, 2)]
    kept = make_examples(rows, char_tokenizer(), Config(max_length=10))
    assert [len(e.ids) for e in kept] == [6, 7] and "1 of 3" in capsys.readouterr().out
    with pytest.raises(InputError, match="--max_length 3"):
        make_examples(rows, char_tokenizer(), Config(max_length=3))


def uneven(tokenizer, n=12):
    """Examples of very unequal lengths."""
    rows = [{"prompt": "9" * (1 + 7 * i % 11) + "=", "completion": "8" * (1 + i * i % 23)} for i in range(n)]
    return [row_examples(tokenizer, row, "row")[0] for row in rows]


def gradients(model, examples, max_rows, max_tokens, world=ALONE):
    """(loss, gradients) of one step through the script's own path."""
    model.zero_grad()
    policy, total = sft.Policy(model), 0.0
    n_tokens = sum(sum(e.trained[1:]) for e in examples)
    for part in micro_batches([len(e.ids) for e in examples], max_rows, max_tokens, world):
        batch = collate(examples, part, torch.device("cpu"))
        loss = nll_loss(policy(batch)[0], batch.mask_BS, n_tokens)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_and_gradient_equal_a_loop_over_single_unpadded_examples(tiny):
    model, tokenizer = tiny
    examples = uneven(tokenizer)
    model.zero_grad()
    nll, n = 0.0, 0
    for example in examples:  # the formula, one token at a time, through transformers' own logits
        logps = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(example.ids)):
            if example.trained[t]:
                nll, n = nll - logps[t - 1, example.ids[t]], n + 1
    (nll / n).backward()
    nll = nll.detach()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for max_rows, max_tokens in ((12, 0), (1, 0), (5, 0), (12, 40), (3, 64)):  # padded together, alone, budgeted
        loss, found = gradients(model, examples, max_rows, max_tokens)
        assert_close(loss, nll / n)
        assert_close(found, wanted)


def test_gradient_checkpointing_changes_nothing(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]).train(), tiny[1]
    _, plain = gradients(model, uneven(tokenizer), 4, 0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, found = gradients(model, uneven(tokenizer), 4, 0)
    assert_close(found, plain)
    for asked in (True, False):
        policy = sft.shard(sft.Policy(copy.deepcopy(tiny[0]).train()), Config(gradient_checkpointing=asked), ALONE)
        assert policy.model.is_gradient_checkpointing == asked and policy.training


def test_a_decoder_of_its_own_keeps_rotary_frequencies_in_float32(tiny):
    decoder = sft.make_decoder(tiny[0], Config(bf16=True), ALONE)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in decoder.parameters())
    assert {b.dtype for b in decoder.buffers()} == {torch.float32} and decoder is not tiny[0]
    assert {p.dtype for p in tiny[0].parameters()} == {torch.float32}


def test_a_run_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_run(Config(), [], ALONE)["git_commit"] is None


def test_one_process_speaks_for_all(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sft.dist, "init_process_group", lambda timeout: None)
    monkeypatch.setattr(sft.dist, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(sft.dist, "get_rank", lambda: rank)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", sys.stdout)  # is put back
            assert sft.start(Config())[:2] == (rank, 2)
            print(f"process {rank}")
    assert capsys.readouterr().out == "process 0\n"


def test_the_end_is_trained_and_the_prompt_is_not(tiny):
    """By the gradient: the head's row of a token that is only ever a target of untrained positions stays at softmax size."""
    model, tokenizer = tiny
    (example,) = row_examples(tokenizer, {"prompt": "7777=", "completion": "1"}, "row")
    batch = collate([example], [0], torch.device("cpu"))
    logps_BS, _ = sft.Policy(model)(batch)
    assert batch.mask_BS[0].tolist() == [False] * 4 + [True, True]
    assert torch.equal(logps_BS[0] != 0, batch.mask_BS[0])
    (grad,) = torch.autograd.grad(nll_loss(logps_BS, batch.mask_BS, 2), model.lm_head.weight)
    hidden = model.model(batch.ids_BT[:, :-1]).last_hidden_state[0]
    logits = hidden @ model.lm_head.weight.T
    wanted = (logits.softmax(-1) - F.one_hot(batch.ids_BT[0, 1:], len(tokenizer)))[4:].T @ hidden[4:] / 2
    assert_close(grad, wanted)


def test_the_model_that_samples_is_a_copy_on_the_device_of_training(tiny):
    """A copy left on the CPU would sample there beside an idle GPU; `meta` stands in for the GPU."""
    decoder = sft.make_decoder(tiny[0], Config(bf16=True), World(0, 1, torch.device("meta")))
    assert {(p.device.type, p.dtype, p.requires_grad) for p in decoder.parameters()} == {("meta", torch.bfloat16, False)}
    decoder, policy = sft.make_decoder(tiny[0], Config(), ALONE), sft.Policy(copy.deepcopy(tiny[0]))
    for tensor in (policy.model.lm_head.weight.data, policy.model.model.rotary_emb.inv_freq):
        tensor += 1
    weight, buffer = decoder.lm_head.weight, decoder.model.rotary_emb.inv_freq
    assert torch.equal(weight, tiny[0].lm_head.weight) and weight is not tiny[0].lm_head.weight
    sft.refresh(decoder, policy)
    assert torch.equal(weight, policy.model.lm_head.weight) and torch.equal(buffer, policy.model.model.rotary_emb.inv_freq)


def test_padding_is_exact_because_nothing_looks_right(tiny):
    model, tokenizer = tiny
    examples = uneven(tokenizer, 4)
    policy = sft.Policy(model)
    together, _ = policy(collate(examples, range(4), torch.device("cpu")))
    for row, example in enumerate(examples):
        alone, _ = policy(collate([example], [0], torch.device("cpu")))
        assert_close(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_cover_each_row_once_and_ranks_stay_in_step(size):
    lengths = [3, 50, 7, 7, 20, 1, 90, 4, 33, 12, 5]
    shares = [micro_batches(lengths, 4, 60, World(rank, size, None)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for part in share for row in part]
    assert sorted(rows) == list(range(len(lengths)))
    for share in shares:
        for part in share:
            assert len(part) <= 4 and (len(part) <= 1 or len(part) * max(lengths[r] for r in part) <= 60)


def test_every_epoch_is_a_permutation_and_steps_need_no_memory():
    seen = [row for step in range(6) for row in rows_of_step(10, 5, step, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == sorted(seen[20:]) == list(range(10))
    assert seen[:10] != seen[10:20]
    crossing = [row for step in range(5) for row in rows_of_step(10, 4, step, seed=3)]
    assert crossing == seen[:20]  # the same order whatever the size of a step
    assert rows_of_step(10, 10, 1, seed=3) != rows_of_step(10, 10, 0, seed=4)  # no pass of one seed is another's
    assert rows_of_step(10, 5, 2, seed=3) == seen[10:15] and rows_of_step(10, 5, 2, seed=4) != seen[10:15]
    assert sorted(rows_of_step(3, 7, 0, seed=0)) == [0, 0, 1, 1, 2, 2, 2] or len(rows_of_step(3, 7, 0, seed=0)) == 7


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule(kind):
    for steps in (4, 0.33):  # 4 steps, or a third of 12, rounded up
        check_schedule(kind, Config(learning_rate=2.0, warmup_steps=steps, max_steps=12, lr_scheduler_type=kind))


def check_schedule(kind, config):
    rates = [sft.learning_rate(step, config) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    wanted = {"constant": lambda x: 2.0, "linear": lambda x: 2 * (1 - x), "cosine": lambda x: 1 + math.cos(math.pi * x)}
    assert rates[4:] == pytest.approx([wanted[kind](i / 8) for i in range(9)])


def test_decay_touches_matrices_alone(tiny):
    model = copy.deepcopy(tiny[0])
    optimizer = sft.make_optimizer(model, Config(learning_rate=0.1, weight_decay=0.5))
    before = copy.deepcopy(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, before[name] * factor)


@pytest.mark.parametrize("max_grad_norm, length", [(0.0, 5.0), (2.0, 2.0), (10.0, 5.0)])
def test_a_long_gradient_is_cut_to_its_greatest_length_and_logged_whole(max_grad_norm, length):
    policy = torch.nn.Linear(2, 1, bias=False)
    optimizer, before = torch.optim.SGD(policy.parameters()), policy.weight.detach().clone()
    config = Config(max_grad_norm=max_grad_norm, learning_rate=0.5, lr_scheduler_type="constant", warmup_steps=0, bf16=False)
    slope = torch.tensor([[3.0, -4.0]])
    numbers, taken = sft.train_step(policy, optimizer, [1, 2], lambda policy, batch: ((policy.weight * slope).sum() / 2, {}),
                                    0, config, ALONE)
    assert taken and numbers["grad_norm"] == pytest.approx(5.0)
    assert torch.allclose(before - policy.weight, 0.5 * slope * length / 5, atol=1e-5)


def test_a_step_after_a_bad_one_is_as_if_there_had_been_none():
    """Nothing is left of a gradient that was not finite."""
    policy = torch.nn.Linear(2, 1, bias=False)
    optimizer, before = torch.optim.SGD(policy.parameters()), policy.weight.detach().clone()
    config = Config(max_grad_norm=0.0, learning_rate=0.5, lr_scheduler_type="constant", warmup_steps=0, bf16=False)
    for factor, moved in ((math.nan, 0), (1, 1), (math.inf, 1), (1, 2)):
        numbers, taken = sft.train_step(policy, optimizer, [1], lambda policy, batch: (policy.weight.sum() * factor, {}),
                                        0, config, ALONE)
        assert taken == math.isfinite(factor) and (not taken or numbers["grad_norm"] == pytest.approx(2**0.5))
        assert torch.allclose(policy.weight, before - 0.5 * moved)


def new_log(folder, config):
    """The Log of a new run in this folder."""
    config.output_dir = str(folder)
    return Log(describe_run(config, [], ALONE), None, SimpleNamespace(num_parameters=lambda: 0), config, ALONE)


def test_only_bad_steps_in_a_row_end_a_run(tmp_path):
    state, log = {"step": 0, "bad_steps": 0}, new_log(tmp_path, Config(max_bad_steps=3))
    for taken in (False, False, True) * 2 + (False, False):
        log.count(state, taken, [7])
    assert state == {"step": 8, "bad_steps": 2}
    with pytest.raises(sft.RunError, match="3 steps in a row"):
        log.count(state, False, [7])
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "rows": [7]} for step in (1, 2, 4, 5, 7, 8, 9)]


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path):
    for step in (8, 9, 10, 100):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        write_json(tmp_path / "checkpoints" / f"step_{step}" / "state.json", {"sizes": {}})
    assert newest_checkpoint(tmp_path).name == "step_100"
    (tmp_path / "checkpoints" / "step_100" / "state.json").unlink()
    assert newest_checkpoint(tmp_path).name == "step_10"


def test_a_run_is_evaluated_greedily_on_problems_it_does_not_train_on(tmp_path, tiny):
    config = Config(output_dir=str(tmp_path), n_eval=30, levels="1-2", max_completion_length=8)
    problems = load_eval_problems(config)
    assert problems == load_problems("chain", "validation", 30, 0, levels="1-2")
    assert not {p.prompt for p in problems} & {p.prompt for p in load_problems("chain", "train")}
    log = new_log(tmp_path, config)
    for seed in (0, 1):
        torch.manual_seed(seed)
        sft.eval_numbers(tiny[0], tiny[1], problems, 0, log, config)
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for record in shown:
        ids = torch.tensor([encode_prompt(tiny[1], record["prompt"])])
        best = tiny[0].generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert record["completion"] == tiny[1].decode(best, skip_special_tokens=True)


def test_a_run_learns_and_leaves_what_it_says(tmp_path, capsys):
    run = tmp_path / "run"
    sft.main(Config(output_dir=str(run), max_steps=30, n_train=300, levels="1", error_rate=0, eval_steps=15, n_eval=8,
                    save_steps=10, per_device_train_batch_size=32, max_completion_length=16))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(31))
    assert lines[-1]["loss"] < 0.5 * lines[1]["loss"]
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "time/tokens_per_s"} <= set(lines[1])
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 15, 30]
    assert all(line["eval/accuracy/low"] <= line["eval/accuracy"] <= line["eval/accuracy/high"] for line in lines[::15])
    assert lines[2]["num_tokens"] > lines[1]["num_tokens"]  # of the run so far
    for name in ("args.json", "samples.jsonl", "curves.png", "model.safetensors", "tokenizer.json"):
        assert (run / name).stat().st_size > 0, name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_20", "step_30"]
    shown, args = capsys.readouterr().out, json.loads((run / "args.json").read_text())
    assert "300 examples of" in shown and "30 steps of 32 rows: 3.2 passes" in shown
    assert shown.count(": wrong") + shown.count(": right") == 3  # a completion at each evaluation
    assert "[[" in shown and "0.616 M parameters, learning rate 0.003" in shown  # which tokens are trained, and how
    assert args["parameters"] == 616_256 and args["learning_rate"] == 0.003 and args["flags"]["learning_rate"] == 0.0
    assert args["finished"] and args["flags"]["seed"] == 0 and args["versions"]["torch"] == torch.__version__
    model, tokenizer = load_model(str(run))
    again, _ = load_model(str(run / "checkpoints" / "step_30"))
    ids = torch.tensor([encode_prompt(tokenizer, "1+1=")])
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("flags, named", [
    (dict(model_name_or_path="no/such/model"), "--model_name_or_path no/such/model"),
    (dict(dataset_name="nowhere.jsonl"), "nowhere.jsonl"),
    (dict(max_steps=0), "--max_steps 0"),
    (dict(lr_scheduler_type="up"), "--lr_scheduler_type up"),
    (dict(learning_rate=float("nan")), "--learning_rate nan"), (dict(learning_rate=float("inf")), "--learning_rate inf"),
    (dict(max_length=1), "--max_length 1"), (dict(num_train_epochs=-1), "--num_train_epochs -1"),
    (dict(levels="0-99"), "--levels"),
    (dict(report_to="fax"), "--report_to fax"),
    (dict(prompt_template="no place"), "--prompt_template"),
])
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, flags, named):
    with pytest.raises(InputError) as caught:
        sft.main(Config(**{"output_dir": str(tmp_path / "run"), "eval_steps": 0, **flags}))
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, named", [
    ("", "data.jsonl"), ('{"prompt": "1", "completion": "2"}\n{"prompt": ', "data.jsonl:2"),
    ('{"question": "1"}\n', "column"), ('{"messages": [{"role": "user", "content": "hi"}]}\n', "row 1"),
    ('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n', "row 2"),
])
def test_wrong_files_are_named_with_their_line(tmp_path, content, named):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=named):
        sft.main(Config(dataset_name=str(path), output_dir=str(tmp_path / "run"), max_steps=1))
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="--output_dir"):
        sft.main(Config(output_dir=str(tmp_path), overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_training_on_files_in_trl_formats(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) + "\n" for i in range(8)))
    sft.main(Config(dataset_name=str(path), output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4,
                    num_train_epochs=1.0))
    assert len(Path(tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert "no evaluation while training: --eval_dataset_name" in capsys.readouterr().out


def test_the_loss_of_texts_is_the_mean_over_the_tokens_that_something_predicts(tmp_path, tiny):
    """The first token of a text has no context, so it neither is trained nor counts."""
    texts = ["1+1=2", "7", "12+30=42"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sft.main(Config(dataset_name=str(tmp_path / "data.jsonl"), output_dir=str(tmp_path / "run"), max_steps=1,
                    per_device_train_batch_size=3))
    [line] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    nll = []
    for text in texts:
        ids = torch.tensor([tiny[1](text).input_ids + [tiny[1].eos_token_id]])
        nll += F.cross_entropy(tiny[0](ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    assert_close(line["loss"], sum(nll) / len(nll))
    assert line["num_tokens"] == len(nll)


def test_solutions_are_spoiled_at_the_rate_asked_for():
    for rate in (0.0, 0.15, 0.5):
        rows = sft.load_rows(Config(n_train=500, levels="1", error_rate=rate))  # of one step each
        wrong = sum(not verify(row["completion"], row["answer"]) for row in rows) / 500
        assert wrong == pytest.approx(rate, abs=0.05) and (wrong > 0) == (rate > 0)


def test_an_evaluation_between_the_printed_steps_is_printed(tmp_path, capsys):
    sft.main(Config(output_dir=str(tmp_path / "run"), max_steps=7, eval_steps=3, logging_steps=5, n_eval=2, n_train=8,
                    per_device_train_batch_size=2, max_completion_length=4))
    printed = [line.split("/")[0].strip() for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert printed == ["1", "3", "5", "6", "7"]  # the first step, so that one sees that it goes on


@pytest.mark.parametrize("flags, fault", [
    (dict(eval_dataset_name="tset.jsonl"), "^--eval_dataset_name tset.jsonl: no such file"),
    (dict(dataset_name="tset.jsonl"), "^--dataset_name tset.jsonl: no such file"),
    (dict(dataset_test_split="holdout"), "^--dataset_test_split holdout: a procedural data set has"),
])
def test_what_cannot_be_evaluated_on_is_named_by_this_script_s_flags(tmp_path, flags, fault):
    with pytest.raises(InputError, match=fault):
        sft.main(Config(output_dir=str(tmp_path / "run"), max_steps=1, n_train=8, **flags))


def test_example_and_batch_types_are_plain():
    batch = collate([Example([5, 6, 7], [False, True, True]), Example([5, 6], [False, True])], [1, 0], torch.device("cpu"))
    assert batch.ids_BT.tolist() == [[5, 6, 0], [5, 6, 7]] and batch.where_N.tolist() == [0, 2, 3] and batch.rows == [1, 0]
    nothing = collate([], [], torch.device("cpu"))
    assert nothing.mask_BS.sum() == 0 and nothing.ids_BT.shape == (1, 2)


def test_data_on_the_hub_may_have_trls_formats(monkeypatch):
    chat = {"messages": CHAT}
    monkeypatch.setattr("eval.read_hub", lambda name, split: [chat] * 3)
    assert sft.load_rows(Config(dataset_name="owner/chats", n_train=2)) == [chat] * 2
    monkeypatch.setattr("eval.read_hub", lambda name, split: [{"question": "1+1?", "answer": "Two.\n#### 2"}] * 3)
    assert sft.load_rows(Config(dataset_name="owner/problems", n_train=2))[1]["completion"] == "Two.\n#### 2"


def test_wandb_gets_flags_and_curves(tmp_path, monkeypatch):
    """Of two runs in one process each is a run of its own, whatever folder it is in, and is found again by its id."""
    inits, lines = [], []

    class Run:
        def log(self, line, step):
            lines.append((step, line))

    def init(**settings):
        inits.append(settings)
        return Run()

    wandb = SimpleNamespace(init=init, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = Config(report_to="wandb", max_steps=2)
    for folder in ("a", "b", "b"):
        config.output_dir = str(tmp_path / folder)
        args, resume = sft.open_run(config, [], ALONE)
        log = Log(args, resume, SimpleNamespace(num_parameters=lambda: 0), config, ALONE)
        log.step(1, {"loss": 1.0}, (), 1, 1.0)
        log.step(2, {"loss": 0.5}, (), 1, 1.0)
    assert all(settings["config"].items() >= asdict(replace(config, output_dir=settings["config"]["output_dir"])).items()
               for settings in inits)
    assert all("versions" in settings["config"] and settings["reinit"] == "finish_previous" for settings in inits)
    a, b, again = (settings["id"] for settings in inits)
    assert a != b == again
    assert [line["loss"] for _, line in lines] == [1.0, 0.5] * 3 and [step for step, _ in lines] == [1, 2] * 3


def test_text_and_messages_are_not_mixed_in_a_row():
    row = {"prompt": "1+1=", "completion": [{"role": "assistant", "content": "2"}]}
    with pytest.raises(InputError, match="row 7: prompt and completion must both"):
        sft.row_examples(char_tokenizer(), row, "row 7")


def test_without_levels_all_that_the_data_has_are_kept(tmp_path):
    rows = [{"prompt": f"{level}=", "answer": "1", "solution": "#1", "level": level} for level in (1, 5, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = sft.load_train_problems(Config(dataset_name=str(tmp_path / "rows.jsonl"), n_train=0))
    assert [problem.level for problem in kept] == [1, 5, 9]
