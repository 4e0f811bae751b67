"""What is claimed of learning from preferences; run by run.py. As a script, draws the picture of dpo_failure's runs:

    python tests/claims/run.py dpo_failure && python tests/claims/dpo_claims.py
"""
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from claim import RESULTS, ROOT, Claim, last, read_curve, read_lines  # noqa: E402


def step_curve(folder):
    """Task accuracy by optimizer step."""
    return read_curve(folder, x="step")


def tail(lines, key, n=10):
    """The mean of a number over the last n steps that have it; None where none has."""
    values = [line[key] for line in lines if key in line][-n:]
    return sum(values) / len(values) if values else None


def start_accuracy(start):
    """What all runs begin from, by the start's own last evaluation (on the start's own levels)."""
    return {"accuracy of the start": last(step_curve(start))}


# --- the chosen log-prob falls, and the right answers with it ---

FAILURE = ("dpo.py --model_name_or_path {{start}} --output_dir {{out}} --seed {{seed}} --pairs offline --levels 1-3 "
           "--n_train 8000 --learning_rate 1e-4 --max_steps 60 --eval_steps 10 --n_eval 256 --max_completion_length 48 "
           "--save_steps 0 --loss_type {}")
PANELS = {"logps/chosen": "log p of the chosen", "logps/rejected": "log p of the rejected",
          "rewards/margins": "margin, beta (c - r)", "rewards/accuracies": "share of pairs ranked right",
          "logps/chosen_fell": "share whose chosen log p fell", "eval/accuracy": "task accuracy, greedy"}


def failure_figures(folder):
    lines = read_lines(folder)
    change = {side: tail(lines, f"logps/{side}") - tail(lines[:10], f"logps/{side}") for side in ("chosen", "rejected")}
    return {"task accuracy": last(step_curve(folder)), "share ranked right": tail(lines, "rewards/accuracies"),
            "share whose chosen fell": tail(lines, "logps/chosen_fell"), "margin": tail(lines, "rewards/margins"),
            "chosen log p, change": change["chosen"], "rejected log p, change": change["rejected"]}


def draw_failure(runs=ROOT / "runs" / "claims" / "dpo_failure", path=RESULTS / "dpo_failure_curves.png"):
    """Six numbers against the step for each loss: faint each seed, strong their mean over five steps."""
    figure = Figure(figsize=(13, 7), layout="constrained", dpi=110)
    axes = list(figure.subplots(2, 3).flat)
    for i, loss in enumerate(FAILURE_ARMS):
        seeds = [read_lines(folder) for folder in sorted((runs / loss).glob("[0-9]")) if folder.is_dir()]
        for axis, (key, title) in zip(axes, PANELS.items()):
            curves = [[(line["step"], line[key]) for line in lines if key in line] for lines in seeds]
            mean = np.mean([[y for _, y in curve] for curve in curves], axis=0)
            width = 5 if len(mean) > 20 else 1
            smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
            for curve in curves:
                axis.plot(*zip(*curve), color=f"C{i}", alpha=0.12, linewidth=0.8)
            steps = [x for x, _ in curves[0]][width // 2 :][: len(smooth)]
            axis.plot(steps, smooth, color=f"C{i}", linewidth=2, label=loss)
            axis.set_title(title, loc="left", fontsize=10)
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    for axis in axes[3:]:
        axis.set_xlabel("step")
    start = json.loads((RESULTS / "dpo_failure.json").read_text())["premise"]["accuracy of the start"]
    axes[-1].axhline(start, color="0.3", linestyle=":", linewidth=1)
    figure.suptitle(f"Pairs: right solutions against the same with wrong steps ({len(seeds)} seeds; dotted: the start)")
    figure.savefig(path)


FAILURE_ARMS = ("sigmoid", "rpo", "dpop", "ipo", "ipo_sum")

# --- pairs from the policy itself ---

ON_POLICY = ("dpo.py --model_name_or_path {{start}} --output_dir {{out}} --seed {{seed}} --learning_rate 2e-5 "
             "--per_device_train_batch_size 48 --max_steps 32 --eval_steps 16 --n_eval 200 --max_completion_length 80 "
             "--save_steps 0 {}")


def on_policy_figures(folder):
    lines = read_lines(folder)
    return {"task accuracy": last(read_curve(folder)), "sampled accuracy, last round": lines[-1]["reward"],
            "rollouts": lines[-1]["rollouts"], "pairs of the last round": lines[-1]["num_pairs"],
            "share whose chosen fell": tail(lines, "logps/chosen_fell")}


# --- a budget of annotated examples ---

BUDGET = ("dpo.py --model_name_or_path {{start}} --output_dir {{out}} --seed {{seed}} --pairs offline --levels 4-5 "
          "--error_rate 0.3 --n_train 1500 --budget 1000 --sft_fraction {} --loss_type sigmoid --sft_learning_rate 1e-3 "
          "--learning_rate 5e-5 --per_device_train_batch_size 32 --max_steps 40 --eval_steps 20 --n_eval 128 "
          "--max_completion_length 80 --save_steps 0")


def budget_figures(folder):
    lines = [line for line in read_lines(folder) if "eval/accuracy" in line]
    return {"task accuracy": lines[-1]["eval/accuracy"], "no answer or cut off": lines[-1]["eval/truncated"]}


CLAIMS = [
    Claim(
        name="dpo_failure",
        source="2402.13228, 2404.19733",
        says="Under plain DPO the margin grows while the chosen log-prob and task accuracy fall; a term on the chosen "
             "completion prevents it.",
        start=("sft.py --error_rate 0 --levels 1-3 --save_steps 0 --eval_steps 350 --output_dir {start}",),
        arms={loss: (FAILURE.format(loss),) for loss in FAILURE_ARMS},
        measure=failure_figures, curve=step_curve, axes=("step", "task accuracy, greedy"), premise=start_accuracy,
        quick="--max_steps 6 --eval_steps 3 --n_eval 16 --n_train 300",
        notes="Offline pairs: right solutions of `chain`, levels 1-3, against the same with 15 % of the steps wrong; "
              "64 pairs a step, learning rate 1e-4. dpo_failure_curves.png shows log-probs and margins.",
    ),
    Claim(
        name="dpo_on_policy",
        source="2404.19733, 2409.08642",
        says="From its own verified samples a policy improves by iterative RPO, while plain DPO on them does not hold.",
        start=("sft.py --save_steps 0 --eval_steps 350 --output_dir {start}",),
        arms={
            "sft on right samples": (ON_POLICY.format("--loss_type sft --resample_steps 8 --round_prompts 96"),),
            "iterative rpo": (ON_POLICY.format("--loss_type rpo --resample_steps 8 --round_prompts 96"),),
            "dpo": (ON_POLICY.format("--loss_type sigmoid --resample_steps 0 --round_prompts 384"),),
            "iterative dpo": (ON_POLICY.format("--loss_type sigmoid --resample_steps 8 --round_prompts 96"),),
            "step-apo": (ON_POLICY.format("--pairs steps --loss_type step_apo --resample_steps 8 --round_prompts 42 "
                                          "--pairs_per_prompt 1"),),
        },
        measure=on_policy_figures, curve=step_curve, axes=("step", "task accuracy, greedy"), premise=start_accuracy,
        quick="--max_steps 4 --resample_steps 2 --eval_steps 2 --n_eval 16 --round_prompts 24",
        notes="Rollouts: 4 rounds of 96 prompts x 8 (dpo: one round of 384); Step-APO's pay for its searches, "
              "and its 20 to 30 pairs a round are trained on many times over. At 1e-4 instead of 2e-5, 5 seeds: sft .74, "
              "rpo .69, iterative dpo .63, dpo .47, step-apo .37.",
    ),
    Claim(
        name="dpo_budget",
        source="2502.11284",
        says="Of a fixed number of annotated examples a few per cent spent on SFT first repair what DPO from the base "
             "cannot learn.",
        start=("sft.py --error_rate 0 --levels 1-3 --save_steps 0 --eval_steps 350 --output_dir {start}",),
        arms={f"sft {share}": (BUDGET.format(share),) for share in ("0", "0.1", "0.25", "0.5", "1")},
        measure=budget_figures, curve=step_curve, axes=("step", "task accuracy, greedy"), premise=start_accuracy,
        quick="--max_steps 8 --eval_steps 4 --n_eval 16 --budget 200",
        notes="Base: knows chains of up to 3 operations; the examples have 4 or 5. 1,000 examples, 40 steps of 32, "
              "both split by the share; the accuracy of the start is on its own levels.",
    ),
]

if __name__ == "__main__":
    draw_failure()
