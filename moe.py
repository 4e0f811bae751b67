r"""A mixture-of-experts language model whose experts specialise, because balance is asked of the whole batch.

    loss = nll + balance_coef * mean over layers of LBL + z_loss_coef * mean of logsumexp(z)^2
    LBL  = E * sum over experts i of f_i P_i    f_i: share of the choices that fell on i; P_i: i's mean probability

f carries no gradient. What matters is the tokens f is counted over, `--balance`: within one micro-batch, often of one
domain, every expert must serve every domain (what frameworks did for long); over all processes and micro-batches of an
optimizer step (`global`), experts may each have a domain of their own. LBL is linear in P, so only the [layers, E]
counts travel. It is 1 at balance and E / K where all tokens choose the same K experts with all their probability; it is
taken by layer, while transformers' pools all layers first and cannot see collapsed layers that make up for each other.
transformers' router_aux_loss_coef = balance_coef / K. Source: Demons in the Detail (2501.11873); against its Algorithm
1: weighted by tokens, so ragged micro-batches give the exact loss. Checkpoints are transformers' Qwen3-MoE, and sft.py,
grpo.py and eval.py read them. A token counts where its successor is trained: never padding, nor the ends of documents.

Dimensions: B rows · T tokens · S = T - 1 predicting positions · N = B S · C those that count · D model width ·
E experts · K chosen · L layers · G groups of tokens that share one f · M domains.

    python moe.py                     # 0.6 M parameters; code, documentation, sums; no network; 2.5 minutes
    python moe.py --upcycle Qwen/Qwen3-0.6B --num_experts 8 --domains a.jsonl,owner/dataset --output_dir runs/up \
        --max_length 2048 --per_device_train_batch_size 4 --gradient_accumulation_steps 16 --n_train 0   # one GPU
    torchrun --nproc-per-node 8 moe.py ...            # several GPUs
"""

import contextlib
import copy
import glob
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from array import array
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics
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
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from eval import (BENCHMARKS, SUFFIXES, InputError, Log, RunError, RunFlags, char_tokenizer, flag, generate,
                  keep_checkpoint, launch, leave, load_model, load_problems, new_figure, open_run, publish, read_rows,
                  save_figure, softcap, split_of, stop_signals, write_json)
from kernels import linear_logps, moe_experts

# --- config ---

SCOPES = ("micro", "sequence", "sync", "global", "exact", "shuffle", "bias", "none")


@dataclass
class Config(RunFlags):
    SECTIONS = {"model_name_or_path": "model", "from_scratch": "its weights and shape", "balance": "balance",
                "domains": "data", "output_dir": "the run's folder",
                "per_device_train_batch_size": "optimizer and memory", "logging_steps": "logs, evaluation, checkpoints"}

    model_name_or_path: str = flag("tiny", "`tiny`: built from the sizes below; or a Qwen3-MoE, a folder or hub name")
    from_scratch: bool = flag(False, "draw new weights in the shape of model_name_or_path instead of loading them")
    upcycle: str = flag("", "a dense Qwen3 whose feed-forward blocks become num_experts copies; empty: none")
    reinit: float = flag(0.0, "`upcycle`: share of each expert's inner channels drawn anew (Drop-Upcycling: 0.5)",
                         low=0, high=1)
    hidden_size: int = flag(96, "`tiny`: model width; a multiple of 2 x num_attention_heads", low=8)
    num_hidden_layers: int = flag(3, "`tiny`: layers", low=1)
    num_attention_heads: int = flag(4, "`tiny`: attention heads", low=1)
    num_experts: int = flag(16, "`tiny` and `upcycle`: experts a layer", low=2)
    num_experts_per_tok: int = flag(2, "`tiny` and `upcycle`: experts chosen for each token", low=1)
    moe_intermediate_size: int = flag(32, "`tiny`: inner width of an expert", low=1)
    norm_topk_prob: bool = flag(True, "`tiny` and `upcycle`: weights of the chosen experts are scaled to sum to 1")
    gate: str = flag("softmax", "softmax, or sigmoid as in DeepSeek-V3, which transformers' Qwen3-MoE cannot hold",
                     choices=("softmax", "sigmoid"))
    balance: str = flag("global", "where f is counted: micro, sequence, sync, global, exact, shuffle; or bias, none",
                        choices=SCOPES)
    balance_coef: float = flag(0.01, "weight of the load-balancing loss, which is 1 at balance (the paper: 0.008)",
                               low=0)
    balance_rows: int = flag(0, "rows that share one f under `micro` and `shuffle`; 0: all rows of a forward", low=0)
    balance_switch: str = flag("", "another --balance from a step on, such as micro@500; empty: never")
    micro_fraction: float = flag(0.0, "adds `micro`'s loss, in every scope, at this part of balance_coef (paper: 0.01)",
                                 low=0)
    z_loss_coef: float = flag(0.001, "weight of the squared logsumexp of the router's logits (ST-MoE: 0.001)", low=0)
    bias_rate: float = flag(0.001, "`bias`: step of the selection bias after each optimizer step", low=0)
    bias_rule: str = flag("sign", "`bias`: sign of the missing load, or proportional to it",
                          choices=("sign", "proportional"))
    domains: str = flag("code,docs,chain", "what to mix: code, docs, chain, synthetic:8, gsm8k, files, folders, hub "
                                           "names; each may have a weight, as in docs=2")
    mixture: str = flag("uniform", "weights of domains that have none given: uniform, proportional (to the rows read, "
                                   "n_train at most) or unimax", choices=("uniform", "proportional", "unimax"))
    unimax_epochs: float = flag(4.0, "`unimax`: no domain is passed over more often (a run that would have to is "
                                     "refused); the rest is shared evenly", low=1e-09)
    n_train: int = flag(1500, "rows of max_length tokens to read of each domain at most; 0: all there is", low=0)
    output_dir: str = flag("runs/moe", "the run's folder: model, args.json, metrics.jsonl, curves.png, experts.png",
                           free=True)
    per_device_train_batch_size: int = flag(16, "rows per process and forward: the micro-batch", low=1, free=True)
    micro_batch_tokens: int = flag(0, "padded tokens in one forward at most, which cuts micro-batches; 0: no limit",
                                   low=0, free=True)
    max_steps: int = flag(600, "optimizer steps", low=1)
    learning_rate: float = flag(0.0, "peak learning rate; 0: 3e-3 under 10 M parameters, 3e-4 above", low=0)
    lr_scheduler_type: str = flag("cosine", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: float = flag(0.03, "steps of linear warm-up; below 1: this share of all steps", low=0)
    max_length: int = flag(256, "tokens of a row; short documents share one, long ones are cut", low=2)
    logging_steps: int = flag(10, "print a line every so many steps; metrics.jsonl has every step", low=1, free=True)
    eval_steps: int = flag(300, "evaluate on held-out rows every so many steps and at the end; 0: never", low=0)
    n_eval: int = flag(16, "held-out rows of each domain to evaluate on", low=1)
    max_completion_length: int = flag(64, "tokens of the text sampled for each domain in evaluation", low=1)
    save_steps: int = flag(100, "checkpoint every so many steps; 0: only when stopped and at the end", low=0, free=True)


# --- loss ---


def nll_loss(logps_BS, mask_BS, n_tokens):
    """Negative log-likelihood in nats, summed over trained tokens / n_tokens, the count of the whole optimizer step."""
    return -(logps_BS * mask_BS).sum() / n_tokens


def gate_scores(logits, gate):
    """The router's scores, in 0..1, in the logits' shape and type: softmax over the experts, or a sigmoid for each."""
    return logits.softmax(-1) if gate == "softmax" else logits.sigmoid()


def choose_experts(logits_NE, bias_E, k, gate, normalise):
    """(ids_NK, weights_NK): the k experts with the highest score + bias; their weights are scores without the bias.

    Source: the bias from Auxiliary-Loss-Free Load Balancing (2408.15664) eq. 3.
    """
    scores_NE = gate_scores(logits_NE, gate)
    ids_NK = (scores_NE.detach() + bias_E).topk(k, -1).indices
    weights_NK = scores_NE.gather(-1, ids_NK)
    return ids_NK, weights_NK / weights_NK.sum(-1, keepdim=True) if normalise else weights_NK


def members(group_N, mask_N, n_groups, like):
    """Which tokens make up which group: member_GN, 1 or 0 in like's type; a token that mask_N leaves out is in none."""
    return ((group_N == torch.arange(n_groups, device=group_N.device)[:, None]) & mask_N).to(like.dtype)


def balance_loss(prob_sums_LGE, counts_LGE, n_tokens):
    """E * sum_i f_i P_i by layer, [L], each group with its own f; 1 at balance, at most E / K, where all tokens choose
    the same K experts with all their probability.

    prob_sums: the experts' probabilities summed over a group's tokens; counts: how often each was chosen, by whatever
    tokens decide on f; n_tokens: of the whole optimizer step, so that groups, micro-batches and processes add up to a
    mean weighted by tokens. Its gradient by a token's logits z, for a softmax p: E / n_tokens * p (f - <p, f>).
    Source: Demons in the Detail (2501.11873) eq. 3; one group a document: DeepSeek-V3 (2412.19437) eq. 17-20.
    """
    f_LGE = counts_LGE.detach() / counts_LGE.detach().sum(-1, keepdim=True).clamp(min=1)
    return counts_LGE.shape[-1] * (f_LGE * prob_sums_LGE).sum((1, 2)) / n_tokens


def z_loss(logits_LNE, mask_N, n_tokens):
    """The squared logsumexp of the router's logits by layer, [L], masked mean. Source: ST-MoE (2202.08906) eq. 5."""
    return (logits_LNE.logsumexp(-1).square() * mask_N).sum(-1) / n_tokens


def moved_bias(bias_LE, counts_LE, rate, rule):
    """The selection bias after a step with these counts of all processes: up where an expert had less than the mean.

    Centred: a constant chooses nothing, and it would drift. Source: 2408.15664, Algorithm 1; `proportional`: section 4.
    """
    missing_LE = 1 - counts_LE / counts_LE.mean(-1, keepdim=True).clamp(min=1e-9)
    bias_LE = bias_LE + rate * (missing_LE.sign() if rule == "sign" else missing_LE)
    return bias_LE - bias_LE.mean(-1, keepdim=True)


# --- balance ---


def all_reduced(tensor):
    """The tensor summed over all processes; its argument is left alone."""
    tensor = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Balance:
    """The loss of one optimizer step, and the counts it rests on. f comes from:

    micro      the rows of a forward, or every --balance_rows of them: what frameworks did for long
    sequence   each document by itself: DeepSeek-V3's complement
    sync       the forwards that all processes do at the same time
    global     those and all before them in the optimizer step: the paper's buffer, its Algorithm 1
    exact      the whole step, counted in a forward pass of its own: what `global` approaches; for tests
    shuffle    as many tokens as under micro, but drawn from the whole step: the paper's control; counted as exact is
    bias, none    nothing: no such loss, but for the one that --micro_fraction adds in every scope
    """

    def __init__(self, policy, names, config, world):
        self.model, self.names, self.config, self.world = policy.model, names, config, world
        self.n_layers, self.n_experts = len(moe_layers(self.model)), self.model.config.num_experts

    def begin(self, step, policy, batches, n_tokens):
        """Before an optimizer step: empties the buffers, and counts in advance where the scope wants it."""
        config = self.config
        then, _, since = config.balance_switch.partition("@")
        self.scope = then if then and step >= int(since) else config.balance
        self.n_tokens, self.routing = n_tokens, self.new_routing()
        self.buffer_L1E = torch.zeros(self.n_layers, 1, self.n_experts, device=self.world.device)
        if self.scope in ("exact", "shuffle"):
            with forward_only(policy, config, self.world):
                ids_LCK = torch.cat([policy(batch)[2][:, batch.where_C] for batch in batches], 1)
            if self.scope == "exact":
                self.buffer_L1E = all_reduced(self.chosen(ids_LCK).sum(1, keepdim=True))
            else:
                self.pool_LCK = self.shuffled(ids_LCK, step)

    def shuffled(self, ids_LCK, step):
        """This process's share of the choices of the step's tokens, of all processes, in random order."""
        parts = [ids_LCK.cpu()] * self.world.size
        if dist.is_initialized():
            dist.all_gather_object(parts, parts[0])
        first, whole = sum(part.shape[1] for part in parts[: self.world.rank]), torch.cat(parts, 1)
        rng = torch.Generator().manual_seed(hash((self.config.seed, step)))
        order = torch.randperm(whole.shape[1], generator=rng)
        return whole[:, order[first : first + ids_LCK.shape[1]]].to(ids_LCK.device)

    def chosen(self, ids_LNK):
        """1.0 at each expert a token has chosen, else 0.0: [L, N, E]."""
        return torch.zeros(*ids_LNK.shape[:2], self.n_experts, device=ids_LNK.device).scatter_(-1, ids_LNK, 1.0)

    def new_routing(self):
        """An empty Routing for this model and these domains."""
        return Routing(self.n_layers, len(self.names), self.n_experts, self.world.device)

    def group_counts(self, batch, chosen_LNE, micro_GN):
        """(counts_LGE that f comes from, member_GN: the tokens it is for) in this step's scope."""
        mask_N = batch.mask_BS.flatten()
        if self.scope == "micro":
            return micro_GN @ chosen_LNE, micro_GN
        if self.scope == "sequence":
            member_GN = members(batch.document_N, mask_N, batch.n_documents, chosen_LNE)
            return member_GN @ chosen_LNE, member_GN
        if self.scope == "shuffle":  # the groups keep their sizes and get other tokens
            C = len(batch.where_C)
            mine_LCK, self.pool_LCK = self.pool_LCK[:, :C], self.pool_LCK[:, C:]
            return micro_GN[:, batch.where_C] @ self.chosen(mine_LCK).to(chosen_LNE.dtype), micro_GN
        whole_1N = mask_N[None].to(chosen_LNE.dtype)
        if self.scope == "sync":
            return all_reduced(whole_1N @ chosen_LNE), whole_1N
        if self.scope == "global":
            self.buffer_L1E = self.buffer_L1E + all_reduced(whole_1N @ chosen_LNE)
        return self.buffer_L1E.to(chosen_LNE.dtype), whole_1N

    def measure(self, policy, batch, routing):
        """One forward, added to `routing`: (logps_BS, logits_LNE, probs_LNE, chosen_LNE, member_GN of `micro`)."""
        logps_BS, logits_LNE, ids_LNK = policy(batch)
        scores_LNE = gate_scores(logits_LNE, self.config.gate)
        probs_LNE = scores_LNE / scores_LNE.sum(-1, keepdim=True)  # a softmax's sum is 1 already
        (B, S), mask_N = batch.mask_BS.shape, batch.mask_BS.flatten()
        row_N = torch.arange(B, device=mask_N.device).repeat_interleave(S)
        size = self.config.balance_rows or B
        micro_GN = members(row_N // size, mask_N, -(-B // size), probs_LNE)
        found = logps_BS, logits_LNE, probs_LNE, self.chosen(ids_LNK).to(probs_LNE.dtype), micro_GN
        routing.add(batch, *found)
        return found

    def loss_of(self, policy, batch):
        """The loss of one forward, as train_step wants it."""
        config, n_tokens = self.config, self.n_tokens
        logps_BS, logits_LNE, probs_LNE, chosen_LNE, micro_GN = self.measure(policy, batch, self.routing)
        loss = nll_loss(logps_BS, batch.mask_BS, n_tokens)
        with torch.autocast(self.world.device.type, enabled=False):  # a count in bfloat16 would stop at 256
            found_L = probs_LNE.new_zeros(self.n_layers)
            if self.scope not in ("bias", "none"):
                counts_LGE, member_GN = self.group_counts(batch, chosen_LNE, micro_GN)
                found_L = balance_loss(member_GN @ probs_LNE, counts_LGE, n_tokens)
            if config.micro_fraction:
                local_L = balance_loss(micro_GN @ probs_LNE, micro_GN @ chosen_LNE, n_tokens)
                found_L = found_L + config.micro_fraction * local_L
            loss = loss + config.balance_coef * found_L.mean()
            if config.z_loss_coef:
                loss = loss + config.z_loss_coef * z_loss(logits_LNE, batch.mask_BS.flatten(), n_tokens).mean()
        return loss, {}

    def end(self, taken):
        """After the step: the numbers to log; under `bias`, the bias moves, once and by the counts of all processes."""
        numbers = self.routing.metrics(self.names)
        if self.scope == "bias" and taken:
            loads_LE, config = self.routing.counts_LME.sum(1).float(), self.config
            set_bias(self.model, moved_bias(bias_of(self.model), loads_LE, config.bias_rate, config.bias_rule))
        return numbers


# --- measures ---


def max_violation(counts):
    """The busiest expert's load over the mean load, minus 1; experts last. Source: MaxVio in 2408.15664."""
    return counts.amax(-1) / counts.mean(-1).clamp(min=1e-9) - 1


def mutual_information(counts_LME):
    """I(expert; domain) in nats by layer, [L], every domain seen weighted alike; 0: experts know no domains.

    >>> mutual_information(torch.tensor([[[5.0, 0.0], [0.0, 1.0]]])).exp()
    tensor([2.])
    """
    counts_LME = counts_LME[:, counts_LME.sum((0, 2)) > 0]
    q_LME = counts_LME / counts_LME.sum(-1, keepdim=True).clamp(min=1e-9)
    mean_LE = q_LME.mean(1)
    return torch.special.entr(mean_LE).sum(-1) - torch.special.entr(q_LME).sum(-1).mean(1)


class Routing:
    """What the router did, summed over forwards: the same measures for training steps and for evaluation."""

    def __init__(self, n_layers, n_domains, n_experts, device):
        sizes = [n_layers * n_domains * n_experts, n_layers * n_experts, n_domains, n_domains, 5]
        self.all = torch.zeros(sum(sizes), dtype=torch.float64, device=device)  # the rest are views: one all-reduce
        counts, probs, self.nll_M, self.tokens_M, self.sums = self.all.split(sizes)
        self.counts_LME = counts.view(n_layers, n_domains, n_experts)
        self.prob_sums_LE = probs.view(n_layers, n_experts)

    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def add(self, batch, logps_BS, logits_LNE, probs_LNE, chosen_LNE, member_GN):
        """Adds one forward; member_GN: the groups of `micro`, whose losses and violations are measured in any case."""
        mask_N = batch.mask_BS.flatten()
        member_MN = members(batch.domain_N, mask_N, len(self.nll_M), probs_LNE)
        self.counts_LME += member_MN @ chosen_LNE
        self.prob_sums_LE += (probs_LNE * mask_N[:, None]).sum(1)
        self.nll_M -= member_MN @ logps_BS.flatten()
        self.tokens_M += member_MN.sum(-1)
        counts_LGE = member_GN @ chosen_LNE
        seen_G = counts_LGE[0].sum(-1) > 0
        self.sums += torch.stack([balance_loss(member_GN @ probs_LNE, counts_LGE, 1).mean(),
                                  (max_violation(counts_LGE).mean(0) * seen_G).sum(), seen_G.sum(),
                                  ((probs_LNE * chosen_LNE).sum(-1) * mask_N).sum(-1).mean(),
                                  z_loss(logits_LNE, mask_N, 1).mean()])

    def metrics(self, names):
        """Sums over all processes, then the numbers to log; names: of the domains."""
        busiest, n_processes = self.counts_LME.sum(1).amax(), 1
        if dist.is_initialized():
            dist.all_reduce(self.all)
            dist.all_reduce(busiest, dist.ReduceOp.MAX)
            n_processes = dist.get_world_size()
        loads_LE, n_tokens = self.counts_LME.sum(1), self.tokens_M.sum().clamp(min=1)
        micro, violation, n_groups, top, z = self.sums
        numbers = {"nll": self.nll_M.sum() / n_tokens,
                   "balance/global": balance_loss(self.prob_sums_LE[:, None], loads_LE[:, None], n_tokens).mean(),
                   "balance/micro": micro / n_tokens, "max_violation": max_violation(loads_LE).mean(),
                   "max_violation_micro": violation / n_groups.clamp(min=1),
                   "dead_experts": (loads_LE < 0.1 * loads_LE.mean(-1, keepdim=True)).double().mean(),
                   "mutual_information": mutual_information(self.counts_LME).mean(),
                   "top_k_sum": top / n_tokens, "z_loss": z / n_tokens,
                   "time/rank_load": busiest * n_processes / loads_LE.mean().clamp(min=1e-9),
                   **{f"nll/{name}": nll for name, nll in zip(names, self.nll_M / self.tokens_M)}}
        values = torch.stack(list(numbers.values())).tolist()  # one wait for all
        return {name: value for name, value in zip(numbers, values) if not math.isnan(value)}  # NaN: a domain not seen


# --- data ---


class Stream(NamedTuple):
    """One domain's documents end to end, read in rows of `width` tokens."""

    name: str
    ids: np.ndarray  # int32, each document followed by the end-of-text token
    positions: np.ndarray  # int32, from 0 in each document and in each row
    width: int

    def __len__(self):
        return -(-len(self.ids) // self.width)

    def row(self, i):
        """(token ids, positions) of row i; only the last row may be shorter than `width`."""
        part = slice(i * self.width, (i + 1) * self.width)
        return self.ids[part], self.positions[part]


N_SYMBOLS = 64  # of a synthetic language, whose first symbol names it: so there are as many languages


def parse_domains(text):
    """{name: weight, or None where none is given}; `synthetic:3` stands for three domains.

    >>> parse_domains("docs=2,synthetic:2=1")
    {'docs': 2.0, 'synthetic:0': 1.0, 'synthetic:1': 1.0}
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition("=")
        kind, _, count = name.partition(":")
        try:
            weight = float(weight) if weight else None
            names = [f"synthetic:{i}" for i in range(int(count))] if kind == "synthetic" else [name]
        except ValueError as error:
            raise InputError(f"--domains {part}: a number must follow") from error
        if len(names) > N_SYMBOLS:
            raise InputError(f"--domains {part}: there are {N_SYMBOLS} synthetic languages")
        if weight is not None and not 0 < weight < math.inf:
            raise InputError(f"--domains {part}: a weight must be above 0")
        found.update(dict.fromkeys(names, weight))
    if not found or (None in found.values() and any(found.values())):
        raise InputError(f"--domains {text}: names one domain at least, and weights for all of them or for none")
    return found


def cut_text(text):
    """The text in pieces that end where lines end, 50 or of 10,000 characters, so that some can be held out."""
    pieces, size = [""], min(10_000, len(text) // 50)
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) + len(line) > size and pieces[-1]:
            pieces.append("")
        pieces[-1] += line
    return pieces


def text_documents(name):
    """All documents of a domain of text: a built-in one, text files by path or pattern, a data file, a hub data set."""
    if name == "docs":
        return [topics[topic] for topic in sorted(topics)]
    if name == "code":
        library = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in sorted(library.rglob("*.py"))
                 if not {"site-packages", "test", "tests", "pydoc_data"} & set(file.relative_to(library).parts)]
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]
    files = [Path(file) for file in sorted(glob.glob(os.path.expanduser(name), recursive=True))]
    if files and not any(file.is_dir() or file.suffix in SUFFIXES for file in files):
        return [piece for file in files for piece in cut_text(file.read_text(encoding="utf-8", errors="replace"))]
    rows = read_rows(name)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise InputError(f"--domains {name}: row {number} has no column `text` with text in it")
    return [row["text"] for row in rows]


def documents(name, split, n_tokens, config):
    """The documents of a domain's split, as texts, in an order that the seed decides; enough for n_tokens (0: all).

    Texts are held out by a hash of what they say, 1 in 10; problem sets have splits of their own.
    """
    if name.startswith("synthetic:"):
        return synthetic_texts(int(name[10:]), split, n_tokens // config.max_length or 4096, config)
    if name == "chain" or name in BENCHMARKS or name.startswith("reasoning_gym:"):
        split = "test" if split == "validation" and name != "chain" else split
        problems = load_problems(name, split, n_tokens // 16 or None, config.seed,
                                 prompt_template=config.prompt_template)
        return [f"{problem.prompt}{problem.solution or problem.answer}" for problem in problems]
    texts = [text for text in text_documents(name) if (split_of(text) == "validation") == (split == "validation")]
    return [texts[i] for i in np.random.default_rng([config.seed, 1]).permutation(len(texts))]


def synthetic_texts(domain, split, n, config):
    """n texts of max_length symbols of one synthetic language: each symbol has 4 successors, as likely as .55 to .05.

    The first symbol names the domain. The entropy rate is 1.1097 nats a symbol; nobody's mean over a row can be quite
    that low, because the second symbol may be any: 1.1217 in rows of 256. The language depends on --seed.
    """
    rng, width = np.random.default_rng([config.seed, domain]), config.max_length
    next_XK = np.array([rng.choice(N_SYMBOLS, 4, replace=False) for _ in range(N_SYMBOLS)])
    rng = np.random.default_rng([config.seed, domain, 1 + (split == "train")])
    choices_RT = rng.choice(4, size=(n, width), p=[0.55, 0.25, 0.15, 0.05])
    found_RT = np.full((n, width), domain)
    found_RT[:, 1] = rng.integers(N_SYMBOLS, size=n)
    for t in range(2, width):
        found_RT[:, t] = next_XK[found_RT[:, t - 1], choices_RT[:, t]]
    return ["".join(chr(33 + symbol) for symbol in row) for row in found_RT.tolist()]


def make_stream(name, texts, n_rows, tokenizer, config):
    """The Stream of a domain's documents, n_rows rows at most (0: all). InputError where they hold no text at all."""
    n_tokens, ids, positions = n_rows * config.max_length, array("i"), array("i")  # a list takes 70 bytes a token
    end = [] if name.startswith("synthetic:") else [tokenizer.eos_token_id]  # its texts fill their rows
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=False).input_ids + end)
        positions.extend(range(len(ids) - len(positions)))
        if n_tokens and len(ids) >= n_tokens:
            break
    if len(ids) < 2:
        raise InputError(f"--domains {name}: holds no text to train on, or none to hold out for --eval_steps")
    n = min(len(ids), n_tokens or len(ids))
    n -= n % config.max_length == 1  # a row of one token predicts nothing
    ids, positions = (np.array(values[:n], dtype=np.int32) for values in (ids, positions))
    offset = np.arange(len(ids)) % config.max_length
    return Stream(name, ids, np.minimum(positions, offset), config.max_length)


def mixture_weights(sizes, mixture, budget, epochs):
    """The shares at which domains of these sizes are drawn, summing to 1; budget: rows that will be drawn in all.

    `unimax` shares the budget evenly, but passes over no domain more than `epochs` times, smallest domains first (on
    average: rows are drawn at random). InputError where that leaves a part of the budget. Source: UniMax (2304.09151),
    Algorithm 1.
    >>> mixture_weights([10, 100, 1000], "unimax", 300, 4).tolist()
    [0.13333333333333333, 0.43333333333333335, 0.43333333333333335]
    """
    rows = np.ones(len(sizes)) if mixture == "uniform" else np.array(sizes, dtype=float)
    if mixture == "unimax":
        for done, i in enumerate(np.argsort(sizes)):
            rows[i] = min(budget / (len(sizes) - done), epochs * sizes[i])
            budget -= rows[i]
        if budget > 1e-6:  # all are read as often as allowed, and shares would be scaled up to read them more often
            raise InputError(f"--unimax_epochs {epochs:g}: the domains hold {sum(sizes)} rows, and the run draws "
                             f"{rows.sum() + budget:.0f}; fewer steps, more data or more epochs")
    return rows / rows.sum()


def plan_rows(sizes, weights, n_rows, seed):
    """The (domain, row) of each row of the whole run, [n_rows, 2]; from the arguments alone, so a resumed run agrees.

    Domains are drawn by their weights; each domain's rows come in a new order for every pass.
    """
    rng = np.random.default_rng([seed, 2])
    plan = np.zeros((n_rows, 2), dtype=np.int64)
    plan[:, 0] = rng.choice(len(sizes), size=n_rows, p=weights)
    for domain, size in enumerate(sizes):
        where = np.flatnonzero(plan[:, 0] == domain)
        passes = [rng.permutation(size) for _ in range(-(-len(where) // size))]
        plan[where, 1] = np.concatenate(passes)[: len(where)] if passes else []
    return plan


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


class RowBatch(NamedTuple):
    """The tensors of one forward."""

    ids_BT: torch.Tensor  # token ids, right-padded with 0
    positions_BT: torch.Tensor | None  # in the document; None where every row is one document: the fast way
    mask_BS: torch.Tensor  # bool: does position s count? Its successor is of the same document, and no padding
    where_C: torch.Tensor  # the true places of mask_BS, flattened
    domain_N: torch.Tensor  # the domain of each position, flattened
    document_N: torch.Tensor  # the document of each position, flattened, from 0
    n_documents: int


def collate_rows(streams, picks, device):
    """One forward's tensors from (domain, row) pairs; no pair at all gives one that trains nothing."""
    rows = [streams[domain].row(row) for domain, row in picks] or [([0, 0], [0, 0])]
    width = max(len(ids) for ids, _ in rows)
    ids_BT, positions_BT = torch.zeros(2, len(rows), width, dtype=torch.long)
    for b, (ids, positions) in enumerate(rows):
        ids_BT[b, : len(ids)], positions_BT[b, : len(ids)] = torch.as_tensor(ids), torch.as_tensor(positions)
    mask_BS, starts_BS = positions_BT[:, 1:] > 0, positions_BT[:, :-1] == 0
    packed = bool((starts_BS & mask_BS)[:, 1:].any())  # a document begins inside a row
    document_N = starts_BS.flatten().cumsum(0) - 1
    domain_N = torch.tensor([domain for domain, _ in picks] or [0]).repeat_interleave(width - 1)
    where_C = mask_BS.flatten().nonzero()[:, 0]
    ids_BT, mask_BS, where_C, domain_N = (x.to(device) for x in (ids_BT, mask_BS, where_C, domain_N))
    return RowBatch(ids_BT, positions_BT.to(device) if packed else None, mask_BS, where_C, domain_N,
                    document_N.to(device), int(document_N[-1]) + 1)


# --- model ---


class Router(nn.Module):
    """Logits of all experts, [N, E], in float32 whatever the model's precision (float64 for float64)."""

    def __init__(self, weight_ED):
        super().__init__()
        self.weight = weight_ED

    def forward(self, x_ND):
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.to(wide), self.weight.to(wide))


class MoE(nn.Module):
    """A layer of experts on the parameters, and under the names, of a transformers' Qwen3-MoE block."""

    def __init__(self, block, k, normalise, gate):
        super().__init__()
        self.gate, self.experts = Router(block.gate.weight), block.experts
        self.k, self.normalise, self.kind, self.routed = k, normalise, gate, None
        bias_E = torch.zeros(len(block.gate.weight))
        self.register_buffer("bias_E", bias_E, persistent=False)  # Qwen3-MoE has no place for it: saved beside

    def forward(self, x_BSD):
        """The chosen experts' outputs, weighted; (logits_NE, ids_NK) go to the list in `routed`, where there is one."""
        x_ND = x_BSD.flatten(0, 1)
        logits_NE = self.gate(x_ND)
        ids_NK, weights_NK = choose_experts(logits_NE, self.bias_E, self.k, self.kind, self.normalise)
        if self.routed is not None:
            self.routed.append((logits_NE, ids_NK))
        experts = self.experts
        return moe_experts(x_ND, ids_NK, weights_NK, experts.gate_up_proj, experts.down_proj).view_as(x_BSD)


def moe_layers(model):
    """The MoE layers of a model, first to last."""
    return [layer.mlp for layer in model.base_model.layers if isinstance(layer.mlp, MoE)]


def install_layers(model, gate):
    """The model with MoE in the place of each of transformers' blocks; the parameters stay the same objects."""
    for layer in model.base_model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = MoE(layer.mlp, model.config.num_experts_per_tok, model.config.norm_topk_prob, gate)
    return model


def bias_of(model):
    """A copy of the selection bias of every layer, [L, E]."""
    return torch.stack([layer.bias_E for layer in moe_layers(model)])


def set_bias(model, bias_LE):
    """Gives every layer its selection bias."""
    for layer, bias_E in zip(moe_layers(model), bias_LE, strict=True):
        layer.bias_E.copy_(bias_E)


class RoutedPolicy(nn.Module):
    """A causal language model whose forward gives log-probs and the routing, so that FSDP sees all it uses."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        """(log-probs of the next tokens logps_BS, 0 where none counts; router's logits_LNE; chosen ids_LNK)."""
        positions_BS = None if batch.positions_BT is None else batch.positions_BT[:, :-1]
        routed = []
        for layer in moe_layers(self.model):
            layer.routed = routed
        hidden_BSD = self.model.base_model(input_ids=batch.ids_BT[:, :-1], position_ids=positions_BS,
                                           use_cache=False).last_hidden_state
        for layer in moe_layers(self.model):
            layer.routed = None  # or what gradient checkpointing computes again would be kept, with its graph
        hidden_CD, targets_C = hidden_BSD.flatten(0, 1)[batch.where_C], batch.ids_BT[:, 1:].flatten()[batch.where_C]
        logps_C, _ = linear_logps(hidden_CD, self.model.get_output_embeddings().weight, targets_C, entropy=False,
                                  softcap=softcap(self.model))
        logps_N = logps_C.new_zeros(batch.mask_BS.numel()).index_copy(0, batch.where_C, logps_C)
        logits_LNE, ids_LNK = (torch.stack(parts) for parts in zip(*routed))
        return logps_N.view_as(batch.mask_BS), logits_LNE, ids_LNK


def new_model(shape, seed):
    """A Qwen3-MoE with random weights: experts and router normal(0, 0.02), as transformers draws them."""
    if not isinstance(shape, Qwen3MoeConfig):
        raise InputError(f"--from_scratch: model_name_or_path is a {shape.model_type}, not a Qwen3-MoE")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(shape)


def tiny_model(config):
    """The model of the size flags and its character tokenizer."""
    tokenizer = char_tokenizer()
    shape = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads, num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok, moe_intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob, max_position_embeddings=max(1024, config.max_length),
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return new_model(shape, config.seed), tokenizer


def upcycle(dense, config):
    """A Qwen3-MoE that computes what the dense Qwen3 computes, whatever the router says: every expert is a copy.

    That needs weights that sum to 1 (--norm_topk_prob). --reinit draws that share of each expert's inner channels anew,
    from a normal distribution with the dense matrix's mean and deviation. Source: Sparse Upcycling (2212.05055);
    Drop-Upcycling (2502.19261) section 3.
    """
    inner = dense.config.intermediate_size
    shape = {name: getattr(dense.config, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings", "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id")}
    model = new_model(Qwen3MoeConfig(**shape, num_experts=config.num_experts, moe_intermediate_size=inner,
                                     num_experts_per_tok=config.num_experts_per_tok, norm_topk_prob=True), config.seed)
    rng, found = torch.Generator().manual_seed(config.seed), dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found:  # all but the experts and the router
                parameter.copy_(found[name])
        for layer, dense_layer in zip(model.model.layers, dense.model.layers):
            experts, mlp = layer.mlp.experts, dense_layer.mlp
            gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
            experts.gate_up_proj.copy_(torch.cat([gate, up]).expand_as(experts.gate_up_proj))
            experts.down_proj.copy_(down.expand_as(experts.down_proj))
            for gate_up, down_proj in zip(experts.gate_up_proj, experts.down_proj):  # of one expert
                channels = torch.randperm(inner, generator=rng)[: round(config.reinit * inner)]
                for rows, weight in ((gate_up[:inner], gate), (gate_up[inner:], up), (down_proj.T, down)):
                    drawn = torch.randn(len(channels), rows.shape[1], generator=rng)
                    rows[channels] = (drawn * weight.std() + weight.mean()).to(rows.dtype)
    model.generation_config.eos_token_id = dense.generation_config.eos_token_id
    return model


def router_of(model, gate):
    """What Qwen3-MoE cannot hold: {"gate", "bias_LE"}, for JSON, which keeps every bit of a float32."""
    return {"gate": gate, "bias_LE": bias_of(model).tolist()}


def saved_router(folder):
    """`router_of` the model in a run's folder or in one of its checkpoints; {} where nothing was saved."""
    beside, state = folder / "router.json", folder / "state.json"
    try:
        if beside.is_file():
            return json.loads(beside.read_text())
        return json.loads(state.read_text()).get("router", {}) if state.is_file() else {}  # {}: another script's
    except ValueError as error:
        raise InputError(f"--model_name_or_path {folder}: its router.json or state.json is damaged") from error


def load_start(config, resume):
    """The Qwen3-MoE to train, its layers ours, and its tokenizer: from the checkpoint, or as the flags say."""
    name, router = config.upcycle or config.model_name_or_path, {}
    if resume:
        model, tokenizer = load_model(str(resume), chat_template=config.chat_template)
    elif name == "tiny":
        model, tokenizer = tiny_model(config)
    elif config.from_scratch:
        try:
            shape, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--model_name_or_path {name}: its shape cannot be loaded ({reason})") from error
        model = new_model(shape, config.seed)
        if config.chat_template == "off":
            tokenizer.chat_template = None
    else:
        model, tokenizer = load_model(name, chat_template=config.chat_template)
        router = saved_router(Path(name))
    if config.upcycle and not resume:
        if not isinstance(model, Qwen3ForCausalLM) or model.config.use_sliding_window:
            raise InputError(f"--upcycle {name}: is a {type(model).__name__}, not a dense Qwen3 with full attention")
        model = upcycle(model, config)
    if not isinstance(model, Qwen3MoeForCausalLM):
        raise InputError(f"--model_name_or_path {name}: is a {type(model).__name__}, not a Qwen3-MoE")
    if router.get("gate", config.gate) != config.gate:
        raise InputError(f"--gate {config.gate}: {name} was trained with {router['gate']}")
    model = install_layers(model, config.gate)
    if router:
        set_bias(model, torch.tensor(router["bias_LE"]))
    return model, tokenizer


# --- evaluation ---


@contextlib.contextmanager
def forward_only(policy, config, world):
    """For forwards that no backward follows: no gradients, evaluation mode, and the precision of training."""
    policy.eval()
    with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
        yield
    policy.train()


def evaluate_routing(run, step, policy, balance, streams, config, world):
    """The measures of training on held-out rows of every domain: numbers to log under eval/; counts to experts.json."""
    picks = [(domain, row) for row in range(max(map(len, streams)))  # in turns: forwards mix domains as in training
             for domain, stream in enumerate(streams) if row < len(stream)]
    parts = micro_batches([len(streams[domain].row(row)[0]) for domain, row in picks],
                          config.per_device_train_batch_size, config.micro_batch_tokens, world)
    routing = balance.new_routing()
    with forward_only(policy, config, world):
        for part in parts:
            balance.measure(policy, collate_rows(streams, [picks[i] for i in part], world.device), routing)
    numbers = routing.metrics(balance.names)
    if world.rank == 0:
        counts = routing.counts_LME.tolist()
        write_json(run / "experts.json", {"step": step, "domains": balance.names, "counts_LME": counts})
    return {f"eval/{name}": value for name, value in numbers.items() if not name.startswith("time/")}


def sample_texts(step, decoder, tokenizer, streams, log, config):
    """Prints, and adds to samples.jsonl, how the decoder continues a held-out row of each domain, greedily."""
    if not log.active:
        return
    rows = [stream.row(0)[0].tolist() for stream in streams]
    prompts = [ids[: max(1, min(64, len(ids) // 2))] for ids in rows]
    rollouts = generate(decoder, tokenizer, prompts, max_new_tokens=config.max_completion_length, temperature=0.0)
    for stream, prompt, text in zip(streams, prompts, rollouts.texts(tokenizer)):
        prompt = tokenizer.decode(prompt)
        log.add("samples", {"step": step, "domain": stream.name, "prompt": prompt, "completion": text})
        print(f"        {stream.name}: {prompt[-40:]!r} -> {text[:80]!r}", flush=True)


def draw_experts(counts_LME, names, labels, path):
    """A heat map for each layer, labels above: the share of each domain's choices (down) that fall on each expert."""
    shares_LME = counts_LME / counts_LME.sum(-1, keepdims=True).clip(1)
    figure, axes = new_figure(len(shares_LME), n_columns=2)
    for layer, (axis, shares_ME) in enumerate(zip(axes, shares_LME)):
        image = axis.imshow(shares_ME, aspect="auto", cmap="viridis", vmin=0, vmax=shares_LME.max())
        information = float(mutual_information(torch.as_tensor(counts_LME[layer : layer + 1])))
        axis.set_title(f"{labels[layer]}: I(expert; domain) {information:.3f}", loc="left", fontsize=10)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xticks(range(0, shares_ME.shape[1], -(-shares_ME.shape[1] // 8)))
        axis.grid(False)
    for axis in axes[-2:]:
        axis.set_xlabel("expert")
    figure.colorbar(image, ax=axes, shrink=0.7, label=f"share of choices (even: {1 / shares_LME.shape[-1]:.3f})")
    save_figure(figure, path)


def save_router(run, policy, streams, config, world):
    """Writes router.json where the router is more than Qwen3-MoE holds, and says what the checkpoint loses without.

    Measured as other programs will run it, with a softmax and no bias, on the first row of each domain.
    """
    model = policy.model
    bias_LE, logps = bias_of(model), []
    if config.gate == "softmax" and not bias_LE.any():
        return
    batch = collate_rows(streams, [(domain, 0) for domain in range(len(streams))], world.device)
    with forward_only(policy, config, world):
        for gate, bias in (("softmax", torch.zeros_like(bias_LE)), (config.gate, bias_LE)):  # the second as it was
            set_bias(model, bias)
            for layer in moe_layers(model):
                layer.kind = gate
            logps.append(policy(batch)[0])
    change_BS = logps[0] - logps[1]
    largest, mean = float(change_BS.abs().max()), float(-change_BS.sum() / batch.mask_BS.sum())
    if world.rank == 0:
        write_json(run / "router.json", {**router_of(model, config.gate), "without/logp_difference": largest,
                                         "without/nll_difference": mean})
        print(f"{run}/router.json: the selection bias and the gate, which Qwen3-MoE cannot hold; without them the loss "
              f"changes by {mean:+.4f} nats a token, a token's log-probability by up to {largest:.3g}")


# --- main ---


def check_config(config):
    """Raises InputError for flags of this script that cannot be meant together."""
    then, _, since = config.balance_switch.partition("@")
    if config.balance_switch and (then not in SCOPES or not since.isdigit()):
        raise InputError(f"--balance_switch {config.balance_switch}: write it like micro@500")
    if config.hidden_size % (2 * config.num_attention_heads):
        raise InputError(f"--hidden_size {config.hidden_size}: must be a multiple of 2 x num_attention_heads")
    if config.num_experts_per_tok > config.num_experts:
        raise InputError(f"--num_experts_per_tok {config.num_experts_per_tok}: there are {config.num_experts} experts")
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise InputError("--num_experts_per_tok 1: needs --norm_topk_prob False, or the router would get no gradient")
    if config.upcycle and (not config.norm_topk_prob or config.from_scratch):
        raise InputError("--upcycle: needs --norm_topk_prob True, and no --from_scratch")
    if config.upcycle and config.model_name_or_path != "tiny":
        raise InputError(f"--model_name_or_path {config.model_name_or_path}: goes unread beside --upcycle; give one")
    if config.reinit and not config.upcycle:
        raise InputError(f"--reinit {config.reinit}: needs --upcycle")
    if config.from_scratch and config.model_name_or_path == "tiny":
        raise InputError("--from_scratch: `tiny` is drawn from scratch anyway")


def check_sources(config):
    """Raises InputError where --overwrite would delete data of --domains, a list of paths and patterns."""
    run = Path(config.output_dir).resolve()
    for name in parse_domains(config.domains) if config.overwrite else ():
        for found in map(Path, glob.glob(os.path.expanduser(name), recursive=True)):
            for path in (found.resolve(), *(file.resolve() for file in found.glob("data/*"))):  # a folder's files
                if run in (path, *path.parents):
                    raise InputError(f"--output_dir {config.output_dir}: --overwrite would delete data of --domains "
                                     f"{name}: {path}")


def check_micro_batches(config, args):
    """InputError where a run whose balance is counted by micro-batches would go on with other ones: another loss."""
    scopes = {config.balance, config.balance_switch.partition("@")[0]} - {"", "sequence", "exact", "bias", "none"}
    if not scopes and not config.micro_fraction:
        return
    for name in ("micro_batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps"):
        before = args["flags"][name]  # of the run as it began
        if before != getattr(config, name):
            raise InputError(f"--{name} {getattr(config, name)}: the run in --output_dir {config.output_dir} has "
                             f"{before}, and its balance is counted by micro-batches")


SHOWN = ("nll", "eval/nll", "max_violation", "mutual_information", "grad_norm")  # on the screen


def main(config):
    check_config(config)
    check_sources(config)
    names, given = zip(*parse_domains(config.domains).items())
    world = start(config)

    # what was asked for, and the checkpoint to go on from
    held_names = names if config.eval_steps else ()
    texts = [documents(name, "train", config.n_train * config.max_length, config) for name in names]
    held_texts = [documents(name, "validation", config.n_eval * config.max_length, config) for name in held_names]
    args, resume = on_rank_0(lambda: open_run(config, [texts, held_texts], world), world)
    if args["finished"]:
        return
    check_micro_batches(config, args)
    model, tokenizer = load_start(config, resume)
    config.learning_rate = config.learning_rate or (3e-3 if model.num_parameters() < 10_000_000 else 3e-4)

    # each domain's text in rows of tokens, which take its place in memory, and which row is read when
    streams = [make_stream(name, texts.pop(0), config.n_train, tokenizer, config) for name in names]
    held_out = [make_stream(name, held_texts.pop(0), config.n_eval, tokenizer, config) for name in held_names]
    n_rows, sizes = args["rows_per_step"], [len(stream) for stream in streams]
    weights = np.array(given) / sum(given) if all(given) else mixture_weights(
        sizes, config.mixture, config.max_steps * n_rows, config.unimax_epochs)
    plan = plan_rows(sizes, weights, config.max_steps * n_rows, config.seed)
    run, log, stop = Path(config.output_dir), Log(args, resume, model, config, world), stop_signals()
    for name, size, weight, stream in zip(names, sizes, weights, streams):
        print(f"{name}: {size} rows of up to {config.max_length} tokens, drawn with weight {weight:.3f}, "
              f"{config.max_steps * n_rows * weight / size:.1f} passes; it begins "
              f"{tokenizer.decode(stream.ids[:40].tolist())!r}", flush=True)

    # the policy that learns, and a copy of it that samples
    decoder = make_decoder(model, config, world) if held_out else None
    policy = shard(RoutedPolicy(model.train()), config, world)
    optimizer = make_optimizer(policy, config)
    state = {"step": 0, "bad_steps": 0, "num_tokens": 0}
    if resume:
        state = load_checkpoint(resume, moments(policy, optimizer), world)
        set_bias(model, torch.tensor(state["router"]["bias_LE"]))
    balance = Balance(policy, names, config, world)
    if held_out and config.eval_on_start and state["step"] == 0:
        log.step(0, evaluate_routing(run, 0, policy, balance, held_out, config, world), SHOWN)

    while state["step"] < config.max_steps:
        # the rows of this step; the loss is divided by the tokens that count in all of them
        began, step = time.perf_counter(), state["step"]
        picks = plan[step * n_rows : (step + 1) * n_rows].tolist()
        rows = [streams[domain].row(row) for domain, row in picks]
        n_tokens = int(sum((positions[1:] > 0).sum() for _, positions in rows))

        # forwards of rows of like length
        lengths = [len(ids) for ids, _ in rows]
        parts = micro_batches(lengths, config.per_device_train_batch_size, config.micro_batch_tokens, world)
        batches = [collate_rows(streams, [picks[i] for i in part], world.device) for part in parts]

        # one optimizer step, over whose forwards and processes the experts' choices are counted
        balance.begin(step, policy, batches, n_tokens)
        numbers, taken = train_step(policy, optimizer, batches, balance.loss_of, step, config, world)
        numbers |= balance.end(taken)
        log.count(state, taken, picks)
        state["num_tokens"] += n_tokens
        numbers["num_tokens"] = state["num_tokens"]

        # evaluate, log, save
        last, seconds = state["step"] == config.max_steps, time.perf_counter() - began
        if held_out and (last or state["step"] % config.eval_steps == 0):
            numbers |= evaluate_routing(run, state["step"], policy, balance, held_out, config, world)
            refresh(decoder, policy)
            sample_texts(state["step"], decoder, tokenizer, held_out, log, config)
        log.step(state["step"], numbers, SHOWN, n_tokens, seconds)
        [stopping] = total([len(stop)], world)
        if last or stopping or (config.save_steps and state["step"] % config.save_steps == 0):
            state["router"] = router_of(model, config.gate)
            save_checkpoint(run, state, policy, tokenizer, moments(policy, optimizer), world)
        if stopping and not last:
            leave(run, state, stop)

    # what the router did on the held-out rows, and what the model's folder does not hold of it
    save_router(run, policy, held_out or streams, config, world)
    if held_out and world.rank == 0:
        experts = json.loads((run / "experts.json").read_text())
        labels = [f"layer {layer}" for layer in range(balance.n_layers)]
        draw_experts(np.array(experts["counts_LME"]), experts["domains"], labels, run / "experts.png")
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
