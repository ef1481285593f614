"""Whisper checkpoints in every form that people have them.

    openai.py        the sizes, vocabularies and special tokens of OpenAI's Whisper
    ctranslate2.py   reads the folders of faster-whisper
    pt.py            reads the .pt files of openai-whisper
    generation.py    completes and checks the generation config of any of them
    fetch.py         gets OpenAI's weights from the hub, or from pinned packages

`edgewhisper.whisper.load` takes all of these forms and Hugging Face directories.
"""
