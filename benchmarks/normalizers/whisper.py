"""Whisper's own normalizers (Radford et al. 2022, arXiv:2212.04356, appendix C), by transformers.

whisper-basic: lowercase; drop what stands in brackets; every mark, symbol and punctuation character
becomes a space. It destroys scripts whose vowels are combining marks (Devanagari, Thai and others):
words fall apart into consonants and wrong vowels go unseen (Manohar et al. 2024, arXiv:2409.02449).

whisper-english: besides, spells numbers as digits, contractions in full and British words the
American way. The list of spellings is a file of Whisper's checkpoints, normalizer.json; it is
fetched once and then comes from the Hugging Face cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache

from export.problem import Problem

SPELLINGS = ("openai/whisper-tiny", "normalizer.json")
"""Where the list is; all of Whisper's checkpoints on the hub carry the same."""


def whisper_basic(text: str) -> str:
    """Normalise a sentence; the result has single spaces and none at its ends."""
    return " ".join(_basic()(text).split())


def whisper_english(text: str) -> str:
    """As whisper_basic, by the rules for English. Raises Problem where the spellings are not here.

    Unlike the others it is not idempotent: "it's" becomes "it is", "is" may meet a number next.
    """
    return " ".join(_english()(text).split())


@lru_cache(maxsize=1)
def _basic() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


@lru_cache(maxsize=1)
def _english() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(spellings())


def spellings() -> dict[str, str]:
    """British -> American."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, name = SPELLINGS
    try:
        with open(hf_hub_download(repository, name), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise Problem(
            f"whisper-english needs Whisper's list of spellings, {name} of {repository}, and it "
            "could neither be fetched nor found in the Hugging Face cache",
            hint=f"fetch it once with a network: hf download {repository} {name}; "
            "or use --normalizer whisper-basic",
        ) from error
