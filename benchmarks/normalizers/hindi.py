"""Hindi: which spellings count as the same word. The rules are our own.

Whisper's normalizer removes Devanagari's vowel signs (see whisper.py), so Hindi needs one that
never drops a mark. There are two profiles, whose steps can be switched one by one:

    hindi-strict   one encoding per spelling, no punctuation; spelling counts
    hindi-wer      additionally, one spelling for accepted variants

    switch         maps                                      for example
    numbers        digits, % and ₹ into words                 २०२५ = दो हजार पच्चीस, ₹50 = पचास रुपए
    avagraha       ऽ is removed                               सोऽहम् = सोहम्
    chandrabindu   ँ into ं                                   माँ = मां (unfortunately also हँस = हंस)
    nasals         nasal and virama before its class into ं   हिन्दी = हिंदी, but not जन्म
    nukta          no dot on क ख ग ज फ (and य न र ळ)          ज़मीन = जमीन; ड़ and ढ़ keep it
    visarga        no ः at the end of a word and in दुःख      प्रायः = प्राय, छः = छे = छह
    endings        -ये -यी -यें -येगा into -ए -ई -एं -एगा          गये = गए, नयी = नई; not the word ये

Differences in long and short i and u (कि, की), ब and व, श and स, ॉ and ो, and a final virama are
errors in both profiles. Years are read as plain numbers (1947 is एक हजार नौ सौ सैंतालीस). A decimal
point is दशमलव. Decimals, numbers of more than nine digits (telephone numbers) and numbers with a
leading zero are read digit by digit.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from benchmarks.normalizers.characters import BRACKETED, readable, ungrouped, without_invisible

CHANDRABINDU, ANUSVARA, VISARGA = "\u0901", "\u0902", "\u0903"
NUKTA, VIRAMA, AVAGRAHA = "\u093c", "\u094d", "\u093d"
VOWEL_SIGNS = "\u093e-\u094c\u0962\u0963"
LETTERS = "\u0904-\u0939\u0958-\u0961"


@dataclass(frozen=True)
class Hindi:
    """A Hindi normalizer with switches (see the module); hindi-wer has all, hindi-strict none."""

    numbers: bool = True
    avagraha: bool = True
    chandrabindu: bool = True
    nasals: bool = True
    nukta: bool = True
    visarga: bool = True
    endings: bool = True

    def __call__(self, text: str) -> str:
        text = without_invisible(text)
        # first, because its neighbours may then compose or need a repair
        text = text.replace(AVAGRAHA, "") if self.avagraha else text
        text = repaired(BRACKETED.sub(" ", one_encoding(text)))
        text = ascii_digits(colons_that_are_visargas(text))
        text = readable(in_words(text) if self.numbers else text)
        text = text.replace(CHANDRABINDU, ANUSVARA) if self.chandrabindu else text
        text = NUKTA_OF_LOANS.sub("", text) if self.nukta else text
        text = SAME_CLASS_NASAL.sub(ANUSVARA, text) if self.nasals else text
        text = DOUBLED.sub(r"\1", text)
        return " ".join(self._word(word) for word in text.split())

    def _word(self, word: str) -> str:
        word = without_visarga(word) if self.visarga else word
        return without_glide(word) if self.endings else word


# ------------------------------------------------------------------ encoding and typing mistakes


def one_encoding(text: str) -> str:
    """Return the text in lowercase NFC, except that nukta letters are always two code points."""
    text = unicodedata.normalize("NFC", text.lower())
    return text.translate(NUKTA_LETTERS)


NUKTA_LETTERS = {
    0x0929: "न" + NUKTA,
    0x0931: "र" + NUKTA,
    0x0934: "ळ" + NUKTA,
}

TYPED = {
    "अ" + "ा": "आ",
    "अ" + "ो": "ओ",
    "अ" + "ौ": "औ",
    "अ" + "ॉ": "ऑ",
    "आ" + "ॅ": "ऑ",
    "आ" + "े": "ओ",
    "आ" + "ै": "औ",
    "ए" + "े": "ऐ",
    "ा" + "ॅ": "ॉ",
    "ा" + "े": "ो",
    "ा" + "ै": "ौ",
}
"""Two signs that look like one and are often typed for it -> the intended sign."""

TYPED_PAIR = re.compile("|".join(TYPED))
LATE_NUKTA = re.compile(f"([{VOWEL_SIGNS}]+)({NUKTA})")
DOUBLED = re.compile(f"([{VOWEL_SIGNS}{CHANDRABINDU}{ANUSVARA}{NUKTA}{VIRAMA}])\\1+")


def repaired(text: str) -> str:
    """Repair mistyped signs until nothing changes: one repair may enable another."""
    before = ""
    while text != before:  # it ends: every change shortens the text or moves a nukta forward
        before = text
        text = one_encoding(LATE_NUKTA.sub(r"\2\1", text))  # puts the marks of a letter in order
        text = DOUBLED.sub(r"\1", text)
        text = TYPED_PAIR.sub(lambda match: TYPED[match[0]], text)
    return text


COLON_WITHIN = re.compile(f"(?<=[{LETTERS}{VOWEL_SIGNS}]):(?=[{LETTERS}])")
COLON_OF_SIX = re.compile("(?<![\u0900-\u097f])छ:")


def colons_that_are_visargas(text: str) -> str:
    """Replace colons typed instead of a visarga (दु:ख, छ:); other colons are punctuation."""
    return COLON_OF_SIX.sub("छ" + VISARGA, COLON_WITHIN.sub(VISARGA, text))


def ascii_digits(text: str) -> str:
    return ungrouped(text.translate({0x0966 + digit: str(digit) for digit in range(10)}))


# --------------------------------------------------------------------------------------- numbers

NUMBERS = """
    शून्य एक दो तीन चार पाँच छह सात आठ नौ
    दस ग्यारह बारह तेरह चौदह पंद्रह सोलह सत्रह अठारह उन्नीस
    बीस इक्कीस बाईस तेईस चौबीस पच्चीस छब्बीस सत्ताईस अट्ठाईस उनतीस
    तीस इकतीस बत्तीस तैंतीस चौंतीस पैंतीस छत्तीस सैंतीस अड़तीस उनतालीस
    चालीस इकतालीस बयालीस तैंतालीस चौवालीस पैंतालीस छियालीस सैंतालीस अड़तालीस उनचास
    पचास इक्यावन बावन तिरपन चौवन पचपन छप्पन सत्तावन अट्ठावन उनसठ
    साठ इकसठ बासठ तिरसठ चौंसठ पैंसठ छियासठ सड़सठ अड़सठ उनहत्तर
    सत्तर इकहत्तर बहत्तर तिहत्तर चौहत्तर पचहत्तर छिहत्तर सतहत्तर अठहत्तर उनासी
    अस्सी इक्यासी बयासी तिरासी चौरासी पचासी छियासी सत्तासी अट्ठासी नवासी
    नब्बे इक्यानवे बानवे तिरानवे चौरानवे पचानवे छियानवे सत्तानवे अट्ठानवे निन्यानवे
""".split()  # noqa: SIM905 (ten rows of ten can be checked by eye)

SCALES = ((10_000_000, "करोड़"), (100_000, "लाख"), (1000, "हजार"), (100, "सौ"))
LONGEST = 9
"""Numbers with more digits are read digit by digit."""

PERCENT = re.compile(r"(?<=[0-9])\s*%")
RUPEES = re.compile(r"₹\s*([0-9]+(?:\.[0-9]+)?(?:\s+(?:हजार|हज़ार|लाख|करोड़|अरब)(?!\S))?)")
NUMBER = re.compile(r"([0-9]+)(?:\.([0-9]+))?(व[ाीे][ंँ]?(?![\u0900-\u0963]))?")


def in_words(text: str) -> str:
    """Return the text with numbers in words.

    70% -> सत्तर प्रतिशत, ₹5 लाख -> पाँच लाख रुपये, 15.5 -> पंद्रह दशमलव पाँच, 21वीं -> इक्कीसवीं.
    """
    text = RUPEES.sub(r" \1 रुपये ", PERCENT.sub(" प्रतिशत ", text))
    return NUMBER.sub(_spelled, text)


def _spelled(match: re.Match[str]) -> str:
    whole, fraction, ordinal = match.groups(default="")
    words = whole_number(whole)
    if fraction:
        words = f"{words} दशमलव {digit_by_digit(fraction)}"
    return f" {words}{ordinal} "


def whole_number(digits: str) -> str:
    """Return digits in words: 125000 -> एक लाख पच्चीस हजार."""
    if len(digits) > LONGEST or (len(digits) > 1 and digits[0] == "0"):
        return digit_by_digit(digits)
    return cardinal(int(digits))


def digit_by_digit(digits: str) -> str:
    return " ".join(NUMBERS[int(digit)] for digit in digits)


def cardinal(number: int) -> str:
    """Return a number in words, in the Indian system: hundreds, thousands, lakhs, crores."""
    if number < 100:
        return NUMBERS[number]
    size, name = next(scale for scale in SCALES if number >= scale[0])
    count, rest = divmod(number, size)
    return " ".join([cardinal(count), name, *([cardinal(rest)] if rest else [])])


# -------------------------------------------------------------------------- accepted spellings

NUKTA_OF_LOANS = re.compile(f"(?<=[कखगजफयनरळ]){NUKTA}")

CLASSES = {"ङ": "क-घ", "ञ": "च-झ", "ण": "ट-ढ", "न": "त-ध", "म": "प-भ"}
"""Nasal -> the stops with the same place of articulation."""

SAME_CLASS_NASAL = re.compile(
    "|".join(f"{nasal}{VIRAMA}(?=[{stops}])" for nasal, stops in CLASSES.items())
)


def without_visarga(word: str) -> str:
    """Remove a final visarga, which mostly stands for a colon; a word of visargas only is kept."""
    word = (word.rstrip(VISARGA) or word).replace("दुःख", "दुख")
    return "छह" if word in ("छ", "छे") else word


GLIDE = re.compile(f"(?<=[^{VIRAMA}])य(?:ी(?P<i>ं?)|े(?P<e>ं?(?:ग[ाीे])?))$")


def without_glide(word: str) -> str:
    """Replace गयी by गई and आयेगा by आएगा; the word ये and a y in a cluster stay."""
    match = GLIDE.search(word)
    if match is None:
        return word
    vowel, rest = ("ई", match["i"]) if match["e"] is None else ("ए", match["e"])
    return word[: match.start()] + vowel + rest


hindi_wer = Hindi()
hindi_strict = Hindi(
    numbers=False,
    avagraha=False,
    chandrabindu=False,
    nasals=False,
    nukta=False,
    visarga=False,
    endings=False,
)
