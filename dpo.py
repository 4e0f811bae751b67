r"""Preference optimisation: DPO and its relatives, on pairs you have or pairs that the policy makes itself.

Of two completions of one prompt the chosen one is the better. With the log-ratios c and r of chosen and rejected,
log p(completion | prompt) - log p_reference(completion | prompt), summed over the completion's tokens,

    loss = mean over pairs of - log sigmoid(beta (c - r))

`--loss_type` chooses this or a relative, all of them in the first section below. Only the difference c - r is held by
this loss: both may fall, and the right answers with them, while the margin grows. So logps/chosen, the share of pairs
whose chosen log-prob fell, and task accuracy stand beside rewards/margins; `rpo` and `dpop` hold c itself.
Against TRL's DPOTrainer: the reference is the model given, not one reloaded by name, and is never kept: its log-probs
are computed once a round; the prompt of a pair is computed once for both completions; rows are sorted by
length; only completion tokens meet the output head; pairs over --max_length are left out, not cut short.

Dimensions: P pairs · C = 2 completions, chosen first · T tokens of a completion · B lines of one forward ·
S predicting positions · N trained tokens · D model width · V vocabulary.

    python sft.py && python dpo.py                    # the embedded task, its own pairs: four minutes of one core
    python dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --pairs offline --eval_steps 0 \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir runs/d                # one GPU
    torchrun --nproc-per-node 8 dpo.py ...                                                # several GPUs
"""

import copy
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
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from eval import (InputError, Log, ProblemFlags, RunError, RunFlags, chat_text, encode_prompt, end_of_turn,
                  eval_numbers, fill_template, flag, generate, keep_checkpoint, launch, leave, load_eval_problems,
                  load_model, load_problems, open_run, publish, read_rows, softcap, stop_signals, verify)
from kernels import linear_logps

# --- config ---


@dataclass
class Config(ProblemFlags, RunFlags):
    SECTIONS = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "the run's folder",
                "loss_type": "loss", "pairs": "pairs and rounds", "budget": "cold start",
                "per_device_train_batch_size": "optimizer and memory", "logging_steps": "logs, evaluation, checkpoints"}

    error_rate: float = flag(0.15, "`chain`, --pairs offline: share of wrong steps in the rejected solutions")
    max_prompt_length: int = flag(512, "tokens; a longer prompt is an error", low=1)
    max_length: int = flag(1024, "tokens of prompt and completion; longer offline pairs are left out and counted",
                           low=2)
    num_train_epochs: float = flag(0.0, "--pairs offline: passes over the pairs; above 0 it decides, not max_steps",
                                   low=0)
    easy_to_hard: float = flag(0.0, "share of the run in which the data opens by level, easiest first; 0: all at once",
                               low=0, high=1)
    output_dir: str = flag("runs/dpo", "the run's folder: model, args.json, metrics.jsonl, curves.png, checkpoints/",
                           free=True)
    loss_type: str = flag("rpo", "sigmoid (DPO), ipo, ipo_sum, hinge, simpo, rpo, dpop, step_apo, or sft (chosen only)",
                          choices=lambda: USUAL_BETA)
    beta: float = flag(0.0, "strength of the preference; 0: the loss's usual one (simpo 2, all others 0.1)", low=0)
    label_smoothing: float = flag(0.0, "sigmoid: share of pairs taken to be the wrong way round (conservative DPO)",
                                  low=0, high=1)
    simpo_gamma: float = flag(1.0, "simpo: margin wanted, outside beta (the authors' gamma_beta_ratio times beta)")
    rpo_alpha: float = flag(1.0, "rpo: weight of the chosen completion's negative log-likelihood per token", low=0)
    dpop_lambda: float = flag(5.0, "dpop: weight of the fall of the chosen log-prob, inside beta", low=0)
    pairs: str = flag("on_policy", "on_policy: right against wrong samples; steps: right against wrong steps; offline: "
                                   "pairs that dataset_name has", choices=("on_policy", "steps", "offline"))
    resample_steps: int = flag(10, "new pairs and a fresh reference every so many steps; 0: once, at the start", low=0)
    round_prompts: int = flag(256, "prompts sampled each time pairs are made", low=1)
    num_generations: int = flag(8, "completions per prompt, and per prefix with --pairs steps", low=2)
    pairs_per_prompt: int = flag(4, "pairs made of one prompt's completions at most", low=1)
    step_separator: str = flag(";", "--pairs steps: a step ends with this text, such as a line break for prose")
    temperature: float = flag(1.0, "of sampling; the loss is at 1")
    generation_batch_size: int = flag(256, "rows decoded at once; memory and speed only", low=1, free=True)
    share_prefix: bool = flag(True, "compute a pair's prompt once for both completions; speed only", free=True)
    budget: int = flag(0, "annotated examples in all, problems or pairs; 0: n_train", low=0)
    sft_fraction: float = flag(0.0, "share of the examples, and of the steps, spent on a cold start (sft) first",
                               low=0, high=1)
    sft_learning_rate: float = flag(0.0, "the cold start's peak; 0: 3e-3 under 10 M parameters, 2e-5 above", low=0)
    learning_rate: float = flag(0.0, "peak rate; 0: 2e-5 under 10 M parameters, above 1e-6 (TRL's)", low=0)
    eval_steps: int = flag(20, "evaluate (greedy) every so many steps and at the end; 0: never", low=0)


# --- loss ---


def gap(values_PC):
    """What the chosen completion has more than the rejected one: [P]."""
    return values_PC[:, 0] - values_PC[:, 1]


def dpo_loss(ratios_PC, beta, label_smoothing=0.0):
    """-log sigmoid(beta gap) [P], of log-ratios to the reference. Where both are equal it is log 2.

    label_smoothing is the chance that a pair is the wrong way round; the optimum is then the finite margin
    log((1 - s) / s) / beta, at 0.5 it is 0. Source: DPO 2305.18290 eq. 7; conservative DPO: Mitchell 2023.
    """
    margins_P = beta * gap(ratios_PC)
    return -(1 - label_smoothing) * F.logsigmoid(margins_P) - label_smoothing * F.logsigmoid(-margins_P)


def hinge_loss(ratios_PC, beta):
    """max(0, 1 - beta gap) [P]: a pair with a margin of 1 is left alone. Source: SLiC 2305.10425, RSO 2309.06657."""
    return (1 - beta * gap(ratios_PC)).clamp(min=0)


def ipo_loss(ratios_PC, beta):
    """(gap - 1 / (2 beta))^2 [P]: the gap is drawn to a finite value. Source: IPO 2310.12036 eq. 17.

    Of summed log-ratios this is the paper's equation (`ipo_sum`); of log-ratios per token, which ask for that gap per
    token, it is what the authors told TRL they had used, and TRL's `ipo`.
    """
    return (gap(ratios_PC) - 1 / (2 * beta)) ** 2


def simpo_loss(logps_PC, lengths_PC, beta, gamma):
    """-log sigmoid(beta gap(mean log-prob per token) - gamma) [P]; no reference. Source: SimPO 2405.14734 eq. 6.

    gamma is the equation's, a margin in the units of the reward; the authors' code takes gamma / beta.
    """
    return -F.logsigmoid(beta * gap(logps_PC / lengths_PC) - gamma)


def chosen_nll(logps_PC, lengths_PC):
    """Negative log-likelihood per token of the chosen completion, each completion counting alike: [P]."""
    return -logps_PC[:, 0] / lengths_PC[:, 0]


def rpo_loss(ratios_PC, logps_PC, lengths_PC, beta, alpha):
    """DPO plus alpha times the chosen completion's NLL per token [P]. Source: Iterative RPO 2404.19733 eq. 1."""
    return dpo_loss(ratios_PC, beta) + alpha * chosen_nll(logps_PC, lengths_PC)


def dpop_loss(ratios_PC, beta, penalty):
    """DPO whose gap loses `penalty` times each nat the chosen log-prob fell below the reference's: [P].

    Source: DPO-Positive of Smaug, 2402.13228.
    """
    return -F.logsigmoid(beta * (gap(ratios_PC) - penalty * (-ratios_PC[:, 0]).clamp(min=0)))


def step_apo_loss(ratios_PC, values_PC, beta):
    """-log sigmoid(beta gap of log-ratios - gap of values) [P], for two steps taken in the same state.

    beta log(p / p_reference) of a step is its advantage, r + V(next state) - V(state); Bradley-Terry on r leaves the
    difference of the values after the steps, V(state) cancels. The more a step matters, the longer it is pushed: until
    the margin exceeds the gap of values. With equal values it is DPO. Source: CPL 2409.08642, Step-APO.
    """
    return -F.logsigmoid(beta * gap(ratios_PC) - gap(values_PC))


USUAL_BETA = {"sigmoid": 0.1, "ipo": 0.1, "ipo_sum": 0.1, "hinge": 0.1, "simpo": 2.0, "rpo": 0.1, "dpop": 0.1,
              "step_apo": 0.1, "sft": 0.1}
REFERENCE_FREE = ("simpo", "sft")


def pair_losses(logps_PC, reference_PC, lengths_PC, values_PC, config):
    """(--loss_type of each pair [P], implicit rewards [P, C] in the units of the loss).

    logps_PC and reference_PC are summed over each completion's tokens, lengths_PC counts them, values_PC are chances
    of success (step_apo). Rewards are beta times the log-ratio; without a reference beta times the log-prob per token.
    """
    lengths_PC, ratios_PC, beta = lengths_PC.clamp(min=1), logps_PC - reference_PC, config.beta
    rewards_PC = beta * (logps_PC / lengths_PC if config.loss_type in REFERENCE_FREE else ratios_PC).detach()
    losses_P = {
        "sigmoid": lambda: dpo_loss(ratios_PC, beta, config.label_smoothing),
        "ipo": lambda: ipo_loss(ratios_PC / lengths_PC, beta),
        "ipo_sum": lambda: ipo_loss(ratios_PC, beta),
        "hinge": lambda: hinge_loss(ratios_PC, beta),
        "simpo": lambda: simpo_loss(logps_PC, lengths_PC, beta, config.simpo_gamma),
        "rpo": lambda: rpo_loss(ratios_PC, logps_PC, lengths_PC, beta, config.rpo_alpha),
        "dpop": lambda: dpop_loss(ratios_PC, beta, config.dpop_lambda),
        "step_apo": lambda: step_apo_loss(ratios_PC, values_PC, beta),
        "sft": lambda: chosen_nll(logps_PC, lengths_PC),
    }[config.loss_type]()
    return losses_P, rewards_PC


def pair_batch_loss(policy, batch, pairs, reference_PC, n_pairs, config):
    """The batch's share of the step's loss, and of the numbers logged; n_pairs are those of the whole step."""
    # what the loss is made of: one row for each pair of this forward
    logps_PC, own = policy(batch), [pairs[i] for i in batch.rows]
    reference_PC = reference_PC[batch.rows].to(logps_PC)
    lengths_PC = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in own]).to(logps_PC).view(-1, 2)
    values_PC = torch.tensor([pair.values for pair in own]).to(logps_PC).view(-1, 2)
    losses_P, rewards_PC = pair_losses(logps_PC, reference_PC, lengths_PC, values_PC, config)

    # what is logged beside it; a cold start has no rejected completions, and not every loss a reference
    logps_PC = logps_PC.detach()
    numbers = {"logps/chosen": logps_PC[:, 0], "logps/rejected": logps_PC[:, 1]}
    if config.loss_type != "sft":
        numbers |= {"rewards/chosen": rewards_PC[:, 0], "rewards/rejected": rewards_PC[:, 1],
                    "rewards/margins": gap(rewards_PC), "rewards/accuracies": gap(rewards_PC) > 1e-4}
    if config.loss_type not in REFERENCE_FREE:  # 1e-3 nats, and 1e-4 above, are more than float32's rounding
        numbers["logps/chosen_fell"] = logps_PC[:, 0] < reference_PC[:, 0] - 1e-3
    return losses_P.sum() / n_pairs, {name: value_P.sum() / n_pairs for name, value_P in numbers.items()}


# --- rollouts ---


class Pair(NamedTuple):
    """Two completions of one prompt as token ids, with the token that ends a turn (a single step may have none)."""

    prompt: list
    chosen: list
    rejected: list  # empty in a cold start, which trains on `chosen` alone
    level: int = 0
    values: tuple = (0.0, 0.0)  # chance of a right answer after chosen and after rejected, for step_apo


class Attempt(NamedTuple):
    """A sampled completion and its verdict."""

    ids: list
    right: bool  # its end was reached and the answer is right


def sample_attempts(decoder, tokenizer, problems, prompts, starts, number, config, world):
    """--num_generations ways to go on from each prompt and start of a completion: for each a list of Attempts.

    `starts` are token ids, [] for a whole completion; an Attempt holds what comes after, its verdict is on the whole.
    The prompts are shared out over the processes, every process returns all. Random numbers belong to (seed, number,
    prompt, sample), so the same comes out however many processes there are; `number` must differ from call to call.
    """
    mine = range(world.rank, len(prompts), world.size)
    rollouts = generate(decoder, tokenizer, [prompts[i] + starts[i] for i in mine], config.num_generations,
                        config.max_completion_length, config.temperature, seed=[config.seed, number],
                        batch_size=config.generation_batch_size, keys=mine,
                        progress=sys.stderr.isatty() and world.rank == 0)
    groups = [[] for _ in mine]
    for row, finished in enumerate(rollouts.finished_R.tolist()):
        k, ids = row // config.num_generations, rollouts.ids(row)
        right = finished and verify(tokenizer.decode(starts[mine[k]] + ids[:-1]), problems[mine[k]].answer)
        groups[k].append(Attempt(ids, right))
    parts = [groups] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, groups)
    return [parts[i % world.size][i // world.size] for i in range(len(prompts))]


def distinct(lists):
    """The lists without repeats, in their order."""
    return [list(ids) for ids in dict.fromkeys(map(tuple, lists))]


def answer_pairs(groups, prompts, number, config):
    """Whole completions, right against wrong, at most --pairs_per_prompt of each prompt and no two alike."""
    pairs = []
    for i, group in enumerate(groups):
        right, wrong = (distinct(a.ids for a in group if a.right is verdict) for verdict in (True, False))
        picked = np.random.default_rng([config.seed, number, i]).permutation(len(right) * len(wrong))
        pairs += [Pair(prompts[i], right[k // len(wrong)], wrong[k % len(wrong)])
                  for k in picked[: config.pairs_per_prompt].tolist()]
    return pairs


@dataclass
class Search:
    """The hunt for the first wrong step of one wrong completion: right answers still come after `low` steps, and none
    came after `high`."""

    problem: int
    ids: list
    ends: list  # where it ends after 0, 1, ... steps
    tries: list  # Attempts made after `low` steps
    low: int
    high: int

    def start(self, n_steps):
        return self.ids[: self.ends[n_steps]]


def step_ends(ids, tokenizer, separator):
    """Where each step of a completion ends: after a token whose text holds the separator, and at the completion's end.

    Tokens are never cut. A separator that takes several tokens is found by the token that completes it.
    """
    ends, begin = [], 0
    for i in range(len(ids) - 1):
        if separator in tokenizer.decode(ids[begin : i + 1]):
            ends.append(i + 1)
            begin = i + 1
    return ends + [len(ids)]


def find_first_wrong_steps(groups, tokenizer, sample, config):
    """Binary search, all completions side by side, for the step after which right answers stop coming: Searches.

    Of each group at most --pairs_per_prompt wrong Attempts are searched, and only where others were right.
    sample(problem indices, starts) returns Attempts. Source: OmegaPRM 2406.06592, without its tree.
    """
    searches = []
    for i, group in enumerate(groups):
        if any(attempt.right for attempt in group):
            for ids in distinct(attempt.ids for attempt in group if not attempt.right)[: config.pairs_per_prompt]:
                ends = [0, *step_ends(ids, tokenizer, config.step_separator)]
                searches.append(Search(i, ids, ends, group, low=0, high=len(ends) - 1))
    while going := [search for search in searches if search.high - search.low > 1]:
        middles = [(search.low + search.high) // 2 for search in going]
        found = sample([search.problem for search in going], [s.start(middle) for s, middle in zip(going, middles)])
        for search, middle, tries in zip(going, middles, found):
            if any(attempt.right for attempt in tries):
                search.low, search.tries = middle, tries
            else:
                search.high = middle
    return searches


def step_pairs(groups, prompts, tokenizer, sample, config):
    """Single steps in the same state: the first wrong one of a wrong completion against one that led to a right answer.

    For step_apo the values are measured: the share of right answers among continuations after the chosen step; after
    the rejected one none came, which is how it was found.
    """
    pairs, after = [], []  # after: the problem and the start that the chosen step leads to; None: it was the last step
    for search in find_first_wrong_steps(groups, tokenizer, sample, config):
        state = search.start(search.low)
        rejected = search.start(search.high)[len(state) :]
        for ids in (attempt.ids for attempt in search.tries if attempt.right):
            chosen = ids[: step_ends(ids, tokenizer, config.step_separator)[0]]
            if chosen != rejected:  # equal: found wrong by bad luck, a right completion took it too
                pair = Pair(prompts[search.problem] + state, chosen, rejected, values=(1.0, 0.0))
                if pair not in pairs:
                    pairs.append(pair)
                    after.append((search.problem, state + chosen) if len(chosen) < len(ids) else None)
                break
    if config.loss_type == "step_apo":
        going = [k for k, place in enumerate(after) if place]
        found = sample([after[k][0] for k in going], [after[k][1] for k in going])
        for k, tries in zip(going, found):
            pairs[k] = pairs[k]._replace(values=(sum(attempt.right for attempt in tries) / len(tries), 0.0))
    return pairs


def sample_pairs(decoder, tokenizer, problems, prompts, number, config, world):
    """Pairs from the policy's own completions of these prompts, and the numbers logged about them.

    Sampled ids are trained as they are, never decoded and tokenised again.
    """
    calls = []  # prompts of each call of the sampler

    def sample(owners, starts):
        calls.append(len(owners))
        return sample_attempts(decoder, tokenizer, [problems[i] for i in owners], [prompts[i] for i in owners], starts,
                               1000 * number + len(calls), config, world)

    groups = sample(range(len(prompts)), [[]] * len(prompts))
    if config.pairs == "steps":
        pairs = step_pairs(groups, prompts, tokenizer, sample, config)
    else:
        pairs = answer_pairs(groups, prompts, number, config)
    right_P = np.array([np.mean([attempt.right for attempt in group]) for group in groups])
    return pairs, {"reward": float(right_P.mean()), "frac_mixed": float(((0 < right_P) & (right_P < 1)).mean()),
                   "num_pairs": len(pairs), "rollouts": sum(calls) * config.num_generations}


# --- rounds ---


def cold_steps(config):
    """Optimizer steps of the cold start: it gets the same share of the steps as of the examples."""
    return round(config.sft_fraction * config.max_steps)


def phase_of(step, config):
    """(the flags in force at this step, steps since its phase began): the cold start is a run of its own."""
    cold = cold_steps(config)
    if step < cold:
        return replace(config, loss_type="sft", learning_rate=config.sft_learning_rate, max_steps=cold), step
    return replace(config, max_steps=config.max_steps - cold), step - cold


def at_rate(rate, config):
    """The flags of a step at just this learning rate."""
    return replace(config, learning_rate=rate, lr_scheduler_type="constant", warmup_steps=0.0)


def round_of(step, config):
    """(the number of the round that a step belongs to, its first step); round 0 is the cold start."""
    cold, every = cold_steps(config), 0 if config.pairs == "offline" else config.resample_steps
    if step < cold:
        return 0, 0
    number = (step - cold) // every if every else 0
    return 1 + number, cold + number * every


def n_open(n, step, config):
    """How many of n rows, sorted by level, are open at a step: from a fifth up to all (after iTool 2501.09766)."""
    end = config.easy_to_hard * config.max_steps
    return n if step >= end else max(1, round(n * (0.2 + 0.8 * step / end)))


class Round(NamedTuple):
    """Pairs in use, and their log-probs under the policy at the time when they came into use: the reference."""

    pairs: list
    reference_PC: torch.Tensor

    def text(self, sampled):
        """All of it as one line of JSON, for a checkpoint; pairs that were not sampled are left out.

        A float32 is written as the decimal of its float64, from which the same float32 comes back.
        """
        return json.dumps([self.pairs if sampled else [], self.reference_PC.tolist()], separators=(",", ":"))


def restored_round(text, pairs):
    """The Round that Round.text wrote; where it holds no pairs they are these."""
    sampled, reference_PC = json.loads(text)
    sampled = [Pair(*parts, tuple(values)) for *parts, values in sampled]
    return Round(sampled or pairs, torch.tensor(reference_PC))


def begin_round(data, before, step, decoder, policy, tokenizer, config, world):
    """(the Round that begins at this step, numbers to log about it).

    Where the policy answers every prompt all right or all wrong, the round before goes on; RunError where none is.
    """
    (number, _), (flags, _) = round_of(step, config), phase_of(step, config)
    pairs, about = data.pairs if number else data.cold, {}
    if number and config.pairs != "offline":
        refresh(decoder, policy)
        n = n_open(len(data.problems), step, config)
        picked = rows_of_step(n, min(config.round_prompts, n), number, config.seed)
        print(f"round {number} of pairs: sampling {config.num_generations} completions of each of {len(picked)} "
              "prompts", flush=True)
        pairs, about = sample_pairs(decoder, tokenizer, [data.problems[i] for i in picked],
                                    [data.prompts[i] for i in picked], number, config, world)
        if not pairs:
            fault = f"step {step + 1}: of {len(picked)} prompts none gave a pair: " + (
                "all completions were right" if about["reward"] == 1 else "no right one and a wrong one to compare")
            if number == 1:
                raise RunError(fault)
            if world.rank == 0:
                print(f"warning, {fault}; the pairs before them are used again", file=sys.stderr)
            return before, about
    if flags.loss_type in REFERENCE_FREE:
        return Round(pairs, torch.zeros(len(pairs), 2)), about
    return Round(pairs, reference_logps(policy, pairs, config, world)), about


def write_pairs(log, step, pairs, data, tokenizer):
    """Adds a round's pairs to pairs.jsonl, in the order that bad_steps.jsonl counts in and `--pairs offline` reads.

    The texts are those of the tokens, without what ends a turn; the prompt is the data's, unless it goes on into an
    answer, as those of --pairs steps do.
    """
    asked = {tuple(ids): problem.prompt for ids, problem in zip(data.prompts, data.problems)}
    end = end_of_turn(tokenizer)
    for pair in pairs:
        texts = tokenizer.batch_decode([ids[:-1] if ids[-1:] == [end] else ids for ids in pair[:3]],
                                       clean_up_tokenization_spaces=False)
        line = dict(zip(("prompt", "chosen", "rejected"), texts))
        log.add("pairs", {"step": step + 1, **line, "prompt": asked.get(tuple(pair.prompt), texts[0])})


# --- data ---


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


def checked(row, name, kinds, where):
    """row[name], which must be of these kinds (str: a text, list: messages with a role and a content); InputError."""
    value = row[name]
    texts = [message.get(key) if isinstance(message, dict) else None for message in value
             for key in ("role", "content")] if isinstance(value, list) else [value]
    if not isinstance(value, kinds) or not texts or not all(isinstance(text, str) for text in texts):
        wanted = {str: "text", list: "messages with a role and a content"}
        raise InputError(f"{where}: {name} must be {' or '.join(wanted[kind] for kind in kinds)}")
    return value


def split_chats(prompt, chosen, rejected, where):
    """Messages up to the last one, which alone may differ, and the two last ones as text; InputError otherwise."""
    if prompt is not None and chosen[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        chosen, rejected = prompt + chosen, prompt + rejected
    *context, last = chosen
    if not context or rejected[:-1] != context or {last["role"], rejected[-1]["role"]} != {"assistant"}:
        raise InputError(f"{where}: chosen and rejected must be one conversation of two messages or more in which only "
                         "the assistant's last one differs")
    return context, last["content"], rejected[-1]["content"]


def split_texts(chosen, rejected):
    """The prompt that two texts begin with, and what follows it in each.

    White space at its end goes to the completions, where most tokenizers want it; so does a word begun in common after
    white space.

    >>> split_texts("The sky is blue.", "The sky is black.")
    ('The sky is', ' blue.', ' black.')
    """
    prompt = os.path.commonprefix([chosen, rejected])
    prompt = prompt[: re.search(r"(\s+\S*)?\Z", prompt).start()]
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def row_pair(tokenizer, row, prompt_template, where):
    """The Pair of a row in any of TRL's preference formats: text or chat, the prompt in its own column or shared."""
    if not {"chosen", "rejected"} <= row.keys():
        raise InputError(f"{where}: has columns {sorted(row)}; --pairs offline wants chosen and rejected, and prompt "
                         "unless they begin with it")
    chosen, rejected = (checked(row, name, (str, list), where) for name in ("chosen", "rejected"))
    prompt = None if row.get("prompt") is None else checked(row, "prompt", (str, list), where)
    if type(chosen) is not type(rejected):
        raise InputError(f"{where}: chosen and rejected must both be text or both be messages")
    if isinstance(chosen, list):
        prompt, chosen, rejected = split_chats(prompt, chosen, rejected, where)
    elif prompt is None:
        prompt, chosen, rejected = split_texts(chosen, rejected)
    prompt = fill_template(prompt_template, prompt) if prompt else prompt
    (prompt_ids, chosen_ids), (_, rejected_ids) = (turn(tokenizer, prompt, text) for text in (chosen, rejected))
    if not prompt_ids:
        raise InputError(f"{where}: the prompt is empty")
    level = re.search(r"\d+", str(row.get("level", "")))
    return Pair(prompt_ids, chosen_ids, rejected_ids, int(level.group()) if level else 0)


def load_train_problems(config, error_rate=0.0):
    """The problems of --dataset_name to train on; error_rate spoils that share of the steps in `chain`'s solutions."""
    return load_problems(config.dataset_name, config.dataset_train_split, config.n_train or None, config.seed,
                         levels=config.levels, domains=config.domains, error_rate=error_rate,
                         prompt_column=config.prompt_column, answer_column=config.answer_column,
                         prompt_template=config.prompt_template)


def load_pair_rows(config):
    """Rows with prompt, chosen and rejected. `chain` pairs right solutions with ones that have wrong steps."""
    if config.dataset_name != "chain":
        return read_rows(config.dataset_name, config.dataset_train_split)[: config.n_train or None]
    right, spoiled = load_train_problems(config), load_train_problems(config, config.error_rate)
    return [{"prompt": a.prompt, "chosen": a.solution, "rejected": b.solution, "level": a.level}
            for a, b in zip(right, spoiled) if not verify(b.solution, a.answer)]


def make_pairs(rows, tokenizer, config):
    """Every row's Pair; those over --max_length, and those without a difference, are left out, and said to be."""
    where = f"--dataset_name {config.dataset_name}: row"
    pairs = [row_pair(tokenizer, row, config.prompt_template, f"{where} {i + 1}") for i, row in enumerate(rows)]
    different = [pair for pair in pairs if pair.chosen != pair.rejected]
    kept = [pair for pair in different
            if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= config.max_length]
    if len(kept) < len(pairs):
        print(f"of {len(pairs)} pairs {len(pairs) - len(different)} have no difference and "
              f"{len(different) - len(kept)} are longer than --max_length {config.max_length}: left out", flush=True)
    if not kept:
        raise InputError(f"--max_length {config.max_length}, --dataset_name {config.dataset_name}: no pair is left")
    return kept


def cold_start_pairs(problems, tokenizer):
    """The solutions of problems, as pairs that have no rejected completion."""
    if not all(problem.solution for problem in problems):
        raise InputError("--sft_fraction: these problems have no worked solutions for a cold start")
    return [Pair(*turn(tokenizer, problem.prompt, problem.solution), [], problem.level) for problem in problems]


class Data(NamedTuple):
    """What a run trains on, sorted by level where --easy_to_hard asks for it."""

    cold: list  # Pairs of the cold start, without rejected completions
    pairs: list  # offline Pairs
    problems: list  # to sample from
    prompts: list  # their token ids


def load_examples(config):
    """What --pairs trains on: rows of pairs, or problems to sample from."""
    return load_pair_rows(config) if config.pairs == "offline" else load_train_problems(config)


def make_data(examples, tokenizer, config):
    """Data as --pairs and --sft_fraction have it; the first sft_fraction of the examples are the cold start's."""
    if config.pairs == "offline":
        pairs, problems = make_pairs(examples, tokenizer, config)[: config.budget or None], []
        if len(pairs) < config.budget:
            raise InputError(f"--budget {config.budget}: --dataset_name {config.dataset_name} gives {len(pairs)} pairs")
        n_cold = round(config.sft_fraction * len(pairs))
        cold, pairs = [pair._replace(rejected=[]) for pair in pairs[:n_cold]], pairs[n_cold:]
    else:
        pairs, problems = [], examples
        if len(problems) < config.budget:
            raise InputError(f"--budget {config.budget}: --dataset_name {config.dataset_name} has {len(problems)} "
                             "problems")
        n_cold = round(config.sft_fraction * len(problems))
        cold, problems = cold_start_pairs(problems[:n_cold], tokenizer), problems[n_cold:]
    if config.easy_to_hard:
        cold, pairs, problems = (sorted(part, key=lambda item: item.level) for part in (cold, pairs, problems))
        if not any(item.level for item in cold + pairs + problems):
            raise InputError(f"--easy_to_hard: --dataset_name {config.dataset_name} has no levels")
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    longest = max((len(prompt) for prompt in [*prompts, *(pair.prompt for pair in cold)]), default=0)
    if config.pairs != "offline" and longest > config.max_prompt_length:
        raise InputError(f"--max_prompt_length {config.max_prompt_length}: a prompt of --dataset_name "
                         f"{config.dataset_name} has {longest} tokens")
    return Data(cold, pairs, problems, prompts)


def check_phases(data, config):
    """InputError where --sft_fraction leaves one of the two phases without examples or without steps."""
    steps, rest = cold_steps(config), data.pairs or data.problems
    possible = bool(data.cold and steps), bool(rest and steps < config.max_steps)
    if possible != (config.sft_fraction > 0, config.sft_fraction < 1):
        raise InputError(f"--sft_fraction {config.sft_fraction}: one of the two phases has no examples or no steps")


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


class PairBatch(NamedTuple):
    """The tensors of one forward. A line holds a prompt and the completions that continue it, one after the other."""

    ids_BS: torch.Tensor  # token ids without each completion's last, from which nothing is predicted; right-padded
    positions_BS: torch.Tensor  # where each token stands in its own sequence: completions begin at the same place
    mask_B1SS: torch.Tensor | None  # bool: may query see key? None: all that stands before it
    where_N: torch.Tensor  # the flat place in ids_BS that each trained token is predicted from
    targets_N: torch.Tensor  # the trained tokens
    slots_N: torch.Tensor  # where each belongs in [P, C, longest completion], flattened
    rows: list  # the index of each pair in its step
    longest: int  # tokens of the longest completion


def line_tokens(pair, share_prefix):
    """What a pair costs in a forward, in tokens."""
    read = [max(0, len(ids) - 1) for ids in pair[1:3]]
    return len(pair.prompt) + sum(read) if share_prefix else 2 * (len(pair.prompt) + max(read))


def collate_pairs(pairs, rows, share_prefix, device):
    """One forward's tensors from its rows (indices into `pairs`); no row at all gives one that trains nothing.

    With share_prefix a pair is one line whose completions do not see each other, else a line each, where no mask is
    needed: nothing before a pad can see it.
    """
    lines, where, targets, slots = [], [], [], []  # lines: (token ids, their positions, the side each belongs to)
    longest = max([1, *(len(ids) for row in rows for ids in pairs[row][1:3])])
    for i, row in enumerate(rows):
        prompt, *completions = pairs[row][:3]
        for sides in ([0, 1],) if share_prefix else ([0], [1]):
            ids, positions, owners = list(prompt), list(range(len(prompt))), [0] * len(prompt)
            for side in sides:
                completion, first = completions[side], (2 * i + side) * longest
                n_read = max(0, len(completion) - 1)  # from its last token nothing is predicted
                places = [len(prompt) - 1, *range(len(ids), len(ids) + n_read)][: len(completion)]
                where += [(len(lines), place) for place in places]
                targets += completion
                slots += range(first, first + len(completion))
                ids = ids + completion[:-1]
                positions += range(len(prompt), len(prompt) + n_read)
                owners += [1 + side] * n_read
            lines.append((ids, positions, owners))
    lines = lines or [([0], [0], [0])]
    width = max(len(ids) for ids, _, _ in lines)
    ids_BS, positions_BS, owner_BS = torch.tensor(
        [[part + [0] * (width - len(part)) for part in line] for line in lines], device=device).unbind(1)
    mask_B1SS = None
    if share_prefix:
        key_B1S, query_BS1 = owner_BS[:, None], owner_BS[:, :, None]
        before_SS = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        mask_B1SS = (((key_B1S == 0) | (key_B1S == query_BS1)) & before_SS)[:, None]
    where = [line * width + place for line, place in where]
    where_N, targets_N, slots_N = (torch.tensor(x, dtype=torch.long, device=device) for x in (where, targets, slots))
    return PairBatch(ids_BS, positions_BS, mask_B1SS, where_N, targets_N, slots_N, list(rows), longest)


# --- model ---


class PairPolicy(nn.Module):
    """A causal language model whose forward ends in log-probs, so that FSDP sees every parameter it uses."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        """Log-probs of both completions of each pair, summed over their tokens: float32 [P, C]."""
        places = {} if batch.mask_B1SS is None else {"attention_mask": batch.mask_B1SS,
                                                     "position_ids": batch.positions_BS}
        hidden_BSD = self.model.base_model(input_ids=batch.ids_BS, use_cache=False, **places).last_hidden_state
        hidden_ND = hidden_BSD.flatten(0, 1)[batch.where_N]
        weight_VD = self.model.get_output_embeddings().weight
        logps_N, _ = linear_logps(hidden_ND, weight_VD, batch.targets_N, entropy=False, softcap=softcap(self.model))
        logps_PCT = logps_N.new_zeros(len(batch.rows), 2, batch.longest)  # index_add has no fixed order on a GPU
        return logps_PCT.flatten().index_copy(0, batch.slots_N, logps_N).view_as(logps_PCT).sum(-1)


def can_share_prefix(model):
    """Does the model take a mask of who sees whom? Not with sliding windows, recurrent layers, or other attention."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config._attn_implementation == "sdpa" and kinds == {"full_attention"} and not (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


@torch.no_grad()
def reference_logps(policy, pairs, config, world):
    """Log-probs of every pair under the policy as it now stands: float32 [P, C] on the CPU, on every process."""
    policy.eval()  # the reference has no dropout
    found_PC = torch.zeros(len(pairs), 2, device=world.device)
    parts = micro_batches([line_tokens(pair, config.share_prefix) for pair in pairs],
                          config.per_device_train_batch_size, config.micro_batch_tokens, world)
    for part in parts:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
            found_PC[part] = policy(collate_pairs(pairs, part, config.share_prefix, world.device))
    if world.size > 1:
        dist.all_reduce(found_PC)
    policy.train()
    return found_PC.cpu()


def show_pair(pair, tokenizer):
    """Prints a pair as it is trained on, special tokens included."""
    texts = (tokenizer.decode(ids, skip_special_tokens=False) for ids in pair[:3])
    print("the first pair\n  prompt:   {!r}\n  chosen:   {!r}\n  rejected: {!r}".format(*texts), flush=True)


# --- main ---


def check_config(config):
    """Raises InputError for flags of this script that cannot be meant together; fills in what depends on others."""
    if not config.temperature > 0:
        raise InputError(f"--temperature {config.temperature}: must be above 0 (at 0 all completions are equal)")
    if not config.step_separator:
        raise InputError("--step_separator: must not be empty")
    if config.label_smoothing and config.loss_type != "sigmoid":
        raise InputError(f"--label_smoothing {config.label_smoothing}: only for --loss_type sigmoid")
    if config.loss_type == "step_apo" and config.pairs != "steps":
        raise InputError("--loss_type step_apo: needs the values that --pairs steps measures")
    if config.num_train_epochs and config.pairs != "offline":
        raise InputError(f"--num_train_epochs {config.num_train_epochs}: only with --pairs offline")
    if config.easy_to_hard and config.pairs != "offline" and not config.resample_steps:
        raise InputError("--easy_to_hard: with --resample_steps 0 the one round would hold the easiest fifth alone")
    config.beta = config.beta or USUAL_BETA[config.loss_type]
    if config.pairs != "offline":  # offline the budget counts pairs, of which a row may give none
        config.n_train = config.budget or config.n_train


SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "logps/chosen_fell",
         "reward", "eval/accuracy")  # on the screen


def main(config):
    check_config(config)
    world = start(config)

    # what was asked for, and the checkpoint to go on from
    examples, eval_problems = load_examples(config), load_eval_problems(config)
    args, resume = on_rank_0(lambda: open_run(config, examples, world), world)
    if args["finished"]:
        return
    model, tokenizer = load_model(str(resume or config.model_name_or_path), chat_template=config.chat_template)
    small = model.num_parameters() < 10_000_000
    config.learning_rate = config.learning_rate or (2e-5 if small else 1e-6)
    config.sft_learning_rate = config.sft_learning_rate or (3e-3 if small else 2e-5)
    config.share_prefix = config.share_prefix and can_share_prefix(model)

    # the pairs and prompts to train on
    data = make_data(examples, tokenizer, config)
    if config.num_train_epochs:
        config.max_steps = math.ceil(config.num_train_epochs * len(data.cold + data.pairs) / args["rows_per_step"])
    check_phases(data, config)
    run, log, stop = Path(config.output_dir), Log(args, resume, model, config, world), stop_signals()

    # the policy that learns, and a copy of it that samples
    decoder = make_decoder(model, config, world)
    policy = shard(PairPolicy(model.train()), config, world)
    optimizer = make_optimizer(policy, config)
    state, current = {"step": 0, "bad_steps": 0, "about": {}, "rollouts": 0}, None
    if resume:
        state = load_checkpoint(resume, moments(policy, optimizer), world)
        current = restored_round(state["round"], data.pairs if state["step"] > cold_steps(config) else data.cold)
    if eval_problems and config.eval_on_start and state["step"] == 0:
        refresh(decoder, policy)
        log.step(0, eval_numbers(decoder, tokenizer, eval_problems, 0, log, config), SHOWN)

    while state["step"] < config.max_steps:
        began, step = time.perf_counter(), state["step"]
        flags, since = phase_of(step, config)
        number, first = round_of(step, config)
        sampled = number > 0 and config.pairs != "offline"

        # where a round begins: its pairs, and their log-probs under the policy as it now stands
        if step == first:
            current, about = begin_round(data, current, step, decoder, policy, tokenizer, config, world)
            state["rollouts"] += about.get("rollouts", 0)
            state["about"] = about and {**about, "rollouts": state["rollouts"]}
            state["round"] = current.text(sampled)
            if about.get("num_pairs"):
                write_pairs(log, step, current.pairs, data, tokenizer)

        # where a phase begins: the moments of the optimizer are those of another loss
        if since == 0:
            optimizer.state.clear()
            show_pair(current.pairs[0], tokenizer)

        # the pairs of this step, a function of its number alone
        n = len(current.pairs) if sampled else n_open(len(current.pairs), step, config)
        indices = rows_of_step(n, args["rows_per_step"], step - first, config.seed + 1_000_003 * number)
        chosen, reference_PC = [current.pairs[i] for i in indices], current.reference_PC[indices]

        # forwards of pairs of like length, and one optimizer step; each phase has a learning rate schedule of its own
        lengths = [line_tokens(pair, config.share_prefix) for pair in chosen]
        parts = micro_batches(lengths, config.per_device_train_batch_size, config.micro_batch_tokens, world)
        batches = [collate_pairs(chosen, part, config.share_prefix, world.device) for part in parts]

        def loss_of(policy, batch):
            return pair_batch_loss(policy, batch, chosen, reference_PC, len(chosen), flags)

        rate = learning_rate(since, flags)
        numbers, taken = train_step(policy, optimizer, batches, loss_of, step, at_rate(rate, flags), world)
        log.count(state, taken, indices)
        numbers = {**state["about"], **numbers}

        # evaluate, log, save
        last, seconds = state["step"] == config.max_steps, time.perf_counter() - began
        if eval_problems and (last or state["step"] % config.eval_steps == 0):
            refresh(decoder, policy)
            numbers |= eval_numbers(decoder, tokenizer, eval_problems, state["step"], log, config)
        log.step(state["step"], numbers, SHOWN, sum(lengths), seconds)
        [stopping] = total([len(stop)], world)
        if last or stopping or (config.save_steps and state["step"] % config.save_steps == 0):
            save_checkpoint(run, state, policy, tokenizer, moments(policy, optimizer), world)
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
