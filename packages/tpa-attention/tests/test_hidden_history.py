"""Hidden states of the newest tokens against lists of all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_attention.torch.hidden_history import HiddenHistory


def states(tokens, seed, rows=3):
    return torch.randn(rows, tokens, 2, generator=torch.Generator().manual_seed(seed))


def agrees(history, lists):
    expected = torch.stack([kept[-1] if kept else torch.zeros(2) for kept in lists])
    return torch.equal(history.last, expected)


@settings(max_examples=25, deadline=None)
@given(
    rewind=st.integers(0, 4),
    steps=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(0, 6), min_size=3, max_size=3)), max_size=4
    ),
    order=st.permutations(range(3)),
)
def test_the_last_state_is_right_after_any_steps_that_are_allowed(rewind, steps, order):
    history, lists = HiddenHistory(3, rewind, torch.zeros(2)), [[], [], []]
    known = [0, 0, 0]
    for seed, (tokens, back) in enumerate(steps):
        new = states(tokens, seed)
        history.push(new)
        lists = [kept + list(row) for kept, row in zip(lists, new, strict=True)]
        known = [min(k + tokens, rewind + 1) for k in known]
        assert agrees(history, lists)
        back = [min(n, len(kept)) for n, kept in zip(back, lists, strict=True)]
        left = [len(kept) - n for n, kept in zip(back, lists, strict=True)]
        allowed = [not n or not rest or n < k for n, rest, k in zip(back, left, known, strict=True)]
        if not all(allowed):
            with pytest.raises(ValueError, match=f"of sequence {allowed.index(False)} under kv_shift"):
                history.check_rewind(back, left)
            continue
        history.check_rewind(back, left)
        history.rewind(back, left)
        lists = [kept[:rest] for kept, rest in zip(lists, left, strict=True)]
        known = [k - n if rest else 0 for k, n, rest in zip(known, back, left, strict=True)]
        assert agrees(history, lists)
        history.reorder(torch.tensor(order))
        lists, known = [lists[i] for i in order], [known[i] for i in order]
        assert agrees(history, lists)


def test_rows_come_and_go_in_the_same_memory_until_there_are_more():
    history = HiddenHistory(3, 2, torch.zeros(2))
    hidden = states(2, 0)
    history.push(hidden)
    address = history.last.untyped_storage().data_ptr()
    history.select([2, None])
    assert torch.equal(history.last, torch.stack([hidden[2, 1], torch.zeros(2)]))
    history.rewind([1, 0], [1, 0])
    assert torch.equal(history.last[0], hidden[2, 0])
    history.select([0, 1, 0])
    assert torch.equal(history.last[2], hidden[2, 0])
    assert history.last.untyped_storage().data_ptr() == address
    history.select([0, 0, 1, 1])
    assert history.last.shape == (4, 2)
    history.clear()
    assert not history.last.any()


@pytest.mark.parametrize("rewind", [0, 1, 5])
def test_a_state_goes_into_a_history_of_another_depth(rewind):
    history, other = HiddenHistory(3, 2, torch.zeros(2)), HiddenHistory(3, rewind, torch.zeros(2))
    hidden = states(4, 1)
    history.push(hidden)
    other.load(*history.state())
    assert torch.equal(other.last, hidden[:, -1])
    back = min(rewind, 2)
    other.check_rewind([back] * 3, [9] * 3)
    other.rewind([back] * 3, [9] * 3)
    assert torch.equal(other.last, hidden[:, -1 - back])
    with pytest.raises(ValueError, match=rf"at most 0 tokens of sequence 0 .*\(rewind={rewind}\)"):
        other.check_rewind([1, 0, 0], [8] * 3)


@pytest.mark.parametrize("shape", [(2, 1, 2), (3, 1, 4), (3, 2)])
def test_states_of_another_shape_are_refused(shape):
    history = HiddenHistory(3, 2, torch.zeros(2))
    with pytest.raises(ValueError, match=r"hidden must have shape \(3, T, 2\), got"):
        history.push(torch.ones(shape))
    assert not history.last.any()
