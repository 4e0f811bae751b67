"""The scripts beside TRL's trainers on the same work: CPU-seconds a step, tokens per CPU-second, memory, the ratios.

    pip install trl && python tests/bench/bench_trl.py            # half an hour, one thread; no network, no GPU
    python tests/bench/bench_trl.py --cases sft_mixed --rounds 1  # one case, once

Both sides get the same 3.2 M random weights, tokenizer, rows in each step, float32 and AdamW, each in a process of its
own. They take turns, so that a busy machine slows both, and each round has its own seed. A step costs the CPU time of
the whole process from the end of the step before to its own end; the first steps are left out, and the median of the
others counts. Ours is `main` with the flags' defaults. TRL's lines: `plain` turns its gradient checkpointing off,
`checkpointing` leaves it on, as is its default, `micro-batch 16` takes four forwards a step (faster on a CPU), and
`sorted` also hands it the rows of each step in the order of their lengths, which no flag of TRL's does: that line is
shown and not counted. For supervised fine-tuning the benchmark fails unless both begin with the same loss on the same
tokens; completions are sampled, so there the mean length is printed. Results: tests/bench/results/trl.json.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
WARM_UP, ROWS, PROMPTS = 2, 64, 8  # steps left out; rows and prompts a step

SFT_LINES = ["plain", "micro-batch 16", "checkpointing"]
# For each case: what it is, the end-of-text token's weight, TRL's lines, the ratio to reach against the best of them.
CASES = {
    "sft_mixed": ("SFT, 16 to 256 tokens, uniform", 0.0, [*SFT_LINES, "micro-batch 16, sorted"], 1.5),
    "sft_equal": ("SFT, all 128 tokens", 0.0, SFT_LINES, 1.0),
    "grpo_free": ("GRPO 8 x 8, at most 256 new tokens, mean 64", 0.165, ["plain", "micro-batch 16"], 2.5),
    "grpo_equal": ("GRPO 8 x 8, all 64 new tokens", -10.0, ["plain", "micro-batch 16"], 1.0),
}


# --- the work, the same for both ---


def save_model(folder, eos_weight):
    """Writes 3.2 M random weights of a Qwen3 and a character tokenizer; eos_weight sets how often a completion ends.

    Column 0 of the embedding is 1 for every token, so that the end-of-text token's row of the head, which reads nothing
    else, gives it about the same logit everywhere: lengths are geometric, as long as training hardly moves the weights.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from eval import char_tokenizer
    tokenizer = char_tokenizer()
    config = Qwen3Config(vocab_size=128, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
                         tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = eos_weight
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sums_text(rng, length):
    """`length` characters of sums: `12+305=317 ...`."""
    text = ""
    while len(text) < length:
        a, b = rng.randrange(1000), rng.randrange(1000)
        text += f"{a}+{b}={a + b} "
    return text[:length]


def prepare(case, folder, steps, seed):
    """Writes the model, ours.jsonl, and the same rows for TRL, in the order in which ours will visit them."""
    from sft import rows_of_step
    save_model(folder / "model", CASES[case][1])
    rng = random.Random(0)
    if case.startswith("sft"):
        lengths = [rng.randint(16, 256) if case == "sft_mixed" else 128 for _ in range(ROWS * 16)]
        rows, per_step = [{"text": sums_text(rng, length - 1)} for length in lengths], ROWS  # and the end-of-text token
    else:
        pairs = [(rng.randrange(100, 1000), rng.randrange(100, 1000)) for _ in range(PROMPTS * 16)]
        rows, per_step = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs], PROMPTS
    visited = [[rows[i] for i in rows_of_step(len(rows), per_step, step, seed)] for step in range(steps)]
    write_rows(folder / "ours.jsonl", [rows])
    write_rows(folder / "trl.jsonl", visited)
    if case.startswith("sft"):
        write_rows(folder / "trl_sorted.jsonl", [sorted(step, key=lambda row: len(row["text"])) for step in visited])


def write_rows(path, parts):
    path.write_text("".join(json.dumps(row) + "\n" for rows in parts for row in rows))


def digit_share(text):
    """The reward: the share of digits; it varies within every group, so no row of ours may be skipped."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


# --- the two sides ---


class Meter:
    """CPU-seconds, tokens and memory at the end of each step."""

    def begin(self):
        """To be called right before the first step."""
        self.cpu, self.tokens, self.losses, self.before_mb = [time.process_time()], [], [], peak_mb()

    def note(self, tokens, loss):
        """To be called at the end of each step."""
        self.cpu.append(time.process_time())
        self.tokens.append(tokens)
        self.losses.append(loss)
        self.peak_mb = peak_mb()

    def result(self):
        costs = [after - before for before, after in zip(self.cpu, self.cpu[1:])]
        return {"cpu_s": costs[WARM_UP:], "tokens": self.tokens[WARM_UP:], "first_loss": self.losses[0],
                "peak_mb": self.peak_mb, "before_mb": self.before_mb}


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_ours(case, folder, steps, seed):
    """`main` of sft.py or grpo.py with its defaults, but for what makes the work the same."""
    import grpo
    import sft
    script = sft if case.startswith("sft") else grpo
    shared = dict(model_name_or_path=str(folder / "model"), dataset_name=str(folder / "ours.jsonl"), n_train=0,
                  output_dir=str(folder / "run"), overwrite=True, per_device_train_batch_size=ROWS, max_steps=steps,
                  learning_rate=1e-7, lr_scheduler_type="constant", warmup_steps=0, eval_steps=0, save_steps=0,
                  seed=seed)
    if script is sft:
        config = sft.Config(**shared)
    else:
        grpo.REWARDS["digits"] = lambda problem, row, pace, config: digit_share(row.text)
        config = grpo.Config(**shared, num_generations=ROWS // PROMPTS, reward_funcs=["digits"],
                             max_completion_length=64 if case == "grpo_equal" else 256)
    meter = Meter()

    class MeteredLog(script.Log):
        def __init__(self, *args):
            super().__init__(*args)
            meter.begin()

        def step(self, step, numbers, show, tokens, seconds):
            super().step(step, numbers, show, tokens, seconds)
            meter.note(tokens, numbers["loss"])

    script.Log = MeteredLog
    script.main(config)
    return meter.result()


def run_trl(case, folder, steps, seed, line):
    """TRL's trainer; `line` as in CASES."""
    import torch
    import transformers
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    rows = 16 if "micro-batch 16" in line else ROWS
    shared = dict(output_dir=str(folder / "trl"), per_device_train_batch_size=rows, max_steps=steps,
                  gradient_accumulation_steps=ROWS // rows, gradient_checkpointing=line == "checkpointing",
                  learning_rate=1e-7, lr_scheduler_type="constant", use_cpu=True, bf16=False, save_strategy="no",
                  report_to=[], logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, seed=seed)
    data = load_dataset("json", data_files=str(folder / ("trl_sorted.jsonl" if "sorted" in line else "trl.jsonl")),
                        split="train", cache_dir=str(folder / "cache"))
    setup = dict(model=AutoModelForCausalLM.from_pretrained(folder / "model"), train_dataset=data,
                 processing_class=AutoTokenizer.from_pretrained(folder / "model"))
    if case.startswith("sft"):
        trainer = trl.SFTTrainer(args=trl.SFTConfig(**shared, train_sampling_strategy="sequential"), **setup)
    else:
        args = trl.GRPOConfig(**shared, num_generations=ROWS // PROMPTS, shuffle_dataset=False,
                              max_completion_length=64 if case == "grpo_equal" else 256)
        trainer = trl.GRPOTrainer(args=args, reward_funcs=lambda completions, **_: list(map(digit_share, completions)),
                                  **setup)
    meter = Meter()

    class MeterCallback(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            meter.begin()

        def on_log(self, args, state, control, logs, **kwargs):  # after every step, once its numbers are known
            if "loss" in logs:
                seen = logs["num_tokens"] if "sft" in case else logs["completions/mean_length"] * ROWS
                meter.note(seen - sum(meter.tokens) if "sft" in case else seen, logs["loss"])

    trainer.add_callback(MeterCallback())
    trainer.train()
    versions = {library.__name__: library.__version__ for library in (torch, transformers, trl)}
    return {**meter.result(), "versions": versions}


def child(side, case, folder, steps, seed):
    """One process's work: `prepare`, `ours`, or a line of TRL's; the result goes to result.json."""
    import torch
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(HERE.parents[1]))
    folder = Path(folder)
    if side == "prepare":
        return prepare(case, folder, steps, seed)
    arguments = case, folder, steps, seed
    result = run_ours(*arguments) if side == "ours" else run_trl(*arguments, side)
    (folder / "result.json").write_text(json.dumps(result))


# --- the comparison ---


def run_child(side, case, folder, steps, seed, threads):
    """What `child` wrote, from a new process; its output is shown only where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                   "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, "--child", side, case, str(folder), str(steps), str(seed)],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nbench_trl.py: {case}, {side}: exit code {done.returncode}")
    return None if side == "prepare" else json.loads((folder / "result.json").read_text())


def compare(case, steps, rounds, threads):
    """Runs every side of a case in turn: {side: the figures of its table row}."""
    sides, found = ["ours", *CASES[case][2]], {}
    for seed in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for side in ["prepare", *sides]:
                found.setdefault(side, []).append(run_child(side, case, Path(folder), steps, seed, threads))
    del found["prepare"]
    rows = {}
    for side, runs in found.items():
        cost = statistics.median(seconds for run in runs for seconds in run["cpu_s"])
        tokens = statistics.mean(tokens for run in runs for tokens in run["tokens"])
        rows[side] = {"cpu_s_per_step": cost, "tokens_per_step": tokens, "tokens_per_cpu_s": tokens / cost,
                      "peak_mb": max(run["peak_mb"] for run in runs),
                      "before_mb": statistics.median(run["before_mb"] for run in runs), "runs": runs}
    for row in rows.values():
        row["ratio_by_round"] = [speed(ours) / speed(run) for ours, run in zip(rows["ours"]["runs"], row["runs"])]
        row["ratio"] = statistics.median(row["ratio_by_round"])
    if case.startswith("sft"):
        check_same_work(case, rows)
    return rows


def speed(run):
    """Tokens per CPU-second of one run."""
    return statistics.mean(run["tokens"]) / statistics.median(run["cpu_s"])


def check_same_work(case, rows):
    """Ends the benchmark unless all sides trained on the same tokens and began with the same loss."""
    for side, row in rows.items():
        for ours, run in zip(rows["ours"]["runs"], row["runs"]):
            if run["tokens"] != ours["tokens"] or abs(run["first_loss"] - ours["first_loss"]) > 1e-4:
                sys.exit(f"bench_trl.py: {case}, {side}: not the same work: tokens {run['tokens']}, loss "
                         f"{run['first_loss']}; ours {ours['tokens']}, {ours['first_loss']}")


def show(case, rows):
    """Prints a case's table."""
    title, _, lines, target = CASES[case]
    least = min(rows[line]["ratio"] for line in lines if "sorted" not in line)
    print(f"\n{title}: at least {least:.2f} times TRL (wanted: {target})")
    print(f"{'':30}{'CPU-s/step':>11}{'tokens/step':>12}{'tokens/CPU-s':>13}{'ours / this (rounds)':>23}{'peak MB':>9}"
          f"{'before step 1':>14}{'first loss':>11}")
    for side, row in rows.items():
        low, high = min(row["ratio_by_round"]), max(row["ratio_by_round"])
        ratio = "" if side == "ours" else f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        loss = f"{row['runs'][0]['first_loss']:.5f}" if case.startswith("sft") else ""
        print(f"{side if side == 'ours' else 'TRL, ' + side:30}{row['cpu_s_per_step']:>11.3f}"
              f"{row['tokens_per_step']:>12,.0f}{row['tokens_per_cpu_s']:>13,.0f}{ratio:>23}{row['peak_mb']:>9,.0f}"
              f"{row['before_mb']:>14,.0f}{loss:>11}", flush=True)
    if case.startswith("grpo"):
        lengths = (f"{side} {row['tokens_per_step'] / ROWS:.1f}" for side, row in rows.items())
        print(f"mean completion: {', '.join(lengths)} tokens")


def cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=8, help=f"steps a run, the first {WARM_UP} left out")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, taking turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "trl.json")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"date": str(date.today()), "cpu": cpu_model(), "threads": options.threads, "cases": {}}
    for case in options.cases:
        rows = compare(case, options.steps, options.rounds, options.threads)
        show(case, rows)
        report["versions"] = {**rows["plain"]["runs"][0].pop("versions"), "python": platform.python_version()}
        report["cases"][case] = rows
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{options.out}: {report['cpu']}, {options.threads} thread(s), {report['versions']}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], *map(int, sys.argv[5:]))
    else:
        main()
