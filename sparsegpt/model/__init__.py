"""What a transformers model is: where its blocks are, how they are called, how it is loaded and written."""
