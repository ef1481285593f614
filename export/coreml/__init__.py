"""Core ML: packages in the MIL format, written and executed without Apple's tools."""
