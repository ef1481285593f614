"""Decoding: from logits to text, by greedy or beam search, with Whisper's rules."""
