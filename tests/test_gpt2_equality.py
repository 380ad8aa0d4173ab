"""Our GPT against Hugging Face's `GPT2LMHeadModel`: the same weights in, the same logits and the same text out."""

import resource
import sys
import warnings

import pytest
import torch

from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig, count_params, load_gpt2_weights

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    pytest.importorskip(
        'transformers',
        reason='the reference implementation is not installed: pip install transformers',
    )
    from transformers import GPT2Config, GPT2LMHeadModel

SMALL = dict(vocab_size=211, n_embd=48, n_layer=3, n_head=4)


def pair(seed, block_size, shake, **shape):
    "The reference with random weights, and our model with the same ones. Biases and norms are shaken too: at 0 and 1 they would hide mistakes."
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(
        GPT2Config(n_positions=block_size, bos_token_id=0, eos_token_id=0, **shape)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += shake * torch.randn_like(p)
    ours = GPT(GPTConfig(block_size=block_size, **shape)).eval()
    load_gpt2_weights(ours, theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize('seed', range(3))
def test_small_shape_logits_and_loss(seed):
    theirs, ours = pair(seed, 32, 0.1, **SMALL)
    ids = torch.randint(SMALL['vocab_size'], (3, 32))  # every position is used
    with torch.no_grad():
        expected = theirs(ids, labels=ids)
        logits, _ = ours(ids)
        _, loss = ours(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_small_shape_gradients():
    theirs, ours = pair(0, 16, 0.1, **SMALL)
    ids = torch.randint(SMALL['vocab_size'], (2, 16))
    theirs(ids, labels=ids).loss.backward()
    ours(ids[:, :-1], ids[:, 1:])[1].backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        grad = expected[name].grad
        linear = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        torch.testing.assert_close(
            p.grad, grad.T if linear else grad, atol=1e-5, rtol=1e-3, msg=lambda m: f'{name}: {m}'
        )


def test_greedy_text_is_the_same():
    theirs, ours = pair(1, 64, 0.1, **SMALL)
    theirs.generation_config.eos_token_id = None  # our weights are random: no token means "the end"
    ids = torch.randint(1, SMALL['vocab_size'], (2, 7))
    with torch.no_grad():
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
        )
    assert torch.equal(generate(ours, ids, 40, temperature=0), expected)


def peak_memory():
    "The most memory this process has held, in bytes."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def test_full_shape():
    before = peak_memory()
    theirs, ours = pair(0, 1024, 0.02, vocab_size=50257, n_embd=768, n_layer=12, n_head=12)
    assert ours.num_params() == theirs.num_parameters() == count_params(GPTConfig()) == 124_439_808
    ids = torch.randint(50257, (2, 64))
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)[0]
    torch.testing.assert_close(logits, expected, atol=5e-3, rtol=1e-4)
    assert logits.std() > 0.5  # there was something to compare
    if before < 2e9:
        assert peak_memory() < 3e9, f'{peak_memory() / 1e9:.2f} GB'
