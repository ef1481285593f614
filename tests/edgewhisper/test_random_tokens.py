"""Random tokens: which ones are drawn, and how often."""

from edgewhisper.random_tokens import drawn, text_tokens


def test_special_tokens_are_never_drawn(processor):
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    rows = drawn(tokenizer, 20, 50, seed=0)
    assert [len(row) for row in rows] == [50] * 20
    assert not special & {token for row in rows for token in row}


def test_a_seed_draws_the_same_tokens_again(processor, seed):
    first, again, other = (drawn(processor.tokenizer, 2, 40, s) for s in (seed, seed, seed + 1))
    assert first == again != other


def test_text_tokens_are_the_vocabulary_without_special_tokens(processor):
    tokenizer = processor.tokenizer
    ids = text_tokens(tokenizer)
    assert ids == sorted(set(ids))
    assert len(ids) == len(tokenizer) - len(
        {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    )
