"""Synthesise speech with espeak-ng: English digits in many voices, other words in many languages.

    python -m benchmarks.study.digits.synthesise --out CACHE/espeak.npz

There are four kinds of clip, each with the text that the model should output:

    word      one digit in an English voice                         "seven"
    phrase    two to five digits as one phrase                      "three one four"
    accented  digits respelled for a voice of another language      "seven"
    other     words and phrases that are not English digits         ""

espeak-ng (GPL-3.0) is called as a program; its licence does not cover its output.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from benchmarks.study.digits import DIGITS, SAMPLE_RATE

ACCENTS = [
    "en-us",
    "en-gb",
    "en-029",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-us-nyc",
]

# Held-out voices for dev and test, which are not in the training file.
DEV_VARIANTS = ["f4", "m6", "Hugo", "linda", "edward", "klatt2", "travis", "steph3"]
TEST_VARIANTS = ["f2", "m3", "Andrea", "norbert", "Mike", "klatt4", "paul", "anika"]
_TRAIN_VARIANTS = (
    "Alex Alicia Andy Annie Denis Diogo Gene Gene2 Henrique Jacky Lee Marco Mario Michael Nguyen "
    "adam antonio aunty belinda benjamin boris caleb david ed edward2 f1 f3 f5 grandma grandpa "
    "gustave iven iven2 iven3 iven4 john kaukovalta klatt klatt3 m1 m2 m4 m5 m7 m8 marcelo max "
    "michel miguel pablo pedro quincy rob robert sandro shelby steph steph2 victor zac "
    "RicishayMax RicishayMax2 Storm croak"
)
TRAIN_VARIANTS = _TRAIN_VARIANTS.split()

# English digits, spelled so that a voice of each language pronounces them in English.
ACCENTED = {
    "de": "siero wann tuh srie vor faif sicks sewwen äit nain",
    "nl": "zierow wan toe srie for faaif siks sevven eejt najn",
    "fr": "zirau ouane tou sri faure faïve sixe sévène éïte naïne",
    "es": "siro uan tu zri for faiv six seven eit nain",
    "it": "ziro uan tu tri for faiv sics seven eit nain",
    "pl": "ziroł łan tu fri for fajw siks sewen ejt najn",
    "pt-br": "zírou uãn tu sri fór faiv síquis séven êit náin",
    "tr": "ziro van tu tri for fayv siks sevın eyt nayn",
    "sv": "siråo oan to tri får fajv sicks sevven ejt najn",
    "id": "ziro wan tu tri for faif siks seven eit nain",
    "hi": "ज़ीरो वन टू थ्री फोर फाइव सिक्स सेवन एट नाइन",
    "ru": "зироу уан ту сри фор файв сикс сэвен эйт найн",
    "el": "ζίροου γουάν του θρι φορ φάιβ σιξ σέβεν έιτ νάιν",
    "bn": "জিরো ওয়ান টু থ্রি ফোর ফাইভ সিক্স সেভেন এইট নাইন",
}

# Words that must give empty texts. Words that sound like an English digit ("sechs", "nein", "won",
# "to", "ate") are left out.
OTHER_WORDS = {
    "en-us": "hello water window computer yellow banana music kitchen please thank monday "
    "doctor people garden open close light on off stop go yes no up down left right house tree "
    "bird happy wow dog cat bed marvin sheila learn follow visual forward backward start cancel "
    "minute weather morning alarm coffee station orange purple summer river mountain paper "
    "hundred thousand million eleven twelve twenty first second half point minus",
    "de": "Fenster Wasser Haus Schule Katze Baum Freund Morgen Straße Licht Küche danke bitte",
    "fr": "bonjour maison fenêtre école chat arbre merci lumière cuisine aujourd'hui gauche droite",
    "es": "ventana agua casa escuela gato árbol gracias cocina mañana izquierda derecha luz",
    "it": "finestra acqua casa scuola gatto albero grazie cucina domani sinistra destra luce",
    "pt-br": "janela água escola gato árvore obrigado cozinha amanhã esquerda direita luz",
    "nl": "venster water huis school kat boom dank keuken morgen links rechts licht",
    "pl": "okno woda dom szkoła kot drzewo dziękuję kuchnia jutro lewo prawo światło",
    "ru": "окно вода дом школа кошка дерево спасибо кухня завтра налево направо свет",
    "tr": "pencere su ev okul kedi ağaç teşekkürler mutfak yarın sol sağ ışık",
    "sv": "fönster vatten hus skola katt träd tack kök imorgon vänster höger ljus",
    "el": "παράθυρο νερό σπίτι σχολείο γάτα δέντρο ευχαριστώ κουζίνα αύριο φως",
    "sw": "dirisha maji nyumba shule paka mti asante jikoni kesho taa",
}
OTHER_PHRASES = {
    "en-us": "turn the lights off|where is the station|the weather is nice today|"
    "please open the door|could you play some music|my brother lives in the city|"
    "what time does it start|she sells sea shells|the quick brown fox jumps over the lazy dog|"
    "set an alarm in the morning|they walked along the river|good night and good luck",
    "de": "wo ist der Bahnhof|ich möchte einen Kaffee|das Wetter ist heute schön",
    "fr": "où est la gare|je voudrais un café|il fait beau aujourd'hui",
    "es": "dónde está la estación|quisiera un café|hoy hace buen tiempo",
    "it": "dov'è la stazione|vorrei un caffè|oggi fa bel tempo",
    "ru": "где находится вокзал|я хотел бы кофе|сегодня хорошая погода",
    "sw": "kituo kiko wapi|ningependa kahawa|hali ya hewa ni nzuri leo",
}
# Languages for the evaluation only; they are not in the training data.
HELD_OUT_WORDS = {
    "fi": "ikkuna vesi talo koulu kissa puu kiitos keittiö huomenna valo",
    "hu": "ablak víz ház iskola macska köszönöm konyha holnap jobbra",
    "cs": "okno voda dům škola kočka strom děkuji kuchyně zítra světlo",
    "ro": "fereastră apă casă școală pisică copac mulțumesc bucătărie mâine lumină",
    "en-gb": "table river garden sunday pencil umbrella holiday butter village engine",
}


class EspeakMissing(RuntimeError):
    """Raised when the espeak-ng program is not on the PATH."""


@dataclass(frozen=True)
class Voice:
    """An espeak-ng voice: language, variant, pitch (0..99) and words per minute."""

    language: str
    variant: str = ""
    pitch: int = 50
    wpm: int = 170

    @property
    def name(self) -> str:
        """The name for espeak-ng's option -v, such as "en-gb+f3"."""
        return f"{self.language}+{self.variant}" if self.variant else self.language


def random_voice(rng: np.random.Generator, variants: list[str], language: str = "") -> Voice:
    """Return a voice of random variant, pitch and pace, by default in a random English accent."""
    return Voice(
        language or str(rng.choice(ACCENTS)),
        str(rng.choice(variants)),
        int(rng.integers(12, 90)),
        int(rng.integers(120, 240)),
    )


def require_espeak() -> str:
    """Return the path of espeak-ng. Raises EspeakMissing if it is not installed."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise EspeakMissing(
            "espeak-ng is not on the PATH.\ntry:   apt install espeak-ng, or brew install espeak-ng"
        )
    return program


def trim(samples: np.ndarray) -> np.ndarray:
    """Remove samples below 1 % of the peak at both ends, except for 10 and 25 ms."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * max(1e-6, np.abs(samples).max()))
    if len(loud) == 0:
        return samples[:0]
    return samples[max(0, loud[0] - 160) : loud[-1] + 400]


def peak_one(samples: np.ndarray) -> np.ndarray:
    """Return the samples scaled to a peak of 1; silence is not changed."""
    return samples / max(1e-4, float(np.abs(samples).max(initial=0)))


def speak(text: str, voice: Voice) -> np.ndarray:
    """Return `text` spoken by `voice`: samples (n,) float32 at 16 kHz with peak 1, or empty."""
    command = [require_espeak(), "-v", voice.name, "-p", str(voice.pitch), "-s", str(voice.wpm)]
    wav = subprocess.run([*command, "--stdout", text], capture_output=True, check=False).stdout
    if len(wav) <= 44:
        return np.zeros(0, np.float32)
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    return peak_one(trim(soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)))


@dataclass(frozen=True)
class Line:
    """A clip to synthesise: `spoken` is the synthesiser's input, `text` the expected transcript."""

    kind: str
    spoken: str
    text: str
    voice: Voice


def digit_lines(
    rng: np.random.Generator, variants: list[str], words: int, phrases: int
) -> Iterator[Line]:
    """Yield `words` rounds of the ten digits, then `phrases` phrases of two to five digits."""
    for _ in range(words):
        voice = random_voice(rng, variants)
        yield from (Line("word", digit, digit, voice) for digit in DIGITS)
    for _ in range(phrases):
        text = " ".join(rng.choice(DIGITS, rng.integers(2, 6)))
        yield Line("phrase", text, text, random_voice(rng, variants))


def accented_lines(rng: np.random.Generator, variants: list[str], rounds: int) -> Iterator[Line]:
    """Yield `rounds` rounds of the ten digits in every language of ACCENTED."""
    for language, spelling in ACCENTED.items():
        for _ in range(rounds):
            voice = random_voice(rng, variants, language)
            for digit, spoken in zip(DIGITS, spelling.split(), strict=True):
                yield Line("accented", spoken, digit, voice)


def other_lines(rng: np.random.Generator, variants: list[str], rounds: int) -> Iterator[Line]:
    """Yield every other word and phrase `rounds` times, each with a new voice."""
    spoken = [(lang, word) for lang, words in OTHER_WORDS.items() for word in words.split()]
    spoken += [(lang, p) for lang, group in OTHER_PHRASES.items() for p in group.split("|")]
    for _ in range(rounds):
        for language, words in spoken:
            yield Line("other", words, "", random_voice(rng, variants, language))


def save_cache(
    path: Path, lines: list[Line], speaker: Callable[[str, Voice], np.ndarray] = speak
) -> None:
    """Synthesise every line and write the concatenated clips and their labels as .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        spoken = list(pool.map(lambda line: speaker(line.spoken, line.voice), lines))
    kept = [(line, clip) for line, clip in zip(lines, spoken, strict=True) if len(clip) > 800]
    audio = [(clip * 20_000).astype(np.int16) for _, clip in kept]
    length = np.array([len(clip) for clip in audio])
    np.savez(
        path,
        allow_pickle=False,
        audio=np.concatenate(audio),
        length=length,
        text=np.array([line.text for line, _ in kept]),
        kind=np.array([line.kind for line, _ in kept]),
        voice=np.array([line.voice.name for line, _ in kept]),
    )
    print(path, len(audio), "clips", round(length.sum() / SAMPLE_RATE), "s")


def build_cache(out: Path, rounds: int, seed: int = 0) -> None:
    """Write `out` (training voices) and `out` with "-dev" before its suffix (held-out voices)."""
    for path, variants, scale in (
        (out.with_name(f"{out.stem}-dev{out.suffix}"), DEV_VARIANTS, 0.05),
        (out, TRAIN_VARIANTS, 1.0),
    ):
        rng = np.random.default_rng([seed, len(variants)])
        share = max(1, round(rounds * scale))
        lines = [
            *digit_lines(rng, variants, 10 * share, 30 * share),
            *accented_lines(rng, variants, max(1, share // 2)),
            *other_lines(rng, variants, max(1, share // 4)),
        ]
        save_cache(path, lines)


def main() -> None:
    """Write the training file and the dev file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--rounds", type=int, default=60, help="60 gives about 13000 clips")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build_cache(options.out, options.rounds, options.seed)


if __name__ == "__main__":
    main()
