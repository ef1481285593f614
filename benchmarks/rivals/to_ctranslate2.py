"""A checkpoint in CTranslate2's form, by CTranslate2's own converter.

    python -m benchmarks.rivals.to_ctranslate2 CHECKPOINT OUT SITE_PACKAGES

The converter needs torch and transformers, which the toolchain's environment has, and ctranslate2,
which the rivals' has: this runs in the first, with the second's packages behind it on the path.
"""

from __future__ import annotations

import json
import sys

COPIED = ["tokenizer.json", "preprocessor_config.json"]


def main(checkpoint: str, out: str, site_packages: str) -> None:
    sys.path.append(site_packages)
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(checkpoint, copy_files=COPIED).convert(out, quantization="int8")
    print(json.dumps({"written": out}))


if __name__ == "__main__":
    main(*sys.argv[1:])
