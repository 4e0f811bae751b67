"""kernels.py against float64, closed forms and itself.

Every test runs with the plain PyTorch versions here and, in a process of its own, with the Triton kernels interpreted
(last test). Blocks are made small so that a vocabulary of 33 takes several steps of a kernel's loop.
"""

import doctest
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.gradcheck import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]
import kernels  # noqa: E402
from bench_kernels import dense_kl, dense_logps, dense_moe  # noqa: E402
from kernels import linear_kl, linear_logps, linear_topk, moe_experts, sharded_mask, topk_kl  # noqa: E402
from rounding import assert_close, rounding  # noqa: E402

torch.set_num_threads(1)
TRITON = kernels.KERNELS == "triton"
KINDS = ("forward", "reverse", "jsd")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "row_launch", lambda width: (16, 4))
    monkeypatch.setattr(kernels, "CACHE_ELEMENTS", 100)


def leaf(*shape, scale=1.0, dtype=torch.float64, grad=True):
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_(grad)


def head(N=9, V=33, D=4, dtype=torch.float64):
    return leaf(N, D, dtype=dtype), leaf(V, D, dtype=dtype), torch.randint(V, (N,))


def experts(N=6, D=4, E=5, K=2, I=3, dtype=torch.float64):
    """x, ids (the last expert empty), weights, gate_up, down."""
    ids = torch.stack([torch.randperm(max(E - 1, K))[:K] for _ in range(N)])
    weights = torch.rand(N, K, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    return leaf(N, D, dtype=dtype), ids, weights, leaf(E, 2 * I, D, dtype=dtype), leaf(E, D, I, dtype=dtype)


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def gradients(outputs, leaves):
    """Gradients under upstream gradients of both signs."""
    outputs = [y for y in outputs if y is not None]
    upstream = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y) for y in outputs]
    return torch.autograd.grad(outputs, leaves, upstream)


def check_gradient(function, inputs):
    """gradcheck, along random directions where the kernels are interpreted: every number would take minutes."""
    return gradcheck(function, inputs, fast_mode=TRITON)


# --- linear_logps ---


@pytest.mark.parametrize("N,V,D", [(5, 7, 3), (1, 1, 1), (9, 33, 4), (3, 16, 5)])
@pytest.mark.parametrize("workspace_mb", [None, 2e-3])  # one chunk, and a few rows each
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logps_and_entropy_match_float64_and_gradcheck(N, V, D, workspace_mb, softcap):
    hidden, weight, targets = head(N, V, D)
    targets[-1] = V - 1
    outputs = linear_logps(hidden, weight, targets, 0.7, softcap=softcap, workspace_mb=workspace_mb)
    for actual, expected in zip(outputs, dense_logps(hidden, weight, targets, 0.7, softcap)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert check_gradient(lambda h, w: linear_logps(h, w, targets, 0.7, softcap=softcap, workspace_mb=workspace_mb),
                     (hidden, weight))


def test_gradient_flows_through_each_output_alone():
    hidden, weight, targets = head()
    assert check_gradient(lambda h, w: linear_logps(h, w, targets)[0], (hidden, weight))
    assert check_gradient(lambda h, w: linear_logps(h, w, targets)[1], (hidden, weight))
    assert check_gradient(lambda h, w: linear_logps(h, w, targets, entropy=False)[0], (hidden, weight))


def test_without_entropy_the_logps_are_the_same():
    hidden, weight, targets = head()
    logps, entropy = linear_logps(hidden, weight, targets, 0.7, entropy=False)
    assert entropy is None
    torch.testing.assert_close(logps, linear_logps(hidden, weight, targets, 0.7)[0], rtol=0, atol=0)


def test_many_targets_a_row_with_duplicates_and_ignored_ones():
    hidden, weight, _ = head()
    targets = torch.randint(33, (9, 3))
    targets[2, 1] = targets[2, 0]
    targets[4, 0] = targets[5, 2] = -100
    logps, entropy = linear_logps(hidden, weight, targets)
    for k in range(3):
        one, same_entropy = linear_logps(hidden, weight, targets[:, k])
        torch.testing.assert_close(logps[:, k], one)
        torch.testing.assert_close(entropy, same_entropy)
    assert check_gradient(lambda h, w: linear_logps(h, w, targets), (hidden, weight))


def test_ignored_targets_are_zero_and_send_no_gradient():
    hidden, weight, targets = head()
    targets[3] = -100
    logps, entropy = linear_logps(hidden, weight, targets)
    assert logps[3] == 0 and entropy[3] > 0
    assert check_gradient(lambda h, w: linear_logps(h, w, targets), (hidden, weight))
    assert logps.sum().backward() is None and (hidden.grad[3] == 0).all() and (hidden.grad[2] != 0).all()
    logps, _ = linear_logps(hidden, weight, torch.full((9,), 7), ignore_index=7)
    assert (logps == 0).all() and all((g == 0).all() for g in torch.autograd.grad(logps.sum(), (hidden, weight)))


def test_no_rows_give_an_empty_result_and_zero_gradients():
    hidden, weight, targets = leaf(0, 4), leaf(33, 4), torch.zeros(0, dtype=torch.long)
    outputs = [*linear_logps(hidden, weight, targets), linear_kl(hidden, weight, leaf(0, 5), leaf(33, 5))]
    assert [y.shape for y in outputs] == [(0,)] * 3
    for gradient, like in zip(gradients(outputs, (hidden, weight)), (hidden, weight)):
        assert gradient.shape == like.shape and (gradient == 0).all()


def test_strided_inputs():
    hidden, weight, targets = leaf(4, 18)[:, ::2].T, leaf(4, 33).T, torch.randint(33, (18,))[::2]
    for actual, expected in zip(linear_logps(hidden, weight, targets), dense_logps(hidden, weight, targets)):
        torch.testing.assert_close(actual, expected)


def test_equals_pytorchs_cross_entropy():
    hidden, weight, targets = head()
    logps, _ = linear_logps(hidden, weight, targets)
    torch.testing.assert_close(-logps, F.cross_entropy(hidden @ weight.T, targets, reduction="none"))
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13, not 2.11
        torch.testing.assert_close(-logps, F.linear_cross_entropy(hidden, weight, targets, reduction="none"))


@pytest.mark.parametrize("operation", ["logps", "forward", "reverse", "jsd"])
def test_chunks_change_nothing_and_rows_are_independent(operation):
    hidden, weight, targets = head(dtype=torch.float32)
    teacher = leaf(9, 5, dtype=torch.float32), leaf(33, 5, dtype=torch.float32)

    def run(rows, workspace_mb):
        if operation == "logps":
            return linear_logps(hidden[rows], weight, targets[rows], workspace_mb=workspace_mb)[0]
        return linear_kl(hidden[rows], weight, teacher[0][rows], teacher[1], kind=operation, workspace_mb=workspace_mb)

    everything, order = torch.arange(9), torch.randperm(9)
    whole = run(everything, None)
    for chunked in (run(everything, 0), run(everything, 1e-3)):
        assert_close(chunked, whole)
        for a, b in zip(gradients([chunked], (hidden, weight)), gradients([whole], (hidden, weight))):
            assert_close(a, b)
        whole = run(everything, None)  # the graph is gone after a backward pass
    assert_close(run(order, None), whole[order])


def test_a_second_backward_pass_gives_the_same_gradient():
    hidden, weight, targets = head()
    total = sum(y.sum() for y in linear_logps(hidden, weight, targets, workspace_mb=1e-3))
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)  # uses up the logits still held
    for a, b in zip(first, torch.autograd.grad(total, (hidden, weight))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_fp32_results(dtype):
    hidden, weight, targets = head(20, 150, 16, dtype)
    outputs = linear_logps(hidden, weight, targets, workspace_mb=0.01)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = dense_logps(h, w, targets)
    for actual, reference in zip(outputs, expected):
        assert actual.dtype == torch.float32
        assert_close(actual, reference)
    for actual, reference in zip(gradients(outputs, (hidden, weight)), gradients(expected, (h, w))):
        assert actual.dtype == dtype and relative(actual, reference) < 5e-3  # one rounding of the result


@pytest.mark.parametrize("autocast", [True, False])
def test_fp32_master_weight_under_bf16_hidden_states(autocast):
    """Operands are rounded to bf16; logits and the weight's gradient are not."""
    hidden, weight, targets = head(20, 150, 16, torch.float32)
    hidden = hidden if autocast else hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = linear_logps(hidden, weight, targets, workspace_mb=0.01)
        d_hidden, d_weight = gradients(outputs, (hidden, weight))  # inside, where a stray cast would show
    h, w = (x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight))
    expected = dense_logps(h, w, targets)
    assert_close(outputs[0], expected[0])
    assert outputs[0].dtype == outputs[1].dtype == d_weight.dtype == torch.float32 and d_hidden.dtype == hidden.dtype
    exact_d_hidden, exact_d_weight = gradients(expected, (h, w))
    assert_close(d_weight, exact_d_weight)
    assert relative(d_hidden, exact_d_hidden) < 5e-3


def test_frozen_inputs_cost_no_product_and_no_grad_keeps_nothing(monkeypatch):
    hidden, weight, targets = head()
    products, product = [], kernels.product
    monkeypatch.setattr(kernels, "product", lambda *args, **kwargs: (products.append(1), product(*args, **kwargs)))
    for frozen, expected in (((), 3), ((weight,), 2), ((hidden,), 2)):  # one forward, then one for each gradient
        products.clear()
        for x in (hidden, weight):
            x.requires_grad_(not any(x is y for y in frozen))
        linear_logps(hidden, weight, targets)[0].sum().backward()
        assert len(products) == expected
    with torch.no_grad():
        assert linear_logps(hidden, weight, targets)[0].grad_fn is None


def count_tensors(shape):
    gc.collect()
    return sum(1 for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == shape)


def test_a_loss_kept_for_logging_does_not_keep_the_logits():
    hidden, weight, targets = head(13, 37, 4)
    loss = linear_logps(hidden, weight, targets)[0].sum()
    assert count_tensors((13, 37)) > 0  # the workspace, until backward
    loss.backward()
    assert count_tensors((13, 37)) == 0 and loss.requires_grad


class Largest(TorchDispatchMode):
    """The most bytes any tensor made inside has."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def test_no_tensor_has_tokens_times_vocabulary_elements():
    hidden, weight, targets = head(24, 100, 3, torch.float32)
    teacher = leaf(24, 3, dtype=torch.float32), leaf(100, 3, dtype=torch.float32)
    workspace_mb = 8 * 100 * 4 / 2**20  # eight rows of logits
    with Largest() as largest:
        outputs = linear_logps(hidden, weight, targets, softcap=5.0, workspace_mb=workspace_mb)
        outputs += (linear_kl(hidden, weight, *teacher, kind="jsd", workspace_mb=workspace_mb),)
        gradients(outputs, (hidden, weight))
        linear_topk(hidden, weight, 5, workspace_mb=workspace_mb)
    assert largest.bytes <= 8 * 100 * 4
    with Largest() as largest:
        dense_logps(hidden, weight, targets)
    assert largest.bytes == 24 * 100 * 4  # the instrument sees what it should


# --- rows of logits: extremes, poison, guard bands ---


@pytest.mark.parametrize("broken", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_makes_its_rows_divergence_and_gradient_nan(kind, broken):
    hidden, weight, _ = head()
    teacher = leaf(9, 5, grad=False), leaf(33, 5, grad=False)
    with torch.no_grad():
        (hidden if broken == "student" else teacher[0])[4, 1] = torch.nan
    loss = linear_kl(hidden, weight, *teacher, kind=kind)
    assert loss.isnan().nonzero().tolist() == [[4]]
    d_hidden, _ = gradients([loss], (hidden, weight))
    assert d_hidden.isnan().all(1).nonzero().tolist() == [[4]]


def test_one_nan_among_a_rows_logits_is_not_lost():
    """In every kind of input of every row operation, at the first and at a later step of a kernel's loop."""
    z, t, targets, dz = torch.randn(4, 50), torch.randn(4, 50), torch.tensor([5, 5, 5, 5]), torch.empty(4, 50)
    z[1, 7] = z[2, 40] = torch.nan
    logps, entropy = (x.flatten() for x in stats(z, targets))
    assert logps.isnan().tolist() == entropy.isnan().tolist() == [False, True, True, False]
    assert logit_gradient(z, targets, torch.ones(4), torch.ones(4)).isnan().any(1).tolist() == logps.isnan().tolist()
    kl, kl_grad = (getattr(kernels, name + ("triton" if TRITON else "torch")) for name in ("kl_", "kl_grad_"))
    for kind in KINDS:
        for student, teacher in ((z, t), (t, z)):
            results = kl(student, teacher, kind, 0.5)
            kl_grad(student.clone(), teacher, results, (torch.ones(4), None, None, None), dz, kind, 0.5)
            assert results[0].isnan().tolist() == dz.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("entropy", [True, False])
def test_a_nan_makes_its_rows_logps_nan(entropy):
    hidden, weight, targets = head()
    with torch.no_grad():
        hidden[4, 1] = torch.nan
    for output in linear_logps(hidden, weight, targets, entropy=entropy)[: 1 + entropy]:
        assert output.isnan().nonzero().tolist() == [[4]]


def stats(z, targets, gain=None):
    function = kernels.logps_triton if TRITON else kernels.logps_torch
    return function(z, targets[:, None], gain, True)[:2]


def logit_gradient(z, targets, g_logps, g_entropy):
    functions = (kernels.logps_triton, kernels.logps_grad_triton) if TRITON else (kernels.logps_torch,
                                                                                 kernels.logps_grad_torch)
    results, dz = functions[0](z, targets[:, None], None, True), torch.empty_like(z)
    functions[1](z, targets[:, None], results, (g_logps[:, None], g_entropy, None), dz, None)
    return dz


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype):
    V, targets = 50, torch.tensor([3, 3, 49, 0, 20, 3])
    z = torch.randn(6, V, dtype=dtype)
    z[0, 3] = 1e4  # certainty
    z[1] = 5.0  # ignorance
    z[2, :40] = -torch.inf  # a masked vocabulary, whole blocks of it
    z[3] *= 100
    z[4] *= 0.01
    z[5] -= 1e4  # far from zero
    logps, entropy = (x.flatten() for x in stats(z, targets))
    logp = z.double().log_softmax(-1)
    torch.testing.assert_close(logps.double(), logp.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(entropy.double(), torch.special.entr(logp.exp()).sum(-1), rtol=1e-5, atol=1e-5)
    assert logps[0] == 0 and entropy[0] == 0 and entropy[1].item() == pytest.approx(math.log(V))
    assert (entropy >= 0).all() and (entropy <= math.log(V) + 1e-5).all()
    dz = logit_gradient(z, targets, torch.linspace(-1, 2, 6, dtype=dtype), torch.linspace(2, -1, 6, dtype=dtype))
    assert dz.isfinite().all() and (dz[2, :40] == 0).all()
    torch.testing.assert_close(dz.sum(-1), torch.zeros(6, dtype=dtype), rtol=0, atol=1e-3)  # no row's sum can change


def test_a_constant_added_to_a_row_changes_nothing():
    z, targets = torch.randn(5, 50), torch.randint(50, (5,))
    for shifted, plain in zip(stats(z + 100, targets), stats(z, targets)):
        torch.testing.assert_close(shifted, plain, rtol=0, atol=3e-5)


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(temperature):
    hidden, weight, targets = head(dtype=torch.float32)
    logps, entropy = linear_logps(hidden, weight, targets, temperature)
    expected = dense_logps(hidden.double(), weight.double(), targets, temperature)
    torch.testing.assert_close(logps.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1].nan_to_num(), rtol=1e-4, atol=1e-5)


def everything(dtype=torch.float32):
    """Outputs and gradients of every operation."""
    torch.manual_seed(1)
    hidden, weight, targets = head(dtype=dtype)
    teacher = leaf(9, 5, dtype=dtype, grad=False), leaf(33, 5, dtype=dtype, grad=False)
    outputs = [*linear_logps(hidden, weight, targets, softcap=3.0, workspace_mb=1e-3)]
    outputs += [linear_kl(hidden, weight, *teacher, kind=kind, workspace_mb=1e-3) for kind in KINDS]
    tensors = [*outputs, *gradients(outputs, (hidden, weight)), *linear_topk(hidden, weight, 4, workspace_mb=1e-3)]
    for moe_dtype in (dtype, torch.bfloat16):  # with D, I multiples of 8 both take PyTorch's grouped product
        inputs = experts(D=8, I=8, dtype=moe_dtype)
        output = moe_experts(*inputs)
        tensors += [output, *gradients([output], [x for x in inputs if x.requires_grad])]
    return tensors


def test_uninitialised_memory_never_shows():
    """torch.empty filled with NaN gives the same bits as whatever it holds otherwise."""
    plain = everything()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()  # the poison works
        poisoned = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(poisoned, plain, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_gradients_stay_inside_their_rows_and_columns():
    """Guard bands: logits read and gradients written as the middle of larger tensors. What stands between V and the
    stride is a row's own padding, NaN in the logits: the Triton kernels may write there, the others do not."""
    N, V, targets = 5, 37, torch.randint(37, (5, 1))
    z, t, dz = (torch.full((N + 4, V + 11), torch.nan) for _ in range(3))
    z[2:-2, :V], t[2:-2, :V] = torch.randn(N, V), torch.randn(N, V)
    dz.fill_(777.0)
    inner, inner_t, inner_dz = z[2:-2, :V], t[2:-2, :V], dz[2:-2, :V]
    logps, logps_grad, kl, kl_grad = (getattr(kernels, name + ("triton" if TRITON else "torch")) for name in
                                      ("logps_", "logps_grad_", "kl_", "kl_grad_"))
    ones, outside = torch.ones(N), torch.ones_like(dz, dtype=torch.bool)
    outside[2:-2, : None if TRITON else V] = False
    results = logps(inner, targets, 2.0, True)
    logps_grad(inner, targets, results, (ones[:, None], ones, None), inner_dz, 2.0)
    assert (dz[outside] == 777).all() and (inner_dz != 777).all() and inner_dz.isfinite().all()
    for kind in KINDS:
        dz.fill_(777.0)
        kl_grad(inner, inner_t, kl(inner, inner_t, kind, 0.3), (ones, None, None, None), inner_dz, kind, 0.3)
        assert (dz[outside] == 777).all() and (inner_dz != 777).all() and inner_dz.isfinite().all()


@pytest.mark.skipif(not TRITON, reason="calls the kernels themselves")
def test_kernels_write_their_outputs_and_nothing_beside_them():
    N, V, D = 5, 37, 19

    def guarded(*shape, dtype=torch.float32):
        whole = torch.full((math.prod(shape) + 64,), 777, dtype=dtype)
        return whole, whole[32:-32].view(shape)

    def check(*pairs):
        for whole, inner in pairs:
            assert (whole[:32] == 777).all() and (whole[-32:] == 777).all() and (inner != 777).all()

    z, targets = torch.randn(N, V), torch.randint(V, (N, 2))
    logps, entropy, lse, dz = guarded(N, 2), guarded(N), guarded(N), guarded(N, V)
    kernels.launch_rows(kernels.logps_kernel, N, V, z, V, targets, logps[1], entropy[1], lse[1], 2, None)
    kernels.launch_rows(kernels.logps_grad_kernel, N, V, z, V, targets, entropy[1], lse[1], torch.ones(N, 2),
                        torch.ones(N), dz[1], V, 2, None)
    check(logps, entropy, lse, dz)
    outputs = [guarded(N) for _ in range(4)]
    kernels.launch_rows(kernels.kl_kernel, N, V, z, V, z + 1, V, *(inner for _, inner in outputs), "jsd", 0.5)
    check(*outputs)
    gate_up, w, h, out = torch.randn(N, 2 * D), torch.rand(N), guarded(N, D), guarded(2, D)
    d_gate_up, d_w = guarded(N, 2 * D), guarded(N)
    kernels.launch_rows(kernels.swiglu_kernel, N, D, gate_up, w, h[1])
    kernels.launch_rows(kernels.swiglu_grad_kernel, N, D, gate_up, w, torch.randn(N, D), d_gate_up[1], d_w[1])
    kernels.launch_rows(kernels.gather_sum_kernel, 2, D, h[1], torch.tensor([[0, 3], [4, 1]]), out[1], 2)
    check(h, d_gate_up, d_w, out)


# --- divergences ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workspace_mb", [None, 2e-3])
def test_divergences_match_float64_and_gradcheck(kind, workspace_mb):
    hidden, weight, _ = head()
    teacher = leaf(9, 6, grad=False), leaf(33, 6, grad=False)
    actual = linear_kl(hidden, weight, *teacher, kind=kind, beta=0.3, temperature=0.7, workspace_mb=workspace_mb)
    expected = dense_kl(hidden / 0.7, weight, teacher[0] / 0.7, teacher[1], kind, 0.3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert check_gradient(lambda h, w: linear_kl(h, w, *teacher, kind=kind, beta=0.3, temperature=0.7,
                                            workspace_mb=workspace_mb), (hidden, weight))


def test_divergences_mean_what_their_names_say():
    hidden, weight, _ = head()
    teacher = leaf(9, 6), leaf(33, 6)
    forward, reverse, jsd = (linear_kl(hidden, weight, *teacher, kind=kind) for kind in KINDS)
    s, t = (hidden @ weight.T).log_softmax(-1), (teacher[0] @ teacher[1].T).log_softmax(-1)
    torch.testing.assert_close(forward, F.kl_div(s, t, log_target=True, reduction="none").sum(-1))
    torch.testing.assert_close(reverse, F.kl_div(t, s, log_target=True, reduction="none").sum(-1))
    assert (forward > 0).all() and (reverse > 0).all() and (jsd > 0).all() and (jsd < math.log(2)).all()
    torch.testing.assert_close(jsd, linear_kl(*teacher, hidden, weight, kind="jsd"))  # symmetric at beta 1/2
    for kind in KINDS:
        same = linear_kl(hidden, weight, hidden, weight, kind=kind)
        torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)
    (jsd.sum() + forward.sum() + reverse.sum()).backward()
    assert teacher[0].grad is None and teacher[1].grad is None  # the teacher does not learn
    with pytest.raises(ValueError, match="forward, reverse or jsd"):
        linear_kl(hidden, weight, *teacher, kind="fkl")
    with pytest.raises(ValueError, match="33 tokens against the teacher's 32"):
        linear_kl(hidden, weight, teacher[0], teacher[1][:32])


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_with_forbidden_tokens_is_finite(kind):
    s, t, dz = torch.randn(3, 50), torch.randn(3, 50), torch.empty(3, 50)
    t[:, :20] = -torch.inf
    s[:, 10:18] = -torch.inf  # and tokens both forbid
    kl, kl_grad = (getattr(kernels, name + ("triton" if TRITON else "torch")) for name in ("kl_", "kl_grad_"))
    results = kl(s, t, kind, 0.5)
    kl_grad(s, t, results, (torch.ones(3), None, None, None), dz, kind, 0.5)
    assert results[0].isfinite().all() and dz.isfinite().all() and (dz[:, 10:18] == 0).all()


def test_topk_holds_the_likeliest_tokens_and_the_mass_of_the_rest():
    hidden, weight, _ = head()
    logps, ids, tail = linear_topk(hidden, weight, 4, 0.7, workspace_mb=2e-3)
    logp = (hidden @ weight.T / 0.7).log_softmax(-1)
    expected, expected_ids = logp.topk(4, -1)
    assert torch.equal(ids, expected_ids) and not logps.requires_grad
    torch.testing.assert_close(logps, expected.detach())
    torch.testing.assert_close(logps.exp().sum(-1) + tail.exp(), torch.ones(9, dtype=torch.float64))


def test_topk_kl_grows_to_the_full_divergence_and_trains_the_student():
    hidden, weight, _ = head()
    teacher = leaf(9, 6, grad=False), leaf(33, 6, grad=False)
    full = linear_kl(hidden, weight, *teacher)
    before = torch.zeros_like(full)
    for k in (1, 4, 16, 32):
        logps, ids, tail = linear_topk(*teacher, k)
        now = topk_kl(linear_logps(hidden, weight, ids, entropy=False)[0], logps, tail)
        assert (now >= before - 1e-12).all() and (now <= full + 1e-12).all()
        before = now
    torch.testing.assert_close(now, full)  # 32 of 33 tokens, and the tail is the 33rd
    logps, ids, tail = linear_topk(*teacher, 33)  # no tail: its mass is 0
    torch.testing.assert_close(topk_kl(linear_logps(hidden, weight, ids, entropy=False)[0], logps, tail), full)
    logps, ids, tail = linear_topk(*teacher, 4)
    assert check_gradient(lambda h, w: topk_kl(linear_logps(h, w, ids)[0], logps, tail), (hidden, weight))


# --- experts ---


@pytest.mark.parametrize("options", [{}, {"K": 1}, {"E": 2, "K": 2}, {"N": 1}, {"N": 3, "D": 18, "I": 17}])
def test_experts_match_the_dense_sum_and_gradcheck(options):
    inputs = experts(**options)
    actual, expected = moe_experts(*inputs), dense_moe(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    leaves = [x for x in inputs if x.requires_grad]
    for a, b in zip(gradients([actual], leaves), gradients([expected], leaves)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert TRITON or gradcheck(moe_experts, inputs)


def test_one_expert_for_all_tokens_and_none():
    x, ids, weights, gate_up, down = experts(K=1)
    ids = torch.full_like(ids, 2)
    output = moe_experts(x, ids, weights, gate_up, down)
    torch.testing.assert_close(output, dense_moe(x, ids, weights, gate_up, down), rtol=0, atol=1e-12)
    d_gate_up, d_down = gradients([output], (gate_up, down))
    assert (d_gate_up[[0, 1, 3, 4]] == 0).all() and (d_down[[0, 1, 3, 4]] == 0).all() and (d_down[2] != 0).any()
    empty = moe_experts(x[:0], ids[:0], weights[:0], gate_up, down)
    assert empty.shape == (0, 4) and all((g == 0).all() for g in gradients([empty], (x, weights, gate_up, down)))


def test_order_of_tokens_and_of_choices_does_not_matter():
    x, ids, weights, gate_up, down = experts(dtype=torch.float32)
    output, order = moe_experts(x, ids, weights, gate_up, down), torch.randperm(len(x))
    assert_close(moe_experts(x[order], ids[order], weights[order], gate_up, down), output[order])
    assert_close(moe_experts(x, ids.flip(1), weights.flip(1), gate_up, down), output)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float32, rounding(1.0))])
@pytest.mark.parametrize("D,I,grouped", [(16, 8, True), (10, 6, False)])
def test_the_grouped_product_serves_where_rows_are_aligned(D, I, grouped, dtype, tolerance, monkeypatch):
    calls, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: (calls.append(1), grouped_mm(*args, **kwargs))[1])
    inputs = experts(N=20, D=D, I=I, dtype=dtype)
    output = moe_experts(*inputs)
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    expected = dense_moe(*exact)
    assert bool(calls) == grouped and output.dtype == dtype and relative(output, expected) < tolerance
    leaves = [[x for x in group if x.requires_grad] for group in (inputs, exact)]
    for actual, reference in zip(gradients([output], leaves[0]), gradients([expected], leaves[1])):
        assert relative(actual, reference) < tolerance


class Filling(torch.autograd.Function):
    """The weight as it is; its gradient is NaN for the groups that have no rows."""

    @staticmethod
    def forward(ctx, weight, ends):
        ctx.empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, g):
        return g.masked_fill(ctx.empty[:, None, None], torch.nan), None


def test_a_grouped_product_that_fills_empty_groups_is_masked(monkeypatch):
    """Blackwell's does; its place is taken by one that makes their gradient NaN."""
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: grouped_mm(x, Filling.apply(w, offs), offs=offs))
    monkeypatch.setattr(kernels, "fills_empty_groups", lambda device: True)
    inputs = experts(D=8, I=8, dtype=torch.float32)
    output, leaves = moe_experts(*inputs), inputs[3:]
    for actual, reference in zip(gradients([output], leaves), gradients([dense_moe(*inputs)], leaves)):
        assert (actual[-1] == 0).all()
        assert_close(actual, reference)


def test_experts_under_autocast_keep_fp32_masters():
    inputs = experts(D=8, I=8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = moe_experts(*inputs)
    assert output.dtype == torch.bfloat16 and relative(output, dense_moe(*inputs)) < 3e-2
    assert all(g.dtype == torch.float32 for g in gradients([output], [x for x in inputs if x.requires_grad]))


# --- attention ---


@pytest.mark.parametrize("n_heads,n_kv_heads,stride,local_blocks", [(4, 4, 4, 1), (4, 2, 3, 2), (4, 2, 4, 1), (2, 1, 5, 1)])
def test_sharded_mask_is_exactly_the_pattern(n_heads, n_kv_heads, stride, local_blocks):
    T, block, documents = 40, 4, torch.tensor([[0] * 13 + [1] * 27, [0] * 40])
    mask = sharded_mask(n_heads, n_kv_heads, stride, local_blocks, block, documents)
    grid = torch.meshgrid(torch.arange(2), torch.arange(n_heads), torch.arange(T), torch.arange(T), indexing="ij")
    expected = torch.zeros(2, n_heads, T, T, dtype=torch.bool)
    for b in range(2):
        for h in range(n_heads):
            kv_head = h * n_kv_heads // n_heads
            for q in range(T):
                for k in range(q + 1):
                    local = q // block - k // block < local_blocks
                    shard = (k // block + kv_head * max(1, stride // n_kv_heads)) % stride == 0
                    expected[b, h, q, k] = (local or shard) and documents[b, q] == documents[b, k]
    assert torch.equal(mask(*grid), expected)
    if n_kv_heads >= stride:  # the heads together see everything
        one_document = sharded_mask(n_heads, n_kv_heads, stride, local_blocks, block)(*grid)[0].any(0)
        assert torch.equal(one_document, torch.ones(T, T, dtype=torch.bool).tril())


@pytest.mark.skipif(TRITON, reason="no kernel of ours")
def test_flex_attention_with_the_mask_equals_dense_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, n_heads, n_kv_heads, T, D = 2, 4, 2, 256, 16
    documents = (torch.arange(T) >= torch.tensor([[100], [180]])).long()
    mask = sharded_mask(n_heads, n_kv_heads, 2, 1, 32, documents)
    q, k, v = (torch.randn(B, heads, T, D) for heads in (n_heads, n_kv_heads, n_kv_heads))
    blocks = create_block_mask(mask, B, n_heads, T, T, device="cpu", BLOCK_SIZE=32)
    grid = torch.meshgrid(torch.arange(B), torch.arange(n_heads), torch.arange(T), torch.arange(T), indexing="ij")
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(*grid), enable_gqa=True)
    assert_close(flex_attention(q, k, v, block_mask=blocks, enable_gqa=True), dense)
    assert blocks.sparsity() > 50  # blocks are skipped, not only masked


# --- the file itself ---


def run(arguments, **environment):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def test_docstrings_tell_the_truth():
    assert doctest.testmod(kernels).failed == 0


@pytest.mark.skipif(TRITON, reason="starts its own processes")
def test_script_checks_itself_and_the_switch_is_checked():
    result = run(["kernels.py"])
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.returncode == 0 and len(rows) == 18 and all(row["ok"] for row in rows), result.stdout + result.stderr
    wrong = run(["kernels.py"], KERNELS="cuda")
    assert wrong.returncode == 2 and "auto, torch, triton" in wrong.stderr


@pytest.mark.skipif(TRITON, reason="starts its own processes")
@pytest.mark.parametrize("script", ["kernels.py", "tests/bench/bench_kernels.py"])
def test_help_is_the_docstring_and_no_other_flag_is_taken(script):
    result = run([script, "--help"])
    assert result.returncode == 0 and "one JSON line a row" in " ".join(result.stdout.split()) and not result.stderr
    wrong = run([script, "--foo"])
    assert wrong.returncode == 2 and wrong.stderr == f"{Path(script).name}: unrecognized arguments: --foo\n"


@pytest.mark.skipif(TRITON, reason="this is that process")
def test_triton_kernels_interpreted_pass_all_of_this():
    pytest.importorskip("triton", reason="no Triton for this system")
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = run(arguments, TRITON_INTERPRET="1", KERNELS="triton")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
