"""Are two Whispers the same function? Their logits on random sound and prompts, with caches."""

from __future__ import annotations

import torch


@torch.no_grad()
def logits(model, features, prompt):
    """Logits of every position: at once, and token by token with the cache."""
    encoded = model.model.encoder(features)
    at_once = model(encoder_outputs=encoded, decoder_input_ids=prompt).logits
    cache, steps = None, []
    for token in prompt.split(1, dim=1):
        step = model(
            encoder_outputs=encoded,
            decoder_input_ids=token,
            past_key_values=cache,
            use_cache=True,
        )
        cache = step.past_key_values
        steps.append(step.logits)
    return at_once, torch.cat(steps, dim=1)


def largest_difference(one, other, rng):
    """Largest difference of logits on a random window and prompt, with and without the cache."""
    config = one.config
    features = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    prompt = torch.randint(config.vocab_size, (1, int(rng.integers(2, 9))))
    pairs = zip(logits(one, features, prompt), logits(other, features, prompt), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
