"""Windows, losses, the training core, errors and atomic files: nothing here knows FAISS or a command line."""
