"""A training step of moe.py beside transformers' own Qwen3-MoE, with each of its expert implementations.

    python tests/bench/bench_moe.py             # two minutes of one core; no network, no GPU needed
    python tests/bench/bench_moe.py --part 0    # one part of it; the results of the others stay

All lines train the same weights on the same token ids in float32 (bfloat16 products on a GPU) with AdamW, and all have
a load-balancing loss in their step; they take turns, so that a busy machine slows all alike. On a CPU a step costs the
CPU time of the process, on a GPU the time until it has finished; the median of the rounds counts. `dense` is the dense
Qwen3 with the same active FLOPs: its feed-forward blocks are as wide as the K chosen experts together. Then two
processes (DDP) and one train on the same rows, and their figures are put side by side. Results: results/moe.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

import moe  # noqa: E402
import sft  # noqa: E402

CASES = {
    "16 experts, 2 chosen": dict(hidden_size=128, num_hidden_layers=3, num_experts=16, num_experts_per_tok=2,
                                 moe_intermediate_size=128, rows=8, length=256),
    "64 experts, 8 chosen": dict(hidden_size=256, num_hidden_layers=2, num_experts=64, num_experts_per_tok=8,
                                 moe_intermediate_size=64, rows=4, length=256),
}
GPU_CASES = {
    "64 experts, 8 chosen": dict(hidden_size=1024, num_hidden_layers=8, num_experts=64, num_experts_per_tok=8,
                                 moe_intermediate_size=512, rows=16, length=1024),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
VOCABULARY = 512


def shared_shape(case):
    """What the MoE and the dense model have in common."""
    return dict(vocab_size=VOCABULARY, hidden_size=case["hidden_size"], num_hidden_layers=case["num_hidden_layers"],
                num_attention_heads=4, num_key_value_heads=2, head_dim=case["hidden_size"] // 4, eos_token_id=1,
                max_position_embeddings=2048, tie_word_embeddings=False)


def moe_model(case, implementation):
    """The same random weights for every line."""
    shape = Qwen3MoeConfig(**shared_shape(case), num_experts=case["num_experts"], norm_topk_prob=True,
                           num_experts_per_tok=case["num_experts_per_tok"], output_router_logits=True,
                           moe_intermediate_size=case["moe_intermediate_size"], router_aux_loss_coef=0.01)
    shape._experts_implementation = implementation
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(shape)


def our_step(case, ids_BT, device):
    """A function that does one step of moe.py, global balance and all it logs included."""
    world, config = moe.World(0, 1, device), moe.Config(learning_rate=1e-4, warmup_steps=0)
    model = moe.install_layers(moe_model(case, "eager"), "softmax")
    policy = moe.shard(moe.RoutedPolicy(model.train()), config, world)
    optimizer, streams = moe.make_optimizer(policy, config), []
    for b, ids in enumerate(ids_BT.numpy()):
        streams.append(moe.Stream(str(b), ids, moe.np.arange(len(ids), dtype=moe.np.int32), len(ids)))
    balance = moe.Balance(policy, [str(b) for b in range(len(streams))], config, world)

    def step():
        batches = [moe.collate_rows(streams, [(b, 0) for b in range(len(streams))], device)]
        n_tokens = ids_BT.shape[0] * (ids_BT.shape[1] - 1)
        balance.begin(0, policy, batches, n_tokens)
        numbers, _ = moe.train_step(policy, optimizer, batches, balance.loss_of, 0, config, world)
        return balance.end(True)["nll"] or numbers

    return step


def their_step(case, implementation, ids_BT, device):
    """The same with transformers' model and loss: labels, router logits, auxiliary loss of the micro-batch."""
    model = moe_model(case, implementation).to(device).train()
    return plain_step(model, ids_BT, device)


def plain_step(model, ids_BT, device):
    """One step as a plain PyTorch loop writes it."""
    optimizer, ids_BT = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True), ids_BT.to(device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids_BT.long(), labels=ids_BT.long(), use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() + 0 * norm.item()

    return step


def dense_step(case, ids_BT, device):
    """The dense model of equal active FLOPs, through the path of sft.py, as ours goes."""
    torch.manual_seed(0)
    inner = case["num_experts_per_tok"] * case["moe_intermediate_size"]
    world, config = sft.World(0, 1, device), sft.Config(learning_rate=1e-4, warmup_steps=0)
    model = Qwen3ForCausalLM(Qwen3Config(**shared_shape(case), intermediate_size=inner))
    policy = sft.shard(sft.Policy(model.train()), config, world)
    optimizer = sft.make_optimizer(policy, config)
    examples = [sft.Example(ids.tolist(), [True] * len(ids)) for ids in ids_BT]
    n_tokens = ids_BT.shape[0] * (ids_BT.shape[1] - 1)

    def loss_of(policy, batch):
        return sft.nll_loss(policy(batch)[0], batch.mask_BS, n_tokens), {}

    def step():
        batch = sft.collate(examples, list(range(len(examples))), device)
        return sft.train_step(policy, optimizer, [batch], loss_of, 0, config, world)[0]["loss"]

    return step


def cost(step, device):
    """(CPU-seconds, or on a GPU seconds, of one step; its loss)."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, loss


def measure(case, rounds, device):
    """Median cost of a step and tokens a second for every line."""
    torch.manual_seed(1)
    ids_BT = torch.randint(2, VOCABULARY, (case["rows"], case["length"]), dtype=torch.int32)
    lines = {"ours": our_step(case, ids_BT, device), "dense": dense_step(case, ids_BT, device)}
    lines |= {f"transformers {name}": their_step(case, name, ids_BT, device) for name in IMPLEMENTATIONS}
    warm_up = {name: cost(step, device) for name, step in lines.items()}
    slow = [name for name in lines if warm_up[name][0] > 8 * warm_up["ours"][0]]  # not worth more rounds
    costs = {name: [warm_up[name][0]] if name in slow else [] for name in lines}
    for _ in range(rounds):
        for name in [name for name in lines if name not in slow]:
            costs[name].append(cost(lines[name], device)[0])
    tokens = ids_BT.numel()
    found = {
        name: {"s_per_step": statistics.median(c), "tokens_per_s": tokens / statistics.median(c),
               "first_loss": warm_up[name][1], "warm_up_only": name in slow}
        for name, c in costs.items()
    }
    best = max((name for name in found if name.startswith("transformers")), key=lambda n: found[n]["tokens_per_s"])
    ratios = [a / b for a, b in zip(costs[best], costs["ours"])]
    return {"tokens": tokens, "lines": found, "best": best,
            "ours_faster_by": [min(ratios), statistics.median(ratios), max(ratios)],
            "ours_to_dense": found["ours"]["tokens_per_s"] / found["dense"]["tokens_per_s"]}


def two_processes(steps=20):
    """The same run in one process and in two, rows and seed alike: the last line of each one's metrics.jsonl."""
    found, root = {}, HERE.parents[1]
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2):
            out = Path(folder) / str(n)
            flags = ["--output_dir", str(out), "--max_steps", str(steps), "--per_device_train_batch_size", str(4 // n),
                     "--gradient_accumulation_steps", "4", "--balance_rows", "1", "--n_train", "200", "--balance",
                     "exact", "--save_steps", "0", "--eval_steps", str(steps), "--n_eval", "8"]
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone",
                 str(root / "moe.py"), *flags],
                check=True,
                capture_output=True,
            )
            line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
            shape = json.loads((out / "config.json").read_text())
            found[f"{n} process" + "es" * (n > 1)] = line
    counts = 4 * shape["num_hidden_layers"] * (shape.get("num_local_experts") or shape["num_experts"])
    found["bytes of counts sent a micro-batch"] = counts
    return found


def report(name, found):
    """Prints one case."""
    print(f"{name}: {found['tokens']} tokens a step")
    for line, numbers in found["lines"].items():
        print(
            f"  {line:<26} {numbers['s_per_step']:8.3f} s  {numbers['tokens_per_s']:9,.0f} tokens/s  "
            f"first loss {numbers['first_loss']:.4f}{'  (once)' * numbers['warm_up_only']}"
        )
    low, middle, high = found["ours_faster_by"]
    print(
        f"  ours faster than {found['best']} by {middle:.2f} ({low:.2f} to {high:.2f}); "
        f"{found['ours_to_dense']:.2f} of dense"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--part", type=int, help="the number of a case, or the one after the last: two processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = GPU_CASES if device.type == "cuda" else CASES
    path = HERE / "results" / ("moe_gpu.json" if device.type == "cuda" else "moe.json")
    results = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    results |= {"date": str(date.today()), "threads": 1, "rounds": options.rounds, "torch": torch.__version__,
                "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                "transformers": transformers.__version__}
    for part, (name, case) in enumerate(cases.items()):
        if options.part in (None, part):
            results["cases"][name] = measure(case, options.rounds, device)
            report(name, results["cases"][name])
    if options.part in (None, len(cases)):
        results["two_processes"] = two_processes()
        print(json.dumps(results["two_processes"], indent=1))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
