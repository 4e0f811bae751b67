r"""Reinforcement learning with verifiable rewards: GRPO and its relatives.

For each prompt, G completions are sampled and checked; a completion is worth what it scored above its group's mean:

    A = (reward - mean of the group) / (std of the group + 1e-4)
    loss = - sum over completion tokens of  weight * min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
    r = p(token) / p_old(token), p_old at the time of sampling

`--loss_type` chooses what the token's weight is and what takes the place of the clipped ratio; all weights divide by
counts of the whole optimizer step, over all processes. The value of this loss does not show what is learned: on fresh
rollouts it is 0, but for what KL, entropy, imitation and cispo's log p add, and for the larger weight of a longer
completion under dapo and dr_grpo. Look at reward, entropy and clip_ratio. Against TRL's GRPOTrainer: a prompt is
prefilled once for its group, finished rows leave the batch, rows are sorted by length instead of padded to the longest
of the step, groups whose completions all scored alike are not computed at all (their gradient is exactly zero) yet
stay in the denominator, and the reference of --beta is checked, on resume, to be the model that the run began with.

Curricula are classes, hints and subgoals functions, under headings of their own; what depends on the step alone
(budgets, stages, annealing) is in `pace_of`. README.md lists every method with its flag.

Dimensions: P prompts · G completions per prompt · R = P G rows of a step · B rows of one forward · T tokens ·
S = T - 1 predicting positions · N trained tokens · D model width · V vocabulary.

    python sft.py && python grpo.py                   # the embedded task: four minutes of one core
    python grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k --output_dir runs/g \
        --dataset_test_split test --max_completion_length 512 --per_device_train_batch_size 128  # one GPU
    torchrun --nproc-per-node 8 grpo.py ...                                               # several GPUs
"""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from eval import (InputError, Log, ProblemFlags, Rollouts, RunError, RunFlags, chat_text, encode_prompt, end_of_turn,
                  eval_numbers, extract_answer, fill_template, flag, generate, keep_checkpoint, launch, leave,
                  load_eval_problems, load_model, load_problems, open_run, publish, softcap, stop_signals, verify)
from kernels import linear_logps

# --- config ---


@dataclass
class Config(ProblemFlags, RunFlags):
    SECTIONS = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "the run's folder",
                "num_generations": "sampling", "sampler": "curriculum: which prompts",
                "scaffold": "hints for prompts never answered right", "reward_funcs": "reward", "loss_type": "loss",
                "teacher_model_name_or_path": "teachers", "per_device_train_batch_size": "optimizer and memory",
                "logging_steps": "logs, evaluation, checkpoints"}

    output_dir: str = flag("runs/grpo", "the run's folder: model, args.json, metrics.jsonl, curves.png, checkpoints/",
                           free=True)
    num_generations: int = flag(8, "completions per prompt: G", low=2)
    max_prompt_length: int = flag(512, "tokens; a longer prompt is an error, with help in it it is left out", low=1)
    temperature: float = flag(1.0, "of sampling, above 0; it divides the logits of the loss too", low=0)
    generation_batch_size: int = flag(256, "rows decoded at once; memory and speed only", low=1, free=True)
    stages: list[str] = flag([], "limit x G of equal parts of the run, such as 32x16 64x8 128x4; none: one stage")
    sampler: str = flag("uniform", "uniform, horizon, sec, dump, domain_aware, adcl, knapsack, dynamic, or yoked:RUN")
    arm: str = flag("level", "what the samplers choose among, steps being those of the solution",
                    choices=("level", "domain", "steps", "level,domain"))
    sampler_rate: float = flag(0.5, "sec, domain_aware: weight of the newest step in the running mean", low=0, high=1)
    sampler_temperature: float = flag(0.0, "of the choice among arms; 0: sec 0.4, dump 0.1, domain_aware 0.3", low=0)
    dump_window: int = flag(300, "dump: an arm's last so many completions count", low=1)
    horizon_gate: float = flag(0.8, "horizon: accuracy that opens the next arm; 0: equal shares of --max_steps",
                               low=0, high=1)
    horizon_review: float = flag(0.2, "horizon: share of prompts from the arms before the current one", low=0, high=1)
    adcl_chunks: int = flag(8, "adcl: parts of the data from easy to hard, each measured anew before its turn", low=1)
    adcl_samples: int = flag(4, "adcl: completions that measure a problem's difficulty", low=1)
    knapsack_range: list[int] = flag([2, 64], "knapsack: fewest completions of any prompt, most of a mixed one", low=2)
    knapsack_reweight: bool = flag(True, "knapsack: a prompt weighs as many completions as it got; off: all weigh G")
    max_rounds: int = flag(10, "dynamic: sample at most so many times for one step", low=1)
    scaffold: str = flag("none", "for prompts never answered right: none, hints, egsr, subgoals, negatives (a control)",
                         choices=("none", "hints", "egsr", "subgoals", "negatives"))
    scaffold_exempt: float = flag(0.15, "share of --max_steps before a scaffold helps", low=0, high=1)
    scaffold_samples: int = flag(1, "completions sampled at each level of help", low=1)
    hint_template: str = flag("{prompt}\n\nHint: {hint}", "the prompt with help, from {prompt} and {hint}")
    hint_logps: str = flag("auto", "train the helped completion under the prompt: hinted, plain; auto: plain for egsr",
                           choices=("auto", "hinted", "plain"))
    subgoal_form: str = flag("given", "subgoals: alone, or given the steps before it", choices=("alone", "given"))
    reward_funcs: list[str] = flag(["accuracy"], "one or more, added up", choices=lambda: REWARDS)
    reward_weights: list[float] = flag([], "one weight per reward function; none: 1 each")
    shape_silent_groups: bool = flag(False, "let other rewards than accuracy move groups without a right completion")
    length_budget: list[int] = flag([], "budget: tokens asked for at the start and at the end; none: limit and a third",
                                    low=1)
    budget_drops: int = flag(3, "budget: equally spaced cuts on the way from the first to the last; 0: the last always",
                             low=0)
    budget_gate: bool = flag(True, "budget: paid for right completions only (the paper pays wrong ones too)")
    soft_overlong_tokens: int = flag(0, "the last so many tokens before the limit cost up to 1 (DAPO); 0: nothing",
                                     low=0)
    loss_type: str = flag("dapo", "what the update maximises", choices=lambda: CLIPS)
    epsilon: float = flag(0.0, "ratios clip below 1 - this; 0: as the loss's paper (0.2; gspo 3e-4; cispo: none)",
                          low=0)
    epsilon_high: float = flag(0.0, "ratios clip above 1 + this; 0: as the loss's paper (0.2; dapo .28; gspo 4e-4)",
                               low=0)
    cispo_max_weight: float = flag(5.0, "cispo: the largest weight of a token, an absolute ratio (TRL's epsilon_high)",
                                   low=0)
    scale_rewards: str = flag("auto", "divide advantages by the std of: group, batch, none; auto: none for dr_grpo",
                              choices=("auto", "group", "batch", "none"))
    baseline: str = flag("mean", "what a reward is compared with: mean of its group, or leave_one_out of the others",
                         choices=("mean", "leave_one_out"))
    num_iterations: int = flag(1, "optimizer steps on each step's rollouts; checkpoints are only taken after the last",
                               low=1)
    mask_truncated_completions: bool = flag(False, "do not train on completions that the limit cut off")
    beta: float = flag(0.0, "weight of the KL divergence to the model given", low=0)
    kl_in_reward: bool = flag(False, "the KL, undivided, lowers a completion's advantage (T1; with scale_rewards none)")
    ref_model_mixup_alpha: float = flag(0.0, "share of the policy mixed into the reference of --beta; 0: it is fixed",
                                        low=0, high=1)
    ref_model_sync_steps: int = flag(1, "mix it in every so many steps", low=1)
    entropy_coef: float = flag(0.0, "weight of an entropy bonus, per token", low=0)
    entropy_weighting: str = flag("uniform", "of the bonus's tokens: uniform, or tea (where the update costs entropy)",
                                  choices=("uniform", "tea"))
    teacher_model_name_or_path: str = flag("", "a model with the same tokenizer that --kd_coef pulls towards")
    kd_coef: float = flag(0.0, "weight of the KL divergence to the teacher", low=0)
    kd_direction: str = flag("reverse", "whose KL the gradient follows: reverse (k2), forward (k3)",
                             choices=("reverse", "forward"))
    kd_schedule: str = flag("constant", "constant, anneal (linearly to a fifth), switch (only in the first half)",
                            choices=("constant", "anneal", "switch"))
    kd_rows: str = flag("all", "completions the KL acts on: all, wrong, stuck (groups without a right one)",
                        choices=("all", "wrong", "stuck"))
    hpt_gate: float = flag(-1.0, "prompts answered right at most this share learn from their solution; below 0: off")
    sft_coef: float = flag(1.0, "hpt: weight of a solution's log-likelihood", low=0)
    per_device_train_batch_size: int = flag(256, "completions per process; at most so many in one forward",
                                            low=1, free=True)
    learning_rate: float = flag(0.0, "peak learning rate; 0: 5e-5 under 10 M parameters, 1e-6 (TRL's) above", low=0)


CLIPS = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4),
         "cispo": (1.0, 1.0)}  # epsilon and epsilon_high of each loss's paper; cispo: none


# --- loss ---


def clipped_gain(logps_BS, old_logps_BS, advantages_B, epsilon, epsilon_high):
    """PPO's pessimistic surrogate per token. Source: PPO 1707.06347 eq. 7; asymmetric bounds: DAPO 2503.14476 eq. 8."""
    ratio_BS = (logps_BS - old_logps_BS).exp()
    clipped_BS = ratio_BS.clamp(1 - epsilon, 1 + epsilon_high)
    return torch.min(ratio_BS * advantages_B[:, None], clipped_BS * advantages_B[:, None])


def sequence_logps(logps_BS, old_logps_BS, mask_BS):
    """Log-probs whose ratio to old_logps is, at every token, the sequence's geometric mean ratio: [B, S].

    Its value is that of the sequence, its gradient each token's own, so `clipped_gain` on it with sequence-mean
    weights is GSPO. Source: GSPO 2507.18071 eq. 7 and the token form of section 4.3.
    """
    mean_B1 = ((logps_BS - old_logps_BS) * mask_BS).sum(1, keepdim=True) / mask_BS.sum(1, keepdim=True).clamp(min=1)
    return old_logps_BS + mean_B1.detach() + logps_BS - logps_BS.detach()


def cispo_gain(logps_BS, old_logps_BS, advantages_B, max_weight):
    """REINFORCE weighted by the ratio, which is cut and not differentiated, so no token loses its gradient.

    max_weight is the largest ratio itself, not its distance from 1. Source: MiniMax-M1 2506.13585 eq. 4-5.
    """
    weight_BS = (logps_BS - old_logps_BS).exp().clamp(max=max_weight).detach()
    return weight_BS * advantages_B[:, None] * logps_BS


def policy_gain(logps_BS, old_logps_BS, advantages_B, mask_BS, config):
    """What --loss_type maximises, and whether the clip took the gradient (cispo: cut it), per token: two [B, S]."""
    if config.loss_type == "cispo":
        cut_BS = (logps_BS - old_logps_BS).exp() > config.cispo_max_weight
        return cispo_gain(logps_BS, old_logps_BS, advantages_B, config.cispo_max_weight), cut_BS
    if config.loss_type == "gspo":
        logps_BS = sequence_logps(logps_BS, old_logps_BS, mask_BS)
    ratio_BS, advantages_B1 = (logps_BS - old_logps_BS).exp(), advantages_B[:, None]
    cut_BS = torch.where(advantages_B1 > 0, ratio_BS > 1 + config.epsilon_high, ratio_BS < 1 - config.epsilon)
    gain_BS = clipped_gain(logps_BS, old_logps_BS, advantages_B, config.epsilon, config.epsilon_high)
    return gain_BS, cut_BS & (advantages_B1 != 0)


def row_weights(loss_type, lengths_R, max_completion_length):
    """What one token of each row weighs, so that a sum over all tokens of the step is the loss: [R].

    lengths_R are the trained tokens of every row of the step, rows without signal included; 0 for masked rows.
    grpo, gspo: mean over rows of the mean over tokens. dapo, cispo: mean over all tokens. dr_grpo: sum over tokens /
    (rows * the limit of the stage), which is a constant: longer wrong answers are not cheaper.
    Source: DeepSeekMath 2402.03300 eq. 3; DAPO 2503.14476 eq. 8; Dr. GRPO 2503.20783 section 3.
    """
    if loss_type in ("grpo", "gspo"):
        return 1 / (lengths_R.clamp(min=1) * len(lengths_R))
    divisor = len(lengths_R) * max_completion_length if loss_type == "dr_grpo" else max(1, int(lengths_R.sum()))
    return torch.full_like(lengths_R, 1 / divisor, dtype=torch.float32)


def kl_k3(logps_BS, reference_logps_BS):
    """KL(policy || reference) per token in nats, 0 or more; tokens are the policy's. Source: Schulman 2020, k3."""
    log_ratio_BS = reference_logps_BS - logps_BS  # reference minus policy: the other way round is another quantity
    return log_ratio_BS.expm1() - log_ratio_BS


def tea_weights(advantages_R, logps_RT, mask_RT, scale=10.0, largest=5.0):
    """Weights of an entropy bonus that goes where the update destroys entropy: [R, T], 0 outside the mask, no gradient.

    Large where the advantage and the token's log-prob stand on the same side of their means over the step: likely
    tokens of winners, unlikely tokens of losers. softmax over each row, so the mean weight is scale / length.
    Source: Light-IF 2508.03178, token-wise entropy-adaptive regularisation; the constants are its code's.
    """
    counts_R = mask_RT.sum(1)
    mean_advantage = (advantages_R * counts_R).sum() / counts_R.sum()
    mean_logp = (logps_RT * mask_RT).sum() / counts_R.sum()
    covariance_RT = (advantages_R[:, None] - mean_advantage) * (logps_RT - mean_logp)
    return (scale * covariance_RT.masked_fill(~mask_RT, -math.inf).softmax(1)).clamp(0, largest).detach().nan_to_num()


def teacher_penalty(logps_BS, teacher_logps_BS, direction):
    """Per token, on tokens the policy sampled: what to minimise to move towards the teacher.

    Named by the KL whose gradient it has, which is not what its value suggests: k2 = log-ratio^2 / 2 has the gradient
    of KL(policy || teacher), `reverse`; k3 = r - 1 - log r that of KL(teacher || policy), `forward`; k1 as a loss has
    none. Log-ratios beyond 10 pull no harder than 10 (k2); above 10, where k3's pull would be e^10, it has none.
    Source: KDRL 2506.02208; Schulman 2020; by enumeration in tests.
    """
    if direction == "reverse":
        return nn.functional.huber_loss(logps_BS, teacher_logps_BS, reduction="none", delta=10.0)
    log_ratio_BS = (teacher_logps_BS - logps_BS).clamp(max=10)
    return log_ratio_BS.expm1() - log_ratio_BS


def group_advantages(rewards_PG, scale):
    """How far each completion scored above its group's mean, divided by a standard deviation: [P, G].

    scale: `group` (GRPO; unbiased std as in TRL and verl), `none` (Dr. GRPO). Groups that scored alike get exactly 0,
    whatever float noise their mean has.
    Source: DeepSeekMath 2402.03300 section 4.1.2; Dr. GRPO 2503.20783 section 3.
    """
    centered_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    centered_PG = centered_PG.masked_fill(silent_groups(rewards_PG)[:, None], 0.0)
    return centered_PG if scale == "none" else centered_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)


def silent_groups(rewards_PG):
    """Which groups carry no signal because all their rewards are equal (but for float noise): bool [P]."""
    return rewards_PG.amax(1) - rewards_PG.amin(1) < 1e-6


def baseline_factor(G, config):
    """From a distance to the mean of a group of G to one to the mean of the others (RLOO 2402.14740 section 2.3)."""
    return G / max(1, G - 1) if config.baseline == "leave_one_out" else 1.0


def credit(groups, pace, n_rows, config):
    """Gives every row its advantage and the weight of its tokens in the loss, in place.

    Where `accuracy` is a reward, a group without a right completion has advantage 0 whatever its other scores
    (--shape_silent_groups lets them act): divided by their tiny std they would drive the step. A step of fewer than
    n_rows rows has the weights it would have in a full one, so that no filter changes the size of the step.
    """
    rows = rows_of(groups)
    if not rows:  # dynamic sampling has found no mixed group
        return
    gated = "accuracy" in config.reward_funcs and not config.shape_silent_groups
    scale, batch_std = config.scale_rewards, 1.0
    if scale == "batch":
        scale, batch_std = "none", torch.tensor([float(row.reward) for row in rows]).std().item() + 1e-4
    for group in groups:
        G, rewards_1G = len(group.rows), torch.tensor([[float(row.reward) for row in group.rows]])
        factor = baseline_factor(G, config) / batch_std
        for row, advantage in zip(group.rows, group_advantages(rewards_1G, scale)[0].tolist()):
            row.advantage = 0.0 if gated and group.success() == 0 else advantage * factor
    cut = config.mask_truncated_completions
    lengths_R = torch.tensor([0 if cut and not row.finished else len(row.tokens_T) for row in rows])
    weights_R = row_weights(config.loss_type, lengths_R, pace.limit) * min(1.0, len(rows) / n_rows)
    for row, weight, length in zip(rows, weights_R.tolist(), lengths_R.tolist()):
        row.weight = weight if length and not row.muted else 0.0
    if config.sampler == "knapsack" and not config.knapsack_reweight:
        for group in groups:
            for row in group.rows:
                row.weight *= pace.generations / len(group.rows)


class Update:
    """What one rollout trains on: the rows that can move a weight; the same on every process.

    A row without advantage is left out, unless a KL or entropy term gives it a gradient; what it weighs in the
    denominators is in the weights of the others already.
    """

    def __init__(self, rows, config):
        always = bool(config.entropy_coef or (config.beta and not config.kl_in_reward))
        self.rows = [row for row in rows if row.weight and (row.advantage or row.kd_coef or always)]
        self.config = config
        self.taught = any("teacher" in row.values for row in self.rows)
        self.n_tokens = max(1, sum(len(row.tokens_T) for row in self.rows))

    def spread(self, name, rows, batch):
        """One of the rows' values, laid out like the batch: [B, S], 0 where nothing is trained."""
        B, S = batch.mask_BS.shape
        values_N = torch.cat([row.values[name] for row in rows] or [torch.zeros(0)]).to(batch.ids_BT.device)
        return values_N.new_zeros(B * S).index_copy(0, batch.where_N, values_N).view(B, S)

    def old_logps(self, logps_BS, rows, batch):
        """The log-probs at the time of sampling, no gradient: those of the first pass over these rows, which are kept.

        A row is in the forwards of the same process at every pass.
        """
        if self.config.num_iterations == 1:
            return logps_BS.detach()
        if not all("old" in row.values for row in rows):
            hand_out(logps_BS.detach().flatten()[batch.where_N], rows, "old")
        return self.spread("old", rows, batch)

    def loss_of(self, policy, batch):
        """The batch's share of the step's loss, and of the numbers logged."""
        config, rows = self.config, [self.rows[i] for i in batch.rows]
        logps_BS, entropy_BS = policy(batch, config.temperature, entropy=True)
        numbers_BC = torch.tensor([row.numbers() for row in rows] or [[0.0] * 4]).to(logps_BS)
        advantages_B, weights_B, kd_B, demo_B = numbers_BC.unbind(1)

        # the clipped surrogate; a solution to imitate was never sampled, so its ratio is 1 at every pass
        old_logps_BS = self.old_logps(logps_BS, rows, batch)
        old_logps_BS = torch.where(demo_B[:, None] > 0, logps_BS.detach(), old_logps_BS)
        gain_BS, cut_BS = policy_gain(logps_BS, old_logps_BS, advantages_B, batch.mask_BS, config)
        sampled_BS = self.spread("sampled", rows, batch)
        numbers = {"entropy": entropy_BS.detach().sum(),
                   "clip_ratio": (cut_BS & batch.mask_BS).sum(),
                   "sampling/logp_difference": (old_logps_BS - sampled_BS).abs().nan_to_num().sum()}

        # plus entropy, minus the distances to the reference and to the teacher
        own_B1 = 1 - demo_B[:, None]  # what was not sampled has neither an entropy to keep nor a KL to estimate
        if config.entropy_coef:  # else entropy is only logged, and its gradient not even computed
            bonus_BS = self.spread("entropy_weight", rows, batch) if config.entropy_weighting == "tea" else 1.0
            gain_BS = gain_BS + config.entropy_coef * own_B1 * bonus_BS * entropy_BS
        if config.beta:
            kl_BS = kl_k3(logps_BS, self.spread("reference", rows, batch)) * batch.mask_BS * own_B1
            gain_BS = gain_BS - (0.0 if config.kl_in_reward else config.beta) * kl_BS
            numbers["kl"] = kl_BS.detach().sum()
        if self.taught:
            teacher_BS = self.spread("teacher", rows, batch)
            gain_BS = gain_BS - kd_B[:, None] * teacher_penalty(logps_BS, teacher_BS, config.kd_direction)
            numbers["kd/teacher_gap"] = ((logps_BS.detach() - teacher_BS) * batch.mask_BS).sum()

        # the weights hold the denominators, so that micro-batches and processes just add up
        loss = -(gain_BS * batch.mask_BS * weights_B[:, None]).sum()
        return loss, {name: value / self.n_tokens for name, value in numbers.items()}


# --- curriculum ---


class Pace(NamedTuple):
    """All that depends on the step alone, so that a resumed run needs no state for it."""

    step: int
    limit: int  # tokens of a completion at most
    generations: int  # completions per prompt
    budget: float  # tokens that the `budget` reward asks for
    kd_coef: float  # weight of the KL to the teacher
    helps: bool  # is the scaffold at work yet?


def pace_of(step, config):
    """The Pace of optimizer step `step` (from 0).

    stages: limit and group size change at equal parts of the run (PTST, Vision-R1 2503.06749 section 3.3). budget:
    `budget_drops` equal factors at equal distances lead from the first to the last (Train Long, Think Short
    2508.08940 section 3). kd: KDRL 2506.02208 anneals; its switch here is half-way. scaffold_exempt: Scaf-GRPO
    2510.19807 section 3.1 lets a policy try alone first, 15 % of the steps.
    """
    done = step / config.max_steps
    limit, generations = config.max_completion_length, config.num_generations
    if config.stages:
        limit, generations = map(int, config.stages[int(done * len(config.stages))].split("x"))
    first, final = config.length_budget or (config.max_completion_length, config.max_completion_length / 3)
    drops = config.budget_drops
    budget = first * (final / first) ** (int(done * (drops + 1)) / drops) if drops else final
    kd = {"constant": 1.0, "anneal": 1 - 0.8 * done, "switch": float(done < 0.5)}[config.kd_schedule]
    return Pace(step, limit, generations, budget, config.kd_coef * kd, done >= config.scaffold_exempt)


class Uniform:
    """Every problem in turn, shuffled anew for each pass. The other samplers are this one but for what they override.

    pick(pace, n_rows) says what to sample next, as (index of a problem, completions), at most n_rows completions, for
    all but measurements; update(groups) sees every group that came back, before any filter, and looks at the
    checker's verdicts alone, never at shaped rewards; keep(group) says whether it may train. `rounds` bounds how often
    a step samples. `state` is all that was learned, as JSON: checkpoints hold it.
    """

    rounds = 10  # most fill the step in the first

    def __init__(self, arms_N, config):
        self.config, self.names = config, sorted(set(arms_N), key=in_numbers)
        self.arm_of = [self.names.index(arm) for arm in arms_N]
        self.members = [[i for i, arm in enumerate(self.arm_of) if arm == a] for a in range(len(self.names))]
        self.state = {"drawn": [0] * len(self.names), "passed": 0}

    def shares(self):
        """The chance of each arm at the next pick: list of float, or None where arms are not what is chosen."""
        return None

    def pick(self, pace, n_rows):
        count, shares, seed = n_rows // pace.generations, self.shares(), self.config.seed
        if shares is not None:
            rng = np.random.default_rng([seed, sum(self.state["drawn"]), 1])
            return self.from_arms(rng.choice(len(self.names), count, p=shares), pace)
        found = in_order(len(self.arm_of), self.state["passed"], count, seed)
        self.state["passed"] += count
        return [(i, pace.generations) for i in found]

    def from_arms(self, arms, pace):
        """The next problem of each arm named, in a shuffled order of its own."""
        picks = []
        for arm in arms:
            members, drawn = self.members[arm], self.state["drawn"][arm]
            [place] = in_order(len(members), drawn, 1, self.config.seed, arm)
            self.state["drawn"][arm] += 1
            picks.append((members[place], pace.generations))
        return picks

    def update(self, groups):
        pass

    def keep(self, group):
        return True

    def by_arm(self, groups, value):
        """The mean of value(group) over the groups of each arm: {arm: mean}."""
        found = {}
        for group in groups:
            found.setdefault(self.arm_of[group.problem], []).append(value(group))
        return {arm: sum(values) / len(values) for arm, values in found.items()}


class Horizon(Uniform):
    """Short problems until they are mastered, then longer ones, with some review of the earlier.

    An arm is mastered when the verdicts of its last 8 or more groups average `horizon_gate`; gate 0 gives each arm an
    equal share of the steps, as the paper does. Source: h1 2510.07312 section 3; the gate and the review are ours.
    """

    def __init__(self, arms_N, config):
        super().__init__(arms_N, config)
        self.state |= {"stage": 0, "recent": []}

    def shares(self):
        stage = self.state["stage"]
        review = self.config.horizon_review if stage else 0.0
        return [review / max(1, stage)] * stage + [1 - review] + [0.0] * (len(self.names) - stage - 1)

    def pick(self, pace, n_rows):
        if not self.config.horizon_gate:
            self.state["stage"] = int(pace.step / self.config.max_steps * len(self.names))
        return super().pick(pace, n_rows)

    def update(self, groups):
        stage, gate = self.state["stage"], self.config.horizon_gate
        found = [group.success() for group in groups if self.arm_of[group.problem] == stage]
        recent = self.state["recent"] = (self.state["recent"] + found)[-max(8, len(groups)) :]
        if gate and len(recent) >= 8 and sum(recent) / len(recent) >= gate and stage < len(self.names) - 1:
            self.state |= {"stage": stage + 1, "recent": []}


class SEC(Uniform):
    """Self-Evolving Curriculum: a bandit over arms; an arm pays its mean |advantage|, a proxy of what it teaches.

    Q <- (1 - rate) Q + rate mean|A| for the arms seen; chance softmax(Q / temperature). The authors' code lets the
    value of an arm that was not drawn decay, which their equation does not; here it stays.
    Source: SEC 2505.14970 section 3.
    """

    def __init__(self, arms_N, config):
        super().__init__(arms_N, config)
        self.state["values"] = [0.0] * len(self.names)

    def shares(self):
        return softmax(self.state["values"], self.config.sampler_temperature)

    def update(self, groups):
        rate, values = self.config.sampler_rate, self.state["values"]
        for arm, gain in self.by_arm(groups, lambda group: group.mean_gain(self.config)).items():
            values[arm] = (1 - rate) * values[arm] + rate * gain


class DUMP(Uniform):
    """Upper confidence bounds over arms: what an arm teaches, plus a bonus for having been tried little.

    U = mean|A| over its last `dump_window` completions + sqrt(2 ln(N + 1) / (n + 1)), n the completions ever drawn
    from it and N from all; chance softmax(U / temperature). Source: DUMP 2504.09710 section 3.2 and its code (which
    counts completions, not groups, so the bonus is gone after some twenty steps).
    """

    def __init__(self, arms_N, config):
        super().__init__(arms_N, config)
        self.state |= {"gains": [[] for _ in self.names], "counts": [0] * len(self.names)}

    def bonus(self):
        total = sum(self.state["counts"])
        return [math.sqrt(2 * math.log(total + 1) / (count + 1)) for count in self.state["counts"]]

    def shares(self):
        means = [sum(gain * n for gain, n in gains) / max(1, sum(n for _, n in gains)) for gains in self.state["gains"]]
        return softmax([mean + bonus for mean, bonus in zip(means, self.bonus())], self.config.sampler_temperature)

    def update(self, groups):
        for group in groups:
            arm, n = self.arm_of[group.problem], len(group.rows)
            gains = self.state["gains"][arm]
            gains.append([group.mean_gain(self.config), n])
            while len(gains) > 1 and sum(n for _, n in gains[1:]) >= self.config.dump_window:
                gains.pop(0)
            self.state["counts"][arm] += n


class DomainAware(Uniform):
    """RuleReasoner's sampling: the arms that fall most short of full reward get the most prompts, in exact quotas.

    mean <- (1 - rate) mean + rate reward of the step; weight softmax((1 - mean) / temperature). An arm not seen
    yet counts as reward 0; one whose quota is 0 keeps its last mean and can come back. The authors' code averages
    a buffer in another way than their equation; the equation stands here. Source: RuleReasoner 2506.08672 section 3.2.
    """

    def __init__(self, arms_N, config):
        super().__init__(arms_N, config)
        self.state["rewards"] = [None] * len(self.names)

    def shares(self):
        return softmax([1 - (mean or 0.0) for mean in self.state["rewards"]], self.config.sampler_temperature)

    def pick(self, pace, n_rows):
        return self.from_arms(quotas(self.shares(), n_rows // pace.generations), pace)

    def update(self, groups):
        rate, rewards = self.config.sampler_rate, self.state["rewards"]
        for arm, reward in self.by_arm(groups, Group.success).items():
            rewards[arm] = reward if rewards[arm] is None else (1 - rate) * rewards[arm] + rate * reward


class ADCL(Uniform):
    """Adaptive difficulty: easy to hard in `adcl_chunks` parts, each measured and sorted anew before its turn.

    What is sampled to measure counts as rollouts and does not train. Which chunk a problem is in is settled once, by
    the model that the run began with; after the last chunk it starts over. Source: 2505.08364 section 3.1.
    """

    def __init__(self, arms_N, config):
        super().__init__(arms_N, config)
        self.state |= {"chunks": [], "turn": 0, "left": [], "measuring": []}

    def pick(self, pace, n_rows):
        state, n = self.state, n_rows // pace.generations
        if state["left"]:
            found, state["left"], state["measuring"] = state["left"][:n], state["left"][n:], []
            return [(i, pace.generations) for i in found]
        if state["chunks"]:  # one is at its end
            state["turn"] += 1
            state["measuring"] = state["chunks"][state["turn"] % len(state["chunks"])]
        else:
            state["measuring"] = list(range(len(self.arm_of)))
        return [(i, self.config.adcl_samples) for i in state["measuring"]]

    def update(self, groups):
        state = self.state
        if not state["measuring"]:
            return
        ease = {group.problem: group.success() for group in groups}
        state["left"] = sorted(state["measuring"], key=lambda i: (-ease[i], i))
        if not state["chunks"]:
            parts = np.array_split(state["left"], min(self.config.adcl_chunks, len(state["left"])))
            state["chunks"] = [part.tolist() for part in parts]
            state["left"] = state["chunks"][0]

    def keep(self, group):
        return not self.state["measuring"]


class Knapsack(Uniform):
    """Problems in turn, but the step's completions go where one more of them is worth most.

    A problem's success rate is that of its last 16 completions, once it has 8; before that it gets G.
    `knapsack_reweight` keeps what the paper does implicitly, that a problem with more completions weighs more in the
    loss. Source: Knapsack RL 2509.25849 section 3; see `knapsack_allocation`.
    """

    def __init__(self, arms_N, config):
        super().__init__(arms_N, config)
        self.state["verdicts"] = {}

    def pick(self, pace, n_rows):
        problems = [i for i, _ in super().pick(pace, n_rows)]
        memory = [self.state["verdicts"].get(str(i), []) for i in problems]
        rates = [sum(found) / len(found) if len(found) >= 8 else None for found in memory]
        return list(zip(problems, knapsack_allocation(rates, n_rows, pace.generations, *self.config.knapsack_range)))

    def update(self, groups):
        for group in groups:
            found = self.state["verdicts"].get(str(group.problem), []) + [int(row.right) for row in group.rows]
            self.state["verdicts"][str(group.problem)] = found[-16:]


class Dynamic(Uniform):
    """DAPO's dynamic sampling: groups all right or all wrong are thrown away and others sampled in their place.

    Where `max_rounds` do not fill the step it trains on what there is, with the weights it would have in a full one
    (verl stops the run). Source: DAPO 2503.14476 section 3.2, by verdict as verl's filter on `acc`.
    """

    def __init__(self, arms_N, config):
        super().__init__(arms_N, config)
        self.rounds = config.max_rounds

    def keep(self, group):
        return 0 < group.success() < 1


class Yoked(Uniform):
    """A control: each step deals its completions out to the arms in the shares in which another run did at that step.

    So it has that run's schedule without its adaptivity.
    """

    def __init__(self, arms_N, config):
        super().__init__(arms_N, config)
        path = Path(config.sampler.partition(":")[2]) / "metrics.jsonl"
        if not path.is_file():
            raise InputError(f"--sampler {config.sampler}: {path} is not there")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.replayed = [line for line in lines if line["step"]]  # step 0 is an evaluation
        columns = {name for line in self.replayed for name in line if name.startswith("sampler/rollouts/")}
        mine = {f"sampler/rollouts/{name}" for name in self.names}
        if columns != mine or len(self.replayed) < config.max_steps:
            raise InputError(f"--sampler {config.sampler}: that run has {len(self.replayed)} steps and arms "
                             f"{sorted(columns)}, this one {config.max_steps} and {sorted(mine)}")

    def pick(self, pace, n_rows):
        counts = [self.replayed[pace.step][f"sampler/rollouts/{name}"] for name in self.names]
        return self.from_arms(quotas([count / sum(counts) for count in counts], n_rows // pace.generations), pace)


def in_numbers(name):
    """What arms are sorted by, so that level 10 comes after level 9.

    >>> sorted(["10,add", "9,sub", "9,add"], key=in_numbers)
    ['9,add', '9,sub', '10,add']
    """
    return [(int(part) if part.isdecimal() else 0, part) for part in name.split(",")]


def in_order(n, first, count, *seed):
    """Places first, first + 1, ... of an endless walk through range(n), shuffled anew for each pass: list of int."""
    found = []
    while len(found) < count:
        epoch, offset = divmod(first + len(found), n)
        order = np.random.default_rng([*seed, epoch]).permutation(n)
        found += order[offset : offset + count - len(found)].tolist()
    return found


def softmax(values, temperature):
    """exp(value / temperature) / their sum: list of float."""
    return torch.tensor(values, dtype=torch.float64).div(temperature).softmax(0).tolist()


def quotas(shares, count):
    """`count` places dealt out by `shares`, floors first, the rest one by one to the largest shares: list of arms.

    >>> quotas([0.5, 0.3, 0.2], 4)
    [0, 0, 0, 1]
    """
    floors = [int(count * share + 1e-9) for share in shares]
    largest = sorted(range(len(shares)), key=lambda arm: -shares[arm])
    for arm in largest[: count - sum(floors)]:
        floors[arm] += 1
    return [arm for arm, n in enumerate(floors) for _ in range(n)]


def knapsack_allocation(rates_P, total, usual, low, high):
    """How many completions each prompt gets, at most `total` in all: list of int.

    The worth of n completions at success rate p is (1 - p^n - (1-p)^n) p (1-p)^2, the chance of a gradient times what
    it gains. It is concave in n, so giving out one completion after another where it adds most is exactly optimal.
    Every prompt gets `low`, one of unknown rate (None) `usual`, a mixed one at most `high`. What the mixed ones do not
    need for a group that is mixed with chance about 0.9 goes to prompts never answered right, else to all (beyond
    `high`).
    Source: Knapsack RL 2509.25849 section 3; the order and the constants are its code's.
    """
    counts = [usual if rate is None else low for rate in rates_P]
    mixed = [i for i, rate in enumerate(rates_P) if rate and rate < 1]
    enough = [min(high, math.ceil(math.log(0.1) / math.log(max(rates_P[i], 1 - rates_P[i])))) for i in mixed]
    left = total - sum(counts)
    spare = max(0, left - sum(max(0, n - low) for n in enough))
    while left > spare and (open_ := [i for i in mixed if counts[i] < high]):
        best = max(open_, key=lambda i: added_worth(counts[i], rates_P[i]))  # of equals the first
        counts[best], left = counts[best] + 1, left - 1
    rest = [i for i, rate in enumerate(rates_P) if rate == 0] or range(len(rates_P))
    for place in range(max(0, left)):
        counts[rest[place % len(rest)]] += 1
    return counts


def added_worth(n, p):
    """What completion n + 1 adds to the worth of a prompt with success rate p."""
    return (p**n * (1 - p) + (1 - p) ** n * p) * p * (1 - p) ** 2


SAMPLERS = {"uniform": Uniform, "horizon": Horizon, "sec": SEC, "dump": DUMP, "domain_aware": DomainAware, "adcl": ADCL,
            "knapsack": Knapsack, "dynamic": Dynamic, "yoked": Yoked}


def make_sampler(problems, config):
    """The sampler of --sampler over `problems`, whose arms are named by --arm. InputError where there is but one."""
    arms = [{"level": f"{p.level}", "domain": p.domain, "level,domain": f"{p.level},{p.domain}",
             "steps": f"{min(9, len(cut_solution(p.solution)))}"}[config.arm] for p in problems]
    kind = config.sampler.partition(":")[0]
    if kind in ("horizon", "sec", "dump", "domain_aware", "yoked") and len(set(arms)) < 2:
        raise InputError(f"--arm {config.arm}: all problems of --dataset_name {config.dataset_name} are alike in it, "
                         f"so --sampler {config.sampler} has nothing to choose")
    return SAMPLERS[kind](arms, config)


def warn_of_short_run(config, n_problems, n_rows):
    """Says where --max_steps are too few for the sampler to do what its name says."""
    rollouts = n_rows * math.ceil(config.max_steps / config.num_iterations)
    if config.sampler == "knapsack" and rollouts // config.num_generations <= n_problems:
        print(f"--sampler knapsack: no problem comes twice in this run, so it samples as uniform does; a smaller "
              f"--n_train than {n_problems} is meant", flush=True)
    if config.sampler == "adcl" and (measured := config.adcl_samples * n_problems) > rollouts:
        print(f"--sampler adcl: measuring alone takes {measured} completions, training {rollouts}; a smaller --n_train "
              f"than {n_problems} is meant", flush=True)


# --- hints ---


ANSWER_MARK = re.compile(r"\\boxed\s*\{|####|<answer>|#[^\n]*\s*\Z")  # a "# Step 1" before the end is a headline


def cut_solution(solution):
    """A worked solution as its steps (lines, or parts ended by a semicolon), without the marked answer: list of str.

    >>> cut_solution("37+5=42;42-8=34#34")
    ['37+5=42;', '42-8=34']
    """
    worked = ANSWER_MARK.split(solution or "")[0]
    return [step for step in re.findall(r"[^\n;]+[\n;]*", worked) if step.strip()]


def gives_away(text, answer):
    """Does the text contain the answer as a number or word of its own, or the same number written 1,000 or 12.00?"""
    plain_text, plain_answer = (re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", part) for part in (text, answer))
    return bool(re.search(rf"(?<![\w.]){re.escape(plain_answer)}(?!\w|\.\d*[1-9])", f"{text} {plain_text}"))


def hint_levels(problem):
    """The help there is for a problem, from the least to the most, none of which gives the answer away: list of str.

    Tiers go from abstract to concrete, a later one replaces an earlier one; within a tier chunks add up. They are the
    problem's own hints, or where it has none its solution cut into steps. Source: Scaf-GRPO 2510.19807 section 3.2.
    """
    tiers = [(tier,) if isinstance(tier, str) else tier for tier in problem.hints] or [cut_solution(problem.solution)]
    levels = ["".join(chunk if chunk[-1] in "\n;" else f"{chunk} " for chunk in tier[:n]).strip()
              for tier in tiers for n in range(1, len(tier) + 1)]
    return [level for level in levels if not gives_away(level, problem.answer)]


def help_of(problem, config):
    """What --scaffold shows for a problem, least first: hints that do not tell the answer, or the whole solution."""
    if config.scaffold == "egsr":  # Source: 2505.08364 section 3.2, expert-guided self-reformulation
        return [problem.solution] if problem.solution else []
    return hint_levels(problem)


def with_help(problem, text, config):
    """The problem with a hint in its prompt, by --hint_template."""
    return replace(problem, prompt=fill_template(config.hint_template.replace("{hint}", text), problem.prompt))


def add_hints(groups, actor, problems, pace, config):
    """For groups without a right completion, finds the least help with which the policy succeeds: sums to log.

    One failed row gives its place to the success, in place. `hinted` trains it under the prompt that held the help
    (Scaf-GRPO, whose ratio is conditioned so on both sides), `plain` under the bare prompt (egsr's point). The control
    `negatives` gives it no weight, so only the failures beside it, now below average, are left.
    """
    asked, found_at, too_long = [], [], 0
    for group in groups:
        if group.success() == 0:
            problem = problems[group.problem]
            helped = [with_help(problem, text, config) for text in help_of(problem, config)]
            asked.append((group, [(level, part) for level, part in enumerate(helped, 1) if actor.fits(part)]))
            too_long += len(helped) - len(asked[-1][1])
    for turn in range(max((len(helped) for _, helped in asked), default=0)):
        stuck = [(group, *helped[turn]) for group, helped in asked if group.success() == 0 and len(helped) > turn]
        tries = actor.sample([part for _, _, part in stuck], [config.scaffold_samples] * len(stuck), pace)
        for (group, level, _), rows in zip(stuck, tries):
            row = next((row for row in rows if row.right), None)
            if row is None:
                continue
            if config.hint_logps == "plain":
                row.prompt = group.rows[0].prompt
                row.values["sampled"] = torch.full_like(row.values["sampled"], math.nan)  # of another prompt
            row.muted = config.scaffold == "negatives"
            group.rows[-1] = row
            found_at.append(level)
    return {"scaffold/asked": len(asked), "scaffold/solved": len(found_at), "scaffold/level": sum(found_at),
            "scaffold/too_long": too_long}


def subgoal_of(problem, place, config):
    """One of the problem's subgoals as a problem of its own: `alone`, or `given` the solution's steps before it.

    Source: DeepSeek-Prover-V2 2504.21801 section 2.2, a lemma from the theorem's hypotheses alone, or with the lemmas
    before it as premises (in the prompt, by --hint_template).
    """
    prompt, answer = problem.subgoals[place]
    part = replace(problem, prompt=fill_template(config.prompt_template, prompt), answer=answer)
    given = "".join(cut_solution(problem.solution)[:place]) if config.subgoal_form == "given" else ""
    return with_help(part, given, config) if given else part


def add_subgoals(groups, actor, problems, pace, config):
    """Groups without a right completion give their place to a group on one of their subgoals: counts to log."""
    asked, rng = [], np.random.default_rng([config.seed, pace.step, 2])
    for group in groups:
        problem = problems[group.problem]
        if group.success() == 0 and problem.subgoals:
            asked.append((group, subgoal_of(problem, int(rng.integers(len(problem.subgoals))), config)))
    fitting = [(group, part) for group, part in asked if actor.fits(part)]
    found = actor.sample([part for _, part in fitting], [len(group.rows) for group, _ in fitting], pace)
    for (group, _), rows in zip(fitting, found):
        group.rows = rows
    return {"scaffold/asked": len(asked), "scaffold/solved": sum(group.success() > 0 for group, _ in fitting),
            "scaffold/too_long": len(asked) - len(fitting)}


def demonstrate(groups, problems, tokenizer, config):
    """HPT: a group with too few right completions is replaced by its problem's solution, to be imitated: their share.

    In the unified view of the paper imitation is a policy gradient with advantage 1 and the policy itself as the old
    one, and so it is done here. A solution's mean log-likelihood weighs sft_coef / prompts of the step.
    Source: HPT 2509.04419 eq. 6-8.
    """
    failed = [group for group in groups if group.success() <= config.hpt_gate]
    for group in failed:
        problem = problems[group.problem]
        _, answer = turn(tokenizer, problem.prompt, problem.solution)
        values = {"sampled": torch.full((len(answer),), math.nan)}  # it was not
        group.rows = [Row(group.rows[0].prompt, torch.tensor(answer), values, finished=True, advantage=1.0,
                          weight=config.sft_coef / (len(groups) * len(answer)), demo=True)]
    return {"hpt/share": len(failed) / len(groups)}


# --- rollouts ---


def load_train_problems(config, error_rate=0.0):
    """The problems of --dataset_name to train on; error_rate spoils that share of the steps in `chain`'s solutions."""
    return load_problems(config.dataset_name, config.dataset_train_split, config.n_train or None, config.seed,
                         levels=config.levels, domains=config.domains, error_rate=error_rate,
                         prompt_column=config.prompt_column, answer_column=config.answer_column,
                         prompt_template=config.prompt_template)


def check_problems(problems, tokenizer, config):
    """InputError for a prompt over --max_prompt_length, or problems that lack what a scaffold or HPT needs."""
    for i, problem in enumerate(problems):
        if (length := len(encode_prompt(tokenizer, problem.prompt))) > config.max_prompt_length:
            raise InputError(f"--max_prompt_length {config.max_prompt_length}: the prompt of problem {i + 1} of "
                             f"--dataset_name {config.dataset_name} has {length} tokens")
    if config.scaffold == "subgoals" and not any(problem.subgoals for problem in problems):
        raise InputError(f"--scaffold subgoals: --dataset_name {config.dataset_name} has no subgoals (a column "
                         "`subgoals` of [prompt, answer] pairs)")
    if config.scaffold not in ("none", "subgoals") and not any(help_of(problem, config) for problem in problems):
        raise InputError(f"--scaffold {config.scaffold}: --dataset_name {config.dataset_name} has neither hints (a "
                         "column `hints`) nor worked solutions")
    if config.hpt_gate >= 0 and not all(problem.solution for problem in problems):
        raise InputError(f"--hpt_gate: a problem of --dataset_name {config.dataset_name} has no worked solution")


def turn(tokenizer, prompt, text):
    """Prompt and answer as (prompt ids, answer ids): the answer's own tokens and the token that ends a turn."""
    if tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = leading_space(tokenizer, prompt, text) + text
    answer = tokenizer(text, add_special_tokens=False).input_ids
    return encode_prompt(tokenizer, prompt), answer + [end_of_turn(tokenizer)]


def leading_space(tokenizer, messages, answer):
    """The white space that the chat template puts between its generation prompt and the answer (Mistral's does)."""
    prompt = chat_text(tokenizer, messages, add_generation_prompt=True)
    whole = chat_text(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    before = whole.rpartition(answer)[0] if answer else ""
    between = before[len(prompt) :] if before.startswith(prompt) else ""
    return between if between.isspace() else ""  # not an empty thinking block, which would teach to skip thinking


@dataclass(eq=False)
class Row:
    """One completion: what was sampled, what it is worth, and the prompt under which it is trained."""

    prompt: list  # token ids
    tokens_T: torch.Tensor  # what was sampled, stop token included
    values: dict  # [T] each: the log-probs `sampled`, `old`, `reference`, `teacher`; `entropy_weight`
    finished: bool  # by a stop token rather than by the limit
    text: str = ""
    right: bool = False  # the checker's verdict
    scores: tuple = ()  # of each reward function
    reward: float = 0.0
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the step's loss; 0: not trained
    kd_coef: float = 0.0
    muted: bool = False  # takes its place in the group, but is not trained
    demo: bool = False  # not sampled: a solution to imitate

    def numbers(self):
        """What the loss reads of it beside its tokens and their values."""
        return [self.advantage, self.weight, self.kd_coef, float(self.demo)]


@dataclass(eq=False)
class Group:
    """The completions of one problem at one step."""

    problem: int  # its index in the training set
    rows: list

    def success(self):
        """The share of completions that the checker calls right."""
        return sum(row.right for row in self.rows) / len(self.rows)

    def mean_gain(self, config):
        """Mean |advantage| of the verdicts: what the curricula take for what a group can teach."""
        verdicts_1G = torch.tensor([[float(row.right) for row in self.rows]])
        scale = "none" if config.scale_rewards == "none" else "group"
        return float(group_advantages(verdicts_1G, scale).abs().mean())


def rows_of(groups):
    """All rows of the groups, in order."""
    return [row for group in groups for row in group.rows]


def accuracy_reward(problem, row, pace, config):
    """1 if the answer is right by eval.py's checker, else 0."""
    return float(row.right)


def format_reward(problem, row, pace, config):
    """1 if the completion marks an answer (boxed, after ####, in answer tags, # in its last line), right or wrong."""
    return float(ANSWER_MARK.search(row.text) is not None and extract_answer(row.text) is not None)


def length_reward(problem, row, pace, config):
    """From 1 for an empty completion down to 0 at the limit."""
    return 1 - len(row.tokens_T) / pace.limit


def budget_reward(problem, row, pace, config):
    """From 0 for no token up to 1 at the budget, down to 0 at twice of it; with --budget_gate for right completions.

    Source: 2508.08940 section 3.
    """
    near = max(0.0, 1 - abs(len(row.tokens_T) - pace.budget) / pace.budget)
    return near if row.right or not config.budget_gate else 0.0


def format_length_reward(problem, row, pace, config):
    """A surrogate that needs no answer: format, and a length near half the limit. Source: 2505.19439 eq. 3-4."""
    halves = len(row.tokens_T) / pace.limit / 0.5
    surrogate = 1 - (1 - halves) ** 2 if halves <= 1 else 1 - 2 * (halves - 1) ** 2  # 1 at half the limit, -1 at it
    return 0.5 + surrogate if format_reward(problem, row, pace, config) else min(0.0, surrogate)


REWARDS = {"accuracy": accuracy_reward, "format": format_reward, "length": length_reward, "budget": budget_reward,
           "format_length": format_length_reward}


def soft_overlong(length, limit, soft):
    """DAPO's penalty in [-1, 0] for ending within `soft` tokens of the limit. Source: DAPO 2503.14476 eq. 13."""
    return max(-1.0, min(0.0, (limit - soft - length) / soft)) if soft else 0.0


def judge(problem, row, pace, config):
    """Fills in the row's verdict, the score of every reward function, and their weighted sum with DAPO's penalty.

    Raises RunError naming the function that returned something other than a finite number.
    """
    row.right = verify(row.text, problem.answer)
    row.scores = tuple(REWARDS[name](problem, row, pace, config) for name in config.reward_funcs)
    for name, value in zip(config.reward_funcs, row.scores):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RunError(f"reward function {name} returned {value} for the completion {row.text[:200]!r}")
    weights = config.reward_weights or [1.0] * len(row.scores)
    row.reward = sum(weight * value for weight, value in zip(weights, row.scores))
    row.reward += soft_overlong(len(row.tokens_T), pace.limit, config.soft_overlong_tokens)


def judge_all(pairs, pace, config, world):
    """`judge` for all (problem, row) pairs, shared out over the processes, in place: all hold the same verdicts.

    A checker with a deadline, or a reward function of one's own, may answer differently from one call to the next;
    processes that disagree would train on different rows and wait for each other for ever.
    """
    mine = pairs[world.rank :: world.size]
    for problem, row in mine:
        judge(problem, row, pace, config)
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, [(row.right, row.scores, row.reward) for _, row in mine])
        for rank, part in enumerate(parts):
            for (_, row), verdict in zip(pairs[rank :: world.size], part, strict=True):
                row.right, row.scores, row.reward = verdict


def sample_prompts(decoder, tokenizer, prompts_P, counts_P, limit, seeds, config, world):
    """Samples counts_P completions of each prompt, the prompts shared out over the processes: Rollouts of all rows.

    Every process returns the rows of all. Random numbers belong to (seeds, prompt, sample), so the same completions
    come out however many processes there are.
    """
    mine = range(world.rank, len(prompts_P), world.size)
    found = generate(decoder, tokenizer, [prompts_P[i] for i in mine], [counts_P[i] for i in mine], limit,
                     config.temperature, seed=seeds, batch_size=config.generation_batch_size, keys=mine)
    if world.size == 1:
        return found
    parts = [None] * world.size
    dist.all_gather_object(parts, found)
    first_P = np.cumsum([0, *counts_P])
    order_R = torch.tensor([first_P[i] + j for rank in range(world.size)
                            for i in range(rank, len(prompts_P), world.size) for j in range(counts_P[i])]).argsort()
    return Rollouts(*(torch.cat([getattr(part, name) for part in parts])[order_R]
                      for name in ("tokens_RT", "logps_RT", "lengths_R", "finished_R")))


class Actor:
    """The policy as it samples: problems in, judged rows out, and a count of what that cost since `begin`."""

    def __init__(self, decoder, tokenizer, config, world):
        self.decoder, self.tokenizer, self.config, self.world = decoder, tokenizer, config, world

    def begin(self, number):
        """The next calls belong to rollout `number` of the run."""
        self.number = number
        self.calls = self.rollouts = self.tokens = 0

    def fits(self, problem):
        """Is its prompt within --max_prompt_length? That of the data is, but not of necessity with help in it."""
        return len(encode_prompt(self.tokenizer, problem.prompt)) <= self.config.max_prompt_length

    def sample(self, problems_P, counts_P, pace):
        """counts_P completions of each problem, judged: a list of Rows a problem. All processes return the same."""
        if not problems_P:
            return []
        prompts_P = [encode_prompt(self.tokenizer, problem.prompt) for problem in problems_P]
        seeds = [self.config.seed, self.number, *([self.calls] if self.calls else [])]
        found = sample_prompts(self.decoder, self.tokenizer, prompts_P, counts_P, pace.limit, seeds, self.config,
                               self.world)
        rows_P, owners = [[] for _ in counts_P], [p for p, count in enumerate(counts_P) for _ in range(count)]
        for r, (p, text, length) in enumerate(zip(owners, found.texts(self.tokenizer), found.lengths_R.tolist())):
            tokens_T, logps_T = (x_RT[r, :length].clone() for x_RT in (found.tokens_RT, found.logps_RT))
            rows_P[p].append(Row(prompts_P[p], tokens_T, {"sampled": logps_T}, bool(found.finished_R[r]), text))
        self.calls, self.rollouts = self.calls + 1, self.rollouts + len(owners)
        self.tokens += int(found.lengths_R.sum())
        pairs = [(problem, row) for problem, rows in zip(problems_P, rows_P) for row in rows]
        judge_all(pairs, pace, self.config, self.world)
        return rows_P


def collect(sampler, actor, problems, pace, n_rows, config):
    """One step's groups, about n_rows completions: (the groups that train, all groups as sampled, numbers to log).

    The sampler learns from what was sampled before any scaffold or filter touches it.
    """
    kept, sampled, numbers, missing = [], [], {}, n_rows
    for _ in range(sampler.rounds):
        picks = sampler.pick(pace, missing)
        rows = actor.sample([problems[i] for i, _ in picks], [count for _, count in picks], pace)
        groups = [Group(i, found) for (i, _), found in zip(picks, rows)]
        sampled += [Group(group.problem, list(group.rows)) for group in groups]
        sampler.update(groups)
        if pace.helps and config.scaffold != "none" and not sampler.state.get("measuring"):
            edit = add_subgoals if config.scaffold == "subgoals" else add_hints
            for name, value in edit(groups, actor, problems, pace, config).items():
                numbers[name] = numbers.get(name, 0) + value
        groups = [group for group in groups if sampler.keep(group)]
        kept, missing = kept + groups, missing - len(rows_of(groups))
        if missing < pace.generations:
            break
    if "scaffold/level" in numbers:
        numbers["scaffold/level"] /= max(1, numbers["scaffold/solved"])
    return kept, sampled, {**numbers, **arm_numbers(sampler, sampled)}


def arm_numbers(sampler, sampled):
    """What was sampled of each arm and how it went, where there are 2 to 24 arms."""
    if not 2 <= len(sampler.names) <= 24:
        return {}
    numbers = {f"sampler/rollouts/{name}": 0 for name in sampler.names}
    for group in sampled:
        numbers[f"sampler/rollouts/{sampler.names[sampler.arm_of[group.problem]]}"] += len(group.rows)
    accuracy = sampler.by_arm(sampled, Group.success)
    return numbers | {f"sampler/accuracy/{sampler.names[arm]}": value for arm, value in accuracy.items()}


def consult(groups, policy, reference, teacher, pace, config, world):
    """Adds to the rows what stays as it is while they are trained on: log-probs of others, KL in advantages, TEA."""
    rows = rows_of(groups)
    if not rows:
        return
    if config.kl_in_reward or config.entropy_weighting == "tea":  # both need the policy's log-probs of every row,
        foreign = [row for row in rows if row.values["sampled"].isnan().any()]  # also of those it did not sample so
        add_logps(policy, foreign, "sampled", config, world)
    if reference is not None:
        add_logps(reference, rows, "reference", config, world)
    if teacher is not None and pace.kd_coef:  # --kd_schedule switch has an end
        add_logps(teacher, rows, "teacher", config, world)
    for group in groups:
        stuck = group.success() == 0
        for row in group.rows:
            acts = {"all": True, "wrong": not row.right, "stuck": stuck}[config.kd_rows]
            row.kd_coef = pace.kd_coef * acts * (not row.demo)
        if config.kl_in_reward:  # T1 2501.11651: centred over the group, so a KL that all share moves nothing
            kl = [float((row.values["sampled"] - row.values["reference"]).sum()) for row in group.rows]
            for row, value in zip(group.rows, kl):
                row.advantage -= config.beta * (value - sum(kl) / len(kl)) * baseline_factor(len(kl), config)
    if config.entropy_weighting == "tea":
        logps_RT = nn.utils.rnn.pad_sequence([row.values["sampled"] for row in rows], batch_first=True)
        mask_RT = torch.arange(logps_RT.shape[1]) < torch.tensor([len(row.tokens_T) for row in rows])[:, None]
        weights_RT = tea_weights(torch.tensor([row.advantage for row in rows]), logps_RT, mask_RT)
        for row, weights_T in zip(rows, weights_RT):
            row.values["entropy_weight"] = weights_T[: len(row.tokens_T)].clone()


def describe(groups, config):
    """The numbers logged about what one step sampled; TRL's names. README.md gives each one's formula."""
    rows = rows_of(groups)
    rewards = [[row.reward for row in group.rows] for group in groups]
    lengths_R = torch.tensor([float(len(row.tokens_T)) for row in rows])
    numbers = {"reward": np.mean([row.reward for row in rows]),
               "sampled_accuracy": np.mean([row.right for row in rows]),
               "reward_std": np.mean([torch.tensor(group).std(correction=min(1, len(group) - 1)) for group in rewards]),
               "frac_reward_zero_std": np.mean([max(values) - min(values) < 1e-6 for values in rewards]),
               "frac_all_wrong": np.mean([group.success() == 0 for group in groups]),
               "frac_all_right": np.mean([group.success() == 1 for group in groups]),
               "completions/mean_length": lengths_R.mean(), "completions/min_length": lengths_R.min(),
               "completions/max_length": lengths_R.max(),
               "completions/clipped_ratio": np.mean([not row.finished for row in rows]),
               "completions/parse_fail": np.mean([extract_answer(row.text) is None for row in rows])}
    for i, name in enumerate(config.reward_funcs):
        scores_R = torch.tensor([float(row.scores[i]) for row in rows])
        numbers[f"rewards/{name}/mean"], numbers[f"rewards/{name}/std"] = scores_R.mean(), scores_R.std()
    return {name: float(value) for name, value in numbers.items()}


def warn_of_silence(numbers, update, step, warned, world):
    """One line, once a run, where a step can teach nothing; returns what has been warned of."""
    faults = {"all completions were cut off by --max_completion_length": numbers["completions/clipped_ratio"] == 1,
              "no completion is above or below its group's mean: the gradient is zero": not update.rows}
    for fault, present in faults.items():
        if present and fault not in warned and world.rank == 0:
            print(f"warning, step {step}: {fault}", file=sys.stderr)
            warned = warned | {fault}
    return warned


def write_samples(log, step, group, problems):
    """The first two completions of a step go to samples.jsonl."""
    problem = problems[group.problem]
    for row in group.rows[:2]:
        log.add("samples", {"step": step, "prompt": problem.prompt, "completion": row.text, "answer": problem.answer,
                            "reward": row.reward})


# --- model ---


class Example(NamedTuple):
    """One sequence to train on."""

    ids: list  # token ids
    trained: list  # bool for each id: is it trained on?


def micro_batches(lengths, max_rows, max_tokens, world):
    """Splits a step's rows into forwards for this process: list of lists of indices into `lengths`.

    Rows of like length stand together, longest first, at most max_rows rows and max_tokens padded tokens a forward
    (one row at the least). Every process gets the same number of forwards; where rows run out, an empty one.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts, start = [], 0
    while start < len(order):
        rows = max(1, min(max_rows, max_tokens // lengths[order[start]] if max_tokens else max_rows))
        parts.append(order[start : start + rows * world.size][world.rank :: world.size])
        start += rows * world.size
    return parts


class Batch(NamedTuple):
    """The tensors of one forward."""

    ids_BT: torch.Tensor  # token ids, right-padded with 0: nothing before a pad can see it, so no mask is needed
    mask_BS: torch.Tensor  # bool: is the token at position s + 1 trained?
    where_N: torch.Tensor  # the true places of mask_BS, flattened
    rows: list  # the index of each row in its step


def collate(examples, rows, device):
    """One forward's tensors from its rows (indices into `examples`); no row at all gives one that trains nothing."""
    chosen = [examples[i] for i in rows] or [Example([0, 0], [False, False])]
    width = max(len(example.ids) for example in chosen)
    ids_BT = torch.tensor([list(e.ids) + [0] * (width - len(e.ids)) for e in chosen])
    mask_BS = torch.tensor([list(e.trained[1:]) + [False] * (width - len(e.ids)) for e in chosen], dtype=torch.bool)
    where_N = mask_BS.flatten().nonzero()[:, 0]  # found on the CPU: on the GPU it would wait for all that is queued
    return Batch(ids_BT.to(device), mask_BS.to(device), where_N.to(device), rows)


def batches_of(rows, config, world):
    """This process's forwards for the rows, each its prompt and then its completion, which is what is trained."""
    examples = [Example(row.prompt + row.tokens_T.tolist(), [False] * len(row.prompt) + [True] * len(row.tokens_T))
                for row in rows]
    parts = micro_batches([len(example.ids) for example in examples], config.per_device_train_batch_size,
                          config.micro_batch_tokens, world)
    return [collate(examples, part, world.device) for part in parts]


class Policy(nn.Module):
    """A causal language model whose forward ends in log-probs, so that FSDP sees every parameter it uses."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, temperature=1.0, entropy=False):
        """Log-probs of the trained tokens, and entropies in nats where asked for: (logps_BS, entropy_BS or None).

        float32, 0 at untrained places, which never meet the output head. temperature divides the logits.
        """
        hidden_BSD = self.model.base_model(input_ids=batch.ids_BT[:, :-1], use_cache=False).last_hidden_state
        hidden_ND = hidden_BSD.flatten(0, 1)[batch.where_N]
        targets_N = batch.ids_BT[:, 1:].flatten()[batch.where_N]
        weight_VD = self.model.get_output_embeddings().weight
        found = linear_logps(hidden_ND, weight_VD, targets_N, temperature, entropy=entropy, softcap=softcap(self.model))
        B, S = batch.mask_BS.shape
        return tuple(x_N if x_N is None else x_N.new_zeros(B * S).index_copy(0, batch.where_N, x_N).view(B, S)
                     for x_N in found)


def make_frozen(flag_name, needed, tokenizer, config):
    """The model that this flag names, frozen and whole, or None; InputError where its tokens are not the policy's."""
    if not needed:
        return None
    name = getattr(config, flag_name)
    model, theirs = load_model(name, chat_template=config.chat_template)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--{flag_name} {name}: its tokenizer is not the policy's, and a token's log-prob means "
                         "nothing under it")
    return Policy(model.eval().requires_grad_(False))


def check_reference(reference, resume, config):
    """SHA-256 of the reference's weights, whole as they were loaded; None without a reference.

    InputError where --model_name_or_path no longer holds the weights that a continued run's KL began with.
    """
    if reference is None:
        return None
    digest = hashlib.sha256()
    for parameter in reference.parameters():
        digest.update(parameter.view(torch.uint8).numpy())
    if resume and json.loads((resume / "state.json").read_text())["reference"] != digest.hexdigest():
        raise InputError(f"--model_name_or_path {config.model_name_or_path}: not the weights this run began with, and "
                         "--beta is measured from them")
    return digest.hexdigest()


def anchor_tensors(reference, config):
    """The weights of a reference that --ref_model_mixup_alpha moves, by name: a checkpoint holds them."""
    if not config.ref_model_mixup_alpha:
        return {}
    return {f"anchor.{name}": weight.detach() for name, weight in parameters_of(reference).items()}


@torch.no_grad()
def move_anchor(reference, policy, step, config):
    """Mixes --ref_model_mixup_alpha of the policy into the reference: T1's dynamic anchor, TRL's sync_ref_model."""
    if config.ref_model_mixup_alpha and (step + 1) % config.ref_model_sync_steps == 0:
        weights = parameters_of(policy)
        for name, anchor in parameters_of(reference).items():  # each process mixes its parts
            anchor.lerp_(weights[name], config.ref_model_mixup_alpha)


@torch.no_grad()
def add_logps(model, rows, name, config, world):
    """Sets values[name] of every row to the log-probs that `model` gives its tokens; the same on all processes."""
    for row in rows:
        row.values.pop(name, None)
    for batch in batches_of(rows, config, world):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
            logps_BS, _ = model(batch, config.temperature)
        hand_out(logps_BS.flatten()[batch.where_N], [rows[i] for i in batch.rows], name)
    exchange(rows, name, world)


def hand_out(values_N, rows, name):
    """Sets values[name] of every row, in place, from the values of all their tokens, one row after another."""
    for row, values_T in zip(rows, values_N.split([len(row.tokens_T) for row in rows])):
        row.values[name] = values_T


def exchange(rows, name, world):
    """Brings values[name], set on one process for each row, to all processes and to the CPU."""
    if rows:
        values_N = torch.cat([row.values[name] if name in row.values else
                              torch.zeros(len(row.tokens_T), device=world.device) for row in rows])
        if world.size > 1:
            dist.all_reduce(values_N)
        hand_out(values_N.cpu(), rows, name)


# --- main ---


def check_config(config):
    """Raises InputError for flags that cannot be meant together; fills in what depends on others."""
    # what 0 and auto stand for
    config.epsilon = config.epsilon or CLIPS[config.loss_type][0]
    config.epsilon_high = config.epsilon_high or CLIPS[config.loss_type][1]
    if config.scale_rewards == "auto":
        config.scale_rewards = "none" if config.loss_type == "dr_grpo" else "group"
    if config.hint_logps == "auto":
        config.hint_logps = "plain" if config.scaffold == "egsr" else "hinted"
    usual = {"sec": 0.4, "dump": 0.1, "domain_aware": 0.3}
    config.sampler_temperature = config.sampler_temperature or usual.get(config.sampler, 1.0)

    # sampling and the curriculum
    if config.temperature == 0:
        raise InputError("--temperature 0: must be above 0 (at 0 all completions are equal)")
    limits = [config.max_completion_length]
    for stage in config.stages:
        fits = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", stage)
        if not fits or int(fits[1]) > config.max_completion_length or int(fits[2]) < 2:
            raise InputError(f"--stages {stage}: must be a limit (up to --max_completion_length) x a group size (2 or "
                             "more): 64x8")
        limits.append(int(fits[1]))
    known = config.sampler in SAMPLERS and config.sampler != "yoked"
    if not known and not config.sampler.startswith("yoked:"):
        raise InputError(f"--sampler {config.sampler}: must be one of {', '.join(SAMPLERS)}:RUN")
    if config.sampler == "knapsack" and config.stages:
        raise InputError("--sampler knapsack: not with --stages, both choose the group size")
    low, high = config.knapsack_range if len(config.knapsack_range) == 2 else (math.inf, 0)
    if low > config.num_generations or (config.sampler == "knapsack" and high < config.num_generations):
        raise InputError(f"--knapsack_range {config.knapsack_range}: must be two numbers around --num_generations")

    # hints
    if "{prompt}" not in config.hint_template or "{hint}" not in config.hint_template:
        raise InputError(f"--hint_template {config.hint_template!r}: must contain {{prompt}} and {{hint}}")
    if config.scaffold == "subgoals" and config.hint_logps == "plain":
        raise InputError("--scaffold subgoals: not with --hint_logps plain")
    if config.hpt_gate >= 0 and config.scaffold != "none":
        raise InputError("--hpt_gate: not with --scaffold, both act on prompts answered wrong")
    if config.hpt_gate >= 0 and config.sampler == "dynamic":
        raise InputError("--hpt_gate: not with --sampler dynamic, which drops those prompts")

    # rewards
    n_weights, n_functions = len(config.reward_weights), len(config.reward_funcs)
    if n_weights and n_weights != n_functions:
        raise InputError(f"--reward_weights: {n_weights} weights for {n_functions} functions")
    if config.length_budget and len(config.length_budget) != 2:
        raise InputError(f"--length_budget {config.length_budget}: must be two numbers of tokens, first and last")
    if config.length_budget and "budget" not in config.reward_funcs:
        raise InputError("--length_budget needs budget among --reward_funcs")
    if config.soft_overlong_tokens >= min(limits):
        raise InputError(f"--soft_overlong_tokens {config.soft_overlong_tokens}: must be below the shortest limit, "
                         f"{min(limits)} tokens")

    # other models, and entropy
    if config.kl_in_reward and not config.beta:
        raise InputError("--kl_in_reward needs --beta")
    if config.ref_model_mixup_alpha and not config.beta:
        raise InputError("--ref_model_mixup_alpha needs --beta")
    if config.kd_coef and not config.teacher_model_name_or_path:
        raise InputError("--kd_coef needs --teacher_model_name_or_path")
    if config.teacher_model_name_or_path and not config.kd_coef:
        raise InputError("--teacher_model_name_or_path needs --kd_coef")
    if config.entropy_weighting == "tea" and not config.entropy_coef:
        raise InputError("--entropy_weighting tea needs --entropy_coef")


def check_groups(n_rows, config):
    """InputError where the groups of --num_generations or --stages do not fill the rows of a step."""
    sizes = {f"--num_generations {config.num_generations}": config.num_generations}
    if config.stages:
        sizes = {f"--stages {stage}": int(stage.partition("x")[2]) for stage in config.stages}
    for named, size in sizes.items():
        if n_rows % size:
            raise InputError(f"{named}: the group size must divide the {n_rows} rows of a step "
                             "(per_device_train_batch_size x gradient_accumulation_steps x processes)")


SHOWN = ("reward", "eval/accuracy", "scaffold/asked", "scaffold/solved", "hpt/share", "kd/teacher_gap", "kl", "entropy",
         "clip_ratio", "frac_reward_zero_std", "completions/mean_length", "grad_norm")  # on the screen


def main(config):
    check_config(config)
    world = start(config)

    # what was asked for, and the checkpoint to go on from
    problems, eval_problems = load_train_problems(config), load_eval_problems(config)
    args, resume = on_rank_0(lambda: open_run(config, problems, world), world)
    if args["finished"]:
        return
    n_rows = args["rows_per_step"]
    check_groups(n_rows, config)
    model, tokenizer = load_model(str(resume or config.model_name_or_path), chat_template=config.chat_template)
    check_problems(problems, tokenizer, config)
    config.learning_rate = config.learning_rate or (5e-5 if model.num_parameters() < 10_000_000 else 1e-6)

    # the curriculum, and the models that the policy is held against
    sampler = make_sampler(problems, config)
    warn_of_short_run(config, len(problems), n_rows)
    reference = make_frozen("model_name_or_path", config.beta, tokenizer, config)
    teacher = make_frozen("teacher_model_name_or_path", config.kd_coef, tokenizer, config)
    state = {"step": 0, "bad_steps": 0, "rollouts": 0, "num_tokens": 0, "sampler": sampler.state,
             "reference": check_reference(reference, resume, config)}
    run, log, stop = Path(config.output_dir), Log(args, resume, model, config, world), stop_signals()

    # the policy that learns, and a copy of it that samples
    for frozen in (reference, teacher):
        if frozen is not None:
            shard(frozen, config, world)
    decoder = make_decoder(model, config, world)
    policy = shard(Policy(model.train()), config, world)
    optimizer = make_optimizer(policy, config)
    if resume:
        state = load_checkpoint(resume, moments(policy, optimizer) | anchor_tensors(reference, config), world)
        sampler.state = state["sampler"]
    actor, warned = Actor(decoder, tokenizer, config, world), frozenset()
    if eval_problems and config.eval_on_start and state["step"] == 0:
        refresh(decoder, policy)
        log.step(0, eval_numbers(decoder, tokenizer, eval_problems, 0, log, config), SHOWN)

    while state["step"] < config.max_steps:
        # sample completions of the prompts that the curriculum picks, from the policy as it is now, and judge them
        began, first = time.perf_counter(), state["step"]
        refresh(decoder, policy)
        actor.begin(first // config.num_iterations)
        pace = pace_of(first, config)
        groups, sampled, about = collect(sampler, actor, problems, pace, n_rows, config)

        # what each is worth: its advantage over its group, and its log-probs under other models
        credit(groups, pace, n_rows, config)
        if config.hpt_gate >= 0:
            about |= demonstrate(groups, problems, tokenizer, config)
        consult(groups, policy, reference, teacher, pace, config, world)

        # the rows that can move a weight, as forwards of like length
        update = Update(rows_of(groups), config)
        batches = batches_of(update.rows, config, world)

        # what there is to say about these rollouts
        state["rollouts"] += actor.rollouts
        state["num_tokens"] += actor.tokens
        about = {**describe(sampled, config), **about, "rollouts": state["rollouts"],
                 "num_tokens": state["num_tokens"]}
        write_samples(log, first + 1, sampled[0], problems)
        warned = warn_of_silence(about, update, first + 1, warned, world)

        for iteration in range(min(config.num_iterations, config.max_steps - first)):
            # one optimizer step on these rollouts
            numbers, taken = train_step(policy, optimizer, batches, update.loss_of, state["step"], config, world)
            if taken:
                move_anchor(reference, policy, state["step"], config)
            log.count(state, taken, [group.problem for group in groups])

            # evaluate and log at any step
            last, seconds = state["step"] == config.max_steps, time.perf_counter() - began
            if eval_problems and (last or state["step"] % config.eval_steps == 0):
                refresh(decoder, policy)
                numbers |= eval_numbers(decoder, tokenizer, eval_problems, state["step"], log, config)
            n_tokens = update.n_tokens if iteration else actor.tokens
            log.step(state["step"], about | numbers, SHOWN, n_tokens, seconds)
            began = time.perf_counter()

        # save, now that the rollouts are used up, so that a checkpoint need not hold them
        [stopping] = total([len(stop)], world)
        due = config.save_steps and state["step"] // config.save_steps > first // config.save_steps
        if last or stopping or due:
            tensors = moments(policy, optimizer) | anchor_tensors(reference, config)
            save_checkpoint(run, state, policy, tokenizer, tensors, world)
        if stopping and not last:
            leave(run, state, stop)
    finish_run(run, policy, tokenizer, world)


# --- frame: the same text in all five scripts ---


class World(NamedTuple):
    """This process among all that train together."""

    rank: int
    size: int
    device: torch.device


def start(config):
    """Joins the processes that torchrun started, or stands alone: World. Only the first process prints to stdout."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World(0, 1, device)
    dist.init_process_group(timeout=timedelta(seconds=config.ddp_timeout))  # NCCL on GPUs, gloo on CPUs
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return World(dist.get_rank(), dist.get_world_size(), device)


def total(values, world):
    """Numbers or scalar tensors, each summed over all processes: list of float. All wait for each other here."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=world.device) for value in values])
    if world.size > 1:
        dist.all_reduce(values)
    return values.tolist()


def on_rank_0(function, world):
    """What function() returns on the first process, or the error that it raises there, on all of them."""
    found, error = None, None
    if world.rank == 0:
        try:
            found = function()
        except (InputError, OSError, SafetensorError) as raised:
            error = raised if isinstance(raised, InputError) else OSError(str(raised))
    if world.size > 1:
        dist.broadcast_object_list(outcome := [found, error])
        found, error = outcome
    if error:
        raise error
    return found


def shard(policy, config, world):
    """The policy on its device. Of several processes each holds a part of every weight (FSDP2).

    A process gathers a layer just while it needs it; where float32 weights take at most a quarter of its memory, it
    keeps them from the forward to the backward, and its gradients from one micro-batch to the next.
    """
    policy = policy.to(world.device)
    if config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if world.size > 1:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.size
        if world.device.type == "cuda":
            memory = torch.cuda.get_device_properties(world.device).total_memory
        policy.fits = 4 * sum(weight.numel() for weight in policy.parameters()) <= memory / 4
        for module in [*getattr(policy.model.base_model, "layers", ()), policy]:
            fully_shard(module, reshard_after_forward=not policy.fits)
    return policy


def parameters_of(policy):
    """The policy's parameters by name; of several processes each has its part of them."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without a backward the weights are still gathered
    return dict(policy.named_parameters())


def whole(tensor):
    """A tensor put together from the parts of all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_decoder(model, config, world):
    """A copy of the model to sample from, in bfloat16 where training computes in it; `refresh` brings it up to date."""
    decoder = copy.deepcopy(model).requires_grad_(False).eval().to(world.device)
    for weight in decoder.parameters():  # not the buffers: rotary frequencies stay float32, as from_pretrained has them
        weight.data = weight.data.to(torch.bfloat16 if config.bf16 else torch.float32)
    return decoder


@torch.no_grad()
def refresh(decoder, policy):
    """Copies the policy's weights and buffers into the decoder. RunError where one is not finite, on all processes."""
    parameters_of(policy)
    sources = [*policy.model.parameters(), *policy.model.buffers()]
    for target, source in zip([*decoder.parameters(), *decoder.buffers()], sources, strict=True):
        target.copy_(whole(source))
    check_finite(decoder.parameters())


def check_finite(weights):
    """Raises RunError where a weight is not finite: such a policy is neither sampled from nor saved."""
    if not sum(weight.float().sum() for weight in weights).isfinite():  # finite only if every term is
        raise RunError("a weight of the policy is not finite; checkpoints are older than that")


def make_optimizer(policy, config):
    """AdamW; decay on matrices only. Its learning rate is set at each step."""
    matrices = [p for p in policy.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in policy.parameters() if p.requires_grad and p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=config.learning_rate,
                             weight_decay=config.weight_decay, fused=True)


def learning_rate(step, config):
    """Learning rate of optimizer step `step` (from 0): linear warm-up to the peak, then constant or down towards 0.

    --warmup_steps below 1 is a share of all steps, as transformers reads it. The first step already moves
    (transformers' own schedules spend it at rate 0).
    """
    share = config.warmup_steps < 1
    rising = math.ceil(config.warmup_steps * config.max_steps) if share else int(config.warmup_steps)
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, config.max_steps - rising)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * decay[config.lr_scheduler_type]


def train_step(policy, optimizer, batches, loss_of, step, config, world):
    """One optimizer step from this process's micro-batches: (what loss_of counted, whether the step was taken).

    loss_of(policy, batch) returns a loss already divided by what the whole step holds over all processes, and a dict
    of numbers; both are added up over micro-batches and processes. Where the loss or the gradient's norm is not
    finite, nothing moves: neither the weights nor the optimizer.
    """
    torch.manual_seed(hash((config.seed, step, world.rank)))  # dropout, where a model has it
    sums = {"loss": 0.0}
    for i, batch in enumerate(batches):
        if world.size > 1:  # gradients travel once a step, where there is room to keep them whole until then
            policy.set_requires_gradient_sync(i == len(batches) - 1 or not policy.fits)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
            loss, numbers = loss_of(policy, batch)
        (loss * world.size).backward()  # FSDP takes the mean over processes; the sum is meant
        for name, value in {"loss": loss.detach(), **numbers}.items():
            sums[name] = sums.get(name, 0.0) + value  # on the device: no wait

    norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm or math.inf))
    *values, norm = total([*sums.values(), norm / world.size], world)
    rate = learning_rate(step, config)
    numbers = {**dict(zip(sums, values)), "grad_norm": norm, "learning_rate": rate}
    taken = math.isfinite(numbers["loss"]) and math.isfinite(norm)
    if taken:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return numbers, taken


def save_model(folder, policy, tokenizer, world):
    """Writes the policy as from_pretrained reads it. All processes take part, weight by weight; the first writes."""
    parameters_of(policy)
    weights, seen, checks = {}, set(), []
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # a head that is the embedding
            continue
        seen.add(id(tensor))
        tensor = whole(tensor.detach())
        checks.append(tensor.float().sum())
        if world.rank == 0:
            weights[name] = tensor.cpu()
    check_finite(checks)

    def write():
        policy.model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

    on_rank_0(write, world)


def moments(policy, optimizer):
    """AdamW's state by parameter name, sharing its memory; zeros before the first step."""
    tensors = {}
    for name, weight in parameters_of(policy).items():
        if weight.requires_grad:
            state = optimizer.state[weight]
            if not state:
                state["step"] = torch.zeros((), device=weight.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            tensors.update({f"{name}.{key}": value.detach() for key, value in state.items()})
    return tensors


def save_checkpoint(run, state, policy, tokenizer, tensors, world):
    """Writes run/checkpoints/step_N, whole or not at all, and keeps the newest two whole ones.

    The folder is a model, with `tensors` (those of `moments`, and what else must come back) in optimizer/ and `state`,
    a dict for JSON, in state.json. Raises RunError where the disk does not take it.
    """
    aside = run / "checkpoints" / "unfinished"
    try:
        on_rank_0(lambda: shutil.rmtree(aside, ignore_errors=True), world)  # left by a kill
        save_model(aside, policy, tokenizer, world)
        writer = HuggingFaceStorageWriter(str(aside / "optimizer"), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)
        on_rank_0(lambda: keep_checkpoint(aside, state), world)
    except (OSError, dcp.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]  # dcp quotes a whole traceback
        raise RunError(f"the checkpoint of step {state['step']} could not be written ({reason}); older checkpoints are "
                       "kept, and the same command continues from them") from error


def load_checkpoint(checkpoint, tensors, world):
    """Brings `tensors` back in place (the weights came with load_model): the state as it was saved."""
    reader = HuggingFaceStorageReader(str(checkpoint / "optimizer"))
    dcp.load(tensors, storage_reader=reader, no_dist=world.size == 1)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sizes"]
    return state


def finish_run(run, policy, tokenizer, world):
    """Leaves the trained model in the run's folder, with curves.png; the run is finished."""
    save_model(run / "export.tmp", policy, tokenizer, world)
    on_rank_0(lambda: publish(run), world)


if __name__ == "__main__":
    launch(main, Config)
