"""Generation: the cache changes no token, whatever the model; filters, modes; speculation."""

import importlib.util
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.bigram import BigramLanguageModel, sample
from transformer_course.block import BlockConfig, make_blocks, run_blocks
from transformer_course.cache import KVCache, LayerCache
from transformer_course.generation import (
    block_size_of,
    evaluating,
    filter_logits,
    generate,
    generate_many,
    grown_context,
    last_logits,
    next_token,
    stream,
    token_probs,
)
from transformer_course.gpt import GPT, GPTConfig, POSITIONS
from transformer_course.multihead import padding_mask
from transformer_course.speculative import RewindingModel, accept_or_redraw, speculative
import transformer_course.speculative as speculation

V, BLOCK = 13, 10
thorough = settings(deadline=None, derandomize=True, max_examples=40)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def shaken(config, seed):
    "A GPT in evaluation mode whose every part has an effect; fresh weights would repeat one token."
    g = rng(seed)
    model = GPT(config, g).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return model


@st.composite
def models(draw):
    config = GPTConfig(
        block_size=BLOCK,
        vocab_size=V,
        n_layer=draw(st.integers(1, 3)),
        n_head=4,
        n_embd=16,
        tie_weights=False,
        position=draw(st.sampled_from(POSITIONS)),
        window=draw(st.sampled_from((None, 1, 3, 9, 50))),
        n_kv_head=draw(st.sampled_from((None, 1, 2))),
        norm=draw(st.sampled_from(('layer', 'plain', 'rms'))),
        norm_first=draw(st.booleans()),
        embed_norm=draw(st.sampled_from(('none', 'plain', 'layer', 'rms'))),
        qk_norm=draw(st.booleans()),
        smear=draw(st.booleans()),
        bias=draw(st.booleans()),
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(('gelu_tanh', 'relu2'))),
    )
    return shaken(config, draw(st.integers(0, 1000)))


def small_gpt(seed=0, **more):
    return shaken(
        GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=4, n_embd=16, **more), seed
    )


how = st.sampled_from(
    (dict(temperature=0), dict(), dict(temperature=0.7, top_k=4), dict(top_p=0.8))
)


@thorough
@given(models(), st.integers(1, 3), st.integers(1, 2 * BLOCK), how, st.integers(0, 1000))
def test_cached_equals_uncached(model, B, T, how, seed):
    "Token for token; prompts shorter and longer than the block, always generated beyond it."
    idx = torch.randint(V, (B, T), generator=rng(seed))
    a, b = (
        generate(model, idx, 2 * BLOCK, use_cache=use_cache, generator=rng(seed), **how)
        for use_cache in (True, False)
    )
    assert a.shape == (B, T + 2 * BLOCK) and torch.equal(a, b) and torch.equal(a[:, :T], idx)


# ------------------------------------------------- an oracle: the same model, by loops, in numpy


def normalised(x, kind, weights, name):
    "One vector through a norm of this kind."
    if kind == 'none':
        return x
    if kind == 'rms':
        return x / np.sqrt((x**2).mean() + 1e-5) * weights[f'{name}.weight']
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    if kind == 'plain':
        return x
    return x * weights[f'{name}.weight'] + weights.get(f'{name}.bias', 0)


def linear(x, weights, name):
    return weights[f'{name}.weight'] @ x + weights.get(f'{name}.bias', 0)


def turned(x, position, base=10000.0):
    "Each pair of channels (i, i + D/2) turned by its angle."
    half, out = len(x) // 2, x.copy()
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        a, b = x[i], x[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def embedded(ids, config, weights):
    "The vectors that enter the first block."
    C, raw = config.n_embd, []
    for t, token in enumerate(ids):
        x = weights['transformer.wte.weight'][token].copy()
        if config.position == 'learned':
            x += weights['transformer.wpe.weight'][t]
        if config.position == 'sinusoidal':
            for i in range(0, C, 2):
                angle = t * 10000.0 ** (-i / C)
                x[i] += math.sin(angle)
                x[i + 1] += math.cos(angle)
        raw.append(x)
    if config.smear:
        raw = [x + weights['smear'] * (raw[t - 1] if t else 0) for t, x in enumerate(raw)]
    return [normalised(x, config.embed_norm, weights, 'embed_norm') for x in raw]


def attended(xs, config, weights, name):
    "What attention makes of each vector: loops over tokens, heads and earlier tokens."
    H, Hk = config.n_head, config.n_kv_head or config.n_head
    D = config.n_embd // H
    heads = []
    for t, x in enumerate(xs):
        rows = linear(x, weights, f'{name}.c_attn').reshape(H + 2 * Hk, D)
        for h in range(H + Hk):  # queries, then keys
            if config.qk_norm:
                rows[h] = normalised(rows[h], 'plain', weights, '')
            if config.position == 'rotary':
                rows[h] = turned(rows[h], t)
        heads.append(rows)
    out = []
    for t in range(len(xs)):
        mixed = []
        for h in range(H):
            key, seen, scores = H + h // (H // Hk), [], []
            for s in range(t + 1):
                if config.window is not None and t - s >= config.window:
                    continue
                score = heads[t][h] @ heads[s][key] / math.sqrt(D) * config.attn_scale
                if config.position == 'alibi':
                    score -= 2.0 ** (-8 * (h + 1) / H) * (t - s)
                seen.append(heads[s][key + Hk])
                scores.append(score)
            share = np.exp(np.array(scores) - max(scores))
            mixed.append((share / share.sum()) @ np.array(seen))
        out.append(linear(np.concatenate(mixed), weights, f'{name}.c_proj'))
    return out


def activated(x, config, weights, name):
    "The MLP on one vector."

    def bend(z):
        if config.activation == 'relu2':
            return np.maximum(z, 0) ** 2
        return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    h = linear(x, weights, f'{name}.c_fc')
    h = bend(linear(x, weights, f'{name}.c_gate')) * h if config.gated else bend(h)
    return linear(h, weights, f'{name}.c_proj')


def oracle(model, ids):
    "The logits after the last of `ids`, from the weights and the config alone, in float64."
    c = model.config
    weights = {name: w.double().numpy() for name, w in model.state_dict().items()}
    xs = embedded(ids, c, weights)
    for layer in range(c.n_layer):
        at = f'transformer.h.{layer}'
        first = [normalised(x, c.norm, weights, f'{at}.ln_1') if c.norm_first else x for x in xs]
        xs = [x + a for x, a in zip(xs, attended(first, c, weights, f'{at}.attn'))]
        for t, x in enumerate(xs):
            if c.norm_first:
                y = normalised(x, c.norm, weights, f'{at}.ln_2')
                xs[t] = x + activated(y, c, weights, f'{at}.mlp')
            else:
                x = normalised(x, c.norm, weights, f'{at}.ln_1')
                x = x + activated(x, c, weights, f'{at}.mlp')
                xs[t] = normalised(x, c.norm, weights, f'{at}.ln_2')
    last = normalised(xs[-1], c.norm, weights, 'transformer.ln_f') if c.norm_first else xs[-1]
    return linear(last, weights, 'lm_head')


@settings(thorough, max_examples=25)
@given(models(), st.integers(1, BLOCK + 2), st.integers(0, 1000), st.booleans())
def test_greedy_text_is_what_the_oracle_says(model, T, seed, use_cache):
    "Each token is the likeliest after the last `BLOCK` tokens, also past the block size."
    idx = torch.randint(V, (1, T), generator=rng(seed))
    text = generate(model, idx, BLOCK + 3, temperature=0, use_cache=use_cache)[0].tolist()
    for t in range(T, len(text)):
        logits = oracle(model, text[max(0, t - BLOCK) : t])
        assert logits[text[t]] > logits.max() - 1e-3, f'token {t} of {text}'


@settings(thorough, max_examples=25)
@given(models(), st.integers(1, BLOCK - 1), st.integers(0, 1000))
def test_logits_of_single_tokens_behind_a_prompt_are_the_oracles(model, T, seed):
    idx = torch.randint(V, (1, BLOCK), generator=rng(seed))
    cache = model.make_cache(BLOCK)
    for t in range(T, BLOCK + 1):
        with torch.no_grad():
            found = last_logits(model, idx[:, :t], cache)[0]
        expected = torch.tensor(oracle(model, idx[0, :t].tolist()))
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)
        assert cache.length == t


# ------------------------------------------------- reading in pieces, stopping, filters


@thorough
@given(
    models(),
    st.lists(st.integers(1, 5), min_size=2, max_size=8).filter(lambda pieces: sum(pieces) <= BLOCK),
    st.integers(0, 1000),
)
def test_a_prompt_may_be_read_in_any_pieces(model, pieces, seed):
    idx = torch.randint(V, (2, sum(pieces)), generator=rng(seed))
    cache = KVCache(model.config.n_layer)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(pieces, 1)], 1)
        torch.testing.assert_close(logits, model(idx)[0], atol=1e-4, rtol=1e-4)
    assert cache.length == sum(pieces)


@thorough
@given(models(), st.integers(1, BLOCK))
def test_uncached_generation_is_the_loop_of_chapter_01(model, T):
    idx = torch.randint(V, (2, T), generator=rng())
    assert torch.equal(
        generate(model, idx, 15, use_cache=False, generator=rng(1)),
        sample(model, idx, 15, BLOCK, rng(1)),
    )


def test_the_texts_under_test_vary():
    "The tests above would pass on models that repeat one token; these do not."
    texts = [
        generate(
            small_gpt(seed, tie_weights=False), torch.zeros(1, 1).long(), 30, generator=rng(seed)
        )
        for seed in range(5)
    ]
    assert min(len(set(text[0].tolist())) for text in texts) >= 5


@thorough
@given(models(), st.integers(0, V - 1), st.integers(0, 1000))
def test_stopping_only_cuts(model, stop, seed):
    "Up to its stop token a row is what it would have been without; after it comes nothing else."
    idx = torch.randint(V, (3, 2), generator=rng(seed))
    free = generate(model, idx, 20, generator=rng(seed))[:, 2:]
    stopped = generate(model, idx, 20, stop=stop, generator=rng(seed))[:, 2:]
    ends = [(row == stop).nonzero().flatten().tolist()[:1] for row in free]
    assert stopped.shape[1] == (max(end[0] + 1 for end in ends) if all(ends) else 20)
    for row, whole, end in zip(stopped, free, ends):
        n = end[0] + 1 if end else 20
        assert torch.equal(row[:n], whole[:n]) and (row[n:] == stop).all()


logit_rows = st.tuples(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.1, 5)).map(
    lambda t: t[2] * torch.randn(3, t[1], generator=rng(t[0]), dtype=torch.float64)
)


@thorough
@given(logit_rows, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_are_enough(logits, top_p):
    probs, kept = logits.softmax(-1), filter_logits(logits, top_p=top_p).isfinite()
    mass = (probs * kept).sum(-1)
    least = probs.masked_fill(~kept, 2).amin(-1)
    assert (mass >= top_p - 1e-9).all() and (mass - least < top_p + 1e-9).all()
    assert (least >= probs.masked_fill(kept, -1).amax(-1)).all() and kept.gather(
        -1, logits.argmax(-1, keepdim=True)
    ).all()


@thorough
@given(logit_rows, st.integers(1, 50))
def test_top_k_keeps_the_k_best(logits, top_k):
    kept = filter_logits(logits, top_k=top_k).isfinite()
    assert (kept.sum(-1) == min(top_k, logits.shape[-1])).all()
    assert all(
        set(row.topk(min(top_k, len(row))).indices.tolist()) == set(k.nonzero().flatten().tolist())
        for row, k in zip(logits, kept)
    )


@pytest.mark.skipif(
    not importlib.util.find_spec('transformers'),
    reason='the reference implementation is not installed: pip install transformers',
)
@pytest.mark.parametrize('seed', range(5))
def test_filters_equal_hugging_face(seed):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from transformers.generation.logits_process import (
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )
    logits = 3 * torch.randn(
        1000, 50, generator=rng(seed), dtype=torch.float64
    )  # the two add up in opposite directions: no rounding at the edge
    for temperature in (0.5, 1.0, 2.0):
        for k in (1, 5, 20, 50):
            for p in (0.05, 0.5, 0.9, 0.999):
                expected = TopPLogitsWarper(p)(
                    None,
                    TopKLogitsWarper(k)(None, TemperatureLogitsWarper(temperature)(None, logits)),
                )
                assert torch.equal(filter_logits(logits / temperature, k, p), expected)


def test_the_token_that_crosses_is_kept():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    for top_p, n in ((0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert filter_logits(logits, top_p=top_p).isfinite().tolist() == [True] * n + [False] * (
            4 - n
        )


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = next_token(p.log().expand(20_000, 4), generator=rng())
    assert (torch.bincount(drawn[:, 0], minlength=4) / 20_000 - p).abs().max() < 0.015


def test_same_seed_same_text_and_the_global_state_is_left_alone():
    model, idx, state = (small_gpt(), torch.zeros(2, 1).long(), torch.get_rng_state())
    a, b, c = (generate(model, idx, 20, generator=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('training', (True, False))
def test_dropout_is_off_and_the_mode_is_put_back(training):
    model = small_gpt(dropout=0.5, attn_dropout=0.5, tie_weights=False).train(training)
    if training:
        model.transformer.h[1].eval()  # a frozen part stays frozen
    modes = [m.training for m in model.modules()]
    idx = torch.zeros(1, 4).long()
    for run in (
        lambda: last_logits(model, idx),
        lambda: generate(model, idx, 15, temperature=0),
        lambda: generate_many(model, [idx[0], idx[0, :2]], 9, temperature=0)[1],
        lambda: speculative(model, model, idx, 6, generator=rng())[0],
    ):
        assert torch.equal(run(), run())
        assert [m.training for m in model.modules()] == modes
    for run in (generate, speculative):
        wrong = (idx + V, 1) if run is generate else (model, idx + V, 1)
        with pytest.raises(ValueError):
            run(model, *wrong)
        assert [m.training for m in model.modules()] == modes
    with evaluating(model):
        assert not any(m.training for m in model.modules())


def test_stream_yields_what_generate_collects_and_keeps_no_graph():
    model, idx = small_gpt(), torch.zeros(2, 3).long()
    tokens = stream(model, idx, 15, generator=rng(3))
    first = next(tokens)
    assert first.shape == (2, 1) and torch.is_grad_enabled()
    assert torch.equal(
        torch.cat([idx, first, *tokens], 1), generate(model, idx, 15, generator=rng(3))
    )
    assert not next(stream(model, idx, 1)).requires_grad


def test_any_model_with_the_contract_will_do():
    counter = BigramLanguageModel(10)
    counter.table.weight.data = 100 * torch.eye(10).roll(1, dims=1)
    assert generate(counter, torch.tensor([[3], [8]]), 9, stop=9).tolist() == [
        [3, 4, 5, 6, 7, 8, 9],
        [8, 9, 9, 9, 9, 9, 9],
    ]


@pytest.mark.parametrize(
    'bad, words',
    [
        (dict(temperature=-1), 'temperature=-1'),
        (dict(temperature=float('nan')), 'temperature=nan'),
        (dict(top_k=0), 'top_k=0'),
        (dict(top_p=0), 'top_p=0'),
        (dict(top_p=1.1), 'top_p=1.1'),
    ],
)
def test_bad_settings_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        generate(BigramLanguageModel(5), torch.zeros(1, 1).long(), 3, **bad)


@pytest.mark.parametrize('idx', (torch.zeros(1, 0).long(), torch.zeros(3).long()))
def test_bad_prompts_are_named(idx):
    with pytest.raises(ValueError, match='at least one token'):
        generate(BigramLanguageModel(5), idx, 3)
    with pytest.raises(ValueError, match='max_new_tokens=-1'):
        generate(BigramLanguageModel(5), torch.zeros(1, 1).long(), -1)


def test_a_stop_may_be_the_first_new_token():
    counter = BigramLanguageModel(V)
    counter.table.weight.data = 100 * torch.eye(V).roll(1, dims=1)  # counts up
    assert generate(counter, torch.tensor([[7, 8]]), 5, stop=9).tolist() == [[7, 8, 9]]
    texts = generate_many(counter, [torch.tensor([8]), torch.tensor([9, 9, 8])], 5, stop=9)
    assert [t.tolist() for t in texts] == [[8, 9], [9, 9, 8, 9]]
    assert len(list(stream(counter, torch.tensor([[8]]), 1))) == 1


# ------------------------------------------------- models with a memory, with masks, with less


class Translator(nn.Module):
    "A small decoder with cross-attention; `config` and `make_cache` are what it says of itself."

    def __init__(self, seed, block_size=None, cached=False, position=False):
        super().__init__()
        torch.manual_seed(seed)
        how = BlockConfig(n_layer=2, n_head=2, n_embd=16, dropout=0.3)
        self.wte, self.wpe = nn.Embedding(V, 16), nn.Embedding(50, 16)
        self.blocks, self.head = make_blocks(how, cross=True), nn.Linear(16, V)
        if block_size:
            self.config = SimpleNamespace(block_size=block_size)
        if cached:
            self.make_cache = lambda room: KVCache(2, room)
        for p in self.parameters():
            p.data += 0.3 * torch.randn(p.shape)

    def forward(
        self, idx, targets=None, *, memory, memory_mask=None, mask=None, cache=None, last_only=False
    ):
        start = 0 if cache is None else cache.length
        x = self.wte(idx) + self.wpe.weight[start : start + idx.shape[1]]
        x = run_blocks(self.blocks, x, memory, memory_mask=memory_mask, mask=mask, cache=cache)
        return self.head(x[:, -1:] if last_only else x), None


MEMORY = 3 * torch.randn(3, 5, 16, generator=rng(5))


@pytest.mark.parametrize('block_size', (None, 6))
def test_a_decoder_with_a_memory_writes_the_same_with_and_without_a_cache(block_size):
    plain, cached = (Translator(0, block_size, cached) for cached in (False, True))
    seen = padding_mask([5, 2, 3], 5)
    idx, context = torch.tensor([[1], [2], [3]]), dict(memory=MEMORY, memory_mask=seen)
    plain.train()
    a = generate(plain, idx, 20, temperature=0, context=context)
    b = generate(cached, idx, 20, temperature=0, context=context)
    assert torch.equal(a, b) and plain.training
    assert block_size_of(plain) == block_size
    for row, n in enumerate((5, 2, 3)):  # alone, its memory cut where the mask ends
        alone = dict(memory=MEMORY[row : row + 1, :n])
        text = generate(cached, idx[row : row + 1], 20, temperature=0, context=alone)
        assert torch.equal(text, a[row : row + 1])
    other = generate(cached, idx, 20, temperature=0, context=dict(memory=MEMORY.flip(0)))
    assert not torch.equal(a, other)


@pytest.mark.parametrize('cached', (False, True))
def test_unequal_prompts_have_each_its_memory(cached):
    model = Translator(1, 30, cached).eval()
    prompts = [torch.tensor([1]), torch.tensor([4, 5, 6]), torch.tensor([2, 3])]
    texts = generate_many(model, prompts, 9, temperature=0, context=dict(memory=MEMORY))
    for row, (prompt, text) in enumerate(zip(prompts, texts)):
        alone = dict(memory=MEMORY[row : row + 1])
        assert torch.equal(text, generate(model, prompt[None], 9, temperature=0, context=alone)[0])


def test_a_model_that_needs_a_memory_says_so():
    with pytest.raises((TypeError, ValueError), match='memory'):
        generate(Translator(0), torch.zeros(1, 1).long(), 3)


@thorough
@given(models(), st.integers(2, BLOCK), st.integers(0, 1000))
def test_a_mask_hides_tokens_of_the_prompt(model, T, seed):
    "With a cache and without, past the block size too, each token is the one under the whole mask."
    idx = torch.randint(V, (2, T), generator=rng(seed))
    mask = torch.rand(2, 1, 1, T, generator=rng(seed)) < 0.6
    context = dict(mask=mask | (torch.arange(T) == 0))
    a, b = (
        generate(model, idx, BLOCK, temperature=0, context=context, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(a, b)
    whole = torch.cat([context['mask'], torch.ones(2, 1, 1, BLOCK, dtype=torch.bool)], -1)
    for t in range(T, BLOCK):
        with torch.no_grad():
            logits = model(a[:, :t], mask=whole[..., :t])[0][:, -1]
        drawn = logits.gather(-1, a[:, t : t + 1])[:, 0]
        assert (drawn > logits.amax(-1) - 1e-3).all()


def test_prompts_filled_up_on_the_left_are_as_alone_where_only_distances_count():
    model = small_gpt(position='rotary', tie_weights=False)
    prompts = [torch.tensor([3, 1, 4, 1]), torch.tensor([5, 9])]
    filled = torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9]])
    mask = padding_mask([4, 2], 4).flip(-1)
    texts = generate(model, filled, BLOCK - 4, temperature=0, context=dict(mask=mask))
    for prompt, text in zip(prompts, texts):
        alone = generate(model, prompt[None], BLOCK - 4, temperature=0)[0]
        assert torch.equal(text[4 - len(prompt) :], alone)


def test_a_mask_of_another_kind_is_refused():
    for mask in (torch.ones(1, 3).bool(), torch.ones(1, 1, 3, 3).bool(), torch.ones(1, 1, 1, 3)):
        with pytest.raises(ValueError, match=r'mask has shape'):
            grown_context(dict(mask=mask), 3, 3)


def test_a_config_may_be_a_dictionary_or_say_nothing_of_a_block():
    model = BigramLanguageModel(V)
    for config, expected in ((dict(block_size=3), 3), (dict(V=V), None), (SimpleNamespace(), None)):
        model.config = config
        assert block_size_of(model) == expected
        assert generate(model, torch.zeros(1, 4).long(), 2).shape == (1, 6)


# ------------------------------------------------- the cache


@thorough
@given(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_the_cache_keeps_all_in_order_and_in_place(room, pieces):
    cache, pairs = LayerCache(room), torch.randn(2, 2, 3, sum(pieces), 4, generator=rng(room))
    moved, place = 0, None
    for k, v in zip(*(z.split(pieces, -2) for z in pairs)):
        cache.update(k, v)
        moved, place = moved + (place != cache.k.data_ptr()), cache.k.data_ptr()
    assert (
        torch.equal(cache.k, pairs[0])
        and torch.equal(cache.v, pairs[1])
        and cache.length == sum(pieces)
    )
    assert moved <= 1 + max(0, math.ceil(math.log2(sum(pieces) / room)))  # it doubles


@thorough
@given(models(), st.integers(1, BLOCK - 1), st.integers(1, BLOCK - 1), st.integers(0, 1000))
def test_a_cache_that_went_back_is_as_if_it_had_not_read_on(model, kept, more, seed):
    "Read, take the end back, read something else: as a fresh pass says. Also across `smear`."
    first, second = torch.randint(V, (2, 2, BLOCK), generator=rng(seed))
    end, cache = min(kept + more, BLOCK), model.make_cache(3)
    with torch.no_grad():
        model(first[:, :end], cache=cache)
        cache.truncate(kept)
        assert cache.length == kept
        text = torch.cat([first[:, :kept], second[:, kept:]], 1)
        found, whole = model(text[:, kept:], cache=cache)[0], model(text)[0][:, kept:]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f'length={BLOCK + 1}'):
        cache.truncate(BLOCK + 1)


# ------------------------------------------------- speculative decoding


@thorough
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 30))
def test_speculation_keeps_the_distribution(seed, V, top_k):
    logits = 2 * torch.randn(2, V, dtype=torch.float64, generator=rng(seed))
    p, q = token_probs(logits, top_k=top_k)
    accept, redraw = accept_or_redraw(p, q)
    assert (q * accept + (q * (1 - accept)).sum() * redraw - p).abs().max() < 1e-12
    assert torch.equal(accept_or_redraw(p, p)[0], torch.ones_like(p))


def tables(*seeds, V=3):
    "Bigram models with random tables."
    models = [BigramLanguageModel(V) for _ in seeds]
    for seed, model in zip(seeds, models):
        model.table.weight.data = 1.5 * torch.randn(V, V, generator=rng(seed))
    return models


HOW = dict(temperature=0.8, top_k=2)  # two of three tokens are left in each row


def chi_square(target, texts):
    "How far the counts of texts of 0 and three more tokens are from the plain sampler's."
    P = token_probs(target.table.weight.detach(), **HOW)
    expected = len(texts) * (P[0][:, None, None] * P[:, :, None] * P[None]).flatten()
    found = torch.bincount(texts[:, 1] * 9 + texts[:, 2] * 3 + texts[:, 3], minlength=27)
    possible = expected > 0
    assert possible.sum() == 8
    if found[~possible].any():
        return math.inf
    return (((found - expected) ** 2 / expected)[possible]).sum().item()


LIMIT = 24.32  # 0.001 quantile of chi-square with 7 degrees of freedom


def speculative_texts(target, draft, ahead, n=1500):
    g, start = rng(0), torch.zeros(1, 1).long()
    return torch.cat(
        [speculative(target, draft, start, 3, ahead=ahead, generator=g, **HOW)[0] for _ in range(n)]
    )


@pytest.mark.parametrize('ahead', (1, 2, 4))
def test_texts_follow_the_plain_sampler(ahead):
    target, draft = tables(1, 0)
    plain = generate(target, torch.zeros(1500, 1).long(), 3, generator=rng(0), **HOW)
    assert chi_square(target, plain) < LIMIT
    assert chi_square(target, speculative_texts(target, draft, ahead)) < LIMIT


def redraws_from_p(p, q):
    return accept_or_redraw(p, q)[0], p


def believes_everything(p, q):
    return torch.ones_like(p), p


@pytest.mark.parametrize('rule', (redraws_from_p, believes_everything))
def test_a_broken_rule_is_noticed(rule, monkeypatch):
    "The test above can fail: two rules that look right at a glance do."
    monkeypatch.setattr(speculation, 'accept_or_redraw', rule)
    target, draft = tables(1, 0)
    assert chi_square(target, speculative_texts(target, draft, 2)) > LIMIT


def test_the_bonus_token_is_the_targets():
    "The draft agrees only on what follows 0: its guess holds, the bonus is not its own."
    target, draft = tables(4, 5)
    draft.table.weight.data[0] = target.table.weight.data[0]
    g, counts, start = rng(0), torch.zeros(3, 3), torch.zeros(1, 1).long()
    for _ in range(2000):
        text, calls = speculative(target, draft, start, 2, ahead=1, generator=g)
        assert calls == 1
        counts[text[0, 1], text[0, 2]] += 1

    def distance(model):
        P = model.table.weight.detach().softmax(-1)
        expected = 2000 * P[0][:, None] * P
        return ((counts - expected) ** 2 / expected).sum().item()

    assert distance(target) < 26.12 < distance(draft)  # 0.001 quantile, 8 degrees of freedom


@thorough
@given(models(), models(), st.integers(1, 4), st.integers(1, 6), how, st.integers(0, 1000))
def test_speculation_with_caches_is_speculation_without(target, draft, T, ahead, how, seed):
    "The same text in as many passes; and a greedy one is the target's."
    idx, n = torch.randint(V, (1, T), generator=rng(seed)), BLOCK + 1 - T
    (a, calls), (b, passes) = (
        speculative(
            target, draft, idx, n, ahead=ahead, generator=rng(seed), use_cache=use_cache, **how
        )
        for use_cache in (True, False)
    )
    assert torch.equal(a, b) and calls == passes <= n and a.shape == (1, T + n)
    if how.get('temperature') == 0:
        assert torch.equal(a, generate(target, idx, n, temperature=0))


def test_a_draft_that_is_the_target_is_never_rejected():
    (model,) = tables(0, V=5)
    start = torch.zeros(1, 1).long()
    text, calls = speculative(model, model, start, 20, ahead=4, generator=rng())
    assert text.shape == (1, 21) and calls == 4
    assert speculative(model, model, start, 0)[0].tolist() == [[0]]


def test_with_caches_every_token_is_read_once():
    "All guesses are accepted here, so nothing is read twice and the last token by nobody."
    model, read = small_gpt(tie_weights=False), []
    model.transformer.wte.register_forward_hook(lambda m, args, out: read.append(args[0].shape[1]))
    _, calls = speculative(model, small_gpt(tie_weights=False), torch.zeros(1, 2).long(), BLOCK - 2)
    assert sum(read) == BLOCK - 1 and len(read) == calls


def test_speculation_hands_each_model_its_own_context():
    target, draft = Translator(2, 30, cached=True), Translator(3)
    idx, mine, its = torch.zeros(1, 1).long(), dict(memory=MEMORY[:1]), dict(memory=MEMORY[1:2])
    text, _ = speculative(
        target, draft, idx, 20, temperature=0, context=mine, draft_context=its, ahead=3
    )
    assert torch.equal(text, generate(target, idx, 20, temperature=0, context=mine))
    assert target.training and draft.training


def test_a_model_takes_back_no_more_than_it_read():
    reader = RewindingModel(small_gpt(), BLOCK)
    with torch.no_grad():
        assert reader.probs(torch.zeros(1, 4).long(), 3).shape == (3, V)
    reader.keep(9)
    assert reader.cache.length == 4
    reader.keep(1)
    assert reader.cache.length == 1


@pytest.mark.parametrize(
    'bad, words',
    [
        (dict(ahead=0), 'ahead=0'),
        (dict(idx=torch.zeros(2, 1).long()), 'one prompt'),
        (dict(max_new_tokens=-1), 'max_new_tokens=-1'),
        (dict(max_new_tokens=BLOCK + 1), f'block_size={BLOCK} of the target'),
        (dict(temperature=-1.0), 'temperature=-1'),
        (dict(top_k=0), 'top_k=0'),
    ],
)
def test_bad_speculation_is_named(bad, words):
    model = small_gpt()
    how = dict(idx=torch.zeros(1, 1).long(), max_new_tokens=3) | bad
    with pytest.raises(ValueError, match=words):
        speculative(model, model, **how)


# ------------------------------------------------- prompts of unequal length


@thorough
@given(
    models(),
    st.lists(st.integers(1, BLOCK + 3), min_size=1, max_size=4),
    st.integers(0, BLOCK + 2),
    st.booleans(),
    st.integers(0, 1000),
)
def test_unequal_prompts_together_are_as_alone(model, lengths, n, use_cache, seed):
    prompts = [torch.randint(V, (t,), generator=rng(seed + i)) for i, t in enumerate(lengths)]
    together = generate_many(model, prompts, n, temperature=0, use_cache=use_cache)
    for p, text in zip(prompts, together):
        assert torch.equal(text, generate(model, p[None], n, temperature=0)[0])


def test_unequal_prompts_stop_each_by_itself():
    model = BigramLanguageModel(V)
    model.table.weight.data = 100 * torch.eye(V).roll(1, dims=1)  # counts up
    assert [
        t.tolist()
        for t in generate_many(model, [torch.tensor([7]), torch.tensor([3, 9, 1])], 4, stop=9)
    ] == [[7, 8, 9], [3, 9, 1, 2, 3, 4, 5]]
    for bad in ([], [torch.tensor([[1]])], [torch.tensor([1]), torch.tensor([]).long()]):
        with pytest.raises(ValueError, match='prompts'):
            generate_many(model, bad, 2)
