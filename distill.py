r"""Distillation: teachers trained to teach, and the other ways to move reasoning from one model into another.

--method rlt (Reinforcement-Learned Teachers, 2506.08388) trains a teacher that reads a question q *and* its solution s
and writes the explanation t. It never has to find the answer; its reward is what a frozen student makes of the
explanation, alpha = .01, lambda = 3:

    r = mean log p_student(s | q, t) + alpha * min log p_student(s | q, t)             did it make the solution clear?
        - lambda * (mean D + alpha * max D),  D = log p_teacher(t | q, s) - log p_student(t | q)    unaided, too?
        - 1 where the explanation was cut off

GRPO on r, with KL to a slowly moving reference; then the student is fine-tuned on (q, t, s), as the teacher wrote it.
The other methods train the student alone, with one loss over all trained tokens of the step:

    loss = [kd_weight * tau^2 * divergence(teacher, student at temperature tau) - (1 - kd_weight) * log p] / tokens

logits: on given text (or the teacher's); on_policy (GKD, 2306.13649): on the student's own samples; ssb (2512.05105):
the teacher is the student itself with a right and a wrong attempt before its eyes; bootstrap (BOLT, 2502.03860), at
kd_weight 0: on its own samples that the checker passed, or, with --rounds (2503.18866), on latent thoughts drawn by
how well they explain the solution.
Against the authors' code: texts meet as token ids and spans are counted, never searched, the end of a turn stands for
RLT's closing tag, and its teacher reads the solution in the user's turn. Against TRL: only trained tokens meet the
heads, which never make a [tokens, V] tensor.

Dimensions: P prompts · G samples per prompt · R rows of a step · B rows of one forward · T tokens · S = T - 1
predicting positions · N trained tokens · V vocabulary · D, H the student's and the teacher's width · K of --kd_topk.

    python sft.py && python distill.py                # the embedded task, all three stages of rlt
    python distill.py --method on_policy --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k --dataset_test_split test \
        --output_dir runs/kd                                                                 # one GPU
    torchrun --nproc-per-node 8 distill.py ...                                               # several GPUs
"""

import copy
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
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

from eval import (InputError, Log, Problem, ProblemFlags, Rollouts, RunError, RunFlags, answer_key, chat_text,
                  encode_prompt, end_of_turn, eval_numbers, extract_answer, fill_template, flag, generate,
                  keep_checkpoint, launch, leave, load_eval_problems, load_model, load_problems, load_tokenizer,
                  open_run, publish, read_rows, softcap, stop_ids, stop_signals, verify)
from kernels import linear_kl, linear_logps, linear_topk, topk_kl

# --- config ---


@dataclass
class Config(ProblemFlags, RunFlags):
    SECTIONS = {"method": "method", "model_name_or_path": "model", "dataset_name": "data",
                "output_dir": "the run's folder", "divergence": "divergence", "teacher_sft_steps": "rlt: the teacher",
                "n_traces": "traces and templates", "temperature": "sampling, lengths",
                "per_device_train_batch_size": "optimizer and memory", "logging_steps": "logs, evaluation, checkpoints"}

    method: str = flag("rlt", "rlt trains a teacher, then its student; the others train the student alone",
                       choices=("rlt", "ssb", "logits", "on_policy", "bootstrap"))
    stage: str = flag("all", "rlt: a single one of its runs; all: one after the other",
                      choices=("all", "warm_up", "teacher", "student"))
    model_name_or_path: str = flag("runs/sft", "the student: a hub name or a local folder; by default what sft.py left")
    teacher_model_name_or_path: str = flag("", "the teacher, of the student's vocabulary; empty: a copy of the student")
    error_rate: float = flag(0.15, "`chain`: wrong steps in the solutions of the warm-up, logits and on_policy",
                             low=0, high=1)
    output_dir: str = flag("runs/distill", "the run's folder; of several stages each has one of its own in it",
                           free=True)

    divergence: str = flag("auto", "forward KL(teacher || student), reverse, or jsd; auto: reverse for on_policy",
                           choices=("auto", "forward", "reverse", "jsd"))
    jsd_beta: float = flag(0.5, "jsd: the teacher's share of the mixture, above 0 and below 1 (no KL at the ends)")
    kd_weight: float = flag(1.0, "logits, ssb: share of the divergence in the loss; the rest is cross-entropy",
                            low=0, high=1)
    kd_temperature: float = flag(0.0, "divides both models' logits in the divergence; 0: 1, for ssb 2 (its authors')",
                                 low=0)
    kd_topk: int = flag(0, "forward: only the teacher's k likeliest tokens and the mass of the rest; 0: all", low=0)
    prune_fraction: float = flag(0.0, "logits, on_policy: leave out this share of the data, chosen at random",
                                 low=0, high=1)
    completions: str = flag("dataset", "logits: what to train on: dataset, or the teacher's own samples: teacher",
                            choices=("dataset", "teacher"))
    lmbda: float = flag(1.0, "on_policy: share of rows that the student samples; the others are the data's",
                        low=0, high=1)

    teacher_sft_steps: int = flag(150, "warm_up: steps of fine-tuning on the problems' own solutions; 0: no such stage",
                                  low=0)
    teacher_steps: int = flag(60, "teacher: optimizer steps", low=1)
    teacher_learning_rate: float = flag(0.0, "teacher: learning rate; 0: 5e-5 under 10 M parameters, 1e-6 above", low=0)
    teacher_batch_size: int = flag(256, "teacher: per_device_train_batch_size of this stage, in explanations", low=1,
                                   free=True)
    rlt_alpha: float = flag(0.01, "rlt: weight of the least clear solution token and of the least plausible thought",
                            low=0)
    rlt_lambda: float = flag(3.0, "rlt: weight of the thoughts' implausibility", low=0)
    format_penalty: float = flag(1.0, "rlt: what a cut-off explanation costs", low=0)
    beta: float = flag(0.04, "rlt: weight of the KL divergence to the reference", low=0)
    ref_model_sync_steps: int = flag(32, "rlt: the reference follows the teacher every so many steps", low=1)
    ref_model_mixup_alpha: float = flag(0.9, "rlt: how far it then goes, 1 being all the way", low=0, high=1)

    n_traces: int = flag(2000, "rlt, ssb, bootstrap, completions teacher: problems to sample for; 0: all", low=0)
    num_generations: int = flag(8, "rlt: explanations per problem and step; ssb, bootstrap: samples per problem", low=1)
    min_thought_tokens: int = flag(0, "bootstrap: drop shorter samples", low=0)
    max_thought_tokens: int = flag(0, "bootstrap: drop longer samples; 0: none is too long", low=0)
    budget_template: str = flag("{prompt}", "bootstrap: the prompt trained on; {budget}: the sample's length, rounded")
    demonstrations: str = flag("", "bootstrap: a file of prompts and completions to show before each problem")
    n_shots: int = flag(3, "bootstrap: demonstrations shown, drawn anew for each problem", low=0)
    rounds: int = flag(0, "bootstrap: 0: the checker chooses; N: N rounds of expectation maximisation instead", low=0)
    teacher_template: str = flag("auto", "what the teacher reads; {prompt}, {solution}")
    hint_template: str = flag("auto", "ssb: what the teacher reads; {prompt}, {right}, {wrong}")
    solution_template: str = flag("auto", "rlt, rounds: the text both know as the solution; {answer}, {solution}")
    thought_prefix: str = flag("auto", "rlt, rounds: what opens the student's thinking, such as <think>")
    thought_suffix: str = flag("auto", "rlt, rounds: what closes it; the solution follows")

    temperature: float = flag(1.0, "of sampling; rlt: it divides the logits behind the reward and the loss too")
    trace_temperature: float = flag(0.3, "of the teacher's texts for the student: rlt, completions teacher", low=0)
    generation_batch_size: int = flag(256, "rows decoded at once; memory and speed only", low=1, free=True)
    max_length: int = flag(1024, "tokens; longer examples of the data are left out and counted (TRL cuts them)", low=2)

    max_steps: int = flag(200, "optimizer steps of the student", low=1)
    learning_rate: float = flag(0.0, "peak, of the warm-up stage too; 0: 1e-3 under 10 M parameters, 1e-5 above", low=0)
    lr_scheduler_type: str = flag("cosine", "after the warm-up; rlt's teacher: constant",
                                  choices=("constant", "linear", "cosine"))
    warmup_steps: float = flag(0.05, "steps of linear warm-up; below 1: this share of all steps", low=0)
    logging_steps: int = flag(10, "print a line every so many steps; metrics.jsonl has every step", low=1, free=True)
    eval_steps: int = flag(100, "evaluate the student (greedy) every so many steps and at the end; 0: never", low=0)
    save_steps: int = flag(50, "checkpoint every so many steps; 0: only when stopped and at the end", low=0, free=True)


# --- loss ---


def understanding(logps_BS, solution_BS, alpha):
    """How clear the solution is to the student, at most 0: mean + alpha * min of its log-probs, [B], in nats.

    solution_BS marks the solution's tokens, one or more a row. The minimum keeps a long solution from hiding a gap.
    Source: RLT 2506.08388, r^SS.
    """
    mean_B = (logps_BS * solution_BS).sum(1) / solution_BS.sum(1)
    return mean_B + alpha * logps_BS.masked_fill(~solution_BS, math.inf).amin(1)


def implausibility(teacher_logps_BS, logps_BS, thought_BS, alpha):
    """How far the thoughts are from what the student would think unaided: mean + alpha * max of the log-ratio, [B].

    The log-ratio is the teacher's log-prob of a thought's token (it knows the solution) minus the student's (it does
    not), in nats; the mean over the teacher's samples estimates KL(teacher || student). No thought at all: 1 + alpha,
    as in the authors' code, or silence would look natural. Source: RLT 2506.08388, r^KL.
    """
    gaps_BS, n_B = teacher_logps_BS - logps_BS, thought_BS.sum(1)
    mean_B = (gaps_BS * thought_BS).sum(1) / n_B.clamp(min=1)
    return torch.where(n_B > 0, mean_B + alpha * gaps_BS.masked_fill(~thought_BS, -math.inf).amax(1), 1 + alpha)


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


def kl_k3(logps_BS, reference_logps_BS):
    """KL(policy || reference) per token in nats, 0 or more; tokens are the policy's. Source: Schulman 2020, k3."""
    log_ratio_BS = reference_logps_BS - logps_BS  # reference minus policy: the other way round is another quantity
    return log_ratio_BS.expm1() - log_ratio_BS


def teacher_loss(logps_BS, reference_logps_BS, advantages_B, mask_BS, beta, n_rows):
    """Negated mean over the step's n_rows rows of each row's token mean of A * ratio - beta * KL.

    One step a rollout, so the ratio is 1 and only carries the gradient. reference_logps_BS is None at beta 0.
    Source: DeepSeekMath 2402.03300 eq. 3, at old = current policy.
    """
    gain_BS = advantages_B[:, None] * (logps_BS - logps_BS.detach()).exp()
    if reference_logps_BS is not None:
        gain_BS = gain_BS - beta * kl_k3(logps_BS, reference_logps_BS)
    return -((gain_BS * mask_BS).sum(1) / mask_BS.sum(1).clamp(min=1)).sum() / n_rows


def divergence(hidden_ND, weight_VD, teacher_hidden_NH, teacher_weight_VH, config):
    """--divergence of the two next-token distributions over the tokens both heads know, [N] in nats.

    Both logits are divided by --kd_temperature. Differentiable in the student alone. The kinds are separate choices
    because the JSD, scaled by its shares, falls to 0 at both ends instead of turning into a KL.
    Source: GKD 2306.13649 eq. 1; top-k with the mass of the rest as one more outcome.
    """
    V = min(len(weight_VD), len(teacher_weight_VH))  # heads are padded to round sizes: those rows are no tokens
    weight_VD, teacher_weight_VH = weight_VD[:V], teacher_weight_VH[:V]
    if config.kd_topk:
        teacher_NK, ids_NK, tail_N = linear_topk(teacher_hidden_NH, teacher_weight_VH, min(config.kd_topk, V - 1),
                                                 config.kd_temperature)
        logps_NK, _ = linear_logps(hidden_ND, weight_VD, ids_NK, config.kd_temperature, entropy=False)
        return topk_kl(logps_NK, teacher_NK, tail_N)
    return linear_kl(hidden_ND, weight_VD, teacher_hidden_NH, teacher_weight_VH, kind=config.divergence,
                     beta=config.jsd_beta, temperature=config.kd_temperature)


def thought_weights(joint_PG, proposal_PG):
    """(weights [P, G] that sum to 1 a row, IW-ELBO [P] in nats) of thoughts sampled from q(z | question, solution).

    log w = log p(z, solution | question) - log q(z); the ELBO is log mean w, a lower bound of log p(solution |
    question) that tightens with G. A thought with joint -inf counts as impossible; a row of them gives weights of 0.
    Source: 2503.18866 section 3, after IWAE.
    """
    log_w_PG = joint_PG - proposal_PG
    elbo_P = log_w_PG.logsumexp(1) - math.log(log_w_PG.shape[1])
    return log_w_PG.softmax(1).nan_to_num(0.0), elbo_P


# --- stages ---


class Reinforce:
    """Stage `teacher` of rlt: each step samples explanations, has the student judge them, and trains on the verdict."""

    def __init__(self, problems, tokenizer, config, world, resume):
        self.tokenizer, self.config, self.world = tokenizer, config, world
        self.lessons, self.tags = make_lessons(problems, tokenizer, config), make_tags(tokenizer, config)
        self.about, self.traces, self.reference = {}, None, None
        student = load_other("model_name_or_path", tokenizer, config, world)
        self.n_ids = student.get_input_embeddings().num_embeddings
        self.frozen_flag = f"--model_name_or_path {config.model_name_or_path}"
        self.frozen_sha256 = weights_sha256(student)
        self.frozen = shard(Learner(student), config, world)
        if config.beta:  # the teacher as it begins, in float32, because it will move by small shares
            begun = load_other("teacher_model_name_or_path", tokenizer, config, world, torch.float32)
            self.reference = shard(Learner(begun), config, world)

    def begin(self, step, decoder):
        """Rolls out step `step`: (indices of its problems, the numbers to log); sets examples and lengths."""
        config, G = self.config, self.config.num_generations
        n_problems = config.per_device_train_batch_size * config.gradient_accumulation_steps * self.world.size // G
        picked = rows_of_step(len(self.lessons), n_problems, step, config.seed)
        lessons_P = [self.lessons[i] for i in picked]
        rollouts = sample(decoder, self.tokenizer, [lesson.teacher_prompt for lesson in lessons_P], G, step, config,
                          self.world)
        check_ids(rollouts, self.n_ids, "teacher", "student")
        clear_R, forced_R = score_explanations(self.frozen, lessons_P, rollouts, self.tags, config, self.world)
        cut_R = ~rollouts.finished_R
        rewards_PG = (clear_R - config.rlt_lambda * forced_R - config.format_penalty * cut_R).view(-1, G)
        if not rewards_PG.isfinite().all():
            raise RunError("the student gave an explanation a log-probability that is not finite")
        advantages_R = group_advantages(rewards_PG, "group").flatten()
        moves_R = (advantages_R != 0) | bool(config.beta)  # without advantage and KL the gradient is zero
        self.rows, self.n_rows = moves_R.nonzero()[:, 0].tolist(), len(moves_R)
        self.advantages = advantages_R[self.rows]
        self.examples = [trace_example(lessons_P[row // G].teacher_prompt, rollouts.ids(row)) for row in self.rows]
        self.lengths = [len(example.ids) for example in self.examples]
        self.n_tokens = int(rollouts.lengths_R[self.rows].sum())
        numbers = {"reward": rewards_PG.mean(), "reward_std": rewards_PG.std(1).mean(),
                   "frac_reward_zero_std": silent_groups(rewards_PG).float().mean(),
                   "rewards/understanding/mean": clear_R.mean(), "rewards/implausibility/mean": forced_R.mean(),
                   "completions/mean_length": rollouts.lengths_R.float().mean(),
                   "completions/clipped_ratio": cut_R.float().mean()}
        texts = self.tokenizer.batch_decode([thought_of(rollouts, row) for row in range(2)],
                                            clean_up_tokenization_spaces=False)
        self.samples = [{"prompt": lessons_P[0].problem.prompt, "completion": text, "reward": float(reward)}
                        for text, reward in zip(texts, rewards_PG[0])]
        return picked, {name: float(value) for name, value in numbers.items()}

    def loss_of(self, policy, batch):
        """The batch's share of the step's loss, and of the numbers logged."""
        config = self.config
        logps_BS, entropy_BS = policy(batch, config.temperature, entropy=True)
        advantages_B = logps_BS.new_zeros(len(batch.mask_BS))  # a batch without rows has one that trains nothing
        advantages_B[: len(batch.rows)] = self.advantages[batch.rows].to(logps_BS)
        numbers, reference_logps_BS = {"entropy": entropy_BS.detach().sum() / self.n_tokens}, None
        if self.reference is not None:
            with torch.no_grad():
                reference_logps_BS, _ = self.reference(batch, config.temperature)
            kl_BS = kl_k3(logps_BS.detach(), reference_logps_BS)
            numbers["kl"] = (kl_BS * batch.mask_BS).sum() / self.n_tokens
        loss = teacher_loss(logps_BS, reference_logps_BS, advantages_B, batch.mask_BS, config.beta, self.n_rows)
        return loss, numbers


class Imitate:
    """Every other stage: examples, made before the first step or by the student in each, with or without a teacher.

    Student and teacher read a completion in contexts that may differ; the trained tokens are the same, in one order.
    """

    def __init__(self, data, tokenizer, config, world, resume):
        self.tokenizer, self.config, self.world = tokenizer, config, world
        self.frozen, self.frozen_sha256, self.reference = None, None, None
        self.traces, self.samples, self.about = None, (), {}
        if config.stage == "warm_up":
            self.pool = make_warm_up(data, tokenizer, config)
        elif config.method == "on_policy" or config.method == "logits" and config.completions == "dataset":
            self.pool = pruned(make_examples(data, tokenizer, config), config)
        else:
            self.traces = read_traces(Path(config.output_dir)) if resume else self.make_traces(data)
            self.pool = [trace_example(trace.prompt_ids, trace.completion_ids) for trace in self.traces]
        self.teacher_pool = self.pool
        if config.method == "ssb":  # the one teacher that reads more than the student
            self.teacher_pool = [trace_example(trace.teacher_prompt_ids, trace.completion_ids) for trace in self.traces]
        if config.method == "on_policy" and not all(map(prompt_of, self.pool)):
            raise InputError(f"--dataset_name {config.dataset_name}: rows without a prompt cannot be sampled from")
        if config.kd_weight:
            self.frozen_flag = f"--teacher_model_name_or_path {config.teacher_model_name_or_path}"
            teacher = load_other("teacher_model_name_or_path", tokenizer, config, world)
            if softcap(teacher) is not None:
                raise InputError(f"{self.frozen_flag}: caps its logits, which the divergence does not support")
            self.n_ids = teacher.get_input_embeddings().num_embeddings
            self.frozen_sha256 = weights_sha256(teacher)
            self.frozen = shard(Learner(teacher), config, world)
            self.head_VH = whole(teacher.get_output_embeddings().weight)  # every process holds all of it

    def make_traces(self, data):
        """The traces of this stage, sampled by the teacher or what takes its place; InputError where none is left."""
        config, tokenizer = self.config, self.tokenizer
        sampler = load_other("teacher_model_name_or_path", tokenizer, config, self.world)
        make = {"rlt": rlt_traces, "ssb": ssb_traces, "bootstrap": bootstrap_traces, "logits": teacher_traces}
        make = em_traces if config.rounds else make[config.method]
        if config.method != "logits":  # there the data is pruned before it is cut
            data = data[: config.n_traces or None]
        print(f"{config.method}: sampling" + f" for {len(data)} problems" * (config.method != "logits"), flush=True)
        traces, self.about = make(sampler, tokenizer, data, config, self.world)
        ends, end = stop_ids(sampler, tokenizer), end_of_turn(tokenizer)  # the student stops at its own end alone
        traces = [trace._replace(completion_ids=[*trace.completion_ids[:-1], end])
                  if trace.completion_ids[-1] in ends else trace for trace in traces]
        largest = max(tokenizer.get_vocab().values())  # a teacher's padded head can say what is no token
        kept = [trace for trace in traces if max(trace.completion_ids) <= largest
                and max(len(trace.prompt_ids), len(trace.teacher_prompt_ids)) + len(trace.completion_ids)
                <= config.max_length]
        about = ", ".join(f"{name} {value:.4g}" for name, value in self.about.items())
        if not kept:
            raise InputError(f"--method {config.method}: none of {len(traces)} traces is left to train on ({about})")
        print(f"{len(kept)} of {len(traces)} traces: {about}", flush=True)
        self.about["data/traces"] = len(kept)
        return kept

    def begin(self, step, decoder):
        """Chooses the rows of step `step`, sampling those that are the student's: (their indices, numbers to log)."""
        config, numbers = self.config, {}
        n_rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * self.world.size
        picked = rows_of_step(len(self.pool), n_rows, step, config.seed)
        self.examples = self.teacher_examples = [self.pool[i] for i in picked]  # one list: what is sampled, both read
        if self.teacher_pool is not self.pool:
            self.teacher_examples = [self.teacher_pool[i] for i in picked]
        if config.method == "on_policy":
            own = np.flatnonzero(np.random.default_rng([config.seed, step, 1]).random(n_rows) < config.lmbda).tolist()
            prompts = [prompt_of(self.examples[row]) for row in own]
            rollouts = sample(decoder, self.tokenizer, prompts, 1, step, config, self.world)
            for i, row in enumerate(own):
                self.examples[row] = trace_example(prompts[i], rollouts.ids(i))
            if own:
                check_ids(rollouts, self.n_ids, "student", "teacher")
                numbers = {"completions/mean_length": float(rollouts.lengths_R.float().mean()),
                           "completions/clipped_ratio": 1 - float(rollouts.finished_R.float().mean())}
        self.lengths = [max(len(mine.ids), len(theirs.ids))
                        for mine, theirs in zip(self.examples, self.teacher_examples)]
        self.n_tokens = sum(sum(example.trained[1:]) for example in self.examples)
        return picked, numbers

    def loss_of(self, policy, batch):
        """The batch's share of the step's loss, and of the numbers logged."""
        config = self.config
        if self.frozen is None:
            logps_BS, _ = policy(batch)
            return -logps_BS.sum() / self.n_tokens, {}  # 0 at untrained places
        theirs = batch
        if self.teacher_examples is not self.examples:
            theirs = collate(self.teacher_examples, batch.rows, self.world.device)
        with torch.no_grad():
            teacher_hidden_NH = self.frozen(theirs, judge=lambda hidden_NH, weight_VH, targets_N: hidden_NH)

        def judge(hidden_ND, weight_VD, targets_N):
            kl_N = divergence(hidden_ND, weight_VD, teacher_hidden_NH, self.head_VH, config)
            if config.kd_weight == 1:
                return kl_N, kl_N.new_zeros(len(kl_N))
            return kl_N, -linear_logps(hidden_ND, weight_VD, targets_N, entropy=False)[0]

        kl_N, nll_N = policy(batch, judge=judge)
        # the gradient of a divergence at a high temperature tau is about tau^2 smaller than at 1
        loss_N = config.kd_weight * config.kd_temperature**2 * kl_N + (1 - config.kd_weight) * nll_N
        numbers = {"divergence": kl_N.detach().sum() / self.n_tokens}
        if config.kd_weight < 1:
            numbers["nll"] = nll_N.detach().sum() / self.n_tokens
        return loss_N.sum() / self.n_tokens, numbers


def make_warm_up(problems, tokenizer, config):
    """What teaches a teacher its format: the problems' own solutions, question and final answer given.

    Raises InputError where every solution stands in what the teacher reads: it would only learn to copy.
    """
    lessons = make_lessons(problems, tokenizer, config)
    texts = [explanation(lesson.problem, config) for lesson in lessons]
    if all(text in known_solution(lesson.problem, config) for text, lesson in zip(texts, lessons)):
        raise InputError(f"--solution_template {config.solution_template}: the teacher reads the very text that the "
                         "warm-up would teach it to write; take '#### {answer}', or --teacher_sft_steps 0")
    thoughts = tokenizer(texts, add_special_tokens=False).input_ids
    examples = [trace_example(lesson.teacher_prompt, thought + [end_of_turn(tokenizer)])
                for lesson, thought in zip(lessons, thoughts)]
    kept = [example for example in examples if len(example.ids) <= config.max_length]
    if not kept:
        raise InputError(f"--max_length {config.max_length}: all {len(examples)} worked solutions are longer")
    return kept


def pruned(examples, config):
    """A random 1 - prune_fraction of the examples, one at the least, in their order."""
    n_kept = max(1, round(len(examples) * (1 - config.prune_fraction)))
    kept = np.random.default_rng([config.seed, 3]).permutation(len(examples))[:n_kept]
    return [examples[i] for i in sorted(kept.tolist())]


# --- rollouts ---


def sample(decoder, tokenizer, prompts, n, number, config, world, temperature=None):
    """n completions of every prompt, shared out over the processes: Rollouts of all rows, on every process.

    Random numbers belong to (seed, number, prompt, sample), so they are the same however many processes there are.
    """
    mine = range(world.rank, len(prompts), world.size)
    temperature = config.temperature if temperature is None else temperature
    found = generate(decoder, tokenizer, [prompts[i] for i in mine], n, config.max_completion_length,
                     temperature, seed=[config.seed, number], batch_size=config.generation_batch_size, keys=mine,
                     progress=sys.stderr.isatty() and world.rank == 0)
    if world.size == 1:
        return found
    parts = [None] * world.size
    dist.all_gather_object(parts, found)
    order_R = torch.tensor([i * n + j for rank in range(world.size)
                            for i in range(rank, len(prompts), world.size) for j in range(n)]).argsort()
    return Rollouts(*(torch.cat([getattr(part, name) for part in parts])[order_R]
                      for name in ("tokens_RT", "logps_RT", "lengths_R", "finished_R")))


@torch.no_grad()
def token_logps(model, examples, config, world, temperature=1.0):
    """Log-probs of every example's trained tokens, from its first one on, [R, T] with 0 behind, on every process."""
    lengths, counts = [len(example.ids) for example in examples], [sum(example.trained[1:]) for example in examples]
    logps_RT = torch.zeros(len(examples), max(counts), device=world.device)
    for rows in micro_batches(lengths, config.per_device_train_batch_size, config.micro_batch_tokens, world):
        batch = collate(examples, rows, world.device)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
            logps_BS, _ = model(batch, temperature)
        found = logps_BS.flatten()[batch.where_N].split([counts[row] for row in rows])
        for row, logps_N in zip(rows, found):
            logps_RT[row, : len(logps_N)] = logps_N
    if world.size > 1:
        dist.all_reduce(logps_RT)  # each row was one process's, 0 on the others
    return logps_RT.cpu()


def score_explanations(student, lessons, rollouts, tags, config, world):
    """(understanding_R, implausibility_R) of the sampled explanations, rows of one lesson side by side.

    The teacher's log-probs are those it sampled with; the student's come from one forward over what it would say.
    """
    G, examples, parts = len(rollouts.lengths_R) // len(lessons), [], []
    for row in range(len(rollouts.lengths_R)):
        lesson, thought = lessons[row // G], thought_of(rollouts, row)
        examples.append(trace_example(lesson.prompt, retelling(lesson, thought, tags)))
        parts.append(torch.tensor([0] * len(tags.before) + [1] * len(thought) + [0] * len(tags.after)
                                  + [2] * len(lesson.solution) + [0]))
    parts_RT = nn.utils.rnn.pad_sequence(parts, batch_first=True)  # 1: the thought, 2: the solution
    logps_RT, T = token_logps(student, examples, config, world, config.temperature), parts_RT.shape[1]
    teacher_RT = nn.functional.pad(rollouts.logps_RT, (len(tags.before), T))[:, :T]  # thought above thought
    return (understanding(logps_RT, parts_RT == 2, config.rlt_alpha),
            implausibility(teacher_RT, logps_RT, parts_RT == 1, config.rlt_alpha))


def rlt_traces(sampler, tokenizer, problems, config, world):
    """One explanation of every problem by the teacher, as it wrote it: no choice, no rewriting, no check."""
    lessons, tags = make_lessons(problems, tokenizer, config), make_tags(tokenizer, config)
    rollouts = sample(sampler, tokenizer, [lesson.teacher_prompt for lesson in lessons], 1, 0, config, world,
                      config.trace_temperature)
    traces = [explained(lesson, thought_of(rollouts, row), tags, tokenizer) for row, lesson in enumerate(lessons)]
    return traces, {"data/clipped_ratio": 1 - float(rollouts.finished_R.float().mean())}


def attempts(sampler, tokenizer, prompts, answers, n, number, config, world):
    """n samples of every prompt, as Rollouts, as texts, and for each whether it comes to the prompt's answer."""
    rollouts = sample(sampler, tokenizer, prompts, n, number, config, world)
    texts, wanted = rollouts.texts(tokenizer), [answer for answer in answers for _ in range(n)]
    right = on_rank_0(lambda: list(map(verify, texts, wanted)), world)  # its deadline may fall otherwise elsewhere
    return rollouts, texts, right


def right_and_wrong(texts, passed):
    """(right, wrong): the first right text, and the first that gives the most frequent wrong answer; None: no such.

    >>> right_and_wrong(["a#3", "b#4", "c#5", "d#5", "no"], [False, True, False, False, False])
    ('b#4', 'c#5')
    """
    right = next((text for text, good in zip(texts, passed) if good), None)
    given = [(answer_key(extract_answer(text)), text) for text, good in zip(texts, passed)
             if not good and extract_answer(text) is not None]
    common = Counter(key for key, _ in given).most_common(1)
    return right, next((text for key, text in given if key == common[0][0]), None)


def ssb_traces(sampler, tokenizer, problems, config, world):
    """For every problem the model gets right and wrong: what it writes on seeing both, if that ends in the answer.

    Source: semantic soft bootstrapping 2512.05105; its end-of-turn token is trained here, or nothing would stop.
    """
    G, answers = config.num_generations, [problem.answer for problem in problems]
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    _, texts, right = attempts(sampler, tokenizer, prompts, answers, G, 0, config, world)
    found = [right_and_wrong(texts[i : i + G], right[i : i + G]) for i in range(0, len(texts), G)]
    mixed = [i for i, pair in enumerate(found) if None not in pair]
    hinted = [encode_prompt(tokenizer, fill(config.hint_template, problems[i].prompt,
                                            dict(zip(("right", "wrong"), found[i])))) for i in mixed]
    rollouts, texts, right = attempts(sampler, tokenizer, hinted, [answers[i] for i in mixed], 1, 1, config, world)
    traces = [Trace(problems[i].prompt, texts[row], prompts[i], rollouts.ids(row), hinted[row])
              for row, i in enumerate(mixed) if right[row] and rollouts.finished_R[row]]
    return traces, {"data/mixed": len(mixed) / len(problems), "data/kept": len(traces) / len(problems)}


def read_demonstrations(path):
    """The (prompt, completion) texts of a file; InputError where a row has no such columns."""
    pairs = []
    for number, row in enumerate(read_rows(path), 1):
        where = f"--demonstrations {path}: row {number}"
        if not {"prompt", "completion"} <= set(row):
            raise InputError(f"{where}: has columns {sorted(row)}; wanted: prompt and completion")
        pairs.append(tuple(checked(row, name, (str,), where) for name in ("prompt", "completion")))
    return pairs


def with_demonstrations(tokenizer, prompt, pairs):
    """The prompt after worked examples (prompt, completion), all texts: turns of a chat, or lines of text."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return "".join(f"{question}{answer}\n" for question, answer in pairs) + prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    n_system = int(messages[0]["role"] == "system")  # which must stay first
    return messages[:n_system] + turns + messages[n_system:]


def bootstrap_traces(sampler, tokenizer, problems, config, world):
    """The first sample of every problem that is right, has ended and keeps the thought budget.

    Source: BOLT 2502.03860 stages 1 and 2; the budget as an input that SFT makes a control: 2506.02338.
    """
    pairs, prompts = read_demonstrations(config.demonstrations) if config.demonstrations else [], []
    for i, problem in enumerate(problems):
        shown = np.random.default_rng([config.seed, i]).permutation(len(pairs))[: config.n_shots]
        asked = with_demonstrations(tokenizer, problem.prompt, [pairs[j] for j in shown])
        prompts.append(encode_prompt(tokenizer, asked))
    G, traces = config.num_generations, []
    answers, longest = [problem.answer for problem in problems], config.max_thought_tokens or math.inf
    rollouts, texts, right = attempts(sampler, tokenizer, prompts, answers, G, 0, config, world)
    lengths = rollouts.lengths_R.tolist()
    for i, problem in enumerate(problems):
        for row in range(i * G, (i + 1) * G):
            if right[row] and rollouts.finished_R[row] and config.min_thought_tokens <= lengths[row] <= longest:
                budget = {"budget": str(1 << (lengths[row] - 1).bit_length())}  # the next power of two
                question = fill(config.budget_template, problem.prompt, budget)
                ids = encode_prompt(tokenizer, question)
                traces.append(Trace(question, texts[row], ids, rollouts.ids(row), ids))
                break
    return traces, {"data/kept": len(traces) / len(problems)}


def em_traces(sampler, tokenizer, problems, config, world):
    """One latent thought a problem, drawn by weight from samples of the posterior, for both orders of training.

    The same model reads the question and the solution and samples thoughts (posterior), and scores thought and
    solution from the question alone (prior). Half of the traces, by the seed, train the one, half the other.
    Source: 2503.18866 section 3 (the E-step; training on the traces from the first weights is the M-step).
    """
    lessons, tags, G = make_lessons(problems, tokenizer, config), make_tags(tokenizer, config), config.num_generations
    rollouts = sample(sampler, tokenizer, [lesson.teacher_prompt for lesson in lessons], G, 0, config, world)
    texts = rollouts.texts(tokenizer)
    priors = [explained(lessons[row // G], thought_of(rollouts, row), tags, tokenizer) for row in range(len(texts))]
    examples = [trace_example(trace.prompt_ids, trace.completion_ids) for trace in priors]
    joint_R = token_logps(Learner(sampler), examples, config, world).sum(1)
    joint_R = joint_R.masked_fill(~rollouts.finished_R, -math.inf)  # a thought without an end is none
    said_RT = torch.arange(rollouts.logps_RT.shape[1]) < rollouts.lengths_R[:, None]
    proposal_R = (rollouts.logps_RT * said_RT).sum(1)
    weights_PG, elbo_P = thought_weights(joint_R.view(-1, G), proposal_R.view(-1, G))
    rng, traces = np.random.default_rng([config.seed, 2]), []
    for i, lesson in enumerate(lessons):
        point, order = rng.random(2)
        if weights_PG[i].sum() > 0:
            row = i * G + min(int(torch.searchsorted(weights_PG[i].cumsum(0), point)), G - 1)
            told = fill(config.teacher_template, lesson.problem.prompt,
                        {"solution": known_solution(lesson.problem, config)})
            posterior = Trace(told, texts[row], lesson.teacher_prompt, rollouts.ids(row), lesson.teacher_prompt)
            traces.append(priors[row] if order < 0.5 else posterior)
    known = elbo_P[elbo_P.isfinite()]
    elbo = float(known.mean()) if len(known) else -math.inf
    return traces, {"data/kept": len(traces) / len(lessons), "data/elbo": elbo}


def teacher_traces(sampler, tokenizer, rows, config, world):
    """The teacher's own completions of the rows' prompts, those that --max_completion_length cut off included."""
    questions = [question_of(row, f"--dataset_name {config.dataset_name}: row {i + 1}") for i, row in enumerate(rows)]
    questions = pruned(questions, config)[: config.n_traces or None]
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    if not all(prompts):
        raise InputError(f"--dataset_name {config.dataset_name}: rows without a prompt cannot be sampled from")
    rollouts = sample(sampler, tokenizer, prompts, 1, 0, config, world, config.trace_temperature)
    traces = [Trace(question, text, prompt, rollouts.ids(row), prompt)
              for row, (question, text, prompt) in enumerate(zip(questions, rollouts.texts(tokenizer), prompts))]
    return traces, {"data/clipped_ratio": 1 - float(rollouts.finished_R.float().mean())}


def question_of(row, where):
    """What a row's completion answers: its prompt, or its conversation up to the last assistant turn; InputError."""
    if "messages" in row:
        messages = checked(row, "messages", (list,), where)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return messages[: turns[-1] if turns else None]
    if "prompt" not in row:
        raise InputError(f"{where}: has no prompt to sample from")
    question, completion = checked(row, "prompt", (str, list), where), row.get("completion")
    return question + completion[:-1] if isinstance(completion, list) and isinstance(question, list) else question


def check_ids(rollouts, n_ids, sampler, reader):
    """Raises RunError where a token was sampled that has no row in the reader's embedding: heads may be padded."""
    said_RT = torch.arange(rollouts.tokens_RT.shape[1]) < rollouts.lengths_R[:, None]
    largest = int((rollouts.tokens_RT * said_RT).max())
    if largest >= n_ids:
        raise RunError(f"the {sampler} sampled token id {largest}, which the {reader} lacks")


def prompt_of(example):
    """The ids before the last run of trained tokens: what a completion would be sampled from."""
    begins = [i for i, mark in enumerate(example.trained) if mark and not (i and example.trained[i - 1])]
    return example.ids[: begins[-1]]


# --- data ---


class Example(NamedTuple):
    """One sequence to train on."""

    ids: list  # token ids
    trained: list  # bool for each id: is it trained on?


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


def chat_examples(tokenizer, messages):
    """Every assistant turn of a conversation, each in the context the chat template would give it when sampling.

    Turns share one example as long as the template only appends; where it rewrites earlier turns (some drop the
    thinking of all turns but the last), the next turn starts an example of its own.
    """
    examples = []
    for i, message in enumerate(messages):
        if i == 0 or message["role"] != "assistant":  # a greeting that answers nothing is context
            continue
        prompt, answer = turn(tokenizer, messages[:i], message["content"])
        if examples and prompt[: len(examples[-1].ids)] == examples[-1].ids:
            so_far = examples.pop()
        else:
            so_far = Example([], [])
        between = prompt[len(so_far.ids) :]
        examples.append(Example(so_far.ids + between + answer,
                                so_far.trained + [False] * len(between) + [True] * len(answer)))
    return examples


def checked(row, name, kinds, where):
    """row[name], which must be of these kinds (str: a text, list: messages with a role and a content); InputError."""
    value = row[name]
    texts = [message.get(key) if isinstance(message, dict) else None for message in value
             for key in ("role", "content")] if isinstance(value, list) else [value]
    if not isinstance(value, kinds) or not texts or not all(isinstance(text, str) for text in texts):
        wanted = {str: "text", list: "messages with a role and a content"}
        raise InputError(f"{where}: {name} must be {' or '.join(wanted[kind] for kind in kinds)}")
    return value


def row_examples(tokenizer, row, where):
    """The examples of one row in any of TRL's formats (messages; prompt and completion; text) or one Problem."""
    if "messages" in row:
        examples = chat_examples(tokenizer, checked(row, "messages", (list,), where))
    elif "text" in row:
        ids = tokenizer(checked(row, "text", (str,), where)).input_ids
        ids = ids + [tokenizer.eos_token_id] * (ids[-1:] != [tokenizer.eos_token_id])
        examples = [Example(ids, [True] * len(ids))]
    elif "prompt" in row and "completion" in row:
        prompt, completion = (checked(row, name, (str, list), where) for name in ("prompt", "completion"))
        if isinstance(completion, list) and isinstance(prompt, str):
            raise InputError(f"{where}: prompt and completion must both be text or both be messages")
        if isinstance(completion, list):  # chat: the last message is what is trained
            prompt, completion = prompt + completion[:-1], completion[-1]["content"]
        prompt, answer = turn(tokenizer, prompt, completion)
        examples = [Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))]
    else:
        raise InputError(f"{where}: has columns {sorted(row)}; wanted: messages, or prompt and completion, or text")
    if not any(any(example.trained[1:]) for example in examples):
        raise InputError(f"{where}: no token to train on (no assistant turn, or an empty solution)")
    return examples


def load_train_problems(config, error_rate=0.0):
    """The problems of --dataset_name to train on; error_rate spoils that share of the steps in `chain`'s solutions."""
    return load_problems(config.dataset_name, config.dataset_train_split, config.n_train or None, config.seed,
                         levels=config.levels, domains=config.domains, error_rate=error_rate,
                         prompt_column=config.prompt_column, answer_column=config.answer_column,
                         prompt_template=config.prompt_template)


def load_rows(config):
    """The training data as a list of rows in TRL's formats, and where each stands, for error messages."""
    name, split = config.dataset_name, config.dataset_train_split
    if Path(name).exists() or "/" in name:  # a file or folder, or owner/name on the hub
        rows = read_rows(name, split)
        if any(key in rows[0] for key in ("messages", "completion", "text")):
            rows = rows[: config.n_train or None]
            return [{**row, "prompt": fill_template(config.prompt_template, row["prompt"])} if row.get("prompt")
                    else row for row in rows]
    problems = load_train_problems(config, error_rate=config.error_rate)
    return [{"prompt": problem.prompt, "completion": problem.solution or problem.answer, "answer": problem.answer}
            for problem in problems]


def load_stage_data(config):
    """What a stage is made of, as the user gave it: rows for `logits` and `on_policy`, problems for all others."""
    if config.method in ("logits", "on_policy"):
        return load_rows(config)
    return load_train_problems(config, config.error_rate if config.stage == "warm_up" else 0.0)


def make_examples(rows, tokenizer, config):
    """Every row's examples, those over --max_length left out (and said). Raises InputError where none is left."""
    examples = [e for i, row in enumerate(rows)
                for e in row_examples(tokenizer, row, f"--dataset_name {config.dataset_name}: row {i + 1}")]
    kept = [e for e in examples if len(e.ids) <= config.max_length]
    lengths = [len(e.ids) for e in kept or examples]
    if not kept:
        raise InputError(f"--max_length {config.max_length}: all {len(examples)} examples are longer, the shortest has "
                         f"{min(lengths)} tokens")
    if len(kept) < len(examples):
        print(f"--max_length {config.max_length}: {len(examples) - len(kept)} of {len(examples)} examples are longer, "
              "and left out", flush=True)
    n_trained = sum(sum(example.trained) for example in kept)
    print(f"{len(kept)} examples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths) / len(kept):.0f} on "
          f"average, of which {n_trained / len(kept):.0f} are trained", flush=True)
    return kept


FORMATS = {  # what `auto` stands for: without a chat template the format of `chain`, else words for an instruct model
    False: {"teacher_template": "{prompt}{solution}:", "hint_template": "{right}|{wrong}|{prompt}",
            "solution_template": "#{answer}", "thought_prefix": "", "thought_suffix": ""},
    True: {"teacher_template": "{prompt}\n\nThe solution is:\n{solution}\n\nExplain step by step, without referring to "
                               "this solution, the reasoning by which one finds it.",
           "hint_template": "{prompt}\n\nA right attempt:\n{right}\n\nA wrong attempt:\n{wrong}\n\nWrite one "
                            "self-contained, careful derivation that avoids the mistake. Do not mention the attempts.",
           "solution_template": "{solution}", "thought_prefix": "<think>\n", "thought_suffix": "\n</think>\n"},
}


def fill_formats(config, tokenizer):
    """Settles the templates that are `auto`."""
    formats = FORMATS[bool(tokenizer.chat_template)]
    if config.method == "rlt" and config.teacher_sft_steps and "{answer}" not in formats["solution_template"]:
        formats = {**formats, "solution_template": "#### {answer}"}  # what the warm-up teaches must not stand in it
    if tokenizer.chat_template:
        asked = chat_text(tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True)
        if asked.rstrip().endswith(formats["thought_prefix"].rstrip()):
            formats = {**formats, "thought_prefix": ""}  # the template has opened the thinking already
    for name, text in formats.items():
        if getattr(config, name) == "auto":
            setattr(config, name, text)


def fill(template, prompt, values):
    """The template with {prompt} and the names of `values` filled in; of a chat, around its last message.

    >>> fill("{prompt} = {answer}", "{answer}", {"answer": "4"})
    '{answer} = 4'
    """
    def around(text):  # in one pass, so that braces in what is filled in stay as they are
        known = {"prompt": text, **values}
        return re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], match[0]), template)

    if isinstance(prompt, str):
        return around(prompt)
    return [*prompt[:-1], {**prompt[-1], "content": around(prompt[-1]["content"])}]


def explanation(problem, config):
    """What stands in a worked solution before the mark of its final answer; InputError where there is no solution.

    >>> explanation(Problem("37+5-8=", "34", "37+5=42;42-8=34#34"), None)
    '37+5=42;42-8=34'
    >>> explanation(Problem("...", "4", "Box #1 holds 3,\\nso 4."), None)  # a mark stands on the last line
    'Box #1 holds 3,\\nso 4.'
    """
    if not problem.solution:
        raise InputError(f"--dataset_name {config.dataset_name}: has no worked solutions, which --teacher_sft_steps "
                         "needs")
    return re.split(r"\s*#+[^#\n]*\Z", problem.solution.rstrip())[0]


class Lesson(NamedTuple):
    """A problem as token ids, to be spliced into what the student and the teacher read."""

    problem: Problem
    prompt: list  # what the student reads
    teacher_prompt: list  # what the teacher reads, the solution included
    solution: list  # the solution, without an end


class Tags(NamedTuple):
    """The token ids around a thought."""

    before: list  # --thought_prefix
    after: list  # --thought_suffix
    end: int  # ends a turn


def make_tags(tokenizer, config):
    """The Tags of a tokenizer: encoded by themselves, so that they never merge with what they stand beside."""
    before, after = (tokenizer(text, add_special_tokens=False).input_ids
                     for text in (config.thought_prefix, config.thought_suffix))
    return Tags(before, after, end_of_turn(tokenizer))


def known_solution(problem, config):
    """The text that teacher and student both know as the problem's solution."""
    values = {"answer": problem.answer, "solution": problem.solution or f"#### {problem.answer}"}
    return fill(config.solution_template, "", values)


def make_lessons(problems, tokenizer, config):
    """The Lesson of every problem, those too long for --max_length left out (and said); InputError if none is left."""
    lessons, tags = [], make_tags(tokenizer, config)
    for problem in problems:
        solution = known_solution(problem, config)
        told = fill(config.teacher_template, problem.prompt, {"solution": solution})
        lessons.append(Lesson(problem, encode_prompt(tokenizer, problem.prompt), encode_prompt(tokenizer, told),
                              tokenizer(solution, add_special_tokens=False).input_ids))
    room = config.max_length - config.max_completion_length
    kept = [lesson for lesson in lessons if lesson.solution
            and max(len(lesson.teacher_prompt), len(lesson.prompt + retelling(lesson, [], tags))) <= room]
    if len(kept) < len(lessons):
        print(f"--max_length {config.max_length}: {len(lessons) - len(kept)} of {len(lessons)} problems are too long, "
              "or have an empty solution, and are left out", flush=True)
    if not kept:
        raise InputError(f"--max_length {config.max_length}: leaves no problem, --max_completion_length taken off")
    return kept


def thought_of(rollouts, row):
    """A sampled explanation's token ids, without the token that ended it."""
    return rollouts.ids(row)[: -1 if rollouts.finished_R[row] else None]


def retelling(lesson, thought, tags):
    """The ids with which a student thinks this thought and then says the solution: judged by them, trained on them."""
    return tags.before + thought + tags.after + lesson.solution + [tags.end]


class Trace(NamedTuple):
    """A completion to train on and the two contexts it is read in, as a row of traces.jsonl; sft.py reads the texts."""

    prompt: str | list  # as the data has it
    completion: str  # without an end
    prompt_ids: list  # the student's context
    completion_ids: list  # the end included, unless the completion was cut off
    teacher_prompt_ids: list  # the teacher's context


def trace_example(prompt, completion):
    """The Example of a context and the completion that is trained on."""
    return Example(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def explained(lesson, thought, tags, tokenizer):
    """The Trace that teaches a student to think this thought and then say the solution."""
    ids = retelling(lesson, thought, tags)
    text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
    return Trace(lesson.problem.prompt, text, lesson.prompt, ids, lesson.prompt)


def write_traces(run, traces):
    """Writes traces.jsonl, the whole file or none."""
    (run / "traces.tmp").write_text("".join(json.dumps(trace._asdict()) + "\n" for trace in traces))
    os.replace(run / "traces.tmp", run / "traces.jsonl")


def read_traces(run):
    """What write_traces wrote."""
    return [Trace(**json.loads(line)) for line in (run / "traces.jsonl").read_text().splitlines()]


def rows_of_step(n_rows, rows_per_step, step, seed):
    """Indices of the rows of optimizer step `step`: a function of (seed, step) alone, so a resumed run needs no state.

    The data is shuffled anew for each pass and read in order; a step may end one pass and begin the next.
    """
    first, indices = step * rows_per_step, []
    while len(indices) < rows_per_step:
        epoch, offset = divmod(first + len(indices), n_rows)
        order = np.random.default_rng([seed, epoch]).permutation(n_rows)
        indices += order[offset : offset + rows_per_step - len(indices)].tolist()
    return indices


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


# --- model ---


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


class Learner(Policy):
    """A Policy that can also hand what meets its head to a function, for losses that need more than log-probs."""

    def forward(self, batch, temperature=1.0, entropy=False, judge=None):
        """judge(hidden_ND, weight_VD, targets_N) of the trained positions; without a judge, what Policy returns."""
        if judge is None:
            return super().forward(batch, temperature, entropy)
        hidden_BSD = self.model.base_model(input_ids=batch.ids_BT[:, :-1], use_cache=False).last_hidden_state
        return judge(hidden_BSD.flatten(0, 1)[batch.where_N], self.model.get_output_embeddings().weight,
                     batch.ids_BT[:, 1:].flatten()[batch.where_N])


def load_named(name_or_path, config, dtype=torch.float32):
    """The student or teacher of this name, and its tokenizer, as load_model; InputError names the right flag."""
    try:
        return load_model(name_or_path, dtype, config.seed, config.chat_template)
    except InputError as error:
        if config.teacher_model_name_or_path == name_or_path != config.model_name_or_path:
            raise InputError(str(error).replace("--model", "--teacher_model", 1)) from error
        raise


def load_other(flag_name, tokenizer, config, world, dtype=None):
    """Another model than the trained one, frozen, on the device; InputError unless its tokens are the tokenizer's."""
    name_or_path = getattr(config, flag_name)
    model, other = load_named(name_or_path, config, dtype or (torch.bfloat16 if config.bf16 else torch.float32))
    check_vocabulary(tokenizer.get_vocab(), other.get_vocab(), f"--{flag_name} {name_or_path}")
    return model.eval().requires_grad_(False).to(world.device)


def check_vocabulary(vocabulary, other, flag):
    """Raises InputError unless every token of the one has the same id in the other, which may have more."""
    differing = [token for token, number in vocabulary.items() if other.get(token) != number]
    if differing:
        raise InputError(f"{flag}: another vocabulary: {len(differing)} of {len(vocabulary)} tokens differ, such as "
                         f"{min(differing)!r}")


def weights_sha256(model):
    """A hash of a frozen model's weights, by which a continued run knows it again; before it is sharded."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def follow(reference, policy, share):
    """Moves the reference's weights by this share of the way to the policy's."""
    sources = parameters_of(policy)
    for name, target in parameters_of(reference).items():
        target.mul_(1 - share).add_(sources[name], alpha=share)


def reference_tensors(reference):
    """What a checkpoint must hold of the reference, which has moved: its weights, sharing their memory; {} without."""
    named = parameters_of(reference) if reference is not None else {}
    return {f"reference.{name}": weight.detach() for name, weight in named.items()}


# --- main ---


def check_config(config):
    """Raises InputError for flags of this script that cannot be meant together; fills in what depends on --method."""
    if not 0 < config.jsd_beta < 1:
        raise InputError(f"--jsd_beta {config.jsd_beta}: must be above 0 and below 1 (--divergence forward or reverse "
                         "is no end of it)")
    if not config.temperature > 0:
        raise InputError(f"--temperature {config.temperature}: must be above 0")
    if config.divergence == "auto":
        config.divergence = "reverse" if config.method == "on_policy" else "forward"
    config.kd_temperature = config.kd_temperature or (2.0 if config.method == "ssb" else 1.0)
    if config.kd_topk and config.divergence != "forward":
        raise InputError(f"--kd_topk {config.kd_topk}: is for --divergence forward")
    if config.stage == "warm_up" and not config.teacher_sft_steps:
        raise InputError("--stage warm_up: needs --teacher_sft_steps")
    if config.stage != "all" and config.method != "rlt":
        raise InputError(f"--stage {config.stage}: only --method rlt has stages")
    if config.method == "on_policy" and config.kd_weight != 1:
        raise InputError(f"--kd_weight {config.kd_weight}: must be 1 for on_policy, whose samples are no targets")
    if config.completions == "teacher" and config.method != "logits":
        raise InputError("--completions teacher: is for --method logits")
    if config.rounds and config.method != "bootstrap":
        raise InputError(f"--rounds {config.rounds}: is for --method bootstrap")
    taught = config.method == "on_policy" or config.method == "logits" and (
        config.kd_weight or config.completions == "teacher")
    if taught and not config.teacher_model_name_or_path:
        raise InputError(f"--teacher_model_name_or_path: --method {config.method} needs one, stronger than the student")
    if config.method == "rlt" and config.stage in ("all", "teacher") and (
            config.num_generations < 2 or config.teacher_batch_size % config.num_generations):
        raise InputError(f"--num_generations {config.num_generations}: must be 2 or more and divide "
                         f"--teacher_batch_size {config.teacher_batch_size}")


def plan(config):
    """The runs of this command in their order, as configs; of several, each has a folder of its own in output_dir.

    What one of them trains is the teacher of the next: rlt's teacher, and the sampler of an EM round.
    """
    names = [config.stage]
    if config.stage == "all":
        names = [f"round_{i + 1}" for i in range(config.rounds)] or ["student"]
        if config.method == "rlt":
            names = ["warm_up"] * bool(config.teacher_sft_steps) + ["teacher", "student"]
    teacher, runs = config.teacher_model_name_or_path or config.model_name_or_path, []
    for name in names:
        folder = str(Path(config.output_dir) / name) if len(names) > 1 else config.output_dir
        stage = {"stage": name if config.method == "rlt" else "student", "output_dir": folder,
                 "teacher_model_name_or_path": teacher}
        if config.method in ("rlt", "bootstrap"):
            stage["kd_weight"] = 0.0
        if name == "warm_up":
            stage |= {"max_steps": config.teacher_sft_steps, "eval_steps": 0}
        if name == "teacher":
            stage |= {"max_steps": config.teacher_steps, "learning_rate": config.teacher_learning_rate, "eval_steps": 0,
                      "lr_scheduler_type": "constant", "warmup_steps": 0,
                      "per_device_train_batch_size": config.teacher_batch_size}
        runs.append(replace(config, **stage))
        teacher = os.path.relpath(folder)  # the same however --output_dir is spelled
    return runs


def check_plan(runs, config):
    """Raises InputError, before the first stage, for what a later one would fail at, or what it would delete."""
    root, student, teacher = Path(config.output_dir), config.model_name_or_path, config.teacher_model_name_or_path
    for run in runs:
        for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "eval_dataset_name",
                     "demonstrations"):
            value = getattr(config, name)
            given = Path(value).resolve()
            if value and given.exists() and Path(run.output_dir).resolve() in (given, *given.parents):
                raise InputError(f"--output_dir {run.output_dir}: --{name} {value} is in it")
    if len(runs) > 1 and (root / "args.json").is_file():
        raise InputError(f"--output_dir {root}: holds a run of one stage, this command makes {len(runs)}; take another")
    if len(runs) == 1 and not (root / "args.json").is_file() and list(root.glob("*/args.json")):
        raise InputError(f"--output_dir {root}: holds the stages of another command; take another")
    if config.method != "rlt" or config.stage == "warm_up" or not teacher:  # that stage reads no student
        return
    learns = load_tokenizer(student, config.chat_template)
    try:
        teaches = load_tokenizer(teacher, config.chat_template)
    except InputError as error:
        raise InputError(str(error).replace("--model", "--teacher_model", 1)) from error
    if len(runs) > 1:  # each stage encodes with the tokenizer of the model it trains
        check_vocabulary(learns.get_vocab(), teaches.get_vocab(), f"--teacher_model_name_or_path {teacher}")
        check_vocabulary(teaches.get_vocab(), learns.get_vocab(), f"--model_name_or_path {student}")
    if learns.chat_template != teaches.chat_template:
        raise InputError(f"--teacher_model_name_or_path {teacher}: another chat template than --model_name_or_path "
                         f"{student} has; --chat_template off takes both as plain text")


def show_example(example, tokenizer):
    """Prints one example; what is trained on stands in green, or in brackets where the output is not a terminal."""
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    text, inside = "", False
    for token, trained in zip(example.ids, example.trained):
        text += (end if inside and not trained else "") + (begin if trained and not inside else "")
        text, inside = text + tokenizer.decode([token]), trained
    print(f"the first example, with the trained tokens marked:\n{text}{end if inside else ''}", flush=True)


SHOWN = ("reward", "rewards/understanding/mean", "rewards/implausibility/mean", "loss", "divergence", "eval/accuracy",
         "completions/mean_length", "kl", "grad_norm")  # what a line on the screen names, where there is such a number


def train(config, world, stop):
    """One run, from its flags to its finished folder; nothing where that is finished already."""
    # what was asked for, and the checkpoint to go on from
    data, eval_problems = load_stage_data(config), load_eval_problems(config)
    args, resume = on_rank_0(lambda: open_run(config, data, world), world)
    if args["finished"]:
        return
    reinforced = config.stage == "teacher"
    given = config.teacher_model_name_or_path if config.stage in ("warm_up", "teacher") else config.model_name_or_path
    model, tokenizer = load_named(str(resume) if resume else given, config)
    if config.kd_weight and softcap(model) is not None:
        raise InputError(f"--model_name_or_path {given}: caps its logits, which the divergence does not support")
    fill_formats(config, tokenizer)
    small, large = (5e-5, 1e-6) if reinforced else (1e-3, 1e-5)
    usual = small if model.num_parameters() < 10_000_000 else large
    config.learning_rate = config.learning_rate or usual

    # what the stage trains on, and the frozen model that judges it, which must be the one that the run began with
    course = (Reinforce if reinforced else Imitate)(data, tokenizer, config, world, resume)
    if resume and json.loads((resume / "state.json").read_text())["frozen"] != course.frozen_sha256:
        raise InputError(f"{course.frozen_flag}: not the weights this run began with")
    run, log = Path(config.output_dir), Log(args, resume, model, config, world)
    if course.traces and not resume and world.rank == 0:
        write_traces(run, course.traces)

    # the policy that learns, and a copy of it that samples
    sampling = reinforced or config.method == "on_policy"
    decoder = make_decoder(model, config, world) if sampling or eval_problems else None
    policy = shard(Learner(model.train()), config, world)
    optimizer = make_optimizer(policy, config)
    state = {"step": 0, "bad_steps": 0, "num_tokens": 0, "about": course.about, "frozen": course.frozen_sha256}
    if resume:
        state = load_checkpoint(resume, moments(policy, optimizer) | reference_tensors(course.reference), world)
    if not reinforced:
        show_example(course.pool[0], tokenizer)
    if eval_problems and config.eval_on_start and state["step"] == 0:
        refresh(decoder, policy)
        log.step(0, eval_numbers(decoder, tokenizer, eval_problems, 0, log, config), SHOWN)

    while state["step"] < config.max_steps:
        # the rows of this step; a policy that writes them itself samples with its weights of now
        began, step = time.perf_counter(), state["step"]
        if sampling:  # elsewhere it would gather every weight for nothing
            refresh(decoder, policy)
        picked, about = course.begin(step, decoder)
        for line in course.samples:
            log.add("samples", {"step": step + 1, **line})

        # forwards of rows of like length, and one optimizer step
        parts = micro_batches(course.lengths, config.per_device_train_batch_size, config.micro_batch_tokens, world)
        batches = [collate(course.examples, part, world.device) for part in parts]
        numbers, taken = train_step(policy, optimizer, batches, course.loss_of, step, config, world)
        log.count(state, taken, picked)
        state["num_tokens"] += course.n_tokens
        numbers = {**about, **numbers, **state["about"], "num_tokens": state["num_tokens"]}

        # the reference of rlt's teacher follows it at a distance
        if course.reference is not None and state["step"] % config.ref_model_sync_steps == 0:
            follow(course.reference, policy, config.ref_model_mixup_alpha)

        # evaluate, log, save
        last, seconds = state["step"] == config.max_steps, time.perf_counter() - began
        if eval_problems and (last or state["step"] % config.eval_steps == 0):
            refresh(decoder, policy)
            numbers |= eval_numbers(decoder, tokenizer, eval_problems, state["step"], log, config)
        log.step(state["step"], numbers, SHOWN, sum(course.lengths), seconds)
        [stopping] = total([len(stop)], world)
        if last or stopping or (config.save_steps and state["step"] % config.save_steps == 0):
            tensors = moments(policy, optimizer) | reference_tensors(course.reference)
            save_checkpoint(run, state, policy, tokenizer, tensors, world)
        if stopping and not last:
            leave(run, state, stop)
    finish_run(run, policy, tokenizer, world)


def main(config):
    check_config(config)
    runs = plan(config)
    check_plan(runs, config)
    world, stop = start(config), stop_signals()
    for run in runs:
        [stopping] = total([len(stop)], world)
        if stopping:  # the signal came while the stage before was ending
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
        train(run, world, stop)
        gc.collect()  # FSDP's modules refer to themselves, and their weights would stay beside the next stage's
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


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
