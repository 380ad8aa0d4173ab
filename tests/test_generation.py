"""Generation: the cache changes no token, whatever the model; the filters are the ones everybody uses; stopping, seeds, modes."""

import importlib.util
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_course.bigram import BigramLanguageModel, sample
from transformer_course.cache import KVCache, LayerCache
from transformer_course.generation import (
    CachedDecoder,
    filter_logits,
    generate,
    generate_many,
    last_logits,
    next_token,
    stream,
)
from transformer_course.speculative import accept_or_redraw, speculative
from transformer_course.gpt import GPT, GPTConfig, POSITIONS

V, BLOCK = 13, 10
thorough = settings(deadline=None, derandomize=True, max_examples=40)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def shaken(config, seed):
    "A GPT in evaluation mode whose every part has an effect; fresh weights would repeat one token for ever."
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
        embed_norm=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        smear=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(('gelu_tanh', 'relu2'))),
    )
    return shaken(config, draw(st.integers(0, 1000)))


how = st.sampled_from(
    (dict(temperature=0), dict(), dict(temperature=0.7, top_k=4), dict(top_p=0.8))
)


@thorough
@given(models(), st.integers(1, 3), st.integers(1, 2 * BLOCK), how, st.integers(0, 1000))
def test_cached_equals_uncached(model, B, T, how, seed):
    "Token for token; prompts shorter, as long as, and longer than the block, and always generated beyond it."
    idx = torch.randint(V, (B, T), generator=rng(seed))
    a, b = (
        generate(model, idx, 2 * BLOCK, use_cache=use_cache, generator=rng(seed), **how)
        for use_cache in (True, False)
    )
    assert a.shape == (B, T + 2 * BLOCK) and torch.equal(a, b) and torch.equal(a[:, :T], idx)


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
            shaken(GPTConfig(BLOCK, V, 3, 4, 16, tie_weights=False), seed),
            torch.zeros(1, 1).long(),
            30,
            generator=rng(seed),
        )
        for seed in range(5)
    ]
    assert min(len(set(text[0].tolist())) for text in texts) >= 5


@thorough
@given(models(), st.integers(0, V - 1), st.integers(0, 1000))
def test_stopping_only_cuts(model, stop, seed):
    "Up to its stop token a row is what it would have been without; after it comes nothing but the stop token."
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
    model, idx, state = (
        shaken(GPTConfig(BLOCK, V, 2, 4, 16), 0),
        torch.zeros(2, 1).long(),
        torch.get_rng_state(),
    )
    a, b, c = (generate(model, idx, 20, generator=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('training', (True, False))
def test_dropout_is_off_and_the_mode_is_put_back(training):
    model = shaken(
        GPTConfig(BLOCK, V, 2, 4, 16, dropout=0.5, attn_dropout=0.5, tie_weights=False), 0
    ).train(training)
    idx = torch.zeros(1, 4).long()
    assert (
        torch.equal(last_logits(model, idx), last_logits(model, idx)) and model.training == training
    )
    assert (
        torch.equal(
            generate(model, idx, 15, temperature=0), generate(model, idx, 15, temperature=0)
        )
        and model.training == training
    )
    with pytest.raises(ValueError):
        generate(model, idx + V, 1)
    assert model.training == training


def test_stream_yields_what_generate_collects_and_keeps_no_graph():
    model, idx = shaken(GPTConfig(BLOCK, V, 2, 4, 16), 0), torch.zeros(2, 3).long()
    tokens, seen = stream(model, idx, 15, generator=rng(3)), []
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


@thorough
@given(models(), st.integers(1, BLOCK - 1), st.integers(1, 3))
def test_the_decoder_says_what_the_model_says(model, T, B):
    "Logits after each token, read one by one behind a prompt, against the whole text at once."
    idx = torch.randint(V, (B, BLOCK), generator=rng(T))
    with torch.no_grad():
        decoder, whole = CachedDecoder(model, BLOCK), model(idx)[0]
        pieces = [decoder(idx[:, :T])] + [decoder(idx[:, t : t + 1]) for t in range(T, BLOCK)]
    torch.testing.assert_close(torch.stack(pieces, 1), whole[:, T - 1 :], atol=1e-4, rtol=1e-4)


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
@given(st.integers(0, 10_000), st.integers(2, 30))
def test_speculation_keeps_the_distribution(seed, V):
    p, q = (2 * torch.randn(2, V, dtype=torch.float64, generator=rng(seed))).softmax(-1)
    accept, redraw = accept_or_redraw(p, q)
    assert (q * accept + (q * (1 - accept)).sum() * redraw - p).abs().max() < 1e-12
    assert torch.equal(accept_or_redraw(p, p)[0], torch.ones_like(p))


def test_a_draft_that_is_the_target_is_never_rejected():
    model = BigramLanguageModel(5)
    model.table.weight.data = torch.randn(5, 5, generator=rng())
    text, calls = speculative(model, model, torch.zeros(1, 1).long(), 20, ahead=4, generator=rng())
    assert text.shape == (1, 21) and calls == 4
    with pytest.raises(ValueError, match='ahead=0'):
        speculative(model, model, torch.zeros(1, 1).long(), 3, ahead=0)
    with pytest.raises(ValueError, match='one prompt'):
        speculative(model, model, torch.zeros(2, 1).long(), 3)


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
