"Patching: swaps that must be exact, attributions that must add up, nothing left behind."

import itertools

import pytest
import torch
from torch import nn

from transformer_course.gpt import GPT, GPTConfig
from transformer_course.experiments.patching import (
    activations,
    direct_logits,
    part_names,
    run_with,
    tapped,
    written,
)

V = 9


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_model(**changes):
    "Random weights large enough for every part to matter."
    shape = dict(block_size=12, vocab_size=V, n_layer=2, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**shape | changes), rng())
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=rng(p.numel()))
    return model.eval()


def prompts(n=3, length=7):
    ids = torch.randint(V, (n, length), generator=rng(3))
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 1) % V
    return ids, other


KINDS = [dict(position=p, norm=n) for p in ('learned', 'rotary') for n in ('layer', 'rms', 'none')]
KINDS += [dict(norm='plain', bias=False, n_kv_head=1), dict(embed_norm='plain', smear=True)]
every_kind = pytest.mark.parametrize('kind', KINDS, ids=str)


@every_kind
def test_all_nothing_and_the_embedding(kind):
    model, (clean, corrupted) = some_model(**kind), prompts()
    kept = activations(model, clean)
    assert list(kept) == part_names(model)
    assert torch.equal(run_with(model, corrupted, {}), model(corrupted)[0])
    assert torch.equal(run_with(model, corrupted, kept), model(clean)[0])
    assert torch.equal(run_with(model, corrupted, {'embed': kept['embed']}), model(clean)[0])


def test_a_head_against_attention_written_out():
    "Replace one head by hand, in the last layer, and compute the rest by hand."
    model, (clean, corrupted) = some_model(norm='plain'), prompts()
    given = {'L1.H1': activations(model, clean)['L1.H1']}
    x = model.transformer.h[0](model.transformer.wte(corrupted) + model.transformer.wpe.weight[:7])
    block = model.transformer.h[1]
    heads = []
    for idx in (corrupted, clean):
        stream = model.transformer.wte(idx) + model.transformer.wpe.weight[:7]
        seen = block.ln_1(model.transformer.h[0](stream))
        q, k, v = block.attn.heads(seen)
        mask = torch.ones(7, 7).tril() == 0
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(mask, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    mixed = torch.cat([heads[0][:, 0], heads[1][:, 1]], -1)  # head 0 corrupted, head 1 clean
    x = x + block.attn.c_proj(mixed)
    x = x + block.mlp(block.ln_2(x))
    expected = model.lm_head(model.transformer.ln_f(x))
    near = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run_with(model, corrupted, given), expected, **near)


def test_places():
    model, (clean, corrupted) = some_model(), prompts()
    kept = activations(model, clean)
    assert torch.equal(run_with(model, corrupted, kept, [2, 3, 4, 5, 6]), model(clean)[0])
    early = run_with(model, corrupted, kept, [0, 1])  # the prompts agree there
    assert torch.equal(early, model(corrupted)[0])
    late = run_with(model, corrupted, {'L0.MLP': kept['L0.MLP']}, slice(5, None))
    assert torch.equal(late[:, :5], model(corrupted)[0][:, :5])
    assert not torch.allclose(late[:, 5], model(corrupted)[0][:, 5])


def test_given_values_broadcast():
    model, (clean, _) = some_model(), prompts()
    mean = activations(model, clean)['L0.H1'].mean((0, 1))
    one = run_with(model, clean, {'L0.H1': mean})
    other = run_with(model, clean, {'L0.H1': mean.expand(3, 7, 4)})
    assert torch.equal(one, other) and not torch.allclose(one, model(clean)[0])


def test_zero_everywhere_in_a_layer_is_the_model_without_it():
    model, (clean, _) = some_model(bias=False), prompts()
    given = {name: torch.zeros(1) for name in part_names(model) if name.startswith('L0')}
    without = run_with(model, clean, given)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    torch.testing.assert_close(without, model(clean)[0])


@every_kind
def test_shares_add_up(kind):
    model, (clean, _) = some_model(**kind), prompts()
    near = dict(atol=1e-4, rtol=1e-4)
    ends = []
    model.transformer.ln_f.register_forward_pre_hook(lambda m, args: ends.append(args[0]))
    logits = model(clean)[0]
    torch.testing.assert_close(sum(written(model, clean).values()), ends[0], **near)
    torch.testing.assert_close(sum(direct_logits(model, clean).values()), logits, **near)


def test_a_share_is_what_is_missing_when_the_norm_is_off():
    "Without a last norm a part of the last MLP layer counts for what its absence takes away."
    model, (clean, _) = some_model(norm='none'), prompts()
    share = direct_logits(model, clean)['L1.MLP']
    without = run_with(model, clean, {'L1.MLP': torch.zeros(1)})
    torch.testing.assert_close(model(clean)[0] - without, share, atol=1e-4, rtol=1e-4)


def test_shares_of_heads_are_told_apart():
    model, (clean, _) = some_model(), prompts()
    shares = direct_logits(model, clean)
    for a, b in itertools.combinations(part_names(model), 2):
        assert not torch.allclose(shares[a], shares[b]), (a, b)


def test_no_hook_stays():
    model, (clean, _) = some_model(), prompts()
    with pytest.raises(ZeroDivisionError), tapped(model, lambda name, value: 1 / 0):
        model(clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_errors():
    model, (clean, _) = some_model(), prompts()
    with pytest.raises(ValueError, match='L2.H0'):
        run_with(model, clean, {'L2.H0': torch.zeros(1)})
    with pytest.raises(ValueError, match='norm_first'):
        written(some_model(norm_first=False), clean)
