"""What the commands of `hf-dataopt` share: one vocabulary of options, one way to read data, one way to refuse a call."""
