"""Count the instructions of artifacts on AArch64 cores in an emulator."""
