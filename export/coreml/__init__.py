"""Export to Core ML: packages in the MIL format, written and executed without a Mac."""
