"""Weights of one byte: close to the floats, whatever the shape; the same from a file and from a
model; never a surprise."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.bigram import BigramLanguageModel
from transformer_course.block import BlockConfig, make_blocks
from transformer_course.checkpoint import save_checkpoint
from transformer_course.experts import ExpertConfig, ExpertGPT
from transformer_course.generation import generate
from transformer_course.gpt import GPT, POSITIONS, GPTConfig
from transformer_course.int8 import Int8Linear, load_int8, quantize_rows, to_int8

thorough = settings(deadline=None, derandomize=True, max_examples=40)
SIZES = dict(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def stirred(model):
    "The model with weights that are no zeros: biases begin as zeros."
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=dice(p.numel()))
    return model.eval()


@thorough
@given(st.integers(1, 40), st.integers(1, 40), st.floats(-6, 6), st.integers(0, 1000))
def test_rows_are_off_by_half_a_step_at_most(rows, columns, size, seed):
    w = torch.randn(rows, columns, generator=dice(seed)) * 10**size
    w8, scale = quantize_rows(w)
    assert w8.shape == w.shape and scale.shape == (rows,)
    assert (w8.abs().amax(1) == 127).all()  # every row uses all its steps
    assert ((w8 * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()


batches = st.lists(st.integers(1, 4), max_size=3)


@thorough
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    batches,
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_a_layer_is_near_the_float_one(outputs, inputs, batch, bias, kernel, seed):
    g = dice(seed)
    layer, x = nn.Linear(inputs, outputs, bias=bias), torch.randn(*batch, inputs, generator=g)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=g)
        exact, rough = layer(x), Int8Linear(layer.weight, layer.bias, kernel)(x)
        size = layer.weight.abs()
        of_weights = x.abs().sum(-1, keepdim=True) * size.amax(1) / 127
        width = (x.amax() - x.amin().clamp(max=0)).clamp(min=x.abs().max())
        of_x = width / 255 * 2 * size.sum(1)
    bound = 0.5 * (of_weights + of_x)
    assert rough.shape == exact.shape and ((rough - exact).abs() <= bound + 1e-4).all()


def all_in_bytes(model):
    "Whether no linear map is left in floats, and no weight without numbers."
    tensors = [*model.parameters(), *model.buffers()]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return not linear and not any(t.is_meta for t in tensors)


def test_the_file_of_a_tied_model_gives_the_tied_head(tmp_path):
    model = stirred(GPT(GPTConfig(**SIZES), dice()))
    save_checkpoint(tmp_path / 'checkpoint', model)
    loaded, _ = load_int8(tmp_path / 'checkpoint')
    ids = torch.arange(8)[None]
    assert (loaded(ids)[0] - model(ids)[0]).abs().max() < 0.2
    assert all_in_bytes(loaded)


class Named(nn.Module):
    "A model that is not of the course: a dict as its config, and two layers with one weight."

    def __init__(self, width):
        super().__init__()
        self.config = dict(width=width)
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


def test_a_stranger_s_model_is_opened_with_its_class(tmp_path):
    model, x = stirred(Named(6)), torch.randn(2, 6, generator=dice())
    save_checkpoint(tmp_path / 'checkpoint', model)
    with pytest.raises(ValueError, match='Named'):
        load_int8(tmp_path / 'checkpoint')
    loaded, about = load_int8(tmp_path / 'checkpoint', Named)
    assert about['model'] == 'Named' and all_in_bytes(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(x), to_int8(model)(x))


def test_other_models_of_the_course_are_opened_by_their_names(tmp_path):
    model = stirred(ExpertGPT(ExpertConfig(**SIZES, n_experts=3), dice()))
    save_checkpoint(tmp_path / 'experts', model)
    loaded, _ = load_int8(tmp_path / 'experts')
    ids = torch.arange(8)[None]
    assert type(loaded) is ExpertGPT and all_in_bytes(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], to_int8(model)(ids)[0])
    save_checkpoint(tmp_path / 'pairs', BigramLanguageModel(11))
    assert type(load_int8(tmp_path / 'pairs')[0]) is BigramLanguageModel


def test_a_checkpoint_of_an_earlier_version_is_a_gpt_s(tmp_path):
    "No `model` in checkpoint.json, and embed_norm as it was written then."
    model = stirred(GPT(GPTConfig(**SIZES, embed_norm='plain'), dice()))
    save_checkpoint(tmp_path / 'checkpoint', model)
    file = tmp_path / 'checkpoint' / 'checkpoint.json'
    about = json.loads(file.read_text())
    del about['model'], about['check']
    about['format'], about['config'] = 1, dict(SIZES, embed_norm=True)
    file.write_text(json.dumps(about))
    loaded, _ = load_int8(tmp_path / 'checkpoint')
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], to_int8(model)(ids)[0])


def test_cross_attention_is_refused_before_anything_is_changed():
    blocks = make_blocks(BlockConfig(n_layer=2, n_head=2, n_embd=8), cross=True)
    linear = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(ValueError, match='cross-attention'):
        to_int8(blocks)
    assert [m for m in blocks.modules() if isinstance(m, nn.Linear)] == linear


def test_a_damaged_file_is_refused(tmp_path):
    save_checkpoint(tmp_path / 'checkpoint', GPT(GPTConfig(**SIZES)))
    file = tmp_path / 'checkpoint' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match='checksum'):
        load_int8(tmp_path / 'checkpoint')


@pytest.mark.parametrize('position', POSITIONS)
def test_generation_runs_with_every_kind_of_position(position):
    sizes = dict(block_size=12, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
    config = GPTConfig(**sizes, position=position, tie_weights=False)
    model = to_int8(GPT(config, dice()))
    start = torch.zeros(2, 1).long()
    a, b = (generate(model, start, 20, temperature=0) for _ in range(2))
    assert a.shape == (2, 21) and torch.equal(a, b)
