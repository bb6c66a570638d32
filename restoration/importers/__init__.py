"""The authors' checkpoints, turned into restorer files: one file a publication."""
