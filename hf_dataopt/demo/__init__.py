"""The demo: one section per method."""
