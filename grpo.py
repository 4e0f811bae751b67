"""Reinforcement learning with verifiable rewards: GRPO and its relatives.

For each prompt, G completions are sampled and checked; a completion is worth what it scored above its group's mean:

    A = (reward - mean of the group) / (std of the group + 1e-4)
    loss = - sum over completion tokens of  weight * min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
    r = p(token) / p_old(token), p_old at the time of sampling

`--loss_type` chooses what the token's weight is and what takes the place of the clipped ratio; all weights divide by
counts of the whole optimizer step, over all processes. The value of this loss means nothing (about 0 by
construction): look at reward, entropy and clip_ratio. Against TRL's GRPOTrainer: a prompt is prefilled once for its
group, finished rows leave the batch, rows are sorted by length instead of padded to the longest of the step, groups
whose completions all scored alike are not computed at all (their gradient is exactly zero) yet stay in the
denominator, and the reference of --beta is the model given, not one reloaded by name.

Dimensions: P prompts · G completions per prompt · R = P G rows of a step · B rows of one forward · T tokens ·
S = T - 1 predicting positions · N trained tokens.

    python sft.py && python grpo.py                   # the embedded task: two minutes on two cores
    python grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k --output_dir runs/g \
        --max_completion_length 512 --per_device_train_batch_size 128                     # one GPU
    torchrun --nproc-per-node 8 grpo.py --fsdp ...                                        # several GPUs
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser

from eval import (InputError, Rollouts, encode_prompt, evaluate, extract_answer, generate, load_model, load_problems,
                  plot_runs, softcap, verify)
from kernels import linear_logps

# --- config ---


def flag(default, help):
    """One command-line flag: its default and what it means."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    model_name_or_path: str = flag("runs/sft", "a hub name or a local folder; by default what sft.py left")
    chat_template: str = flag("auto", "auto: the tokenizer's, where it has one; off: prompts are plain text")
    dataset_name: str = flag("chain", "a problem set (see eval.py), a local file, or a hub data set")
    dataset_train_split: str = flag("train", "split to train on")
    dataset_test_split: str = flag("validation", "split to evaluate on")
    eval_dataset_name: str = flag("", "problems to evaluate on; empty: dataset_name where that is a named problem set")
    n_train: int = flag(20000, "problems to train on; 0: all (an endless set such as `chain` needs a number)")
    prompt_column: str = flag("", "column that holds the prompt; empty: found by its usual names")
    answer_column: str = flag("", "column that holds the answer or solution; empty: found by its usual names")
    prompt_template: str = flag("{prompt}", "text around a string prompt, with {prompt} where it goes")
    levels: str = flag("1-5", "`chain`: difficulty levels, such as 1-3 or 1,4")
    domains: str = flag("", "`chain`: kinds of operation, such as add,mul; empty: all")
    output_dir: str = flag("runs/grpo", "the run's folder: model, args.json, metrics.jsonl, curves.png, checkpoints/")
    overwrite: bool = flag(False, "delete an earlier run in output_dir and start over")
    resume_from_checkpoint: str = flag("auto", "auto: the newest whole checkpoint in output_dir; or one's folder")
    num_generations: int = flag(8, "completions per prompt: G")
    max_prompt_length: int = flag(512, "tokens; a longer prompt is an error")
    max_completion_length: int = flag(128, "tokens sampled at most per completion, in training and evaluation")
    temperature: float = flag(1.0, "of sampling; it divides the logits of the loss too")
    generation_batch_size: int = flag(256, "rows decoded at once; memory and speed only")
    reward_funcs: list[str] = flag(["accuracy"], "any of accuracy, format, length")
    reward_weights: list[float] = flag([], "one weight per reward function; none: 1 each")
    loss_type: str = flag("dapo", "grpo, dr_grpo, dapo, gspo or cispo")
    epsilon: float = flag(0.0, "ratios clip below 1 - this; 0: as the loss's paper (0.2; gspo 3e-4; cispo: none)")
    epsilon_high: float = flag(0.0, "ratios clip above 1 + this; 0: as the loss's paper (0.2; dapo .28; gspo 4e-4)")
    cispo_max_weight: float = flag(5.0, "cispo: the largest weight of a token, an absolute ratio (TRL's epsilon_high)")
    scale_rewards: str = flag("auto", "divide advantages by the std of: group, batch, none; auto: none for dr_grpo")
    beta: float = flag(0.0, "weight of the KL divergence to the model given")
    entropy_coef: float = flag(0.0, "weight of an entropy bonus, per token")
    num_iterations: int = flag(1, "optimizer steps on each step's rollouts")
    mask_truncated_completions: bool = flag(False, "do not train on completions that the limit cut off")
    soft_overlong_tokens: int = flag(0, "the last so many tokens before the limit cost up to 1 (DAPO); 0: nothing")
    per_device_train_batch_size: int = flag(256, "completions per process; at most so many in one forward")
    gradient_accumulation_steps: int = flag(1, "a step holds per_device_train_batch_size x this x processes rows")
    micro_batch_tokens: int = flag(1024, "padded tokens in one forward at most; 0: no limit; memory and speed only")
    max_steps: int = flag(80, "optimizer steps")
    learning_rate: float = flag(0.0, "peak learning rate; 0: 5e-5 under 10 M parameters, 1e-6 (TRL's) above")
    lr_scheduler_type: str = flag("constant", "constant, linear or cosine, after the warm-up")
    warmup_steps: int = flag(0, "steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's decay, on matrices only")
    max_grad_norm: float = flag(1.0, "clip the gradient's norm here; 0: never")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward: less memory, a third slower")
    bf16: bool = flag(torch.cuda.is_available(), "bfloat16 products with float32 weights; by default on a GPU")
    fsdp: bool = flag(False, "shard weights, gradients and optimizer over the processes (FSDP2)")
    ddp_timeout: int = flag(1800, "seconds a process waits for the others before the run fails")
    logging_steps: int = flag(5, "print a line every so many steps; metrics.jsonl has every step")
    eval_steps: int = flag(40, "evaluate (greedy) every so many steps and at the end; 0: never")
    n_eval: int = flag(128, "problems to evaluate on")
    save_steps: int = flag(20, "checkpoint every so many steps; 0: only when stopped and at the end")
    max_bad_steps: int = flag(3, "give up after so many steps in a row with a loss or gradient that is not finite")
    seed: int = flag(0, "of data, order and sampling")
    report_to: str = flag("none", "none, or wandb")


# --- loss ---


def group_advantages(rewards_PG, scale):
    """How far each completion scored above its group's mean, divided by a standard deviation: [P, G].

    scale: `group` (GRPO; unbiased std as in TRL and verl), `batch` (std of all rewards), `none` (Dr. GRPO). Groups
    that scored alike get exactly 0, whatever float noise their mean has.
    Source: DeepSeekMath 2402.03300 section 4.1.2; Dr. GRPO 2503.20783 section 3.
    """
    centered_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    centered_PG = centered_PG.masked_fill(silent_groups(rewards_PG)[:, None], 0.0)
    if scale == "none":
        return centered_PG
    return centered_PG / ((rewards_PG.std(1, keepdim=True) if scale == "group" else rewards_PG.std()) + 1e-4)


def silent_groups(rewards_PG):
    """Which groups carry no signal because all their rewards are equal (but for float noise): bool [P]."""
    return rewards_PG.amax(1) - rewards_PG.amin(1) < 1e-6


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


def row_weights(loss_type, lengths_R, max_completion_length):
    """What one token of each row weighs, so that a sum over all tokens of the step is the loss: [R].

    lengths_R are the trained tokens of every row of the step, rows without signal included; 0 for masked rows.
    grpo, gspo: mean over rows of the mean over tokens. dapo, cispo: mean over all tokens. dr_grpo: sum over tokens /
    (rows * the limit), the limit being a constant: longer wrong answers are not cheaper.
    """
    if loss_type in ("grpo", "gspo"):
        return 1 / (lengths_R.clamp(min=1) * len(lengths_R))
    if loss_type == "dr_grpo":
        return torch.full_like(lengths_R, 1 / (len(lengths_R) * max_completion_length), dtype=torch.float32)
    return torch.full_like(lengths_R, 1 / max(1, int(lengths_R.sum())), dtype=torch.float32)


def policy_gain(logps_BS, old_logps_BS, advantages_B, mask_BS, config):
    """What --loss_type maximises, per token: [B, S]."""
    if config.loss_type == "cispo":
        return cispo_gain(logps_BS, old_logps_BS, advantages_B, config.cispo_max_weight)
    if config.loss_type == "gspo":
        logps_BS = sequence_logps(logps_BS, old_logps_BS, mask_BS)
    return clipped_gain(logps_BS, old_logps_BS, advantages_B, config.epsilon, config.epsilon_high)


def kl_k3(logps_BS, reference_logps_BS):
    """KL(policy || reference) per token in nats, 0 or more; tokens sampled from the policy. Source: Schulman 2020, k3."""
    log_ratio_BS = reference_logps_BS - logps_BS  # reference minus policy: the other way round is another quantity
    return log_ratio_BS.expm1() - log_ratio_BS


def clip_share(logps_BS, old_logps_BS, advantages_B, mask_BS, config):
    """Tokens whose gradient the clip removed (for cispo: cut), counted: scalar."""
    if config.loss_type == "gspo":
        logps_BS = sequence_logps(logps_BS, old_logps_BS, mask_BS)
    ratio_BS, up_B1 = (logps_BS - old_logps_BS).exp(), advantages_B[:, None] > 0
    if config.loss_type == "cispo":
        return ((ratio_BS > config.cispo_max_weight) & mask_BS).sum()
    outside_BS = torch.where(up_B1, ratio_BS > 1 + config.epsilon_high, ratio_BS < 1 - config.epsilon)
    return (outside_BS & mask_BS & (advantages_B != 0)[:, None]).sum()


def soft_overlong(length, limit, soft):
    """DAPO's penalty in [-1, 0] for ending within `soft` tokens of the limit. Source: DAPO 2503.14476 eq. 13."""
    return max(-1.0, min(0.0, (limit - soft - length) / soft)) if soft else 0.0


# --- data ---


class Example(NamedTuple):
    """One sequence to train on."""

    ids: list  # token ids
    trained: list  # bool for each id: is it trained on?


def load_train_problems(config, error_rate=0.0):
    """The problems of --dataset_name to train on; error_rate spoils that share of the steps in `chain`'s solutions."""
    return load_problems(config.dataset_name, config.dataset_train_split, config.n_train or None, config.seed,
                         levels=config.levels, domains=config.domains, error_rate=error_rate,
                         prompt_column=config.prompt_column, answer_column=config.answer_column,
                         prompt_template=config.prompt_template)


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
    """A causal language model whose forward ends in log-probs, so that DDP and FSDP see every parameter it uses."""

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


class World(NamedTuple):
    """This process among all that train together."""

    rank: int
    size: int
    device: torch.device


def start_world(config):
    """Joins the processes that torchrun started, or stands alone."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 or config.fsdp:
        store = {} if size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(seconds=config.ddp_timeout), **store)
    return World(rank, size, device)


def barrier():
    """All processes meet here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(values, world):
    """Numbers or scalar tensors, each summed over all processes: list of float, at the cost of one wait."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=world.device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def on_rank_0(function, world):
    """What function() returns on rank 0, or raises there as InputError, on every process."""
    outcome = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


def distribute(model, config, world):
    """The Policy of `model` on this process's device: plain, in DDP, or sharded layer by layer (FSDP2)."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = shard(Policy(model.train().to(world.device)), config)
    ddp = world.size > 1 and not config.fsdp
    return DistributedDataParallel(policy, broadcast_buffers=False) if ddp else policy


def shard(policy, config):
    """With --fsdp, splits the weights over the processes; each gathers a layer just while it needs it."""
    if config.fsdp:
        precision = MixedPrecisionPolicy(torch.bfloat16 if config.bf16 else None, reduce_dtype=torch.float32)
        for layer in policy.model.base_model.layers:
            fully_shard(layer, mp_policy=precision)
        fully_shard(policy, mp_policy=precision)
    return policy


def unwrap(policy):
    """The Policy inside DDP; never for a forward whose gradient is wanted, which must go through the wrapper."""
    return policy.module if isinstance(policy, DistributedDataParallel) else policy


def make_decoder(model, config):
    """The model that samples: the trained one itself on a CPU, else a copy (bfloat16 where training uses it)."""
    if not config.fsdp and not torch.cuda.is_available():
        return model
    return copy.deepcopy(model).to(torch.bfloat16 if config.bf16 else torch.float32).requires_grad_(False)


@torch.no_grad()
def refresh(decoder, policy):
    """Brings the decoder's weights up to date; under FSDP this gathers every weight once. All processes take part."""
    check_weights(policy)
    for target, source in zip(decoder.parameters(), unwrap(policy).model.parameters()):
        if target is not source:
            target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)


def check_weights(policy):
    """Raises RunError, on every process, where a weight is not finite: such a policy is neither sampled nor saved."""
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in policy.parameters()]
    total = sum(part.detach().sum() for part in parts)  # finite only if every term is
    if dist.is_initialized():
        dist.all_reduce(total)
    if not total.isfinite():
        raise RunError("a weight of the policy is not finite; checkpoints are older than that")


def make_optimizer(policy, config):
    """AdamW; decay on matrices only. Its learning rate is set at each step."""
    matrices = [p for p in policy.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in policy.parameters() if p.requires_grad and p.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=config.learning_rate,
                             weight_decay=config.weight_decay, fused=True)


def scheduled_rate(step, config):
    """Learning rate of optimizer step `step` (from 0): linear warm-up to the peak, then constant or down towards 0.

    The first step already moves (transformers' own schedules spend it at rate 0).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * decay[config.lr_scheduler_type]


def train_step(policy, optimizer, batches, loss_of, step, config, world):
    """One optimizer step from this process's micro-batches: (what loss_of counted, whether the step was taken).

    loss_of(policy, batch) returns a loss already divided by what the whole step holds over all processes, and a dict
    of numbers; both are added up over micro-batches and processes. Where the loss or the gradient's norm is not
    finite, nothing moves: neither the weights nor the optimizer.
    """
    sums = {"loss": 0.0}
    for i, batch in enumerate(batches):
        waits = isinstance(policy, DistributedDataParallel) and i < len(batches) - 1  # gradients travel once a step
        with policy.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16 and not config.fsdp):
                loss, numbers = loss_of(policy, batch)
            (loss * world.size).backward()  # DDP and FSDP take the mean over processes; the sum is meant
        for name, value in {"loss": loss.detach(), **numbers}.items():
            sums[name] = sums.get(name, 0.0) + value  # on the device: no wait
    norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    *values, norm = sum_over_processes([*sums.values(), norm / world.size], world)
    numbers = {**dict(zip(sums, values)), "grad_norm": norm}
    taken = math.isfinite(numbers["loss"]) and math.isfinite(norm)
    if taken:
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(step, config)
        optimizer.step()
    optimizer.zero_grad()
    return numbers, taken


# --- run ---


class RunError(Exception):
    """The run cannot go on: one line that says why. Scripts print it and exit with 1; the last checkpoint is whole."""


def write_json(path, value):
    """Writes a JSON file so that a reader finds the old one or the new one, never a half."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def append_line(path, value):
    """Adds one JSON line to a file."""
    with open(path, "a") as file:
        file.write(json.dumps(value) + "\n")


def sha256(path):
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """Has the system write a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fault_of(checkpoint):
    """What is wrong with a checkpoint, in words, or None: every file must have the size and hash of the manifest."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, (size, digest) in manifest.items():
            if (checkpoint / name).stat().st_size != size or sha256(checkpoint / name) != digest:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, TypeError, AttributeError):
        return "manifest.json is damaged"
    return None


def newest_checkpoint(run):
    """The newest whole checkpoint of a run, None where it has none at all; a damaged one is named and passed over."""
    found = sorted(run.glob("checkpoints/step_*[0-9]"), key=lambda path: int(path.name[5:]), reverse=True)
    for checkpoint in found:
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        print(f"{checkpoint}: {fault}; falling back to the checkpoint before it", file=sys.stderr)
    if found:
        raise InputError(f"--output_dir {run}: none of its checkpoints is whole; --overwrite starts over")
    return None


def weight_tensors(policy):
    """The policy's weights by name, sharing their memory."""
    return {name: parameter.detach() for name, parameter in unwrap(policy).named_parameters()}


def optimizer_tensors(policy, optimizer):
    """The optimizer's state as a flat dict of tensors, `parameter name.state name`; zeros where it has not begun."""
    tensors = {}
    for name, parameter in unwrap(policy).named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if not state:
                state.update(step=torch.zeros((), device=parameter.device), exp_avg=torch.zeros_like(parameter),
                             exp_avg_sq=torch.zeros_like(parameter))
            tensors.update({f"{name}.{key}": value.detach() for key, value in state.items()})
    return tensors


def save_checkpoint(run, state, policy, tokenizer, optimizer, config, world, tensors=None):
    """Writes run/checkpoints/step_N, whole or not at all, and keeps the newest two.

    `state` is a dict for JSON with its "step"; `tensors` whatever else must survive. Everything is written under
    another name, synced, listed in a manifest with sizes and hashes, and renamed. Without --fsdp the folder is also
    a model that from_pretrained loads. Raises RunError where the disk does not take it; older ones stay.
    """
    final = run / "checkpoints" / f"step_{state['step']}"
    aside = final.with_name(final.name + ".tmp")
    check_weights(policy)
    try:
        if world.rank == 0:
            for left in final.parent.glob("*.tmp"):  # by a save that was killed
                shutil.rmtree(left)
            aside.mkdir(parents=True)
        barrier()
        if config.fsdp:
            shards = {**weight_tensors(policy), **optimizer_tensors(policy, optimizer)}
            dcp.save(shards, storage_writer=HuggingFaceStorageWriter(str(aside / "shards"), save_distributed=True))
        if world.rank == 0:
            model = unwrap(policy).model
            if config.fsdp:
                model.config.save_pretrained(aside)
            else:
                model.save_pretrained(aside)
                save_file(optimizer_tensors(policy, optimizer), aside / "optimizer.safetensors")
            tokenizer.save_pretrained(aside)
            save_file(tensors or {}, aside / "tensors.safetensors")
            write_json(aside / "state.json", state)
            files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
            for path in files:
                sync(path)
            write_json(aside / "manifest.json",
                       {str(path.relative_to(aside)): [path.stat().st_size, sha256(path)] for path in files})
            shutil.rmtree(final, ignore_errors=True)  # only a damaged one can stand here
            os.rename(aside, final)
            sync(final.parent)
            older = {int(path.name[5:]): path for path in final.parent.glob("step_*[0-9]") if path != final}
            keep = max((step for step in older if step < state["step"]), default=None)
            for step in set(older) - {keep}:  # later ones belong to a course that was given up
                shutil.rmtree(older[step])
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]  # dcp quotes a whole traceback
        raise RunError(f"the checkpoint of step {state['step']} could not be written ({reason}); older checkpoints are "
                       "kept, and the same command continues from them") from error
    barrier()


def load_checkpoint(checkpoint, policy, optimizer, config):
    """Brings the optimizer (and under FSDP the weights) back, in place: (state, tensors) as they were saved."""
    saved = optimizer_tensors(policy, optimizer)
    if config.fsdp:
        shards = {**weight_tensors(policy), **saved}
        dcp.load(shards, storage_reader=HuggingFaceStorageReader(str(checkpoint / "shards")))
    else:
        for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
            saved[name].copy_(tensor)
    return json.loads((checkpoint / "state.json").read_text()), load_file(checkpoint / "tensors.safetensors")


FREE_FLAGS = {"output_dir", "overwrite", "resume_from_checkpoint", "report_to", "logging_steps", "save_steps",
              "ddp_timeout", "max_bad_steps", "micro_batch_tokens", "gradient_checkpointing",
              "per_device_train_batch_size", "gradient_accumulation_steps"}  # may change when a run is continued


def open_run(config, args):
    """Looks at --output_dir before any long work: (the checkpoint to continue from or None, is the run finished?).

    An unfinished run with the same flags is continued; anything else found in the folder raises InputError.
    """
    run = Path(config.output_dir)
    model = Path(config.model_name_or_path).resolve()
    if run.resolve() in (model, *model.parents):
        raise InputError(f"--output_dir {run}: --model_name_or_path {config.model_name_or_path} is in it")
    chosen = None if config.resume_from_checkpoint == "auto" else Path(config.resume_from_checkpoint)
    if chosen and (fault := "--overwrite deletes it" if config.overwrite else fault_of(chosen)):
        raise InputError(f"--resume_from_checkpoint {chosen}: {fault}")
    if config.overwrite and (run / "args.json").is_file():
        for path in sorted(run.iterdir(), key=lambda path: path.name == "args.json"):  # last: it marks the folder ours
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not run.exists() or {path.name for path in run.iterdir()} <= {"args.json.tmp"}:  # a kill at the start leaves that
        if chosen:
            raise InputError(f"--resume_from_checkpoint {chosen}: --output_dir {run} holds no run to continue")
        return None, False
    if not (run / "args.json").is_file():
        raise InputError(f"--output_dir {run}: in use, and not by a run of these scripts (it has no args.json)")
    try:
        before = json.loads((run / "args.json").read_text())
    except ValueError as error:
        raise InputError(f"--output_dir {run}: its args.json is damaged; --overwrite starts over") from error
    for name in ("script", "rows_per_step"):
        if before[name] != args[name]:
            raise InputError(f"--output_dir {run}: holds a run with {name} {before[name]}, not {args[name]}; "
                             "--overwrite deletes it")
    for name, value in args["flags"].items():
        if name not in FREE_FLAGS and before["flags"].get(name) != value:
            raise InputError(f"--{name} {value}: the run in --output_dir {run} has {before['flags'].get(name)}; "
                             "--overwrite deletes it")
    if before["finished"]:
        print(f"{run}: finished already; --overwrite starts over")
        return None, True
    return chosen or newest_checkpoint(run), False


def run_args(config, world):
    """What args.json says: every flag, and all else one needs to repeat the run."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
    return {"script": Path(__file__).stem, "flags": asdict(config), "rows_per_step": rows, "processes": world.size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "git_commit": git.stdout.strip() or None, "finished": False}


def begin_run(config, world, resume, args, data):
    """Makes the run's folder, or cuts the logs of a continued run back to its checkpoint: the run's folder.

    `data` is hashed, so that a run is never continued on other data: InputError.
    """
    run, digest = Path(config.output_dir), hashlib.sha256(repr(data).encode()).hexdigest()
    if world.rank != 0:
        return run
    run.mkdir(parents=True, exist_ok=True)
    if resume is None:
        write_json(run / "args.json", {**args, "data_sha256": digest})
    elif json.loads((run / "args.json").read_text())["data_sha256"] != digest:
        raise InputError(f"--dataset_name {config.dataset_name}: not the data this run began with; --overwrite starts "
                         "over")
    step = json.loads((resume / "state.json").read_text())["step"] if resume else 0
    for path in (run / "metrics.jsonl", run / "samples.jsonl", run / "bad_steps.jsonl"):
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True)
                     if line.endswith("\n") and json.loads(line)["step"] <= step]  # a line cut short was the last
            path.with_suffix(".tmp").write_text("".join(lines))
            os.replace(path.with_suffix(".tmp"), path)
    print(f"{run}: " + (f"continues from {resume}" if resume else "a new run") + f" on {world.size} x {world.device}, "
          + ", ".join(f"{name} {version}" for name, version in args["versions"].items()))
    return run


class StopSignal:
    """SIGTERM or SIGINT asks for a checkpoint and an end after the current step; a second one ends at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
        print(f"signal {number}: stopping after this step (again: at once)", file=sys.stderr)

    def agreed(self, world):
        """The signal any process has received, the same on all of them; 0 for none."""
        number = torch.tensor(self.number, device=world.device)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


class Log:
    """metrics.jsonl, a line on the screen, and wandb where asked for; silent on all ranks but 0."""

    def __init__(self, run, config, world):
        self.path, self.config, self.active, self.wandb = run / "metrics.jsonl", config, world.rank == 0, None
        self.began, self.steps_done = time.perf_counter(), 0
        if self.active and config.report_to == "wandb":
            import wandb
            self.wandb = wandb.init(project="post-training", name=run.name, dir=run, config=asdict(config),
                                    id=hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12], resume="allow")

    def step(self, step, numbers, show, tokens, seconds):
        """Writes one step's numbers; prints those named in `show` every --logging_steps. Keys under time/ are not
        repeatable from run to run; all others are."""
        self.steps_done += 1
        if not self.active:
            return
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()
        line = {"step": step, **numbers, "time/step_s": seconds, "time/tokens_per_s": tokens / seconds,
                "time/peak_memory_gb": memory / 2**30}
        append_line(self.path, line)
        if self.wandb:
            self.wandb.log(line, step=step)
        if step % self.config.logging_steps == 0 or step == self.config.max_steps:
            mean = (time.perf_counter() - self.began) / self.steps_done
            left = str(timedelta(seconds=round(mean * (self.config.max_steps - step))))
            shown = "  ".join(f"{name} {numbers[name]:.4g}" for name in show if name in numbers)
            print(f"{step:>6}/{self.config.max_steps}  {shown}  {tokens / seconds:,.0f} tokens/s  "
                  f"{mean:.2f} s/step  eta {left}", flush=True)


def peak_rss():
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def end_run(run, policy, tokenizer, world):
    """Leaves the trained model in the run's folder as Hugging Face writes it, with curves.png; the run is finished."""
    model = unwrap(policy).model
    weights = {name: parameter.full_tensor() for name, parameter in model.named_parameters()
               if isinstance(parameter, DTensor)} or None
    if world.rank == 0:
        aside = run / "export.tmp"
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        for path in aside.iterdir():
            os.replace(path, run / path.name)
        aside.rmdir()
        plot_runs([run], run / "curves.png")
        write_json(run / "args.json", {**json.loads((run / "args.json").read_text()), "finished": True})
        print(f"{run}: the model, args.json, metrics.jsonl, curves.png")
    barrier()


def check_frame(config):
    """Raises InputError for flags that every script has and that cannot be meant."""
    choices = {"chat_template": ("auto", "off"), "lr_scheduler_type": ("constant", "linear", "cosine"),
               "report_to": ("none", "wandb")}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise InputError(f"--{name} {getattr(config, name)}: must be one of {', '.join(allowed)}")
    lowest = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1, "max_bad_steps": 1,
              "logging_steps": 1, "n_eval": 1, "max_completion_length": 1, "ddp_timeout": 1, "micro_batch_tokens": 0,
              "learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "save_steps": 0,
              "eval_steps": 0, "n_train": 0, "seed": 0}
    for name, low in lowest.items():
        if not getattr(config, name) >= low:
            raise InputError(f"--{name} {getattr(config, name)}: must be {low} or more")
    if "{prompt}" not in config.prompt_template:
        raise InputError(f"--prompt_template {config.prompt_template}: must contain {{prompt}}")


def note_step(run, state, taken, rows, config, world):
    """Counts the step; one not taken is written down with its rows. RunError after --max_bad_steps in a row."""
    state.update(step=state["step"] + 1, bad_steps=0 if taken else state["bad_steps"] + 1)
    if taken:
        return
    if world.rank == 0:
        append_line(run / "bad_steps.jsonl", {"step": state["step"], "rows": rows})
        print(f"step {state['step']}: loss or gradient not finite; no weight was changed; its rows are in "
              f"{run / 'bad_steps.jsonl'}", file=sys.stderr)
    if state["bad_steps"] >= config.max_bad_steps:
        raise RunError(f"{state['bad_steps']} steps in a row had a loss or gradient that is not finite "
                       "(--max_bad_steps); the weights are those of the last good step")


def load_eval_problems(config):
    """The problems of --eval_steps; none where it is 0 or where the training data is not a named problem set."""
    name = config.eval_dataset_name or ("" if Path(config.dataset_name).exists() else config.dataset_name)
    if not config.eval_steps or not name:
        return []
    return load_problems(name, config.dataset_test_split, config.n_eval, config.seed, levels=config.levels,
                         domains=config.domains, prompt_column=config.prompt_column,
                         answer_column=config.answer_column, prompt_template=config.prompt_template)


def evaluate_policy(run, step, decoder, policy, tokenizer, problems, config, world):
    """Greedy accuracy on `problems` by eval.py's own path: numbers to log; a few samples go to samples.jsonl."""
    refresh(decoder, policy)
    numbers = {}
    if world.rank == 0:
        result = evaluate(decoder, tokenizer, problems, temperature=0.0, max_new_tokens=config.max_completion_length)
        numbers = {f"eval/{name}": result[name] for name in ("accuracy", "parse_fail", "truncated", "mean_length")}
        for record in result["records"][:4]:
            append_line(run / "samples.jsonl", {"step": step, **record})
    barrier()
    return numbers


def fill_learning_rate(config, model, small, large):
    """Settles --learning_rate 0: `small` for a model under 10 M parameters, else `large`."""
    config.learning_rate = config.learning_rate or (small if model.num_parameters() < 10_000_000 else large)


def read_config(Config):
    """The command line as a Config; InputError for what is no flag or has an unusable value."""
    parser = HfArgumentParser(Config, usage="%(prog)s --flag value ... (--help lists the flags)",
                              description=sys.modules["__main__"].__doc__, allow_abbrev=False,
                              formatter_class=RawDescriptionHelpFormatter)

    def fail(message):  # argparse would print the usage too
        raise InputError(message.removeprefix("argument "))

    parser.error = fail
    config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise InputError(f"{unknown[0]}: no such flag (--help lists them)")
    return config


def launch(main, Config):
    """Runs a script. Exit codes: 2 for wrong input, 1 for a run that cannot go on, 128 + signal where stopped."""
    code = 0
    try:
        main(read_config(Config))
    except (InputError, RunError, OSError, SafetensorError) as error:
        code = 2 if isinstance(error, InputError) else 1
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# --- rollout ---


def accuracy_reward(problem, completion, n_tokens, config):
    """1 if the answer is right by eval.py's checker, else 0."""
    return float(verify(completion, problem.answer))


def format_reward(problem, completion, n_tokens, config):
    """1 if the completion marks an answer (boxed, after # or ####, in answer tags), right or wrong, else 0."""
    marked = any(mark in completion for mark in ("\\boxed{", "#", "<answer>"))
    return float(marked and extract_answer(completion) is not None)


def length_reward(problem, completion, n_tokens, config):
    """From 1 for an empty completion down to 0 at the limit."""
    return 1 - n_tokens / config.max_completion_length


REWARDS = {"accuracy": accuracy_reward, "format": format_reward, "length": length_reward}


def score(problems_P, texts_R, rollouts, config):
    """Every reward function on every row: float [R, functions], and the total with weights and penalty: [R].

    Raises RunError naming the function that returned something other than a finite number.
    """
    scores_RF = []
    for row, text in enumerate(texts_R):
        problem, n_tokens = problems_P[row // config.num_generations], int(rollouts.lengths_R[row])
        values = [REWARDS[name](problem, text, n_tokens, config) for name in config.reward_funcs]
        for name, value in zip(config.reward_funcs, values):
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RunError(f"reward function {name} returned {value} for the completion {text[:200]!r}")
        scores_RF.append(values)
    scores_RF = torch.tensor(scores_RF, dtype=torch.float32)
    penalties_R = torch.tensor([soft_overlong(length, config.max_completion_length, config.soft_overlong_tokens)
                                for length in rollouts.lengths_R.tolist()])
    weights_F = torch.tensor(config.reward_weights or [1.0] * len(config.reward_funcs))
    return scores_RF, scores_RF @ weights_F + penalties_R


def roll_out(decoder, tokenizer, prompts_P, number, config, world):
    """Samples --num_generations completions of every prompt, shared out over the processes: Rollouts of all rows.

    Every process returns the rows of all. Random numbers belong to (seed, number of the rollout, prompt, sample), so
    the same completions come out however many processes there are.
    """
    mine, G = range(world.rank, len(prompts_P), world.size), config.num_generations
    found = generate(decoder, tokenizer, [prompts_P[i] for i in mine], G, config.max_completion_length,
                     config.temperature, seed=[config.seed, number], batch_size=config.generation_batch_size, keys=mine)
    if world.size == 1:
        return found
    parts = [None] * world.size
    dist.all_gather_object(parts, found)
    order_R = torch.tensor([i * G + j for rank in range(world.size)
                            for i in range(rank, len(prompts_P), world.size) for j in range(G)]).argsort()
    return Rollouts(*(torch.cat([getattr(part, name) for part in parts])[order_R]
                      for name in ("tokens_RT", "logps_RT", "lengths_R", "finished_R")))


def describe(scores_RF, rewards_R, rollouts, texts_R, config):
    """The numbers logged about one step's rollouts; TRL's names. README.md gives each one's formula."""
    rewards_PG = rewards_R.view(-1, config.num_generations)
    lengths_R = rollouts.lengths_R.float()
    numbers = {"reward": rewards_R.mean(), "reward_std": rewards_PG.std(1).mean(),
               "frac_reward_zero_std": silent_groups(rewards_PG).float().mean(),
               "completions/mean_length": lengths_R.mean(), "completions/min_length": lengths_R.min(),
               "completions/max_length": lengths_R.max(),
               "completions/clipped_ratio": 1 - rollouts.finished_R.float().mean()}
    for i, name in enumerate(config.reward_funcs):
        numbers[f"rewards/{name}/mean"], numbers[f"rewards/{name}/std"] = scores_RF[:, i].mean(), scores_RF[:, i].std()
    if "accuracy" in config.reward_funcs:
        right_PG = scores_RF[:, config.reward_funcs.index("accuracy")].view(rewards_PG.shape)
        numbers |= {"frac_all_wrong": (right_PG == 0).all(1).float().mean(),
                    "frac_all_right": (right_PG == 1).all(1).float().mean()}
    unparsed = sum(extract_answer(text) is None for text in texts_R) / len(texts_R)
    return {**{name: float(value) for name, value in numbers.items()}, "completions/parse_fail": unparsed}


def warn_of_silence(numbers, step, config, warned):
    """One line, once a run, where a step can teach nothing; returns what has been warned of."""
    faults = {"all completions were cut off by --max_completion_length": numbers["completions/clipped_ratio"] == 1,
              "in every group all completions got the same reward: the gradient is zero":
                  numbers["frac_reward_zero_std"] == 1}
    for fault, present in faults.items():
        if present and fault not in warned:
            print(f"warning, step {step}: {fault}", file=sys.stderr)
            warned = warned | {fault}
    return warned


class Update:
    """What one optimizer step trains on, worked out from a window of rollouts: the same on every process.

    `examples` are the rows that can move a weight, `rows` their places among the step's R rows; a row without
    advantage is left out, unless a KL or entropy term gives it a gradient, yet every row counts in `weights_R`.
    """

    def __init__(self, window, prompts_P, iteration, config):
        G, T = config.num_generations, window["tokens_RT"].shape[1]
        self.window, self.fresh, self.config = window, iteration == 0, config
        self.advantages_R = group_advantages(window["rewards_R"].view(-1, G), config.scale_rewards).flatten()
        cut_R = ~window["finished_R"] if config.mask_truncated_completions else torch.zeros_like(window["finished_R"])
        trained_R = window["lengths_R"].masked_fill(cut_R, 0)
        self.mask_RT = torch.arange(T) < trained_R[:, None]
        self.weights_R = row_weights(config.loss_type, trained_R, config.max_completion_length)
        moves_R = (self.advantages_R != 0) | bool(config.beta or config.entropy_coef)
        self.rows = (moves_R & (trained_R > 0)).nonzero()[:, 0].tolist()
        self.examples = []
        for row in self.rows:
            prompt, completion = prompts_P[row // G], window["tokens_RT"][row, : trained_R[row]].tolist()
            self.examples.append(Example(prompt + completion, [False] * len(prompt) + [True] * len(completion)))
        self.n_tokens = int(trained_R[self.rows].sum())

    def spread(self, values_RT, rows, batch):
        """Per-token values of `rows`, laid out like the batch: [B, S], 0 where nothing is trained."""
        values_N = values_RT[rows][self.mask_RT[rows]].to(batch.ids_BT.device)
        B, S = batch.mask_BS.shape
        return values_N.new_zeros(B * S).index_copy(0, batch.where_N, values_N).view(B, S)

    def loss_of(self, policy, reference, batch):
        """The batch's share of the step's loss, and of the numbers logged."""
        config, rows = self.config, [self.rows[i] for i in batch.rows]
        logps_BS, entropy_BS = policy(batch, config.temperature, entropy=True)
        if self.fresh:  # the first step on these rollouts: the policy is still the one that sampled them
            old_logps_BS = logps_BS.detach()
            if config.num_iterations > 1:
                self.keep(old_logps_BS, rows, batch)
        else:
            old_logps_BS = self.spread(self.window["old_logps_RT"], rows, batch)
        B = len(batch.mask_BS)
        advantages_B, weights_B = (torch.zeros(B).index_copy(0, torch.arange(len(rows)), values_R[rows]).to(logps_BS)
                                   for values_R in (self.advantages_R, self.weights_R))
        gain_BS = policy_gain(logps_BS, old_logps_BS, advantages_B, batch.mask_BS, config)
        gain_BS = gain_BS + config.entropy_coef * entropy_BS
        sampled_BS = self.spread(self.window["logps_RT"], rows, batch)
        numbers = {"entropy": entropy_BS.detach().sum(),
                   "clip_ratio": clip_share(logps_BS.detach(), old_logps_BS, advantages_B, batch.mask_BS, config),
                   "sampling/logp_difference": (old_logps_BS - sampled_BS).abs().sum()}
        if reference is not None:
            with torch.no_grad():
                reference_logps_BS, _ = reference(batch, config.temperature)
            kl_BS = kl_k3(logps_BS, reference_logps_BS)
            gain_BS, numbers["kl"] = gain_BS - config.beta * kl_BS, kl_BS.detach().sum()
        loss = -(gain_BS * batch.mask_BS * weights_B[:, None]).sum()
        return loss, {name: value / self.n_tokens for name, value in numbers.items()}

    def keep(self, old_logps_BS, rows, batch):
        """Writes the sampling policy's log-probs into the window, for the steps to come."""
        values_RT = self.window["old_logps_RT"][rows]
        values_RT[self.mask_RT[rows]] = old_logps_BS.flatten()[batch.where_N].cpu()
        self.window["old_logps_RT"][rows] = values_RT


def update_policy(policy, reference, optimizer, update, step, config, world):
    """One optimizer step on the rows of `update`: (numbers, taken)."""
    parts = micro_batches([len(example.ids) for example in update.examples], config.per_device_train_batch_size,
                          config.micro_batch_tokens, world)
    numbers, taken = train_step(policy, optimizer, [collate(update.examples, part, world.device) for part in parts],
                                lambda policy, batch: update.loss_of(policy, reference, batch), step, config, world)
    if update.fresh and config.num_iterations > 1 and dist.is_initialized():  # each process has met its own rows
        shared_RT = update.window["old_logps_RT"].to(world.device)
        dist.all_reduce(shared_RT)
        update.window["old_logps_RT"] = shared_RT.cpu()
    return numbers, taken


# --- main ---


def check_config(config):
    """Raises InputError for flags of this script that cannot be meant; fills in what depends on --loss_type."""
    clips = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 1.0)}
    if config.loss_type not in clips:
        raise InputError(f"--loss_type {config.loss_type}: must be one of {', '.join(clips)}")
    config.epsilon = config.epsilon or clips[config.loss_type][0]
    config.epsilon_high = config.epsilon_high or clips[config.loss_type][1]
    if config.scale_rewards not in ("auto", "group", "batch", "none"):
        raise InputError(f"--scale_rewards {config.scale_rewards}: must be one of auto, group, batch, none")
    if config.scale_rewards == "auto":
        config.scale_rewards = "none" if config.loss_type == "dr_grpo" else "group"
    for name, low in {"num_generations": 2, "num_iterations": 1, "max_prompt_length": 1, "generation_batch_size": 1,
                      "beta": 0, "entropy_coef": 0, "soft_overlong_tokens": 0, "epsilon": 0}.items():
        if getattr(config, name) < low:
            raise InputError(f"--{name} {getattr(config, name)}: must be {low} or more")
    if not config.temperature > 0:
        raise InputError(f"--temperature {config.temperature}: must be above 0 (at 0 all completions are equal)")
    for name in config.reward_funcs:
        if name not in REWARDS:
            raise InputError(f"--reward_funcs {name}: must be among {', '.join(REWARDS)}")
    if config.reward_weights and len(config.reward_weights) != len(config.reward_funcs):
        raise InputError(f"--reward_weights: {len(config.reward_weights)} weights for {len(config.reward_funcs)} "
                         "functions")


def load_prompts(problems, tokenizer, config):
    """The token ids of every problem's prompt; InputError for one over --max_prompt_length."""
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    for i, ids in enumerate(prompts):
        if len(ids) > config.max_prompt_length:
            raise InputError(f"--max_prompt_length {config.max_prompt_length}: the prompt of problem {i + 1} of "
                             f"--dataset_name {config.dataset_name} has {len(ids)} tokens")
    return prompts


def make_reference(config, world):
    """The model given, frozen, for --beta: loaded from --model_name_or_path even where a run continues; else None."""
    if not config.beta:
        return None
    model, _ = load_model(config.model_name_or_path, chat_template=config.chat_template)
    return shard(Policy(model.eval().requires_grad_(False).to(world.device)), config)


def check_reference(reference, state, config):
    """InputError where --model_name_or_path no longer holds the weights that this run's KL began with."""
    if reference is None:
        return
    digest = hashlib.sha256()
    for parameter in reference.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        digest.update(local.cpu().view(torch.uint8).numpy().tobytes())
    if state.setdefault("reference", digest.hexdigest()) != digest.hexdigest() and not config.fsdp:
        raise InputError(f"--model_name_or_path {config.model_name_or_path}: not the weights this run began with, and "
                         "--beta is measured from them")


def main(config):
    check_frame(config)
    check_config(config)
    world = start_world(config)
    args = run_args(config, world)
    n_prompts, rest = divmod(args["rows_per_step"], config.num_generations)
    if rest:
        raise InputError(f"--num_generations {config.num_generations}: must divide the {args['rows_per_step']} rows "
                         "of a step (per_device_train_batch_size x gradient_accumulation_steps x processes)")
    resume, finished = on_rank_0(lambda: open_run(config, args), world)
    if finished:
        return
    problems, eval_problems = load_train_problems(config), load_eval_problems(config)
    model, tokenizer = load_model(str(resume) if resume and not config.fsdp else config.model_name_or_path,
                                  chat_template=config.chat_template)
    prompts = load_prompts(problems, tokenizer, config)
    fill_learning_rate(config, model, small=5e-5, large=1e-6)
    run = begin_run(config, world, resume, args, [prompts, [problem.answer for problem in problems]])

    reference, decoder = make_reference(config, world), make_decoder(model, config)
    policy = distribute(model, config, world)
    optimizer = make_optimizer(policy, config)
    state, window = {"step": 0, "bad_steps": 0, "about": {}}, {}
    if resume:
        state, window = load_checkpoint(resume, policy, optimizer, config)
    check_reference(reference, state, config)
    log, stop, warned = Log(run, config, world), StopSignal(), frozenset()

    while state["step"] < config.max_steps:
        began, step = time.perf_counter(), state["step"]
        number, iteration = divmod(step, config.num_iterations)
        picked = rows_of_step(len(problems), n_prompts, number, config.seed)
        prompts_P, problems_P = [prompts[i] for i in picked], [problems[i] for i in picked]
        if iteration == 0:
            refresh(decoder, policy)
            rollouts = roll_out(decoder, tokenizer, prompts_P, number, config, world)
            texts_R = rollouts.texts(tokenizer)
            scores_RF, rewards_R = score(problems_P, texts_R, rollouts, config)
            state["about"] = describe(scores_RF, rewards_R, rollouts, texts_R, config)
            window = {**vars(rollouts), "rewards_R": rewards_R, "old_logps_RT": torch.zeros_like(rollouts.logps_RT)}
            warned = warn_of_silence(state["about"], step + 1, config, warned)
            if world.rank == 0:
                for row in range(2):
                    append_line(run / "samples.jsonl", {
                        "step": step + 1, "prompt": problems_P[0].prompt, "completion": texts_R[row],
                        "answer": problems_P[0].answer, "reward": float(rewards_R[row])})
        torch.manual_seed(hash((config.seed, step, world.rank)))  # dropout, where a model has it
        update = Update(window, prompts_P, iteration, config)
        numbers, taken = update_policy(policy, reference, optimizer, update, step, config, world)
        note_step(run, state, taken, picked, config, world)
        numbers = {**state["about"], **numbers, "learning_rate": scheduled_rate(step, config)}
        last, seconds = state["step"] == config.max_steps, time.perf_counter() - began
        if eval_problems and (last or state["step"] % config.eval_steps == 0):
            numbers |= evaluate_policy(run, state["step"], decoder, policy, tokenizer, eval_problems, config, world)
        log.step(state["step"], numbers, ("reward", "eval/accuracy", "entropy", "clip_ratio", "frac_reward_zero_std",
                                          "completions/mean_length", "grad_norm"),
                 int(window["lengths_R"].sum()), seconds)
        stopping = stop.agreed(world)
        if last or stopping or (config.save_steps and state["step"] % config.save_steps == 0):
            midway = state["step"] % config.num_iterations  # the rollouts are still needed
            save_checkpoint(run, state, policy, tokenizer, optimizer, config, world, window if midway else None)
        if stopping and not last:
            sys.exit(128 + stopping)
    end_run(run, policy, tokenizer, world)


if __name__ == "__main__":
    launch(main, Config)
