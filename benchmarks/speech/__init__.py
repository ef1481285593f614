"""Speech: clips from manifests, Hugging Face datasets and audiofolders, and their audio files."""
