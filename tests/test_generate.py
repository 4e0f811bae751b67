"""eval.generate: the same tokens as transformers' own generate, and each row a function of its own random numbers."""
import copy

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

import eval as ground
from eval import char_tokenizer, draw_tokens, encode_prompt, generate, load_model
from rounding import assert_close

SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=1,
             tie_word_embeddings=False)
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "olmo2": {}, "gemma": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
PROMPTS = ["37+5-8=", "1+2=", "99+99-3+4+7+2=", "7-7=", "12*3="]


def family(name, std=0.3):
    """A random model of the family, its weights large enough that its words vary."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name]}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


@pytest.fixture(scope="module")
def qwen():
    return family("qwen3")


def encoded(tokenizer, texts=PROMPTS):
    return [encode_prompt(tokenizer, text) for text in texts]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_transformers_on_left_padded_prompts(name, tokenizer):
    model, prompts = family(name), encoded(tokenizer)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)[:, width:]
    ours = generate(model, tokenizer, prompts, max_new_tokens=24, temperature=0)
    assert len({tuple(row.tolist()) for row in ours.tokens_RT}) > 1  # the rows do say different things
    for row, length in enumerate(ours.lengths_R):
        assert ours.tokens_RT[row, :length].tolist() == theirs[row, :length].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_logps_equal_recomputed_ones(name, tokenizer):
    model, prompts = family(name, std=0.1), encoded(tokenizer)
    out = generate(model, tokenizer, prompts, n=3, max_new_tokens=20, temperature=0.7, seed=3)
    for row in range(len(out.lengths_R)):
        prompt, ids = prompts[row // 3], out.ids(row)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.7
        again = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert_close(out.logps_RT[row, : len(ids)], again)


def test_a_row_does_not_depend_on_its_neighbours(qwen, tokenizer):
    prompts = encoded(tokenizer)
    whole = generate(qwen, tokenizer, prompts, n=4, max_new_tokens=30, seed=5)
    for batch_size in (1, 8):
        parts = generate(qwen, tokenizer, prompts, n=4, max_new_tokens=30, seed=5, batch_size=batch_size)
        assert [parts.ids(r) for r in range(20)] == [whole.ids(r) for r in range(20)]
    some = generate(qwen, tokenizer, [prompts[3], prompts[1]], n=4, max_new_tokens=30, seed=5, keys=[3, 1])
    assert [some.ids(r) for r in range(8)] == [whole.ids(r) for r in (12, 13, 14, 15, 4, 5, 6, 7)]
    uneven = generate(qwen, tokenizer, prompts, n=[0, 2, 0, 4, 1], max_new_tokens=30, seed=5, batch_size=4)
    assert [uneven.ids(r) for r in range(7)] == [whole.ids(r) for r in (4, 5, 12, 13, 14, 15, 16)]
    assert len(generate(qwen, tokenizer, prompts[:2], n=[0, 0]).lengths_R) == 0
    fewer = generate(qwen, tokenizer, prompts, n=2, max_new_tokens=30, seed=5)
    assert [fewer.ids(2 * p + j) for p in range(5) for j in range(2)] == [whole.ids(4 * p + j) for p in range(5) for j in range(2)]
    assert len({tuple(whole.ids(r)) for r in range(4)}) == 4  # samples of one prompt differ
    other = generate(qwen, tokenizer, prompts, n=4, max_new_tokens=30, seed=6)
    assert [other.ids(r) for r in range(20)] != [whole.ids(r) for r in range(20)]


def test_no_more_than_batch_size_rows_are_decoded_at_once(qwen, tokenizer, monkeypatch):
    """Many samples of one prompt are split too: what fits in memory is what the flag says, and nothing else changes."""
    prompts, sizes, decode = encoded(tokenizer), [], ground.decode_batch
    monkeypatch.setattr(ground, "decode_batch", lambda *args: sizes.append(len(args[3])) or decode(*args))
    whole = generate(qwen, tokenizer, prompts[:2], n=[7, 2], max_new_tokens=20, seed=5)
    parts = generate(qwen, tokenizer, prompts[:2], n=[7, 2], max_new_tokens=20, seed=5, batch_size=3)
    assert sizes == [9, 2, 3, 3, 1]  # the shorter prompt first
    assert [parts.ids(r) for r in range(9)] == [whole.ids(r) for r in range(9)]
    assert torch.equal(parts.lengths_R, whole.lengths_R) and torch.equal(parts.finished_R, whole.finished_R)


def test_shared_prefill_and_compaction_change_nothing(qwen, tokenizer, monkeypatch):
    """Every row decoded alone, by a loop over the whole sequence without any cache, from the same numbers."""
    prompts = encoded(tokenizer)
    ours = generate(qwen, tokenizer, prompts, n=2, max_new_tokens=12, seed=[7, 1])
    ended = 0
    for row in range(10):
        ids, uniforms = list(prompts[row // 2]), np.random.default_rng([7, 1, row // 2, row % 2]).random(12)
        for t in range(12):
            with torch.no_grad():
                probs = qwen(torch.tensor([ids]), use_cache=False).logits[0, -1].double().softmax(-1)
            ids.append(int((probs.cumsum(0) <= uniforms[t]).sum()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert ours.ids(row) == ids[len(prompts[row // 2]) :]
        assert bool(ours.finished_R[row]) == (ids[-1] == tokenizer.eos_token_id)
        ended += bool(ours.finished_R[row])
    assert 0 < ended < 10  # some rows left the batch early, some did not


def test_frequencies_match_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    n, temperature = 40_000, 0.8
    uniforms = torch.from_numpy(np.random.default_rng(0).random(n))
    tokens, logps = draw_tokens(logits.expand(n, -1), uniforms, temperature, 1.0, 0)
    expected = (logits[0] / temperature).softmax(-1) * n
    counts = torch.bincount(tokens, minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 23.5  # chi-square, 4 degrees of freedom, p = 1e-4
    assert_close(logps, (logits[0] / temperature).log_softmax(-1)[tokens])


def test_top_p_and_top_k_keep_the_right_tokens_in_proportion():
    logits = torch.tensor([[0.15, 0.4, 0.05, 0.3, 0.1]]).log()
    uniforms = torch.linspace(0, 1 - 1e-9, 3001, dtype=torch.float64)
    def kept(top_p, top_k):
        tokens, _ = draw_tokens(logits.expand(3001, -1), uniforms, 1.0, top_p, top_k)
        return torch.bincount(tokens, minlength=5) / 3001
    assert torch.allclose(kept(0.6, 0), torch.tensor([0, 4 / 7, 0, 3 / 7, 0]), atol=1e-3)  # .4 + .3 crosses .6
    assert torch.allclose(kept(1.0, 3), torch.tensor([15, 40, 0, 30, 0]) / 85, atol=1e-3)
    assert torch.allclose(kept(0.01, 0), torch.tensor([0, 1.0, 0, 0, 0]))  # the likeliest always stays
    assert torch.allclose(kept(1.0, 0), logits.exp()[0], atol=1e-3)


def test_the_largest_uniform_number_draws_a_possible_token():
    logits = torch.full((2, 50_000), -40.0)
    logits[:, 7] = 0.0
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0, 5)
    assert tokens.tolist()[1] == 7


def test_lengths_stop_tokens_and_texts(qwen, tokenizer):
    out = generate(qwen, tokenizer, encoded(tokenizer), n=8, max_new_tokens=40, seed=1)
    for row, text in enumerate(out.texts(tokenizer)):
        ids = out.ids(row)
        assert tokenizer.eos_token_id not in ids[:-1]
        assert (ids[-1] == tokenizer.eos_token_id) == bool(out.finished_R[row])
        assert bool(out.finished_R[row]) or len(ids) == 40
        assert text == tokenizer.decode(ids[:-1] if out.finished_R[row] else ids)
    assert out.finished_R.any() and not out.finished_R.all()


def test_every_configured_stop_token_stops(qwen, tokenizer):
    model = copy.deepcopy(qwen)
    digits = tokenizer("0123456789").input_ids
    model.generation_config.eos_token_id = digits
    out = generate(model, tokenizer, encoded(tokenizer), n=4, max_new_tokens=200, seed=1)
    assert out.finished_R.all()
    assert all(out.ids(row)[-1] in [*digits, tokenizer.eos_token_id] for row in range(20))


def test_the_end_of_a_turn_and_of_the_text_stop_whatever_is_configured(qwen):
    model, tokenizer = copy.deepcopy(qwen), char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<unk>{% endfor %}"
    for configured in (None, 7, [7, 9]):
        model.generation_config.eos_token_id = configured
        wanted = {tokenizer.eos_token_id, tokenizer.unk_token_id} | set(np.atleast_1d(configured or []).tolist())
        assert ground.stop_ids(model, tokenizer) == sorted(wanted)


def test_one_bos_at_most_stands_before_a_prompt():
    tokenizer = char_tokenizer()
    plain = tokenizer("1+1=").input_ids
    tokenizer.bos_token, bos = "<unk>", tokenizer.unk_token_id
    assert encode_prompt(tokenizer, "1+1=") == plain  # as Qwen's: it has one and adds none
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", bos)])
    for text in ("1+1=", "<unk>1+1="):
        assert encode_prompt(tokenizer, text) == [bos, *plain]
    for begin in ("", "<unk>"):  # a chat has what its template writes
        tokenizer.chat_template = begin + "{% for m in messages %}{{ m.content }}{% endfor %}"
        assert encode_prompt(tokenizer, "1+1=") == [bos] * (begin != "") + plain


def test_dropout_is_for_training_alone(tokenizer):
    model, _ = load_model("tiny")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    prompts, found = encoded(tokenizer), []
    for mode in (True, False):
        model.train(mode)
        found.append(generate(model, tokenizer, prompts, n=2, max_new_tokens=8).logps_RT)
        assert model.training is mode
    assert torch.equal(*found)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_capped_head_is_known(tmp_path, cap):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gemma2", **{**SIZES, **FAMILIES["gemma2"], "final_logit_softcapping": cap}))
    torch.nn.init.normal_(model.model.norm.weight, std=3.0)  # logits so large that a cap shows
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    assert ground.softcap(load_model(str(tmp_path))[0]) == cap


def test_nothing_given_is_changed_and_nothing_leaks(tokenizer):
    model, _ = load_model("tiny")
    model.train()
    before, prompts = copy.deepcopy(model.state_dict()), encoded(tokenizer)
    given = copy.deepcopy(prompts)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = generate(model, tokenizer, prompts, n=2, max_new_tokens=8)
    assert model.training and prompts == given and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for _ in range(3):
        again = generate(model, tokenizer, prompts, n=2, max_new_tokens=8)
    assert torch.equal(first.tokens_RT, again.tokens_RT) and torch.equal(first.logps_RT, again.logps_RT)
    assert generate(model, tokenizer, [], n=2).tokens_RT.shape[0] == 0


def test_a_head_with_a_bias_is_refused(tmp_path):
    config = AutoConfig.for_model("phi", **{k: v for k, v in SIZES.items() if k != "head_dim"})
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ground.InputError, match="--model_name_or_path .*head"):
        load_model(str(tmp_path))
