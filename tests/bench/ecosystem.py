"""What every script leaves, read by what others use: transformers, lm-evaluation-harness, TRL, Weights & Biases.

    pip install lm-eval trl && python tests/bench/ecosystem.py            # no network, no GPU

Trains each script for a few steps on the embedded task with --report_to wandb (offline), and then holds: transformers'
own loading and `generate` write the very tokens that eval.py's sampler writes; lm-eval counts the same right answers
as eval.py; TRL's SFTTrainer trains the checkpoint, and what it saves loads here; the offline wandb run holds flags,
curves and samples. Last, local files in TRL's formats train unchanged. Exit code 1 if a check fails.
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(WANDB_MODE="offline", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SHORT = ["--levels", "1", "--eval_steps", "2", "--n_eval", "8", "--max_completion_length", "24"]
STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "8"]
# For each script its flags, and the folders of the runs that it leaves.
RUNS = {
    "sft": ([*SHORT, "--max_steps", "150", "--eval_steps", "75", "--warmup_steps", "5"], [""]),
    "dpo": ([*SHORT, *STEPS, "--round_prompts", "32"], [""]),
    "grpo": ([*SHORT, *STEPS], [""]),
    "distill": ([*SHORT, *STEPS, "--teacher_sft_steps", "2", "--teacher_steps", "2", "--teacher_batch_size", "16",
                 "--n_traces", "16"], ["warm_up", "teacher", "student"]),
    "moe": (["--max_steps", "2", "--eval_steps", "2", "--n_eval", "2", "--n_train", "40", "--max_length", "64"], [""]),
}
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
USER, SAYS_2, SAYS_3 = ({"role": "assistant" if "#" in text else "user", "content": text}
                        for text in ("1+1=", "1+1=2#2", "1+1=3#3"))
# TRL's formats: name, script, a row, does it need a chat template, trained tokens of a row (pairs: 0, not counted).
FORMATS = [
    ("text", "sft", {"text": "1+1=1+1=2#2"}, False, 11),  # all but the first token, and the end
    ("prompt/completion", "sft", {"prompt": "1+1=", "completion": "1+1=2#2"}, False, 8),
    ("prompt/completion, messages", "sft", {"prompt": [USER], "completion": [SAYS_2]}, True, 8),
    ("messages, two turns", "sft", {"messages": [USER, SAYS_2, USER, SAYS_3]}, True, 16),
    ("chosen/rejected, prompt", "dpo", {"prompt": "1+1=", "chosen": "1+1=2#2", "rejected": "1+1=3#3"}, False, 0),
    ("chosen/rejected, no prompt", "dpo", {"chosen": "1+1= 1+1=2#2", "rejected": "1+1= 1+1=3#3"}, False, 0),
    ("chosen/rejected, no prompt, messages", "dpo", {"chosen": [USER, SAYS_2], "rejected": [USER, SAYS_3]}, True, 0),
    ("chosen/rejected, prompt, messages", "dpo", {"prompt": [USER], "chosen": [SAYS_2], "rejected": [SAYS_3]}, True, 0),
]
TASK = {"task": "local_chain", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
        "generation_kwargs": {"until": ["<eos>"], "do_sample": False, "max_gen_toks": 24},
        "filter_list": [{"name": "last", "filter": [{"function": "regex", "regex_pattern": "#(-?[0-9]+)$"},
                                                    {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
failures = []


def check(what, function, *arguments):
    """Runs one check and prints one line about it."""
    try:
        print(f"ok    {what}: {function(*arguments)}", flush=True)
    except Exception as error:  # whatever it is, it is this check's outcome, and the next one still runs
        failures.append(what)
        print(f"FAIL  {what}: {type(error).__name__}: {str(error).strip()[-400:]}", flush=True)


def run_script(name, *flags):
    """Runs a script of ours and returns what it printed; AssertionError with the end of that where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *flags], capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-300:]} {done.stderr[-600:]}"
    return done.stdout


def trains(name, out, sft):
    flags = [*RUNS[name][0], "--output_dir", str(out), "--report_to", "wandb"]
    run_script(name, *flags, *(["--model_name_or_path", str(sft)] if name in ("dpo", "grpo", "distill") else []))
    return f"{sum(1 for _ in open(out / RUNS[name][1][-1] / 'metrics.jsonl'))} steps"


def generates(folder, problems):
    """transformers' own `generate`, from the folder alone, against eval.py's sampler: the same tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = [ground.encode_prompt(tokenizer, problem.prompt) for problem in problems]
    ours = ground.generate(model, tokenizer, prompts, max_new_tokens=24, temperature=0.0)
    for i, prompt in enumerate(prompts):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt):].tolist()
        assert theirs == ours.tokens_RT[i, : ours.lengths_R[i]].tolist(), f"{problems[i].prompt}: other tokens"
    return f"{len(prompts)} greedy completions, token by token those of eval.py, such as {tokenizer.decode(theirs)!r}"


def evaluates(folder, problems, folder_of_task):
    """lm-eval on the local task against eval.py on the same problems: the same number of right answers.

    By the task's rule, a #number at the end; eval.py's own falls back on the last number of a text that has none.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    found = simple_evaluate(model="hf", model_args=f"pretrained={folder},dtype=float32", tasks=["local_chain"],
                            task_manager=TaskManager(include_path=str(folder_of_task)), device="cpu", batch_size=8)
    theirs = found["results"]["local_chain"]["exact_match,last"]
    ours = ground.evaluate(*ground.load_model(str(folder)), problems, temperature=0.0, max_new_tokens=24)
    same_rule = sum(record["completion"].endswith("#" + record["answer"]) for record in ours["records"]) / len(problems)
    assert abs(theirs - same_rule) < 1e-9 and ours["accuracy"] >= theirs, f"lm-eval {theirs}, eval.py {same_rule}"
    return f"accuracy {theirs:.3f}, eval.py {same_rule:.3f} ({ours['accuracy']:.3f} by its own rule), {len(problems)} problems"


def trl_trains(folder, out):
    """One step of TRL's SFTTrainer from the folder; what it saves loads here and has moved."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    config = SFTConfig(output_dir=str(out), max_steps=1, per_device_train_batch_size=8, report_to=[], use_cpu=True,
                       bf16=False, learning_rate=1e-3, save_strategy="no", disable_tqdm=True)
    rows = Dataset.from_list([{"prompt": "1+1=", "completion": "1+1=2#2"}] * 8)
    trainer = SFTTrainer(str(folder), train_dataset=rows, args=config)
    loss = trainer.train().training_loss
    trainer.save_model(str(out))
    (before, _), (after, _) = ground.load_model(str(folder)), ground.load_model(str(out))
    moved = sum(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert moved > 0 and loss == loss, f"loss {loss}, {moved} tensors moved"
    return f"loss {loss:.3f}, {moved} tensors moved"


def wandb_records(path):
    """The records of an offline run's file: blocks of 32 KiB of records, each of crc, length, kind and bytes."""
    from wandb.proto import wandb_internal_pb2
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        at += left if (left := 32768 - at % 32768) < 7 else 0
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part of several
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def reports(folder):
    """The offline run holds every flag, every number of metrics.jsonl, and a table with the lines of samples.jsonl."""
    files = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1, f"{len(files)} offline runs"
    config, history = {}, {}
    for record in wandb_records(files[0]):
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        if "_step" in items:
            history[int(items["_step"])] = items
    flags = json.loads((folder / "args.json").read_text())["flags"]
    assert flags.keys() <= config.keys(), f"not in the config: {sorted(flags.keys() - config.keys())}"
    metrics = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    for line in metrics:
        assert line.keys() - {"step"} <= history.get(line["step"], {}).keys(), f"step {line['step']} is not whole"
    samples = sum(1 for _ in open(folder / "samples.jsonl")) if (folder / "samples.jsonl").exists() else 0
    tables = [json.loads(path.read_text()) for path in files[0].parent.glob("files/media/table/*.json")]
    rows = sum(len(table["data"]) for table in tables)
    assert rows == samples, f"{rows} samples in tables, {samples} in samples.jsonl"
    return f"{len(config)} settings, {len(metrics)} steps of up to {max(map(len, metrics))} numbers, {rows} samples"


def format_trains(script, row, model, work, tokens):
    out, data = work / "run", work / "data.jsonl"
    data.write_text((json.dumps(row) + "\n") * 2)
    run_script(script, "--dataset_name", str(data), "--model_name_or_path", str(model), "--max_steps", "1",
               "--per_device_train_batch_size", "2", "--output_dir", str(out), "--overwrite",
               *(["--pairs", "offline"] if script == "dpo" else []))
    line = json.loads(open(out / "metrics.jsonl").readline())
    assert not tokens or line["num_tokens"] == 2 * tokens, f"{line['num_tokens']} tokens trained, not {2 * tokens}"
    return f"loss {line['loss']:.3f}" + (f", {tokens} tokens a row trained" if tokens else "")


def main(work):
    problems = ground.load_problems("chain", "test", 40, levels="1")
    lines = (json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems)
    (work / "test.jsonl").write_text("\n".join(lines))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(work / "test.jsonl")}}}
    (work / "local_chain.yaml").write_text(json.dumps(task))  # JSON is YAML
    for name, (_, parts) in RUNS.items():
        check(f"{name}.py trains", trains, name, work / name, work / "sft")
        for folder in [work / name / part for part in parts]:
            check(f"{name}.py {folder.name}: wandb", reports, folder)
        check(f"{name}.py: transformers", generates, folder, problems[:4])
        check(f"{name}.py: lm-eval", evaluates, folder, problems, work)
        check(f"{name}.py: SFTTrainer", trl_trains, folder, work / f"{name}-trl")
    model, tokenizer = ground.load_model("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model.resize_token_embeddings(len(tokenizer))
    [part.save_pretrained(work / "chat") for part in (model, tokenizer)]
    for name, script, row, chat, tokens in FORMATS:
        check(f"{script}.py on {name}", format_trains, script, row, work / "chat" if chat else "tiny", work, tokens)


if __name__ == "__main__":
    missing = [name for name in ("lm_eval", "trl", "wandb") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"ecosystem.py: {', '.join(missing)} not installed: pip install lm-eval trl wandb", file=sys.stderr)
        sys.exit(2)
    import torch

    import eval as ground
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
    print(f"{len(failures)} failed")
    sys.exit(bool(failures))
