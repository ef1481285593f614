"""Compression methods, one module each. A recipe's step names one of them.

A method's module has a frozen dataclass `Options` (the step's fields in the recipe) and
`apply(model, options, context) -> model`; context.py describes `context`. It may also state

    quantises(options) -> bool                 the step quantises weights; default: False
    allowed_after_quantisation(options) -> bool
                                               the step keeps quantised weights on their grids, so
                                               it may follow one that quantises; default: False

which step_order.py reads.
"""

METHODS: dict[str, str] = {
    "tspar": "edgewhisper.compress.tspar",
    "imp": "edgewhisper.compress.imp",
    "wsap": "edgewhisper.compress.wsap",
    "obs": "edgewhisper.compress.obs",  # optimal brain surgeon
    "lite": "edgewhisper.compress.lite",
    "merge": "edgewhisper.compress.merge",  # BaldWhisper, stage 1
    "shear": "edgewhisper.compress.shear",  # BaldWhisper, stage 2
    "kdq": "edgewhisper.compress.kdq",
    "gptq": "edgewhisper.compress.gptq",
    "qat": "edgewhisper.compress.qat",
    "short": "edgewhisper.compress.short",
    "recover": "edgewhisper.compress.recover",
    "shrink": "edgewhisper.compress.shrink",
}
