"""Weights of one byte: close to the floats, whatever the shape; the same from a file and from a model; never a surprise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.checkpoint import save_checkpoint
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig, POSITIONS
from transformer_course.int8 import Int8Linear, load_int8, quantize_rows, to_int8

thorough = settings(deadline=None, derandomize=True, max_examples=40)


@thorough
@given(st.integers(1, 40), st.integers(1, 40), st.floats(-6, 6), st.integers(0, 1000))
def test_rows_are_off_by_half_a_step_at_most(O, I, size, seed):
    w = torch.randn(O, I, generator=torch.Generator().manual_seed(seed)) * 10**size
    w8, scale = quantize_rows(w)
    assert (
        w8.shape == w.shape and scale.shape == (O,) and (w8.abs().amax(1) == 127).all()
    )  # every row uses all its steps
    assert ((w8 * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()


@thorough
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(1, 4), max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_a_layer_is_near_the_float_one(O, I, batch, bias, kernel, seed):
    g = torch.Generator().manual_seed(seed)
    layer, x = nn.Linear(I, O, bias=bias), torch.randn(*batch, I, generator=g)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=g)
        exact, rough = layer(x), Int8Linear(layer.weight, layer.bias, kernel)(x)
    bound = 0.5 * (
        x.abs().sum(-1, keepdim=True) * layer.weight.abs().amax(1) / 127
        + (x.amax() - x.amin().clamp(max=0)).clamp(min=x.abs().max())
        / 255
        * 2
        * layer.weight.abs().sum(1)
    )
    assert rough.shape == exact.shape and ((rough - exact).abs() <= bound.detach() + 1e-4).all()


def test_the_file_of_a_tied_model_gives_the_tied_head(tmp_path):
    model = GPT(
        GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8),
        torch.Generator().manual_seed(0),
    )
    for p in model.parameters():
        p.data += 0.3 * torch.randn(
            p.shape, generator=torch.Generator().manual_seed(p.numel())
        )  # biases begin as zeros
    save_checkpoint(tmp_path / 'checkpoint', model)
    loaded, _ = load_int8(tmp_path / 'checkpoint')
    ids = torch.arange(8)[None]
    assert (loaded(ids)[0] - model.eval()(ids)[0]).abs().max() < 0.2
    assert not any(isinstance(m, nn.Linear) for m in loaded.modules()) and not any(
        p.is_meta for p in [*loaded.parameters(), *loaded.buffers()]
    )


def test_a_damaged_file_is_refused(tmp_path):
    save_checkpoint(
        tmp_path / 'checkpoint',
        GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)),
    )
    file = tmp_path / 'checkpoint' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match='checksum'):
        load_int8(tmp_path / 'checkpoint')


@pytest.mark.parametrize('position', POSITIONS)
def test_generation_runs_with_every_kind_of_position(position):
    config = GPTConfig(
        block_size=12,
        vocab_size=13,
        n_layer=2,
        n_head=2,
        n_embd=16,
        position=position,
        tie_weights=False,
    )
    model = to_int8(GPT(config, torch.Generator().manual_seed(0)))
    a, b = (generate(model, torch.zeros(2, 1).long(), 20, temperature=0) for _ in range(2))
    assert a.shape == (2, 21) and torch.equal(a, b)
