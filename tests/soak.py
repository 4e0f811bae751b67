"""The long version of test_survive.py: prints what was done to the runs, and what each lost.

    python tests/soak.py             # 50 kills, each write, each file of a checkpoint, bad inputs: 25 busy minutes
    python tests/soak.py --kills 500 --only kills
"""

import argparse
import json
import shutil
import signal
import tempfile
import time
from pathlib import Path

import faults
from faults import assert_same, run, steps_of
from test_survive import GRPO, SFT, spread

faults.FORKS.set_forkserver_preload(["faults", "test_survive"])  # each process looks for this file's imports

RUNS = {"sft": ("sft", SFT, 1), "grpo": ("grpo", GRPO, 1), "grpo, beta": ("grpo", {**GRPO, "beta": 0.1}, 1),
        "sft, 2 processes": ("sft", spread(SFT, 2), 2), "grpo, 2 processes": ("grpo", spread(GRPO, 2), 2)}


class Ledger:
    """Counts what was tried and collects what was lost."""

    def __init__(self):
        self.rows = {}

    def note(self, what, error=None, n=1):
        tried, lost = self.rows.setdefault(what, [0, []])
        self.rows[what][0] = tried + n
        if error is not None:
            lost.append(str(error).strip())
            print(f"LOST, {what}: {lost[-1][:2000]}", flush=True)

    def attempt(self, what, check, n=1):
        """Notes what check() raises, if anything."""
        try:
            check()
        except (AssertionError, OSError) as error:
            self.note(what, error, n)
        else:
            self.note(what, n=n)

    def table(self):
        width = max(map(len, self.rows))
        lines = [f"| {'what was done':<{width}} | times | lost |", f"| {'-' * width} | ----: | :--- |"]
        lines += [f"| {what:<{width}} | {tried:>5} | {len(lost) or 'nothing'} |"
                  for what, (tried, lost) in self.rows.items()]
        return "\n".join(lines)


def finish(script, flags, ranks, expected):
    """The run is continued to its end, and is then the undisturbed one."""
    codes, text = run(script, flags, ranks=ranks)
    assert codes == [0] * ranks, text
    assert_same(flags["output_dir"], expected)


def kills(ledger, name, script, flags, ranks, whole, n, seed):
    """SIGKILL at random moments, most of them in a save."""
    def check():
        for folder in faults.survive_kills(script, flags, n, seed, ranks):
            assert_same(folder, whole)
            shutil.rmtree(folder)
    ledger.attempt(f"SIGKILL at a random moment: {name}", check, n)


def each_write(ledger, name, script, flags, ranks, whole, stride):
    """SIGKILL right before each single change of a file, from the first to the last, or before every stride-th."""
    out, n = Path(flags["output_dir"]), 1
    while True:
        codes, text = run(script, flags, {"kill_at_write@0": [str(out), n]}, ranks)
        if not any(codes):
            shutil.rmtree(out)
            return
        which = "each change" if stride == 1 else f"every {stride}th change"
        ledger.attempt(f"SIGKILL before {which} of a file: {name}", lambda: finish(script, flags, ranks, whole))
        shutil.rmtree(out)
        n += stride


def signals(ledger, name, script, flags, ranks, whole):
    """SIGTERM and SIGINT in every step, to one process; in every window of steps on the same rollouts, to its first."""
    window = flags.get("num_iterations", 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        def check():
            for step in range(1, 7 - window, window):
                codes, text = run(script, flags, {f"signal_at@{ranks - 1}": [step, number]}, ranks)
                assert codes == [128 + signal.SIGTERM] * (ranks - 1) + [128 + number], text  # the others caught none
            finish(script, flags, ranks, whole)
        ledger.attempt(f"{number.name} in the middle of a step: {name}", check, len(range(1, 7 - window, window)))
        shutil.rmtree(flags["output_dir"])


def damages(ledger, name, script, flags, ranks, whole):
    """Every file of the newest checkpoint cut short or gone: the run goes on from the older one."""
    stopped = Path(f"{flags['output_dir']}_stopped")
    run(script, {**flags, "output_dir": stopped}, {"crash_at": 6}, ranks)
    out = Path(flags["output_dir"])
    for file, kind in faults.each_damage(stopped):
        def check():
            shutil.copytree(stopped, out)
            codes, text = run(script, flags, ranks=ranks)
            assert codes == [0] * ranks and "falling back" in text, f"{file}, {kind}: {text}"
            assert_same(out, whole)
        ledger.attempt(f"newest checkpoint: {kind} a file: {name}", check)
        shutil.rmtree(out)
    for step in steps_of(stopped):
        faults.damage(stopped / "checkpoints" / f"step_{step}" / "config.json", "cut")
    def refuse():
        codes, text = run(script, {**flags, "output_dir": stopped}, ranks=ranks)
        assert codes == [2] * ranks and "none of its checkpoints is whole" in text and "Traceback" not in text, text
    ledger.attempt("all checkpoints damaged: refused", refuse)


def bad_numbers(ledger, name, script, flags, ranks):
    """NaN in the loss, inf in the gradient, of each step and on each process: a step that moves nothing."""
    for fault in ("nan_loss", "inf_gradient"):
        for step in range(1, 7):
            for rank in range(ranks):
                def check():
                    codes, text = run(script, flags, {f"{fault}@{rank}": [step]}, ranks)
                    assert codes == [0] * ranks and f"step {step}: loss or gradient not finite" in text, text
                ledger.attempt(f"NaN in the loss, inf in the gradient: {name}", check)
                shutil.rmtree(flags["output_dir"])


BAD_FLAGS = {
    "max_steps": [0, -1, "many"], "per_device_train_batch_size": [0, 3.5], "gradient_accumulation_steps": [0],
    "learning_rate": [-1, "nan", "fast"], "warmup_steps": [-1], "max_grad_norm": [-1], "n_train": [-1],
    "levels": ["9", "x", "3-1"], "domains": ["poetry"], "lr_scheduler_type": ["sawtooth"], "report_to": ["pigeon"],
    "chat_template": ["on"], "prompt_template": ["{question}"], "seed": [-1], "bf16": ["maybe"], "save_steps": [-1],
    "model_name_or_path": ["nowhere", "a/b/c"], "dataset_name": ["nowhere.jsonl", "chain2"], "no_such_flag": [1],
    "dataset_train_split": ["holdout"], "dataset_test_split": ["holdout"], "logging_steps": [0], "max_bad_steps": [0],
    "micro_batch_tokens": [-1], "num_generations": [0], "warmup_steps": ["inf"]}
BAD_GRPO_FLAGS = {
    "num_generations": [1, 3], "temperature": [0, "nan"], "loss_type": ["ppo"], "beta": [-1], "epsilon": [-1],
    "scale_rewards": ["twice"], "reward_funcs": ["charm"], "reward_weights": ["1 2 3"], "num_iterations": [0],
    "max_prompt_length": [1]}
BAD_ROWS = {
    "empty": "", "not JSON": "{", "no row": "\n\n", "a list": "[1]\n", "a number": "3\n", "no prompt": '{"a": "b"}\n',
    "null": '{"prompt": null, "completion": null}\n', "a number for text": '{"prompt": 1, "completion": 2}\n',
    "messages a string": '{"messages": "hello"}\n', "messages empty": '{"messages": []}\n',
    "no assistant": '{"messages": [{"role": "user", "content": "a"}]}\n',
    "half": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp'}


def bad_inputs(ledger, name, script, flags, folder):
    """A wrong flag or data file: exit code 2, one line that names it, and no folder left behind."""
    def check(case, changes, word):
        out = folder / "bad"
        codes, text = run(script, {**flags, "output_dir": out, **changes})
        made = out.exists()
        shutil.rmtree(out, ignore_errors=True)
        assert codes == [2] and word in text and "Traceback" not in text and not made, f"{case}: {codes} {text}"
    wrong = {**BAD_FLAGS, **(BAD_GRPO_FLAGS if script == "grpo" else {})}
    for flag, values in wrong.items():
        for value in values:
            ledger.attempt(f"bad flags: {name}", lambda: check(f"{flag} {value}", {flag: value}, f"--{flag}"))
    for case, content in BAD_ROWS.items():
        (folder / "bad.jsonl").write_text(content)
        bad = {"dataset_name": folder / "bad.jsonl"}
        ledger.attempt(f"bad data files: {name}", lambda: check(case, bad, "bad.jsonl"))


def memory(ledger, name, script, flags):
    """After step 1000 no more was ever needed than after step 100."""
    def check():
        codes, text = run(script, {**flags, "max_steps": 1000, "save_steps": 100, "eval_steps": 100}, timeout=1200)
        assert codes == [0], text
        lines = [json.loads(line) for line in (Path(flags["output_dir"]) / "metrics.jsonl").read_text().splitlines()]
        growth_mb = (lines[999]["time/peak_memory_gb"] - lines[99]["time/peak_memory_gb"]) * 1024
        assert growth_mb < 4, f"grew by {growth_mb:.1f} MB"
    ledger.attempt(f"1,000 steps with flat memory: {name}", check)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs at random moments, shared out over the runs")
    parser.add_argument("--only", default="", help="a word in the names of the campaigns to run; empty: all")
    arguments = parser.parse_args()
    ledger, began = Ledger(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        codes, text = run("sft", dict(output_dir=folder / "base", n_train=500, levels="1-2", max_steps=60, eval_steps=0,
                                      per_device_train_batch_size=32, learning_rate=1e-2))
        assert codes == [0], text
        for i, (name, (script, flags, ranks)) in enumerate(RUNS.items()):
            start_from = {"model_name_or_path": str(folder / "base")} if script == "grpo" else {}
            flags = {**flags, **start_from, "save_steps": 1, "output_dir": str(folder / f"run{i}")}
            whole = folder / f"whole{i}"
            codes, text = run(script, {**flags, "output_dir": whole}, ranks=ranks)
            assert codes == [0] * ranks, text
            share = arguments.kills // len(RUNS) + (i < arguments.kills % len(RUNS))
            stride = 1 if name == "sft" else 9
            campaigns = {"kills": lambda: kills(ledger, name, script, flags, ranks, whole, share, seed=i),
                         "writes": lambda: each_write(ledger, name, script, flags, ranks, whole, stride),
                         "signals": lambda: signals(ledger, name, script, flags, ranks, whole),
                         "damages": lambda: damages(ledger, name, script, flags, ranks, whole),
                         "numbers": lambda: bad_numbers(ledger, name, script, flags, ranks)}
            if name in ("sft", "grpo"):
                campaigns |= {"inputs": lambda: bad_inputs(ledger, name, script, flags, folder),
                              "memory": lambda: memory(ledger, name, script, flags)}
            for campaign, act in campaigns.items():
                if arguments.only in campaign:
                    act()
                    print(f"{time.monotonic() - began:6.0f} s  {name}: {campaign}", flush=True)
    print(ledger.table())
    return any(lost for _, lost in ledger.rows.values())


if __name__ == "__main__":
    raise SystemExit(main())
