"""Checks and times kernels.py: one JSON line a row. `python kernels.py` or `python tests/bench/bench_kernels.py`

`python kernels.py` checks every operation, gradients included, against the same written densely in float64, then times
it where there is a GPU; this file by itself only times.

On a CPU (3 minutes, one thread): linear_logps beside a materialised log_softmax, forward and backward. CPU-seconds are
the least of several runs, each variant in a process of its own so that its peak memory is its own; extra memory is that
peak over what stands before the first call, less the two gradients.
On a GPU: every operation beside plain PyTorch, and where they apply torch.compile, Liger-Kernel and transformers'
experts where those are installed; `roofline` is the time that this machine's own measured matrix product and copy rates
allow, over the time taken.
"""

import json
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import kernels  # noqa: E402
from kernels import linear_kl, linear_logps, moe_experts  # noqa: E402

# (N, V, D, runs): the embedded default's head at three sizes, then SmolLM2's
CPU_SHAPES = [(2000, 32, 128, 100), (2000, 64, 256, 100), (2000, 128, 256, 100), (2048, 49152, 576, 3)]
GPU_SHAPES = [(16384, 151936, 2048), (8192, 128256, 4096), (16384, 151936, 1024), (16384, 49152, 576)]


# --- checks ---


def dense_logps(hidden_ND, weight_VD, targets_N, temperature=1.0, softcap=None):
    """linear_logps as everybody writes it first, [N, V] and all: what checks and timings compare with."""
    z_NV = F.linear(hidden_ND, weight_VD).to(torch.promote_types(hidden_ND.dtype, torch.float32))
    z_NV = z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)
    logp_NV = (z_NV / temperature).log_softmax(-1)
    return logp_NV.gather(1, targets_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)


def dense_kl(hidden_ND, weight_VD, teacher_hidden_NH, teacher_weight_VH, kind="forward", beta=0.5):
    """linear_kl from both [N, V]."""
    s_NV = F.linear(hidden_ND, weight_VD).to(torch.promote_types(hidden_ND.dtype, torch.float32)).log_softmax(-1)
    t_NV = F.linear(teacher_hidden_NH, teacher_weight_VH).to(s_NV.dtype).log_softmax(-1)
    m_NV = (beta * t_NV.exp() + (1 - beta) * s_NV.exp()).log()
    if kind == "jsd":
        return (beta * t_NV.exp() * (t_NV - m_NV) + (1 - beta) * s_NV.exp() * (s_NV - m_NV)).sum(-1)
    p_NV, q_NV = (t_NV, s_NV) if kind == "forward" else (s_NV, t_NV)
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def dense_moe(x_ND, ids_NK, weights_NK, gate_up_EFD, down_EDI):
    """moe_experts with every expert on every token."""
    gate_ENI, up_ENI = torch.einsum("nd,efd->enf", x_ND, gate_up_EFD).chunk(2, -1)
    y_END = torch.einsum("eni,edi->end", F.silu(gate_ENI) * up_ENI, down_EDI)
    chosen_NKE = F.one_hot(ids_NK, len(down_EDI)).to(weights_NK.dtype)
    return torch.einsum("nke,nk,end->nd", chosen_NKE, weights_NK, y_END.to(weights_NK.dtype))


def check_cases(device, dtype):
    """(name, fused, dense, inputs) at odd sizes: floats are differentiated where they require it."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, scale=1.0, grad=True, dtype=dtype):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_(grad)

    N, V, D, H, E, K, I = 70, 5003, 48, 40, 9, 3, 24
    hidden, weight = leaf(N, D), leaf(V, D, scale=0.2)
    teacher = leaf(N, H, grad=False), leaf(V, H, scale=0.2, grad=False)
    targets = torch.randint(V, (N,), generator=generator).to(device)
    for name, options in (("", {}), (" softcap", {"temperature": 0.7, "softcap": 5.0})):
        fused = partial(linear_logps, workspace_mb=0.5, **options)  # several chunks
        yield f"linear_logps{name}", fused, partial(dense_logps, **options), (hidden, weight, targets)
    for kind in ("forward", "reverse", "jsd"):
        fused = partial(linear_kl, kind=kind, beta=0.3, workspace_mb=0.5)
        yield f"linear_kl {kind}", fused, partial(dense_kl, kind=kind, beta=0.3), (hidden, weight, *teacher)
    ids = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(N)]).to(device)  # expert 8: empty
    experts = leaf(E, 2 * I, D, scale=0.2), leaf(E, D, I, scale=0.2)
    weights = torch.rand(N, K, generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    yield "moe_experts", moe_experts, dense_moe, (leaf(N, D), ids, weights.requires_grad_(), *experts)


def relative_error(fused, dense, inputs):
    """Largest error of an output or a gradient over that tensor's largest value, against dense in float64."""
    tensors = []
    for function, dtype in ((fused, None), (dense, torch.float64)):
        leaves = [x.detach().to(dtype) if x.is_floating_point() and dtype else x.detach() for x in inputs]
        leaves = [leaf.requires_grad_(x.requires_grad) for leaf, x in zip(leaves, inputs)]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.linspace(-1, 2, y.numel(), device=y.device, dtype=y.dtype).view_as(y) for y in outputs]
        gradients = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], upstream)
        tensors.append([*outputs, *gradients])
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(*tensors))


def check():
    """Every operation against float64, in memory that starts as NaN; prints a line each and returns the failures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills uninitialised memory
    where = {"device": device, "kernels": "triton" if kernels.use_triton(torch.empty(0, device=device)) else "torch",
             "torch": torch.__version__, "triton": getattr(kernels.triton, "__version__", None)}
    failures = 0
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        for name, fused, dense, inputs in check_cases(device, dtype):
            error = relative_error(fused, dense, inputs)
            failures += not error < limit  # NaN fails too
            row = {"check": name, "dtype": str(dtype)[6:], "relative_error": float(f"{error:.2g}"), "limit": limit}
            print(json.dumps({**row, "ok": error < limit, **where}), flush=True)
    torch.use_deterministic_algorithms(False)
    return failures


# --- CPU ---


def materialised(hidden, weight, targets, entropy):
    """What a script without linear_logps writes; the entropy for logging only, or none."""
    logp = torch.log_softmax(hidden @ weight.T, -1)
    logps = logp.gather(1, targets[:, None])[:, 0]
    if entropy == "none":
        return logps
    with torch.set_grad_enabled(entropy == "trained"):
        return logps, -(logp.exp() * logp).sum(-1)


def chunked(hidden, weight, targets, entropy):
    logps, entropies = linear_logps(hidden, weight, targets, entropy=entropy != "none")
    return logps if entropy == "none" else (logps, entropies if entropy == "trained" else entropies.detach())


def cpu_child(variant, N, V, D, runs, entropy):
    """Runs one variant and prints (CPU-seconds, extra MB)."""
    import resource

    torch.set_num_threads(1)
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D).mul_(0.1).requires_grad_()
    targets, function = torch.randint(V, (N,)), {"materialised": materialised, "chunked": chunked}[variant]
    seconds = []
    function(hidden[:2], weight[:8], targets[:2] % 8, entropy)  # what PyTorch loads on first use is not the method's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(runs):
        hidden.grad = weight.grad = None
        start = time.process_time()
        outputs = function(hidden, weight, targets, entropy)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(y.sum() for y in outputs).backward()
        seconds.append(time.process_time() - start)
    gradients_kb = (hidden.numel() + weight.numel()) * 4 / 1024
    print(min(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - gradients_kb) / 1024)


def bench_cpu():
    for N, V, D, runs in CPU_SHAPES:
        for entropy in ("none", "logged", "trained"):
            row = {"op": "linear_logps", "N": N, "V": V, "D": D, "entropy": entropy, "threads": 1}
            for variant in ("materialised", "chunked"):
                command = [sys.executable, __file__, "child", variant, *map(str, (N, V, D, runs)), entropy]
                child = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, mb = map(float, child.stdout.split())
                row |= {f"{variant}_cpu_ms": round(seconds * 1000, 3), f"{variant}_extra_mb": round(mb, 1)}
            row["time_ratio"] = round(row["chunked_cpu_ms"] / row["materialised_cpu_ms"], 3)
            if V > 10000:  # below, the peak is the allocator's page rounding
                row["memory_ratio"] = round(row["chunked_extra_mb"] / row["materialised_extra_mb"], 3)
            print(json.dumps(row), flush=True)


# --- GPU ---


def gpu_ms(function):
    from triton.testing import do_bench

    return do_bench(function, warmup=50, rep=300, return_mode="median")


def forward_backward(function, *inputs):
    """One training step of the operation on its own, as a function to time."""
    leaves = [x for x in inputs if x.requires_grad]

    def step():
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad([y for y in outputs if y.requires_grad], leaves, [torch.ones_like(y) for y in outputs])

    return step


def gpu_row(op, shape, variants, floor_ms):
    """Times and peak memory of each variant; one that needs more memory than there is says so."""
    for name, function in variants.items():
        row = {"op": op, **shape, "variant": name, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
        try:
            function()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            row["extra_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
            row["ms"] = round(gpu_ms(function), 3)
            row["roofline"] = round(floor_ms / row["ms"], 3)
        except torch.cuda.OutOfMemoryError:
            row["ms"] = "out of memory"
        torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)


def randn(*shape, scale=1.0, grad=True):
    return (scale * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)).requires_grad_(grad)


def ceilings():
    """(FLOPs, bytes) a millisecond that this GPU reaches in a large product and a large copy."""
    a, big = randn(8192, 8192, grad=False), torch.empty(2**30, device="cuda")
    flops_ms = 2 * 8192**3 / gpu_ms(lambda: a @ a)
    bytes_ms = 4 * big.numel() / gpu_ms(lambda: big[: 2**29].copy_(big[2**29 :]))  # half read, half written
    print(json.dumps({"matmul_tflops": round(flops_ms / 1e9), "copy_tb_s": round(bytes_ms / 1e9, 2)}), flush=True)
    return flops_ms, bytes_ms


def bench_head(N, V, D, flops_ms, bytes_ms):
    shape, hidden, weight = {"N": N, "V": V, "D": D}, randn(N, D), randn(V, D, scale=0.05)
    targets = torch.randint(V, (N,), device="cuda")
    steps = {"fused": linear_logps, "plain": dense_logps, "compile": torch.compile(dense_logps)}
    variants = {name: forward_backward(function, hidden, weight, targets) for name, function in steps.items()}
    variants |= liger(hidden, weight, targets)
    gpu_row("linear_logps", shape, variants, 8 * N * V * D / flops_ms + 18 * N * V / bytes_ms)
    forward = {"fused": lambda: linear_logps(hidden.detach(), weight.detach(), targets)}
    gpu_row("linear_logps forward", shape, forward, 2 * N * V * D / flops_ms + 8 * N * V / bytes_ms)
    inputs = hidden, weight, randn(N, D, grad=False), randn(V, D, scale=0.05, grad=False)
    variants = {"fused": forward_backward(linear_kl, *inputs), "plain": forward_backward(dense_kl, *inputs)}
    gpu_row("linear_kl forward KL", shape, variants, 12 * N * V * D / flops_ms + 42 * N * V / bytes_ms)


def bench_rows(B, V, bytes_ms):
    """The two row kernels of linear_logps alone: their roofline is the copy rate."""
    z, dz, ones = torch.randn(B, V, device="cuda"), randn(B, V, grad=False), torch.ones(B, device="cuda")
    targets_BK, grads = torch.randint(V, (B, 1), device="cuda"), (ones[:, None], ones, None)
    results = kernels.logps_triton(z, targets_BK, None, True)
    for name, rows, n_bytes in (
        ("row statistics", lambda: kernels.logps_triton(z, targets_BK, None, True), 4 * B * V),
        ("row gradient", lambda: kernels.logps_grad_triton(z, targets_BK, results, grads, dz, None), 6 * B * V),
    ):
        gpu_row(name, {"B": B, "V": V}, {"fused": rows}, n_bytes / bytes_ms)


def bench_experts(E, D, I, flops_ms, bytes_ms):
    N, K = 16384, 8
    x, weights = randn(N, D), torch.rand(N, K, device="cuda", requires_grad=True)
    ids = torch.rand(N, E, device="cuda").topk(K).indices
    experts = randn(E, 2 * I, D, scale=0.02), randn(E, D, I, scale=0.02)
    variants = {"fused": forward_backward(moe_experts, x, ids, weights, *experts)}
    variants |= transformers_experts(x, ids, weights, experts)
    floor_ms = 18 * N * K * D * I / flops_ms + 2 * N * K * (9 * D + 22 * I) / bytes_ms
    gpu_row("moe_experts", {"N": N, "K": K, "E": E, "D": D, "I": I}, variants, floor_ms)


def bench_gpu():
    flops_ms, bytes_ms = ceilings()
    for N, V, D in GPU_SHAPES:
        bench_head(N, V, D, flops_ms, bytes_ms)
    for V in (151936, 50257):
        bench_rows(2048, V, bytes_ms)
    for E, D, I in ((64, 2048, 1024), (128, 2048, 768)):
        bench_experts(E, D, I, flops_ms, bytes_ms)


def liger(hidden, weight, targets):
    """Liger-Kernel's fused linear cross-entropy, forward and backward; it has no log-probabilities and no entropy."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return {}
    loss = LigerFusedLinearCrossEntropyLoss()
    return {"liger (loss only)": forward_backward(lambda h, w, y: loss(w, h, y), hidden, weight, targets)}


def transformers_experts(x, ids, weights, experts):
    """transformers' Qwen3 experts on PyTorch's grouped product."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return {}
    E, F2, D = experts[0].shape
    config = Qwen3MoeConfig(num_experts=E, hidden_size=D, moe_intermediate_size=F2 // 2)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(w) for w in experts)

    def forward(x, ids, weights, gate_up, down):
        return torch.func.functional_call(module, {"gate_up_proj": gate_up, "down_proj": down},
                                          (x, ids, weights.to(x.dtype)))

    return {"transformers grouped_mm": forward_backward(forward, x, ids, weights, *experts)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        cpu_child(sys.argv[2], *map(int, sys.argv[3:7]), sys.argv[7])
        sys.exit()
    parser = ArgumentParser("bench_kernels.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["check"], help="what `python kernels.py` does")
    parser.error = lambda message: parser.exit(2, f"bench_kernels.py: {message}\n")
    if parser.parse_args().what == "check":
        failures = check()
        if torch.cuda.is_available():
            bench_gpu()
        sys.exit(1 if failures else 0)
    if torch.cuda.is_available():
        bench_gpu()
    else:
        print(json.dumps({"gpu": "not measured: none here"}))
        bench_cpu()
