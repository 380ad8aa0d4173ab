"""One `train`, one checkpoint format, one `generate`, for every kind of model.

A bigram, a GPT, a GPT of experts, an encoder, an encoder-decoder and a regressor are trained by the
same loop, killed half-way on paper and resumed, saved, opened again; those that write, write.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from transformer_course.bigram import IGNORE_INDEX, BigramLanguageModel, cross_entropy
from transformer_course.block import BlockConfig, make_blocks, make_norm, run_blocks
from transformer_course.cache import KVCache
from transformer_course.checkpoint import load_model
from transformer_course.experiments.regression import InContextRegressor, RegressorConfig
from transformer_course.experts import ExpertConfig, ExpertGPT
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig, init_weights
from transformer_course.multihead import padding_mask
from transformer_course.training import TrainConfig, train

V, T, SIZES = 11, 8, dict(n_layer=2, n_head=2, n_embd=16)


@dataclass(kw_only=True)
class TextConfig(BlockConfig):
    "A stack of blocks over a vocabulary."

    vocab_size: int = V
    block_size: int = T


class TextModel(nn.Module):
    "What both models below begin with: a config, and a vector for each token and each place."

    config_class = TextConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, idx, start=0):
        return self.wte(idx) + self.wpe.weight[start : start + idx.shape[1]]


class Tagger(TextModel):
    "An encoder that says something of each token: `model(idx, lengths, targets)`."

    def __init__(self, config, generator=None):
        super().__init__(config)
        self.blocks = make_blocks(config, causal=False)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        init_weights(self, generator)

    def forward(self, idx, lengths, targets=None):
        mask = padding_mask(lengths, idx.shape[1])
        logits = self.head(run_blocks(self.blocks, self.embed(idx), mask=mask))
        return logits, None if targets is None else cross_entropy(logits, targets)


class Translator(TextModel):
    "An encoder and a decoder that looks at it: `model(source, lengths, idx, targets)`."

    def __init__(self, config, generator=None):
        super().__init__(config)
        self.encoder = make_blocks(config, causal=False)
        self.decoder = make_blocks(config, cross=True)
        self.ln_f = make_norm(config.norm, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, generator)

    def make_cache(self, room=64):
        return KVCache(self.config.n_layer, room)

    def encode(self, source, lengths):
        mask = padding_mask(lengths, source.shape[1])
        memory = run_blocks(self.encoder, self.embed(source), mask=mask)
        return dict(memory=memory, memory_mask=mask)

    def decode(self, idx, *, cache=None, last_only=False, **context):
        start = 0 if cache is None else cache.length
        x = run_blocks(self.decoder, self.embed(idx, start), cache=cache, **context)
        return self.lm_head(self.ln_f(x[:, -1:] if last_only else x))

    def forward(self, *batch, **how):
        if len(batch) == 1:  # as `generate` calls it: what was encoded comes along
            return self.decode(batch[0], **how), None
        source, lengths, idx, targets = batch
        logits = self.decode(idx, **self.encode(source, lengths))
        return logits, cross_entropy(logits, targets)


def ids(g, n=8, length=T):
    return torch.randint(2, V, (n, length), generator=g)


def text_batch(g):
    x = ids(g, length=T + 1).cumsum(1) % V
    return x[:, :-1], x[:, 1:]


def tag_batch(g):
    idx, lengths = ids(g), torch.randint(1, T + 1, (8,), generator=g)
    real = torch.arange(T) < lengths[:, None]
    return idx, lengths, torch.where(real, (idx + 1) % V, IGNORE_INDEX)


def translation_batch(g):
    source, lengths = ids(g), torch.randint(2, T + 1, (8,), generator=g)
    targets = (source + 1) % V
    idx = torch.cat([torch.zeros(8, 1).long(), targets[:, :-1]], dim=1)
    real = torch.arange(T) < lengths[:, None]
    return source, lengths, idx, torch.where(real, targets, IGNORE_INDEX)


def regression_batch(g):
    x = torch.randn(8, 5, 2, generator=g)
    w = torch.randn(8, 2, 1, generator=g)
    return x, (x @ w)[..., 0]


def seeded():
    return torch.Generator().manual_seed(0)


MODELS = {
    'bigram': (lambda: BigramLanguageModel(V), text_batch, None),
    'gpt': (
        lambda: GPT(GPTConfig(**SIZES, vocab_size=V, block_size=T, position='rotary'), seeded()),
        text_batch,
        None,
    ),
    'experts': (
        lambda: ExpertGPT(ExpertConfig(**SIZES, vocab_size=V, block_size=T, n_experts=2), seeded()),
        text_batch,
        None,
    ),
    'encoder': (lambda: Tagger(TextConfig(**SIZES), seeded()), tag_batch, Tagger),
    'encoder-decoder': (
        lambda: Translator(TextConfig(**SIZES), seeded()),
        translation_batch,
        Translator,
    ),
    'regressor': (
        lambda: InContextRegressor(RegressorConfig(**SIZES, d=2), seeded()),
        regression_batch,
        None,
    ),
}
CONFIG = TrainConfig(max_iters=12, batch_size=8, eval_interval=6, warmup_iters=2, seed=3)
every_model = pytest.mark.parametrize('name', MODELS)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@every_model
def test_one_loop_trains_saves_and_resumes_bit_for_bit(name, tmp_path):
    make, batch, model_class = MODELS[name]
    whole, half = make(), make()
    history = train(whole, batch, CONFIG, folder=tmp_path / 'whole')
    assert len(history.losses) == 12 and not torch.equal(weights(whole), weights(make()))

    def stop(step, _):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(half, batch, CONFIG, folder=tmp_path / 'half', on_eval=stop)
    again = make()
    rest = train(again, batch, CONFIG, folder=tmp_path / 'half', resume=True)
    assert torch.equal(weights(again), weights(whole))
    assert rest.losses == history.losses[6:]

    opened, about = load_model(
        tmp_path / 'half', **({'model_class': model_class} if model_class else {})
    )
    assert type(opened) is type(whole) and not opened.training and about['step'] == 12
    assert torch.equal(weights(opened), weights(whole))


@every_model
def test_the_losses_stay_out_of_the_checkpoint(name, tmp_path):
    make, batch, _ = MODELS[name]
    history = train(make(), batch, CONFIG, folder=tmp_path / 'run')
    written = (tmp_path / 'run' / 'checkpoint.json').read_text(encoding='utf-8')
    assert repr(history.losses[3]) not in written


@pytest.mark.parametrize('name', [n for n in MODELS if n not in ('regressor', 'experts')])
def test_parts_equal_the_whole_batch(name):
    "Two parts with unequal numbers of scored targets make the update that one big batch makes."
    make, batch, _ = MODELS[name]
    parts = [tuple(t[rows] for t in batch(seeded())) for rows in (slice(0, 3), slice(3, 8))]

    def one_part(_, left=[]):
        left[:] = left or parts[:]
        return left.pop(0)

    how = dict(max_iters=1, warmup_iters=0, optimizer='adamw', learning_rate=1e-3)
    joint, split = make().double(), make().double()
    floats = lambda b: tuple(t.double() if t.is_floating_point() else t for t in b)
    a = train(joint, lambda g: floats(batch(seeded())), TrainConfig(**how))
    b = train(
        split, lambda g: floats(one_part(g)), TrainConfig(**how, gradient_accumulation_steps=2)
    )
    assert abs(a.losses[0] - b.losses[0]) < 1e-9
    assert (weights(joint) - weights(split)).abs().max() < 1e-6


@pytest.mark.parametrize('name', ['bigram', 'gpt', 'experts', 'encoder-decoder'])
def test_one_generate_writes_with_every_model_that_can(name):
    make, batch, _ = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * torch.randn(p.shape, generator=seeded())
    start, context = ids(seeded(), n=3, length=2), {}
    if name == 'encoder-decoder':
        with torch.no_grad():
            context = model.encode(ids(seeded(), n=3), torch.tensor([T, 3, 1]))
    texts = [
        generate(model, start, 5, temperature=0, use_cache=use_cache, context=context)
        for use_cache in (True, False)
    ]
    assert torch.equal(texts[0], texts[1]) and texts[0].shape == (3, 7)
    if name == 'encoder-decoder':
        heard = [
            model.decode(start, **dict(context, memory=m))
            for m in (context['memory'], 0 * context['memory'])
        ]
        assert not torch.allclose(*heard)
        with pytest.raises(ValueError, match='memory is missing'):
            generate(model, start, 1)
