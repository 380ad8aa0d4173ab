"N-grams: the divergence against torch.distributions, lens and ablation against altered models."

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from transformer_course.gpt import GPT, GPTConfig
from transformer_course.experiments.ngrams import divergence, lens_and_ablation


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_divergence_is_torchs():
    p, q = (torch.randn(3, 4, 7, generator=rng(i), dtype=torch.double) for i in range(2))
    p[..., 2] = -torch.inf  # a token that never comes
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(divergence(p.log_softmax(-1), q.log_softmax(-1)), expected)


def test_divergence_of_what_the_model_rules_out_is_infinite_and_never_below_zero():
    p, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert divergence(p, sure) == torch.inf and divergence(sure, sure) == 0
    many = torch.randn(500, 5, generator=rng(3)).log_softmax(-1)
    assert (divergence(many[:250], many[250:]) > 0).all()
    with pytest.raises(ValueError, match=r'shape \(2,\)'):
        divergence(p, torch.zeros(3))


def strong_gpt(position):
    "A small GPT with weights so large that every bias and every turn of a query shows."
    sizes = dict(block_size=8, vocab_size=5, n_layer=3, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**sizes, position=position), rng())
    for p in model.parameters():
        p.data *= 10
    return model


def stays_the_same(model, k, x):
    "Make block k add its mean over texts and places, found by hooks."
    kept = []

    def keep(module, args, out):
        kept.append((out - args[0]).detach())

    handle = model.transformer.h[k].register_forward_hook(keep)
    model(x)
    handle.remove()
    mean = kept[0].flatten(0, 1).mean(0)
    model.transformer.h[k].register_forward_hook(lambda module, args, out: args[0] + mean)


@pytest.mark.parametrize('position', ['learned', 'rotary', 'alibi', 'none'])
def test_lens_and_ablation_agree_with_altered_models(position):
    x, y = torch.randint(5, (2, 3, 8), generator=rng(1))
    lens, cost = lens_and_ablation(strong_gpt(position), x, y)
    assert lens.shape == (4, 3) and cost.shape == (3, 3)
    for k in range(3):
        other = strong_gpt(position)
        stays_the_same(other, k, x)
        torch.testing.assert_close(lens[-1].mean() + cost[k].mean(), other(x, y)[1].detach())
        if k:
            cut = strong_gpt(position)
            del cut.transformer.h[k:]
            torch.testing.assert_close(lens[k].mean(), cut(x, y)[1].detach())
