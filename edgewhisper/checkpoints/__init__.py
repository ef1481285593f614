"""Whisper checkpoints in all forms in which they are distributed.

store.py         loads all of these forms, and saves Hugging Face directories
huggingface.py   reads Hugging Face checkpoints, local or from the hub
ctranslate2.py   reads the folders of faster-whisper
pt.py            reads the .pt files of openai-whisper
lora.py          merges LoRA adapters into their base
processors.py    loads tokenizers and feature extractors
generation_file.py reads generation_config.json
generation.py    completes and checks generation configs
openai.py        sizes, vocabularies and special tokens of OpenAI's Whisper
fetch.py         downloads OpenAI's weights from the hub or from pinned packages
pinned.py        versions and hashes of these packages
"""
