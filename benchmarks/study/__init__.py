"""The tables and claims of papers, measured again: scripts, one question each."""
