"""distill.py against TRL's distillation trainers on the same work: tokens per CPU-second, and peak memory beside.

    python tests/bench/bench_distill.py --trl_python PYTHON     # a Python with TRL and all that requirements.txt names

`logits`: forward KL on given completions of 16 to 256 tokens, against TRL's GKDTrainer at lmbda 0, which is its trainer
for that. `on_policy`: reverse KL on the student's own samples, free to end, against TRL's DistillationTrainer. Student
(3.2 M parameters and an 8,192-row head) and teacher (twice the layers) are the same, so are prompts and data. Each side
runs in a process of its own, taking turns, with one thread; the first two steps of a run are left out, and of the rounds
the median counts. Completions given are checked to be the same tokens with the same first loss; completions sampled
differ, so there the mean length is printed. TRL runs its defaults, but without gradient checkpointing (which would only
slow it down), in one batch and in micro-batches of 8. Results: tests/bench/results/distill.json.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from bench_trl import Meter, cpu_model, save_model, sums_text, write_rows

HERE = Path(__file__).resolve().parent
ROWS, VOCABULARY = 32, 8192
CASES = {"logits": 0.0, "on_policy": 1.155}  # the end-of-text token's weight: a mean of some 64 sampled tokens
LINES = ("plain", "micro-batch 8")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def prepare(case, folder, steps):
    """Writes student, teacher, ours.jsonl, and the same rows for TRL in the order in which ours will visit them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

    from distill import rows_of_step
    save_model(folder / "student", CASES[case])
    student, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "student"), AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.chat_template = TEMPLATE
    config = student.config
    config.num_hidden_layers, config.layer_types = 8, ["full_attention"] * 8
    torch.manual_seed(1)
    teacher = Qwen3ForCausalLM(config)
    teacher.lm_head.weight.data *= 10  # sharper than random weights are, so that the first losses say something
    for name, model in (("student", AutoModelForCausalLM.from_pretrained(folder / "student")), ("teacher", teacher)):
        model.resize_token_embeddings(VOCABULARY)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)
    rows = [{"prompt": sums_text(rng, rng.randint(8, 32)), "completion": sums_text(rng, rng.randint(16, 256))}
            for _ in range(ROWS * 8)]
    visited = [[rows[i] for i in rows_of_step(len(rows), ROWS, step, 0)] for step in range(steps)]
    write_rows(folder / "ours.jsonl", [rows])
    if case == "logits":
        visited = [[{"messages": [{"role": "user", "content": row["prompt"]},
                                  {"role": "assistant", "content": row["completion"]}]} for row in step] for step in visited]
    else:
        visited = [[{"prompt": row["prompt"]} for row in step] for step in visited]
    write_rows(folder / "trl.jsonl", visited)


def run_ours(case, folder, steps):
    """`main` of distill.py with its defaults, but for what makes the work the same."""
    import distill
    meter = Meter()

    class MeteredLog(distill.Log):
        def __init__(self, *args):
            super().__init__(*args)
            meter.begin()

        def step(self, step, numbers, show, tokens, seconds):
            super().step(step, numbers, show, tokens, seconds)
            meter.note(numbers["num_tokens"] - sum(meter.tokens), numbers["loss"])

    distill.Log = MeteredLog
    distill.main(distill.Config(
        method=case, model_name_or_path=str(folder / "student"), teacher_model_name_or_path=str(folder / "teacher"),
        dataset_name=str(folder / "ours.jsonl"), n_train=0, output_dir=str(folder / "run"), overwrite=True,
        per_device_train_batch_size=ROWS, max_steps=steps, learning_rate=1e-7, lr_scheduler_type="constant", warmup_steps=0,
        max_completion_length=256, eval_steps=0, save_steps=0))
    return meter.result()


def run_trl(case, folder, steps, line):
    """TRL's trainer for the case; `line` as in LINES."""
    import torch
    import transformers
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    rows = 8 if line == "micro-batch 8" else ROWS
    shared = dict(output_dir=str(folder / "trl"), per_device_train_batch_size=rows, gradient_accumulation_steps=ROWS // rows,
                  max_steps=steps, gradient_checkpointing=False, learning_rate=1e-7, lr_scheduler_type="constant",
                  use_cpu=True, bf16=False, save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True,
                  dataloader_pin_memory=False)
    data = load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train", cache_dir=str(folder / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    load = AutoModelForCausalLM.from_pretrained
    setup = dict(model=load(folder / "student"), teacher_model=load(folder / "teacher"), train_dataset=data,
                 processing_class=tokenizer)
    meter, lengths = Meter(), []
    if case == "logits":
        from trl.experimental.gkd import GKDConfig, GKDTrainer
        args = GKDConfig(**shared, lmbda=0.0, beta=0.0, temperature=1.0, train_sampling_strategy="sequential")
        trainer = GKDTrainer(args=args, **setup)
    else:
        args = trl.DistillationConfig(**shared, beta=1.0, max_completion_length=256, shuffle_dataset=False)
        trainer = trl.DistillationTrainer(args=args, **setup)

    counted = trainer.compute_loss  # where the trained tokens are: labels, or the mask of what was sampled

    def counting(model, inputs, *given, **named):
        mask = inputs["labels"] != -100 if case == "logits" else inputs["completion_mask"]
        lengths.append(int(mask.sum()))
        return counted(model, inputs, *given, **named)

    trainer.compute_loss = counting

    class MeterCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            meter.begin()

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                meter.note(sum(lengths), logs["loss"])
                lengths.clear()

    trainer.add_callback(MeterCallback())
    trainer.train()
    return {**meter.result(), "versions": {library.__name__: library.__version__ for library in (torch, transformers, trl)}}


def child(side, case, folder, steps):
    """One process's work: `prepare`, `ours`, or a line of TRL's; the result goes to result.json."""
    import torch
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(HERE.parents[1]))
    folder, steps = Path(folder), int(steps)
    if side == "prepare":
        return prepare(case, folder, steps)
    result = run_ours(case, folder, steps) if side == "ours" else run_trl(case, folder, steps, side)
    (folder / "result.json").write_text(json.dumps(result))


def run_child(side, case, folder, steps, python):
    """What `child` wrote, from a new process; its output is shown only where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                   "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE)}
    done = subprocess.run([python, __file__, "--child", side, case, str(folder), str(steps)], env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nbench_distill.py: {case}, {side}: exit code {done.returncode}")
    return None if side == "prepare" else json.loads((folder / "result.json").read_text())


def compare(case, steps, rounds, python):
    """Runs every side of a case in turn, as many times as there are rounds: {side: the figures of its table row}."""
    found = {side: [] for side in ("ours", *LINES)}
    with tempfile.TemporaryDirectory() as folder:
        run_child("prepare", case, Path(folder), steps, sys.executable)
        for _ in range(rounds):
            for side, runs in found.items():
                runs.append(run_child(side, case, Path(folder), steps, python if side in LINES else sys.executable))
    rows = {}
    for side, runs in found.items():
        rates = [sum(run["tokens"]) / sum(run["cpu_s"]) for run in runs]
        rows[side] = {"cpu_s_per_step": statistics.median(statistics.mean(run["cpu_s"]) for run in runs),
                      "tokens_per_step": statistics.mean(runs[0]["tokens"]),
                      "tokens_per_cpu_s": statistics.median(rates), "tokens_per_cpu_s_by_round": rates,
                      "peak_mb": max(run["peak_mb"] for run in runs), "before_mb": max(run["before_mb"] for run in runs),
                      "first_loss": runs[0]["first_loss"], "versions": runs[0].get("versions")}
    ours = rows["ours"]
    for side, row in rows.items():
        row["ratio"] = ours["tokens_per_cpu_s"] / row["tokens_per_cpu_s"]
        row["ratio_by_round"] = [mine / theirs for mine, theirs in zip(ours["tokens_per_cpu_s_by_round"],
                                                                       row["tokens_per_cpu_s_by_round"])]
        for run, mine in zip(found[side], found["ours"]) if case == "logits" else ():
            if run["tokens"] != mine["tokens"] or abs(mine["first_loss"] / run["first_loss"] - 1) > 1e-3:
                sys.exit(f"bench_distill.py: {side}: not the same work: tokens {run['tokens']}, loss {run['first_loss']}; "
                         f"ours {mine['tokens']}, {mine['first_loss']}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5, help="steps a run, the first two left out")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, taking turns")
    parser.add_argument("--trl_python", default=sys.executable, help="the Python that runs TRL's side")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "distill.json")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}}
    report = {"date": str(date.today()), "cpu": cpu_model(), "threads": 1, "steps": options.steps, "rounds": options.rounds,
              "cases": report["cases"]}
    for case in options.cases:
        rows = compare(case, options.steps, options.rounds, options.trl_python)
        report["cases"][case], report["versions"] = rows, rows["plain"]["versions"]
        print(f"\n{case}: at least {min(rows[line]['ratio'] for line in LINES):.2f} times TRL (wanted: 1.5)")
        print(f"{'':22}{'CPU-s/step':>11}{'tokens/step':>12}{'tokens/CPU-s':>13}{'ours / this (rounds)':>26}{'peak MB':>9}"
              f"{'before step 1':>14}{'first loss':>11}")
        for side, row in rows.items():
            by_round = f"{row['ratio']:.2f} ({min(row['ratio_by_round']):.2f} to {max(row['ratio_by_round']):.2f})"
            print(f"{side if side == 'ours' else 'TRL, ' + side:22}{row['cpu_s_per_step']:>11.3f}{row['tokens_per_step']:>12,.0f}"
                  f"{row['tokens_per_cpu_s']:>13,.0f}{by_round:>26}{row['peak_mb']:>9,.0f}{row['before_mb']:>14,.0f}"
                  f"{row['first_loss']:>11.5f}", flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:6])
    else:
        main()
