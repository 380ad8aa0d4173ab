"What a block promises: options that reach every part, masks, dropout, errors that help."

import math

import pytest
import torch
from torch import nn

from transformer_course.attention import attention_weights, scaled_dot_product_attention
from transformer_course.block import MLP, Block, BlockConfig, make_blocks, make_norm, run_blocks
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.multihead import MultiHeadAttention, combine_masks, padding_mask

C, H = 16, 4


def config(**fields):
    return BlockConfig(n_embd=C, n_head=H, n_layer=2, **fields)


def test_attention_options_reach_cross_attention():
    block = Block(
        config(n_kv_head=2, qk_norm=True, attn_scale=2.0, attn_dropout=0.5, bias=False, window=3),
        cross=True,
    )
    for attn in (block.attn, block.crossattention):
        assert (attn.n_kv_head, attn.qk_norm, attn.attn_dropout) == (2, True, 0.5)
        assert attn.scale == 2.0 / 2 and attn.c_attn.bias is None
    assert (block.attn.causal, block.attn.window) == (True, 3)
    assert (block.crossattention.causal, block.crossattention.window) == (False, None)


@pytest.mark.parametrize('kind', ['layer', 'plain', 'rms'])
def test_every_norm_takes_eps(kind):
    x = 1e-3 * torch.randn(2, C, generator=torch.Generator().manual_seed(0))
    small, large = make_norm(kind, C, eps=1e-12)(x), make_norm(kind, C, eps=1.0)(x)
    assert small.std() > 0.9 and large.std() < 0.01
    block = Block(config(norm=kind, norm_eps=0.125), cross=True)
    assert [m.eps for m in block.modules() if hasattr(m, 'eps')] == [0.125] * 3


def test_dropout_falls_on_what_is_added_and_in_training_only():
    block, x = Block(config(dropout=0.5)), torch.randn(1, 300, C)
    for part in (block.attn, block.mlp):
        for p in part.c_proj.parameters():
            nn.init.zeros_(p)
    assert torch.equal(block(x), x)  # nothing is added: dropout has nothing to fall on
    nn.init.ones_(block.mlp.c_proj.bias)
    added = (block(x) - x).round()
    assert set(added.unique().tolist()) == {0.0, 2.0}  # dropped, or doubled to make up for it
    assert torch.allclose(block.eval()(x) - x, torch.ones_like(x), atol=1e-6)


def test_a_memory_is_given_if_and_only_if_the_block_looks_at_one():
    x, memory = torch.randn(1, 3, C), torch.randn(1, 5, C)
    with pytest.raises(ValueError, match='memory was given.*cross=False'):
        Block(config())(x, memory)
    with pytest.raises(ValueError, match='memory is missing.*cross=True'):
        Block(config(), cross=True)(x)
    with pytest.raises(ValueError, match='memory was given'):
        GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=8))(
            torch.zeros(1, 2).long(), memory=memory
        )


def test_the_slot_takes_any_module():
    x = torch.randn(1, 3, C)
    block = Block(config(), mlp=nn.Identity())
    stream = x + block.attn(block.ln_1(x))
    torch.testing.assert_close(block(x), stream + block.ln_2(stream))
    blocks = make_blocks(config(), make_mlp=lambda: MLP(C, 1))
    assert len({id(b.mlp) for b in blocks}) == 2


@pytest.mark.parametrize('norm_first', [True, False])
def test_padding_is_not_heard(norm_first):
    torch.manual_seed(0)
    encoder = make_blocks(config(norm_first=norm_first), causal=False)
    decoder = make_blocks(config(norm_first=norm_first), cross=True)
    source, target = torch.randn(2, 6, C), torch.randn(2, 5, C)
    mask = padding_mask([6, 2], 6)
    other = source.clone()
    other[1, 2:] = 100.0

    def decode(source):
        memory = run_blocks(encoder, source, mask=mask)
        return run_blocks(decoder, target, memory, memory_mask=mask)

    assert torch.equal(decode(source), decode(other))
    unmasked = run_blocks(decoder, target, run_blocks(encoder, source))
    assert not torch.allclose(decode(source)[1], unmasked[1])
    assert torch.allclose(decode(source)[0], unmasked[0], atol=1e-6)  # the full row is as it was


@pytest.mark.parametrize('lengths', [[0, 3], [4, 7], [[3, 3]], [-1]])
def test_padding_mask_names_wrong_lengths(lengths):
    with pytest.raises(ValueError, match='lengths='):
        padding_mask(lengths, 6)


def test_a_row_that_may_look_nowhere_hears_zeros():
    layer, x = MultiHeadAttention(C, H, causal=False, bias=False), torch.randn(1, 3, C)
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, False]])
    out = layer(x, mask=mask)
    assert out.isfinite().all() and not out[0, 1].any() and out[0, 0].any()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('dtype', [torch.long, torch.int, torch.uint8])
def test_masks_of_whole_numbers_are_refused(dtype):
    q = torch.randn(1, 1, 4, 8)
    mask = torch.ones(4, 4).tril().to(dtype)
    layer, x = MultiHeadAttention(C, H, causal=False), torch.randn(1, 4, C)
    calls = [
        lambda: attention_weights(q, q, mask),
        lambda: scaled_dot_product_attention(q, q, q, mask),
        lambda: combine_masks(4, 4, mask, causal=True),
        lambda: layer(x, mask=mask),
        lambda: layer.weights(x, mask=mask),
        lambda: run_blocks(make_blocks(config()), x, mask=mask),
    ]
    for call in calls:
        with pytest.raises(ValueError, match='mask has dtype.*mask.bool'):
            call()


@pytest.mark.parametrize(
    'fields, words',
    [
        (dict(n_embd=10), 'n_embd=10 is not divisible by n_head=4'),
        (dict(n_kv_head=3), 'n_head=4 is not divisible by n_kv_head=3'),
        (dict(n_head='4'), "n_head='4' must be a whole number"),
        (dict(n_layer=2.0), 'n_layer=2.0 must be a whole number'),
        (dict(bias=1), 'bias=1 must be true or false'),
        (dict(dropout=float('nan')), 'dropout=nan must be a finite number'),
        (dict(dropout=1.0), 'dropout=1.0'),
        (dict(norm_eps=0.0), 'norm_eps=0.0 must be above 0'),
        (dict(n_inner=0), 'n_inner=0 must be at least 1'),
        (dict(mlp_ratio=1e-9), 'mlp_ratio=1e-09 leaves no hidden unit'),
        (dict(activation='swish'), "activation='swish' is not known"),
        (dict(norm='batch'), "norm='batch' is not known"),
    ],
)
def test_a_wrong_field_is_named(fields, words):
    with pytest.raises(ValueError) as e:
        BlockConfig(**dict(n_embd=16, n_head=4) | fields)
    assert words in str(e.value)


def test_wrong_calls_say_what_to_write():
    with pytest.raises(ValueError, match=r'Block\(BlockConfig\('):
        Block(16)
    with pytest.raises(ValueError, match=r'give \(B, T, C\)'):
        MultiHeadAttention(C, H)(torch.randn(3, C))
    with pytest.raises(TypeError):
        GPTConfig(64, 65)  # the fields are given by name: an order of 25 invites a slip


def test_configs_of_version_0_1_still_load():
    assert GPTConfig(embed_norm=True).embed_norm == 'plain'
    assert GPTConfig(embed_norm=False).embed_norm == 'none'


def test_hidden_units_are_rounded_to_the_nearest():
    assert MLP(100, 2.4).c_fc.out_features == 240  # 2.4 * 100 is 239.999… in binary
    assert MLP(100, n_inner=7).c_fc.out_features == 7


def test_only_pre_norm_ends_in_a_norm():
    sizes = dict(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=8)
    assert isinstance(GPT(GPTConfig(**sizes, norm_first=False)).transformer.ln_f, nn.Identity)
    assert GPT(GPTConfig(**sizes)).transformer.ln_f.weight.shape == (8,)


# ---------------------------------------------------------------- masks and heads, by hand


def by_hand(layer, x, memory, allowed):
    "Softmax over the allowed scores, head by head, with the layer's own weights."
    D = layer.head_size
    rows = layer.c_attn.weight.split(layer.sizes)
    shifts = layer.c_attn.bias.split(layer.sizes)
    q, k, v = (z @ w.T + b for z, w, b in zip((x, memory, memory), rows, shifts))
    shared, out, weights = layer.n_head // layer.n_kv_head, [], []
    for h in range(layer.n_head):
        own, kv = slice(h * D, (h + 1) * D), slice(h // shared * D, (h // shared + 1) * D)
        scores = q[..., own] @ k[..., kv].mT / D**0.5
        weights.append(scores.masked_fill(~allowed, -math.inf).softmax(-1))
        out.append(weights[-1] @ v[..., kv])
    return layer.c_proj(torch.cat(out, -1)), torch.stack(weights, 1)


@pytest.mark.parametrize('n_kv_head', [4, 2, 1])
@pytest.mark.parametrize('kind', ['bool', 'float'])
def test_a_mask_is_added_to_the_rule_of_the_layer(n_kv_head, kind):
    "What the mask hides stays hidden, and so does the future; each head has its keys and values."
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 4, n_kv_head=n_kv_head, causal=True)
    x, given = torch.randn(2, 5, 16), torch.ones(5, 5, dtype=torch.bool)
    given[3:, 1] = False
    mask = given if kind == 'bool' else torch.zeros(5, 5).masked_fill(~given, -math.inf)
    wanted, weights = by_hand(layer, x, x, given.tril())
    torch.testing.assert_close(layer(x, mask=mask), wanted)
    torch.testing.assert_close(layer.weights(x, mask=mask), weights)


@pytest.mark.parametrize('window', [None, 2])
def test_a_memory_is_seen_as_a_whole(window):
    "The rules of self-attention, no future and a window, are none for what lies in a memory."
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 4, causal=True, window=window)
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    wanted, weights = by_hand(layer, x, memory, torch.ones(3, 7, dtype=torch.bool))
    torch.testing.assert_close(layer(x, memory), wanted)
    torch.testing.assert_close(layer.weights(x, memory), weights)


@pytest.mark.parametrize(
    'ratio, n_embd, units', [(2.4, 99, 238), (1.1, 9, 10), (239.99 / 64, 64, 240)]
)
def test_hidden_units_are_rounded(ratio, n_embd, units):
    assert MLP(n_embd, ratio).c_fc.out_features == units
