"""Normalizers: their output for sentences, and what they must keep."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.normalizers import BY_LANGUAGE, NORMALIZERS, name_for, normalizer
from benchmarks.normalizers.hindi import Hindi, cardinal, hindi_strict, hindi_wer
from benchmarks.normalizers.whisper import SPELLINGS
from benchmarks.speech.clips import Clip, read_manifest
from benchmarks.wer import score
from export.problem import Problem

ZWJ, ZWNJ, NBSP = "\u200d", "\u200c", "\u00a0"
IDEMPOTENT = [name for name in NORMALIZERS if name != "whisper-english"]  # see its docstring


def test_an_unknown_normalizer_lists_the_known_ones():
    with pytest.raises(Problem, match="unknown normalizer 'vowels'") as error:
        normalizer("vowels")
    assert all(name in error.value.hint for name in NORMALIZERS)


@pytest.mark.parametrize("name", IDEMPOTENT)
@given(text=st.text(max_size=40))
def test_normalising_twice_changes_nothing(name, text):
    clean = NORMALIZERS[name]
    assert clean(clean(text)) == clean(text)


DEVANAGARI = "".join(map(chr, range(0x0900, 0x0980)))
TROUBLE = "ािेैोौॅॉअआए़्ंँःऽयनमणदबडछजर"


@pytest.mark.parametrize("name", ["hindi-strict", "hindi-wer", "vistaar"])
@given(
    text=st.text(DEVANAGARI + 8 * TROUBLE + f"09.,:%₹()[]-'\"“’ aZ{ZWJ}{ZWNJ}{NBSP}", max_size=30)
)
def test_normalising_devanagari_twice_changes_nothing(name, text):
    clean = NORMALIZERS[name]
    assert clean(clean(text)) == clean(text)


@given(text=st.text("aeonygbtkɛɔɲŋÈÒÑ'’ 019,.-\u0300\u0301\u0302\u0303\u0323", max_size=30))
def test_normalising_bambara_twice_changes_nothing(text):
    clean = NORMALIZERS["bambara"]
    assert clean(clean(text)) == clean(text)


# ---------------------------------------------------------------------------------- Whisper's own


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,   World!", "hello world"),
        ("it's <noise> [laughs] fine (he said)", "it s fine"),
        ("ﬁve ½", "five 1 2"),
        ("", ""),
    ],
)
def test_whisper_basic_on_examples(text, expected):
    assert NORMALIZERS["whisper-basic"](text) == expected


def test_whisper_basic_blanks_every_vowel_sign():
    """This is why Hindi has its own normalizer."""
    assert NORMALIZERS["whisper-basic"]("हमने चुना।") == "हमन च न"


def test_whisper_english_uses_its_spelling_list():
    clean = NORMALIZERS["whisper-english"]
    assert clean("Mr. Smith won't [cough] pay twenty five Pounds for that colour!") == (
        "mister smith will not pay £25 for that color"
    )


def test_the_list_of_spellings_is_openais():
    content = SPELLINGS.read_bytes()
    assert hashlib.sha256(content).hexdigest().startswith("6607f948be98")
    assert "MIT License" in SPELLINGS.with_suffix(".LICENSE").read_text()


# ------------------------------------------------------------------------------------------ Hindi

PAIRS = {  # input -> hindi-wer
    "danda": ("हमने उस उम्मीदवार को चुना।", "हमने उस उम्मीदवार को चुना"),
    "chandrabindu": ("आप कहाँ रहते हैं?", "आप कहां रहते हैं"),
    "anusvara": ("आप कहां रहते हैं", "आप कहां रहते हैं"),
    "nukta": ("अंग्रेज़ी वैश्विक भाषा है।", "अंग्रेजी वैश्विक भाषा है"),
    "nukta-composed": ("अंग्रे\u095bी", "अंग्रेजी"),
    "nukta-of-d": ("सड़क की मरम्मत जारी है।", "सड\u093cक की मरम्मत जारी है"),
    "nukta-of-d-composed": ("स\u095cक", "सड\u093cक"),
    "nukta-of-dh": ("पढ़ाई", "पढ\u093cाई"),
    "nasal-n": ("हिन्दी और हिंदी", "हिंदी और हिंदी"),
    "nasal-velar": ("गङ्गा", "गंगा"),
    "nasal-retroflex": ("ठण्डा", "ठंडा"),
    "nasal-labial": ("कम्पनी", "कंपनी"),
    "nasal-of-another-class": ("अन्न, जन्म, निम्न, अन्य", "अन्न जन्म निम्न अन्य"),
    "joiner": (f"क्{ZWJ}या बात है?", "क्या बात है"),
    "non-joiner": (f"राष्{ZWNJ}ट्र", "राष्ट्र"),
    "double-danda": ("तीन बीस बजे हैं ॥", "तीन बीस बजे हैं"),
    "year": ("२०२५ में", "दो हजार पच्चीस में"),
    "hundred": ("१०० किलोमीटर", "एक सौ किलोमीटर"),
    "hundred-ascii": ("100 किलोमीटर", "एक सौ किलोमीटर"),
    "grouped": ("1,25,000 रुपये", "एक लाख पच्चीस हजार रुपए"),
    "rupees": ("₹50", "पचास रुपए"),
    "per-cent": ("70% लोग", "सत्तर प्रतिशत लोग"),
    "six": ("छ: लोग / छः लोग / छह लोग", "छह लोग छह लोग छह लोग"),
    "visarga-as-colon": ("दु:ख और दुःख", "दुख और दुख"),
    "colon-as-visarga": ("आरोपः मेवाणी", "आरोप मेवाणी"),
    "colon": ("फैसला: शीला", "फैसला शीला"),
    "endings": ("गये गयी नये चाहिये आयेगा", "गए गई नए चाहिए आएगा"),
    "pronoun": ("ये लोग", "ये लोग"),
    "mistyped-vowels": ("डाॅक्टर अौर आॅफिस", "डॉक्टर और ऑफिस"),
    "noises": ("[शोर] हाँ (हँसते हुए) चलो", "हां चलो"),
    "quotes": ("\"सब ठीक?\" उसने कहा- 'हाँ!'", "सब ठीक उसने कहा हां"),
    "code-mixed": ("Google Pay का खेल", "google pay का खेल"),
    "no-break-space": (f"पाँच{NBSP}बजे", "पांच बजे"),
    "doubled-sign": ("जानेेे", "जाने"),
    "late-nukta": ("ज\u093e\u093cत", "जात"),
    "hyphens": ("कोई-न-कोई जुगाड़ कर लूँगा।", "कोई न कोई जुगाड\u093c कर लूंगा"),
    "abbreviation": ("डॉ॰ शर्मा", "डॉ शर्मा"),
    "candra-o": ("ऑफ़िस", "ऑफिस"),
    "nukta-of-ph": ("फ़ोन", "फोन"),
    "decimal": ("15.5 किमी", "पंद्रह दशमलव पांच किमी"),
    "ordinal": ("21वीं सदी", "इक्कीसवीं सदी"),
    "rupees-in-lakhs": ("₹2.5 लाख", "दो दशमलव पांच लाख रुपए"),
    "telephone": ("0120", "शून्य एक दो शून्य"),
    "a-list-is-no-number": ("1,2,3", "एक दो तीन"),
    "cluster-before-y": ("मूल्ये", "मूल्ये"),
}


@pytest.mark.parametrize(("text", "expected"), PAIRS.values(), ids=PAIRS)
def test_hindi_wer(text, expected):
    assert hindi_wer(text) == expected


STRICT = {
    "danda": ("हमने उस उम्मीदवार को चुना।", "हमने उस उम्मीदवार को चुना"),
    "chandrabindu": ("हाँ, कहाँ?", "हाँ कहाँ"),
    "digits": ("२०२५ में 1,25,000", "2025 में 125000"),
    "nukta-composed": ("अंग्रे\u095bी स\u095cक", "अंग्रेज\u093cी सड\u093cक"),
    "nukta-that-nfc-composes": ("\u0929\u0931\u0934", "न\u093cर\u093cळ\u093c"),
    "late-nukta": ("ज\u093e\u093cत", "ज\u093cात"),
    "nasals": ("हिन्दी", "हिन्दी"),
    "visarga-as-colon": ("दु:ख छ: फैसला: शीला", "दुःख छः फैसला शीला"),
    "endings": ("गये नयी", "गये नयी"),
    "mistyped-vowels": ("डाॅक्टर अौर आॅफिस", "डॉक्टर और ऑफिस"),
}


@pytest.mark.parametrize(("text", "expected"), STRICT.values(), ids=STRICT)
def test_hindi_strict(text, expected):
    assert hindi_strict(text) == expected


@pytest.mark.parametrize("pair", ["कि की", "बन वन", "शाम साम", "कॉफी कोफी", "जगत् जगत"])
def test_different_words_stay_different(pair):
    one, other = pair.split()
    assert hindi_wer(one) == one != hindi_wer(other)


def test_every_switch_changes_its_spellings_only():
    texts = {
        "numbers": "6",
        "avagraha": "सोऽहम्",
        "chandrabindu": "माँ",
        "nasals": "हिन्दी",
        "nukta": "ज़मीन",
        "visarga": "प्रायः",
        "endings": "गये",
    }
    assert texts.keys() == vars(Hindi()).keys()
    for switch, text in texts.items():
        assert hindi_strict(text) == replace(hindi_wer, **{switch: False})(text) == text
        assert hindi_wer(text) == replace(hindi_strict, **{switch: True})(text) != text


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "शून्य"),
        (99, "निन्यानवे"),
        (110, "एक सौ दस"),
        (1947, "एक हजार नौ सौ सैंतालीस"),
        (10_00_000, "दस लाख"),
        (12_34_56_789, "बारह करोड़ चौंतीस लाख छप्पन हजार सात सौ नवासी"),
    ],
)
def test_numbers_are_read_in_the_indian_system(number, words):
    assert cardinal(number) == words


def test_all_numbers_have_different_words():
    assert len({hindi_wer(str(number)) for number in range(1200)}) == 1200


CONSONANTS = "कखगघचछजझटठडढतथदधनपफबभमयरलवशसह"
VOWELS = "अआइईउऊऋएऐओऔऑ"
SIGNS = "ािीुूृेैोौॉ"
syllables = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(CONSONANTS),
    st.sampled_from(["", "्र", "्य", "़"]),
    st.sampled_from(["", *SIGNS]),
    st.sampled_from(["", "", "ं", "ँ"]),
)
hindi_words = st.lists(syllables | st.sampled_from(VOWELS), min_size=1, max_size=5).map("".join)
sentences = st.lists(st.tuples(hindi_words, st.sampled_from([" ", "। ", ", ", "-", "? “"]))).map(
    lambda pairs: "".join(word + mark for word, mark in pairs)
)


@given(sentences)
def test_no_vowel_sign_is_lost_in_strict(text):
    found = hindi_strict(text)
    signs = [char for char in found if unicodedata.category(char)[0] == "M"]
    assert signs == [char for char in text if unicodedata.category(char)[0] == "M"]
    assert found.split() == re.findall(r"[\u0900-\u0963]+", text)


@given(sentences)
def test_no_vowel_is_lost_in_wer(text):
    """-ये becomes -ए, a vowel letter instead of a sign. छ is left out because छ and छे become छह."""
    text = text.replace("छ", "ख")
    found, vowels = hindi_wer(text), VOWELS + SIGNS
    assert [char in vowels for char in found].count(True) == [c in vowels for c in text].count(True)
    kept = re.compile(f"[{SIGNS}]")
    for word, was in zip(found.split(), re.findall(r"[\u0900-\u0963]+", text), strict=True):
        if not re.search("(य\u093c?|\u095f)[ीे][ंँ]?(ग[ाीे])?$", was):  # with nukta, or without
            assert kept.findall(word) == kept.findall(was)


@pytest.mark.parametrize("clean", [hindi_strict, hindi_wer], ids=["strict", "wer"])
@given(text=st.text(DEVANAGARI[0x04:0x3A] + SIGNS, min_size=1, max_size=8))
def test_no_hindi_word_is_emptied(clean, text):
    assert clean(f"क{text}")


@pytest.mark.parametrize("clean", [hindi_strict, hindi_wer], ids=["strict", "wer"])
@given(text=st.text("abcXYZ .,;:!?'\"-/", max_size=20))
def test_english_is_lowercased_without_punctuation(clean, text):
    assert clean(text) == " ".join(re.findall("[a-z]+", text.lower()))


# ---------------------------------------------------------------------------------------- Vistaar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हमने “चुना”।", "हमने चुना"),
        ("कोई-न-कोई", "कोईनकोई"),
        ("अंग्रे\u095bी", "अंग्रेज\u093cी"),
        (f"क्{ZWJ}या ॲप २०", "क्या एप २०"),
        ("Google का", "Google का"),
    ],
    ids=["punctuation", "hyphens-join", "nukta-composed", "joiner", "latin-keeps-its-case"],
)
def test_vistaar_deletes_punctuation_and_keeps_spelling(text, expected):
    assert NORMALIZERS["vistaar"](text) == expected


# ---------------------------------------------------------------------------------------- Bambara


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("An b'a fɔ!", "an bɛ a fɔ"),
        ("N T’A DƆN", "n tɛ a dɔn"),
        ("a y'a ta", "a ye a ta"),
        ("U TAARA K'A TA", "u taara ka a ta"),
        ("k'a la", "kɛ a la"),
        ("a y'a fɔ k'an ka taa", "a ye a fɔ ko an ka taa"),
        ("n'a nana", "ni a nana"),
        ("n'a ma", "na a ma"),
        ("y 'a", "ye a"),
        ("jir'i", "jir i"),
        ("bè sò", "bɛ sɔ"),
        ("mɔ̀gɔ́ sàbá", "mɔgɔ saba"),
        ("Nyè ñi kongo", "ɲɛ ɲi koŋo"),
        ("ƐƆƝŊ", "ɛɔɲŋ"),
        ("mɔgɔ 25", "mɔgɔ mugan ni duuru"),
        ("123 1,000 200 40", "kɛmɛ ni mugan ni saba waa kelen kɛmɛ fila bi naani"),
        ("[nisɔn] (yɛlɛ) o ye", "o ye"),
    ],
)
def test_bambara(text, expected):
    assert NORMALIZERS["bambara"](text) == expected


# --------------------------------------------------------------------------------- by language


def clips_in(*pairs: tuple[str, str]) -> list[Clip]:
    return [Clip(audio=None, text=text, lang=lang) for lang, text in pairs]


@pytest.mark.parametrize(
    ("lang", "text", "name"),
    [
        ("en", "one two", "whisper-basic"),
        ("en", "three one four", "whisper-basic"),
        ("en", "he took two of the colours", "whisper-english"),
        ("en-GB", "it's fine", "whisper-english"),
        ("fr", "déjà vu", "whisper-basic"),
        ("hi", "हाँ", "hindi-wer"),
        ("hi-IN", "हाँ", "hindi-wer"),
        ("bm", "tan", "bambara"),
    ],
)
def test_a_language_chooses_its_normalizer(lang, text, name):
    assert name_for(clips_in((lang, text))) == name
    assert set(BY_LANGUAGE.values()) <= NORMALIZERS.keys()


@pytest.mark.parametrize("lang", ["ta", "en"], ids=["tamil", "a-manifest-that-forgot-lang"])
def test_a_language_without_a_normalizer_lists_the_known_ones(lang):
    clips = clips_in((lang, "தமிழ் மொழி"))
    with pytest.raises(Problem, match=rf"{lang!r}.* 4 of 9 characters into spaces") as error:
        name_for(clips)
    assert "hi has hindi-wer, bm has bambara, en has whisper-english" in error.value.hint
    assert all(name in error.value.hint for name in NORMALIZERS)
    assert name_for(clips, otherwise="none") == "none"


def test_each_language_of_a_mixed_set_has_its_own_normalizer():
    clips = clips_in(("hi", "हाँ"), ("en-US", "the colour"), ("de", "ja"), ("fr", "oui"))
    name = name_for(clips)
    assert name == "by-language:en=whisper-english,hi=hindi-wer,*=whisper-basic"
    assert normalizer(name, "en-GB")("Colour!") == "color"
    assert normalizer(name, "de")("Colour!") == "colour"
    assert normalizer(name, "hi")("हाँ") == "हां"
    found = score(["colour", "colour"], ["color", "color"], name, ["en", "de"])
    assert (found.wer, found.normalizer) == (0.5, name)
    assert name_for(clips_in(("de", "ja"), ("fr", "oui"))) == "whisper-basic"
    assert name_for(clips_in(("en", "one two"), ("fr", "oui"))) == "whisper-basic"


def test_incomplete_by_language_names_are_refused():
    with pytest.raises(Problem, match="unknown normalizer 'vowels'"):
        normalizer("by-language:en=vowels")
    with pytest.raises(Problem, match="has no entry for the language 'de'") as error:
        normalizer("by-language:en=whisper-english", "de")
    assert "add de=NAME" in error.value.hint


def test_the_shipped_clips_get_a_suitable_normalizer(clips):
    """whisper-english would merge number words: 'three one four' becomes 314."""
    names = {
        manifest.parent.name: name_for(read_manifest(manifest))
        for manifest in clips.parents[1].glob("*/*.jsonl")
        if manifest.parent.name in ("speech", "common-voice")
    }
    assert names == {"speech": "whisper-basic", "common-voice": "whisper-english"}


@pytest.mark.parametrize(
    ("lang", "text", "name"), [("hi", "हाँ", "hindi-wer"), ("ta", "தமிழ் மொழி", "none")]
)
def test_thresholds_use_the_normalizer_of_the_dev_clips(monkeypatch, tmp_path, lang, text, name):
    from edgewhisper import decoding
    from edgewhisper.compress.context import Context

    monkeypatch.setattr(Clip, "pcm", lambda clip: None)
    monkeypatch.setattr(decoding, "transcribe", lambda *given, **options: [text])
    processor = SimpleNamespace(tokenizer=lambda *given, **options: SimpleNamespace(input_ids=[1]))
    model = torch.nn.Linear(1, 1)
    model.config = model.generation_config = SimpleNamespace()
    found = Context(processor, [], clips_in((lang, text)), tmp_path).wer(model)
    assert (found.normalizer, found.wer) == (name, 0)


def test_bench_refuses_an_unknown_normalizer_before_measuring():
    from benchmarks.bench import BenchOptions, bench_all

    with pytest.raises(Problem, match="unknown normalizer 'vowels'"):
        bench_all([], None, clips_in(("en", "one")), BenchOptions(normalizer="vowels"))
