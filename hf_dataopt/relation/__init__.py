"""Chapter 5: the neural relation graph."""
