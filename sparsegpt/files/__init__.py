"""Files on disk that are written whole or not at all, and read with suspicion. Nothing here knows a model."""
