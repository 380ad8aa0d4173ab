"Written layers: attention against loops of gradient descent, instructions against arithmetic."

from itertools import product

import pytest
import torch
from torch import nn

from transformer_course.block import Block
from transformer_course.experiments.operators import (
    HandBlock,
    LinearAttention,
    SGDProgram,
    division,
    dot,
    gd_layer,
    linear_attention,
    product_units,
    registers,
)
from transformer_course.experiments.regression import gradient_descent


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_attention_is_a_double_loop():
    q, k, v = noise(2, 3, 4), noise(2, 5, 4, seed=1), noise(2, 5, 6, seed=2)
    slow = torch.zeros(2, 3, 6).double()
    for b, t in product(range(2), range(3)):
        for s in range(5):
            slow[b, t] += (q[b, t] @ k[b, s]) * v[b, s]
    torch.testing.assert_close(linear_attention(q, k, v), slow)


def test_layers_leave_remainders_with_the_examples():
    x, y = noise(4, 9, 3), noise(4, 9, seed=1)
    z = torch.cat([x, y[..., None]], -1)
    for steps in (1, 2, 3):
        z = gd_layer(3, 0.2)(z, z)
        w = gradient_descent(x, y, steps, 0.2)
        torch.testing.assert_close(z[..., -1], y - (x * w[:, None]).sum(-1), atol=1e-12, rtol=0)
        assert torch.equal(z[..., :3], x)
    layer = LinearAttention(4)
    assert torch.equal(layer(z.float(), z.float()), z.float())


def test_order_of_examples_does_not_matter_to_a_layer():
    z, order, layer = noise(2, 7, 4), [3, 0, 6, 1, 5, 2, 4], gd_layer(3, 0.2, 0.1)
    torch.testing.assert_close(layer(z, z)[:, order], layer(z[:, order], z[:, order]))


def test_written_blocks_start_as_the_identity_and_run_blocks_code():
    block, z = HandBlock(5, 8), noise(2, 3, 5)
    assert torch.equal(block(z), z) and type(block).forward is Block.forward
    assert not any(p.requires_grad for p in block.parameters())


def test_instructions_are_arithmetic():
    z = noise(20, 3, 6) * 10
    block = HandBlock(6, 12).mul({0: 1.0}, {0: 1.0}, 3)
    block.mul({0: 2.0, None: 1.0}, {1: -1.0, 2: 0.5}, 4, factor=3.0)
    got, expected = block(z) - z, torch.zeros_like(z)
    expected[..., 3] = z[..., 0] ** 2
    expected[..., 4] = 3 * (2 * z[..., 0] + 1) * (0.5 * z[..., 2] - z[..., 1])
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    assert not got[..., [0, 1, 2, 5]].any()
    wiped = HandBlock(6, 4).affine({5: -1.0}, 5)(z)[..., 5]
    torch.testing.assert_close(wiped, torch.zeros_like(wiped), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match='hidden=7'):
        HandBlock(6, 7).mul({0: 1.0}, {1: 1.0}, 2).mul({0: 1.0}, {1: 1.0}, 2)


def test_four_units_are_a_product():
    z = noise(50, 3) * 10
    weight, bias, signs = product_units({0: 2.0, None: -1.5}, {1: 1.0, 2: 0.5}, 3)
    units = torch.nn.functional.relu(z @ weight.T + bias) ** 2
    assert weight.shape == (4, 3) and signs.sum() == 0
    expected = (2 * z[:, 0] - 1.5) * (z[:, 1] + 0.5 * z[:, 2])
    torch.testing.assert_close(units @ signs, expected, atol=1e-10, rtol=0)


def test_registers_share_no_channel_and_dot_adds_up():
    at = registers(x=3, y=1, w=3)
    assert list(at) == ['x', 'y', 'w'] and sum(at.values(), []) == list(range(7))
    z = noise(20, 2, 7)
    block = dot(HandBlock(7, 12), at['x'], at['w'], at['y'][0])
    expected = torch.einsum('btd,btd->bt', z[..., :3], z[..., 4:])
    torch.testing.assert_close((block(z) - z)[..., 3], expected, atol=1e-12, rtol=0)
    assert block.used == 12


def test_mov_moves_only_what_is_ordered():
    z = noise(4, 5, 9)
    z[:, 0], z[..., 4:] = 0, torch.eye(5).double()
    got, want = HandBlock(9, 4).mov([0, 1], [2, 3], range(4, 9), {2: 1, 4: 3})(z), z.clone()
    for t, s in {2: 1, 4: 3}.items():
        want[:, t, 2:4] += z[:, s, :2]
    assert torch.equal(got, want)


@pytest.mark.parametrize('b', [0.3, -0.5, 4.0, -20.0])
def test_division(b):
    a = noise(30)
    z = torch.zeros(30, 1, 9).double()
    z[:, 0, 0], z[:, 0, 1] = a, b
    assert (division()(z)[:, 0, 8] - a / b).abs().max() < 1e-10 and len(division(polish=False)) == 3


@pytest.mark.parametrize('d, k, decay', [(1, 1, 0.0), (3, 2, 0.0), (2, 6, 0.3)])
def test_program_is_torch_sgd(d, k, decay):
    x, y, start = noise(1, k + 1, d), noise(1, k, seed=1), noise(1, d, seed=2)
    w = nn.Parameter(start[0].clone())
    optimizer = torch.optim.SGD([w], lr=0.05)
    for i in range(k):
        optimizer.zero_grad()
        ((x[0, i] @ w - y[0, i]) ** 2 + decay * (w @ w)).backward()
        optimizer.step()
    got, pred = SGDProgram(d, k, 0.05, decay)(x, y, start)
    torch.testing.assert_close(got[0], w.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(pred[0], x[0, -1] @ w.detach(), atol=1e-10, rtol=0)


def test_program_refuses_and_counts():
    program = SGDProgram(2, 3, 0.1)
    assert len(program.blocks) == 7 and program.C == 14
    for x, y in ((noise(1, 3, 2), noise(1, 3)), (noise(1, 4, 2), noise(1, 2))):
        with pytest.raises(ValueError, match='give'):
            program(x, y, noise(1, 2))
