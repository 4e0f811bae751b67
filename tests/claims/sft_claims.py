"""What sft.py's methods claim, in miniature."""
import json
import random

import torch
import torch.nn.functional as F
from claim import Claim, area, read_curve, read_lines
from distill_claims import draw, write
from torch import nn

import eval as ground
import sft

SMALLER = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def write_rows(path, problems):
    """A file of prompts with their bare answers."""
    rows = [{"prompt": p.prompt, "completion": p.answer} for p in problems]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_lines(out, lines):
    """The metrics.jsonl of an arm that is a function; a run that is made again replaces it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@torch.no_grad()
def solution_logps(model, tokenizer, problems, solution=True):
    """(log-probs of the problems' clean solutions, or of their bare answers, summed over tokens: [Q], tokens)."""
    examples = [sft.row_examples(tokenizer, {"prompt": p.prompt, "completion": p.solution if solution else p.answer},
                                 "row")[0] for p in problems]
    logps_BS, _ = sft.Policy(model.eval())(sft.collate(examples, range(len(examples)), torch.device("cpu")))
    return logps_BS.sum(1).double(), sum(sum(e.trained[1:]) for e in examples)


def nll_of(folder, domains="", levels="1-2"):
    """Nats per token of clean held-out solutions."""
    problems = ground.load_problems("chain", "validation", 128, seed=1, levels=levels, domains=domains)
    logps_Q, n_tokens = solution_logps(*ground.load_model(str(folder)), problems)
    return float(-logps_Q.sum()) / n_tokens


# --- dco: bare answers, which the model can only guess, so that confidence is what matters ---

COVERAGE_STAGES = (50, 100, 150, 200)  # optimizer steps, one after the other; 500 problems are 8 steps


def coverage_arm(loss_type, n):
    def arm(out, seed, start):
        ground.TINY.update(SMALLER)
        write_rows(out / "data.jsonl", ground.load_problems("chain", "train", 500, seed, levels="2"))
        held_out = ground.load_problems("chain", "validation", 256, seed, levels="2")
        model, steps, lines = "tiny", 0, []
        for stage in COVERAGE_STAGES:
            folder = out / f"stage_{stage}"
            sft.main(sft.Config(model_name_or_path=str(model), dataset_name=str(out / "data.jsonl"), max_steps=stage,
                                output_dir=str(folder), overwrite=True, loss_type=loss_type, dco_n=n,
                                learning_rate=3e-3, lr_scheduler_type="constant", warmup_steps=20, eval_steps=0, save_steps=0,
                                micro_batch_tokens=0, seed=seed))
            model, steps = folder, steps + stage
            p_Q = solution_logps(*ground.load_model(str(model)), held_out, solution=False)[0].exp()
            lines.append({"step": steps, **{f"pass@{k}": float((1 - (1 - p_Q) ** k).mean()) for k in (1, 16, 64)}})
        write_lines(out, lines)
    return arm


def coverage_figures(folder):
    lines = read_lines(folder)
    return {"pass@64, end minus best": lines[-1]["pass@64"] - max(line["pass@64"] for line in lines),
            **{name: lines[-1][name] for name in ("pass@64", "pass@16", "pass@1")}}


# --- grokking: a three-layer network without biases on addition mod 47, 40 % of the table for training ---


def grokking_arm(kind):
    def arm(out, seed, start):
        torch.manual_seed(seed)
        p, width = 47, 100
        pairs_N2 = torch.cartesian_prod(torch.arange(p), torch.arange(p))
        inputs_NI, sums_N = F.one_hot(pairs_N2, p).flatten(1).float(), pairs_N2.sum(1) % p
        train_N, test_N = torch.randperm(p * p).split([int(0.4 * p * p), p * p - int(0.4 * p * p)])
        body = nn.Sequential(nn.Linear(2 * p, width, bias=False), nn.ReLU(),
                             nn.Linear(width, width, bias=False), nn.ReLU())
        head = nn.Linear(width, p, bias=False)
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=0.01,
                                      weight_decay=1.0 if kind == "decay" else 0.0)
        if kind == "perp_grad":
            optimizer.register_step_pre_hook(sft.perp_grad)
        lines = []
        for step in range(1, 301):
            hidden_ND = body(inputs_NI[train_N])
            loss = F.cross_entropy(head(hidden_ND), sums_N[train_N])
            if kind == "stablemax":
                loss = -sft.stablemax_rows(hidden_ND, head.weight, sums_N[train_N], None).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 25 == 0:
                with torch.no_grad():
                    logits_NV = head(body(inputs_NI))
                right_N = (logits_NV.argmax(1) == sums_N).float()
                lines.append({"step": step, "test accuracy": float(right_N[test_N].mean()),
                              "train accuracy": float(right_N[train_N].mean()), "train loss": loss.item()})
        write_lines(out, lines)
    return arm


def grokking_figures(folder):
    end = read_lines(folder)[-1]
    return {name: end[name] for name in ("test accuracy", "train accuracy", "train loss")}


# --- what a better start is worth to RL ---

RL = ("grpo.py --model_name_or_path {model} --output_dir {{out}}/rl --levels {levels} --n_train 400 "
      "--max_steps {steps} --per_device_train_batch_size 96 --learning_rate 1.5e-4 --max_completion_length 64 "
      "--save_steps 0 --eval_steps 0 --logging_steps 100 --seed {{seed}}")


def sample_figures(folder, levels, k=8):
    """Accuracy, pass@k and the share of distinct ones among k samples each of 64 held-out problems."""
    problems = ground.load_problems("chain", "validation", 64, seed=2, levels=levels)
    result = ground.evaluate(*ground.load_model(str(folder)), problems, n=k, k=(k,), max_new_tokens=64)
    texts = {(record["problem"], record["completion"]) for record in result["records"]}
    return {"accuracy": result["accuracy"], f"pass@{k}": result[f"pass@{k}"],
            "distinct": len(texts) / len(result["records"])}


def rl_curve(folder):
    return read_curve(folder / "rl", "reward", "step")


def entropy_arm(flags):
    return ("sft.py --model_name_or_path {start} --output_dir {out}/sft --levels 3-5 --error_rate 0 --n_train 200 "
            "--max_steps 40 --per_device_train_batch_size 32 --learning_rate 1e-3 --eval_steps 0 --save_steps 0 "
            f"--logging_steps 100 --seed {{seed}} {flags}", RL.format(model="{out}/sft", levels="4-5", steps=10))


def entropy_figures(folder):
    before, after = sample_figures(folder / "sft", "4-5"), sample_figures(folder / "rl", "4-5")
    return {"mean reward of RL": area(rl_curve(folder)), "after RL: accuracy": after["accuracy"],
            "reward std, first steps": sum(line["reward_std"] for line in read_lines(folder / "rl")[:4]) / 4,
            **{f"before RL: {name}": value for name, value in before.items()}}


def skill_without_form(start):
    """Data beside the start: sums of digits modulo 10, as in distill_claims.

    base.jsonl: a guess, and behind a `~` the running sums that lead to the answer. cold.jsonl: the sums, then the
    answer, without being asked for them. train.jsonl: problems. So the base has the skill and never uses it unasked.
    """
    rng, files = random.Random(0), {"base": [], "cold": [], "train": []}
    for i in range(6000):
        prompt, thought, answer = draw(rng)
        files["base"].append({"prompt": prompt, "completion": f"#{rng.randrange(10)}"} if i % 2 else
                             {"prompt": f"~{prompt}", "completion": f"{thought}#{answer}"})
    for name, n in (("cold", 256), ("train", 2000)):
        for prompt, thought, answer in (draw(rng) for _ in range(n)):
            files[name].append({"prompt": prompt, "completion": f"{thought}#{answer}"} if name == "cold" else
                               {"prompt": prompt, "answer": answer})
    for name, rows in files.items():
        write(start.parent / f"{name}.jsonl", rows)


SUMS = (skill_without_form, "sft.py --dataset_name {start}/../base.jsonl --n_train 0 --max_steps 300 --eval_steps 0 "
                            "--save_steps 0 --output_dir {start}")
SUMS_RL = ("grpo.py --model_name_or_path {model} --dataset_name {{start}}/../train.jsonl --n_train 0 --output_dir {{out}}/rl "
           "--max_steps {steps} --per_device_train_batch_size 128 --learning_rate 2e-4 --max_completion_length 12 "
           "--save_steps 0 --eval_steps 0 --logging_steps 100 --seed {{seed}}")


def cold_start_arm(n_train):
    """n_train worked solutions, 30 steps, then RL; 0: RL alone, which gets those steps as RL steps."""
    if not n_train:
        return (SUMS_RL.format(model="{start}", steps=60),)
    return ("sft.py --model_name_or_path {start} --dataset_name {start}/../cold.jsonl --output_dir {out}/sft "
            f"--n_train {n_train} --max_steps 30 --per_device_train_batch_size 16 --learning_rate 1e-3 --eval_steps 0 "
            "--save_steps 0 --logging_steps 100 --seed {seed}", SUMS_RL.format(model="{out}/sft", steps=40))


def cold_start_figures(folder):
    lines = read_lines(folder / "rl")
    before, after = (sum(line["reward"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    return {"gain in RL": after - before, "reward at the end": after, "reward at first": before}


# --- adapters, and going on with training: from + and - to * ---

PLUS_MINUS = ("sft.py --output_dir {start} --levels 1-2 --domains add,sub --error_rate 0 --max_steps 250 --rewarm full "
              "--learning_rate 3e-3 --eval_steps 0 --save_steps 0")


def on_to_mul(flags):
    return ("sft.py --model_name_or_path {start} --output_dir {out} --levels 1-2 --domains mul --error_rate 0 "
            "--n_train 1000 --per_device_train_batch_size 32 --eval_steps 0 --save_steps 0 --logging_steps 100 "
            f"--seed {{seed}} {flags}",)


def lora_arm(rate, flags):
    return on_to_mul(f"--max_steps 80 --warmup_steps 10 --learning_rate {rate} {flags}")


def loss_curve(folder):
    """Training loss, the mean of ten steps."""
    losses = read_curve(folder, "loss", "step")
    return [(x, sum(y for _, y in losses[i - 9 : i + 1]) / 10) for i, (x, _) in enumerate(losses) if i % 10 == 9]


def forgetting_figures(folder):
    """Minus held-out nats per token, so that more is better."""
    return {"-nll of * (new)": -nll_of(folder, "mul"), "-nll of +, - (old)": -nll_of(folder, "add,sub")}


def rewarm_arm(flags):
    return on_to_mul(f"--max_steps 80 --warmup_steps 10 --learning_rate 3e-3 {flags}")


def rewarm_figures(folder):
    losses = [line["loss"] for line in read_lines(folder)]
    return {**forgetting_figures(folder), "spike: loss's rise in 20 steps": max(losses[:20]) - losses[0]}


CLAIMS = [
    Claim("sft_dco", "2502.07154", "pass@N falls with longer nll training, and not with dco",
          {"nll": coverage_arm("nll", 1), "dco N=16": coverage_arm("dco", 16), "dco N=256": coverage_arm("dco", 256)},
          coverage_figures, curve=lambda folder: read_curve(folder, "pass@64", "step"),
          axes=("steps", "pass@64, held out"),
          notes="0.1 M parameters, 500 bare answers of two operations (8 steps a pass); pass@N is exact, from p."),
    Claim("sft_grokking", "2501.04697",
          "Without the gradient along the weights a network generalises where it only memorised",
          {"adamw": grokking_arm("plain"), "perp_grad": grokking_arm("perp_grad"), "decay 1": grokking_arm("decay"),
           "stablemax": grokking_arm("stablemax")},
          grokking_figures, curve=lambda folder: read_curve(folder, "test accuracy", "step"),
          axes=("steps", "test accuracy"),
          notes="Addition mod 47, full batch, rate 0.01 for all; `perp_grad` is the hook that --perp_grad sets."),
    Claim("sft_entropy", "2508.03178", "Entropy-SFT keeps diversity, and RL starts better from it",
          {"nll": entropy_arm(""), "entropy": entropy_arm("--loss_type entropy"),
           "entropy, discount 0": entropy_arm("--loss_type entropy --entropy_discount 0")},
          entropy_figures, curve=rl_curve, axes=("RL steps", "reward"),
          start=("sft.py --output_dir {start} --max_steps 300 --eval_steps 0 --save_steps 0",),
          notes="200 clean solutions, 6 passes, then 10 RL steps; the last arm leaves out the likeliest tokens, "
                "whatever their entropy."),
    Claim("sft_cold_start", "2506.02338", "A small cold start before RL makes RL gain more",
          {"RL alone": cold_start_arm(0), "4 solutions, RL": cold_start_arm(4), "16 solutions, RL": cold_start_arm(16),
           "256 solutions, RL": cold_start_arm(256)},
          cold_start_figures, curve=rl_curve, axes=("RL steps", "reward"), start=SUMS,
          notes="The base guesses at once and thinks only behind a mark that no training problem has. RL alone has 60 RL "
                "steps, the others 30 steps of SFT on 16 rows and 40 of RL."),
    Claim("sft_lora", "2404.02948, 2411.19557",
          "PiSSA and LoRA-SB learn more than gaussian LoRA, each at its tuned rate",
          {"gaussian r4": lora_arm(3e-2, "--lora_rank 4"),
           "pissa r4": lora_arm(1e-2, "--lora_rank 4 --lora_init pissa"),
           "lora_sb r4": lora_arm(6e-2, "--lora_rank 4 --lora_init lora_sb"),
           "lora_sb r16": lora_arm(3e-2, "--lora_rank 16 --lora_init lora_sb"), "all weights": lora_arm(3e-3, "")},
          forgetting_figures, curve=loss_curve, axes=("steps", "training loss"), start=(PLUS_MINUS,),
          notes="Rates tuned on seed 100 in factors of 2 to 3. Trained numbers: gaussian and PiSSA r4 29,184, "
                "LoRA-SB r4 336, r16 5,376, all weights 616,256."),
    Claim("sft_rewarm", "2308.04014", "Warming up again costs a spike and the old task, and gains on the new one",
          {"keep": rewarm_arm("--rewarm keep"), "half": rewarm_arm("--rewarm half"),
           "full": rewarm_arm("--rewarm full"),
           "full, replay 1/16": rewarm_arm("--rewarm full --replay_from {start} --replay_share 0.0625"),
           "keep, old data": rewarm_arm("--rewarm keep --domains add,sub"),
           "full, old data": rewarm_arm("--rewarm full --domains add,sub")},
          rewarm_figures, curve=loss_curve, axes=("steps", "training loss"), start=(PLUS_MINUS,),
          pairs=(("half", "keep"), ("full", "keep"), ("full, replay 1/16", "keep"), ("full, replay 1/16", "full"),
                 ("full, old data", "keep, old data")),
          notes="`keep` stays at a tenth of the peak, where the first training ended. A fresh AdamW in all arms."),
]
