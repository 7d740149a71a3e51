"""What no reader of the paper needs to open: command line, files, text, checkpoints."""
