"""Run the command line with `python -m edgewhisper`.

torchrun needs this form: `torchrun --nproc_per_node 2 -m edgewhisper compress`.
"""

from edgewhisper.cli import main

if __name__ == "__main__":
    main()
