"""Compression methods, one module each. A recipe's step names one of them.

A method's module has a frozen dataclass `Options` (the step's fields in the recipe) and
`apply(model, options, context) -> model`; context.py describes `context`. It may also state

    REMOVES                                    names of the options that determine how much the
                                               step removes, for the hints of guard.py
    quantises(options) -> bool                 the step quantises weights; default: False
    allowed_after_quantisation(options) -> bool
                                               the step keeps quantised weights on their grids, so
                                               it may follow one that quantises; default: False

The last two are read by step_order.py.
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
