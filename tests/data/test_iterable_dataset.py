"""Rows from an iterable of the user's, such as a DataLoader."""

import numpy as np
import pytest
import torch

from guides import mean_field_normal
from inference import batches, fit
from tests.helpers.row_sources import OPTIONS, ROWS, loader, model


def test_a_loader_draws_from_the_fit_s_seed_and_is_left_as_it_was(data):
    source = loader(None, *data)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = {**OPTIONS, "batch_size": None, "steps": 40}
    fits = [fit(model, mean_field_normal(model), source, **options, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert source.sources[0].generator is None
    assert source.sources[0].sampler.generator is None
    assert np.array_equal(fits[0].losses, fits[1].losses)
    assert not np.array_equal(fits[0].losses, fits[2].losses)
    assert fits[0].record.options["batch_size"] == 64


def test_a_source_that_draws_from_the_process_s_random_numbers_has_its_own(data):
    def shuffled():
        order = np.random.permutation(ROWS)
        for rows in order.reshape(-1, 100):
            yield tuple(part[rows] for part in data)

    source = batches(shuffled, num_data=ROWS)
    state = np.random.get_state()[1].copy()
    fits = [fit(model, mean_field_normal(model), source, steps=25, lr=0.01, progress=False) for _ in range(2)]
    assert np.array_equal(fits[0].losses, fits[1].losses)
    assert np.array_equal(np.random.get_state()[1], state)


def test_a_source_may_fill_the_same_memory_again(data):
    x, y = (part.astype(np.float32) for part in data)

    def reusing():
        rows, values = np.empty_like(x[:50]), np.empty_like(y[:50])
        for begin in range(0, ROWS, 50):
            rows[:], values[:] = x[begin : begin + 50], y[begin : begin + 50]
            yield rows, values

    fresh = [(x[begin : begin + 50], y[begin : begin + 50]) for begin in range(0, ROWS, 50)]
    runs = [
        fit(model, mean_field_normal(model), batches(source, num_data=ROWS), steps=60, lr=0.01, progress=False)
        for source in (reusing, fresh)
    ]
    assert np.array_equal(runs[0].losses, runs[1].losses)


def test_an_error_of_the_source_is_heard(data):
    def failing():
        yield from ((data[0][:50], data[1][:50]) for _ in range(5))
        raise ConnectionError("the bucket is gone")

    with pytest.raises(ConnectionError, match="bucket"):
        fit(model, mean_field_normal(model), batches(failing, num_data=ROWS), steps=50, lr=0.01, progress=False)
