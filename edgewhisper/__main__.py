"""`python -m edgewhisper`, for torchrun: torchrun --nproc_per_node 2 -m edgewhisper compress."""

from edgewhisper.cli import main

if __name__ == "__main__":
    main()
