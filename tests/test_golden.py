"""Every method's numbers as they were: a few optimizer steps of each, on fixed seeds, against tests/golden.json.

For each case the table holds the module and its flags, every number that metrics.jsonl repeats (all but those under
time/) of every step, what was picked (a hash of the prompts and completions in samples.jsonl, pairs.jsonl and
traces.jsonl) and a checksum of the weights at the end. So the code may be rewritten or moved, and the table says
whether it still computes the same.

The table was written by the code of commit 91d99ee. Write it anew only where a change of numbers is meant, and explain
the change in the commit that makes it:

    python tests/test_golden.py --write                       # all cases
    python tests/test_golden.py --write "grpo gspo" "sft nll"  # these alone; the others stay as they are
"""

import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import eval as ground

TABLE = Path(__file__).with_name("golden.json")

# What the cases of one script share: the first word of a case's name chooses it.
# @NAME in a flag stands for what `Place` puts there; @run NAME for the folder of another case's run.
EVERY = dict(eval_steps=0, save_steps=0, bf16=False, max_steps=2, learning_rate=1e-3)
BASE = {
    "sft": dict(model_name_or_path="@start", n_train=24, levels="1-3", per_device_train_batch_size=8,
                micro_batch_tokens=128, num_generations=4, max_completion_length=12),
    "grpo": dict(model_name_or_path="@start", dataset_name="@problems.jsonl", per_device_train_batch_size=24,
                 num_generations=4, max_completion_length=12, micro_batch_tokens=128),
    "dpo": dict(model_name_or_path="@start", dataset_name="@problems.jsonl", round_prompts=8, num_generations=4,
                max_completion_length=12, per_device_train_batch_size=8, micro_batch_tokens=128),
    "distill": dict(model_name_or_path="@start", dataset_name="@problems.jsonl", num_generations=4,
                    max_completion_length=12, per_device_train_batch_size=8, micro_batch_tokens=128,
                    teacher_sft_steps=2, teacher_steps=2, teacher_batch_size=16, warmup_steps=0),
    "moe": dict(model_name_or_path="@experts", domains="chain,synthetic:1", max_length=32, n_train=8,
                per_device_train_batch_size=4, gradient_accumulation_steps=2, balance_coef=1.0, warmup_steps=0),
}

# What is given beside those, where several cases share it.
SHORT = dict(dataset_name="@short.jsonl", dco_n=64)  # solutions likely enough for the factor to be below 1
POOL = dict(dataset_name="@problems.jsonl", n_train=4, select_pool=9)
TWICE = dict(num_iterations=2, max_steps=4)  # so that ratios leave 1, and the clip
OFFLINE = dict(pairs="offline", dataset_name="chain", n_train=48, levels="1-2", error_rate=0.5)
STEPS = dict(pairs="steps", num_generations=8, pairs_per_prompt=2)
KL = dict(beta=0.1, max_steps=3)
# Every group has a signal. In one that has none the first step's KL, which is rounding alone, would be the only
# gradient of the tokens that no other group has, and Adam makes a step of full size of any gradient.
DENSE = dict(reward_funcs=["accuracy", "length"], shape_silent_groups=True)
TEACHER = dict(teacher_model_name_or_path="@teacher")
TAUGHT = dict(**TEACHER, kd_coef=0.5)
LOGITS = dict(**TEACHER, method="logits")
ON_POLICY = dict(**TEACHER, method="on_policy")
BOOTSTRAP = dict(method="bootstrap")
HELP = dict(scaffold_exempt=0.0, scaffold_samples=4)

# Each case: its name, the module that computes it, and its flags.
CASES = {
    # --- sft.py ---
    "sft nll": ("sft", {}),
    "sft tiny": ("sft", dict(model_name_or_path="tiny")),
    "sft evaluation": ("sft", dict(eval_steps=2, n_eval=6)),
    "sft constant": ("sft", dict(max_steps=4, lr_scheduler_type="constant", warmup_steps=0.5, weight_decay=0.1)),
    "sft linear": ("sft", dict(max_steps=5, lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=0.0)),
    "sft cosine": ("sft", dict(max_steps=4, warmup_steps=2, max_grad_norm=9.0)),
    "sft accumulation": ("sft", dict(per_device_train_batch_size=4, gradient_accumulation_steps=2,
                                     gradient_checkpointing=True, micro_batch_tokens=0)),
    "sft epochs": ("sft", dict(n_train=10, num_train_epochs=2.0, seed=1)),
    "sft dropout": ("sft", dict(model_name_or_path="@dropout")),
    "sft dco": ("sft", dict(**SHORT, loss_type="dco")),
    "sft dco_step": ("sft", dict(**SHORT, loss_type="dco_step")),
    "sft dco_a": ("sft", dict(**SHORT, loss_type="dco_a")),
    "sft entropy": ("sft", dict(loss_type="entropy", entropy_keep=0.5, entropy_discount=0.7)),
    "sft stablemax": ("sft", dict(loss_type="stablemax")),
    "sft perp_grad": ("sft", dict(perp_grad=True)),
    "sft select hard": ("sft", dict(**POOL, select="hard")),
    "sft select uniform": ("sft", dict(**POOL, select="uniform")),
    "sft select easy": ("sft", dict(**POOL, select="easy")),
    "sft thought_budgets": ("sft", dict(thought_budgets=[1.0, 0.5], levels="2-4")),
    "sft lora gaussian": ("sft", dict(lora_rank=2, max_steps=3)),
    "sft lora pissa": ("sft", dict(lora_rank=2, lora_init="pissa")),
    "sft lora_sb": ("sft", dict(lora_rank=2, lora_init="lora_sb")),
    "sft rewarm keep": ("sft", dict(rewarm="keep", max_steps=4, warmup_steps=2)),
    "sft rewarm half": ("sft", dict(rewarm="half", max_steps=4, warmup_steps=2)),
    "sft rewarm full": ("sft", dict(rewarm="full", max_steps=4, warmup_steps=2)),
    "sft replay": ("sft", dict(replay_from="@short.jsonl", replay_share=0.25)),
    "sft replay a run": ("sft", dict(replay_from="@run sft select hard", replay_share=0.5)),
    "sft messages": ("sft", dict(model_name_or_path="@chat", dataset_name="@messages.jsonl")),
    "sft text": ("sft", dict(dataset_name="@text.jsonl", max_length=24)),
    "sft chat_template off": ("sft", dict(model_name_or_path="@chat", chat_template="off")),
    "sft template": ("sft", dict(model_name_or_path="@chat", prompt_template="<{prompt}>", domains="add,mul")),
    # --- grpo.py: losses ---
    "grpo grpo": ("grpo", dict(**TWICE, loss_type="grpo")),
    "grpo dr_grpo": ("grpo", dict(**TWICE, loss_type="dr_grpo")),
    "grpo dapo": ("grpo", dict(**TWICE, loss_type="dapo", seed=1)),
    "grpo gspo": ("grpo", dict(**{**TWICE, "learning_rate": 3e-5}, loss_type="gspo")),
    "grpo cispo": ("grpo", dict(**TWICE, loss_type="cispo", cispo_max_weight=1.02)),
    "grpo epsilon": ("grpo", dict(**TWICE, loss_type="grpo", epsilon=0.05, epsilon_high=0.1)),
    "grpo scale batch": ("grpo", dict(scale_rewards="batch")),
    "grpo scale none": ("grpo", dict(scale_rewards="none")),
    "grpo scale group": ("grpo", dict(scale_rewards="group", loss_type="dr_grpo")),
    "grpo leave_one_out": ("grpo", dict(baseline="leave_one_out", scale_rewards="none")),
    "grpo mask_truncated": ("grpo", dict(mask_truncated_completions=True)),
    "grpo overlong": ("grpo", dict(soft_overlong_tokens=6, shape_silent_groups=True)),
    "grpo temperature": ("grpo", dict(temperature=0.7, seed=1, generation_batch_size=5)),
    "grpo kl": ("grpo", dict(**KL)),
    "grpo kl twice": ("grpo", dict(**TWICE, beta=0.1)),
    "grpo kl_in_reward": ("grpo", dict(**KL, **DENSE, kl_in_reward=True, scale_rewards="none")),
    "grpo kl_in_reward leave_one_out": ("grpo", dict(**KL, **DENSE, kl_in_reward=True, baseline="leave_one_out")),
    "grpo anchor": ("grpo", dict(**KL, ref_model_mixup_alpha=0.5)),
    "grpo anchor sync": ("grpo", dict(**KL, ref_model_mixup_alpha=1.0, ref_model_sync_steps=2)),
    "grpo entropy": ("grpo", dict(entropy_coef=0.1)),
    "grpo tea": ("grpo", dict(entropy_coef=0.1, entropy_weighting="tea")),
    "grpo tea twice": ("grpo", dict(**TWICE, entropy_coef=0.1, entropy_weighting="tea")),
    "grpo kd reverse": ("grpo", dict(**TAUGHT)),
    "grpo kd forward": ("grpo", dict(**TAUGHT, kd_direction="forward")),
    "grpo kd anneal": ("grpo", dict(**TAUGHT, kd_schedule="anneal", kd_rows="wrong", max_steps=3)),
    "grpo kd switch": ("grpo", dict(**TAUGHT, kd_schedule="switch", kd_rows="stuck", max_steps=3)),
    "grpo hpt": ("grpo", dict(hpt_gate=0.0)),
    "grpo hpt with kl and entropy": ("grpo", dict(**TWICE, hpt_gate=0.25, sft_coef=0.5, beta=0.1, entropy_coef=0.01)),
    # --- grpo.py: rewards ---
    "grpo format": ("grpo", dict(reward_funcs=["accuracy", "format"])),
    "grpo length": ("grpo", dict(reward_funcs=["accuracy", "length"], reward_weights=[1.0, 0.5], seed=1)),
    "grpo silent groups": ("grpo", dict(reward_funcs=["accuracy", "length"], shape_silent_groups=True)),
    "grpo budget": ("grpo", dict(reward_funcs=["accuracy", "budget"], max_steps=4)),
    "grpo budget drops": ("grpo", dict(reward_funcs=["budget"], length_budget=[10, 4], budget_drops=1,
                                       budget_gate=False)),
    "grpo budget at once": ("grpo", dict(reward_funcs=["budget"], length_budget=[10, 7], budget_drops=0)),
    "grpo format_length": ("grpo", dict(reward_funcs=["format_length"])),
    "grpo stages": ("grpo", dict(stages=["6x8", "12x4"], loss_type="dr_grpo", max_steps=4, seed=2)),
    # --- grpo.py: curricula ---
    "grpo uniform": ("grpo", dict(max_steps=4)),
    "grpo horizon": ("grpo", dict(sampler="horizon", horizon_gate=0.2, horizon_review=0.5, max_steps=5, seed=5)),
    "grpo horizon by steps": ("grpo", dict(sampler="horizon", horizon_gate=0.0, levels="1,2", max_steps=4,
                                           seed=4)),
    "grpo sec": ("grpo", dict(sampler="sec", max_steps=4)),
    "grpo sec rate": ("grpo", dict(sampler="sec", sampler_rate=0.9, sampler_temperature=0.1, arm="level,domain",
                                   scale_rewards="none", max_steps=4, seed=2)),
    "grpo dump": ("grpo", dict(sampler="dump", dump_window=4, max_steps=5, seed=1)),
    "grpo domain_aware": ("grpo", dict(sampler="domain_aware", arm="domain", max_steps=4)),
    "grpo adcl": ("grpo", dict(sampler="adcl", adcl_chunks=3, adcl_samples=2, max_steps=4)),
    "grpo knapsack": ("grpo", dict(sampler="knapsack", knapsack_range=[3, 5], n_train=4, max_steps=4)),
    "grpo knapsack flat": ("grpo", dict(sampler="knapsack", knapsack_range=[3, 5], n_train=4, max_steps=4,
                                        knapsack_reweight=False)),
    "grpo dynamic": ("grpo", dict(sampler="dynamic", max_rounds=3)),
    "grpo yoked": ("grpo", dict(sampler="yoked:@run grpo sec", max_steps=4)),
    "grpo arm steps": ("grpo", dict(sampler="sec", arm="steps", max_steps=3)),
    # --- grpo.py: scaffolds ---
    "grpo hints": ("grpo", dict(**HELP, scaffold="hints")),
    "grpo hints plain": ("grpo", dict(**HELP, scaffold="hints", hint_logps="plain", num_iterations=2)),
    "grpo hints too long": ("grpo", dict(**HELP, scaffold="hints", max_prompt_length=12,
                                         hint_template="{hint}|{prompt}")),
    "grpo hints later": ("grpo", dict(scaffold="hints", scaffold_exempt=0.5, scaffold_samples=4, max_steps=3, seed=2)),
    "grpo negatives": ("grpo", dict(**HELP, scaffold="negatives")),
    "grpo egsr": ("grpo", dict(**HELP, scaffold="egsr")),
    "grpo egsr with kl": ("grpo", dict(**HELP, **DENSE, scaffold="egsr", beta=0.1, kl_in_reward=True)),
    "grpo subgoals": ("grpo", dict(**HELP, scaffold="subgoals")),
    "grpo subgoals alone": ("grpo", dict(**HELP, scaffold="subgoals", subgoal_form="alone")),
    "grpo adcl with egsr": ("grpo", dict(**HELP, scaffold="egsr", sampler="adcl", adcl_chunks=3, adcl_samples=2,
                                         seed=2)),
    # --- grpo.py: data and the rest ---
    "grpo evaluation": ("grpo", dict(dataset_name="chain", n_train=8, levels="1-2", eval_steps=2, n_eval=6,
                                     reward_funcs=["accuracy", "length"], shape_silent_groups=True)),
    "grpo columns": ("grpo", dict(dataset_name="@columns.jsonl", prompt_column="q", answer_column="a")),
    "grpo chat": ("grpo", dict(model_name_or_path="@chat", prompt_template="{prompt}?", seed=1)),
    "grpo chat with hpt": ("grpo", dict(model_name_or_path="@chat", hpt_gate=0.0)),
    "grpo chain": ("grpo", dict(dataset_name="chain", n_train=8, reward_funcs=["length"], lr_scheduler_type="linear",
                                warmup_steps=2, max_steps=4, per_device_train_batch_size=12,
                                gradient_accumulation_steps=2)),
    # --- dpo.py: losses ---
    "dpo sigmoid": ("dpo", dict(**OFFLINE, loss_type="sigmoid")),
    "dpo label_smoothing": ("dpo", dict(**OFFLINE, loss_type="sigmoid", label_smoothing=0.2, beta=0.5)),
    "dpo ipo": ("dpo", dict(**OFFLINE, loss_type="ipo")),
    "dpo ipo_sum": ("dpo", dict(**OFFLINE, loss_type="ipo_sum")),
    "dpo hinge": ("dpo", dict(**OFFLINE, loss_type="hinge")),
    "dpo simpo": ("dpo", dict(**OFFLINE, loss_type="simpo", simpo_gamma=0.5)),
    "dpo rpo": ("dpo", dict(**OFFLINE, loss_type="rpo", rpo_alpha=0.5)),
    "dpo dpop": ("dpo", dict(**OFFLINE, loss_type="dpop", dpop_lambda=2.0)),
    "dpo sft": ("dpo", dict(**OFFLINE, loss_type="sft")),
    # --- dpo.py: pairs ---
    "dpo on_policy": ("dpo", dict(resample_steps=1, max_steps=3)),
    "dpo on_policy once": ("dpo", dict(resample_steps=0, pairs_per_prompt=1, temperature=0.8, seed=1)),
    "dpo steps": ("dpo", dict(**STEPS, loss_type="sigmoid", resample_steps=1)),
    "dpo step_apo": ("dpo", dict(**STEPS, loss_type="step_apo", resample_steps=1)),
    "dpo step separator": ("dpo", dict(**STEPS, step_separator="=#", loss_type="sigmoid")),
    "dpo easy_to_hard": ("dpo", dict(**OFFLINE, easy_to_hard=0.8, max_steps=4)),
    "dpo easy_to_hard rounds": ("dpo", dict(easy_to_hard=0.8, resample_steps=1, max_steps=3)),
    "dpo budget": ("dpo", dict(**OFFLINE, budget=12, sft_fraction=0.5, max_steps=4)),
    "dpo budget on_policy": ("dpo", dict(budget=8, sft_fraction=0.25, max_steps=4, resample_steps=2,
                                         sft_learning_rate=2e-3, lr_scheduler_type="linear", warmup_steps=1)),
    "dpo sft alone": ("dpo", dict(sft_fraction=1.0)),
    "dpo no shared prefix": ("dpo", dict(**OFFLINE, loss_type="sigmoid", share_prefix=False)),
    "dpo epochs": ("dpo", dict(pairs="offline", dataset_name="@pairs.jsonl", num_train_epochs=2.0)),
    "dpo one text": ("dpo", dict(pairs="offline", dataset_name="@whole_pairs.jsonl", max_length=13)),
    "dpo chat": ("dpo", dict(pairs="offline", dataset_name="@chat_pairs.jsonl", model_name_or_path="@chat")),
    "dpo chat on_policy": ("dpo", dict(model_name_or_path="@chat", prompt_template="{prompt}?")),
    "dpo evaluation": ("dpo", dict(**OFFLINE, eval_steps=2, n_eval=6, eval_dataset_name="@problems.jsonl")),
    # --- distill.py ---
    "distill rlt": ("distill", dict(method="rlt", n_traces=8)),
    "distill rlt warm_up": ("distill", dict(method="rlt", stage="warm_up", dataset_name="chain", n_train=24)),
    "distill rlt teacher": ("distill", dict(method="rlt", stage="teacher", **TEACHER, teacher_learning_rate=1e-3,
                                            teacher_steps=3, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)),
    "distill rlt weights": ("distill", dict(method="rlt", stage="teacher", **TEACHER, rlt_alpha=0.5, rlt_lambda=1.0,
                                            format_penalty=3.0, beta=0.0, temperature=0.8)),
    "distill rlt student": ("distill", dict(method="rlt", stage="student", **TEACHER, trace_temperature=1.0)),
    "distill rlt templates": ("distill", dict(method="rlt", teacher_sft_steps=0, thought_prefix="(", thought_suffix=")",
                                              teacher_template="{solution}|{prompt}", solution_template="{solution}")),
    "distill rlt chat": ("distill", dict(method="rlt", model_name_or_path="@chat")),
    "distill ssb": ("distill", dict(method="ssb", kd_weight=0.5, num_generations=8, dataset_name="@short.jsonl")),
    "distill logits": ("distill", dict(**LOGITS, error_rate=0.5, dataset_name="chain", n_train=24)),
    "distill logits reverse": ("distill", dict(**LOGITS, divergence="reverse", kd_temperature=2.0)),
    "distill logits jsd": ("distill", dict(**LOGITS, divergence="jsd", jsd_beta=0.3, kd_weight=0.7)),
    "distill logits top-k": ("distill", dict(**LOGITS, kd_topk=4)),
    "distill logits pruned": ("distill", dict(**LOGITS, prune_fraction=0.5)),
    "distill logits of a chat": ("distill", dict(method="logits", dataset_name="@messages.jsonl",
                                                 model_name_or_path="@chat",
                                                 teacher_model_name_or_path="@chat_teacher")),
    "distill no teacher": ("distill", dict(method="logits", kd_weight=0.0)),
    "distill samples of a teacher": ("distill", dict(**LOGITS, completions="teacher", kd_weight=0.0, n_traces=8)),
    "distill samples pruned": ("distill", dict(**LOGITS, completions="teacher", prune_fraction=0.25)),
    "distill on_policy": ("distill", dict(**ON_POLICY)),
    "distill on_policy forward": ("distill", dict(**ON_POLICY, divergence="forward", temperature=0.8)),
    "distill on_policy jsd": ("distill", dict(**ON_POLICY, divergence="jsd")),
    "distill on_policy mixed": ("distill", dict(**ON_POLICY, lmbda=0.5, prune_fraction=0.25)),
    "distill bootstrap": ("distill", dict(**BOOTSTRAP)),
    "distill bootstrap lengths": ("distill", dict(**BOOTSTRAP, min_thought_tokens=3, max_thought_tokens=8,
                                                  budget_template="{budget}:{prompt}", num_generations=8)),
    "distill bootstrap shown": ("distill", dict(**BOOTSTRAP, demonstrations="@short.jsonl", n_shots=2)),
    "distill bootstrap of a teacher": ("distill", dict(**BOOTSTRAP, **TEACHER, temperature=1.2)),
    "distill em": ("distill", dict(**BOOTSTRAP, rounds=2)),
    "distill evaluation": ("distill", dict(**ON_POLICY, dataset_name="chain", n_train=16, levels="1-2", eval_steps=2,
                                           n_eval=6, eval_on_start=False)),
    # --- moe.py ---
    "moe micro": ("moe", dict(balance="micro")),
    "moe micro rows": ("moe", dict(balance="micro", balance_rows=1)),
    "moe sequence": ("moe", dict(balance="sequence")),
    "moe sync": ("moe", dict(balance="sync")),
    "moe global": ("moe", dict(balance="global")),
    "moe exact": ("moe", dict(balance="exact")),
    "moe shuffle": ("moe", dict(balance="shuffle", balance_rows=2)),
    "moe bias": ("moe", dict(balance="bias", bias_rate=0.05, max_steps=3)),
    "moe bias proportional": ("moe", dict(balance="bias", bias_rate=0.05, bias_rule="proportional", max_steps=3)),
    "moe none": ("moe", dict(balance="none", z_loss_coef=0.0)),
    "moe switch": ("moe", dict(balance="global", balance_switch="micro@1")),
    "moe micro_fraction": ("moe", dict(balance="none", micro_fraction=0.5)),
    "moe z_loss": ("moe", dict(z_loss_coef=0.1)),
    "moe sigmoid": ("moe", dict(gate="sigmoid", balance="bias", bias_rate=0.05)),
    "moe sigmoid global": ("moe", dict(gate="sigmoid")),
    "moe after sigmoid": ("moe", dict(model_name_or_path="@run moe sigmoid", gate="sigmoid")),
    "moe tiny": ("moe", dict(model_name_or_path="tiny", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                             num_experts=4, moe_intermediate_size=8, seed=1)),
    "moe one expert": ("moe", dict(model_name_or_path="tiny", hidden_size=16, num_hidden_layers=2,
                                   num_attention_heads=2, num_experts=4, moe_intermediate_size=8,
                                   num_experts_per_tok=1, norm_topk_prob=False)),
    "moe from_scratch": ("moe", dict(from_scratch=True)),
    "moe upcycle": ("moe", dict(model_name_or_path="tiny", upcycle="@start", num_experts=4)),
    "moe reinit": ("moe", dict(model_name_or_path="tiny", upcycle="@start", num_experts=4, reinit=0.5)),
    "moe weights": ("moe", dict(domains="chain=3,synthetic:2=1")),
    "moe proportional": ("moe", dict(domains="@words.txt,@text.jsonl", mixture="proportional", n_train=0)),
    "moe unimax": ("moe", dict(domains="@words.txt,@text.jsonl", mixture="unimax", unimax_epochs=0.5, n_train=0)),
    "moe rows of text": ("moe", dict(domains="@text.jsonl,@words.txt", micro_batch_tokens=64, n_train=0)),
    "moe evaluation": ("moe", dict(eval_steps=2, n_eval=3, max_completion_length=8)),
}


# --- the tolerance ---

UNIT = 2**-24  # the largest relative error of one float32 operation
LENGTH = 2**12  # the most float32 operations that follow on one another in one optimizer step: counted in `tolerance`


def tolerance(step):
    """How far a number of optimizer step `step` (from 1; an evaluation before them counts as 1) may be off, relatively.

    Other processors, and other orders of the same sums, round differently; nothing else may differ. The errors of n
    operations that follow on one another are together at most 6 sqrt(n) UNIT, but for a chance of 2 exp(-6^2 / 2)
    (Higham and Mary 2019, A New Approach to Probabilistic Rounding Error Analysis). n: two layers, each with 8 sums
    over 16 to 96 numbers, 2 norms and a softmax, take some 600 operations, the head and a sum over the tokens of a step
    some 300; the backward takes twice as many, and the norm of the gradient up to 1,000. That is under 4,096. A step
    starts from the weights of the one before, so the errors of steps add up.
    """
    return step * 6 * math.sqrt(LENGTH) * UNIT


def differences(new, old):
    """What differs between two results of `read_run`, as lines of text; none where they agree.

    Whole numbers and texts must be equal; so must the nine digits that the table has of the learning rate, which is
    computed in float64. A gradient's norm, the weights' squares and numbers above 1 may be off by the tolerance times
    their size, all others by the tolerance itself: they are sums of terms of size 1 (nats, rewards, shares) that may
    cancel. Numbers that are new are no difference.
    """
    if new.keys() != old.keys():
        return [f"folders {sorted(new)}, not {sorted(old)}"]
    found = []
    for folder, then in old.items():
        now = new[folder]
        if len(now["steps"]) != len(then["steps"]):
            found.append(f"{folder}: {len(now['steps'])} lines in metrics.jsonl, not {len(then['steps'])}")
        for line, before in zip(now["steps"], then["steps"]):
            for name, value in before.items():
                if not agree(name, line.get(name), value, max(1, before["step"])):
                    found.append(f"{folder}: step {before['step']}: {name} {line.get(name)}, not {value}")
        for name, value in then["picked"].items():
            if now["picked"].get(name) != value:
                found.append(f"{folder}: {name} {now['picked'].get(name)}, not {value}")
        allowed = tolerance(max(1, then["steps"][-1]["step"]))
        size = math.sqrt(then["weights"]["count"] * then["weights"]["squares"])  # no sum of absolutes is larger
        for name, value in then["weights"].items():
            scale = {"count": 0, "sum": size}.get(name, abs(value))
            if not abs(now["weights"].get(name, math.nan) - value) <= allowed * scale:
                found.append(f"{folder}: weights: {name} {now['weights'].get(name)}, not {value}")
    return found


def agree(name, new, old, step):
    """Is a number of metrics.jsonl what it was?"""
    if new is None or isinstance(old, int):
        return new == old
    if name == "learning_rate":
        return math.isclose(new, old, rel_tol=1e-8)
    return new == old or abs(new - old) <= tolerance(step) * (abs(old) if name == "grad_norm" else max(1, abs(old)))


# --- what the cases start from ---

LIKELY = {"1": 5.0, "3": 4.5, "+": 1.5, "=": 1.5, ";": 2.5, "#": 3.0, "<eos>": 5.0}
TEMPLATE = ("{% for message in messages %}{{ message['role'][0] + '>' + message['content'] + '<eos>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'a>' }}{% endif %}")


def write_model(folder, seed, kind=Qwen3ForCausalLM, shape=Qwen3Config, chat=False, **sizes):
    """Saves a model of random weights that writes short sums, some with the answer 1 or 3, and ends them.

    NumPy draws the weights, whose numbers are the same on every processor. The first channel is large at every token,
    so the head's first column says how likely each token is by itself; the other channels make it depend on the text.
    """
    tokenizer = ground.char_tokenizer()
    tokenizer.chat_template = TEMPLATE if chat else None
    sizes = {"hidden_size": 32, "intermediate_size": 64, **sizes}
    model = kind(shape(vocab_size=len(tokenizer), num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                       head_dim=16, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            mean = 1.0 if weight.ndim == 1 else 0.0  # the norms' scales
            weight.copy_(torch.from_numpy(rng.normal(mean, 0.15, weight.shape)))
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding *= 4
        embedding[:, 0] = 3.0
        head[:, 0] = -2.0
        for token, logit in LIKELY.items():
            head[tokenizer.convert_tokens_to_ids(token), 0] = logit / 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_models(root):
    """The models that @NAME names."""
    write_model(root / "start", 0)
    write_model(root / "teacher", 1, hidden_size=48)
    write_model(root / "dropout", 2, attention_dropout=0.1)
    write_model(root / "chat", 7, chat=True)
    write_model(root / "chat_teacher", 4, chat=True, hidden_size=48)
    write_model(root / "experts", 5, Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2,
                moe_intermediate_size=16, norm_topk_prob=True, hidden_size=16)


def write_rows(path, rows):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(root):
    """The files that @NAME.jsonl and @NAME.txt name."""
    problems, short, pairs, chats, chat_pairs = [], [], [], [], []
    for i in range(24):
        question, level = f"{i + 3}+{i % 4}=", i % 3 + 1
        answer = {1: "1", 2: "3", 3: "77"}[level]  # the last is never found
        steps = [f"{4 + k}+{i % 4}={8 + k};" for k in range(1 + i % 2)]
        solution = "".join(steps) + f"#{answer}"
        problems.append({"prompt": question, "answer": answer, "solution": solution, "level": level,
                         "domain": ["add", "mul"][i // 3 % 2], "hints": ["add up", [steps[0], "then end"]],
                         "subgoals": [["5+6=", "1"], ["6+7=", "2"]]})
        short.append({"prompt": question, "completion": ["1", "3;1", "1;#1"][i % 3], "answer": "1"})
        pairs.append({"prompt": question, "chosen": f"4+1;#{answer}", "rejected": "2+2=4", "level": level})
        user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": solution}
        chats.append({"messages": [{"role": "system", "content": "add"}, user, assistant][i % 2 :] + [user, assistant]})
        chat_pairs.append({"chosen": [user, assistant], "rejected": [user, {**assistant, "content": "#4"}]})
    write_rows(root / "problems.jsonl", problems[:12])
    write_rows(root / "columns.jsonl", [{"q": row["prompt"], "a": row["answer"]} for row in problems])
    write_rows(root / "short.jsonl", short)
    write_rows(root / "pairs.jsonl", pairs[:12])
    write_rows(root / "whole_pairs.jsonl", [{"chosen": f"{row['prompt']} {row['chosen']}",
                                             "rejected": f"{row['prompt']} {row['rejected']}"} for row in pairs])
    write_rows(root / "messages.jsonl", chats)
    write_rows(root / "chat_pairs.jsonl", chat_pairs)
    write_rows(root / "text.jsonl", [{"text": row["prompt"] + row["solution"]} for row in problems])
    (root / "words.txt").write_text("".join(f"{n} bottles of beer on the wall\n" for n in range(60)))


# --- runs ---


@contextlib.contextmanager
def as_tested():
    """Runs on the CPU without drawing, which takes longer than all else, and leaves the signals as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for name in ("eval", "sft", "dpo", "grpo", "distill", "moe"):
            module = importlib.import_module(name)
            for drawing in ("plot_runs", "draw_experts"):
                patch.setattr(module, drawing, lambda *given: None, raising=False)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Place:
    """A folder with the models and the data that cases start from, and the runs made there, each once."""

    def __init__(self, root):
        self.root = root
        write_models(root)
        write_data(root)

    def run(self, name):
        """The folder of the finished run of this case."""
        folder = self.root / "runs" / name.replace(" ", "_")
        if not folder.exists():
            module, flags = CASES[name]
            flags = {**EVERY, **BASE[name.split()[0]], **flags, "output_dir": "@folder"}
            flags = {flag: self.resolved(value, folder) for flag, value in flags.items()}
            script = importlib.import_module(module)
            script.main(script.Config(**flags))
        return folder

    def resolved(self, value, folder):
        """A flag's value with paths for what begins with @."""
        if not isinstance(value, str):
            return value
        names = re.findall(r"(?<!\w)@(run [^,/]+|[\w.]+)", value)
        for name in names:
            path = self.run(name[4:]) if name.startswith("run ") else self.root / name
            value = value.replace(f"@{name}", str(folder if name == "folder" else path))
        return value


TEXTS = ("prompt", "completion", "chosen", "rejected")


def picked(path):
    """The number of lines of a file of JSON lines, and a hash of their steps and texts: "12 lines 0123456789abcdef"."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [[line.get("step"), *(line.get(name) for name in TEXTS)] for line in lines]
    return f"{len(lines)} lines {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}"


def checksum(folder):
    """Count, sum and sum of squares of all weights in a run's folder, and of a router's bias, which is saved beside."""
    tensors = [tensor.double() for tensor in load_file(folder / "model.safetensors").values()]
    found = {"count": sum(tensor.numel() for tensor in tensors), "sum": float(sum(tensor.sum() for tensor in tensors)),
             "squares": float(sum(tensor.square().sum() for tensor in tensors))}
    if (folder / "router.json").is_file():
        bias_LE = torch.tensor(json.loads((folder / "router.json").read_text())["bias_LE"])
        found["bias"] = float(bias_LE.double().square().sum())
    return found


def read_run(folder, root):
    """What the table holds of a run in `root`: {folder of a stage, "." where there are none: steps, picks, weights}."""
    found = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        text = path.read_text().replace(f"{root}/", "@")  # a file of text is a domain of moe.py, and names its numbers
        lines = [json.loads(line) for line in text.splitlines()]
        steps = [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]
        files = [path.with_name(f"{name}.jsonl") for name in ("samples", "pairs", "traces")]
        found[str(path.parent.relative_to(folder))] = {
            "steps": steps, "picked": {file.stem: picked(file) for file in files if file.is_file()},
            "weights": checksum(path.parent)}
    return found


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_what_they_were(place, name):
    with as_tested():
        found = read_run(place.run(name), place.root)
    wrong = differences(found, json.loads(TABLE.read_text())[name]["folders"])
    assert not wrong, "\n".join(wrong)


def test_the_table_holds_these_cases_alone():
    assert list(json.loads(TABLE.read_text())) == list(CASES)


def nine_digits(value):
    """Floats cut to nine digits, which is more than float32 holds."""
    if isinstance(value, dict):
        return {name: nine_digits(part) for name, part in value.items()}
    if isinstance(value, list):
        return [nine_digits(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def table_text(table):
    """The table as JSON: a line for each step, so that a change shows where it is."""
    cases = []
    for name, case in table.items():
        head = json.dumps({"script": case["script"], "flags": case["flags"]})[1:-1]
        folders = []
        for folder, run in case["folders"].items():
            steps = ",\n   ".join(json.dumps(step) for step in run["steps"])
            rest = json.dumps({"picked": run["picked"], "weights": run["weights"]})[1:-1]
            folders.append(f'{json.dumps(folder)}: {{"steps": [\n   {steps}],\n  {rest}}}')
        cases.append(f'{json.dumps(name)}: {{{head}, "folders": {{\n  ' + ",\n  ".join(folders) + "}}")
    return "{\n" + ",\n".join(cases) + "\n}\n"


def write(names):
    """Runs these cases (none: all) and writes the table."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    with tempfile.TemporaryDirectory() as root, as_tested():
        place = Place(Path(root))
        for name in names or CASES:
            began = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                folder = place.run(name)
            module, flags = CASES[name]
            table[name] = {"script": module, "flags": flags, "folders": nine_digits(read_run(folder, place.root))}
            print(f"{name}: {time.process_time() - began:.2f} s of CPU time", flush=True)
    TABLE.write_text(table_text({name: table[name] for name in CASES if name in table}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] != ["--write"]:
        sys.exit(__doc__)
    write(sys.argv[2:])
