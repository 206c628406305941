"""Chapters 3 and 4: Puzzle Mix and Co-Mixup."""
