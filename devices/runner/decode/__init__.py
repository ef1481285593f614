"""From logits to text: rules, greedy and beam search, timestamps, long recordings."""
