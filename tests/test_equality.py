"""The course's blocks against well-kept implementations: the same weights in, the same numbers out.

All weights are shaken first: biases at 0 and norms at 1 would hide mistakes.
"""

import resource
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformer_course.attention import causal_mask
from transformer_course.block import BlockConfig, make_blocks, make_norm, run_blocks
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig, count_params
from transformer_course.multihead import MultiHeadAttention, padding_mask
from transformer_course.weights import load_gpt2_weights, load_llama_weights

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    pytest.importorskip(
        'transformers',
        reason='the reference implementation is not installed: pip install transformers',
    )
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

SMALL = dict(vocab_size=211, n_embd=48, n_layer=3, n_head=4)


@torch.no_grad()
def shaken(model, size=0.1):
    "The model in evaluation mode, with noise on every parameter."
    for p in model.parameters():
        p += size * torch.randn_like(p)
    return model.eval()


def gpt2_pair(seed, block_size, shake, **shape):
    "The reference with random weights, and our model with the same ones."
    torch.manual_seed(seed)
    config = GPT2Config(n_positions=block_size, bos_token_id=0, eos_token_id=0, **shape)
    theirs = shaken(GPT2LMHeadModel(config), shake)
    ours = GPT(GPTConfig(block_size=block_size, **shape)).eval()
    load_gpt2_weights(ours, theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize('seed', range(3))
def test_gpt2_logits_and_loss(seed):
    theirs, ours = gpt2_pair(seed, 32, 0.1, **SMALL)
    ids = torch.randint(SMALL['vocab_size'], (3, 32))  # every position is used
    with torch.no_grad():
        expected = theirs(ids, labels=ids)
        logits, _ = ours(ids)
        _, loss = ours(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_gpt2_gradients():
    theirs, ours = gpt2_pair(0, 16, 0.1, **SMALL)
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


def test_gpt2_greedy_text_is_the_same():
    theirs, ours = gpt2_pair(1, 64, 0.1, **SMALL)
    theirs.generation_config.eos_token_id = None  # random weights: no token means "the end"
    ids = torch.randint(1, SMALL['vocab_size'], (2, 7))
    how = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert torch.equal(generate(ours, ids, 40, temperature=0), expected)


def peak_memory():
    "The most memory this process has held, in bytes."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def test_gpt2_full_shape():
    before = peak_memory()
    theirs, ours = gpt2_pair(0, 1024, 0.02, vocab_size=50257, n_embd=768, n_layer=12, n_head=12)
    assert ours.num_params() == theirs.num_parameters() == count_params(GPTConfig()) == 124_439_808
    ids = torch.randint(50257, (2, 64))
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)[0]
    torch.testing.assert_close(logits, expected, atol=5e-3, rtol=1e-4)
    assert logits.std() > 0.5  # there was something to compare
    if before < 2e9:
        assert peak_memory() < 3e9, f'{peak_memory() / 1e9:.2f} GB'


# ---------------------------------------------------------------- Llama

LLAMA = dict(
    position='rotary', norm='rms', norm_eps=1e-6, activation='silu', gated=True, bias=False
)


def llama_pair(seed, n_kv_head, tied):
    "A Llama with random weights, and our GPT with the same ones."
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=n_kv_head,
        max_position_embeddings=32,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )
    theirs = shaken(LlamaForCausalLM(config))
    sizes = dict(block_size=32, vocab_size=101, n_layer=3, n_head=6, n_embd=48, n_inner=80)
    ours = GPT(GPTConfig(**sizes, **LLAMA, n_kv_head=n_kv_head, tie_weights=tied)).eval()
    load_llama_weights(ours, theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize('n_kv_head', [1, 2, 6])
@pytest.mark.parametrize('tied', [True, False])
def test_llama(n_kv_head, tied):
    theirs, ours = llama_pair(n_kv_head, n_kv_head, tied)
    ids = torch.randint(101, (2, 32))
    with torch.no_grad():
        expected = theirs(ids).logits
        gap = (ours(ids)[0] - expected).abs().max()
    assert gap <= 1e-5 and expected.std() > 0.1


def test_llama_greedy_text_is_the_same():
    theirs, ours = llama_pair(0, 2, False)
    theirs.generation_config.eos_token_id = None
    ids = torch.randint(1, 101, (2, 5))
    how = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert torch.equal(generate(ours, ids, 20, temperature=0), expected)


def test_llama_with_another_eps_differs():
    theirs, ours = llama_pair(0, 2, False)
    for module in ours.modules():
        if hasattr(module, 'eps'):
            module.eps = 1e-2
    ids = torch.randint(101, (2, 32))
    with torch.no_grad():
        assert (ours(ids)[0] - theirs(ids).logits).abs().max() > 1e-4


# ---------------------------------------------------------------- BERT

BERT = dict(norm_eps=1e-12, norm_first=False, activation='gelu')


class Encoder(nn.Module):
    "As much of a BERT as is needed here: three tables, a norm, blocks that look both ways."

    def __init__(self, config, vocab_size, block_size):
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(n, config.n_embd) for n in (vocab_size, block_size, 2)
        )
        self.norm = make_norm('layer', config.n_embd, eps=config.norm_eps)
        self.blocks = make_blocks(config, causal=False)

    def forward(self, ids, types, lengths):
        words, places, kinds = self.tables
        x = words(ids) + places.weight[: ids.shape[1]] + kinds(types)
        return run_blocks(self.blocks, self.norm(x), mask=padding_mask(lengths, ids.shape[1]))


@torch.no_grad()
def load_bert(ours, theirs):
    "Copy a BERT over, layer by layer."
    e = theirs.embeddings
    sources = (e.word_embeddings, e.position_embeddings, e.token_type_embeddings)
    for table, source in zip(ours.tables, sources):
        table.load_state_dict(source.state_dict())
    ours.norm.load_state_dict(e.LayerNorm.state_dict())
    for block, layer in zip(ours.blocks, theirs.encoder.layer):
        qkv = [getattr(layer.attention.self, name) for name in ('query', 'key', 'value')]
        block.attn.c_attn.weight.copy_(torch.cat([z.weight for z in qkv]))
        block.attn.c_attn.bias.copy_(torch.cat([z.bias for z in qkv]))
        block.attn.c_proj.load_state_dict(layer.attention.output.dense.state_dict())
        block.ln_1.load_state_dict(layer.attention.output.LayerNorm.state_dict())
        block.mlp.c_fc.load_state_dict(layer.intermediate.dense.state_dict())
        block.mlp.c_proj.load_state_dict(layer.output.dense.state_dict())
        block.ln_2.load_state_dict(layer.output.LayerNorm.state_dict())


def bert_pair(seed):
    "A BERT with random weights, and our encoder with the same ones."
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=99,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=20,
    )
    theirs = shaken(BertModel(config, add_pooling_layer=False))
    ours = Encoder(BlockConfig(n_layer=3, n_head=4, n_embd=48, n_inner=96, **BERT), 99, 20).eval()
    load_bert(ours, theirs)
    return theirs, ours


def test_bert_with_padding():
    theirs, ours = bert_pair(0)
    ids, types = torch.randint(99, (3, 20)), torch.randint(2, (3, 20))
    lengths = torch.tensor([20, 7, 1])
    real = torch.arange(20) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=real.long(), token_type_ids=types).last_hidden_state
        found = ours(ids, types, lengths)
        unmasked = ours(ids, types, torch.tensor([20, 20, 20]))
    assert (found - expected)[real].abs().max() <= 1e-5
    assert (unmasked - expected)[1, :7].abs().max() > 1e-3  # the mask matters


# ---------------------------------------------------------------- the Transformer of 2017


@torch.no_grad()
def copy_attention(ours, theirs):
    "PyTorch's attention layer into ours."
    ours.c_attn.weight.copy_(theirs.in_proj_weight)
    ours.c_attn.bias.copy_(theirs.in_proj_bias)
    ours.c_proj.load_state_dict(theirs.out_proj.state_dict())


@torch.no_grad()
def copy_layer(block, layer, cross):
    "A layer of `nn.Transformer` into a block."
    copy_attention(block.attn, layer.self_attn)
    block.ln_1.load_state_dict(layer.norm1.state_dict())
    if cross:
        copy_attention(block.crossattention, layer.multihead_attn)
        block.ln_cross_attn.load_state_dict(layer.norm2.state_dict())
    block.ln_2.load_state_dict((layer.norm3 if cross else layer.norm2).state_dict())
    block.mlp.c_fc.load_state_dict(layer.linear1.state_dict())
    block.mlp.c_proj.load_state_dict(layer.linear2.state_dict())


@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.parametrize('activation', ['relu', 'gelu'])
def test_encoder_decoder_with_all_masks(norm_first, activation):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a fast path that is not taken
        theirs = nn.Transformer(
            32, 4, 2, 2, 64, 0.0, activation, batch_first=True, norm_first=norm_first
        )
    shaken(theirs, 0.2)
    config = BlockConfig(
        n_layer=2, n_head=4, n_embd=32, n_inner=64, norm_first=norm_first, activation=activation
    )
    encoder, decoder = make_blocks(config, causal=False), make_blocks(config, cross=True)
    for blocks, half, cross in ((encoder, theirs.encoder, False), (decoder, theirs.decoder, True)):
        for block, layer in zip(blocks, half.layers, strict=True):
            copy_layer(block, layer, cross)
    source, target = torch.randn(3, 9, 32), torch.randn(3, 7, 32)
    source_real, target_real = torch.tensor([9, 4, 1]), torch.tensor([7, 5, 2])
    source_mask, target_mask = padding_mask(source_real, 9), padding_mask(target_real, 7)
    with torch.no_grad():
        expected = theirs(
            source,
            target,
            tgt_mask=~causal_mask(7),
            src_key_padding_mask=~source_mask[:, 0, 0],
            tgt_key_padding_mask=~target_mask[:, 0, 0],
            memory_key_padding_mask=~source_mask[:, 0, 0],
        )
        memory = theirs.encoder.norm(run_blocks(encoder, source, mask=source_mask))
        masks = dict(mask=target_mask, memory_mask=source_mask)
        found = theirs.decoder.norm(run_blocks(decoder, target, memory, **masks))
    real = target_mask[:, 0, 0]
    assert (found - expected)[real].abs().max() <= 1e-5


def test_normalised_queries_and_keys_are_layer_norm_s():
    "Against torch's own norm and kernel, with the layer's own weights."
    torch.manual_seed(0)
    layer, norm = MultiHeadAttention(16, 2, qk_norm=True), nn.LayerNorm(8, elementwise_affine=False)
    x = torch.randn(3, 5, 16)
    q, k, v = (z.view(3, 5, 2, 8).transpose(1, 2) for z in layer.c_attn(x).chunk(3, -1))
    seen = F.scaled_dot_product_attention(norm(q), norm(k), v, is_causal=True)
    wanted = layer.c_proj(seen.transpose(1, 2).reshape(3, 5, 16))
    torch.testing.assert_close(layer(x), wanted)
