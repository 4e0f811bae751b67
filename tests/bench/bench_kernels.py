"""Times kernels.py: one JSON line a row. `python tests/bench/bench_kernels.py`

On a CPU (3 minutes, one thread): linear_logps beside a materialised log_softmax, forward and backward. CPU-seconds are the
least of several runs, each variant in a process of its own so that its peak memory is its own; extra memory is that peak
over what stands before the first call, the two gradients included.
On a GPU: every operation beside the same in plain PyTorch, under torch.compile, and beside Liger-Kernel and transformers'
experts where those are installed; `roofline` is the time that this machine's own measured matrix product and copy rates
allow, over the time taken. Numerics come first: `python kernels.py`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import kernels  # noqa: E402
from kernels import dense_kl, dense_logps, linear_kl, linear_logps, moe_experts  # noqa: E402

# (N, V, D, runs): the embedded default's head at three sizes, then SmolLM2's
CPU_SHAPES = [(2000, 32, 128, 100), (2000, 64, 256, 100), (2000, 128, 256, 100), (2048, 49152, 576, 3)]
GPU_SHAPES = [(16384, 151936, 2048), (8192, 128256, 4096), (16384, 151936, 1024), (16384, 49152, 576)]


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
    hidden, weight = torch.randn(N, D, requires_grad=True), (torch.randn(V, D) * 0.1).requires_grad_()
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
    print(min(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def bench_cpu():
    for N, V, D, runs in CPU_SHAPES:
        for entropy in ("none", "logged", "trained"):
            row = {"op": "linear_logps", "N": N, "V": V, "D": D, "entropy": entropy, "threads": 1}
            for variant in ("materialised", "chunked"):
                child = subprocess.run([sys.executable, __file__, variant, *map(str, (N, V, D, runs)), entropy],
                                       capture_output=True, text=True, check=True)
                seconds, mb = map(float, child.stdout.split())
                row |= {f"{variant}_cpu_ms": round(seconds * 1000, 3), f"{variant}_extra_mb": round(mb, 1)}
            row["time_ratio"] = round(row["chunked_cpu_ms"] / row["materialised_cpu_ms"], 3)
            if V > 10000:  # below, the peak is the allocator's page rounding
                row["memory_ratio"] = round(row["chunked_extra_mb"] / row["materialised_extra_mb"], 3)
            print(json.dumps(row), flush=True)


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


def bench_gpu():
    def randn(*shape, scale=1.0, grad=True):
        return (scale * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)).requires_grad_(grad)

    a, big = randn(8192, 8192, grad=False), torch.empty(2**30, device="cuda")
    flops_ms = 2 * 8192**3 / gpu_ms(lambda: a @ a)  # FLOPs a millisecond
    bytes_ms = 2 * big.numel() * 4 / 2 / gpu_ms(lambda: big[: 2**29].copy_(big[2**29 :]))
    print(json.dumps({"matmul_tflops": round(flops_ms / 1e9), "copy_tb_s": round(bytes_ms / 1e9, 2)}), flush=True)
    del a, big
    for N, V, D in GPU_SHAPES:
        shape, hidden, weight = {"N": N, "V": V, "D": D}, randn(N, D), randn(V, D, scale=0.05)
        targets = torch.randint(V, (N,), device="cuda")
        steps = {"fused": linear_logps, "plain": dense_logps, "compile": torch.compile(dense_logps)}
        variants = {name: forward_backward(function, hidden, weight, targets) for name, function in steps.items()}
        variants |= liger(hidden, weight, targets)
        gpu_row("linear_logps", shape, variants, 8 * N * V * D / flops_ms + 18 * N * V / bytes_ms)
        forward = {"fused": lambda: linear_logps(hidden.detach(), weight.detach(), targets)}
        gpu_row("linear_logps forward", shape, forward, 2 * N * V * D / flops_ms + 8 * N * V / bytes_ms)
        B, targets_BK = 2048, targets[:2048, None]
        z, dz, ones = torch.randn(B, V, device="cuda"), randn(B, V, grad=False), torch.ones(B, device="cuda")
        results = kernels.logps_triton(z, targets_BK, None, True)
        rows = {"fused": lambda: kernels.logps_triton(z, targets_BK, None, True)}
        gpu_row("row statistics", {"B": B, "V": V}, rows, 4 * B * V / bytes_ms)
        rows = {"fused": lambda: kernels.logps_grad_triton(z, targets_BK, results, (ones[:, None], ones, None), dz, None)}
        gpu_row("row gradient", {"B": B, "V": V}, rows, 6 * B * V / bytes_ms)
        del z, dz, results, rows
        inputs = hidden, weight, randn(N, D, grad=False), randn(V, D, scale=0.05, grad=False)
        steps = {"fused": linear_kl, "plain": dense_kl}
        variants = {name: forward_backward(function, *inputs) for name, function in steps.items()}
        gpu_row("linear_kl forward KL", shape, variants, 12 * N * V * D / flops_ms + 42 * N * V / bytes_ms)
    for E, D, I in ((64, 2048, 1024), (128, 2048, 768)):
        N, K = 16384, 8
        x, weights = randn(N, D), torch.rand(N, K, device="cuda", requires_grad=True)
        ids, experts = torch.rand(N, E, device="cuda").topk(K).indices, (randn(E, 2 * I, D, scale=0.02), randn(E, D, I, scale=0.02))
        variants = {"fused": forward_backward(moe_experts, x, ids, weights, *experts)}
        variants |= transformers_experts(x, ids, weights, experts)
        floor_ms = 18 * N * K * D * I / flops_ms + 2 * N * K * (9 * D + 22 * I) / bytes_ms
        gpu_row("moe_experts", {"N": N, "K": K, "E": E, "D": D, "I": I}, variants, floor_ms)


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
    if len(sys.argv) > 1:
        cpu_child(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6])
    elif torch.cuda.is_available():
        bench_gpu()
    else:
        print(json.dumps({"gpu": "not measured: none here"}))
        bench_cpu()
