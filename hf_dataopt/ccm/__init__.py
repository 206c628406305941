"""Chapter 7: Compressed Context Memory."""
