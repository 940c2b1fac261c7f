"""What a packed weight is: tensors and their meaning, without a kernel or a file."""
