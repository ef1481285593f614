"""What this machine is, and how it is set: processor, memory, clocks, cores."""
