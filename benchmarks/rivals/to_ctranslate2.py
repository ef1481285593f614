"""Convert a checkpoint to CTranslate2's format with its own converter.

    python -m benchmarks.rivals.to_ctranslate2 CHECKPOINT OUT SITE_PACKAGES

The converter needs torch and transformers from the toolchain's environment, and ctranslate2 from
the rivals' environment. It runs in the first, with the second's packages at the end of the path.
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
