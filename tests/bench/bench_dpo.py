"""dpo.py beside TRL's DPOTrainer on the same pairs: CPU-seconds a step, tokens per CPU-second, memory, the ratios.

    pip install trl && python tests/bench/bench_dpo.py            # eight minutes, one thread; no network, no GPU

A step holds 32 pairs of 32 to 256 tokens a sequence, the two of a pair sharing a prompt that is a quarter to three
quarters of the shorter one. Both sides get the same 3.2 M random weights, tokenizer, pairs in each step, float32 and
AdamW, each in a process of its own, taking turns; each round has its own seed. Tokens are those of both sequences,
prompts counted twice, however many of them a side computes. A step costs the CPU time of the whole process from the
end of the step before to its own end; the first are left out, and the median of the others counts.

Lines with `reference` pay for the reference's log-probs of each pair, TRL in the step, ours (which never keeps a second
model) in its pass before the first step: that pass, divided by the steps, is added to each. The other lines leave this
cost out on both sides. `checkpointing` is TRL's default. `padded apart` is ours without sharing the prompt. The
benchmark fails unless all begin with the same loss, log 2, and end with the same margin. Results: results/dpo.json.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from bench_trl import WARM_UP, Meter, cpu_model, save_model, sums_text, write_rows  # noqa: E402

PAIRS = 32  # a step
OURS = ["ours, reference", "ours, precomputed", "ours, padded apart, precomputed"]
TRL = ["TRL, reference", "TRL, reference, micro-batch 8", "TRL, reference, checkpointing", "TRL, precomputed",
       "TRL, precomputed, micro-batch 8"]


def prepare(folder, steps, seed):
    """Writes the model, ours.jsonl, and the same pairs for TRL, in the order in which ours will visit them."""
    from dpo import rows_of_step
    save_model(folder / "model", 0.0)
    rng, rows = random.Random(seed), []
    for _ in range(PAIRS * steps):
        lengths = [rng.randint(32, 256) for _ in range(2)]  # of both whole sequences, their end tokens counted
        prompt = round(min(lengths) * rng.uniform(0.25, 0.75))
        chosen, rejected = (sums_text(rng, length - prompt - 1) for length in lengths)
        rows.append({"prompt": sums_text(rng, prompt), "chosen": chosen, "rejected": rejected})
    order = [i for step in range(steps) for i in rows_of_step(len(rows), PAIRS, step, seed + 1_000_003)]
    write_rows(folder / "ours.jsonl", [rows])
    write_rows(folder / "trl.jsonl", [[rows[i] for i in order]])


def run_ours(folder, steps, seed, line):
    """`main` of dpo.py with its defaults, but for what makes the work the same."""
    import dpo
    meter, before = Meter(), []
    meter.begin()
    compute = dpo.reference_logps

    def timed(*args):
        began = time.process_time()
        found = compute(*args)
        before.append(time.process_time() - began)
        meter.cpu = [time.process_time()]  # the first step begins here
        return found

    class MeteredLog(dpo.Log):
        def step(self, step, numbers, show, tokens, seconds):
            super().step(step, numbers, show, tokens, seconds)
            meter.note(tokens, numbers["loss"])
            meter.margin = numbers["rewards/margins"]

    dpo.Log, dpo.reference_logps = MeteredLog, timed
    dpo.main(dpo.Config(
        model_name_or_path=str(folder / "model"), dataset_name=str(folder / "ours.jsonl"), pairs="offline",
        loss_type="sigmoid", n_train=0, output_dir=str(folder / "run"), overwrite=True,
        per_device_train_batch_size=PAIRS, max_steps=steps, learning_rate=1e-5, lr_scheduler_type="constant",
        eval_steps=0, save_steps=0, seed=seed, share_prefix="padded apart" not in line))
    result = meter.result()
    if "reference" in line:
        result["cpu_s"] = [seconds + before[0] / steps for seconds in result["cpu_s"]]
    return {**result, "margin": meter.margin}


def run_trl(folder, steps, seed, line):
    """TRL's trainer; `line` as in TRL."""
    import torch
    import transformers
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    rows = 8 if "micro-batch 8" in line else PAIRS
    data = load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train", cache_dir=str(folder / "cache"))
    args = trl.DPOConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=rows, max_steps=steps,
                         gradient_accumulation_steps=PAIRS // rows, gradient_checkpointing="checkpointing" in line,
                         precompute_ref_log_probs="precomputed" in line, learning_rate=1e-5, max_length=1024,
                         lr_scheduler_type="constant", use_cpu=True, bf16=False, save_strategy="no", report_to=[],
                         logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, seed=seed)

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(model=AutoModelForCausalLM.from_pretrained(folder / "model"), args=args, train_dataset=data,
                      processing_class=AutoTokenizer.from_pretrained(folder / "model"))
    meter = Meter()

    class MeterCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            meter.begin()

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                meter.note(0, logs["loss"])
                meter.margin = logs["rewards/margins"]

    trainer.add_callback(MeterCallback())
    trainer.train()
    versions = {library.__name__: library.__version__ for library in (torch, transformers, trl)}
    return {**meter.result(), "margin": meter.margin, "versions": versions}


def child(side, folder, steps, seed):
    """One process's work; the result goes to result.json."""
    import torch
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(HERE.parents[1]))
    if side == "prepare":
        return prepare(folder, steps, seed)
    result = (run_ours if side.startswith("ours") else run_trl)(folder, steps, seed, side)
    (folder / "result.json").write_text(json.dumps(result))


def run_child(side, folder, steps, seed, threads):
    """What `child` wrote, from a new process; its output is shown only where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                   "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, "--child", side, str(folder), str(steps), str(seed)],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nbench_dpo.py: {side}: exit code {done.returncode}")
    return None if side == "prepare" else json.loads((folder / "result.json").read_text())


def tokens_per_step(folder, steps):
    """The mean number of tokens of both sequences of all pairs of a step, the first steps left out as in the times."""
    rows = [json.loads(line) for line in (folder / "trl.jsonl").read_text().splitlines()][WARM_UP * PAIRS :]
    tokens = sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2 for row in rows)  # 2 ends
    return tokens / (steps - WARM_UP)


def compare(steps, rounds, threads):
    """Runs every side in turn: {side: the figures of its table row}."""
    found, tokens = {}, []
    for seed in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for side in ["prepare", *OURS, *TRL]:
                found.setdefault(side, []).append(run_child(side, Path(folder), steps, seed, threads))
            tokens.append(tokens_per_step(Path(folder), steps))
    del found["prepare"]
    rows = {}
    for side, runs in found.items():
        cost = [statistics.median(run["cpu_s"]) for run in runs]
        rows[side] = {"cpu_s_per_step": statistics.median(cost), "cpu_s_by_round": cost,
                      "tokens_per_cpu_s": statistics.median(n / seconds for n, seconds in zip(tokens, cost)),
                      "peak_mb": max(run["peak_mb"] for run in runs), "first_loss": [run["first_loss"] for run in runs],
                      "margin": [run["margin"] for run in runs], "versions": runs[0].get("versions")}
    for side, row in rows.items():
        ours = rows["ours, reference" if "reference" in side else "ours, precomputed"]
        row["ratio_by_round"] = [theirs / mine for theirs, mine in zip(row["cpu_s_by_round"], ours["cpu_s_by_round"])]
        for mine, theirs in zip(ours["margin"] + ours["first_loss"], row["margin"] + row["first_loss"]):
            if abs(mine - theirs) > 1e-3 * max(1.0, abs(mine)):
                sys.exit(f"bench_dpo.py: {side}: not the same work: {row['first_loss']}, {row['margin']}; ours "
                         f"{ours['first_loss']}, {ours['margin']}")
    return rows, statistics.mean(tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help=f"steps a run, the first {WARM_UP} left out")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, taking turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "dpo.json")
    options = parser.parse_args()
    rows, tokens = compare(options.steps, options.rounds, options.threads)
    print(f"32 pairs a step, {tokens:,.0f} tokens, prompts counted twice")
    print(f"{'':34}{'CPU-s/step':>11}{'tokens/CPU-s':>13}{'ours / this (rounds)':>23}{'peak MB':>9}{'first loss':>11}"
          f"{'last margin':>12}")
    for side, row in rows.items():
        low, high = min(row["ratio_by_round"]), max(row["ratio_by_round"])
        print(f"{side:34}{row['cpu_s_per_step']:>11.3f}{row['tokens_per_cpu_s']:>13,.0f}"
              f"{f'{low:.2f} to {high:.2f}':>23}{row['peak_mb']:>9,.0f}{row['first_loss'][0]:>11.5f}"
              f"{row['margin'][0]:>12.6f}")
    versions = next(row["versions"] for row in rows.values() if row["versions"])
    versions["python"] = platform.python_version()
    report = {"date": str(date.today()), "cpu": cpu_model(), "threads": options.threads, "steps": options.steps,
              "rounds": options.rounds, "tokens_per_step": tokens, "versions": versions, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{options.out}: {report['cpu']}, {options.threads} thread(s), {versions}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
    else:
        main()
