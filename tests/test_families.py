"""What differs between models is data, and a request's values override it."""

from transformers import GenerationConfig

import api


def test_a_value_given_is_used_zero_included():
    sampling = api.Sampling().override({"temperature": 0.0, "top_k": 0, "seed": 0})
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.0, 0, 0)
    assert sampling.top_p == api.Sampling().top_p


def test_a_checkpoint_sets_the_defaults_and_we_fill_the_rest():
    defaults = api.checkpoint_defaults(
        GenerationConfig(do_sample=True, temperature=0.3, top_k=7, max_new_tokens=33)
    )
    assert defaults == api.Sampling(max_new_tokens=33, temperature=0.3, top_k=7)


def test_a_checkpoint_that_does_not_sample_is_greedy():
    assert api.checkpoint_defaults(GenerationConfig(do_sample=False)).temperature == 0


def test_a_checkpoint_that_says_nothing_leaves_our_defaults():
    assert api.checkpoint_defaults(GenerationConfig()) == api.Sampling(1024, 0.8, 50, 0.8, 0, 1.0)
