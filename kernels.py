"""The few fused operations every script needs, each as a Triton kernel with its plain PyTorch version beside it.

    linear_logps  log-probabilities of given tokens and the entropy, from hidden states; never an [N, V] tensor
    linear_kl     forward KL, reverse KL or JSD between a student's and a teacher's next-token distributions
    linear_topk   the k likeliest tokens and the mass of the rest (a teacher's cache); topk_kl distils from it
    moe_experts   SwiGLU experts on tokens sorted by expert: PyTorch's grouped product between fused row kernels
    sharded_mask  S2-Attention's sharded heterogeneous pattern, as a mask function for FlexAttention

How: matrix products stay with cuBLAS, which needs no help; between them one Triton program walks one row, so every
kernel is a loop over columns with a few running numbers, limited by memory alone (but not with many targets a row: the
gradient compares each column with all K of them). Logits live in a bounded workspace: the forward pass keeps one number
a row (the logsumexp), and the backward pass makes the logits again, except those that the workspace still holds: 8NVD
instead of 6NVD FLOPs, and 2 GB instead of tens.
Against Liger-Kernel's fused loss: any loss can sit on top (log-probabilities come out, arbitrary gradients go in,
entropy's too), and chunks are as large as the workspace allows, because each chunk reads and writes all of dW.

Key: N tokens · V vocabulary · D width · H the teacher's width · B rows of a chunk · K chosen experts or targets a row ·
E experts · I an expert's width · S = N K rows sorted by expert. Lower precision in, fp32 logits and results (fp64 for
fp64): bf16 logits would move a policy's probability ratios by up to 3 %.

KERNELS=auto (default: Triton on a GPU, PyTorch elsewhere) | torch | triton (on a CPU this needs TRITON_INTERPRET=1).
`python kernels.py` checks every operation against float64 (6 s) and, on a GPU, times it: one JSON line a row.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system: the PyTorch versions serve
    triton = tl = None

KERNELS = os.environ.get("KERNELS", "auto")
if KERNELS not in ("auto", "torch", "triton") or (KERNELS == "triton" and triton is None):
    print(f"KERNELS={KERNELS}: not one of auto, torch, triton, or triton is not installed", file=sys.stderr)
    sys.exit(2)
CACHE_ELEMENTS = 2**18  # 1 MiB of fp32, what a CPU core's second-level cache holds: row passes there go block by block
jit = triton.jit if triton else lambda function: function


def use_triton(tensor):
    """True where the Triton kernels serve this tensor."""
    return KERNELS == "triton" or (KERNELS == "auto" and triton is not None and tensor.is_cuda)


def row_launch(width):
    """(columns a step, warps) for rows of this width: at most 16 elements a thread and step, so nothing spills."""
    block = min(4096, triton.next_power_of_2(width))
    return block, 8 if block > 1024 else 4


def launch_rows(kernel, rows, width, *args):
    """Runs kernel(*args, width, BLOCK), one program a row; the grid's first axis, the only one to take over 65,535."""
    block, warps = row_launch(width)
    if rows:  # an empty grid cannot be launched
        kernel[(rows,)](*args, width, block, num_warps=warps)


# --- log-probabilities and entropy of a row of logits ---


@jit
def floored(logp):
    """logp, at least -1e4; a NaN stays one, while tl.maximum would drop it and make a broken row's loss finite."""
    return tl.where(logp < -1e4, -1e4, logp)


@jit
def softmax_row(row, stride, GAIN: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    """(logsumexp, entropy) of one row in one pass. Source: online softmax, Milakov & Gimelshein 2018; u is ours.

    Loads and stores of a row of logits end where its stride does, not at V: with an odd V and padded rows they stay 16
    bytes wide. So a row must own its whole stride; what stands in the padding counts for nothing.
    """
    m = tl.full([], -1e30, row.dtype.element_ty)  # largest logit so far; finite, so that m - m is never inf - inf
    s = tl.full([], 0, row.dtype.element_ty)  # sum of exp(z - m)
    u = tl.full([], 0, row.dtype.element_ty)  # sum of exp(z - m) (z - m)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = soft_cap(tl.load(row + columns, mask=columns < stride, other=0), GAIN)
        z = tl.where(columns < V, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 0))
        shifted = floored(z - m_new)  # exp gives 0 all the same, and 0 * -1e4 is not NaN
        e = tl.exp(shifted)
        shrink = tl.exp(m - m_new)
        u = shrink * (u + s * (m - m_new)) + tl.sum(e * shifted, 0)
        s = shrink * s + tl.sum(e, 0)
        m = m_new
    return m + tl.log(s), tl.log(s) - u / s


@jit
def soft_cap(z, GAIN: tl.constexpr):
    """GAIN * tanh(z); GAIN None: z itself."""
    if GAIN is not None:  # decided when compiling
        z = GAIN * (1 - 2 / (tl.exp(2 * z) + 1))
    return z


@jit
def logps_kernel(z, z_stride, targets, logps, entropy, lse, K: tl.constexpr, GAIN: tl.constexpr, V: tl.constexpr,
                 BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)  # rows times columns pass 2^31
    z += n * z_stride
    lse_n, entropy_n = softmax_row(z, z_stride, GAIN, V, BLOCK)
    tl.store(lse + n, lse_n)
    if entropy is not None:  # a None argument is known when compiling: without it, its arithmetic disappears too
        tl.store(entropy + n, entropy_n)
    for k in range(K):
        z_target = soft_cap(tl.load(z + tl.load(targets + n * K + k)), GAIN)
        tl.store(logps + n * K + k, z_target - lse_n)


def logps_triton(z_BV, targets_BK, gain, want_entropy):
    """Row statistics of logits: (logps_BK, entropy_B or None, lse_B). Bytes: 4V read a row; about 2 FLOPs a byte."""
    (B, V), K = z_BV.shape, targets_BK.shape[1]
    logps_BK, lse_B = z_BV.new_empty(B, K), z_BV.new_empty(B)
    entropy_B = z_BV.new_empty(B) if want_entropy else None
    launch_rows(logps_kernel, B, V, z_BV, z_BV.stride(0), targets_BK, logps_BK, entropy_B, lse_B, K, gain)
    return logps_BK, entropy_B, lse_B


def logps_torch(z_BV, targets_BK, gain, want_entropy):
    """The same in PyTorch; its gradient does without the lse."""
    logp_BV = (z_BV if gain is None else gain * z_BV.tanh()).log_softmax(-1)
    logps_BK = logp_BV.gather(1, targets_BK)
    return logps_BK, -logp_BV.exp().mul_(logp_BV.clamp_(min=-1e4)).sum(-1) if want_entropy else None, None


@jit
def logps_grad_kernel(z, z_stride, targets, entropy, lse, g_logps, g_entropy, dz, dz_stride, K: tl.constexpr,
                      GAIN: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    z += n * z_stride
    dz += n * dz_stride
    lse_n = tl.load(lse + n)
    g_sum = tl.load(g_logps + n * K)
    for k in range(1, K):
        g_sum += tl.load(g_logps + n * K + k)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z_raw = tl.load(z + columns, mask=columns < z_stride, other=0)
        logp = floored(soft_cap(z_raw, GAIN) - lse_n)
        if g_entropy is None:
            d = -tl.exp(logp) * g_sum
        else:
            d = -tl.exp(logp) * (g_sum + tl.load(g_entropy + n) * (logp + tl.load(entropy + n)))
        for k in range(K):
            d += tl.where(columns == tl.load(targets + n * K + k), tl.load(g_logps + n * K + k), 0)
        if GAIN is not None:
            tanh = soft_cap(z_raw, 1.0)
            d *= GAIN * (1 - tanh * tanh)
        tl.store(dz + columns, d.to(dz.dtype.element_ty), mask=columns < dz_stride)


def logps_grad_triton(z_BV, targets_BK, results, grads, dz_BV, gain):
    """Gradient of the logits into dz: for logp_y, g (1[j=y] - p_j); for the entropy H, -g p_j (log p_j + H).

    Bytes: 4V read and 2V (bf16) or 4V written a row. dz may be z itself.
    """
    (_, entropy_B, lse_B), (g_BK, g_entropy_B, _) = results, grads
    launch_rows(logps_grad_kernel, *z_BV.shape, z_BV, z_BV.stride(0), targets_BK, entropy_B, lse_B, g_BK, g_entropy_B,
                dz_BV, dz_BV.stride(0), g_BK.shape[1], gain)


def logps_grad_torch(z_BV, targets_BK, results, grads, dz_BV, gain):
    """The same in PyTorch."""
    g_BK, g_entropy_B, _ = grads
    tanh_BV = None if gain is None else z_BV.tanh()
    z_BV, minus_g_B1 = z_BV if gain is None else gain * tanh_BV, -g_BK.sum(-1, keepdim=True)
    if g_entropy_B is None:
        d_BV = torch.softmax(z_BV, -1, out=z_BV).mul_(minus_g_B1)  # in place: the logits are not needed again
    else:
        logp_BV = torch.log_softmax(z_BV, -1, out=z_BV).clamp_(min=-1e4)
        p_BV = logp_BV.exp()
        d_BV = logp_BV.add_(results[1][:, None]).mul_(-g_entropy_B[:, None]).add_(minus_g_B1).mul_(p_BV)
    d_BV.scatter_add_(1, targets_BK, g_BK)
    d_BV = d_BV if gain is None else d_BV.mul_(gain * (1 - tanh_BV.square()))
    if d_BV.data_ptr() != dz_BV.data_ptr():
        dz_BV.copy_(d_BV)


# --- divergence of two rows of logits ---


@jit
def kl_terms(s, s_stride, t, t_stride, columns, s_lse, t_lse, KIND: tl.constexpr, BETA: tl.constexpr, V: tl.constexpr):
    """Per column (student's probability, divergence's term, w), w as in kl_triton; past V they are 0, 0 and finite."""
    inside = columns < V
    s_logp = tl.where(inside, floored(tl.load(s + columns, mask=columns < s_stride, other=0) - s_lse), -1e4)
    t_logp = tl.where(inside, floored(tl.load(t + columns, mask=columns < t_stride, other=0) - t_lse), -1e4)
    s_p, t_p = tl.exp(s_logp), tl.exp(t_logp)
    if KIND == "forward":
        w = t_p
        term = t_p * (t_logp - s_logp)
    elif KIND == "reverse":
        w = s_logp - t_logp
        term = s_p * w
    else:
        m = BETA * t_p + (1 - BETA) * s_p
        m_logp = tl.log(tl.where(m < 1e-37, 1e-37, m))  # the log of 0 would meet a 0; a NaN stays one
        w = (1 - BETA) * (s_logp - m_logp)
        term = BETA * t_p * (t_logp - m_logp) + s_p * w
    return s_p, term, w


@jit
def kl_kernel(s, s_stride, t, t_stride, kl, mean, s_lse, t_lse, KIND: tl.constexpr, BETA: tl.constexpr, V: tl.constexpr,
              BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    s += n * s_stride
    t += n * t_stride
    s_lse_n, _ = softmax_row(s, s_stride, None, V, BLOCK)
    t_lse_n, _ = softmax_row(t, t_stride, None, V, BLOCK)
    kl_n = tl.full([], 0, s.dtype.element_ty)
    mean_n = tl.full([], 0, s.dtype.element_ty)
    for start in range(0, V, BLOCK):
        s_p, term, w = kl_terms(s, s_stride, t, t_stride, start + tl.arange(0, BLOCK), s_lse_n, t_lse_n, KIND, BETA, V)
        kl_n += tl.sum(term, 0)
        mean_n += tl.sum(s_p * w, 0)
    tl.store(kl + n, kl_n)
    tl.store(mean + n, mean_n)
    tl.store(s_lse + n, s_lse_n)
    tl.store(t_lse + n, t_lse_n)


@jit
def kl_grad_kernel(s, s_stride, t, t_stride, mean, s_lse, t_lse, g, dz, dz_stride, KIND: tl.constexpr,
                   BETA: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    s += n * s_stride
    t += n * t_stride
    s_lse_n, t_lse_n, mean_n, g_n = tl.load(s_lse + n), tl.load(t_lse + n), tl.load(mean + n), tl.load(g + n)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s_p, term, w = kl_terms(s, s_stride, t, t_stride, columns, s_lse_n, t_lse_n, KIND, BETA, V)
        if KIND == "forward":
            d = g_n * (s_p - w)
        else:
            d = g_n * s_p * (w - mean_n)
        tl.store(dz + n * dz_stride + columns, d.to(dz.dtype.element_ty), mask=columns < dz_stride)


def kl_triton(s_BV, t_BV, kind, beta):
    """(divergence_B, mean_B, student's lse_B, teacher's lse_B) of two rows of logits; two passes, 16V bytes a row.

    The gradient of the student's logits is p_s (w - E_s[w]), with w the derivative by the probability p_s (up to a
    constant): log p_s/p_t for reverse KL, (1-beta) log p_s/m for JSD; for forward KL it is p_s - p_t.
    """
    results = tuple(s_BV.new_empty(len(s_BV)) for _ in range(4))
    launch_rows(kl_kernel, *s_BV.shape, s_BV, s_BV.stride(0), t_BV, t_BV.stride(0), *results, kind, beta)
    return results


def kl_grad_triton(s_BV, t_BV, results, grads, dz_BV, kind, beta):
    """Gradient of the student's logits into dz. Bytes: 8V read, 2V (bf16) or 4V written a row."""
    launch_rows(kl_grad_kernel, *s_BV.shape, s_BV, s_BV.stride(0), t_BV, t_BV.stride(0), *results[1:], grads[0], dz_BV,
                dz_BV.stride(0), kind, beta)


def kl_terms_torch(s_BV, t_BV, kind, beta):
    """Per column (student's probability, divergence's term, w): kl_terms in PyTorch."""
    s_BV, t_BV = s_BV.log_softmax(-1).clamp_(min=-1e4), t_BV.log_softmax(-1).clamp_(min=-1e4)
    s_p_BV, t_p_BV = s_BV.exp(), t_BV.exp()
    if kind == "forward":
        return s_p_BV, t_p_BV * (t_BV - s_BV), t_p_BV
    if kind == "reverse":
        return s_p_BV, s_p_BV * (s_BV - t_BV), s_BV - t_BV
    m_BV = (beta * t_p_BV + (1 - beta) * s_p_BV).clamp_(min=1e-37).log_()
    w_BV = (1 - beta) * (s_BV - m_BV)
    return s_p_BV, beta * t_p_BV * (t_BV - m_BV) + s_p_BV * w_BV, w_BV


def kl_torch(s_BV, t_BV, kind, beta):
    """kl_triton in PyTorch; its gradient does without the two lse."""
    p_BV, term_BV, w_BV = kl_terms_torch(s_BV, t_BV, kind, beta)
    return term_BV.sum(-1), (p_BV * w_BV).sum(-1), None, None


def kl_grad_torch(s_BV, t_BV, results, grads, dz_BV, kind, beta):
    """kl_grad_triton in PyTorch."""
    p_BV, _, w_BV = kl_terms_torch(s_BV, t_BV, kind, beta)
    d_BV = p_BV - w_BV if kind == "forward" else p_BV * (w_BV - results[1][:, None])
    torch.mul(d_BV, grads[0][:, None], out=dz_BV)


# --- a row operation on top of a linear layer, without its [N, V] output ---


class RowPlan(NamedTuple):
    """What LinearRows runs on the rows of logits, and how many at a time."""

    forward: Callable  # (z_BV, side_BX...) -> tuple of tensors with B rows, or Nones
    backward: Callable | None  # (z_BV, side_BX..., results, grads, dz_BV): writes dz_BV
    alpha: float  # logits are alpha * hidden @ weight^T: the temperature costs nothing inside the product
    low: torch.dtype  # of the products' operands
    high: torch.dtype  # of logits, results and the gradients' accumulators
    rows: int  # rows of a chunk
    block: int  # rows of a call of forward or backward


def precisions(x):
    """(type of the products' operands, as F.linear would have it; type of what is summed) for x, autocast included."""
    low, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and low != torch.float64:
        low = torch.get_autocast_dtype(device)
    return low, torch.float64 if low == torch.float64 else torch.float32


def row_plan(hidden_ND, weight_VD, forward, backward, alpha, workspace_mb, n_logits=1):
    """RowPlan with the largest even chunks within workspace_mb."""
    (low, high), N, V, cuda = precisions(hidden_ND), len(hidden_ND), len(weight_VD), hidden_ND.is_cuda
    budget = (2048 if cuda else 256) if workspace_mb is None else workspace_mb
    row_bytes = V * (n_logits * high.itemsize + (low.itemsize if cuda and low != high else 0))
    n_chunks = math.ceil(N / max(1, int(budget * 2**20) // row_bytes))
    rows = math.ceil(N / n_chunks) if N else 1
    block = rows if use_triton(hidden_ND) or cuda else max(1, min(rows, CACHE_ELEMENTS // V))
    return RowPlan(forward, backward, alpha, low, high, rows, block)


def spans(n, step):
    """[slice(0, step), ...] over n rows; a single empty one for n = 0, so that shapes and types still come out."""
    return [slice(start, min(start + step, n)) for start in range(0, max(n, 1), step)]


def cut(tensors, rows):
    """The same rows of each tensor; None stays None."""
    return tuple(None if tensor is None else tensor[rows] for tensor in tensors)


def product(a, b, out, alpha=1, beta=0):
    """out = alpha a @ b + beta out, summed and stored in out's type even where a and b are bf16 (CUDA)."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)


def operand(tensor, plan):
    """Floats as the products take them. A CPU cannot multiply bf16 into fp32: there fp32 holds the rounded values."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    tensor = tensor.to(plan.low)
    return tensor if tensor.is_cuda or plan.low == plan.high else tensor.to(plan.high)


def aligned_rows(B, V, dtype, device):
    """Uninitialised [B, V]; on a GPU its rows start at multiples of 64 elements, vocabularies being odd numbers.

    The kernels read and write the padding, too, so that it belongs to its row and to nothing else.
    """
    width = math.ceil(V / 64) * 64 if device.type == "cuda" else V
    return torch.empty(B, width, dtype=dtype, device=device)[:, :V]


def new_workspace(h_ND, w_VD, side_weight, plan):
    """[z_BV] or, where a teacher's head is given, [z_BV, the teacher's z_BV]."""
    B = min(plan.rows, len(h_ND))
    return [aligned_rows(B, len(w), plan.high, h_ND.device) for w in (w_VD, side_weight) if w is not None]


def fill_logits(chunk, work, hidden_ND, weight_VD, side, side_weight, plan):
    """(z_BV, targets_BK) or (z_BV, the teacher's z_BV) of a chunk of rows, in the workspace."""
    z_BV = work[0][: chunk.stop - chunk.start]
    product(hidden_ND[chunk], weight_VD.T, z_BV, plan.alpha)
    if side_weight is None:
        return z_BV, side[chunk]
    t_BV = work[1][: chunk.stop - chunk.start]
    product(side[chunk], side_weight.T, t_BV, plan.alpha)
    return z_BV, t_BV


class LinearRows(torch.autograd.Function):
    """plan.forward of the rows of alpha * hidden @ weight^T, and its gradient, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, side, side_weight, plan):
        ctx.set_materialize_grads(False)  # an output nobody used costs nothing
        h_ND, w_VD, s, sw = (operand(tensor, plan) for tensor in (hidden_ND, weight_VD, side, side_weight))
        N, work, results = h_ND.shape[0], new_workspace(h_ND, w_VD, sw, plan), None
        for chunk in spans(N, plan.rows):
            z_BV, side_BX = fill_logits(chunk, work, h_ND, w_VD, s, sw, plan)
            for block in spans(z_BV.shape[0], plan.block):
                part = plan.forward(z_BV[block], side_BX[block])
                results = results or [x if x is None else x.new_empty(N, *x.shape[1:]) for x in part]
                for whole, x in zip(results, part):  # copied at once: kept, small tensors would fragment the heap
                    if x is not None:
                        whole[chunk][block] = x
        ctx.plan, ctx.held = plan, (work, (z_BV, side_BX))  # the workspace still holds the last chunk's logits
        ctx.save_for_backward(hidden_ND, weight_VD, side, side_weight, *results)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        plan = ctx.plan
        hidden_ND, weight_VD, side, side_weight, *results = ctx.saved_tensors
        h_ND, w_VD, s, sw = (operand(tensor, plan) for tensor in (hidden_ND, weight_VD, side, side_weight))
        grads = [None if g is None else g.contiguous() for g in grads]  # of a sum, they come with stride 0
        grads[0] = torch.zeros_like(results[0]) if grads[0] is None else grads[0]
        work, held = ctx.held or (new_workspace(h_ND, w_VD, sw, plan), None)
        ctx.held = None  # a loss kept for logging must not keep logits
        dz_BV = work[0] if h_ND.dtype == plan.high else aligned_rows(len(work[0]), len(w_VD), h_ND.dtype, h_ND.device)
        dh_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        dw_VD = torch.empty_like(w_VD, dtype=plan.high) if ctx.needs_input_grad[1] else None
        for i, chunk in enumerate(reversed(spans(h_ND.shape[0], plan.rows))):
            z_BV, side_BX = held or fill_logits(chunk, work, h_ND, w_VD, s, sw, plan)
            held, dz = None, dz_BV[: z_BV.shape[0]]
            outputs, upstream = cut(results, chunk), cut(grads, chunk)
            for block in spans(z_BV.shape[0], plan.block):
                plan.backward(z_BV[block], side_BX[block], cut(outputs, block), cut(upstream, block), dz[block])
            if dh_ND is not None:
                product(dz, w_VD, dh_ND[chunk], plan.alpha)
            if dw_VD is not None:
                product(dz.T, h_ND[chunk], dw_VD, plan.alpha, beta=min(i, 1))  # beta 0 overwrites, 1 adds
        dh_ND, dw_VD = (None if d is None else d.to(x.dtype) for d, x in ((dh_ND, hidden_ND), (dw_VD, weight_VD)))
        return dh_ND, dw_VD, None, None, None


# --- operations ---


def linear_logps(hidden_ND, weight_VD, targets_N, temperature=1.0, *, entropy=True, softcap=None, ignore_index=-100,
                 workspace_mb=None):
    """(log-probabilities of the targets, entropy_N or None) in nats under softmax(hidden @ weight^T / temperature).

    Differentiable in hidden and weight through both. targets may be [N] or [N, K], the log-probabilities have their
    shape; an ignored target's is 0 and sends no gradient (its row's entropy still counts). softcap c replaces a logit z
    by c tanh(z / c) before the temperature, as in Gemma 2. fp32 out (fp64 for fp64); the products run in hidden's type,
    or autocast's, with fp32 sums; the weight's gradient is summed in fp32 and comes back in the weight's type.
    workspace_mb bounds the extra memory (default 2048 on a GPU, 256 on a CPU), part of which is kept until backward.

    FLOPs: 2NVD forward; 6NVD backward, 4NVD for the rows the workspace still holds. Bytes beside the products: 8NV
    forward; 10NV (bf16) backward + 8VD a chunk.
    Source: chunks and recomputation as in Cut Your Losses (2411.09009) and Liger-Kernel (2410.10989).
    >>> logps_N, entropy_N = linear_logps(torch.eye(2), torch.zeros(4, 2), torch.tensor([0, 3]))
    >>> logps_N.exp(), entropy_N.exp()
    (tensor([0.2500, 0.2500]), tensor([4., 4.]))
    """
    gain = None if softcap is None else softcap / temperature
    targets_NK = targets_N[:, None] if targets_N.ndim == 1 else targets_N
    ignored_NK = targets_NK == ignore_index
    forward, backward = (logps_triton, logps_grad_triton) if use_triton(hidden_ND) else (logps_torch, logps_grad_torch)
    plan = row_plan(hidden_ND, weight_VD, partial(forward, gain=gain, want_entropy=entropy),
                    partial(backward, gain=gain), 1 / (softcap or temperature), workspace_mb)
    targets_NK = targets_NK.masked_fill(ignored_NK, 0).contiguous()
    logps_NK, entropy_N, _ = LinearRows.apply(hidden_ND, weight_VD, targets_NK, None, plan)
    return logps_NK.masked_fill(ignored_NK, 0).view_as(targets_N), entropy_N


def linear_kl(hidden_ND, weight_VD, teacher_hidden_NH, teacher_weight_VH, *, kind="forward", beta=0.5, temperature=1.0,
              workspace_mb=None):
    """Divergence [N] in nats of the student's next-token distributions (hidden, weight) from the teacher's.

    kind: forward KL(teacher || student), reverse KL(student || teacher), or jsd: beta KL(teacher || m) + (1 - beta)
    KL(student || m) with m = beta teacher + (1 - beta) student. Both logits are divided by temperature; no factor
    temperature^2. Differentiable in the student only. Log-probabilities are floored at -1e4, so a token that one side
    forbids gives a large finite number. Types and memory as in linear_logps, with two rows of logits.

    FLOPs: 2NV(D + H) forward, as much again + 4NVD backward. Bytes beside the products: 24NV forward, 18NV backward.
    Source: GKD (2306.13649), eq. 1 for the JSD.
    """
    if kind not in ("forward", "reverse", "jsd"):
        raise ValueError(f"kind={kind!r}: forward, reverse or jsd")
    if len(weight_VD) != len(teacher_weight_VH):  # a Triton kernel would read past the shorter row
        raise ValueError(f"{len(weight_VD)} tokens against the teacher's {len(teacher_weight_VH)}")
    forward, backward = (kl_triton, kl_grad_triton) if use_triton(hidden_ND) else (kl_torch, kl_grad_torch)
    plan = row_plan(hidden_ND, weight_VD, partial(forward, kind=kind, beta=beta),
                    partial(backward, kind=kind, beta=beta), 1 / temperature, workspace_mb, n_logits=2)
    return LinearRows.apply(hidden_ND, weight_VD, teacher_hidden_NH, teacher_weight_VH, plan)[0]


@torch.no_grad()
def linear_topk(hidden_ND, weight_VD, k, temperature=1.0, *, workspace_mb=None):
    """(logps_NK, ids_NK, tail_N): the k likeliest tokens, likeliest first, and the log of the other tokens' mass.

    What a teacher's cache holds: 12k + 4 bytes a token, not 4V. The temperature acts before the choice. No gradient.
    FLOPs: 2NVD; bytes beside the product: about 20NV, PyTorch's own topk and logsumexp.
    """

    def topk_rows(z_BV, _):
        top_BK, ids_BK = z_BV.topk(k, -1)
        lse_B1 = z_BV.logsumexp(-1, keepdim=True)
        tail_B = z_BV.scatter_(1, ids_BK, -torch.inf).logsumexp(-1)  # summed by itself: 1 - the rest would round to 0
        return top_BK - lse_B1, ids_BK, tail_B - lse_B1[:, 0]

    plan = row_plan(hidden_ND, weight_VD, topk_rows, None, 1 / temperature, workspace_mb)
    return LinearRows.apply(hidden_ND, weight_VD, torch.empty(len(hidden_ND), 0), None, plan)


def topk_kl(logps_NK, teacher_logps_NK, teacher_tail_N):
    """Forward KL [N] in nats over k + 1 outcomes: the cached tokens, and any other one. At most the full KL.

    logps_NK: the student's, linear_logps(hidden, weight, ids_NK, temperature)[0]. Without the last outcome the student
    could move any mass into the tail unpunished.
    """
    tail_N = (1 - logps_NK.exp().sum(-1)).clamp(min=1e-6).log()  # fp32 knows the rest of a sum near 1 to 1e-7
    kept_N = (teacher_logps_NK.exp() * (teacher_logps_NK - logps_NK)).sum(-1)
    rest_N = teacher_tail_N.exp() * (teacher_tail_N.clamp(min=-1e4) - tail_N)
    return kept_N + rest_N


# --- experts ---


@jit
def gate_and_up(gate_up, s, i, wide: tl.constexpr, I: tl.constexpr):
    gate = tl.load(gate_up + 2 * s * I + i, mask=i < I, other=0).to(wide)
    return gate, tl.sigmoid(gate), tl.load(gate_up + (2 * s + 1) * I + i, mask=i < I, other=0).to(wide)


@jit
def swiglu_kernel(gate_up, w, h, I: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    w_s = tl.load(w + s)
    for start in range(0, I, BLOCK):
        i = start + tl.arange(0, BLOCK)
        gate, sigmoid, up = gate_and_up(gate_up, s, i, w_s.dtype, I)
        tl.store(h + s * I + i, (w_s * gate * sigmoid * up).to(h.dtype.element_ty), mask=i < I)


@jit
def swiglu_grad_kernel(gate_up, w, g, d_gate_up, d_w, I: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    w_s = tl.load(w + s)
    d_w_s = tl.full([], 0, w_s.dtype)
    for start in range(0, I, BLOCK):
        i = start + tl.arange(0, BLOCK)
        gate, sigmoid, up = gate_and_up(gate_up, s, i, w_s.dtype, I)
        g_i = tl.load(g + s * I + i, mask=i < I, other=0).to(w_s.dtype)
        silu = gate * sigmoid
        d_gate = w_s * g_i * up * (sigmoid + silu * (1 - sigmoid))
        d_up = w_s * g_i * silu
        d_w_s += tl.sum(g_i * silu * up, 0)
        tl.store(d_gate_up + 2 * s * I + i, d_gate.to(d_gate_up.dtype.element_ty), mask=i < I)
        tl.store(d_gate_up + (2 * s + 1) * I + i, d_up.to(d_gate_up.dtype.element_ty), mask=i < I)
    tl.store(d_w + s, d_w_s)


class SwiGLU(torch.autograd.Function):
    """w * silu(gate) * up, [S, I], from gate_up [S, 2I] and the router's weight w [S], fp32.

    The weight acts here and not on the experts' output: its gradient then needs nothing but what this backward pass
    reads anyway, and no [S, D] output is kept. Bytes (bf16): 6I a row forward, 10I backward. Source: SonicMoE
    (2512.14080).
    """

    @staticmethod
    def forward(ctx, gate_up_SF, w_S):
        ctx.save_for_backward(gate_up_SF, w_S)
        if use_triton(gate_up_SF):
            h_SI = gate_up_SF.new_empty(len(w_S), gate_up_SF.shape[1] // 2)
            launch_rows(swiglu_kernel, *h_SI.shape, gate_up_SF, w_S, h_SI)
            return h_SI
        gate_SI, up_SI = gate_up_SF.chunk(2, -1)
        return (F.silu(gate_SI) * up_SI * w_S[:, None]).to(gate_up_SF.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_SI):
        (gate_up_SF, w_S), g_SI = ctx.saved_tensors, g_SI.contiguous()
        if use_triton(gate_up_SF):
            d_gate_up_SF, d_w_S = torch.empty_like(gate_up_SF), torch.empty_like(w_S)
            launch_rows(swiglu_grad_kernel, *g_SI.shape, gate_up_SF, w_S, g_SI, d_gate_up_SF, d_w_S)
            return d_gate_up_SF, d_w_S
        gate_SI, up_SI = gate_up_SF.chunk(2, -1)
        d_gate_up_SF, silu_SI, gw_SI = torch.empty_like(gate_up_SF), F.silu(gate_SI), g_SI * w_S[:, None]
        d_gate_SI, d_up_SI = d_gate_up_SF.chunk(2, -1)  # written in place: joining two halves would copy both
        torch.mul(gw_SI, silu_SI, out=d_up_SI)
        torch.ops.aten.silu_backward.grad_input(gw_SI.mul_(up_SI), gate_SI, grad_input=d_gate_SI)
        return d_gate_up_SF, silu_SI.mul_(up_SI).mul_(g_SI).sum(-1, dtype=w_S.dtype)


@jit
def gather_sum_kernel(y, slots, out, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    wide = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], wide)
        for k in range(K):
            total += tl.load(y + tl.load(slots + n * K + k) * D + d, mask=d < D, other=0).to(wide)
        tl.store(out + n * D + d, total.to(out.dtype.element_ty), mask=d < D)


def gather_sum(y_SD, slots_NK):
    """Row n of [N, D]: sum over k of y[slots[n, k]], in fp32, in a fixed order, no atomics. Bytes (bf16): 2D(K + 1)."""
    if not use_triton(y_SD):
        return F.embedding_bag(slots_NK, y_SD, mode="sum")  # its gradient is never asked for: see Route
    out_ND = y_SD.new_empty(len(slots_NK), y_SD.shape[1])
    launch_rows(gather_sum_kernel, *out_ND.shape, y_SD, slots_NK, out_ND, slots_NK.shape[1])
    return out_ND


class Route(torch.autograd.Function):
    """spread: x[tokens_S], a row for every chosen expert; else gather_sum, the way back: each the other's gradient."""

    @staticmethod
    def forward(ctx, x, tokens_S, slots_NK, spread):
        ctx.save_for_backward(tokens_S, slots_NK)
        ctx.spread = spread
        return x[tokens_S] if spread else gather_sum(x, slots_NK)

    @staticmethod
    def backward(ctx, g):
        return Route.apply(g.contiguous(), *ctx.saved_tensors, not ctx.spread), None, None, None


def fills_empty_groups(device):
    """True where grouped_mm's weight gradient of a group without rows is not zero: on a B200 (PyTorch issue 172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def grouped_linear(x_SD, weight_EID, ends_E):
    """x[start_e:end_e] @ weight_e^T for every expert e, [S, I]; ends_E (int32) ascends to S. FLOPs: 2SDI."""
    aligned = weight_EID.shape[1] % 8 == 0 and weight_EID.shape[2] % 8 == 0  # it wants rows at multiples of 16 bytes
    if x_SD.dtype in (torch.bfloat16, torch.float32) and aligned and len(x_SD):  # on a GPU, bf16 alone has fast code
        weight_EDI = weight_EID.transpose(-2, -1)
        if weight_EDI.requires_grad and fills_empty_groups(x_SD.device):
            empty_E11 = (torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0)[:, None, None]
            weight_EDI.register_hook(lambda g_EDI: g_EDI.masked_fill(empty_E11, 0))
        return F.grouped_mm(x_SD, weight_EDI, offs=ends_E)
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    # unbind, because indexing weight[e] would give every expert a gradient of all experts' size
    return torch.cat([F.linear(x, weight) for x, weight in zip(x_SD.split(counts), weight_EID.unbind())])


def moe_experts(x_ND, ids_NK, weights_NK, gate_up_EFD, down_EDI):
    """Sum over the K chosen experts of weight * down(silu(gate) * up), [N, D]; F = 2I: the gate's rows, then up's.

    Differentiable in x, weights, gate_up and down; the products run in x's type, or autocast's. ids in 0..E-1, no id
    twice in a row; an expert nobody chose gets a gradient of zero. Same result whatever the order of tokens.

    FLOPs: 6SDI forward, 12SDI backward, S = NK. Bytes: the weights, 6EDI (bf16), dominate below some 200 rows an
    expert; then 2S(3D + 5I) forward. Source: sort and grouped product as in MegaBlocks (2211.15841).
    """
    low, high = precisions(x_ND)
    sorted_S, order_S = ids_NK.flatten().sort(stable=True)
    slots_NK = order_S.argsort().view_as(ids_NK)  # where each choice went
    tokens_S = order_S // ids_NK.shape[1]
    experts_E = torch.arange(len(down_EDI), device=ids_NK.device)
    ends_E = torch.searchsorted(sorted_S, experts_E, right=True, out_int32=True)  # bincount would wait for the GPU
    w_S = weights_NK.flatten()[order_S].to(high)
    with torch.autocast(x_ND.device.type, enabled=False):
        gate_up_SF = grouped_linear(Route.apply(x_ND.to(low), tokens_S, slots_NK, True), gate_up_EFD.to(low), ends_E)
        y_SD = grouped_linear(SwiGLU.apply(gate_up_SF, w_S), down_EDI.to(low), ends_E)
        return Route.apply(y_SD, tokens_S, slots_NK, False)


# --- attention ---


def sharded_mask(n_heads, n_kv_heads, stride, local_blocks=1, block=64, documents_BT=None):
    """S2-Attention's pattern as a mask function (b, h, q, k) -> bool for FlexAttention.

    Use it as create_block_mask(mask, B, n_heads, T, T, BLOCK_SIZE=block): with the default of 128, blocks of another
    size would be computed whole and only masked. A query sees, causally, the last local_blocks blocks of keys, and of
    the older ones every stride-th, each key-value head another shard: with at least stride key-value heads the union is
    the whole context. documents_BT holds the number of each token's document in a packed batch; attention never crosses
    documents. FLOPs and bytes: about 1 / stride of dense attention for long contexts, as whole blocks are skipped.
    Source: S2-Attention (2407.17678).
    """
    step = max(1, stride // n_kv_heads)

    def mask(b, h, q, k):
        near = q // block - k // block < local_blocks
        shard = (k // block + h // (n_heads // n_kv_heads) * step) % stride == 0
        seen = (q >= k) & (near | shard)
        return seen if documents_BT is None else seen & (documents_BT[b, q] == documents_BT[b, k])

    return mask


# --- main ---

if __name__ == "__main__":
    parser = ArgumentParser("kernels.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"kernels.py: {message}\n")  # argparse would print the usage as well
    parser.parse_args()
    checks = Path(__file__).parent / "tests" / "bench" / "bench_kernels.py"
    sys.exit(subprocess.run([sys.executable, checks, "check"]).returncode)
