"""moe.py: the balancing losses and their gradients, what is counted, the data mix, the checkpoints, and a run."""

import copy
import json
import math
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import eval as ground
import faults
import moe
from eval import InputError, char_tokenizer, load_model
from moe import Balance, Config, Stream, World, balance_loss, choose_experts, collate_rows
from rounding import assert_close

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_experts=6, num_experts_per_tok=2,
             moe_intermediate_size=12, max_length=16)
SCOPES = ("micro", "sequence", "sync", "global", "exact", "shuffle", "bias", "none")


def small_model(gate="softmax", dtype=torch.float64, **changes):
    """A small model whose router is far from even."""
    config = Config(**{**SMALL, **changes})
    model = moe.install_layers(moe.tiny_model(config)[0].to(dtype), gate)
    for layer in moe.moe_layers(model):
        layer.gate.weight.data *= 30
    return model


def ragged_streams():
    """Two domains in rows of 16 tokens, 9 rows in all: several documents a row, and a last row that is short."""
    rng = np.random.default_rng(0)
    streams = []
    for name, lengths in (("a", [5, 16, 9, 2, 30, 7]), ("b", [3, 40, 11, 9])):
        positions = np.concatenate([np.arange(n) for n in lengths])
        offset = np.arange(len(positions)) % 16
        streams.append(Stream(name, rng.integers(4, 90, len(positions)).astype(np.int32),
                              np.minimum(positions, offset).astype(np.int32), 16))
    return streams


PICKS = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 4), (1, 3), (0, 2), (1, 2)]


def step_of(policy, world, accumulation, **flags):
    """One step of plain gradient descent at rate 1 over PICKS by the script's own path: (numbers, weights' changes)."""
    streams = ragged_streams()
    config = Config(**{**SMALL, "balance_coef": 0.5, "z_loss_coef": 0.1, "max_grad_norm": 0.0, "learning_rate": 1.0,
                       "warmup_steps": 0, "lr_scheduler_type": "constant", "bf16": False, **flags})
    lengths = [len(streams[d].row(r)[0]) for d, r in PICKS]
    n_tokens = sum(int((streams[d].row(r)[1][1:] > 0).sum()) for d, r in PICKS)
    rows = len(PICKS) // (accumulation * world.size)
    batches = [
        collate_rows(streams, [PICKS[i] for i in part], CPU) for part in moe.micro_batches(lengths, rows, 0, world)
    ]
    balance = Balance(policy, ["a", "b"], config, world)
    before = {name: moe.whole(p.detach()).clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)  # first: a forward leaves whole weights behind
    balance.begin(0, policy, batches, n_tokens)
    numbers, taken = moe.train_step(policy, optimizer, batches, balance.loss_of, 0, config, world)
    numbers |= balance.end(taken)
    assert taken
    return numbers, {name: moe.whole(p.detach()) - before[name] for name, p in moe.parameters_of(policy).items()}


def same(a, b, tolerance=1e-12):
    return all(float((a[name] - b[name]).abs().max()) < tolerance for name in b)


# --- the loss ---


def random_routing(n=40, n_layers=3, n_experts=8, k=2, scale=3.0):
    torch.manual_seed(0)
    logits_LNE = (scale * torch.randn(n_layers, n, n_experts, dtype=torch.float64)).requires_grad_()
    ids_LNK = logits_LNE.detach().topk(k, -1).indices
    return logits_LNE, ids_LNK, torch.rand(n) < 0.7


def chosen(ids_LNK, n_experts):
    return torch.zeros(*ids_LNK.shape[:2], n_experts, dtype=torch.float64).scatter_(-1, ids_LNK, 1.0)


def lbl_by_hand(probs_NE, ids_NK, tokens, f_tokens=None):
    """E sum_i f_i P_i of one layer with loops: P over `tokens`, f over `f_tokens`."""
    f_tokens, E, K = tokens if f_tokens is None else f_tokens, probs_NE.shape[1], ids_NK.shape[1]
    total = 0.0
    for i in range(E):
        f = sum(1.0 for t in f_tokens for k in range(K) if ids_NK[t, k] == i) / (K * len(f_tokens))
        total = total + f * sum(probs_NE[t, i] for t in tokens) / len(tokens)
    return E * total


def test_the_loss_is_the_formula_and_its_gradient_too():
    logits_LNE, ids_LNK, mask_N = random_routing()
    tokens, E = mask_N.nonzero()[:, 0].tolist(), logits_LNE.shape[-1]
    probs_LNE, member_1N = logits_LNE.softmax(-1), mask_N[None].double()
    counts_L1E = (member_1N @ chosen(ids_LNK, E)).requires_grad_()
    loss_L = balance_loss(member_1N @ probs_LNE, counts_L1E, len(tokens))
    assert loss_L.tolist() == pytest.approx([float(lbl_by_hand(p, i, tokens)) for p, i in zip(probs_LNE, ids_LNK)],
                                            abs=1e-12)
    loss_L.sum().backward()
    f_L1E = counts_L1E.detach() / counts_L1E.detach().sum(-1, keepdim=True)
    inner = (probs_LNE * f_L1E).sum(-1, keepdim=True)
    wanted = E / len(tokens) * mask_N[:, None] * probs_LNE * (f_L1E - inner)
    assert torch.allclose(logits_LNE.grad, wanted.detach(), atol=1e-13) and wanted.abs().max() > 1e-3
    assert counts_L1E.grad is None


def test_one_at_balance_and_e_over_k_at_collapse_by_layer():
    """transformers pools the layers before it multiplies: four collapsed layers look as if they were balanced."""
    E, K, n = 8, 2, 64
    even_LE, one_1N = torch.full((4, 1, E), K * n / E), torch.ones(1, n)
    assert balance_loss(torch.full((4, 1, E), n / E), even_LE, n).tolist() == [1.0] * 4
    logits_LNE = torch.full((4, n, E), -20.0)
    for layer in range(4):
        logits_LNE[layer, :, 2 * layer : 2 * layer + 2] = 20.0
    ids_LNK = logits_LNE.topk(K, -1).indices
    loss_L = balance_loss(one_1N @ logits_LNE.softmax(-1), one_1N @ chosen(ids_LNK, E).float(), n)
    assert loss_L.tolist() == pytest.approx([E / K] * 4)
    assert float(load_balancing_loss_func(tuple(logits_LNE), E, K)) == pytest.approx(K)  # its value at balance
    one_layer = load_balancing_loss_func((logits_LNE[0],), E, K)
    assert float(one_layer) == pytest.approx(K * float(loss_L[0]))  # so router_aux_loss_coef = balance_coef / K


def test_bias_chooses_and_does_not_weigh():
    logits_NE = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for gate in ("softmax", "sigmoid"):
        scores_NE = moe.gate_scores(logits_NE, gate)
        ids_NK, weights_NK = choose_experts(logits_NE, torch.tensor([0.0, 0.0, 0.0, 9.0]), 2, gate, False)
        assert sorted(ids_NK[0].tolist()) == [0, 3]
        assert torch.equal(weights_NK, scores_NE.gather(1, ids_NK))
        _, weights_NK = choose_experts(logits_NE, torch.zeros(4), 2, gate, True)
        assert float(weights_NK.sum()) == pytest.approx(1.0)
    assert float(moe.gate_scores(logits_NE, "sigmoid")[0, 0]) == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_bias_moves_towards_balance(rule):
    """On fixed scores: the violation falls, and no token moves to an expert with more load than the one it left."""
    torch.manual_seed(1)
    logits_NE, bias_LE = torch.randn(600, 8) + torch.linspace(0, 2, 8), torch.zeros(1, 8)
    first, moved = None, 0
    for _ in range(200):
        ids_NK, _ = choose_experts(logits_NE, bias_LE[0], 2, "sigmoid", True)
        counts_LE = chosen(ids_NK[None], 8).sum(1)
        first = first if first is not None else float(moe.max_violation(counts_LE))
        new_LE = moe.moved_bias(bias_LE, counts_LE, 0.003, rule)
        assert float(new_LE.mean()) == pytest.approx(0, abs=1e-6)
        up_E = (new_LE - bias_LE)[0].sub((new_LE - bias_LE)[0].median())
        assert up_E[counts_LE[0].argmin()] >= up_E.max() - 1e-9 and up_E[counts_LE[0].argmax()] <= up_E.min() + 1e-9
        after_NK, _ = choose_experts(logits_NE, new_LE[0], 2, "sigmoid", True)
        left, came = chosen(ids_NK[None], 8)[0], chosen(after_NK[None], 8)[0]
        for t in (left != came).any(1).nonzero()[:, 0].tolist():
            loads = counts_LE[0]
            out, into = ((left[t] > came[t]).nonzero()[:, 0], (came[t] > left[t]).nonzero()[:, 0])
            assert loads[into].min() <= loads[out].max()
            moved += 1
        bias_LE = new_LE
    assert float(moe.max_violation(counts_LE)) < 0.2 * first and moved > 50


def test_z_loss_is_the_formula():
    logits_LNE, _, mask_N = random_routing()
    wanted = [
        sum(float(layer[t].exp().sum().log() ** 2) for t in mask_N.nonzero()) / int(mask_N.sum())
        for layer in logits_LNE.detach()
    ]
    assert moe.z_loss(logits_LNE, mask_N, int(mask_N.sum())).tolist() == pytest.approx(wanted)


# --- scopes ---


def by_hand(scope, parts, model):
    """The step's balancing loss from its definition, given its micro-batches; hooks on the routers read the routing."""
    logits, handles = [], []
    for layer in moe.moe_layers(model):
        handles.append(layer.gate.register_forward_hook(lambda module, inputs, output: logits.append(output.detach())))
    tables = []  # for each micro-batch: (layer's probabilities, choices), counted positions, documents
    for batch in parts:
        logits.clear()
        with torch.no_grad():
            moe.RoutedPolicy(model)(batch)
        layers = [(z.softmax(-1), z.topk(2, -1).indices) for z in logits]
        tables.append((layers, batch.where_C.tolist(), batch.document_N.tolist()))
    for handle in handles:
        handle.remove()
    n_tokens, total = sum(len(tokens) for _, tokens, _ in tables), 0.0
    for layer in range(len(moe.moe_layers(model))):
        ids_so_far = []
        everything = torch.cat([layers[layer][1][tokens] for layers, tokens, _ in tables])
        for layers, tokens, document in tables:
            probs, ids = layers[layer]
            ids_so_far.append(ids[tokens])
            groups = [tokens]
            if scope == "sequence":
                groups = [[t for t in tokens if document[t] == d] for d in sorted({document[t] for t in tokens})]
            for group in groups:
                source = {"micro": ids[group], "sequence": ids[group], "global": torch.cat(ids_so_far),
                          "exact": everything}[scope]
                f = torch.bincount(source.flatten(), minlength=6).double() / source.numel()
                total += len(group) / n_tokens * 6 * float(f @ probs[group].mean(0))
    return total / len(moe.moe_layers(model))


@pytest.mark.parametrize("scope", ["micro", "sequence", "global", "exact"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_scope_is_its_definition(scope, accumulation):
    model, streams = small_model(), ragged_streams()
    lengths = [len(streams[d].row(r)[0]) for d, r in PICKS]
    parts = [
        collate_rows(streams, [PICKS[i] for i in part], CPU)
        for part in moe.micro_batches(lengths, 8 // accumulation, 0, ALONE)
    ]
    wanted = by_hand(scope, parts, model)
    plain, _ = step_of(moe.RoutedPolicy(copy.deepcopy(model)), ALONE, accumulation, balance="none")
    numbers, _ = step_of(moe.RoutedPolicy(model), ALONE, accumulation, balance=scope)
    assert (numbers["loss"] - plain["loss"]) / 0.5 == pytest.approx(wanted, abs=1e-6)  # f is counted in float32
    measured = {"micro": "balance/micro", "exact": "balance/global"}
    if scope in measured:
        assert numbers[measured[scope]] == plain[measured[scope]] == pytest.approx(wanted, abs=1e-6)


def rank_of_two(rank, port, folder, scope, accumulation):
    """One of two processes: the step on its part of the weights; rank 0 leaves its result."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = moe.start(Config(ddp_timeout=60))
    policy = moe.shard(moe.RoutedPolicy(small_model()), Config(), world)
    numbers, changes = step_of(policy, world, accumulation, balance=scope)
    if rank == 0:
        torch.save((numbers, changes), folder / "result.pt")
    moe.total([0], world)
    os._exit(0)


def two_ranks(tmp_path, scope, accumulation):
    port = faults.free_port()
    jobs = [
        faults.FORKS.Process(target=rank_of_two, args=(rank, port, tmp_path, scope, accumulation)) for rank in (0, 1)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    assert [job.exitcode for job in jobs] == [0, 0]
    return torch.load(tmp_path / "result.pt")


@pytest.mark.parametrize("scope, accumulation", [("exact", 2), ("exact", 1), ("global", 1), ("sync", 1), ("none", 2)])
def test_two_ranks_and_accumulation_equal_the_pooled_batch(tmp_path, scope, accumulation):
    numbers, changes = two_ranks(tmp_path, scope, accumulation)
    pooled, wanted = step_of(moe.RoutedPolicy(small_model()), ALONE, 1, balance=scope)
    assert same(changes, wanted) and max(float(c.abs().max()) for n, c in wanted.items() if "gate.weight" in n) > 1e-3
    for name in ("loss", "nll", "balance/global", "max_violation", "mutual_information", "z_loss", "nll/a"):
        assert numbers[name] == pytest.approx(pooled[name], abs=1e-9), name
    assert numbers["time/rank_load"] >= pooled["time/rank_load"] > 1


def test_more_accumulation_with_the_same_data_changes_nothing_where_it_must_not():
    once = {scope: step_of(moe.RoutedPolicy(small_model()), ALONE, 1, balance=scope)[1] for scope in SCOPES}
    for scope in ("exact", "none", "sequence"):
        assert same(step_of(moe.RoutedPolicy(small_model()), ALONE, 8, balance=scope)[1], once[scope])
    assert same(once["global"], once["exact"]) and same(once["micro"], once["exact"])
    micro = step_of(moe.RoutedPolicy(small_model()), ALONE, 4, balance="micro")[1]
    assert not same(micro, once["micro"], 1e-4)
    grouped = step_of(moe.RoutedPolicy(small_model()), ALONE, 1, balance="micro", balance_rows=2)[1]
    assert not same(grouped, once["micro"], 1e-4)
    assert not same(step_of(moe.RoutedPolicy(small_model()), ALONE, 4, balance="global")[1], micro, 1e-4)


def test_groups_of_rows_are_micro_batches():
    """--balance_rows 2 in one forward is the same step as forwards of 2 rows (rows in the order of their lengths)."""
    for fraction in (0.0, 0.3):
        flags = dict(balance="micro", micro_fraction=fraction)
        numbers, changes = step_of(moe.RoutedPolicy(small_model()), ALONE, 4, **flags)
        grouped, wanted = step_of(moe.RoutedPolicy(small_model()), ALONE, 1, balance_rows=2, **flags)
        assert same(changes, wanted)
        for name in ("loss", "balance/micro", "max_violation_micro"):
            assert numbers[name] == pytest.approx(grouped[name])


def test_the_gate_feels_the_coefficient_in_every_scope():
    for scope in SCOPES:
        low, high = (
            step_of(moe.RoutedPolicy(small_model()), ALONE, 2, balance=scope, balance_coef=c, balance_rows=1)[1]
            for c in (0.5, 1.0)
        )
        felt = max(float((low[name] - high[name]).abs().max()) for name in low if "gate.weight" in name)
        assert (felt > 1e-4) == (scope not in ("bias", "none")), scope
    with_z, without = (step_of(moe.RoutedPolicy(small_model()), ALONE, 1, z_loss_coef=c)[1] for c in (0.1, 0.0))
    assert not same(with_z, without, 1e-4)


def test_the_local_loss_acts_in_every_scope():
    """--micro_fraction adds that share of `micro`'s loss, where a bias or nothing else balances, too."""
    for scope in SCOPES:
        flags = dict(balance=scope, balance_coef=0.5, balance_rows=1)
        without, with_it = (step_of(moe.RoutedPolicy(small_model()), ALONE, 2, micro_fraction=fraction, **flags)
                            for fraction in (0.0, 0.1))
        added = 0.1 * 0.5 * without[0]["balance/micro"]
        assert with_it[0]["loss"] - without[0]["loss"] == pytest.approx(added, abs=1e-9) and added > 0.05, scope
        felt = max(float((with_it[1][name] - without[1][name]).abs().max()) for name in with_it[1] if "gate" in name)
        assert felt > 1e-5, scope


def test_shuffled_groups_keep_their_sizes_and_use_every_token_once():
    model, streams = small_model(), ragged_streams()
    policy = moe.RoutedPolicy(model)
    batches = [collate_rows(streams, PICKS[start : start + 2], CPU) for start in range(0, 8, 2)]
    balance = Balance(policy, ["a", "b"], Config(**SMALL, balance="shuffle", balance_rows=1), ALONE)
    balance.begin(0, policy, batches, 1)
    total, own = 0, 0
    for batch in batches:
        _, _, _, chosen_LNE, micro_GN = balance.measure(policy, batch, balance.routing)
        counts_LGE, member_GN = balance.group_counts(batch, chosen_LNE, micro_GN)
        assert member_GN is micro_GN and torch.equal(counts_LGE.sum(-1)[0], 2 * micro_GN.sum(-1))
        assert not torch.equal(counts_LGE, micro_GN @ chosen_LNE)
        total, own = total + counts_LGE.sum(1), own + (micro_GN @ chosen_LNE).sum(1)
    assert torch.equal(total, own)


def test_bias_follows_the_steps_counts_and_no_gradient():
    model = small_model("sigmoid")
    policy = moe.RoutedPolicy(model)
    step_of(policy, ALONE, 2, balance="bias", gate="sigmoid", bias_rate=0.01)
    bias_LE = moe.bias_of(model)
    assert bias_LE.dtype == torch.float32 and not bias_LE.requires_grad
    assert not any("bias" in name for name, _ in model.named_parameters()) and not any(
        "bias" in n for n in model.state_dict()
    )
    assert float(bias_LE.abs().max()) > 0.004
    before, batch = bias_LE.clone(), collate_rows(ragged_streams(), PICKS, CPU)
    balance = Balance(policy, ["a", "b"], Config(**SMALL, balance="bias"), ALONE)
    for taken in (False, True):  # a step that was not taken moves nothing
        balance.begin(0, policy, [batch], 1)
        balance.loss_of(policy, batch)
        balance.end(taken)
        assert torch.equal(before, moe.bias_of(model)) != taken


@pytest.mark.parametrize("scope", ["global", "exact", "shuffle", "bias"])
def test_a_step_knows_nothing_of_the_one_before(scope):
    """f is counted over one optimizer step: on the same weights and data a second step's loss is the first's."""
    policy = moe.RoutedPolicy(small_model())
    batches = [collate_rows(ragged_streams(), PICKS[start : start + 4], CPU) for start in (0, 4)]
    balance, found = Balance(policy, ["a", "b"], Config(**SMALL, balance=scope, bias_rate=0.0), ALONE), []
    for _ in range(2):
        balance.begin(5, policy, batches, 50)
        found.append([float(balance.loss_of(policy, batch)[0].detach()) for batch in batches])
        numbers = balance.end(True)
    assert found[0] == found[1]
    assert balance.routing.tokens_M.sum() == sum(int(batch.mask_BS.sum()) for batch in batches)


def test_shuffles_differ_from_step_to_step():
    policy, found = moe.RoutedPolicy(small_model()), []
    batch = collate_rows(ragged_streams(), PICKS, CPU)
    balance = Balance(policy, ["a", "b"], Config(**SMALL, balance="shuffle"), ALONE)
    for step in (0, 1, 1):
        balance.begin(step, policy, [batch], 1)
        found.append(balance.pool_LCK)
    assert not torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_switching_the_scope():
    policy = moe.RoutedPolicy(small_model())
    balance = Balance(policy, ["a", "b"], Config(**SMALL, balance="global", balance_switch="micro@3"), ALONE)
    scopes = []
    for step in (0, 2, 3, 4):
        balance.begin(step, policy, [], 1)
        scopes.append(balance.scope)
    assert scopes == ["global", "global", "micro", "micro"]


# --- what is counted ---


def test_padding_and_the_ends_of_documents_are_not_counted():
    streams = ragged_streams()
    short = collate_rows(streams, [(0, 4)], CPU)
    padded = collate_rows(streams, [(0, 4), (1, 0)], CPU)  # the same row beside a longer one
    assert short.ids_BT.shape[1] < padded.ids_BT.shape[1]
    policy = moe.RoutedPolicy(small_model())
    found = []
    for batch in (short, padded):
        balance = Balance(policy, ["a", "b"], Config(**SMALL), ALONE)
        routing = balance.new_routing()
        balance.measure(policy, batch, routing)
        found.append(routing)
    assert torch.equal(found[0].counts_LME[:, 0], found[1].counts_LME[:, 0]) and found[0].counts_LME.sum() > 0
    for b, (domain, row) in enumerate([(0, 4), (1, 0)]):
        positions = streams[domain].row(row)[1]
        wanted = [bool(positions[s + 1] == positions[s] + 1) for s in range(len(positions) - 1)]
        assert padded.mask_BS[b].tolist() == wanted + [False] * (padded.mask_BS.shape[1] - len(wanted))
    nothing = collate_rows(streams, [], CPU)
    assert not nothing.mask_BS.any() and len(nothing.where_C) == 0


def test_packed_documents_do_not_see_each_other():
    model, streams = small_model(), ragged_streams()
    batch = collate_rows(streams, [(0, 0)], CPU)  # several documents
    ids, positions = streams[0].row(0)
    assert batch.positions_BT is not None and (positions == 0).sum() > 1
    logps_BS, _, ids_LNK = moe.RoutedPolicy(model)(batch)
    starts = [*np.flatnonzero(positions == 0), len(ids)]
    for start, end in zip(starts, starts[1:]):
        if end - start > 1:
            logits = model(torch.tensor([ids[start:end].tolist()])).logits[0].log_softmax(-1)
            wanted = logits[:-1].gather(1, torch.tensor(ids[start + 1 : end].tolist())[:, None])[:, 0]
            assert torch.allclose(logps_BS[0, start : end - 1], wanted, atol=1e-9)
    assert collate_rows(streams, [(1, 1)], CPU).positions_BT is None  # one document: no mask is needed


def test_evaluation_mixes_domains_in_a_forward_as_training_does(tmp_path, monkeypatch):
    """Else f of a forward would be one domain's, and eval/balance/micro another thing than balance/micro."""
    seen, collate = [], moe.collate_rows
    monkeypatch.setattr(moe, "collate_rows", lambda streams, picks, device: (
        seen.append(picks), collate(streams, picks, device))[1])
    config, streams = Config(**SMALL, per_device_train_batch_size=2), ragged_streams()
    policy = moe.RoutedPolicy(small_model())
    moe.evaluate_routing(tmp_path, 0, policy, Balance(policy, ["a", "b"], config, ALONE), streams, config, ALONE)
    assert all({domain for domain, _ in picks} == {0, 1} for picks in seen[:-1]) and len(seen) == 5
    everything = sorted((domain, row) for domain, stream in enumerate(streams) for row in range(len(stream)))
    assert sorted(pick for picks in seen for pick in picks) == everything


def test_measures_are_what_they_say():
    counts_LME = torch.tensor(
        [[[8.0, 0, 0, 0], [0, 6, 6, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [2, 2, 2, 2], [0, 0, 0, 0]]]
    )
    q = [[1, 0, 0, 0], [0, 0.5, 0.5, 0]]
    mean = np.mean(q, 0)
    entropy = lambda p: -sum(x * math.log(x) for x in p if x)  # noqa: E731
    assert moe.mutual_information(counts_LME).tolist() == pytest.approx(
        [entropy(mean) - np.mean([entropy(p) for p in q]), 0.0], abs=1e-6
    )
    assert moe.max_violation(counts_LME.sum(1)).tolist() == pytest.approx([0.6, 0.0])
    policy = moe.RoutedPolicy(small_model())
    numbers, _ = step_of(policy, ALONE, 1)
    assert all(layer.routed is None for layer in moe.moe_layers(policy.model))  # no graph is kept
    assert {"nll/a", "nll/b", "top_k_sum", "dead_experts", "time/rank_load", "max_violation_micro"} <= set(numbers)
    assert 2 / 6 < numbers["top_k_sum"] <= 1


def test_logged_numbers_are_those_of_a_loop_over_tokens():
    """Two forwards with padding, short documents and, of --balance_rows 3, a last group that is smaller or empty."""
    model, streams = small_model(), ragged_streams()
    config, policy = Config(**SMALL, balance_rows=3), moe.RoutedPolicy(model)
    balance = Balance(policy, ["a", "b"], config, ALONE)
    routing, tokens, groups = balance.new_routing(), [], []  # tokens: (layer, domain, probabilities, choices, logits)
    nll = {0: [], 1: []}
    for picks in (PICKS[:4], [*PICKS[4:7], (2, 0)]):
        batch = collate_rows([*streams, Stream("c", np.array([5, 1], np.int32), np.array([0, 0], np.int32), 16)], picks, CPU)
        balance.measure(policy, batch, routing)
        with torch.no_grad():
            logps_BS, logits_LNE, ids_LNK = policy(batch)
        S = batch.mask_BS.shape[1]
        for first in range(0, len(picks), 3):
            places = [n for n in batch.where_C.tolist() if first <= n // S < first + 3]
            if places:
                groups.append([np.bincount(ids_LNK[layer, places].flatten(), minlength=6) for layer in range(2)])
        for n in batch.where_C.tolist():
            nll[picks[n // S][0]].append(-float(logps_BS.flatten()[n]))
            tokens += [(layer, picks[n // S][0], logits_LNE[layer, n].softmax(-1), ids_LNK[layer, n].tolist(),
                        logits_LNE[layer, n]) for layer in range(2)]
    numbers = routing.metrics(["a", "b"])
    loads = np.zeros((2, 6))
    for layer, _, _, chosen_K, _ in tokens:
        loads[layer, chosen_K] += 1
    wanted = {"nll/a": np.mean(nll[0]), "nll/b": np.mean(nll[1]), "nll": np.mean(nll[0] + nll[1]),
              "max_violation": np.mean(loads.max(1) / loads.mean(1) - 1),
              "max_violation_micro": np.mean([counts.max() / counts.mean() - 1 for group in groups for counts in group]),
              "top_k_sum": np.mean([float(probs[chosen_K].sum()) for _, _, probs, chosen_K, _ in tokens]),
              "z_loss": np.mean([float(logits.logsumexp(0)) ** 2 for *_, logits in tokens]),
              "dead_experts": np.mean([load < 0.1 * layer.mean() for layer in loads for load in layer]),
              "time/rank_load": loads.max() / loads.mean()}
    assert {name: numbers[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert len(groups) == 3 and wanted["nll/a"] != pytest.approx(wanted["nll/b"], abs=1e-3)


def test_an_expert_is_dead_below_a_tenth_of_the_mean_load():
    routing = moe.Routing(2, 1, 4, CPU)
    routing.counts_LME += torch.tensor([[[100.0, 100, 9, 11]], [[50, 50, 50, 50]]])
    assert routing.metrics(["a"])["dead_experts"] == 0.0  # 5.5 is a tenth of the mean
    routing.counts_LME += torch.tensor([[[200.0, 200, 0, 0]], [[0, 0, 0, 0]]])  # 9 and 11 of a mean of 155
    assert routing.metrics(["a"])["dead_experts"] == 2 / 8


def test_counts_stay_exact_in_bfloat16():
    streams = [Stream("a", np.full(16 * 300, 7, dtype=np.int32), np.tile(np.arange(16, dtype=np.int32), 300), 16)]
    model = small_model(dtype=torch.float32)
    policy, config = moe.RoutedPolicy(model), Config(**SMALL, bf16=True, balance="micro")
    batch = collate_rows(streams, [(0, row) for row in range(300)], CPU)
    balance = Balance(policy, ["a"], config, ALONE)
    balance.begin(0, policy, [batch], 4500)
    moe.train_step(policy, torch.optim.SGD(policy.parameters(), lr=0.0), [batch], balance.loss_of, 0, config, ALONE)
    assert balance.routing.counts_LME.sum(-1).flatten().tolist() == [2 * 4500] * 2
    assert_close(balance.routing.prob_sums_LE.sum(-1)[0], 4500)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe.moe_layers(model)[0].gate(torch.ones(2, 24, dtype=torch.bfloat16)).dtype == torch.float32


# --- model ---


def test_layers_are_transformers_own_after_saving_odd_sizes(tmp_path):
    model = small_model(dtype=torch.float32, hidden_size=20, num_attention_heads=1, num_experts=7,
                        num_experts_per_tok=3, moe_intermediate_size=11, norm_topk_prob=False)
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    ids_BT = torch.randint(4, 90, (3, 12))
    assert_close(model(ids_BT).logits, theirs(ids_BT).logits)
    assert {n for n, _ in theirs.named_parameters()} == {n for n, _ in model.named_parameters()}
    again = moe.install_layers(AutoModelForCausalLM.from_pretrained(tmp_path), "softmax")
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)


def dense_model(**changes):
    shape = dict(vocab_size=99, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, eos_token_id=1, pad_token_id=0, **changes)
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**shape))


@pytest.mark.parametrize("tied", [False, True])
def test_upcycled_equals_dense(tied):
    dense = dense_model(tie_word_embeddings=tied)
    model = moe.install_layers(moe.upcycle(dense, Config(num_experts=5, num_experts_per_tok=3)), "softmax")
    ids_BT = torch.randint(4, 90, (3, 12))
    assert_close(model(ids_BT).logits, dense(ids_BT).logits)
    assert float(moe.moe_layers(model)[0].gate.weight.std()) > 0.01
    half = moe.upcycle(dense, Config(num_experts=5, reinit=0.5)).model.layers[1].mlp.experts
    old = dense.model.layers[1].mlp
    for expert in range(5):
        kept = (half.gate_up_proj[expert, :20] == old.gate_proj.weight).all(1)
        assert int(kept.sum()) == 10
        assert torch.equal(kept, (half.gate_up_proj[expert, 20:] == old.up_proj.weight).all(1))
        assert torch.equal(kept, (half.down_proj[expert] == old.down_proj.weight).all(0))
    with torch.no_grad():  # as a trained matrix may, these have a mean
        for weight, mean in ((old.gate_proj.weight, 0.1), (old.up_proj.weight, -0.2), (old.down_proj.weight, 0.3)):
            weight += mean
    new = moe.upcycle(dense, Config(num_experts=5, reinit=1.0)).model.layers[1].mlp.experts
    for drawn, weight in ((new.gate_up_proj[:, :20], old.gate_proj.weight),
                          (new.gate_up_proj[:, 20:], old.up_proj.weight), (new.down_proj, old.down_proj.weight)):
        assert float(drawn.std()) == pytest.approx(float(weight.std()), rel=0.1)
        assert float(drawn.mean()) == pytest.approx(float(weight.mean()), abs=0.002)
        assert not torch.equal(drawn[0], drawn[1])


def test_gradient_checkpointing_changes_nothing():
    plain, wanted = step_of(moe.RoutedPolicy(small_model().train()), ALONE, 2)
    model = small_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    numbers, changes = step_of(moe.RoutedPolicy(model), ALONE, 2)
    assert same(changes, wanted) and numbers == pytest.approx(plain)
    assert all(layer.routed is None for layer in moe.moe_layers(model))  # or the graph of what was recomputed stays


# --- data ---


def test_domains_and_weights():
    assert moe.parse_domains("a.txt=1.5, b=2") == {"a.txt": 1.5, "b": 2.0}
    assert len(moe.parse_domains("synthetic:64")) == 64
    for wrong in ("", "a=x", "a=1,b", "a=-1", "synthetic:x", "a=nan", "synthetic", "synthetic:65"):
        with pytest.raises(InputError, match="--domains"):
            moe.parse_domains(wrong)
    assert moe.mixture_weights([10, 30], "uniform", 100, 1).tolist() == [0.5, 0.5]
    assert moe.mixture_weights([10, 30], "proportional", 100, 1).tolist() == [0.25, 0.75]
    rows = 300 * moe.mixture_weights([100, 1000, 10], "unimax", 300, 4)
    assert rows.tolist() == pytest.approx([130, 130, 40])
    for budget in (300, 440):  # 440: all that four passes hold
        assert (budget * moe.mixture_weights([100, 10], "unimax", budget, 4) <= [400 + 1e-9, 40 + 1e-9]).all()
    with pytest.raises(InputError, match="^--unimax_epochs 4: the domains hold 110 rows, and the run draws 441;"):
        moe.mixture_weights([100, 10], "unimax", 441, 4)


def test_the_plan_repeats_and_passes_are_whole():
    plan = moe.plan_rows([4, 9], np.array([0.3, 0.7]), 400, seed=1)
    assert np.array_equal(plan, moe.plan_rows([4, 9], np.array([0.3, 0.7]), 400, seed=1))
    assert not np.array_equal(plan, moe.plan_rows([4, 9], np.array([0.3, 0.7]), 400, seed=2))
    for domain, size, share in ((0, 4, 0.3), (1, 9, 0.7)):
        rows = plan[plan[:, 0] == domain, 1]
        assert abs(len(rows) / 400 - share) < 0.08
        assert all(
            sorted(rows[start : start + size]) == list(range(size)) for start in range(0, len(rows) - size, size)
        )
        assert not np.array_equal(rows[:size], rows[size : 2 * size])  # each pass in a new order


def stream_of(name, split, n_rows, tokenizer, config):
    """The rows of a domain's split, as main makes them."""
    texts = moe.documents(name, split, n_rows * config.max_length, config)
    return moe.make_stream(name, texts, n_rows, tokenizer, config)


def test_streams_hold_documents_whole_and_splits_apart(tmp_path):
    tokenizer, config = char_tokenizer(), Config(max_length=64)
    for name in ("code", "docs", "chain", "synthetic:1"):
        stream = stream_of(name, "train", 6, tokenizer, config)
        assert len(stream) == 6 and len(stream.ids) == 6 * 64
        again = stream_of(name, "train", 6, tokenizer, config)
        assert np.array_equal(stream.ids, again.ids)
        held = stream_of(name, "validation", 6, tokenizer, config)
        assert all(stream.row(i)[1][0] == 0 for i in range(6))  # a row is read by itself, so positions begin anew
        rows = {tuple(stream.row(i)[0]) for i in range(6)}
        assert not rows & {tuple(held.row(i)[0]) for i in range(6)}
    ids, positions = stream_of("chain", "train", 6, tokenizer, config).row(0)
    texts = tokenizer.decode(ids.tolist()).split("<eos>")
    assert (
        len(texts) > 2
        and [len(text) + 1 for text in texts[:-1]] == np.diff(np.flatnonzero(positions == 0)).tolist()[: len(texts) - 1]
    )
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(9000)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(400)))
    (tmp_path / "c.jsonl").write_text('{"text": "fine"}\n{"words": "none"}\n')
    for name in ("a.txt", "b.jsonl"):
        splits = [set(moe.documents(str(tmp_path / name), split, 0, config)) for split in ("train", "validation")]
        assert splits[0] and splits[1] and not splits[0] & splits[1]
    with pytest.raises(InputError, match="c.jsonl: row 2"):
        stream_of(str(tmp_path / "c.jsonl"), "train", 6, tokenizer, config)
    pieces = moe.cut_text("12345\n" * 1000)
    assert "".join(pieces) == "12345\n" * 1000 and 40 < len(pieces) < 60 and all(p.endswith("\n") for p in pieces)


def test_no_row_has_one_token_alone():
    """A stream of 9 tokens in rows of 8 would end in a row of one token, and a forward of that row has no position."""
    for n_rows, length, lengths in ((0, 9, [8]), (3, 9, [8]), (0, 10, [8, 2]), (0, 3, [3])):
        texts = ["x" * (length - 1)]  # and the end-of-text token
        stream = moe.make_stream("any", texts, n_rows, char_tokenizer(), Config(max_length=8))
        assert [len(stream.row(i)[0]) for i in range(len(stream))] == lengths
        logps_BS = moe.RoutedPolicy(small_model())(collate_rows([stream], [(0, len(stream) - 1)], CPU))[0]
        assert logps_BS.shape == (1, lengths[-1] - 1)


def test_synthetic_languages_differ_and_follow_their_rule():
    config = Config(max_length=64)
    texts = [moe.synthetic_texts(domain, "train", 400, config) for domain in (0, 1)]
    for domain, found in enumerate(texts):
        assert {text[0] for text in found} == {chr(33 + domain)} and {len(text) for text in found} == {64}
        pairs = {}
        for text in found:
            for a, b in zip(text[1:], text[2:]):
                pairs.setdefault(a, []).append(b)
        assert max(len(set(after)) for after in pairs.values()) == 4
        after = max(pairs.values(), key=len)
        assert max(after.count(b) for b in set(after)) / len(after) == pytest.approx(0.55, abs=0.08)
    rate = -sum(p * math.log(p) for p in (0.55, 0.25, 0.15, 0.05))  # of every symbol but the first two
    assert f"{rate:.4f}" == "1.1097" and f"{(254 * rate + math.log(moe.N_SYMBOLS)) / 255:.4f}" == "1.1217"
    assert "1.1097" in moe.synthetic_texts.__doc__ and "1.1217 in rows of 256" in moe.synthetic_texts.__doc__
    assert not set(texts[0]) & set(moe.synthetic_texts(0, "validation", 400, config))


# --- runs ---

TINY_RUN = {**SMALL, "domains": "chain,synthetic:2", "max_length": 32, "n_train": 20, "n_eval": 2, "max_steps": 6,
            "per_device_train_batch_size": 8, "eval_steps": 3, "max_completion_length": 4, "save_steps": 0}


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr("eval.plot_runs", lambda runs, path: path.write_bytes(b""))


def test_a_run_learns_and_other_scripts_read_it(tmp_path, undrawn, monkeypatch, capsys):
    import sft

    run = tmp_path / "run"
    moe.main(Config(**TINY_RUN | dict(max_steps=30), learning_rate=1e-2, output_dir=str(run)))
    before, *lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert before["step"] == 0 and before["eval/nll"] > lines[-1]["eval/nll"]
    assert lines[1]["num_tokens"] > lines[0]["num_tokens"]
    assert lines[-1]["nll"] < 0.85 * lines[0]["nll"] and len(lines) == 30
    assert_close(lines[0]["loss"], lines[0]["nll"] + 0.01 * lines[0]["balance/global"] + 1e-3 * lines[0]["z_loss"])
    assert {"eval/nll", "eval/nll/chain", "eval/mutual_information", "eval/max_violation"} <= set(lines[-1])
    experts = json.loads((run / "experts.json").read_text())
    assert experts["domains"] == ["chain", "synthetic:0", "synthetic:1"] and np.array(experts["counts_LME"]).shape == (
        2,
        3,
        6,
    )
    assert (run / "experts.png").stat().st_size > 0 and not (run / "router.json").exists()
    assert len((run / "samples.jsonl").read_text().splitlines()) == 3 * 10
    model, tokenizer = load_model(str(run))
    found = ground.evaluate(model, tokenizer, ground.load_problems("chain", "test", 4), max_new_tokens=4,
                            temperature=0.0)
    assert 0 <= found["accuracy"] <= 1
    sft.main(sft.Config(model_name_or_path=str(run), output_dir=str(tmp_path / "sft"), max_steps=1, n_train=8,
                        per_device_train_batch_size=4, eval_steps=0, save_steps=0))
    assert (tmp_path / "sft" / "model.safetensors").exists()


def test_a_bias_is_saved_beside_and_its_absence_is_measured(tmp_path, undrawn, capsys):
    run = tmp_path / "run"
    moe.main(Config(**TINY_RUN, balance="bias", bias_rate=0.05, gate="sigmoid", output_dir=str(run)))
    router = json.loads((run / "router.json").read_text())
    assert (
        router["gate"] == "sigmoid"
        and router["without/logp_difference"] > 0
        and "router.json" in capsys.readouterr().out
    )
    model, tokenizer = moe.load_start(Config(model_name_or_path=str(run), gate="sigmoid"), None)
    assert moe.bias_of(model).tolist() == router["bias_LE"]
    copied = moe.load_start(Config(**SMALL, gate="sigmoid"), None)[0]  # what samples is the model with its bias
    policy = moe.RoutedPolicy(model)
    moe.refresh(copied, policy)
    assert torch.equal(moe.bias_of(copied), moe.bias_of(model)) and moe.bias_of(model).any()
    streams = [
        stream_of(name, "validation", 2, tokenizer, Config(**TINY_RUN))
        for name in ("chain", "synthetic:0", "synthetic:1")
    ]
    batch = collate_rows(streams, [(domain, 0) for domain in range(3)], CPU)
    whole = moe.RoutedPolicy(model)(batch)[0]
    plain = moe.RoutedPolicy(moe.install_layers(load_model(str(run))[0], "softmax"))(batch)[0]
    size = float(whole.abs().max())
    assert_close((plain - whole).abs().max(), router["without/logp_difference"], size)
    assert_close((whole - plain).sum() / batch.mask_BS.sum(), router["without/nll_difference"], size)
    (checkpoint,) = run.glob("checkpoints/step_*")
    again, _ = moe.load_start(Config(model_name_or_path=str(checkpoint), gate="sigmoid"), None)
    assert moe.bias_of(again).tolist() == router["bias_LE"]
    for folder in (run, checkpoint):
        with pytest.raises(InputError, match=f"--gate softmax: {folder} was trained with sigmoid"):
            moe.load_start(Config(model_name_or_path=str(folder)), None)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["router"] == {"gate": "sigmoid", "bias_LE": router["bias_LE"]} and np.array(router["bias_LE"]).any()
    (checkpoint / "state.json").write_text(json.dumps({"step": 6}))  # as another script has it
    assert moe.saved_router(checkpoint) == moe.saved_router(tmp_path) == {}
    (checkpoint / "state.json").write_text('{"step": ')
    with pytest.raises(InputError, match="^--model_name_or_path .*: its router.json or state.json is"):
        moe.saved_router(checkpoint)


def test_upcycling_a_folder_and_scratch(tmp_path, undrawn):
    dense_model().save_pretrained(tmp_path / "dense")
    char_tokenizer().save_pretrained(tmp_path / "dense")
    moe.main(Config(**TINY_RUN | dict(max_steps=1), upcycle=str(tmp_path / "dense"), output_dir=str(tmp_path / "up")))
    assert load_model(str(tmp_path / "up"))[0].config.num_experts == 6
    model, _ = moe.load_start(Config(model_name_or_path=str(tmp_path / "up"), from_scratch=True), None)
    assert model.config.num_experts == 6 and model.config.hidden_size == 24
    with pytest.raises(InputError, match="--upcycle"):
        moe.load_start(Config(upcycle=str(tmp_path / "up")), None)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "up")
    for template in ("auto", "off"):
        flags = Config(model_name_or_path=str(tmp_path / "up"), from_scratch=True, chat_template=template)
        assert (moe.load_start(flags, None)[1].chat_template is None) == (template == "off")
    with pytest.raises(InputError, match="^--model_name_or_path no/such/model: [^\n]*$"):
        moe.load_start(Config(model_name_or_path="no/such/model", from_scratch=True), None)
    with pytest.raises(InputError, match="not a Qwen3-MoE"):
        moe.load_start(Config(model_name_or_path=str(tmp_path / "dense")), None)


@pytest.mark.parametrize(
    "flags, named",
    [(dict(balance="all"), "--balance all"), (dict(gate="relu"), "--gate relu"),
     (dict(mixture="mine"), "--mixture mine"), (dict(bias_rule="up"), "--bias_rule up"),
     (dict(num_experts_per_tok=9, num_experts=8), "--num_experts_per_tok 9"),
     (dict(num_experts_per_tok=1), "--num_experts_per_tok 1"), (dict(hidden_size=90), "--hidden_size 90"),
     (dict(balance_switch="micro"), "--balance_switch micro"), (dict(balance_coef=-1.0), "--balance_coef -1.0"),
     (dict(domains="nowhere.jsonl"), "nowhere.jsonl"), (dict(domains="chain=0"), "--domains chain=0"),
     (dict(from_scratch=True), "--from_scratch"), (dict(upcycle="tiny", norm_topk_prob=False), "--upcycle"),
     (dict(reinit=0.5), "--reinit 0.5"),
     (dict(upcycle="owner/dense", model_name_or_path="owner/moe"), "--model_name_or_path owner/moe"),
     (dict(model_name_or_path="no/such/model"), "--model_name_or_path no/such/model"),
     (dict(max_length=1), "--max_length 1"), (dict(balance_coef=float("nan")), "--balance_coef nan")],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, flags, named):
    with pytest.raises(InputError) as caught:
        moe.main(Config(**{"output_dir": str(tmp_path / "run"), "n_train": 2, **flags}))
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_read_is_never_deleted(tmp_path):
    """--overwrite in a folder with the dense model or the data in it is refused, and nothing is gone afterwards."""
    for folder in ("run/dense", "run/set/data", "apart/data"):
        (tmp_path / folder).mkdir(parents=True)
    run, apart, data = tmp_path / "run", tmp_path / "apart", tmp_path / "run" / "data.jsonl"
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(400))
    for file in (data, run / "set" / "data" / "train.jsonl", apart / "data" / "train.jsonl"):
        file.write_text(rows)
    (run / "args.json").write_text("{}")
    (apart / "data" / "args.json").write_text("{}")
    dense_model().save_pretrained(run / "dense")
    char_tokenizer().save_pretrained(run / "dense")
    before = sorted(tmp_path.rglob("*"))
    tries = [(run / "dense", dict(upcycle=str(run / "dense")), "--upcycle .* is in it"),
             (run, dict(upcycle=str(run / "dense")), "--upcycle .* is in it"),
             (run, dict(domains=f"chain,{data}"), "--overwrite would delete data of --domains .*data.jsonl"),
             (run, dict(domains=f"{run}/*.jsonl"), "--overwrite would delete"),
             (run, dict(domains=str(run / "set")), "--overwrite would delete"),
             (apart / "data", dict(domains=str(apart)), "--overwrite would delete")]
    for output_dir, flags, message in tries:
        with pytest.raises(InputError, match=f"^--output_dir [^\n]*{message}[^\n]*$"):
            moe.main(Config(**{**TINY_RUN, **flags}, output_dir=str(output_dir), overwrite=True))
        assert sorted(tmp_path.rglob("*")) == before
    moe.check_sources(Config(output_dir=str(tmp_path / "other"), domains=f"chain,{data}", overwrite=True))
    moe.check_sources(Config(output_dir=str(run), domains=f"chain,{data}"))


@pytest.mark.parametrize("flags, refused", [
    (dict(balance="global"), True), (dict(balance="micro"), True), (dict(balance="sync"), True),
    (dict(balance="shuffle"), True), (dict(balance="exact"), False), (dict(balance="bias"), False),
    (dict(balance="exact", micro_fraction=0.01), True), (dict(balance="bias", micro_fraction=0.01), True),
    (dict(balance="none"), False), (dict(balance="none", micro_fraction=0.01), True),
    (dict(balance="none", balance_switch="micro@5"), True),
])
def test_a_balance_by_micro_batches_is_not_continued_with_others(tmp_path, flags, refused):
    first = Config(output_dir=str(tmp_path), micro_batch_tokens=512, **flags)
    before = {"flags": vars(first)}
    moe.check_micro_batches(first, before)
    other = Config(output_dir=str(tmp_path), micro_batch_tokens=256, **flags)
    moe.check_micro_batches(other, {"flags": vars(other)})  # a new run
    with pytest.raises(InputError, match="--micro_batch_tokens 256: .* has 512") if refused else nullcontext():
        moe.check_micro_batches(other, before)
