"""From clean pictures, in folders or shards, to training pairs."""
