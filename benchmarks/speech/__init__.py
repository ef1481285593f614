"""Speech: clips from manifests, Hugging Face data sets and audiofolders, and their sound files."""
