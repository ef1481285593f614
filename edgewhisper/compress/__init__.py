"""Compression methods, one file each. A recipe's step names one of them.

Each module has a frozen dataclass `Options` (the step's fields in the recipe) and
`apply(model, options, work) -> model`; see work.py for what `work` holds.
"""

METHODS: dict[str, str] = {
    "tspar": "edgewhisper.compress.tspar",
    "imp": "edgewhisper.compress.imp",
    "wsap": "edgewhisper.compress.wsap",
    "obs": "edgewhisper.compress.obs",  # optimal brain surgeon
    "lite": "edgewhisper.compress.lite",
    "merge": "edgewhisper.compress.merge",  # BaldWhisper, stage 1
    "shear": "edgewhisper.compress.shear",  # and stage 2
    "kdq": "edgewhisper.compress.kdq",
    "qat": "edgewhisper.compress.qat",
    "short": "edgewhisper.compress.short",
    "shrink": "edgewhisper.compress.shrink",
}
