"""What the commands share: options, data, refusals, the terminal."""
