r"""Cold start: supervised fine-tuning of a language model on worked solutions.

    loss = - sum over trained tokens of log p(token | everything before it) / number of trained tokens in the step

Trained tokens are the solution (the assistant's turns) and the token that ends each turn; prompts never are. The
divisor spans the whole optimizer step over all processes, so the flags about memory change memory and speed, never
the gradient. Against TRL's SFTTrainer: `messages` train the assistant's turns alone; each turn is trained
in exactly the context that sampling would give it; an example over --max_length is left out and counted instead of
cut short; rows are sorted by length into micro-batches, right-padded and unmasked (a causal model never looks
right, so padding needs no mask and attention takes its fastest path); only trained positions meet the output head.

--loss_type weighs that log-probability token by token (dco, dco_step, dco_a, entropy) or replaces the softmax in it
(stablemax); each weight is a function of one row, so memory flags stay just that. --lora_rank trains adapters.

Dimensions: B sequences · T tokens · S = T - 1 predicting positions · V vocabulary · D model width · N trained tokens ·
O, I a matrix's outputs and inputs · R the rank of an adapter.

    python sft.py                                     # 0.6 M parameters, arithmetic chains, no network: 2.5 minutes
    python sft.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name openai/gsm8k --dataset_test_split test \
        --output_dir runs/sft-qwen --learning_rate 1e-5 --max_steps 300 --per_device_train_batch_size 32  # one GPU
    torchrun --nproc-per-node 8 sft.py ...                                                # several GPUs
"""

import copy
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
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
from torch.utils.checkpoint import checkpoint

from eval import (InputError, Log, ProblemFlags, RunError, RunFlags, chat_text, encode_prompt, end_of_turn,
                  eval_numbers, fill_template, flag, generate, keep_checkpoint, launch, leave, load_eval_problems,
                  load_model, load_problems, newest_checkpoint, open_run, publish, read_rows, softcap, stop_signals,
                  verify)
from kernels import linear_logps

# --- config ---


@dataclass
class Config(ProblemFlags, RunFlags):
    SECTIONS = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "the run's folder",
                "loss_type": "loss", "select": "choice of data", "lora_rank": "adapters, going on with training",
                "per_device_train_batch_size": "optimizer and memory", "logging_steps": "logs, evaluation, checkpoints"}

    model_name_or_path: str = flag("tiny", "a hub name, a local folder, or `tiny`: 0.6 M random weights, built in")
    error_rate: float = flag(0.15, "`chain`: share of steps that are wrong in the solutions: an imperfect teacher")
    output_dir: str = flag("runs/sft", "the run's folder: model, args.json, metrics.jsonl, curves.png, checkpoints/",
                           free=True)
    loss_type: str = flag("nll", "nll, dco, dco_step, dco_a, entropy or stablemax",
                          choices=("nll", "dco", "dco_step", "dco_a", "entropy", "stablemax"))
    dco_n: int = flag(16, "dco: the N of the pass@N to be reached; dco_step: how many ways each step will be tried",
                      low=1)
    step_separator: str = flag(";", "text that ends a step of a solution, for dco_step and thought_budgets")
    num_generations: int = flag(8, "completions per prompt, from which dco_a and select take a pass rate: G", low=1)
    entropy_keep: float = flag(0.8, "entropy: share of each row's trained tokens that is kept", low=0, high=1)
    entropy_discount: float = flag(0.8, "entropy: kept are the largest of -log p - this x entropy", low=0)
    perp_grad: bool = flag(False, "drop the part of each matrix's gradient that only changes the matrix's length")
    select: str = flag("all", "problems by the given model's pass rate: hard, uniform or easy ones; all: as they come",
                       choices=("all", "hard", "uniform", "easy"))
    select_pool: int = flag(0, "problems that select takes n_train from; 0: four times n_train", low=0)
    thought_budgets: list[float] = flag([], "shares of a solution's steps, such as 1 0.5; a row is cut to one of them "
                                            "and its prompt begins with it: [50%%]", low=0, high=1)
    lora_rank: int = flag(0, "train adapters of this rank beside the frozen linear layers; 0: train all weights", low=0)
    lora_init: str = flag("gaussian", "gaussian, pissa or lora_sb", choices=("gaussian", "pissa", "lora_sb"))
    rewarm: str = flag("off", "going on after a cosine: keep a tenth of learning_rate, or rise to half or full again",
                       choices=("off", "keep", "half", "full"))
    replay_from: str = flag("", "earlier data to mix in: the folder of the run that used it, or a data set")
    replay_share: float = flag(0.0, "share of each step's rows that comes from replay_from", low=0, high=1)
    max_steps: int = flag(700, "optimizer steps", low=1)
    num_train_epochs: float = flag(0.0, "passes over the data; above 0 it decides instead of max_steps", low=0)
    learning_rate: float = flag(0.0, "peak rate; 0: 3e-3 under 10 M parameters, above 2e-5 (TRL's), adapters 2e-4",
                                low=0)
    lr_scheduler_type: str = flag("cosine", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: float = flag(0.03, "steps of linear warm-up; below 1: this share of all steps", low=0)
    max_length: int = flag(1024, "tokens; longer examples are left out and counted (TRL cuts them short)", low=2)
    logging_steps: int = flag(10, "print a line every so many steps; metrics.jsonl has every step", low=1, free=True)
    eval_steps: int = flag(350, "evaluate (greedy) every so many steps and at the end; 0: never", low=0)
    save_steps: int = flag(100, "checkpoint every so many steps; 0: only when stopped and at the end", low=0, free=True)


# --- loss ---


def nll_loss(logps_BS, mask_BS, n_tokens):
    """Negative log-likelihood in nats, summed over trained tokens / n_tokens, the count of the whole optimizer step."""
    return -(logps_BS * mask_BS).sum() / n_tokens


def dco_factor(logp, n):
    """What direct coverage optimisation leaves of the gradient of log p: N p (1-p)^(N-1) / (1 - (1-p)^N), in 0..1.

    It turns the gradient of -log p into that of -log(1 - (1-p)^N), the chance that N samples all miss. logp in nats, of
    any shape; float64, without gradient. 1 for N = 1 or N p near 0, then falling: about 0.6 at p = 1/N, 0 at p = 1.
    Source: 2502.07154, the factor F(N, p).
    """
    logp = logp.detach().double().clamp(-700, -1e-12)  # beyond, p or 1 - p would round to 0
    log_miss = torch.log1p(-logp.exp())
    return (math.log(n) + (n - 1) * log_miss + logp - torch.log(-torch.expm1(n * log_miss))).exp()


def dco_weights(logps_BS, steps_BS, n):
    """dco_factor for each token, p being the probability of its whole step; steps_BS numbers a row's steps from 0.

    Untrained places have log-prob 0 and so belong anywhere. With one step a row, p is that of the whole solution.
    """
    totals_BS = torch.zeros_like(logps_BS).scatter_add(1, steps_BS, logps_BS.detach())  # column k: step k
    return dco_factor(totals_BS, n).to(logps_BS).gather(1, steps_BS)


def entropy_weights(logps_BS, entropy_BS, mask_BS, n_kept_B1, discount):
    """1 for each row's n_kept trained tokens with the largest -log p - discount x entropy, 0 for the others.

    Left out are tokens that the model ranks high while it keeps alternatives open: to train them would mostly cost
    entropy. No gradient. By row (the authors', by a batch of one): which other rows are in the forward has no effect.
    Source: 2508.03178 (Light-IF), Entropy-SFT.
    """
    scores_BS = (-logps_BS - discount * entropy_BS).detach().masked_fill(~mask_BS, -torch.inf)
    ranks_BS = scores_BS.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ((ranks_BS < n_kept_B1) & mask_BS).to(logps_BS)


def stablemax_rows(hidden_BD, weight_VD, targets_B, cap):
    """log(s(z_y) / sum_j s(z_j)) for logits z = hidden @ weight^T, s(z) = z + 1 or 1 / (1 - z) below 0, in float64.

    s(z) = exp(u) with u = sign(z) log(1 + |z|), so this is a log-softmax of u. Source: 2501.04697, StableMax.
    """
    with torch.autocast(hidden_BD.device.type, enabled=False):
        z_BV = (hidden_BD.float() @ weight_VD.float().T).double()
    z_BV = z_BV if cap is None else cap * torch.tanh(z_BV / cap)
    u_BV = torch.where(z_BV >= 0, z_BV.clamp(min=0).log1p(), -(-z_BV).clamp(min=0).log1p())  # slope 1 at 0, too
    return u_BV.log_softmax(-1).gather(1, targets_B[:, None])[:, 0].float()


def stablemax_forward(policy, batch, entropy=False):
    """Policy.forward with StableMax for softmax: (logps_BS, None). Of the [N, V] logits there are 8 M at a time."""
    hidden_BSD = policy.model.base_model(input_ids=batch.ids_BT[:, :-1], use_cache=False).last_hidden_state
    hidden_ND, targets_N = (x.flatten(0, 1)[batch.where_N] for x in (hidden_BSD, batch.ids_BT[:, 1:]))
    weight_VD, cap = policy.model.get_output_embeddings().weight, softcap(policy.model)
    rows = max(1, 2**23 // len(weight_VD))
    parts = [checkpoint(stablemax_rows, h_BD, weight_VD, t_B, cap, use_reentrant=False)
             for h_BD, t_B in zip(hidden_ND.split(rows), targets_N.split(rows))]
    B, S = batch.mask_BS.shape
    return hidden_ND.new_zeros(B * S).float().index_copy(0, batch.where_N, torch.cat(parts)).view(B, S), None


def batch_loss(policy, batch, notes, n_tokens, config):
    """A forward's share of the step's loss by --loss_type, and of the numbers logged.

    `notes` holds a list for each row of the step: dco and dco_step the numbers of its steps, as many as there are
    predicted tokens; dco_a its pass rate; entropy how many of its tokens are kept.
    """
    logps_BS, entropy_BS = policy(batch, entropy=config.loss_type == "entropy")
    nll = nll_loss(logps_BS, batch.mask_BS, n_tokens)
    if notes is None:
        return nll, {}
    own = [torch.tensor(notes[row]) for row in batch.rows] or [torch.tensor([0])]
    notes_BX = nn.utils.rnn.pad_sequence(own, batch_first=True).to(logps_BS.device)
    if config.loss_type == "entropy":
        weights_BS = entropy_weights(logps_BS, entropy_BS, batch.mask_BS, notes_BX, config.entropy_discount)
        numbers = {"entropy": (entropy_BS.detach() * weights_BS).sum() / n_tokens}
    else:
        weights_BS = (dco_factor(notes_BX.log(), config.dco_n).to(logps_BS) if config.loss_type == "dco_a" else
                      dco_weights(logps_BS, notes_BX, config.dco_n)) * batch.mask_BS
        numbers = {"dco/factor": weights_BS.sum() / n_tokens, "nll": nll.detach()}
    return nll_loss(logps_BS * weights_BS, batch.mask_BS, n_tokens), numbers


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


def load_training_rows(config):
    """load_rows, of the whole pool where --select is to choose, each with one of --thought_budgets drawn for it."""
    pool = config.select_pool or 4 * config.n_train
    rows = load_rows(config if config.select == "all" else replace(config, n_train=pool))
    if not config.thought_budgets:
        return rows
    shares = np.random.default_rng(config.seed).choice(config.thought_budgets, len(rows)).tolist()
    cut = [with_budget(row, share, config.step_separator, f"--dataset_name {config.dataset_name}: row {i + 1}")
           for i, (row, share) in enumerate(zip(rows, shares))]
    if not any(config.step_separator in row["completion"] for row in rows):
        raise InputError(f"--step_separator {config.step_separator!r}: is in no solution: --thought_budgets cuts none")
    return cut


def step_numbers(example, ends):
    """For each predicted token of an example the number of its step: a step ends with a trained token in `ends`."""
    numbers, number = [], 0
    for token, trained in zip(example.ids[1:], example.trained[1:]):
        numbers.append(number)
        number += trained and token in ends
    return numbers


def with_budget(row, share, separator, where):
    """The row with its solution cut to about a share of its steps, and the share in front of its prompt: [50%].

    Of every 1 / share steps the last is kept (3/4: the last and two of the three before it), so a kept step may rest on
    work that is no longer written down.
    >>> with_budget({"prompt": "9-1-2-3=", "completion": "9-1=8;8-2=6;6-3=3#3"}, 0.5, ";", "row 1")
    {'prompt': '[50%]9-1-2-3=', 'completion': '9-1=8;6-3=3#3'}
    """
    if not isinstance(row.get("completion"), str) or not row.get("prompt"):
        raise InputError(f"--thought_budgets: {where} has no prompt, or no completion that is a text")
    steps = row["completion"].split(separator)
    passed = [math.ceil((len(steps) - i) * share - 1e-9) for i in range(len(steps) + 1)]  # counted from the end
    kept = [step for step, here, before in zip(steps, passed, passed[1:]) if here > before]
    return {**row, "prompt": fill_template(f"[{100 * share:g}%]{{prompt}}", row["prompt"]),
            "completion": separator.join(kept)}


def load_replay(config):
    """Rows of earlier training: those of the run whose folder --replay_from is, or of the data set it names."""
    if not config.replay_share:
        return []
    path = Path(config.replay_from, "args.json")
    if not path.is_file():
        return load_rows(replace(config, dataset_name=config.replay_from, select="all", levels="", domains=""))
    flags, known = json.loads(path.read_text())["flags"], {f.name for f in fields(Config)}
    before = Config(**{name: flags[name] for name in known & set(flags)})
    rows = load_training_rows(before)
    if before.select == "all":
        return rows
    saved = newest_checkpoint(path.parent)
    if saved is None:
        raise InputError(f"--replay_from {path.parent}: has no checkpoint that says what --select took")
    return [rows[i] for i in json.loads((saved / "state.json").read_text())["selected"]]


def pass_rates(decoder, tokenizer, prompts, answers, seed, config, world):
    """Share of right ones among --num_generations samples of each prompt (its ids): list of float, on all processes."""
    mine, G, right = range(world.rank, len(prompts), world.size), config.num_generations, [0] * len(prompts)
    rollouts = generate(decoder, tokenizer, [prompts[i] for i in mine], G, config.max_completion_length, seed=seed,
                        keys=mine)
    for row, text in enumerate(rollouts.texts(tokenizer)):
        right[mine[row // G]] += verify(text, answers[mine[row // G]])
    return [n / G for n in total(right, world)]


def select_rows(rates, n, how, seed):
    """Indices of n problems out of those with these pass rates: hard, easy or uniform; ties fall as the seed wills.

    hard: the least often solved, but those never solved come last: their answers may be wrong. Source: 2501.11284
    (RedStar: difficulty matters more than number), in our reading of its abstract.
    """
    order = np.random.default_rng(seed).permutation(len(rates)).tolist()
    keys = {"uniform": lambda i: 0, "easy": lambda i: -rates[i], "hard": lambda i: (rates[i] == 0, rates[i])}
    return sorted(order, key=keys[how])[:n]


def choose_rows(rows, model, tokenizer, resume, config, world):
    """(the rows --select takes, their indices, which a checkpoint keeps, since the model that chose them moves on)."""
    if config.select == "all":
        return rows, []
    if resume:
        chosen = json.loads((resume / "state.json").read_text())["selected"]
    else:
        need_answers(rows, "--select", config)
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
        rates = pass_rates(model.to(world.device), tokenizer, prompts, [row["answer"] for row in rows],
                           [config.seed], config, world)
        chosen = select_rows(rates, config.n_train, config.select, config.seed)
        print(f"--select {config.select}: {len(chosen)} of {len(rows)} problems, solved "
            f"{np.mean([rates[i] for i in chosen]):.0%} of the time (all: {np.mean(rates):.0%})", flush=True)
    return [rows[i] for i in chosen], chosen


def need_answers(rows, flag, config):
    """Raises InputError unless every row has a prompt and an answer to check samples against."""
    for i, row in enumerate(rows):
        if "prompt" not in row or "messages" in row or "text" in row or not isinstance(row.get("answer"), str):
            raise InputError(f"{flag}: --dataset_name {config.dataset_name}: row {i + 1} is no prompt with an answer")


def annotator(rows, examples, tokenizer, config, world):
    """A function (chosen examples, decoder, policy, step) -> the notes of batch_loss, or None where it needs none."""
    if config.loss_type in ("nll", "stablemax"):
        return lambda *_: None
    if config.loss_type == "entropy":
        return lambda chosen, *_: [[max(1, int(config.entropy_keep * sum(e.trained[1:]) + 1e-9))] for e in chosen]
    if config.loss_type != "dco_a":
        by_step = config.loss_type == "dco_step"
        ends = {i for i in range(len(tokenizer)) if by_step and config.step_separator in tokenizer.decode([i])}
        if by_step and not any(step_numbers(example, ends)[-1] for example in examples):
            raise InputError(f"--step_separator {config.step_separator!r}: ends no step: no token of a solution has it")
        return lambda chosen, *_: [step_numbers(example, ends) for example in chosen]
    need_answers(rows, "--loss_type dco_a", config)
    answers = {tuple(encode_prompt(tokenizer, row["prompt"])): row["answer"] for row in rows}

    def rates(chosen, decoder, policy, step):
        refresh(decoder, policy)
        prompts = [example.ids[: example.trained.index(True)] for example in chosen]
        found = pass_rates(decoder, tokenizer, prompts, [answers[tuple(ids)] for ids in prompts], [config.seed, step],
                           config, world)
        return [[rate] for rate in found]

    return rates


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


def rewarmed_rate(step, config):
    """Learning rate when training goes on after a cosine that ended at a tenth of its peak, --learning_rate.

    keep: stay there. half, full: rise in --warmup_steps to that share of the peak, then a cosine back to the tenth.
    Source: 2308.04014, which rises from 0.
    """
    low = config.learning_rate / 10
    rise = {"keep": 0.0, "half": config.learning_rate / 2 - low, "full": config.learning_rate - low}[config.rewarm]
    share = config.warmup_steps < 1
    rising = math.ceil(config.warmup_steps * config.max_steps) if share else int(config.warmup_steps)
    if step < rising:
        return low + rise * (step + 1) / rising
    done = (step - rising) / max(1, config.max_steps - rising)
    return low + rise * (1 + math.cos(math.pi * done)) / 2


def at_rate(rate, config):
    """The flags of a step at just this learning rate."""
    return replace(config, learning_rate=rate, lr_scheduler_type="constant", warmup_steps=0.0)


@torch.no_grad()
def perp_grad(optimizer, args, kwargs):
    """Before an optimizer's step: takes from each matrix's gradient its part along the matrix, and keeps its length.

    With a head that only grows, a model that is right on all its data lowers its loss for ever without learning
    anything. Vectors (norms, biases) are left alone. Source: 2501.04697, perpendicular gradient.
    """
    for weight in optimizer.param_groups[0]["params"]:
        grad = weight.grad
        if grad is not None:
            across = grad - (weight * grad).sum() / (weight.square().sum() + 1e-30) * weight
            weight.grad = across * (grad.norm() / (across.norm() + 1e-30))


class LowRank(nn.Module):
    """A linear layer of frozen weight W with a trained update beside it: W + B A, W + B R A or W + B A - B0 A0.

    B R A trains the square R alone, between frozen B and A (LoRA-SB). B0 A0 is what B A began as (PiSSA), so that W
    need not be stored without it, rounded. The factor alpha / rank of other codes is 1 here.
    """

    def __init__(self, linear, up_OR, down_RI, core_RR, subtract):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.up, self.down = (nn.Parameter(x, requires_grad=core_RR is None) for x in (up_OR, down_RI))
        self.core = None if core_RR is None else nn.Parameter(core_RR)
        self.up0, self.down0 = (nn.Parameter(x.clone(), requires_grad=False) if subtract else None
                                for x in (up_OR, down_RI))

    def forward(self, x):
        update = F.linear(x, self.down)
        update = F.linear(update if self.core is None else F.linear(update, self.core), self.up)
        if self.up0 is not None:
            update = update - F.linear(F.linear(x, self.down0), self.up0)  # exactly 0 at first
        return F.linear(x, self.weight, self.bias) + update

    def merged(self):
        """The weight [O, I] of a plain linear layer that computes the same."""
        update_OI = self.up @ (self.down if self.core is None else self.core @ self.down)
        return self.weight + (update_OI if self.up0 is None else update_OI - self.up0 @ self.down0)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """A saved model holds the merged weight and nothing else, so from_pretrained needs no adapters."""
        destination[prefix + "weight"] = self.merged().detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()


def truncated_svd(matrix_OI, rank):
    """The best approximation of this rank as (U [O, R], singular values [R], V^T [R, I])."""
    u, values, v = torch.linalg.svd(matrix_OI.float(), full_matrices=False)
    return u[:, :rank].contiguous(), values[:rank], v[:rank].contiguous()  # else each adapter holds the whole u, v


def low_rank_factors(weight_OI, grad_OI, config):
    """Where an adapter begins: (up_OR, down_RI, core_RR or None), by --lora_init.

    gaussian: up is 0 (2106.09685). pissa: the largest singular values and vectors of the weight (2404.02948).
    lora_sb: those of AdamW's first step with all weights, -rate x sign(gradient), and only what stands between the
    vectors is trained, so the model begins one such step, truncated, from where it was (2411.19557).
    """
    (O, I), rank = weight_OI.shape, config.lora_rank
    if config.lora_init == "gaussian":
        return weight_OI.new_zeros(O, rank), torch.randn(rank, I).to(weight_OI) / rank, None
    if config.lora_init == "pissa":
        up_OR, values, down_RI = truncated_svd(weight_OI, rank)
        return up_OR * values.sqrt(), values.sqrt()[:, None] * down_RI, None
    up_OR, values, down_RI = truncated_svd(-learning_rate(0, config) * grad_OI.sign(), rank)
    return up_OR, down_RI, values.diag()


def first_gradients(model, linears, examples, rows_per_step, config, world):
    """The nll's gradient of these layers' weights on the rows of the first step, the same on every process."""
    for linear in linears:
        linear.weight.requires_grad_(True)
    rows = [examples[i] for i in rows_of_step(len(examples), rows_per_step, 0, config.seed)]
    n_tokens = sum(sum(example.trained[1:]) for example in rows)
    for part in micro_batches([len(example.ids) for example in rows], config.per_device_train_batch_size,
                              config.micro_batch_tokens, World(0, 1, world.device)):
        batch = collate(rows, part, world.device)
        nll_loss(Policy(model)(batch)[0], batch.mask_BS, n_tokens).backward()
    return [linear.weight.grad for linear in linears]


def adapter_places(model, config):
    """(name, layer) of each linear layer that gets an adapter: none of the embeddings, nor the head. InputError."""
    places = [(name, layer) for name, layer in model.base_model.named_modules() if isinstance(layer, nn.Linear)]
    smallest = min((min(layer.weight.shape) for _, layer in places), default=0)
    if config.lora_rank > smallest:
        raise InputError(f"--lora_rank {config.lora_rank}: the smallest matrix has rank {smallest}")
    return places


def add_adapters(model, places, examples, rows_per_step, config, world):
    """Freezes the model and puts a LowRank in each of these places."""
    model.to(world.device).requires_grad_(False)
    grads = [None] * len(places)
    if config.lora_init == "lora_sb":
        grads = first_gradients(model, [layer for _, layer in places], examples, rows_per_step, config, world)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.seed)
        for (name, layer), grad_OI in zip(places, grads):
            layer.weight.requires_grad_(False).grad = None
            factors = low_rank_factors(layer.weight, grad_OI, config)
            model.base_model.set_submodule(name, LowRank(layer, *factors, subtract=config.lora_init == "pissa"))


def adapter_tensors(policy):
    """The adapters' own tensors by name, sharing their memory."""
    tensors = parameters_of(policy)
    places = [name for name, layer in policy.named_modules() if isinstance(layer, LowRank)]
    return {f"{name}.{key}": tensors[f"{name}.{key}"].detach() for name in places
            for key in ("up", "down", "core", "up0", "down0") if f"{name}.{key}" in tensors}


def show_example(example, tokenizer):
    """Prints one example; what is trained on stands in green, or in brackets where the output is not a terminal."""
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    text, inside = "", False
    for token, trained in zip(example.ids, example.trained):
        text += (end if inside and not trained else "") + (begin if trained and not inside else "")
        text, inside = text + tokenizer.decode([token]), trained
    print(f"the first example, with the trained tokens marked:\n{text}{end if inside else ''}", flush=True)


# --- main ---


def check_config(config):
    """Raises InputError for flags of this script that cannot be meant together."""
    if not config.entropy_keep:
        raise InputError("--entropy_keep 0.0: must be above 0")
    if not all(config.thought_budgets):
        raise InputError("--thought_budgets 0.0: must be above 0")
    if config.replay_share == 1 or bool(config.replay_share) != bool(config.replay_from):
        raise InputError(f"--replay_share {config.replay_share}: must be below 1, and above 0 just with --replay_from")
    if not config.step_separator:
        raise InputError("--step_separator: must not be empty")
    if config.select != "all" and not 0 < config.n_train <= (config.select_pool or config.n_train):
        raise InputError(f"--select {config.select}: needs --n_train, above 0 and at most --select_pool")
    if config.perp_grad and config.lora_rank:
        raise InputError("--perp_grad: not with --lora_rank: it is the whole matrix whose length matters")


def warn_of_idle_factor(state, factor, config, world):
    """Counts the steps in a row in which dco's factor was 1, and says once that it changes nothing."""
    state["idle_steps"] = state.get("idle_steps", 0) + 1 if factor > 0.99 else 0
    if state["idle_steps"] == min(100, config.max_steps) and world.rank == 0:
        print(f"warning, step {state['step']}: for {state['idle_steps']} steps the factor of --loss_type "
              f"{config.loss_type} has been 1: it trains as nll does. The solutions' probabilities are far below 1 / "
              f"--dco_n {config.dco_n}: a larger one, or dco_step", file=sys.stderr)


SHOWN = ("loss", "eval/accuracy", "dco/factor", "entropy", "grad_norm", "learning_rate")  # on the screen


def main(config):
    check_config(config)
    world = start(config)

    # what was asked for, and the checkpoint to go on from
    rows, replay_rows, problems = load_training_rows(config), load_replay(config), load_eval_problems(config)
    args, resume = on_rank_0(lambda: open_run(config, [rows, replay_rows], world), world)
    if args["finished"]:
        return
    n_replayed = round(config.replay_share * args["rows_per_step"])
    if config.replay_share and not 0 < n_replayed < args["rows_per_step"]:
        raise InputError(f"--replay_share {config.replay_share}: no row, or every one, of {args['rows_per_step']}")
    model, tokenizer = load_model(str(resume) if resume and not config.lora_rank else config.model_name_or_path,
                                  seed=config.seed, chat_template=config.chat_template)
    usual = 3e-3 if model.num_parameters() < 10_000_000 else 2e-4 if config.lora_rank else 2e-5
    config.learning_rate = config.learning_rate or usual

    # the text to train on
    rows, selected = choose_rows(rows, model, tokenizer, resume, config, world)
    examples = make_examples(rows, tokenizer, config)
    n_new, n_own = args["rows_per_step"] - n_replayed, len(examples)
    examples += make_examples(replay_rows, tokenizer, config) if replay_rows else []
    notes_of = annotator(rows + replay_rows, examples, tokenizer, config, world)
    if config.num_train_epochs:
        config.max_steps = math.ceil(config.num_train_epochs * n_own / n_new)
    places = adapter_places(model, config) if config.lora_rank else []
    run, log, stop = Path(config.output_dir), Log(args, resume, model, config, world), stop_signals()

    # the policy that learns, and a copy of it that samples
    if config.lora_rank:
        add_adapters(model, places, examples[:n_own], n_new, config, world)
    decoder = make_decoder(model, config, world)
    policy = shard(Policy(model.train()), config, world)
    if config.loss_type == "stablemax":
        policy.forward = partial(stablemax_forward, policy)
    optimizer = make_optimizer(policy, config)
    if config.perp_grad:
        optimizer.register_step_pre_hook(perp_grad)
    state = {"step": 0, "bad_steps": 0, "num_tokens": 0, "selected": selected}
    if resume:
        state = load_checkpoint(resume, moments(policy, optimizer) | adapter_tensors(policy), world)
    show_example(examples[0], tokenizer)
    print(f"{config.max_steps} steps of {args['rows_per_step']} rows: {config.max_steps * n_new / n_own:.2g} passes "
          "over the data", flush=True)
    if problems and config.eval_on_start and state["step"] == 0:
        refresh(decoder, policy)
        log.step(0, eval_numbers(decoder, tokenizer, problems, 0, log, config), SHOWN)

    while state["step"] < config.max_steps:
        # the rows of this step, a function of its number alone
        began, step = time.perf_counter(), state["step"]
        indices = rows_of_step(n_own, n_new, step, config.seed)
        indices += [n_own + i for i in rows_of_step(len(examples) - n_own, n_replayed, step, config.seed)]
        chosen = [examples[i] for i in indices]

        # what --loss_type weighs their tokens by; the loss is divided by the trained tokens of the whole step
        notes = notes_of(chosen, decoder, policy, step)
        n_tokens = sum(map(sum, notes if config.loss_type == "entropy" else [e.trained[1:] for e in chosen]))

        # forwards of rows of like length, and one optimizer step
        lengths = [len(example.ids) for example in chosen]
        parts = micro_batches(lengths, config.per_device_train_batch_size, config.micro_batch_tokens, world)
        batches = [collate(chosen, part, world.device) for part in parts]

        def loss_of(policy, batch):
            return batch_loss(policy, batch, notes, n_tokens, config)

        flags = config if config.rewarm == "off" else at_rate(rewarmed_rate(step, config), config)
        numbers, taken = train_step(policy, optimizer, batches, loss_of, step, flags, world)
        log.count(state, taken, indices)
        if "dco/factor" in numbers:
            warn_of_idle_factor(state, numbers["dco/factor"], config, world)
        state["num_tokens"] += n_tokens
        numbers["num_tokens"] = state["num_tokens"]

        # evaluate, log, save
        last, seconds = state["step"] == config.max_steps, time.perf_counter() - began
        if problems and (last or state["step"] % config.eval_steps == 0):
            refresh(decoder, policy)
            numbers |= eval_numbers(decoder, tokenizer, problems, state["step"], log, config)
        log.step(state["step"], numbers, SHOWN, sum(lengths), seconds)
        [stopping] = total([len(stop)], world)
        if last or stopping or (config.save_steps and state["step"] % config.save_steps == 0):
            tensors = moments(policy, optimizer) | adapter_tensors(policy)
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
