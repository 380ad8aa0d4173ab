"The posterior over a list of codes, against one that weighs every code by hand."

import pytest
import torch

from transformer_course.experiments.few_shot import cipher_prompts
from transformer_course.experiments.task_diversity import table_bayes


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def weighed(idx, tables, error):
    "Bayes with answers that are wrong with probability `error`, in plain Python and logarithms."
    A = tables.shape[1]
    out = torch.zeros(idx.shape[0], idx.shape[1] // 2, A, dtype=torch.double)
    good, bad = torch.tensor([1 - error, error / (A - 1)], dtype=torch.double).log().tolist()
    for b, row in enumerate(idx.tolist()):
        logs = torch.zeros(len(tables), dtype=torch.double)
        for k in range(len(row) // 2):
            letter, capital = row[2 * k], row[2 * k + 1] - A
            for weight, table in zip(logs.softmax(0).tolist(), tables.tolist()):
                out[b, k, table[letter]] += weight
            says = tables[:, letter] == capital
            logs += torch.where(says, good, bad)
    return out


@pytest.mark.parametrize('known', [True, False])
@pytest.mark.parametrize('n_codes', [1, 3, 12])
def test_it_is_bayes_with_rare_errors(n_codes, known):
    tables = torch.rand(n_codes, 6, generator=rng(n_codes)).argsort(1)
    idx = cipher_prompts(20, 14, 6, rng(1), tables=tables if known else None)[0]
    torch.testing.assert_close(table_bayes(idx, tables), weighed(idx, tables, 1e-12))


def test_listed_codes_are_certain_once_seen():
    tables = torch.rand(8, 10, generator=rng(2)).argsort(1)
    idx = cipher_prompts(50, 20, 10, rng(3), tables=tables)[0]
    keys, truth = idx[:, ::2], idx[:, 1::2] - 10
    seen = (keys[:, :, None] == keys[:, None, :]).tril(-1).any(-1)
    p = table_bayes(idx, tables)
    torch.testing.assert_close(p.sum(-1), torch.ones(50, 20, dtype=torch.double))
    assert (p.gather(-1, truth[..., None])[..., 0][seen] == 1).all()


def test_nothing_later_counts():
    tables = torch.rand(8, 10, generator=rng(4)).argsort(1)
    idx = cipher_prompts(9, 12, 10, rng(5))[0]
    for k in (1, 5, 11):
        assert torch.equal(table_bayes(idx, tables)[:, :k], table_bayes(idx[:, : 2 * k], tables))
    changed = idx.clone()
    changed[:, -1] = 10 + (idx[:, -1] - 9) % 10  # another last answer
    assert torch.equal(table_bayes(idx, tables), table_bayes(changed, tables))


@pytest.mark.parametrize('idx, tables', [((1, 3), (2, 5)), ((1, 4), (5,))])
def test_bad_input_is_named(idx, tables):
    with pytest.raises(ValueError, match=r'.{20,}'):
        table_bayes(torch.zeros(idx, dtype=torch.long), torch.zeros(tables, dtype=torch.long))
