"""Export: a torch module in, files for a device out."""
